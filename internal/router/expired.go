package router

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// mostExpired is how many numbers a run may have.
	mostExpired = 1000
	// mostTellers is how many reports on numbers of runs are under way at once in a partition.
	mostTellers = 64
	// latestTime bounds the times in a run as those of events are: the end of the year 9999.
	latestTime = 253402300799999
)

// expiry is what a run says of one number.
type expiry struct {
	ID       string `json:"id"`
	Kind     string `json:"kind"`
	Accepted int64  `json:"accepted"` // Unix ms, as Deadline
	Deadline int64  `json:"deadline"`
}

// tell lets the lane's runs be worked off when there are any. The caller holds mu.
func (t *tenure) tell(l *lane) {
	if len(l.expired) > 0 && !l.telling && !t.closed && !t.awaits(l.expired[0]) {
		l.telling = true
		t.wg.Go(func() { t.tellRuns(l) })
	}
}

// awaits tells whether an event of a number that the run covers lies before it in the stream
// and is not settled: that one has its own report, and comes first. The caller holds mu.
func (t *tenure) awaits(run *item) bool {
	ev := &run.d.Event
	for _, it := range t.held {
		o := &it.d.Event
		if it.d.StreamSeq < run.d.StreamSeq && it.d.Kind != broker.KindExpired && it.d.Site == run.d.Site &&
			o.Edge == ev.Edge && o.Epoch == ev.Epoch && ev.From <= o.Seq && o.Seq <= ev.Seq {
			return true
		}
	}
	return false
}

// tellRuns works off the lane's runs, in order and one at a time.
func (t *tenure) tellRuns(l *lane) {
	for it := t.nextRun(l, nil); it != nil; it = t.nextRun(l, it) {
		if !t.settleRun(l, it) {
			return // the tenure ended
		}
	}
}

// nextRun gives up the settled run and takes the next; nil when there is none, or one that
// has to wait, for which release starts anew.
func (t *tenure) nextRun(l *lane, settled *item) *item {
	t.mu.Lock()
	defer t.mu.Unlock()
	if settled != nil {
		t.release(settled)
	}
	if len(l.expired) == 0 || t.closed || t.awaits(l.expired[0]) {
		l.telling = false
		t.discard(l)
		return nil
	}
	head := l.expired[0]
	l.expired[0] = nil
	if l.expired = l.expired[1:]; len(l.expired) == 0 {
		l.expired = nil
	}
	return head
}

// settleRun reports each number of the run that has no end yet, and then acknowledges the
// run (I8). Killed in between, the next owner finds in the report log which are done. False:
// the tenure ended before.
//
// There are no dead letters: the run does not hold the events.
func (t *tenure) settleRun(l *lane, it *item) bool {
	quarantine := func(c cause, err error) bool {
		if err != nil {
			it.d.Err = err
		}
		it.fate = &fate{reason: ReasonQuarantine, cause: c}
		return t.settle(l, it)
	}
	if c := t.r.examine(it.d); c != "" {
		return quarantine(c, nil)
	}
	list, err := t.r.openRun(it.d)
	if err != nil {
		return quarantine(causeRun, err)
	}
	open, fresh := t.take(it.d)
	switch {
	case len(open) > 0:
	case fresh && it.before:
		t.r.metrics.skipped.inc(causeReported)
		t.r.ackDelivery(it.d)
		return true
	default:
		return quarantine(causeReplay, nil)
	}
	if !t.report(it, list, open) {
		return false
	}
	t.r.ackDelivery(it.d)
	ev := &it.d.Event
	t.r.log.Warn("events expired at their edge", "site", ev.Site, "edge", ev.Edge, "from", ev.From, "seq", ev.Seq, "reported", len(open))
	return true
}

// take returns the numbers of a verified run that have no end and that nobody else in this
// tenure is to report on; fresh when it has any that were not met in this tenure.
//
// The log is known from the oldest event on that was unacknowledged at the take-over. A run
// over numbers that ended before that is reported on again; for each, the first end counts.
func (t *tenure) take(d *broker.Delivery) (open []uint64, fresh bool) {
	ev := eventOf(d)
	t.mu.Lock()
	unmet := t.met.take(ev.source, d.Event.From, ev.seq, time.Now())
	t.mu.Unlock()
	for _, r := range unmet {
		for n := range r.to - r.from + 1 {
			if seq := r.from + n; !t.past.isSettled(ev.source, seq) {
				open = append(open, seq)
			}
		}
	}
	return open, len(unmet) > 0
}

// report stores the reports on the numbers. False: the tenure ended before.
func (t *tenure) report(it *item, list []expiry, open []uint64) bool {
	it.settled = time.Now()
	var wg sync.WaitGroup
	var missing atomic.Bool
	for _, seq := range open {
		select {
		case t.tellers <- struct{}{}:
		case <-t.io.Done():
			missing.Store(true)
		}
		if missing.Load() {
			break // the tenure ended: the rest is not begun
		}
		wg.Go(func() {
			defer func() { <-t.tellers }()
			if !t.storeExpiry(it, seq, &list[seq-it.d.Event.From]) {
				missing.Store(true)
			}
		})
	}
	wg.Wait()
	return !missing.Load()
}

// storeExpiry stores the report on one number of a run. False: the tenure ended before.
func (t *tenure) storeExpiry(it *item, seq uint64, x *expiry) bool {
	ok := t.store(it, func() error {
		report, err := t.r.expiryReport(it, seq, x)
		if err != nil {
			return err
		}
		return t.r.hub.PublishReport(t.io, report)
	}, nil)
	if ok {
		t.r.metrics.deliveries[stateFailed].inc(ReasonExpired)
	}
	return ok
}

// expiryReport says that one event of a run expired at its edge.
func (r *Router) expiryReport(it *item, seq uint64, x *expiry) (*broker.Report, error) {
	ev := &it.d.Event
	return r.seal(&answer{}, &broker.Report{
		Report: envelope.Report{
			Site: ev.Site, Edge: ev.Edge, Epoch: ev.Epoch, Seq: seq, ID: x.ID,
			Endpoint: noEndpoint, State: string(stateFailed), Reason: string(ReasonExpired),
			Settled: it.settled.UnixMilli(),
		},
		Kind: x.Kind, StreamSeq: it.d.StreamSeq,
	})
}

// openRun returns what a verified run says of its numbers, in their order. An error says
// what no edge would have written.
func (r *Router) openRun(d *broker.Delivery) ([]expiry, error) {
	ev := &d.Event
	count := ev.Seq - ev.From + 1 // From is 1 to Seq, the broker has seen to that
	if count > mostExpired {
		return nil, fmt.Errorf("run of %d numbers, %d are the most", count, mostExpired)
	}
	if ev.Order != "" {
		return nil, errors.New("run with an order key")
	}
	plain, err := r.binding(ev.Site).OpenPlain(nil, ev.Triple)
	if err != nil {
		return nil, fmt.Errorf("run: %w", err)
	}
	var body struct {
		Expired []expiry `json:"expired"`
	}
	dec := json.NewDecoder(bytes.NewReader(plain))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&body); err != nil {
		return nil, errors.New("run: it is not the JSON of one") // the decoder's text may quote it
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("run: more follows its JSON")
	}
	if uint64(len(body.Expired)) != count {
		return nil, fmt.Errorf("run of %d numbers lists %d", count, len(body.Expired))
	}
	for i := range body.Expired {
		if err := body.Expired[i].check(); err != nil {
			return nil, fmt.Errorf("run: number %d: %w", ev.From+uint64(i), err)
		}
	}
	return body.Expired, nil
}

// check holds what a report on it will need.
func (x *expiry) check() error {
	if err := envelope.ValidName(x.Kind); err != nil {
		return fmt.Errorf("kind: %w", err)
	}
	if x.Kind == broker.KindExpired || x.Kind == broker.KindReport {
		return fmt.Errorf("kind: %s is reserved", x.Kind)
	}
	if !validID(x.ID) {
		return errors.New("id: not 1 to 128 letters, digits, - and _")
	}
	if x.Accepted < 0 || x.Deadline < x.Accepted || x.Deadline > latestTime {
		return fmt.Errorf("accepted %d, deadline %d: not in order, or no times", x.Accepted, x.Deadline)
	}
	return nil
}

func validID(id string) bool {
	if id == "" || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}
