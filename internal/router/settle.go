package router

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// letterPatience is how long a dead letter is tried that the hub certainly refuses.
	// Letters are copies for people: the event itself stays in POS.
	letterPatience = 3 * time.Second
	// hopelessFor is how long after that a lane's letters are tried only once each.
	hopelessFor = time.Minute
	// letterTry is how long the broker may go on about one: it gives an attempt without an
	// answer no end of its own, and the hub may refuse the next.
	letterTry = 10 * time.Second

	// Of quarantined events, so many of one site, edge and cause, and in all, are kept as
	// dead letters in a minute: garbage must not fill DLQ.
	samplesEach = 5
	samplesAll  = 100
)

// sample is what quarantined events are alike in.
type sample struct {
	site, edge string
	cause      cause
}

// settle stores what became of the event, and then acknowledges it: for a failure the
// dead letter, then the report; for a delivery the report; for quarantine the dead letter
// only, as nobody's word stands for the event (I8). A dead letter that the hub certainly
// refuses is dropped, alarmed and counted (I13), so that it stops no Kitchen. With all
// else it goes on until the hub has taken it: nothing is posted again because a report
// could not be stored. False: the tenure ended before; the next one goes on here.
func (t *tenure) settle(l *lane, it *item) bool {
	if it.settled.IsZero() {
		it.settled = time.Now()
	}
	if it.fate.state != stateDelivered && !it.deadLettered {
		if !t.bury(l, it) {
			return false
		}
		it.deadLettered = true
	}
	if it.fate.cause == "" && !it.reported {
		if !t.store(it, func() error {
			report, err := t.r.report(l, it)
			if err != nil {
				return err
			}
			return t.r.hub.PublishReport(t.io, report)
		}, nil) {
			return false
		}
		it.reported = true
	}
	// As long as a Kitchen may work on an attempt without an answer, the event stays
	// unacknowledged: an owner who comes after a kill sees by it that it has to wait (I4).
	// The lane waits anyway.
	if it.unknown && !sleep(t.io, it.cut.Add(t.r.cfg.Settle)) {
		return false
	}
	t.r.ackDelivery(it.d)
	t.r.count(l, it)
	return true
}

// bury stores the dead letter, or drops it: one of too many alike, or one that the hub
// certainly refuses. False when the tenure ended before.
func (t *tenure) bury(l *lane, it *item) bool {
	if c := it.fate.cause; c != "" && !t.r.samples.take(sample{it.d.Site, it.d.Edge, c}, time.Now()) {
		t.r.metrics.dropped.inc(dropSampled)
		return true
	}
	letter := broker.DeadLetter{
		Delivery: it.d, Endpoint: endpointName(l.e),
		Reason: string(it.fate.reason), Attempts: it.attempts, Status: it.last.status,
	}
	publish := func() error {
		ctx, cancel := context.WithTimeout(t.io, letterTry)
		defer cancel()
		return t.r.hub.PublishDeadLetter(ctx, letter)
	}
	var refused time.Time // since when
	return t.store(it, publish, func(err error) bool {
		certain := errors.Is(err, broker.ErrRejected) && !errors.Is(err, broker.ErrAway) || errors.Is(err, broker.ErrInvalid)
		if !certain {
			return false
		}
		now := time.Now()
		if refused.IsZero() {
			refused = now
		}
		if now.Sub(refused) < letterPatience && !t.isHopeless(l, now) {
			return false
		}
		t.setHopeless(l, now)
		t.r.metrics.dropped.inc(dropRefused)
		t.r.droppedLog.Do(func() { t.r.log.Error(alarmDropped, append(about(it), "reason", it.fate.reason, "err", err)...) })
		return true
	})
}

// isHopeless tells whether a letter of the lane was given up a moment ago.
func (t *tenure) isHopeless(l *lane, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return now.Before(l.hopeless)
}

func (t *tenure) setHopeless(l *lane, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l.hopeless = now.Add(hopelessFor)
}

// about is what a log record says of an event.
func about(it *item) []any {
	return []any{"site", it.d.Site, "edge", it.d.Edge, "kind", it.d.Kind, "seq", it.d.Event.Seq, "id", it.d.Event.ID}
}

// store tries until the hub has stored it, or giveUp, unless nil, says of the error that
// this is enough; false when the tenure ended before.
func (t *tenure) store(it *item, publish func() error, giveUp func(error) bool) bool {
	const shortest, longest = 100 * time.Millisecond, 5 * time.Second
	for wait := shortest; ; wait = min(2*wait, longest) {
		err := publish()
		if err == nil {
			return true
		}
		if t.io.Err() != nil {
			return false
		}
		if giveUp != nil && giveUp(err) {
			return true
		}
		attrs := append(about(it), "err", err)
		if errors.Is(err, broker.ErrAway) || errors.Is(err, broker.ErrUnknown) {
			t.r.storeLog.Do(func() { t.r.log.Warn("outcome not stored yet; tried again until the hub has it", attrs...) })
		} else {
			t.r.refusedLog.Do(func() { t.r.log.Error(alarmStore, attrs...) })
		}
		if !sleep(t.io, time.Now().Add(wait/2+rand.N(wait/2))) {
			return false
		}
	}
}

// ackDelivery acknowledges. A lost acknowledgement costs a redelivery, which is dropped
// because the report is in the log.
func (r *Router) ackDelivery(d *broker.Delivery) {
	if err := d.Ack(); err != nil {
		r.log.Debug("acknowledgement not sent", "site", d.Site, "edge", d.Edge, "stream_seq", d.StreamSeq, "err", err)
	}
}

func (r *Router) count(l *lane, it *item) {
	m, ev, fate := r.metrics, &it.d.Event, it.fate
	if fate.cause != "" {
		m.quarantined.inc(fate.cause)
		r.quarantineLog.Do(func() {
			r.log.Error(alarmQuarantine, "site", it.d.Site, "kind", it.d.Kind, "edge", it.d.Edge, "seq", ev.Seq, "id", ev.ID,
				"reason", fate.cause, "stream_seq", it.d.StreamSeq, "err", it.d.Err)
		})
		return
	}
	m.deliveries[fate.state].inc(fate.reason)
	m.latency.Observe(max(time.Since(it.d.Stored), 0).Seconds())
	if fate.state == stateFailed {
		r.log.Warn("event not delivered", "site", ev.Site, "endpoint", endpointName(l.e), "kind", ev.Kind, "edge", ev.Edge,
			"seq", ev.Seq, "id", ev.ID, "reason", fate.reason, "status", it.last.status, "attempts", it.attempts, "err", it.last.err)
	}
}

// report says what became of the delivery. The Kitchen's answer in it is sealed: it may
// repeat the order (I6).
func (r *Router) report(l *lane, it *item) (*broker.Report, error) {
	ev := &it.d.Event
	rep := &broker.Report{
		Report: envelope.Report{
			Site: ev.Site, Edge: ev.Edge, Epoch: ev.Epoch, Seq: ev.Seq, ID: ev.ID,
			Endpoint: endpointName(l.e), N: 0,
			State: string(it.fate.state), Reason: string(it.fate.reason),
			Status: it.last.status, Attempts: it.attempts,
			Settled: it.settled.UnixMilli(),
		},
		Kind: ev.Kind, StreamSeq: it.d.StreamSeq,
	}
	if !it.started.IsZero() {
		rep.Started = it.started.UnixMilli()
	}
	return r.seal(&it.last, rep)
}

// seal adds the Kitchen's answer to a report, and the tag.
func (r *Router) seal(a *answer, rep *broker.Report) (*broker.Report, error) {
	key := r.binding(rep.Site).Current()
	sealed, err := key.SealReport(appendAnswer(nil, a))
	if err != nil {
		return nil, err
	}
	rep.Triple, rep.Bind = sealed, key.ID()
	rep.Tag = key.TagReport(&rep.Report)
	return rep, nil
}

// answerHeaders are what a report keeps of the headers of an answer.
var answerHeaders = [...]struct{ name, key string }{
	{"Content-Type", "content-type"},
	{"Retry-After", "retry-after"},
}

// mostHeader is how long a kept header may be, in bytes; a longer one is left out.
const mostHeader = 256

// appendAnswer writes the plaintext of a report's triple:
//
//	{"status":422,"headers":{"content-type":"application/json"},"body":"<base64>"}
//
// Without an answer, status is 0, and headers and body are empty.
func appendAnswer(dst []byte, a *answer) []byte {
	dst = append(dst, `{"status":`...)
	dst = strconv.AppendInt(dst, int64(a.status), 10)
	dst = append(dst, `,"headers":{`...)
	comma := false
	for _, h := range answerHeaders {
		values := a.header[h.name]
		if len(values) == 0 || len(values[0]) > mostHeader {
			continue
		}
		text, err := json.Marshal(values[0])
		if err != nil {
			continue
		}
		if comma {
			dst = append(dst, ',')
		}
		comma = true
		dst = append(dst, '"')
		dst = append(dst, h.key...)
		dst = append(dst, `":`...)
		dst = append(dst, text...)
	}
	dst = append(dst, `},"body":"`...)
	dst = base64.StdEncoding.AppendEncode(dst, a.body)
	return append(dst, `"}`...)
}
