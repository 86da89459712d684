package kitchen

import (
	"maps"
	"slices"
	"time"
)

// Record is one request as the Kitchen saw it. It survives JSON.
type Record struct {
	N    uint64 `json:"n"` // place in the order of arrival at this Kitchen, from 1
	Site string `json:"site"`
	Kind string `json:"kind"`

	Key   string `json:"key,omitempty"`   // Idempotency-Key
	Edge  string `json:"edge,omitempty"`  // Kb-Edge, up to the dot
	Epoch string `json:"epoch,omitempty"` // Kb-Edge, after the dot
	Seq   uint64 `json:"seq,omitempty"`   // Kb-Seq; 0 when it is missing or no number
	// Attempt counts the requests with this key that have arrived, this one included; 1
	// without a key.
	Attempt int `json:"attempt"`

	IV          string `json:"iv,omitempty"`
	Fingerprint string `json:"fingerprint,omitempty"`
	Bytes       int    `json:"bytes"`                  // of the body
	TripleHash  string `json:"triple_hash,omitempty"`  // vendorcrypto.TripleHash of IV, fingerprint, body
	PayloadHash string `json:"payload_hash,omitempty"` // vendorcrypto.PayloadHash of the opened payload

	// Read from the payload at Config.OrderPointer and Config.VersionPointer; "" and 0 when
	// there is nothing.
	OrderID string `json:"order_id,omitempty"`
	Version int64  `json:"version,omitempty"`

	Received time.Time `json:"received"`
	// Processed is when the Kitchen cooked it, zero when it did not. Place counts what this
	// Kitchen processed, in that order, from 1.
	Processed time.Time `json:"processed,omitzero"`
	Place     uint64    `json:"place,omitempty"`
	Repeat    bool      `json:"repeat,omitempty"` // processed before under the same key: nothing cooked again
	Late      bool      `json:"late,omitempty"`   // processed after the client gave up
	GaveUp    bool      `json:"gave_up,omitempty"`

	Answered time.Time `json:"answered,omitzero"`  // when the answer was begun
	Status   int       `json:"status,omitempty"`   // of the answer; 0: none was begun
	Code     int       `json:"code,omitempty"`     // the errorCode in it
	Action   Action    `json:"action,omitempty"`   // the fault that struck
	Refusal  string    `json:"refusal,omitempty"`  // why the Kitchen itself refused the request
	Problems []Problem `json:"problems,omitempty"` // what a correct sender never causes
}

// Delivered reports whether the request made the Kitchen cook something new.
func (r Record) Delivered() bool { return !r.Processed.IsZero() && !r.Repeat }

// Inverted reports whether the request was cooked after something that should follow it.
func (r Record) Inverted() bool {
	return slices.Contains(r.Problems, SeqInverted) || slices.Contains(r.Problems, VersionInverted)
}

// Problem is something the sender did wrong, found when a request was processed or its
// headers were read.
type Problem string

const (
	// SeqInverted: of one edge, epoch and site (Config.PerOrder: and order), a higher Kb-Seq
	// had been processed before.
	SeqInverted Problem = "seq-inverted"
	// SeqReused: of one edge, epoch and site, this Kb-Seq had been processed under another key.
	SeqReused Problem = "seq-reused"
	// VersionInverted: of one order, a higher version had been processed before.
	VersionInverted Problem = "version-inverted"
	// VersionRepeated: of one order, this version had been processed under another key, or
	// without a key: it was cooked twice.
	VersionRepeated Problem = "version-repeated"
	// IVReused: under one fingerprint, this IV had come with another message.
	IVReused Problem = "iv-reused"
	// BadHeaders: Kb-Edge or Kb-Seq are there, but not both well-formed.
	BadHeaders Problem = "bad-headers"
	// KeyMoved: this Idempotency-Key had come with another kind or payload.
	KeyMoved Problem = "key-moved"
)

// Counts add up records.
type Counts struct {
	Requests  uint64 `json:"requests"`
	Delivered uint64 `json:"delivered"` // cooked, each key once
	Repeats   uint64 `json:"repeats"`   // processed again under a key that was cooked
	Late      uint64 `json:"late"`      // processed, delivered or repeat, after the client gave up
	GaveUp    uint64 `json:"gave_up"`
	// Inversions: delivered after something that should follow; LateInversions are those of
	// them that were processed after their client gave up.
	Inversions     uint64             `json:"inversions"`
	LateInversions uint64             `json:"late_inversions"`
	HeaderErrors   uint64             `json:"header_errors"`   // errorCode 1
	DecryptErrors  uint64             `json:"decrypt_errors"`  // errorCode 2
	MismatchErrors uint64             `json:"mismatch_errors"` // errorCode 3, or 2 in its place
	Refused        uint64             `json:"refused"`         // every request the Kitchen itself refused, those above included
	Faults         map[Action]uint64  `json:"faults,omitempty"`
	Problems       map[Problem]uint64 `json:"problems,omitempty"`
}

// count adds one to a counter in a map that may not exist yet.
func count[K comparable](m *map[K]uint64, k K) {
	if *m == nil {
		*m = map[K]uint64{}
	}
	(*m)[k]++
}

func (c Counts) clone() Counts {
	c.Faults, c.Problems = maps.Clone(c.Faults), maps.Clone(c.Problems)
	return c
}

// Stats are the Kitchen's counters since Start.
type Stats struct {
	Counts
	Sites map[string]Counts `json:"sites"`
	// Strays are requests to no known site, path or method; Followed are those that came by
	// a Redirect.
	Strays   uint64 `json:"strays"`
	Followed uint64 `json:"followed"`
	// Dropped counts records that left the ledger, and Forgotten what left the memory
	// behind repeats and problems, because Config.MaxRecords was reached. While Forgotten
	// is 0, no repeat or problem went unseen.
	Dropped   uint64 `json:"dropped"`
	Forgotten uint64 `json:"forgotten"`
}

// memory is a map that forgets its oldest keys beyond max. Guarded by Kitchen.mu.
type memory[K comparable, V any] struct {
	max       int
	m         map[K]V
	order     []K // a ring once it is full
	oldest    int
	forgotten *uint64
}

func newMemory[K comparable, V any](max int, forgotten *uint64) memory[K, V] {
	return memory[K, V]{max: max, m: map[K]V{}, forgotten: forgotten}
}

func (m *memory[K, V]) get(k K) (V, bool) {
	v, ok := m.m[k]
	return v, ok
}

func (m *memory[K, V]) set(k K, v V) {
	if _, ok := m.m[k]; !ok {
		if len(m.order) < m.max {
			m.order = append(m.order, k)
		} else {
			delete(m.m, m.order[m.oldest])
			*m.forgotten++
			m.order[m.oldest] = k
			m.oldest = (m.oldest + 1) % m.max
		}
	}
	m.m[k] = v
}

// What the Kitchen remembers to judge a sender by.
type (
	keyOf    struct{ site, key string }
	laneOf   struct{ site, edge, epoch, order string }
	numberOf struct {
		site, edge, epoch string
		seq               uint64
	}
	orderOf struct{ site, kind, order string }
	ivOf    struct{ site, fingerprint, iv string }

	// known is what is known of an Idempotency-Key.
	known struct {
		kind, payload string
		attempts      int
		cooked        bool
		ticket        uint64
	}
)

// judge compares a request about to be cooked for the first time with what was cooked
// before, and remembers it. k.mu is held.
func (k *Kitchen) judge(r *Record) {
	if r.Seq > 0 {
		number := numberOf{r.Site, r.Edge, r.Epoch, r.Seq}
		if _, ok := k.numbers.get(number); ok {
			r.Problems = append(r.Problems, SeqReused)
		}
		k.numbers.set(number, struct{}{})
		lane := laneOf{site: r.Site, edge: r.Edge, epoch: r.Epoch}
		if k.cfg.PerOrder {
			lane.order = r.OrderID
		}
		switch highest, _ := k.lanes.get(lane); {
		case r.Seq < highest:
			r.Problems = append(r.Problems, SeqInverted)
		case r.Seq > highest:
			k.lanes.set(lane, r.Seq)
		}
	}
	if r.OrderID != "" && r.Version > 0 {
		order := orderOf{r.Site, r.Kind, r.OrderID}
		switch newest, ok := k.orders.get(order); {
		case ok && r.Version < newest:
			r.Problems = append(r.Problems, VersionInverted)
		case ok && r.Version == newest:
			r.Problems = append(r.Problems, VersionRepeated)
		default:
			k.orders.set(order, r.Version)
		}
	}
}

// keep stores a new record, dropping the oldest one beyond the bound. k.mu is held.
func (k *Kitchen) keep(r *Record) {
	if len(k.ledger) < k.cfg.MaxRecords {
		k.ledger = append(k.ledger, r)
		return
	}
	k.ledger[k.oldest] = r
	k.oldest = (k.oldest + 1) % k.cfg.MaxRecords
	k.dropped++
}

// Ledger returns copies of the records kept, in order of arrival. Records of requests
// still being worked on are among them, as they stand.
func (k *Kitchen) Ledger() []Record {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]Record, 0, len(k.ledger))
	for _, part := range [][]*Record{k.ledger[k.oldest:], k.ledger[:k.oldest]} {
		for _, r := range part {
			out = append(out, r.clone())
		}
	}
	return out
}

func (r *Record) clone() Record {
	c := *r
	c.Problems = slices.Clone(r.Problems)
	return c
}

// Stats returns the counters as they stand.
func (k *Kitchen) Stats() Stats {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := Stats{Sites: map[string]Counts{}, Strays: k.strays, Followed: k.followed, Dropped: k.dropped, Forgotten: k.forgotten}
	out.Counts = k.total.clone()
	for name, s := range k.sites {
		out.Sites[name] = s.counts.clone()
	}
	return out
}

// LastFingerprint returns the fingerprint of the newest processed request of a site, ""
// when there is none.
func (k *Kitchen) LastFingerprint(site string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s := k.sites[site]; s != nil {
		return s.fingerprint
	}
	return ""
}
