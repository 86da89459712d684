package edge

import (
	"container/heap"
	"context"
	"errors"
	"slices"
	"sort"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// state is what GET /messages/{id} says of a message.
type state string

const (
	statePending   state = "pending"   // being stored: the POS has no answer yet
	stateUnknown   state = "unknown"   // the disk did not answer: nobody knows whether the message is stored
	stateAccepted  state = "accepted"  // stored here, and not at the hub yet
	stateForwarded state = "forwarded" // stored by the hub, not reported yet
	stateDelivered state = "delivered" // final
	stateFailed    state = "failed"    // final
	stateRefused   state = "refused"   // certainly not stored; forgotten at once, seen by requests that had joined
)

func (s state) final() bool { return s == stateDelivered || s == stateFailed }

// stored: it is on the disk, and not settled.
func (s state) stored() bool { return s == stateAccepted || s == stateForwarded }

const (
	// rememberFor is how long a settled message is remembered, as long as there is room.
	rememberFor = 24 * time.Hour
	// noReportAfter is how long after its deadline a message without a report ends as
	// failed. It is what the hub keeps: later no bridge can deliver it any more.
	noReportAfter = 72 * time.Hour
	// overdueGrace is how long after its deadline a message without a report is overdue.
	overdueGrace = 5 * time.Second
	// reasonNoReport and reasonExpired are the failures that the edge decides by itself.
	reasonNoReport = "no-report"
	reasonExpired  = "expired" // the deadline came, and the message certainly never left the edge
	// maxEnvelopes is how many envelopes are remembered for one message: a POS that sends it
	// again under its Idempotency-Key makes a new one each time. Beyond it the oldest goes.
	maxEnvelopes = 16
)

var (
	errOtherPayload = errors.New("this Idempotency-Key came with another payload before")
	errEnvelopeSeen = errors.New("this envelope was sent before")
	errFull         = errors.New("as many messages as are remembered are unsettled")
)

// register remembers messages: what was answered, to answer it again, who waits for it,
// and where it stands in the outbox's log. It is in memory, bounded, rebuilt from the log
// at start, and safe for concurrent use.
//
// A message is pending, unknown, accepted or forwarded: unsettled, and never forgotten; or
// it is delivered or failed: settled, and the one settled first is forgotten first. What is
// forgotten leaves its slot in the log, until the log's front is purged.
type register struct {
	// Fixed at birth.
	maxMessages int
	maxBytes    int64
	drops       *prometheus.CounterVec // by reason: what had to go before its time
	// ended hears of every end that is not in the log yet. It is called with mu held, and
	// must not wait. nil: nobody.
	ended func(settledEntry)

	mu sync.Mutex
	// Guarded by mu.
	byID       map[string]*message
	byEnvelope map[string]*message
	unsettled  list
	settled    list
	bytes      int64 // of remembered answers

	slots  []slot            // the log's events, in its order
	cursor position          // everything up to it is settled with the hub
	due    dueHeap           // what is unsettled and stored, by when it is to be looked at
	held   map[string]int64  // bytes of unsettled events by site
	told   map[string]number // by site: the last one up to the cursor
	late   int               // overdue messages
}

// slot is an event's place in the log.
type slot struct {
	pos  position
	m    *message // nil: forgotten, or moved to another slot
	fate fate
}

// fate is what the forwarder has to know of an event.
type fate uint8

const (
	fateOpen    fate = iota
	fateExpired      // ended here: the hub is told by a run
	fateSettled      // ended elsewhere: the hub has it
	fateMoved        // numbered anew: it stands in another slot
)

// message is one request that was claimed.
type message struct {
	// Fixed at birth.
	register   *register
	id         string
	site, who  string // whose it is
	kind       string
	hash       [32]byte // of the opened payload
	withoutKey bool     // a plain request without Idempotency-Key: nothing can be joined to it

	// Guarded by register.mu.
	state         state
	envelopes     []string // by which it is registered, oldest first
	pos           position // this and the next six: zero until it is stored
	epoch         string
	seq           uint64
	order         string
	size          int64 // of its entry in the log
	accepted      time.Time
	deadline      time.Time
	before        []number // what it was numbered before, in epochs that ended
	forwarded     time.Time
	overdue       bool
	due           int64     // Unix ms: when it is to be looked at
	heapIndex     int       // in due; -1: not there
	settledAt     time.Time // this and the next four: zero until it is final
	reason        string
	attempts      int
	kitchenStatus int
	answer        answer
	refusal       error         // why it is refused
	changed       chan struct{} // closed at the next change; nil while nobody waits
	prev, next    *message      // in the list that its state belongs to
}

// number is what an event is known by at the hub.
type number struct {
	epoch string
	seq   uint64
}

// answer is what a Kitchen said.
type answer struct {
	contentType string
	body        []byte
}

// view is a message at one moment.
type view struct {
	id, kind      string
	state         state
	withoutKey    bool
	accepted      time.Time
	forwarded     time.Time
	deadline      time.Time
	overdue       bool
	settledAt     time.Time
	reason        string
	attempts      int
	kitchenStatus int
	answer        answer
	refusal       error
}

func newRegister(maxMessages int, maxBytes int64, drops *prometheus.CounterVec) *register {
	return &register{
		maxMessages: maxMessages, maxBytes: maxBytes, drops: drops,
		byID:       make(map[string]*message),
		byEnvelope: make(map[string]*message),
		held:       make(map[string]int64),
		told:       make(map[string]number),
	}
}

// claim is what a request brings to have its message registered.
type claim struct {
	id       string
	envelope string // "" for a plain request
	site     string
	who      string
	kind     string
	hash     [32]byte
	// withoutKey: a plain request without Idempotency-Key.
	withoutKey bool
}

// claim registers a message, or finds the one that was registered for the same request
// before (fresh is false); again: in an envelope that is new. Whoever gets a fresh one has to
// have it stored, or refuse it.
// Errors: errOtherPayload, errEnvelopeSeen, errFull.
func (r *register) claim(c claim) (m *message, fresh, again bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m = r.byID[c.id]
	other := r.byEnvelope[c.envelope] // none is registered as ""
	if faultNoDedupe {
		m, other = nil, nil
	}
	switch {
	case m != nil && m.hash != c.hash:
		return nil, false, false, errOtherPayload
	case other != nil && other != m:
		return nil, false, false, errEnvelopeSeen
	case m != nil:
		if c.envelope != "" && other == nil {
			r.remember(m, c.envelope)
			again = true
		}
		return m, false, again, nil
	}
	for len(r.byID) >= r.maxMessages {
		if r.settled.first == nil {
			return nil, false, false, errFull
		}
		r.forget(r.settled.first, dropMessage)
	}
	m = &message{register: r, id: c.id, site: c.site, who: c.who, kind: c.kind, hash: c.hash, withoutKey: c.withoutKey, state: statePending, heapIndex: -1}
	r.byID[m.id] = m
	if c.envelope != "" {
		r.remember(m, c.envelope)
	}
	r.unsettled.append(m)
	return m, true, false, nil
}

// remember registers an envelope of m. Call with mu held.
func (r *register) remember(m *message, envelope string) {
	if len(m.envelopes) >= maxEnvelopes {
		delete(r.byEnvelope, m.envelopes[0])
		m.envelopes = slices.Delete(m.envelopes, 0, 1)
		r.drops.WithLabelValues(dropEnvelope).Inc()
	}
	m.envelopes = append(m.envelopes, envelope)
	r.byEnvelope[envelope] = m
}

// forget removes a settled message. Call with mu held. An empty reason is not counted.
func (r *register) forget(m *message, reason string) {
	r.settled.remove(m)
	r.erase(m)
	if i, ok := r.slotAt(m.pos); ok {
		r.slots[i].m = nil
	}
	r.bytes -= int64(len(m.answer.body))
	if reason != "" {
		r.drops.WithLabelValues(reason).Inc()
	}
}

func (r *register) erase(m *message) {
	delete(r.byID, m.id)
	for _, e := range m.envelopes {
		delete(r.byEnvelope, e)
	}
}

// find returns the message of that id if it belongs to who at site.
func (r *register) find(id, site, who string) (view, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.byID[id]
	if m == nil || m.site != site || m.who != who {
		return view{}, false
	}
	return m.view(), true
}

// waiting returns how many messages are unsettled.
func (r *register) waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.unsettled.n
}

// verdict is how a message ended.
type verdict struct {
	site          string
	id            string
	number        number
	state         state
	reason        string
	attempts      int
	kitchenStatus int
	answer        answer
}

// settle ends the message that v is about. Only the first end counts. It returns false
// when there is no such message: never seen in this log, or forgotten.
func (r *register) settle(v verdict, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.byID[v.id]
	if m == nil || m.site != v.site || !m.is(v.number) {
		return false
	}
	if !m.state.final() {
		r.end(m, v, now, fateSettled)
		r.tell(m)
	}
	return true
}

// is tells whether the hub knows, or knew, m by that number. Call with mu held.
func (m *message) is(n number) bool {
	return n.seq != 0 && (number{m.epoch, m.seq} == n || slices.Contains(m.before, n))
}

// tell has m's end logged. Call with mu held.
func (r *register) tell(m *message) {
	if r.ended != nil {
		r.ended(m.entry())
	}
}

// entry is m's end. Call with mu held.
func (m *message) entry() settledEntry {
	return settledEntry{
		site: m.site, epoch: m.epoch, id: m.id, seq: m.seq, state: m.state, reason: m.reason,
		attempts: m.attempts, kitchenStatus: m.kitchenStatus, at: m.settledAt.UnixMilli(), answer: m.answer,
	}
}

// end settles m and makes room for its answer. Call with mu held.
func (r *register) end(m *message, v verdict, now time.Time, f fate) {
	m.state, m.settledAt = v.state, now
	m.reason, m.attempts, m.kitchenStatus, m.answer = v.reason, v.attempts, v.kitchenStatus, v.answer
	r.unsettled.remove(m)
	r.settled.append(m)
	r.release(m)
	if i, ok := r.slotAt(m.pos); ok {
		r.slots[i].fate = f
	}
	m.wake()
	r.bytes += int64(len(m.answer.body))
	for r.bytes > r.maxBytes && r.settled.first != m {
		r.forget(r.settled.first, dropAnswer)
	}
}

// release takes m out of what is counted of unsettled messages. Call with mu held.
func (r *register) release(m *message) {
	if m.heapIndex >= 0 {
		heap.Remove(&r.due, m.heapIndex)
	}
	if m.overdue {
		m.overdue = false
		r.late--
	}
	if r.held[m.site] -= m.size; r.held[m.site] <= 0 {
		delete(r.held, m.site)
	}
}

// sweep forgets what was settled long ago.
func (r *register) sweep(now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for m := r.settled.first; m != nil && now.Sub(m.settledAt) > rememberFor; m = r.settled.first {
		r.forget(m, "")
	}
}

// forgetSome forgets up to n settled messages before their time, to make room in the log.
// It returns how many.
func (r *register) forgetSome(n int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range n {
		if r.settled.first == nil {
			return i
		}
		r.forget(r.settled.first, dropStore)
	}
	return n
}

// await waits until the message is as wanted, for at most d, and returns it as it is
// then. It returns early when ctx ends or stop is closed.
func (m *message) await(ctx context.Context, d time.Duration, stop <-chan struct{}, wanted func(state) bool) view {
	if d <= 0 {
		return m.now()
	}
	var timeout <-chan time.Time
	for {
		v, changed := m.look(wanted)
		if changed == nil {
			return v
		}
		if timeout == nil {
			t := time.NewTimer(d)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-timeout:
			return m.now()
		case <-ctx.Done():
			return m.now()
		case <-stop:
			return m.now()
		}
	}
}

// look returns the message as it is, and unless that is wanted, what will tell of the
// next change.
func (m *message) look(wanted func(state) bool) (view, <-chan struct{}) {
	m.register.mu.Lock()
	defer m.register.mu.Unlock()
	if wanted(m.state) {
		return m.view(), nil
	}
	if m.changed == nil {
		m.changed = make(chan struct{})
	}
	return m.view(), m.changed
}

// now returns the message as it is.
func (m *message) now() view {
	m.register.mu.Lock()
	defer m.register.mu.Unlock()
	return m.view()
}

// view copies the message. Call with mu held.
func (m *message) view() view {
	return view{
		id: m.id, kind: m.kind, state: m.state, withoutKey: m.withoutKey,
		accepted: m.accepted, forwarded: m.forwarded, deadline: m.deadline, overdue: m.overdue, settledAt: m.settledAt,
		reason: m.reason, attempts: m.attempts, kitchenStatus: m.kitchenStatus, answer: m.answer, refusal: m.refusal,
	}
}

// wake tells those who wait. Call with mu held.
func (m *message) wake() {
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
}

// unknown: nobody knows yet whether the message is stored.
func (m *message) unknown() {
	m.register.mu.Lock()
	defer m.register.mu.Unlock()
	if m.state == statePending {
		m.state = stateUnknown
		m.wake()
	}
}

// stored: the message is an event of the log, at pos. One that was there already is moved.
// Call with mu held.
func (r *register) stored(m *message, pos position, e *eventEntry, size int64) {
	if m.pos != (position{}) {
		if i, ok := r.slotAt(m.pos); ok {
			r.slots[i].m, r.slots[i].fate = nil, fateMoved
		}
		m.before = append(m.before, number{m.epoch, m.seq})
	}
	ev := e.event
	m.pos, m.epoch, m.seq, m.order = pos, ev.Epoch, ev.Seq, ev.Order
	m.accepted, m.deadline = time.UnixMilli(ev.Accepted), time.UnixMilli(ev.Deadline)
	s := slot{pos: pos, m: m}
	if m.state.final() {
		// Moved after its end: what the hub is to be told of it stays the same.
		s.fate = fateSettled
		if m.reason == reasonExpired && m.attempts == 0 {
			s.fate = fateExpired
		}
	} else {
		r.held[m.site] += size - m.size
		if m.heapIndex < 0 {
			m.due = ev.Deadline
			heap.Push(&r.due, m)
		}
	}
	m.size = size
	r.slots = append(r.slots, s)
	if m.state == statePending || m.state == stateUnknown {
		m.state = stateAccepted
		m.wake()
	}
}

// restore puts a message from the log back, or the newer copy of one. Call with mu held.
func (r *register) restore(pos position, e *eventEntry, size int64) {
	m := r.byID[e.event.ID]
	if m == nil {
		m = &message{register: r, id: e.event.ID, site: e.event.Site, who: e.who, kind: e.event.Kind, hash: e.hash,
			withoutKey: e.withoutKey, state: statePending, heapIndex: -1}
		r.byID[m.id] = m
		if e.envelope != "" && r.byEnvelope[e.envelope] == nil {
			r.remember(m, e.envelope)
		}
		r.unsettled.append(m)
	}
	r.stored(m, pos, e, size)
}

// slotAt finds the slot at a position. Call with mu held.
func (r *register) slotAt(pos position) (int, bool) {
	if pos == (position{}) {
		return 0, false
	}
	i := r.slotAfter(pos) - 1
	return i, i >= 0 && r.slots[i].pos == pos
}

// slotAfter is the index of the first slot behind a position. Call with mu held.
func (r *register) slotAfter(pos position) int {
	return sort.Search(len(r.slots), func(i int) bool { return pos.before(r.slots[i].pos) })
}

// advance moves the cursor: what stands up to there is forwarded. Call with mu held.
func (r *register) advance(upTo position, now time.Time) {
	if !r.cursor.before(upTo) {
		return
	}
	for i := r.slotAfter(r.cursor); i < len(r.slots) && !upTo.before(r.slots[i].pos); i++ {
		m := r.slots[i].m
		if m == nil || r.slots[i].fate == fateMoved {
			continue
		}
		r.told[m.site] = number{m.epoch, m.seq}
		if m.state == stateAccepted {
			m.state, m.forwarded = stateForwarded, now
			m.wake()
		}
	}
	r.cursor = upTo
}

// dueHeap orders messages by when they are to be looked at.
type dueHeap []*message

func (h dueHeap) Len() int           { return len(h) }
func (h dueHeap) Less(i, j int) bool { return h[i].due < h[j].due }
func (h dueHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].heapIndex, h[j].heapIndex = i, j
}
func (h *dueHeap) Push(x any) {
	m := x.(*message)
	m.heapIndex = len(*h)
	*h = append(*h, m)
}
func (h *dueHeap) Pop() any {
	old := *h
	m := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	m.heapIndex = -1
	return m
}

// refuse forgets a message that is certainly not stored, so that the same request can
// come again; those who joined it learn why.
func (m *message) refuse(why error) {
	r := m.register
	r.mu.Lock()
	defer r.mu.Unlock()
	if m.state != statePending {
		return
	}
	m.state, m.refusal = stateRefused, why
	r.unsettled.remove(m)
	r.erase(m)
	m.wake()
}

// list is a queue of messages that any can leave.
type list struct {
	first, last *message
	n           int
}

func (l *list) append(m *message) {
	m.prev, m.next = l.last, nil
	if l.last != nil {
		l.last.next = m
	} else {
		l.first = m
	}
	l.last = m
	l.n++
}

func (l *list) remove(m *message) {
	if m.prev != nil {
		m.prev.next = m.next
	} else {
		l.first = m.next
	}
	if m.next != nil {
		m.next.prev = m.prev
	} else {
		l.last = m.prev
	}
	m.prev, m.next = nil, nil
	l.n--
}
