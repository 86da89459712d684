package router

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

const (
	// sweepEvery is how often queued events are looked at for having expired.
	sweepEvery = 250 * time.Millisecond
	// sweepers bounds how many expired events of a partition are settled at once. It is so
	// many because one that is stuck keeps its place.
	sweepers = 64
	// clockTolerance is how far an edge's clock may be from the hub's without a warning.
	clockTolerance = time.Minute
	// mostClockWarnings is for how many edges it is said in a minute.
	mostClockWarnings = 100
)

// tenure is the time between two take-overs of a partition, and the events held in it:
// a lane for each site, worked off in order by one goroutine as long as it is not empty.
//
// The lanes have no bound of their own. The consumer hands out at most its MaxAckPending
// (4096 for a partition) events without acknowledgement, copies of held ones are dropped,
// and everything held is unacknowledged: together, the lanes never hold more. When one
// dead Kitchen has filled that, the consumer stops for the partition until its events
// expire.
type tenure struct {
	// Fixed at birth.
	p       *partition
	r       *Router
	last    uint64 // stream sequence: an event not above it may have been attempted before
	first   bool   // of this process: another owner may have been killed before
	past    past
	begin   context.Context
	stop    context.CancelFunc // ends begin: no further attempt
	io      context.Context
	abort   context.CancelFunc // ends io: what is in flight is cut
	tellers chan struct{}      // a place for each report on a number of a run
	wg      sync.WaitGroup     // lanes, added to under mu while not closed; the sweeper, and what it starts

	mu sync.Mutex
	// Guarded by mu.
	closed    bool
	lanes     map[string]*lane
	highest   uint64           // stream sequence; what is not above it is a copy
	held      map[uint64]*item // what is not settled, by its stream sequence
	met       met
	earliest  time.Time // no queued event's deadline is before it; zero: none is queued
	inherited map[event]*progress
	left      map[event]*progress
}

// lane is one site's events. All of it is guarded by the tenure's mu.
type lane struct {
	site     string
	e        *endpoint // nil: the site has no Kitchen here
	queue    []*item   // in stream order
	expired  []*item   // runs, in stream order, that tellRuns works off
	telling  bool      // tellRuns is at work
	sweeping int       // events taken out by the sweeper and not settled
	running  bool
	quiet    bool      // it has events that an earlier owner may have attempted
	marked   bool      // the one of these that may have been in flight was met
	hopeless time.Time // until then the hub is not asked twice to take a dead letter
}

// item is one held event. Whoever holds it owns it: the queue, the lane's goroutine or
// the sweeper.
type item struct {
	d      *broker.Delivery
	before bool // stored before this owner took over: an earlier one may have attempted it
	quiet  bool // posted no earlier than settle after this process became the owner (I4)
	progress
}

// progress is what has been done about an event so far.
type progress struct {
	deadline     time.Time
	attempts     int
	started      time.Time // of the first attempt
	last         answer    // of the latest
	unknown      bool      // the latest that may have reached the Kitchen is unanswered
	cut          time.Time // when that one ended
	unformed     int       // how often there was nothing to post
	refused      string    // fingerprint that the Kitchen refused
	rewrapped    bool      // another key was tried
	reformed     bool      // the other form was tried
	fate         *fate     // nil while open
	settled      time.Time // when the fate was known
	deadLettered bool
	reported     bool
}

// fate is how a delivery ended.
type fate struct {
	state  state // "" for quarantine
	reason Reason
	cause  cause // of quarantine
}

func newTenure(p *partition, last uint64, first bool, past past, inherited map[event]*progress) *tenure {
	t := &tenure{
		p: p, r: p.r, last: last, first: first, past: past,
		lanes:     make(map[string]*lane),
		held:      make(map[uint64]*item),
		met:       newMet(),
		inherited: inherited,
		left:      make(map[event]*progress),
		tellers:   make(chan struct{}, mostTellers),
	}
	t.begin, t.stop = context.WithCancel(p.consuming)
	t.io, t.abort = context.WithCancel(p.io)
	return t
}

func (t *tenure) start() {
	t.wg.Go(t.sweep)
}

// end begins no further attempt, waits for what is in flight, and returns how many events
// are left and what was in hand of them.
func (t *tenure) end() (left int, carried map[event]*progress) {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.stop()
	// A hub that takes no report must not hold up the next take-over.
	timer := time.AfterFunc(t.r.cfg.DrainTimeout, t.abort)
	t.wg.Wait()
	timer.Stop()
	t.abort()

	t.mu.Lock()
	defer t.mu.Unlock()
	t.r.metrics.pending.Add(-int64(len(t.held)))
	for ev, pr := range t.inherited {
		if _, ok := t.left[ev]; !ok {
			t.left[ev] = pr
		}
	}
	return len(t.held), t.left
}

// enqueue takes an event over from the consumer. It never waits.
func (t *tenure) enqueue(d *broker.Delivery) {
	if t.accept(d) {
		return
	}
	// The lane has settled it, and the acknowledgement was lost.
	t.r.ackDelivery(d)
}

// accept returns false for a copy of an event that is settled.
func (t *tenure) accept(d *broker.Delivery) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return true // the next tenure gets it again
	}
	if d.StreamSeq <= t.highest {
		t.r.metrics.skipped.inc(causeRedelivered)
		_, held := t.held[d.StreamSeq]
		return held
	}
	t.highest = d.StreamSeq
	l := t.lanes[d.Site]
	if l == nil {
		l = &lane{site: d.Site, e: t.r.endpoints[d.Site]}
		t.lanes[d.Site] = l
	}
	it := &item{d: d, before: d.StreamSeq <= t.last, progress: progress{deadline: t.r.deadline(d)}}
	t.held[d.StreamSeq] = it
	t.r.metrics.pending.Add(1)
	if d.Kind == broker.KindExpired {
		l.expired = append(l.expired, it)
		t.tell(l)
		return true
	}
	if it.before {
		l.quiet = true
		if t.first && !l.marked && !t.isDone(l, d) {
			// Of a lane, only this one can have been in flight when its owner was killed.
			l.marked, it.unknown = true, l.e != nil
		}
	}
	it.quiet = l.quiet
	l.queue = append(l.queue, it)
	if t.earliest.IsZero() || it.deadline.Before(t.earliest) {
		t.earliest = it.deadline
	}
	if !l.running {
		l.running = true
		t.wg.Go(func() { t.run(l) })
	}
	return true
}

// deadline is the event's, but no later after the hub stored it than the edge gave it
// from when it accepted it, and than its kind allows: an edge whose clock is ahead would
// turn off what the POS asked for.
func (r *Router) deadline(d *broker.Delivery) time.Time {
	latest := d.Stored.Add(r.cfg.maxDeadline(d.Kind))
	if d.Err != nil {
		return latest // it will be quarantined; what it says of itself means nothing
	}
	ev := &d.Event
	return time.UnixMilli(min(ev.Deadline, d.Stored.UnixMilli()+(ev.Deadline-ev.Accepted), latest.UnixMilli()))
}

// watchClock says when an edge's clock is not the hub's, which deadlines are told in. An
// edge that was cut off stores late what it accepted in time, and shows alike.
func (r *Router) watchClock(d *broker.Delivery) {
	ev := &d.Event
	offset := time.UnixMilli(ev.Accepted).Sub(d.Stored)
	if offset.Abs() > clockTolerance && r.clocks.take(edgeName{ev.Site, ev.Edge}, time.Now()) {
		r.log.Warn(warnClock, "site", ev.Site, "edge", ev.Edge, "offset", offset.Round(time.Millisecond))
	}
}

type edgeName struct{ site, edge string }

// run works the lane off.
func (t *tenure) run(l *lane) {
	for it := t.next(l, nil); it != nil; it = t.next(l, it) {
		settled := t.process(l, it, func() bool {
			if l.e == nil {
				it.fail(ReasonNoRoute)
				return true
			}
			return t.deliver(l.e, it)
		})
		if !settled {
			t.leave(it)
			return
		}
	}
}

// next gives up the settled item and takes the next, nil when the lane's goroutine is to
// end.
func (t *tenure) next(l *lane, settled *item) *item {
	t.mu.Lock()
	defer t.mu.Unlock()
	if settled != nil {
		t.release(settled)
	}
	if len(l.queue) == 0 || t.closed {
		l.running = false
		t.discard(l)
		return nil
	}
	head := l.queue[0]
	l.queue[0] = nil
	if len(l.queue) == 1 {
		l.queue = l.queue[:0] // the place is used again
	} else {
		l.queue = l.queue[1:]
	}
	return head
}

// release gives up a settled item. The caller holds mu.
func (t *tenure) release(it *item) {
	delete(t.held, it.d.StreamSeq)
	t.r.metrics.pending.Add(-1)
	if l := t.lanes[it.d.Site]; l != nil {
		t.tell(l) // a run may have waited for it
	}
}

// discard drops the lane of a site without a Kitchen when it is idle: anybody may invent
// names of sites, and nothing of them is kept. The caller holds mu.
func (t *tenure) discard(l *lane) {
	if l.e == nil && !l.running && !l.telling && l.sweeping == 0 && len(l.queue) == 0 && len(l.expired) == 0 {
		delete(t.lanes, l.site)
	}
}

// leave remembers what was done about an event that is not settled.
func (t *tenure) leave(it *item) {
	if it.attempts == 0 && it.fate == nil && !it.unknown || it.fate != nil && it.fate.cause != "" {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left[eventOf(it.d)] = &it.progress
}

// resume takes up what an earlier tenure left of an event that has been verified.
func (t *tenure) resume(it *item) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.inherited) == 0 {
		return
	}
	ev := eventOf(it.d)
	if pr := t.inherited[ev]; pr != nil {
		delete(t.inherited, ev)
		deadline := it.deadline
		it.progress = *pr
		it.deadline = deadline
	}
}

func eventOf(d *broker.Delivery) event {
	return event{source{d.Event.Site, d.Event.Edge, d.Event.Epoch}, d.Event.Seq}
}

// process brings an event to its end: verifies it, lets work decide its fate unless that
// is known, and stores what has to be stored. False: the tenure ended before.
func (t *tenure) process(l *lane, it *item, work func() bool) bool {
	if c := t.r.examine(it.d); c != "" {
		it.fate = &fate{reason: ReasonQuarantine, cause: c}
		return t.settle(l, it)
	}
	t.r.watchClock(it.d)
	switch done := t.isDone(l, it.d); {
	case !t.meet(it.d) || done && !it.before:
		it.fate = &fate{reason: ReasonQuarantine, cause: causeReplay}
		return t.settle(l, it)
	case done:
		t.r.metrics.skipped.inc(causeReported)
		t.r.ackDelivery(it.d)
		return true
	}
	t.resume(it)
	if it.fate == nil && !work() {
		return false
	}
	return t.settle(l, it)
}

// isDone tells whether the report log had the delivery's end when this tenure began.
func (t *tenure) isDone(l *lane, d *broker.Delivery) bool {
	ev := eventOf(d)
	return t.past.isDone(delivery{ev.source, endpointName(l.e), 0}, ev.seq)
}

// meet tells whether a verified event is taken up for the first time in this tenure.
// Copies of one stream sequence never come here: the one that was met before lies at
// another, and is a replay (I7). When the hub has lost data, and an edge sends again,
// that is another tenure.
func (t *tenure) meet(d *broker.Delivery) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.met.first(eventOf(d), time.Now())
}

// fail gives the delivery its end.
func (it *item) fail(r Reason) {
	it.fate = &fate{state: stateFailed, reason: r}
}

// expire ends a delivery at its deadline. What a Kitchen was sent and did not answer may
// be cooked: nobody may be told that it is not (I3).
func (it *item) expire() {
	if it.unknown {
		it.fail(ReasonOutcomeUnknown)
	} else {
		it.fail(ReasonExpired)
	}
}

// sweep settles queued events at their deadline, wherever they stand: behind a Kitchen
// that does not answer, too. None of them was posted in this tenure, so nothing is
// inverted (I3, I4).
func (t *tenure) sweep() {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	places := make(chan struct{}, sweepers)
	for {
		select {
		case <-t.begin.Done():
			return
		case <-tick.C:
		}
		// Not waited for: one that cannot be settled must not keep others from their end.
		for _, due := range t.due(time.Now()) {
			select {
			case places <- struct{}{}:
			case <-t.begin.Done():
				return
			}
			t.wg.Go(func() {
				defer func() { <-places }()
				if t.process(due.l, due.it, func() bool { due.it.expire(); return true }) {
					t.swept(due.l, due.it)
				} else {
					t.leave(due.it)
				}
			})
		}
	}
}

type dueItem struct {
	l  *lane
	it *item
}

// due takes what has expired out of the queues.
func (t *tenure) due(now time.Time) []dueItem {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.earliest.IsZero() || now.Before(t.earliest) {
		return nil
	}
	t.earliest = time.Time{}
	var due []dueItem
	for _, l := range t.lanes {
		l.queue = slices.DeleteFunc(l.queue, func(it *item) bool {
			if !now.Before(it.deadline) {
				l.sweeping++
				due = append(due, dueItem{l, it})
				return true
			}
			if t.earliest.IsZero() || it.deadline.Before(t.earliest) {
				t.earliest = it.deadline
			}
			return false
		})
	}
	return due
}

// swept gives up an item that the sweeper has settled.
func (t *tenure) swept(l *lane, it *item) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l.sweeping--
	t.release(it)
	t.discard(l)
}

// sleep waits until then; false when ctx ended first.
func sleep(ctx context.Context, until time.Time) bool {
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
