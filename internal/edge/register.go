package edge

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// state is what GET /messages/{id} says of a message.
type state string

const (
	statePending   state = "pending"   // being stored: the POS has no answer yet
	stateUnknown   state = "unknown"   // the hub did not answer: nobody knows whether it has the message
	stateAccepted  state = "accepted"  // stored by the hub, not reported yet
	stateDelivered state = "delivered" // final
	stateFailed    state = "failed"    // final
	stateRefused   state = "refused"   // certainly not stored; forgotten at once, seen by requests that had joined
)

func (s state) final() bool { return s == stateDelivered || s == stateFailed }

const (
	// rememberFor is how long a settled message is remembered, as long as there is room.
	rememberFor = 24 * time.Hour
	// noReportAfter is how long after its deadline a message without a report ends as
	// failed. It is what the hub keeps: later no bridge can deliver it any more.
	noReportAfter = 72 * time.Hour
	// reasonNoReport is that failure's reason.
	reasonNoReport = "no-report"
	// maxEnvelopes is how many envelopes are remembered for one message: a POS that sends it
	// again under its Idempotency-Key makes a new one each time. Beyond it the oldest goes.
	maxEnvelopes = 16
)

var (
	errOtherPayload = errors.New("this Idempotency-Key came with another payload before")
	errEnvelopeSeen = errors.New("this envelope was sent before")
	errFull         = errors.New("as many messages as are remembered are unsettled")
)

// register remembers messages: what was answered, to answer it again, and who waits for
// it. It is in memory, bounded, and safe for concurrent use.
//
// A message is pending, unknown or accepted: unsettled, and never forgotten; or it is
// delivered or failed: settled, and the one settled first is forgotten first.
type register struct {
	// Fixed at birth.
	maxMessages int
	maxBytes    int64
	drops       *prometheus.CounterVec // by reason: what had to go before its time

	mu sync.Mutex
	// Guarded by mu.
	byID       map[string]*message
	byEnvelope map[string]*message
	unsettled  list
	settled    list
	bytes      int64 // of remembered answers
}

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
	seq           uint64   // this and the next two: zero until it is numbered
	accepted      time.Time
	deadline      time.Time
	settledAt     time.Time // this and the next four: zero until it is final
	reason        string
	attempts      int
	kitchenStatus int
	answer        answer
	refusal       error         // why it is refused
	changed       chan struct{} // closed at the next change; nil while nobody waits
	prev, next    *message      // in the list that its state belongs to
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
	deadline      time.Time
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
// before (fresh is false). Whoever gets a fresh one has to have it stored, or refuse it.
// Errors: errOtherPayload, errEnvelopeSeen, errFull.
func (r *register) claim(c claim) (m *message, fresh bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m = r.byID[c.id]
	other := r.byEnvelope[c.envelope] // none is registered as ""
	if faultNoDedupe {
		m, other = nil, nil
	}
	switch {
	case m != nil && m.hash != c.hash:
		return nil, false, errOtherPayload
	case other != nil && other != m:
		return nil, false, errEnvelopeSeen
	case m != nil:
		if c.envelope != "" && other == nil {
			r.remember(m, c.envelope)
		}
		return m, false, nil
	}
	for len(r.byID) >= r.maxMessages {
		if r.settled.first == nil {
			return nil, false, errFull
		}
		r.forget(r.settled.first, dropMessage)
	}
	m = &message{register: r, id: c.id, site: c.site, who: c.who, kind: c.kind, hash: c.hash, withoutKey: c.withoutKey, state: statePending}
	r.byID[m.id] = m
	if c.envelope != "" {
		r.remember(m, c.envelope)
	}
	r.unsettled.append(m)
	return m, true, nil
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
	seq           uint64
	state         state
	reason        string
	attempts      int
	kitchenStatus int
	answer        answer
}

// settle ends the message that v is about. Only the first end counts. It returns false
// when there is no such message: never seen in this run, or forgotten.
func (r *register) settle(v verdict, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.byID[v.id]
	if m == nil || m.site != v.site || m.seq != v.seq {
		return false
	}
	if !m.state.final() {
		r.end(m, v, now)
	}
	return true
}

// end settles m and makes room for its answer. Call with mu held.
func (r *register) end(m *message, v verdict, now time.Time) {
	m.state, m.settledAt = v.state, now
	m.reason, m.attempts, m.kitchenStatus, m.answer = v.reason, v.attempts, v.kitchenStatus, v.answer
	r.unsettled.remove(m)
	r.settled.append(m)
	m.wake()
	r.bytes += int64(len(m.answer.body))
	for r.bytes > r.maxBytes && r.settled.first != m {
		r.forget(r.settled.first, dropAnswer)
	}
}

// sweep forgets what was settled long ago, and ends what will have no report any more. It
// returns the ids of the latter.
func (r *register) sweep(now time.Time) (unreported []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for m := r.settled.first; m != nil && now.Sub(m.settledAt) > rememberFor; m = r.settled.first {
		r.forget(m, "")
	}
	for m := r.unsettled.first; m != nil; {
		next := m.next
		if !m.accepted.IsZero() && now.Sub(m.accepted) <= noReportAfter {
			break // those after it were accepted later
		}
		if m.state == stateAccepted && now.Sub(m.deadline) > noReportAfter {
			r.end(m, verdict{state: stateFailed, reason: reasonNoReport}, now)
			unreported = append(unreported, m.id)
		}
		m = next
	}
	return unreported
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
		accepted: m.accepted, deadline: m.deadline, settledAt: m.settledAt,
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

// numbered: the committer gave the message its place in the site's order.
func (m *message) numbered(seq uint64, accepted, deadline time.Time) {
	m.register.mu.Lock()
	defer m.register.mu.Unlock()
	m.seq, m.accepted, m.deadline = seq, accepted, deadline
}

// unknown: nobody knows yet whether the hub has the message.
func (m *message) unknown() {
	m.register.mu.Lock()
	defer m.register.mu.Unlock()
	if m.state == statePending {
		m.state = stateUnknown
		m.wake()
	}
}

// stored: the hub has the message.
func (m *message) stored() {
	m.register.mu.Lock()
	defer m.register.mu.Unlock()
	if m.state == statePending || m.state == stateUnknown {
		m.state = stateAccepted
		m.wake()
	}
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
