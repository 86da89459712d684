package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

const (
	idleConnections = 10_000
	idleSites       = 100
	idleQuick       = 2_000
	idleWarm        = 200 // screens that are there before memory is first read
)

func wsBenches() []bench {
	fanout := func(sites, screens int, rate float64, bound float64) bench {
		name := fmt.Sprintf("ws.fanout.%dx%d", sites, screens)
		what := fmt.Sprintf("sites: %d, screens of each: %d, events in all: %g/s", sites, screens, rate)
		return bench{
			name: name, turn: 3 * time.Second, quick: time.Second,
			rows: []row{
				{name: name, key: "cpu", unit: microseconds, budget: budget{kind: ratioAtMost, bound: bound},
					how: "CPU of the gate's process for an event at one screen; " + what + "; heartbeats included; floor: consume and write a prepared frame to one screen after the other"},
				{name: name + ".p99", key: "p99", unit: milliseconds, budget: budget{kind: ratioAtMost, bound: 1.15, slack: 1},
					how: "from before publishing to read by the screen, the slowest hundredth of the deliveries; the ratio is of what is left after 1 ms"},
			},
			open: func(ctx context.Context, l *lab) (*pair, error) {
				return openFanout(ctx, l, name, sites, screens, rate)
			},
		}
	}
	return []bench{
		fanout(1, 1000, 20, 1.10),
		fanout(100, 10, 1000, 1.35),
		{
			name: "ws.idle", cold: true, turn: 3 * time.Second, quick: time.Second,
			rows: []row{
				{name: "ws.idle", key: "rss", unit: kibibytes, budget: budget{kind: valueAtMost, bound: 12},
					how: fmt.Sprintf("resident memory of the gate's process for one of %d screens that get heartbeats only, as the kernel counts it (its own socket buffers not included)", idleConnections)},
				{name: "ws.idle.heap", key: "heap", unit: kibibytes, budget: budget{kind: reported},
					how: "of that, the heap's spans in use as Go counts them, garbage not yet collected included"},
				{name: "ws.idle.stacks", key: "stacks", unit: kibibytes, budget: budget{kind: reported},
					how: "of that, the stacks of goroutines"},
			},
			open: openIdle,
		},
	}
}

// side of screens: where they connect and what serves them.
type screenServer struct {
	process *stack.Process
	address string
	admin   string
}

// startGate runs the product's gate; tokens are by site.
func (c *crew) startGate(ctx context.Context, label string, f *fleet, hubURL string, tokens []string) (*screenServer, error) {
	s, err := newScreenServer()
	if err != nil {
		return nil, err
	}
	sums := make(map[string]string, len(tokens))
	for i, t := range tokens {
		sums[f.sites[i]] = door.TokenSHA256(t)
	}
	file, err := c.writeSettings(label+".json", map[string]any{
		"hub": hubURL, "listen": s.address, "admin": s.admin, "binding_file": f.bindingFile, "iterations": cipherSettings.Iterations, "screens": sums,
		"portal_url": f.portalSettings["url"], "token_file": f.portalSettings["token_file"], "ca_file": f.portalSettings["ca_file"],
	})
	if err != nil {
		return nil, err
	}
	s.process, err = c.start(ctx, "gate", label, s.admin, "-config", file)
	return s, err
}

func (c *crew) startFanoutFloor(ctx context.Context, label, hubURL string) (*screenServer, error) {
	s, err := newScreenServer()
	if err != nil {
		return nil, err
	}
	s.process, err = c.start(ctx, "fanout", label, s.admin, "-hub", hubURL, "-listen", s.address, "-admin", s.admin)
	return s, err
}

func newScreenServer() (*screenServer, error) {
	address, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	admin, err := stack.FreeAddr("")
	return &screenServer{address: address, admin: admin}, err
}

func screenTokens(n int) []string {
	tokens := make([]string, n)
	for i := range tokens {
		tokens[i], _ = token()
	}
	return tokens
}

func openFanout(ctx context.Context, l *lab, name string, sites, screens int, rate float64) (_ *pair, err error) {
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	f, err := newFleet(ctx, c, siteNames(sites))
	if err != nil {
		return nil, err
	}
	tokens := screenTokens(sites)
	p := &pair{close: c.close}
	for _, of := range []struct {
		side  *side
		hub   string
		start func(url string) (*screenServer, error)
	}{
		{&p.product, "hub-product", func(url string) (*screenServer, error) { return c.startGate(ctx, "gate", f, url, tokens) }},
		{&p.floor, "hub-floor", func(url string) (*screenServer, error) { return c.startFanoutFloor(ctx, "floor", url) }},
	} {
		h, err := c.startHub(ctx, of.hub, "interval", 1)
		if err != nil {
			return nil, err
		}
		s, err := of.start(h.url)
		if err != nil {
			return nil, err
		}
		a := newAudience(f)
		c.later(a.leave)
		if err := a.join(ctx, s.address, tokens, sites*screens); err != nil {
			return nil, err
		}
		*of.side = (&fanoutSide{audience: a, hub: h, pid: s.process.PID(), screens: screens, rate: rate}).turn
	}
	return p, nil
}

// fanoutSide is one side's state over its turns.
type fanoutSide struct {
	audience *audience
	hub      *hub
	pid      int
	screens  int // of a site
	rate     float64
	next     int
}

// turn publishes at the set rate and waits until every screen has every event of its site.
func (s *fanoutSide) turn(ctx context.Context, turn time.Duration) (sample, error) {
	a := s.audience
	n := int(turn.Seconds() * s.rate)
	events, err := a.events(n, s.next)
	if err != nil {
		return nil, err
	}
	for _, v := range a.screens {
		v.waits = v.waits[:0]
	}
	b := &broadcast{begun: time.Now(), first: int64(s.next), sent: make([]atomic.Int64, n)}
	a.now.Store(b)
	s.next += n
	want := int64(n * s.screens)
	a.frames.Store(0)
	start, err := cpuTime(s.pid)
	if err != nil {
		return nil, err
	}
	if err := s.hub.publish(ctx, events, s.rate, func(i int) { b.sent[i].Store(int64(time.Since(b.begun))) }); err != nil {
		return nil, err
	}
	if err := eventually(ctx, func() (bool, string, error) {
		got := a.frames.Load()
		return got >= want, fmt.Sprintf("of %d frames %d have come", want, got), a.failure()
	}); err != nil {
		return nil, err
	}
	end, err := cpuTime(s.pid)
	if err != nil {
		return nil, err
	}
	if got := a.frames.Load(); got != want {
		return nil, fmt.Errorf("%d frames came for %d", got, want)
	}
	if err := a.check(); err != nil {
		return nil, err
	}
	var waits []time.Duration
	for _, v := range a.screens {
		waits = append(waits, v.waits...)
	}
	return sample{"cpu": float64((end - start).Nanoseconds()) / 1e3 / float64(want), "p50": float64(percentile(waits, 0.5)) / 1e6,
		"p99": float64(percentile(waits, 0.99)) / 1e6, "frames": float64(want)}, nil
}

// spareFiles are descriptors that a process needs beside its screens.
const spareFiles = 200

func openIdle(ctx context.Context, l *lab) (_ *pair, err error) {
	limit, err := openFiles()
	if err != nil {
		return nil, err
	}
	n := idleConnections
	if l.quick {
		n = idleQuick
		l.warnf("ws.idle: -quick connects %d screens instead of %d", n, idleConnections)
	}
	if n > limit-spareFiles-idleWarm {
		n = limit - spareFiles - idleWarm
		if n < 500 {
			return nil, fmt.Errorf("a process may have %d open files: too few to count the memory of screens", limit)
		}
		l.warnf("ws.idle: only %d screens instead of %d: a process may have %d open files (ulimit -Hn)", n, idleConnections, limit)
	}
	c, err := l.crew("ws.idle")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	f, err := newFleet(ctx, c, siteNames(idleSites))
	if err != nil {
		return nil, err
	}
	tokens := screenTokens(idleSites)
	h, err := c.startHub(ctx, "hub", "interval", 1)
	if err != nil {
		return nil, err
	}
	count := 0
	of := func(start func(label string) (*screenServer, error)) side {
		return func(ctx context.Context, turn time.Duration) (_ sample, err error) {
			count++
			s, err := start(fmt.Sprintf("screens-%d", count))
			if err != nil {
				return nil, err
			}
			defer func() { err = errors.Join(err, c.stop(s.process)) }()
			return idle(ctx, f, s, tokens, n, turn)
		}
	}
	return &pair{
		product: of(func(label string) (*screenServer, error) { return c.startGate(ctx, label, f, h.url, tokens) }),
		floor:   of(func(label string) (*screenServer, error) { return c.startFanoutFloor(ctx, label, h.url) }),
		close:   c.close,
	}, nil
}

// idle connects n screens beside a few that are there before, and reads what the server's
// memory grew by once all have had heartbeats for a while.
func idle(ctx context.Context, f *fleet, s *screenServer, tokens []string, n int, turn time.Duration) (_ sample, err error) {
	a := newAudience(f)
	defer func() { err = errors.Join(err, a.leave()) }()
	if err := a.join(ctx, s.address, tokens, idleWarm); err != nil {
		return nil, err
	}
	if err := a.hear(ctx, idleWarm, time.Second); err != nil {
		return nil, err
	}
	before, err := s.memory(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.join(ctx, s.address, tokens, n); err != nil {
		return nil, err
	}
	if err := a.hear(ctx, n+idleWarm, turn); err != nil {
		return nil, err
	}
	after, err := s.memory(ctx)
	if err != nil {
		return nil, err
	}
	per := func(bytes int64) float64 { return float64(bytes) / 1024 / float64(n) }
	return sample{"rss": per(after.resident - before.resident), "heap": per(after.heap - before.heap), "stacks": per(after.stacks - before.stacks)}, nil
}

// hear listens for a while, and demands that the screens had a heartbeat for each second.
func (a *audience) hear(ctx context.Context, screens int, d time.Duration) error {
	before := a.beats.Load()
	want := int64(screens) * int64(max(d/time.Second, 1))
	if err := until(ctx, time.Now().Add(d)); err != nil {
		return err
	}
	return eventually(ctx, func() (bool, string, error) {
		got := a.beats.Load() - before
		return got >= want, fmt.Sprintf("of %d heartbeats %d have come", want, got), a.failure()
	})
}

// memory is what a process holds, in bytes: in RAM, and in use by Go's heap and stacks.
type memory struct{ resident, heap, stacks int64 }

func (s *screenServer) memory(ctx context.Context) (m memory, err error) {
	if m.resident, err = residentBytes(s.process.PID()); err != nil {
		return m, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.admin+"/metrics", nil)
	if err != nil {
		return m, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return m, err
	}
	defer resp.Body.Close()
	wanted := map[string]*int64{"go_memstats_heap_inuse_bytes": &m.heap, "go_memstats_stack_inuse_bytes": &m.stacks}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		into, ok := wanted[name]
		if !ok {
			continue
		}
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return m, fmt.Errorf("%s: %w", name, err)
		}
		*into = int64(v)
		delete(wanted, name)
	}
	if len(wanted) > 0 {
		return m, fmt.Errorf("%s/metrics does not say what heap and stacks hold", s.admin)
	}
	return m, nil
}
