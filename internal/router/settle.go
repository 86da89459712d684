package router

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// settle stores what became of the event, and then acknowledges it: for a failure the
// dead letter, then the report; for a delivery the report; for quarantine the dead letter
// only, as nobody's word stands for the event (I8). It goes on until the hub has taken
// both: nothing is posted again because a report could not be stored. False: the tenure
// ended before; the next one goes on here.
func (t *tenure) settle(l *lane, it *item) bool {
	if it.settled.IsZero() {
		it.settled = time.Now()
	}
	if it.fate.state != stateDelivered && !it.deadLettered {
		letter := broker.DeadLetter{
			Delivery: it.d, Endpoint: endpointName(l.e),
			Reason: string(it.fate.reason), Attempts: it.attempts, Status: it.last.status,
		}
		if !t.store(it, func() error { return t.r.hub.PublishDeadLetter(t.io, letter) }) {
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
		}) {
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

// store tries until the hub has stored it; false when the tenure ended before.
func (t *tenure) store(it *item, publish func() error) bool {
	const shortest, longest = 100 * time.Millisecond, 5 * time.Second
	for wait := shortest; ; wait = min(2*wait, longest) {
		err := publish()
		if err == nil {
			return true
		}
		if t.io.Err() != nil {
			return false
		}
		attrs := []any{"site", it.d.Site, "edge", it.d.Edge, "kind", it.d.Kind, "seq", it.d.Event.Seq, "id", it.d.Event.ID, "err", err}
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
	key := r.keys.Site(ev.Site).Binding.Current()
	sealed, err := key.SealReport(appendAnswer(nil, &it.last))
	if err != nil {
		return nil, err
	}
	rep := &broker.Report{
		Report: envelope.Report{
			Site: ev.Site, Edge: ev.Edge, Epoch: ev.Epoch, Seq: ev.Seq, ID: ev.ID,
			Endpoint: endpointName(l.e), N: 0,
			State: string(it.fate.state), Reason: string(it.fate.reason),
			Status: it.last.status, Attempts: it.attempts,
			Settled: it.settled.UnixMilli(),
			Triple:  sealed,
		},
		Kind: ev.Kind, StreamSeq: it.d.StreamSeq, Bind: key.ID(),
	}
	if !it.started.IsZero() {
		rep.Started = it.started.UnixMilli()
	}
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
