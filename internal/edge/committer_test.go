package edge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// scriptedHub is a hub that does to each publish what a test says, and keeps what it has
// stored as the real one does: once for each number, in the order of arrival.
type scriptedHub struct {
	mu      sync.Mutex
	away    bool
	log     []*broker.Event
	calls   []*broker.Event
	inHub   map[string]int // publishes under way, by site
	overlap bool           // two of one site at once
	// publish decides; nil stores. It runs without mu.
	publish func(ctx context.Context, e *broker.Event, call int) fate
	blind   bool // LastEvent finds nothing
}

// fate is what happens to one publish.
type fate struct {
	store bool // the hub stores it
	err   error
}

func (h *scriptedHub) Connected() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.away
}

func (h *scriptedHub) PublishEvent(ctx context.Context, e *broker.Event) (uint64, bool, error) {
	h.mu.Lock()
	h.calls = append(h.calls, e)
	call := len(h.calls)
	if h.inHub == nil {
		h.inHub = make(map[string]int)
	}
	h.inHub[e.Site]++
	h.overlap = h.overlap || h.inHub[e.Site] > 1
	publish := h.publish
	h.mu.Unlock()
	f := fate{store: true}
	if publish != nil {
		f = publish(ctx, e, call)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.inHub[e.Site]--
	if !f.store {
		return 0, false, f.err
	}
	for i, old := range h.log {
		if old.Site == e.Site && old.Epoch == e.Epoch && old.Seq == e.Seq {
			return uint64(i + 1), true, f.err
		}
	}
	h.log = append(h.log, e)
	return uint64(len(h.log)), false, f.err
}

func (h *scriptedHub) LastEvent(_ context.Context, site, _ string) (*broker.Event, uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, e := range slices.Backward(h.log) {
		if e.Site == site && !h.blind {
			return e, uint64(i + 1), nil
		}
	}
	return nil, 0, broker.ErrNone
}

// ids are what the hub has stored of a site, in its order.
func (h *scriptedHub) ids(site string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var ids []string
	for _, e := range h.log {
		if e.Site == site {
			ids = append(ids, fmt.Sprintf("%s:%d", e.ID, e.Seq))
		}
	}
	return ids
}

func (h *scriptedHub) published() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.calls)
}

// noted is what a draft's owner hears.
type noted struct {
	mu    sync.Mutex
	heard []string
}

func (n *noted) note(s string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.heard = append(n.heard, s)
}
func (n *noted) numbered(seq uint64, _, _ time.Time) { n.note(fmt.Sprintf("numbered %d", seq)) }
func (n *noted) unknown()                            { n.note("unknown") }
func (n *noted) stored()                             { n.note("stored") }
func (n *noted) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.heard, ", ")
}

func testCommitter(hub publisher) *committer {
	return newCommitter(committerConfig{Edge: "store-7", Epoch: testEpoch, Hub: hub, Sites: []string{"one", "two"}, Wait: 4 * time.Second, Log: slog.New(slog.DiscardHandler)})
}

func testDraft(tb testing.TB, site, id string) (*draft, *noted) {
	n := new(noted)
	return &draft{site: site, kind: "order", id: id, within: time.Minute, binding: binding(tb, site), progress: n,
		triple: envelope.Triple{IV: []byte("iv"), Fingerprint: []byte("fp"), Message: []byte("m " + id)}}, n
}

var (
	lost    = fate{store: false, err: fmt.Errorf("%w: cut", broker.ErrUnknown)}
	unheard = fate{store: true, err: fmt.Errorf("%w: cut", broker.ErrUnknown)} // stored, and the acknowledgement lost
	full    = fate{err: fmt.Errorf("%w: full", broker.ErrRejected)}
)

func commit(t *testing.T, c *committer, site, id string) (*noted, error) {
	t.Helper()
	d, n := testDraft(t, site, id)
	return n, c.Commit(t.Context(), d)
}

// halt ends a committer at once.
func halt(c *committer) {
	c.abandon()
	c.stop(context.Background())
}

func TestCommitNumbersAndTags(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := &scriptedHub{}
		c := testCommitter(hub)
		defer halt(c)
		d, n := testDraft(t, "one", "a")
		d.order, d.trace = "lane", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
		if err := c.Commit(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if got := n.String(); got != "numbered 1, stored" {
			t.Errorf("heard %s", got)
		}
		e := hub.log[0]
		now := time.Now().UnixMilli()
		want := envelope.Event{Site: "one", Kind: "order", Edge: "store-7", Epoch: testEpoch, From: 1, Seq: 1, ID: "a", Accepted: now, Deadline: now + 60_000,
			Order: "lane", Via: "hub", Triple: d.triple}
		if fmt.Sprint(e.Event) != fmt.Sprint(want) {
			t.Errorf("event %+v, want %+v", e.Event, want)
		}
		if e.Bind != "b1" || e.Traceparent != d.trace {
			t.Errorf("bind %q, traceparent %q", e.Bind, e.Traceparent)
		}
		if err := d.binding.VerifyEvent(&e.Event, e.Bind, e.Tag); err != nil {
			t.Errorf("tag: %v", err)
		}
	})
}

func TestCommitGivesARefusedNumberBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := &scriptedHub{}
		refusals := []error{full.err, fmt.Errorf("%w: header", broker.ErrInvalid)}
		hub.publish = func(_ context.Context, _ *broker.Event, call int) fate {
			if call <= len(refusals) {
				return fate{err: refusals[call-1]}
			}
			return fate{store: true}
		}
		c := testCommitter(hub)
		defer halt(c)
		for i := range refusals {
			n, err := commit(t, c, "one", "refused")
			if !errors.Is(err, errNotStored) || !errors.Is(err, refusals[i]) {
				t.Errorf("error %v", err)
			}
			if got := n.String(); got != "numbered 1" {
				t.Errorf("heard %s", got)
			}
		}
		for _, id := range []string{"a", "b"} {
			if _, err := commit(t, c, "one", id); err != nil {
				t.Fatal(err)
			}
		}
		if got := hub.ids("one"); !slices.Equal(got, []string{"a:1", "b:2"}) {
			t.Errorf("the hub has %v", got)
		}
	})
}

func TestAnUnknownOutcomeIsSettledBeforeAnythingNewer(t *testing.T) {
	for _, tc := range []struct {
		name  string
		first fate
		blind bool // the hub does not say what it has last
	}{
		{"it was lost", lost, false},
		{"it was stored, and the acknowledgement lost", unheard, false},
		{"it was stored, and the hub does not say so", unheard, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				hub := &scriptedHub{blind: tc.blind}
				silent := true
				hub.publish = func(ctx context.Context, e *broker.Event, call int) fate {
					hub.mu.Lock()
					defer hub.mu.Unlock()
					switch {
					case call == 1:
						return tc.first
					case silent && e.Site == "one":
						return lost
					}
					return fate{store: true}
				}
				c := testCommitter(hub)
				defer halt(c)
				n, err := commit(t, c, "one", "a")
				if !errors.Is(err, errUnknown) || errors.Is(err, errNotStored) {
					t.Fatalf("error %v", err)
				}
				if got := c.unknown.Load(); got != 1 {
					t.Errorf("%d lines with an unknown head", got)
				}
				// Another site is not concerned.
				if _, err := commit(t, c, "two", "x"); err != nil {
					t.Error(err)
				}
				waits := func() (time.Duration, error) {
					begun := time.Now()
					_, err := commit(t, c, "one", "b")
					return time.Since(begun), err
				}
				if tc.first.store && !tc.blind {
					// The hub says that it has it, so nothing is sent again.
					time.Sleep(time.Second)
					if calls := hub.published(); calls != 2 {
						t.Errorf("%d publishes, want one for each site", calls)
					}
				} else if took, err := waits(); !errors.Is(err, errNotStored) || !errors.Is(err, errTurn) || took != 2*time.Second {
					t.Errorf("behind it: %v after %v", err, took)
				}
				hub.mu.Lock()
				silent = false
				hub.mu.Unlock()
				if _, err := waits(); err != nil {
					t.Fatal(err)
				}
				if got := n.String(); got != "numbered 1, unknown, stored" {
					t.Errorf("heard %s", got)
				}
				if got := hub.ids("one"); !slices.Equal(got, []string{"a:1", "b:2"}) {
					t.Errorf("the hub has %v", got)
				}
				for _, e := range hub.calls {
					if e.ID == "a" && e != hub.calls[0] {
						t.Error("sent again, it was not the same event")
					}
				}
				if got := c.unknown.Load(); got != 0 {
					t.Errorf("%d lines with an unknown head in the end", got)
				}
			})
		})
	}
}

// The last event of an earlier run may have the same number.
func TestAnEventOfAnotherEpochSettlesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before, _ := testDraft(t, "one", "before")
		hub := &scriptedHub{}
		old := testCommitter(hub)
		old.epoch = "epochbefore"
		if err := old.Commit(t.Context(), before); err != nil {
			t.Fatal(err)
		}
		halt(old)
		hub.publish = func(_ context.Context, _ *broker.Event, call int) fate {
			if call == 2 {
				return lost
			}
			return fate{store: true}
		}
		c := testCommitter(hub)
		defer halt(c)
		if _, err := commit(t, c, "one", "a"); !errors.Is(err, errUnknown) {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if got := hub.ids("one"); !slices.Equal(got, []string{"before:1", "a:1"}) {
			t.Errorf("the hub has %v", got)
		}
	})
}

// A refusal of the copy says nothing of the first one, so the number is not free.
func TestAnUnknownOutcomeSurvivesARefusalOfItsCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := &scriptedHub{}
		hub.publish = func(_ context.Context, _ *broker.Event, call int) fate {
			switch {
			case call == 1:
				return lost
			case call < 5:
				return full
			}
			return fate{store: true}
		}
		c := testCommitter(hub)
		defer halt(c)
		if _, err := commit(t, c, "one", "a"); !errors.Is(err, errUnknown) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		if _, err := commit(t, c, "one", "b"); err != nil {
			t.Fatal(err)
		}
		if got := hub.ids("one"); !slices.Equal(got, []string{"a:1", "b:2"}) {
			t.Errorf("the hub has %v", got)
		}
	})
}

func TestWhileTheHubIsAwayNobodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := &scriptedHub{away: true}
		c := testCommitter(hub)
		defer halt(c)
		begun := time.Now()
		n, err := commit(t, c, "one", "a")
		if !errors.Is(err, errNotStored) || !errors.Is(err, errAway) || time.Since(begun) != 0 {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		if n.String() != "" || hub.published() != 0 {
			t.Errorf("heard %q, %d publishes", n, hub.published())
		}

		// The same behind an event whose outcome is unknown.
		hub.away = false
		hub.publish = func(context.Context, *broker.Event, int) fate { return lost }
		if _, err := commit(t, c, "one", "b"); !errors.Is(err, errUnknown) {
			t.Fatal(err)
		}
		hub.mu.Lock()
		hub.away = true
		hub.mu.Unlock()
		begun = time.Now()
		if _, err := commit(t, c, "one", "c"); !errors.Is(err, errAway) || time.Since(begun) != 0 {
			t.Errorf("%v after %v", err, time.Since(begun))
		}
		calls := hub.published()
		time.Sleep(time.Minute)
		if hub.published() != calls {
			t.Error("published to a hub that is away")
		}
	})
}

func TestAPOSThatGoesAwayTakesItsEventOnlyBeforeItIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := &scriptedHub{}
		hub.publish = func(ctx context.Context, _ *broker.Event, _ int) fate {
			select {
			case <-ctx.Done():
				return lost
			case <-time.After(time.Second):
				return fate{store: true}
			}
		}
		c := testCommitter(hub)
		defer halt(c)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(500*time.Millisecond, cancel)
		sent, _ := testDraft(t, "one", "sent")
		behind, n := testDraft(t, "one", "behind")
		var errs [2]error
		var wg sync.WaitGroup
		wg.Go(func() { errs[0] = c.Commit(ctx, sent) })
		synctest.Wait()
		wg.Go(func() { errs[1] = c.Commit(ctx, behind) })
		wg.Wait()
		if errs[0] != nil {
			t.Errorf("the one that was sent: %v", errs[0])
		}
		if !errors.Is(errs[1], errNotStored) || n.String() != "" {
			t.Errorf("the one that waited: %v, heard %q", errs[1], n)
		}
		if got := hub.ids("one"); !slices.Equal(got, []string{"sent:1"}) {
			t.Errorf("the hub has %v", got)
		}
	})
}

func TestOneSiteIsPublishedOneAtATimeInTheOrderOfArrival(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hub := &scriptedHub{}
		hub.publish = func(context.Context, *broker.Event, int) fate {
			time.Sleep(10 * time.Millisecond)
			return fate{store: true}
		}
		c := testCommitter(hub)
		defer halt(c)
		var wg sync.WaitGroup
		var want []string
		begun := time.Now()
		for i := range 50 {
			id := fmt.Sprintf("e%d", i)
			want = append(want, fmt.Sprintf("%s:%d", id, i+1))
			for _, site := range []string{"one", "two"} {
				d, _ := testDraft(t, site, id)
				wg.Go(func() {
					if err := c.Commit(t.Context(), d); err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
		}
		wg.Wait()
		for _, site := range []string{"one", "two"} {
			if got := hub.ids(site); !slices.Equal(got, want) {
				t.Errorf("site %s: %v", site, got)
			}
		}
		if hub.overlap {
			t.Error("two events of a site were under way at once")
		}
		if took := time.Since(begun); took != 500*time.Millisecond {
			t.Errorf("took %v: sites waited for each other", took)
		}
	})
}

func TestStopSettlesWhatItCanAndLeavesTheRest(t *testing.T) {
	for _, tc := range []struct {
		name  string
		comes time.Duration // when the hub answers again
		want  string
	}{
		{"the hub comes back in time", 5 * time.Second, "numbered 1, unknown, stored"},
		{"it does not", time.Hour, "numbered 1, unknown"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				back := time.Now().Add(tc.comes)
				hub := &scriptedHub{}
				hub.publish = func(context.Context, *broker.Event, int) fate {
					if time.Now().Before(back) {
						return lost
					}
					return fate{store: true}
				}
				c := testCommitter(hub)
				n, err := commit(t, c, "one", "a")
				if !errors.Is(err, errUnknown) {
					t.Fatal(err)
				}
				limit, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				c.stop(limit)
				if got := n.String(); got != tc.want {
					t.Errorf("heard %s, want %s", got, tc.want)
				}
				if _, err := commit(t, c, "two", "b"); !errors.Is(err, errStopped) || !errors.Is(err, errNotStored) {
					t.Errorf("after the stop: %v", err)
				}
			})
		})
	}
}

// Whatever the hub does, and whenever: what Commit says is true, and what the hub has is
// in order, without holes, each once.
func TestCommitIsTrueUnderAnyFailure(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		seed := rapid.Uint64().Draw(rt, "seed")
		posts := rapid.IntRange(1, 40).Draw(rt, "posts")
		trouble := rapid.Float64Range(0, 0.9).Draw(rt, "trouble")
		var mistakes []string // told outside of the bubble, where rapid may shrink
		wrong := func(format string, args ...any) { mistakes = append(mistakes, fmt.Sprintf(format, args...)) }
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			var mu sync.Mutex
			chance := func() float64 {
				mu.Lock()
				defer mu.Unlock()
				return random.Float64()
			}
			hub := &scriptedHub{}
			calm := false
			hub.publish = func(ctx context.Context, _ *broker.Event, _ int) fate {
				time.Sleep(time.Duration(chance() * float64(20*time.Millisecond)))
				mu.Lock()
				settled := calm
				mu.Unlock()
				if settled || chance() >= trouble {
					return fate{store: true}
				}
				return []fate{lost, unheard, full}[int(chance()*3)]
			}
			c := testCommitter(hub)
			type result struct {
				err error
				n   *noted
			}
			results := make(map[string]result)
			var wg sync.WaitGroup
			for i := range posts {
				site := []string{"one", "two"}[i%2]
				id := fmt.Sprintf("e%d", i)
				d, n := testDraft(t, site, id)
				pause := time.Duration(chance() * float64(time.Second))
				wg.Go(func() {
					time.Sleep(pause)
					err := c.Commit(t.Context(), d)
					mu.Lock()
					defer mu.Unlock()
					results[id] = result{err, n}
				})
			}
			wg.Wait()
			mu.Lock()
			calm = true
			mu.Unlock()
			limit, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			c.stop(limit)

			has := make(map[string]bool)
			next := map[string]uint64{"one": 1, "two": 1}
			for _, e := range hub.log {
				if has[e.ID] {
					wrong("%s is stored twice", e.ID)
				}
				has[e.ID] = true
				if e.Seq != next[e.Site] {
					wrong("site %s: number %d where %d was due", e.Site, e.Seq, next[e.Site])
				}
				next[e.Site] = e.Seq + 1
			}
			if hub.overlap {
				wrong("two events of a site were under way at once")
			}
			for id, r := range results {
				heardStored := strings.HasSuffix(r.n.String(), "stored")
				switch {
				case r.err == nil && !has[id]:
					wrong("%s: Commit said stored, the hub does not have it", id)
				case errors.Is(r.err, errNotStored) && (has[id] || heardStored):
					wrong("%s: Commit said not stored, the hub has it", id)
				case errors.Is(r.err, errUnknown) && (!has[id] || !heardStored):
					wrong("%s: unknown, and not settled in the end: %s", id, r.n)
				}
			}
		})
		if len(mistakes) > 0 {
			rt.Fatal(strings.Join(mistakes, "\n"))
		}
	})
}

func TestEpochsDifferAndAreNames(t *testing.T) {
	a, b := newEpoch(), newEpoch()
	if a == b || len(a) < 8 || strings.Trim(a, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		t.Errorf("epochs %q and %q", a, b)
	}
}

func TestBackoffIsBounded(t *testing.T) {
	for attempt := range 200 {
		if d := backoff(attempt); d <= 0 || d > resolveMax+time.Millisecond {
			t.Fatalf("attempt %d: %v", attempt, d)
		}
	}
}
