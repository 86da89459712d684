package router

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// plan is a run of a site's deliveries with everything that goes wrong in it.
type plan struct {
	events   []plannedEvent
	kitchen  []manner // of each request in turn, and from the start again
	troubles []trouble
	loseAcks []bool        // likewise
	skew     time.Duration // of the hub's clock
}

type plannedEvent struct {
	after time.Duration
	site  string
	alert bool
	life  time.Duration
}

// manner is how the Kitchen treats a request.
type manner struct {
	what  string
	delay time.Duration
}

// trouble is what happens to the bridge and the hub.
type trouble struct {
	after time.Duration
	what  string
	seq   uint64
}

func drawPlan(t *rapid.T) plan {
	duration := func(name string, most time.Duration) time.Duration {
		return time.Duration(rapid.Int64Range(0, int64(most/time.Millisecond)).Draw(t, name)) * time.Millisecond
	}
	var p plan
	for range rapid.IntRange(1, 20).Draw(t, "events") {
		p.events = append(p.events, plannedEvent{
			after: duration("after", 2*time.Second),
			site:  rapid.SampledFrom([]string{"s1", "s1", "s2"}).Draw(t, "site"),
			alert: rapid.Bool().Draw(t, "alert"),
			life:  time.Second + duration("life", 40*time.Second),
		})
	}
	manners := []string{"take", "take", "take", "late", "lost", "cut", "cut-late", "busy", "throttle", "refuse", "unreachable"}
	for range rapid.IntRange(1, 12).Draw(t, "manners") {
		p.kitchen = append(p.kitchen, manner{rapid.SampledFrom(manners).Draw(t, "manner"), duration("delay", 2500*time.Millisecond)})
	}
	for range rapid.IntRange(0, 5).Draw(t, "troubles") {
		p.troubles = append(p.troubles, trouble{
			after: duration("then", 10*time.Second),
			what:  rapid.SampledFrom([]string{"restart", "kill", "again", "stop", "hub away"}).Draw(t, "trouble"),
			seq:   rapid.Uint64Range(1, 20).Draw(t, "seq"),
		})
	}
	p.skew = time.Duration(rapid.IntRange(-3, 3).Draw(t, "skew")) * time.Second
	p.loseAcks = rapid.SliceOfN(rapid.Bool(), 1, 4).Draw(t, "lost acks")
	return p
}

// stove is a Kitchen that takes an order once, also one whose sender has given up, and
// watches that its sender keeps order.
type stove struct {
	plan   plan
	settle time.Duration
	wg     sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	requests int
	sites    map[string]*burner
	wrong    []string
}

// burner is one site's.
type burner struct {
	busy   bool
	free   time.Time // no request may come before
	last   int       // highest sequence received
	taken  map[int]bool
	denied map[int]bool // answered with a 422
}

func (s *stove) complain(format string, args ...any) {
	s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
}

func (s *stove) kitchen(site string) http.RoundTripper {
	return tripper(func(r *http.Request) (*http.Response, error) {
		s.mu.Lock()
		m := s.plan.kitchen[s.requests%len(s.plan.kitchen)]
		s.requests++
		s.mu.Unlock()
		if m.what == "unreachable" {
			return nil, errors.New("no route to host")
		}
		return kitchen(func(r *http.Request, _ []byte) (*http.Response, error) { return s.serve(site, m, r) }).RoundTrip(r)
	})
}

func (s *stove) serve(site string, m manner, r *http.Request) (*http.Response, error) {
	seq, _ := strconv.Atoi(r.Header.Get("Kb-Seq"))
	ms, _ := strconv.ParseInt(r.Header.Get("Kb-Deadline"), 10, 64)
	deadline := time.UnixMilli(ms)
	s.mu.Lock()
	b := s.sites[site]
	now := time.Now()
	switch {
	case b.busy:
		s.complain("%s: %d begins while another request is under way", site, seq)
	case now.Before(b.free):
		s.complain("%s: %d begins %s too early after an unanswered request", site, seq, b.free.Sub(now))
	}
	if seq < b.last {
		s.complain("%s: %d comes after %d", site, seq, b.last)
	}
	if !now.Before(deadline) {
		s.complain("%s: %d begins at or after its deadline", site, seq)
	}
	b.last, b.busy = max(b.last, seq), true
	repeated := b.taken[seq]
	s.mu.Unlock()

	take := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.taken[seq] = true
	}
	answered := false
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		b.busy = false
		if !answered {
			b.free = time.Now().Add(s.settle)
		}
		if time.Now().After(deadline) {
			s.complain("%s: the attempt on %d outlives its deadline", site, seq)
		}
	}()
	answer := func(status int, headers ...string) (*http.Response, error) {
		t := time.NewTimer(m.delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			return nil, context.Cause(r.Context())
		}
		if status == 200 {
			take()
		}
		if status == 422 {
			s.mu.Lock()
			b.denied[seq] = true
			s.mu.Unlock()
		}
		answered = true
		return reply(status, "", headers...), nil
	}
	if repeated {
		return answer(409)
	}
	switch m.what {
	case "late": // takes it long after the sender has given up
		s.wg.Go(func() { time.Sleep(m.delay + 3*time.Second); take() })
		return silent(r, nil)
	case "lost":
		return silent(r, nil)
	case "cut":
		return nil, errors.New("EOF")
	case "cut-late":
		s.wg.Go(func() { time.Sleep(m.delay); take() })
		return nil, errors.New("EOF")
	case "busy":
		return answer(503)
	case "throttle":
		return answer(429, "Retry-After", "2")
	case "refuse":
		return answer(422)
	}
	return answer(200)
}

// I2, I3, I4, I8 against a Kitchen and a hub that do everything they may do: each event
// ends with one report that is true, and the Kitchen never sees two requests of a site at
// once, one too early, or an older event after a newer one.
func TestOrderAndFateUnderTrouble(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := drawPlan(rt)
		var wrong []string
		synctest.Test(t, func(t *testing.T) { wrong = runPlan(t, p) })
		if len(wrong) > 0 {
			rt.Fatalf("%d things wrong:\n%v", len(wrong), wrong)
		}
	})
}

func runPlan(t *testing.T, p plan) []string {
	sites := []string{"s1", "s2"}
	keys := testKeys(t, sites...)
	log := newHubLog()
	log.skew = p.skew
	s := &stove{plan: p, settle: time.Second, sites: make(map[string]*burner)}
	for _, site := range sites {
		s.sites[site] = &burner{taken: make(map[int]bool), denied: make(map[int]bool)}
	}
	back := make(chan struct{}) // open while the hub stores nothing
	close(back)
	var mu sync.Mutex
	acks, calm := 0, false
	begin := func() *running {
		hub := log.connect()
		wait := func(ctx context.Context) error {
			mu.Lock()
			gate := back
			mu.Unlock()
			select {
			case <-gate:
				return nil
			case <-ctx.Done():
				return errCut
			}
		}
		hub.onReport = func(ctx context.Context, _ *broker.Report) error { return wait(ctx) }
		hub.onLetter = func(ctx context.Context, _ broker.DeadLetter) error { return wait(ctx) }
		hub.loseAck = func(*broker.Delivery) bool {
			log.mu.Lock()
			defer log.mu.Unlock()
			acks++
			return !calm && p.loseAcks[acks%len(p.loseAcks)]
		}
		kitchens := make(map[string]http.RoundTripper)
		for _, site := range sites {
			kitchens[site] = mortal(hub, s.kitchen(site))
		}
		return start(t, hub, keys, kitchens)
	}
	r := begin()

	var all []*broker.Delivery
	var work sync.WaitGroup
	work.Go(func() {
		e := newEdge(keys)
		for _, pe := range p.events {
			time.Sleep(pe.after)
			kind := "order"
			if pe.alert {
				kind = "alert"
			}
			all = append(all, log.store(e.event(t, pe.site, within(pe.life), ofKind(kind))))
		}
	})
	for _, tr := range p.troubles {
		time.Sleep(tr.after)
		switch tr.what {
		case "restart":
			r.hub.order(order{restart: true})
		case "again":
			r.hub.order(order{again: tr.seq})
		case "kill":
			r.kill(t)
			r = begin()
		case "stop":
			r.end(t)
			r = begin()
		case "hub away":
			gate := make(chan struct{})
			mu.Lock()
			back = gate
			mu.Unlock()
			time.Sleep(5 * time.Second)
			close(gate)
		}
	}
	work.Wait()
	log.mu.Lock()
	calm = true
	log.mu.Unlock()
	// Lost acknowledgements come back as redeliveries or, as here, with a take-over.
	for len(log.unacked()) > 0 {
		time.Sleep(time.Minute)
		r.hub.order(order{restart: true})
		synctest.Wait()
	}
	r.end(t)
	s.wg.Wait()

	wrong := s.wrong
	for _, d := range all {
		seq := int(d.Event.Seq)
		b := s.sites[d.Site]
		rep := log.reportOn(t, d)
		switch {
		case rep == nil:
			wrong = append(wrong, fmt.Sprintf("%s: no report on %d", d.Site, seq))
			continue
		case rep.State == "delivered" && !b.taken[seq]:
			wrong = append(wrong, fmt.Sprintf("%s: %d is delivered, they say", d.Site, seq))
		case rep.Reason == "refused" && !b.denied[seq]:
			wrong = append(wrong, fmt.Sprintf("%s: %d is refused, they say", d.Site, seq))
		case rep.Reason == "expired" && b.taken[seq] && !answeredLater(p):
			wrong = append(wrong, fmt.Sprintf("%s: %d expired, they say, and it is cooked", d.Site, seq))
		}
		if (log.letterOn(d) != nil) != (rep.State == "failed") {
			wrong = append(wrong, fmt.Sprintf("%s: %d is %s, with a dead letter: %t", d.Site, seq, rep.State, log.letterOn(d) != nil))
		}
		if rep.Reason == "expired" && rep.at.Before(r.deadline(d)) {
			wrong = append(wrong, fmt.Sprintf("%s: %d expired before its deadline", d.Site, seq))
		}
	}
	return wrong
}

// answeredLater tells whether the Kitchen may deny in a later attempt what it has in hand
// from an earlier one: only then may an event that is cooked be reported as expired.
func answeredLater(p plan) bool {
	for _, m := range p.kitchen {
		if m.what == "busy" || m.what == "throttle" {
			return true
		}
	}
	return false
}
