package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// modelHub stores events under the condition, as the hub does, and fails as it is told.
type modelHub struct {
	fault func() int // 0: none; see PublishAfter
	hang  bool       // nothing is ever answered

	mu         sync.Mutex
	log        []*broker.Event
	reconnects int
	link       context.CancelFunc
	batches    int
}

func (h *modelHub) Session(ctx context.Context) (context.Context, context.CancelFunc, error) {
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	link, cancel := context.WithCancel(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.link = cancel
	return link, cancel, nil
}

func (h *modelHub) Reconnect() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.reconnects++
	h.link()
	return nil
}

func (h *modelHub) last(site string, upTo int) (*broker.Event, uint64) {
	for i := upTo; i > 0; i-- {
		if h.log[i-1].Site == site {
			return h.log[i-1], uint64(i)
		}
	}
	return nil, 0
}

func (h *modelHub) LastEvent(ctx context.Context, site, _ string) (*broker.Event, uint64, error) {
	if h.hang {
		<-ctx.Done()
		return nil, 0, ctx.Err()
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	upTo := len(h.log)
	switch h.fault() {
	case 1:
		upTo = max(0, upTo-3) // a replica that lags
	case 2:
		return nil, 0, broker.ErrUnknown
	}
	if e, seq := h.last(site, upTo); e != nil {
		return e, seq, nil
	}
	return nil, 0, broker.ErrNone
}

func (h *modelHub) PublishAfter(_ context.Context, e *broker.Event, after uint64) (uint64, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(e.Triple.Message) == 0 {
		return 0, broker.ErrInvalid
	}
	fault := h.fault()
	if fault == 1 {
		return 0, fmt.Errorf("%w: full", broker.ErrRejected)
	}
	if _, seq := h.last(e.Site, len(h.log)); seq != after {
		return 0, broker.ErrBehind
	}
	h.log = append(h.log, e)
	if fault == 2 {
		return 0, broker.ErrUnknown // the acknowledgement is lost
	}
	return uint64(len(h.log)), nil
}

func (h *modelHub) PublishBatch(_ context.Context, batch []broker.Next) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.batches++
	cut := len(batch)
	fault := h.fault()
	if fault == 1 {
		cut /= 2
	}
	for i, n := range batch[:cut] {
		if _, seq := h.last(n.Event.Site, len(h.log)); n.First && seq != n.After {
			return i, broker.ErrBehind
		}
		h.log = append(h.log, n.Event)
	}
	switch {
	case fault == 2:
		return 0, broker.ErrUnknown
	case cut < len(batch):
		return cut, broker.ErrUnknown
	}
	return cut, nil
}

// modelBacklog is an outbox in memory.
type modelBacklog struct {
	mu      sync.Mutex
	log     []queued
	at      position
	mark    position
	unit    map[string]uint64
	renewed int
	arrived chan struct{}
}

func (b *modelBacklog) epoch() string { return "e" + fmt.Sprint(b.renewed) }

func (b *modelBacklog) cursor() position {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.at
}

func (b *modelBacklog) add(site string, deadline time.Time, flags queued) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unit[site]++
	n := b.unit[site]
	flags.pos = position{record: uint64(len(b.log) + 1)}
	flags.event = &broker.Event{Event: envelope.Event{Site: site, Kind: "order", Edge: "edge", Epoch: b.epoch(), From: n, Seq: n,
		ID: fmt.Sprintf("%s-%d", site, n), Accepted: 1, Deadline: deadline.UnixMilli(), Via: "hub", Triple: envelope.Triple{Message: []byte("x")}}}
	b.log = append(b.log, flags)
	if b.arrived != nil {
		close(b.arrived)
		b.arrived = nil
	}
}

func (b *modelBacklog) next(_ context.Context, after position, most, _ int) ([]queued, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rest := b.log[after.record:]
	out := append([]queued(nil), rest[:min(most, len(rest))]...)
	for i := range out {
		out[i].unsent = b.mark.before(out[i].pos)
	}
	return out, nil
}

func (b *modelBacklog) wait(ctx context.Context, after position) error {
	b.mu.Lock()
	if after.record < uint64(len(b.log)) {
		b.mu.Unlock()
		return nil
	}
	if b.arrived == nil {
		b.arrived = make(chan struct{})
	}
	ch := b.arrived
	b.mu.Unlock()
	select {
	case <-ch:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (b *modelBacklog) sending(_ context.Context, upTo position) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mark.before(upTo) {
		b.mark = upTo
	}
	return nil
}

func (b *modelBacklog) forwarded(upTo position) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at.before(upTo) {
		b.at = upTo
	}
}

func (b *modelBacklog) expire(_ context.Context, events []queued) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, q := range events {
		b.log[q.pos.record-1].expired = true
	}
	return nil
}

func (b *modelBacklog) resend(_ context.Context, site string, after uint64) (out []queued, _ error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, q := range b.log[:b.at.record] {
		if q.event.Site == site && q.event.Seq > after && !q.expired && !q.settled {
			out = append(out, q)
		}
	}
	return out, nil
}

func (b *modelBacklog) last(site string) uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unit[site]
}

func (b *modelBacklog) resumed() {}

func (b *modelBacklog) renew(context.Context, string, ...map[string]uint64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.renewed++
	b.unit = make(map[string]uint64)
	for i := range b.log {
		e := *b.log[i].event
		b.unit[e.Site]++
		e.Epoch, e.From, e.Seq = b.epoch(), b.unit[e.Site], b.unit[e.Site]
		b.log[i].event = &e
	}
	return nil
}

func (b *modelBacklog) open() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var sites []string
	for site := range b.unit {
		sites = append(sites, site)
	}
	return sites
}

type modelKeys map[string]*keysync.Site

func (k modelKeys) Site(name string) *keysync.Site { return k[name] }

func (k modelKeys) RefreshFor(context.Context, string, string) error { return errors.New("not here") }

func newModelKeys(sites ...string) modelKeys {
	k := make(modelKeys)
	lane, err := envelope.NewLaneKey(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		panic(err)
	}
	key, err := envelope.NewBindingKey("b1", bytes.Repeat([]byte{2}, 32))
	if err != nil {
		panic(err)
	}
	for _, site := range sites {
		b, err := envelope.NewBinding(site, lane, key)
		if err != nil {
			panic(err)
		}
		k[site] = &keysync.Site{Name: site, Binding: b}
	}
	return k
}

// forwardUntil runs a forwarder in a bubble until done or an hour has passed.
func forwardUntil(t interface{ Fatalf(string, ...any) }, h *modelHub, b *modelBacklog, done func() bool) {
	f, err := newForwarder(forwarderConfig{Edge: "edge", Hub: h, Backlog: b, Keys: newModelKeys("a", "b", "c"), Now: time.Now,
		RetryMax: time.Second, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatalf("%v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.run(ctx) }()
	for range 36000 {
		time.Sleep(100 * time.Millisecond) // of the bubble
		synctest.Wait()
		if done() {
			break
		}
	}
	ok := done()
	cancel()
	if err := <-ended; err != nil || !ok {
		t.Fatalf("forwarded all: %v, run: %v", ok, err)
	}
}

func newModelBacklog() *modelBacklog { return &modelBacklog{unit: make(map[string]uint64)} }

func (b *modelBacklog) drained() bool { return b.cursor().record == uint64(len(b.log)) }

// told checks that the hub has each number of a site once, in order, as itself or in a run.
func told(t *rapid.T, h *modelHub, b *modelBacklog, keys modelKeys) {
	at := make(map[string]uint64)
	expired := make(map[string]bool)
	for _, q := range b.log {
		expired[q.event.ID] = q.expired
	}
	for _, e := range h.log {
		if e.From != at[e.Site]+1 {
			t.Fatalf("site %s: number %d follows %d", e.Site, e.From, at[e.Site])
		}
		at[e.Site] = e.Seq
		if e.Kind != broker.KindExpired {
			if expired[e.ID] {
				t.Fatalf("%s was told expired, and is at the hub as itself", e.ID)
			}
			continue
		}
		if err := keys[e.Site].Binding.VerifyEvent(&e.Event, e.Bind, e.Tag); err != nil {
			t.Fatalf("run: %v", err)
		}
		body, err := keys[e.Site].Binding.OpenPlain(nil, e.Triple)
		var run struct {
			Expired []struct {
				ID string `json:"id"`
			} `json:"expired"`
		}
		if err == nil {
			err = json.Unmarshal(body, &run)
		}
		if err != nil || uint64(len(run.Expired)) != e.Seq-e.From+1 || len(run.Expired) > maxRun {
			t.Fatalf("run %d to %d of %d entries: %v", e.From, e.Seq, len(run.Expired), err)
		}
		for i, x := range run.Expired {
			if want := fmt.Sprintf("%s-%d", e.Site, e.From+uint64(i)); x.ID != want || !expired[x.ID] {
				t.Fatalf("run has %s (expired: %v), not %s", x.ID, expired[x.ID], want)
			}
		}
	}
	for site, n := range b.unit {
		if at[site] != n {
			t.Fatalf("site %s: the hub has up to %d of %d", site, at[site], n)
		}
	}
}

func TestForwarderBringsEachEventOnceInOrderOrInARun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(t, func(t *rapid.T) {
			faults := rapid.SliceOfN(rapid.IntRange(0, 5), 0, 60).Draw(t, "faults")
			h := &modelHub{fault: func() int {
				if len(faults) == 0 {
					return 0
				}
				f := faults[0]
				faults = faults[1:]
				return f
			}}
			b := newModelBacklog()
			for range rapid.IntRange(1, 120).Draw(t, "events") {
				deadline := time.Now().Add(rapid.SampledFrom([]time.Duration{-time.Minute, time.Second, 48 * time.Hour}).Draw(t, "deadline"))
				b.add(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "site"), deadline, queued{expired: deadline.Before(time.Now()) && rapid.Bool().Draw(t, "expired")})
			}
			forwardUntil(t, h, b, b.drained)
			told(t, h, b, newModelKeys("a", "b", "c"))
		})
	})
}

func TestForwarderSendsAgainWhatTheHubLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := &modelHub{fault: func() int { return 0 }}, newModelBacklog()
		for range 100 {
			b.add("a", time.Now().Add(48*time.Hour), queued{})
		}
		forwardUntil(t, h, b, b.drained)
		if h.batches == 0 {
			t.Error("a backlog was sent without a batch")
		}
		h.log = h.log[:40] // restored from an old copy
		forwardUntil(t, h, b, func() bool { h.mu.Lock(); defer h.mu.Unlock(); return len(h.log) == 100 })
		for i, e := range h.log {
			if e.Seq != uint64(i+1) {
				t.Fatalf("place %d has number %d", i, e.Seq)
			}
		}
	})
}

func TestForwarderBeginsAnEpochWhenTheHubIsAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := &modelHub{fault: func() int { return 0 }}, newModelBacklog()
		b.add("a", time.Now().Add(48*time.Hour), queued{})
		ahead := *b.log[0].event
		ahead.Seq, ahead.From = 9, 9
		h.log = append(h.log, &ahead)
		forwardUntil(t, h, b, b.drained)
		if b.renewed != 1 || len(h.log) != 2 || h.log[1].Epoch != "e1" {
			t.Errorf("renewed %d times, %d events at the hub", b.renewed, len(h.log))
		}
	})
}

func TestForwarderPassesWhatTheHubCannotTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := &modelHub{fault: func() int { return 0 }}, newModelBacklog()
		for range 3 {
			b.add("a", time.Now().Add(48*time.Hour), queued{})
		}
		b.log[1].event.Triple.Message = nil
		forwardUntil(t, h, b, b.drained)
		var kinds []string
		for _, e := range h.log {
			kinds = append(kinds, e.Kind)
		}
		if got := strings.Join(kinds, " "); got != "order expired order" || !b.log[1].expired {
			t.Errorf("the hub has %s", got)
		}
	})
}

func TestForwarderMakesAStalledLinkAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, b := &modelHub{fault: func() int { return 0 }, hang: true}, newModelBacklog()
		b.add("a", time.Now().Add(48*time.Hour), queued{})
		began := time.Now()
		forwardUntil(t, h, b, func() bool { h.mu.Lock(); defer h.mu.Unlock(); return h.reconnects > 0 })
		if took := time.Since(began); took < 30*time.Second || took > 45*time.Second {
			t.Errorf("noticed after %v", took)
		}
	})
}
