package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// acceptPOS is how many POS send at once, each the next order as soon as the one before
// is answered. Each is its site's only one.
const acceptPOS = 64

func acceptBenches() []bench {
	const name, away = "edge.accept", "edge.accept.away"
	const turn, quick = 3500 * time.Millisecond, 1200 * time.Millisecond
	return []bench{
		{
			name: name, turn: turn, quick: quick,
			rows: []row{
				{name: name, key: "rate", unit: perSecond, budget: budget{kind: ratioAtLeast, bound: 2},
					how: fmt.Sprintf("orders of 1 KiB accepted a second from %d POS at once at as many sites, plain in, sealed and synced to the edge's disk before the 202, and forwarded meanwhile to a hub (sync: interval) on the same machine; floor: net/http and one synced publish for each order, not sealed and not forwarded", acceptPOS)},
				{name: name + ".p99", key: "p99", unit: milliseconds, budget: budget{kind: ratioAtMost, bound: 0.6},
					how: "how long the slowest hundredth of these waited for their 202"},
				{name: name + ".cpu", key: "cpu", unit: microseconds, budget: budget{kind: reported},
					how: "CPU of the edge's process for an order in these turns, forwarding it included"},
				{name: name + ".one", key: "one", unit: milliseconds, budget: budget{kind: ratioAtMost, bound: 1.3},
					how: "how long one POS alone waits for its 202 on average, so the inverse of its rate"},
				{name: name + ".one.p50", key: "one50", unit: milliseconds, budget: budget{kind: reported},
					how: "the same, half of its orders"},
			},
			open: func(ctx context.Context, l *lab) (*pair, error) { return openAccept(ctx, l, name) },
		},
		{
			name: away, turn: turn, quick: quick,
			rows: []row{
				{name: away, key: "rate", unit: perSecond, budget: budget{kind: reported},
					how: "as `edge.accept`, while the hub is away: nothing is forwarded meanwhile; at the end it comes back and gets every order"},
				{name: away + ".p99", key: "p99", unit: milliseconds, budget: budget{kind: reported},
					how: "how long the slowest hundredth of these waited for their 202"},
				{name: away + ".one", key: "one", unit: milliseconds, budget: budget{kind: reported},
					how: "how long one POS alone waits for its 202 on average"},
			},
			open: func(ctx context.Context, l *lab) (*pair, error) { return openAcceptAway(ctx, l, away) },
		},
	}
}

// edgeName is the name of the product's edge, as the hub sees it.
const edgeName = "edge-1"

// edge is the product's edge, running.
type edge struct {
	process *stack.Process
	address string   // where POS send to
	admin   string   // host:port
	tokens  []string // of the POS, by site
	file    string   // its settings
}

// edgeSettings writes the file of an edge. It returns the edge, not started.
func (c *crew) edgeSettings(f *fleet, hubURL string, more map[string]any) (*edge, error) {
	e := &edge{}
	var err error
	if e.address, err = stack.FreeAddr(""); err != nil {
		return nil, err
	}
	if e.admin, err = stack.FreeAddr(""); err != nil {
		return nil, err
	}
	sites := make(map[string]any, len(f.sites))
	for _, name := range f.sites {
		secret, door := token()
		e.tokens = append(e.tokens, secret)
		sites[name] = map[string]any{"tokens": door}
	}
	settings := map[string]any{"name": edgeName, "listen": []map[string]any{{"addr": e.address}}, "admin": map[string]any{"listen": e.admin},
		"data": c.file("edge-data"), "hub": map[string]any{"urls": []string{hubURL}}, "portal": f.portalSettings, "binding_file": f.bindingFile,
		"cipher": cipherMap(), "sites": sites}
	maps.Copy(settings, more)
	e.file, err = c.writeSettings("edge.yaml", settings)
	return e, err
}

// startEdge runs the product's edge.
func (c *crew) startEdge(ctx context.Context, f *fleet, hubURL string, more map[string]any) (*edge, error) {
	e, err := c.edgeSettings(f, hubURL, more)
	if err != nil {
		return nil, err
	}
	return e, c.runEdge(ctx, e)
}

func (c *crew) runEdge(ctx context.Context, e *edge) (err error) {
	e.process, err = c.start(ctx, "edge", "edge", e.admin, "run", "--config", e.file)
	return err
}

// roomy are settings of an edge that nobody reports to: nothing is ever settled, and it
// has to hold it all.
func roomy() map[string]any {
	return map[string]any{"messages": 2_000_000, "outbox": map[string]any{"max_bytes": int64(16 << 30)}}
}

func openAccept(ctx context.Context, l *lab, name string) (_ *pair, err error) {
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	if err := onDisk(c.dir); err != nil {
		return nil, err
	}
	f, err := newFleet(ctx, c, siteNames(acceptPOS))
	if err != nil {
		return nil, err
	}
	h, err := c.startHub(ctx, "hub", "interval", 1)
	if err != nil {
		return nil, err
	}
	e, err := c.startEdge(ctx, f, h.url, roomy())
	if err != nil {
		return nil, err
	}
	floor, err := c.startAcceptFloor(ctx, f, e.tokens)
	if err != nil {
		return nil, err
	}
	product := newTills(f, e.address, e.tokens, e.process.PID(), h.books(f))
	other := newTills(f, floor.address, e.tokens, floor.process.PID(), floor.books(f))
	return &pair{product: product.turn, floor: other.turn, close: c.close}, nil
}

// openAcceptAway measures an edge whose hub was there when it started and went away. It
// comes back for close, which fails when it does not get all that was accepted.
func openAcceptAway(ctx context.Context, l *lab, name string) (_ *pair, err error) {
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	if err := onDisk(c.dir); err != nil {
		return nil, err
	}
	f, err := newFleet(ctx, c, siteNames(acceptPOS))
	if err != nil {
		return nil, err
	}
	h, err := c.startHub(ctx, "hub", "interval", 1)
	if err != nil {
		return nil, err
	}
	way, err := c.newLink()
	if err != nil {
		return nil, err
	}
	way.to(h.address)
	way.open()
	e, err := c.startEdge(ctx, f, "nats://"+way.address, roomy())
	if err != nil {
		return nil, err
	}
	way.cut()
	accepted := 0
	t := newTills(f, e.address, e.tokens, e.process.PID(), books{
		stored:   func(context.Context) (int, error) { return accepted, nil },
		accepted: func(n int) { accepted += n },
	})
	return &pair{
		product: t.turn,
		close: func() error {
			way.open()
			return errors.Join(h.books(f).await(context.WithoutCancel(ctx), accepted), c.close())
		},
	}, nil
}

// acceptFloor is the floor's process.
type acceptFloor struct {
	process *stack.Process
	address string
}

func (c *crew) startAcceptFloor(ctx context.Context, f *fleet, tokens []string) (*acceptFloor, error) {
	sites := make(map[string]string, len(tokens))
	for i, t := range tokens {
		sites[t] = f.sites[i]
	}
	file, err := c.writeSettings("floor.json", sites)
	if err != nil {
		return nil, err
	}
	a := &acceptFloor{}
	if a.address, err = stack.FreeAddr(""); err != nil {
		return nil, err
	}
	a.process, err = c.start(ctx, "accept", "floor", a.address, "-listen", a.address, "-sites", file, "-data", c.file("floor-data"))
	return a, err
}

// books say what is stored of what was accepted.
type books struct {
	stored func(ctx context.Context) (int, error)
	// check opens the last order of a site; nil: nobody can.
	check func(ctx context.Context, site int, want []byte) error
	// accepted is told how many more were; nil: nobody wants to know.
	accepted func(n int)
}

// await waits until n are stored, and fails when there are more.
func (b books) await(ctx context.Context, n int) error {
	got := 0
	err := eventually(ctx, func() (bool, string, error) {
		var err error
		got, err = b.stored(ctx)
		return got >= n, fmt.Sprintf("of %d accepted orders %d are stored", n, got), err
	})
	if err == nil && got > n {
		err = fmt.Errorf("%d orders were accepted, %d are stored", n, got)
	}
	return err
}

// books of the orders that the edge forwarded to the hub.
func (h *hub) books(f *fleet) books {
	return books{
		stored: func(ctx context.Context) (int, error) { return h.stored(ctx, "POS") },
		check: func(ctx context.Context, site int, want []byte) error {
			raw, err := h.last(ctx, "POS", "pos.0."+f.sites[site]+".order."+edgeName)
			if err != nil {
				return err
			}
			t, err := envelope.ParseTriple(raw, 0)
			if err != nil {
				return err
			}
			got, err := f.keys[site].Open(nil, t)
			if err != nil {
				return err
			}
			return same(got, want)
		},
	}
}

func (a *acceptFloor) books(f *fleet) books {
	get := func(ctx context.Context, path string) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.address+path, nil)
		if err != nil {
			return nil, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s: %.200s", path, resp.Status, body)
		}
		return body, err
	}
	return books{
		stored: func(ctx context.Context) (n int, err error) {
			body, err := get(ctx, "/stored")
			if err != nil {
				return 0, err
			}
			return n, json.Unmarshal(body, &n)
		},
		check: func(ctx context.Context, site int, want []byte) error {
			got, err := get(ctx, "/last/"+f.sites[site])
			if err != nil {
				return err
			}
			return same(bytes.TrimRight(got, "."), want) // it is filled up
		},
	}
}

// tills are the POS of one side, one at each site, and its state over the turns.
type tills struct {
	sites    []string
	address  string
	requests [][]byte
	bodies   [][]byte
	pid      int
	books    books
}

func newTills(f *fleet, address string, tokens []string, pid int, b books, headers ...string) *tills {
	t := &tills{sites: f.sites, address: address, pid: pid, books: b}
	for i, s := range f.sites {
		t.bodies = append(t.bodies, orderOf(s, 1, eventBytes))
		t.requests = append(t.requests, orderRequest(address, tokens[i], "wait=0", t.bodies[i], headers...))
	}
	return t
}

// turn has all POS send, and then one of them alone.
func (t *tills) turn(ctx context.Context, turn time.Duration) (sample, error) {
	before, err := t.books.stored(ctx)
	if err != nil {
		return nil, err
	}
	cpu, err := cpuTime(t.pid)
	if err != nil {
		return nil, err
	}
	waits, took, err := t.send(ctx, len(t.sites), turn*7/10, unbounded)
	if err != nil {
		return nil, err
	}
	all := len(waits)
	// What is accepted and not forwarded yet is this turn's work still.
	if err := t.await(ctx, before, all); err != nil {
		return nil, err
	}
	used, err := cpuTime(t.pid)
	if err != nil {
		return nil, err
	}
	alone, tookAlone, err := t.send(ctx, 1, turn*3/10, unbounded)
	if err != nil {
		return nil, err
	}
	if err := t.await(ctx, before+all, len(alone)); err != nil {
		return nil, err
	}
	for _, i := range []int{0, len(t.sites) - 1} {
		if t.books.check == nil {
			break
		}
		if err := t.books.check(ctx, i, t.bodies[i]); err != nil {
			return nil, err
		}
	}
	return sample{"rate": float64(all) / took.Seconds(), "p99": float64(percentile(waits, 0.99)) / 1e6,
		"cpu": float64((used - cpu).Nanoseconds()) / 1e3 / float64(all),
		"one": tookAlone.Seconds() * 1e3 / float64(len(alone)), "one50": float64(percentile(alone, 0.5)) / 1e6}, nil
}

func (t *tills) await(ctx context.Context, before, n int) error {
	if t.books.accepted != nil {
		t.books.accepted(n)
	}
	return t.books.await(ctx, before+n)
}

const unbounded = 1 << 60

// send has the first of the POS send for a time, or until most orders were accepted. It
// returns how long each order waited for its 202, and how long it took in all.
func (t *tills) send(ctx context.Context, pos int, turn time.Duration, most int64) (_ []time.Duration, _ time.Duration, err error) {
	callers := make([]*caller, pos)
	for i := range callers {
		// Now: a server closes what says nothing while the other side has its turn.
		if callers[i], err = dial(ctx, t.address); err != nil {
			return nil, 0, err
		}
		defer func() { err = errors.Join(err, callers[i].close()) }()
	}
	waits := make([][]time.Duration, pos)
	errs := make([]error, pos)
	var stop atomic.Bool
	var sent atomic.Int64
	var wg, rest sync.WaitGroup
	start := time.Now()
	sending, done := context.WithCancelCause(ctx)
	for i := range pos {
		wg.Go(func() {
			for last := time.Now(); !stop.Load() && sent.Add(1) <= most; {
				r, err := callers[i].call(t.requests[i])
				if err == nil {
					err = r.wants(http.StatusAccepted)
				}
				if err != nil {
					errs[i] = fmt.Errorf("order at %s: %w", t.sites[i], err)
					return
				}
				now := time.Now()
				waits[i] = append(waits[i], now.Sub(last))
				last = now
			}
		})
	}
	rest.Go(func() {
		_ = until(sending, start.Add(turn)) // or all have ended, or the bench has
		stop.Store(true)
	})
	wg.Wait()
	took := time.Since(start)
	done(nil)
	rest.Wait()
	if err := errors.Join(append(errs, context.Cause(ctx))...); err != nil {
		return nil, 0, err
	}
	var all []time.Duration
	for _, w := range waits {
		all = append(all, w...)
	}
	if len(all) == 0 {
		return nil, 0, errors.New("no order was accepted")
	}
	return all, took, nil
}
