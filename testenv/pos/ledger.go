package pos

import (
	"maps"
	"math"
	"time"
)

// State is what the POS knows of a message.
type State string

const (
	Sending   State = "sending"   // no final answer yet
	Pending   State = "pending"   // accepted, not settled
	Delivered State = "delivered" // accepted, and the Kitchen has it
	Failed    State = "failed"    // accepted, and reported as failed
	Refused   State = "refused"   // certainly not stored
	Unknown   State = "unknown"   // no attempt had an answer that says
)

// Accepted reports whether the edge took the message over.
func (s State) Accepted() bool { return s == Pending || s == Delivered || s == Failed }

// Entry is one message as the POS saw it. It survives JSON.
type Entry struct {
	N       uint64 `json:"n"` // place in the order of sending, from 1
	Site    string `json:"site"`
	Kind    string `json:"kind"`
	OrderID string `json:"order_id"`
	Version int    `json:"version"`
	Key     string `json:"key,omitempty"` // Idempotency-Key

	// Of the latest attempt; comparable with kitchen.Record.
	IV          string `json:"iv,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Bytes       int    `json:"bytes"`
	TripleHash  string `json:"triple_hash"`  // vendorcrypto.TripleHash of what was sent
	PayloadHash string `json:"payload_hash"` // vendorcrypto.PayloadHash of the plain payload

	State    State `json:"state"`
	Attempts int   `json:"attempts"`
	// Doubtful: an attempt had no answer that says whether the message was stored.
	Doubtful bool   `json:"doubtful,omitempty"`
	ID       string `json:"id,omitempty"`       // Kb-Id
	Location string `json:"location,omitempty"` // where it can be asked about
	Status   int    `json:"status,omitempty"`   // of the last answer
	Code     int    `json:"code,omitempty"`     // errorCode in it
	Reason   string `json:"reason,omitempty"`   // of a refusal or a failure, as the edge words it
	Kitchen  int    `json:"kitchen_status,omitempty"`
	Overdue  bool   `json:"overdue,omitempty"`  // pending, and the edge says its deadline has passed
	IDMoved  bool   `json:"id_moved,omitempty"` // attempts that are one message got different ids: the edge took one for two
	Err      string `json:"err,omitempty"`      // of the last attempt without an answer

	Sent     time.Time `json:"sent"`                // first attempt
	Answered time.Time `json:"answered,omitzero"`   // final answer
	Settled  time.Time `json:"settled,omitzero"`    // when the POS heard of the end
	Polls    int       `json:"polls,omitempty"`     // how often it asked
	PollCode int       `json:"poll_code,omitempty"` // status of the last answer to that
}

// Latency is the time from the first attempt to the final answer; 0 before it.
func (e Entry) Latency() time.Duration {
	if e.Answered.IsZero() {
		return 0
	}
	return e.Answered.Sub(e.Sent)
}

// Tally adds up the entries since New, dropped ones included.
type Tally struct {
	Begun     uint64 `json:"begun"`
	Sending   uint64 `json:"sending"`
	Accepted  uint64 `json:"accepted"` // Delivered + Failed + Pending
	Delivered uint64 `json:"delivered"`
	Failed    uint64 `json:"failed"`
	Pending   uint64 `json:"pending"`
	Refused   uint64 `json:"refused"`
	Unknown   uint64 `json:"unknown"`
	IDMoved   uint64 `json:"id_moved"`
	Attempts  uint64 `json:"attempts"`
	Dropped   uint64 `json:"dropped"` // entries that left the ledger
	// Statuses of all answers to attempts; 0 counts those without one.
	Statuses map[int]uint64 `json:"statuses"`
	Answer   Quantiles      `json:"answer"` // from the first attempt to the final answer of accepted messages
	Settle   Quantiles      `json:"settle"` // from the first attempt until the POS heard that it was delivered
}

// Quantiles of durations, 5 % too high at most. Max is exact.
type Quantiles struct {
	N   uint64        `json:"n"`
	P50 time.Duration `json:"p50"`
	P90 time.Duration `json:"p90"`
	P99 time.Duration `json:"p99"`
	Max time.Duration `json:"max"`
}

// histogram counts durations in buckets that grow by 5 %.
type histogram struct {
	n      uint64
	max    time.Duration
	counts [480]uint64 // up to 1 µs × 1.05^479, about four hours
}

const growth = 1.05

func (h *histogram) add(d time.Duration) {
	h.n++
	h.max = max(h.max, d)
	i := 0
	if d > time.Microsecond {
		i = int(math.Ceil(math.Log(float64(d)/float64(time.Microsecond)) / math.Log(growth)))
	}
	h.counts[min(i, len(h.counts)-1)]++
}

func (h *histogram) quantiles() Quantiles {
	q := Quantiles{N: h.n, Max: h.max}
	for _, want := range []struct {
		share float64
		to    *time.Duration
	}{{0.50, &q.P50}, {0.90, &q.P90}, {0.99, &q.P99}} {
		rank, seen := uint64(math.Ceil(want.share*float64(h.n))), uint64(0)
		for i, n := range h.counts {
			if seen += n; n > 0 && seen >= rank {
				*want.to = min(h.max, time.Duration(float64(time.Microsecond)*math.Pow(growth, float64(i))))
				break
			}
		}
	}
	return q
}

// Ledger returns copies of the entries kept, in order of sending. Those under way are
// among them, as they stand.
func (d *Driver) Ledger() []Entry {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]Entry, 0, len(d.ledger))
	for _, part := range [][]*Entry{d.ledger[d.oldest:], d.ledger[:d.oldest]} {
		for _, e := range part {
			out = append(out, *e)
		}
	}
	return out
}

// Tally returns the sums as they stand.
func (d *Driver) Tally() Tally {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.tally
	t.Accepted = t.Delivered + t.Failed + t.Pending
	t.Statuses = maps.Clone(t.Statuses)
	t.Answer, t.Settle = d.answer.quantiles(), d.settle.quantiles()
	return t
}

// begin enters a message into the ledger.
func (d *Driver) begin(e *Entry) {
	d.mu.Lock()
	d.tally.Begun++
	e.N, e.State = d.tally.Begun, Sending
	d.tally.Sending++
	if len(d.ledger) < d.cfg.MaxEntries {
		d.ledger = append(d.ledger, e)
	} else {
		d.ledger[d.oldest] = e
		d.oldest = (d.oldest + 1) % d.cfg.MaxEntries
		d.tally.Dropped++
	}
	d.tell(e)
}

// change edits an entry and keeps the tally in step with its state.
func (d *Driver) change(e *Entry, edit func()) {
	d.mu.Lock()
	before, moved := e.State, e.IDMoved
	edit()
	if e.State != before {
		*d.counter(before)--
		*d.counter(e.State)++
		if e.State == Delivered {
			d.settle.add(e.Settled.Sub(e.Sent))
		}
	}
	if e.IDMoved && !moved {
		d.tally.IDMoved++
	}
	d.tell(e)
}

// tell unlocks d.mu and calls OnChange.
func (d *Driver) tell(e *Entry) {
	now := *e
	d.mu.Unlock()
	if d.cfg.OnChange != nil {
		d.cfg.OnChange(now)
	}
}

func (d *Driver) counter(s State) *uint64 {
	switch s {
	case Sending:
		return &d.tally.Sending
	case Pending:
		return &d.tally.Pending
	case Delivered:
		return &d.tally.Delivered
	case Failed:
		return &d.tally.Failed
	case Refused:
		return &d.tally.Refused
	}
	return &d.tally.Unknown
}
