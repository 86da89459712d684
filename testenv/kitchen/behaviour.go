package kitchen

import (
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Behaviour is how one site's Kitchen behaves. The zero value is healthy: it works
// without delay and answers 200. It survives JSON, durations in nanoseconds.
//
// What is random in it depends only on Config.Seed, the site's name, how often the site's
// behaviour was set, and the request's place among the site's requests since then.
type Behaviour struct {
	// Refuse closes the listener and cuts its connections; requests that were being worked
	// on are lost, those waiting for late processing too. A listener that several sites share
	// closes when all of them refuse; until then a refusing site's connections are reset.
	Refuse bool `json:"refuse,omitempty"`
	// Latency is how long the Kitchen works on a request before it processes and answers it.
	Latency Latency `json:"latency,omitzero"`
	// Faults strike in place of the healthy answer. The first of the list that strikes a
	// request decides; where none does, the request is healthy.
	Faults []Fault `json:"faults,omitempty"`
	// Late says what becomes of requests whose client gave up before they were processed.
	Late Late `json:"late,omitzero"`
	// Repeat is the status of the answer to an Idempotency-Key processed before. Default
	// 200, with the body of the first answer.
	Repeat int `json:"repeat,omitempty"`
}

// Latency is a distribution: Base and an exponential part of mean Jitter, together at most
// Max. Max 0 is Base plus ten times Jitter.
type Latency struct {
	Base   time.Duration `json:"base,omitempty"`
	Jitter time.Duration `json:"jitter,omitempty"`
	Max    time.Duration `json:"max,omitempty"`
}

func (l Latency) draw(r *rand.Rand) time.Duration {
	limit := l.Max
	if limit == 0 {
		limit = l.Base + 10*l.Jitter
	}
	return min(l.Base+time.Duration(r.ExpFloat64()*float64(l.Jitter)), limit)
}

// Late is late processing: the client has given up, the Kitchen goes on. With a sender
// that goes on too soon it inverts orders.
type Late struct {
	Share float64 `json:"share,omitempty"` // 0 to 1 of these requests are processed all the same. Default 0: none
	Delay Latency `json:"delay,omitzero"`  // from the client's giving up to the processing
}

// Action is what a fault does to a request.
type Action string

const (
	// Answer gives Status, Header and Body. It is the default.
	Answer Action = "answer"
	// Hang never answers; it ends when the client gives up.
	Hang Action = "hang"
	// Drop resets the connection before any byte of an answer.
	Drop Action = "drop"
	// Reset resets the connection in the middle of the answer.
	Reset Action = "reset"
	// Truncate closes the connection in order in the middle of the answer.
	Truncate Action = "truncate"
	// Stall stops in the middle of the answer until the client gives up.
	Stall Action = "stall"
	// Huge answers with Size bytes.
	Huge Action = "huge"
	// Redirect answers Status (default 307) with a Location at which the Kitchen counts who
	// followed (Stats.Followed).
	Redirect Action = "redirect"
)

var actions = []Action{Answer, Hang, Drop, Reset, Truncate, Stall, Huge, Redirect}

// Fault is one thing that goes wrong.
type Fault struct {
	Do        Action  `json:"do,omitempty"`        // default Answer
	Kind      string  `json:"kind,omitempty"`      // strikes only this kind of event; default every kind
	Share     float64 `json:"share,omitempty"`     // 0 to 1 of the requests; 0 is each one
	Next      int     `json:"next,omitempty"`      // strikes that often, then never again; 0 is no limit
	Processed bool    `json:"processed,omitempty"` // the request is processed all the same: only its answer is bad

	Status int         `json:"status,omitempty"` // of the answer. Default 500; Reset, Truncate, Stall, Huge: 200; Redirect: 307
	Header http.Header `json:"header,omitempty"`
	Body   string      `json:"body,omitempty"` // default {"message":"<status text>"}
	// RetryAfter adds the header, rounded up to whole seconds: as their number, or as a date
	// when RetryAfterDate is set.
	RetryAfter     time.Duration `json:"retry_after,omitempty"`
	RetryAfterDate bool          `json:"retry_after_date,omitempty"`
	Size           int64         `json:"size,omitempty"` // of Huge, in bytes. Default 64 MiB
}

// Status is a Kitchen that answers every request with one status and processes none.
func Status(code int) Behaviour { return Behaviour{Faults: []Fault{{Status: code}}} }

// Slow is a healthy Kitchen that takes about d for each request.
func Slow(d time.Duration) Behaviour { return Behaviour{Latency: Latency{Base: d}} }

// Hanging is a Kitchen that accepts every request and answers none.
func Hanging() Behaviour { return Behaviour{Faults: []Fault{{Do: Hang}}} }

// Refusing is a Kitchen that is not there.
func Refusing() Behaviour { return Behaviour{Refuse: true} }

// Validate reports every mistake at once.
func (b Behaviour) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	latency := func(name string, l Latency) {
		if l.Base < 0 || l.Jitter < 0 || l.Max < 0 {
			bad("%s: negative duration in %+v", name, l)
		}
	}
	share := func(name string, s float64) {
		if !(s >= 0 && s <= 1) {
			bad("%s: %v is not between 0 and 1", name, s)
		}
	}
	latency("latency", b.Latency)
	latency("late.delay", b.Late.Delay)
	share("late.share", b.Late.Share)
	if b.Repeat != 0 && (b.Repeat < 200 || b.Repeat > 599) {
		bad("repeat: %d is no status from 200 to 599", b.Repeat)
	}
	for i, f := range b.Faults {
		at := func(field string) string { return fmt.Sprintf("faults[%d].%s", i, field) }
		if f.Do != "" && !slices.Contains(actions, f.Do) {
			bad("%s: %q is none of %v", at("do"), f.Do, actions)
		}
		share(at("share"), f.Share)
		if f.Status != 0 && (f.Status < 200 || f.Status > 599) {
			bad("%s: %d is no status from 200 to 599", at("status"), f.Status)
		}
		if f.Do == Redirect && f.Status != 0 && (f.Status < 300 || f.Status > 399) {
			bad("%s: %d does not redirect", at("status"), f.Status)
		}
		if f.Next < 0 || f.Size < 0 || f.RetryAfter < 0 {
			bad("faults[%d]: a negative number", i)
		}
	}
	return errors.Join(errs...)
}

// clone is a copy that shares nothing with what the caller keeps.
func (b Behaviour) clone() Behaviour {
	b.Faults = slices.Clone(b.Faults)
	for i := range b.Faults {
		b.Faults[i].Header = b.Faults[i].Header.Clone()
	}
	return b
}

// plan is what will happen to one request.
type plan struct {
	latency   time.Duration
	fault     *Fault // nil: healthy
	late      bool   // processed although the client gave up
	lateDelay time.Duration
	repeat    int
}

// conduct is a site's Behaviour at work. Guarded by Kitchen.mu.
type conduct struct {
	Behaviour
	rng  *rand.Rand
	left []int // of each fault with Next > 0
}

func newConduct(b Behaviour, seed uint64, site string, times uint64) conduct {
	h := fnv.New64a()
	_, _ = h.Write([]byte(site))
	c := conduct{Behaviour: b.clone(), rng: rand.New(rand.NewPCG(seed^h.Sum64(), times))}
	for _, f := range c.Faults {
		c.left = append(c.left, f.Next)
	}
	return c
}

// plan draws the fate of the next request. It draws for every fault, whether or not an
// earlier one struck, so that fates do not depend on kinds and counters.
func (c *conduct) plan(kind string) plan {
	p := plan{
		latency:   c.Latency.draw(c.rng),
		late:      c.rng.Float64() < c.Late.Share,
		lateDelay: c.Late.Delay.draw(c.rng),
		repeat:    c.Repeat,
	}
	for i := range c.Faults {
		f, luck := &c.Faults[i], c.rng.Float64()
		if p.fault != nil || f.Kind != "" && f.Kind != kind || f.Share != 0 && luck >= f.Share {
			continue
		}
		if f.Next > 0 {
			if c.left[i] == 0 {
				continue
			}
			c.left[i]--
		}
		p.fault = f
	}
	return p
}

// status is the answer's status, its default filled in.
func (f *Fault) status() int {
	switch {
	case f.Status != 0:
		return f.Status
	case f.Do == Redirect:
		return http.StatusTemporaryRedirect
	case f.Do == "" || f.Do == Answer:
		return http.StatusInternalServerError
	}
	return http.StatusOK
}

// header is the answer's header, made at now.
func (f *Fault) header(now time.Time) http.Header {
	h := http.Header{"Content-Type": {"application/json"}}
	for name, values := range maps.All(f.Header) {
		h[http.CanonicalHeaderKey(name)] = slices.Clone(values)
	}
	if f.RetryAfter > 0 {
		if f.RetryAfterDate {
			until := now.Add(f.RetryAfter + time.Second - 1).Truncate(time.Second)
			h.Set("Retry-After", until.UTC().Format(http.TimeFormat))
		} else {
			h.Set("Retry-After", fmt.Sprint(int64((f.RetryAfter+time.Second-1)/time.Second)))
		}
	}
	return h
}

func (f *Fault) body() []byte {
	if f.Body != "" {
		return []byte(f.Body)
	}
	return fmt.Appendf(nil, `{"message":%q}`, strings.ToLower(http.StatusText(f.status())))
}
