package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// acceptPOS is how many POS send at once, each the next order as soon as the one before
// is answered. Each is its site's only one: the edge stores the orders of one site one
// after the other.
const acceptPOS = 64

func acceptBenches() []bench {
	const name = "edge.accept.hub"
	return []bench{{
		name: name, turn: 2500 * time.Millisecond, quick: 800 * time.Millisecond,
		rows: []row{
			{name: name, key: "rate", unit: perSecond, budget: budget{kind: ratioAtLeast, bound: 0.90},
				how: fmt.Sprintf("orders of 1 KiB accepted a second from %d POS at once at as many sites, plain in, sealed and stored at the hub (sync: interval) before the 202; floor: net/http, seal and publish", acceptPOS)},
			{name: name + ".p99", key: "p99", unit: milliseconds, budget: budget{kind: reported},
				how: "how long the slowest hundredth of these waited for their 202"},
			{name: name + ".cpu", key: "cpu", unit: microseconds, budget: budget{kind: reported},
				how: "CPU of the edge's process for an order in these turns"},
		},
		open: func(ctx context.Context, l *lab) (*pair, error) { return openAccept(ctx, l, name) },
	}}
}

// startEdge runs the product's edge. It returns where POS send to, and their tokens by site.
func (c *crew) startEdge(ctx context.Context, f *fleet, hubURL string, more map[string]any) (p *stack.Process, address string, tokens []string, err error) {
	if address, err = stack.FreeAddr(""); err != nil {
		return nil, "", nil, err
	}
	admin, err := stack.FreeAddr("")
	if err != nil {
		return nil, "", nil, err
	}
	sites := make(map[string]any, len(f.sites))
	for _, name := range f.sites {
		secret, door := token()
		tokens = append(tokens, secret)
		sites[name] = map[string]any{"tokens": door}
	}
	settings := map[string]any{"name": "edge-1", "listen": []map[string]any{{"addr": address}}, "admin": map[string]any{"listen": admin},
		"hub": map[string]any{"urls": []string{hubURL}}, "portal": f.portalSettings, "binding_file": f.bindingFile, "cipher": cipherMap(), "sites": sites}
	maps.Copy(settings, more)
	file, err := c.writeSettings("edge.yaml", settings)
	if err != nil {
		return nil, "", nil, err
	}
	p, err = c.start(ctx, "edge", "edge", admin, "run", "--config", file)
	return p, address, tokens, err
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
	f, err := newFleet(ctx, c, siteNames(acceptPOS))
	if err != nil {
		return nil, err
	}
	// One hub for both: it does the same for each, and nobody consumes.
	h, err := c.startHub(ctx, "hub", "interval", 1)
	if err != nil {
		return nil, err
	}
	// Nobody reports, so nothing is ever settled; the register has to hold it all.
	edge, address, tokens, err := c.startEdge(ctx, f, h.url, map[string]any{"messages": 5_000_000})
	if err != nil {
		return nil, err
	}
	type site struct {
		Name string `json:"name"`
		siteKey
		Token string `json:"token"`
	}
	var sites []site
	for i, s := range f.sites {
		sites = append(sites, site{s, f.secrets[s], tokens[i]})
	}
	file, err := c.writeSettings("floor.json", sites)
	if err != nil {
		return nil, err
	}
	floorAddress, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	floor, err := c.start(ctx, "accept", "floor", floorAddress, "-hub", h.url, "-listen", floorAddress, "-sites", file)
	if err != nil {
		return nil, err
	}
	p := &pair{close: c.close}
	if p.product, err = newTills(ctx, c, f, h, address, tokens, "edge-1", edge.PID()); err != nil {
		return nil, err
	}
	if p.floor, err = newTills(ctx, c, f, h, floorAddress, tokens, "floor", floor.PID()); err != nil {
		return nil, err
	}
	return p, nil
}

// newTills connects the POS to one side, which publishes as edge, and returns its turns.
func newTills(ctx context.Context, c *crew, f *fleet, h *hub, address string, tokens []string, edge string, pid int) (side, error) {
	tills := make([]*caller, len(f.sites))
	requests := make([][]byte, len(f.sites))
	bodies := make([][]byte, len(f.sites))
	for i, s := range f.sites {
		var err error
		if tills[i], err = dial(ctx, address); err != nil {
			return nil, err
		}
		c.later(tills[i].close)
		bodies[i] = orderOf(s, 1, eventBytes)
		requests[i] = orderRequest(address, tokens[i], "wait=0", bodies[i])
	}
	return func(ctx context.Context, turn time.Duration) (sample, error) {
		before, err := h.stored(ctx, "POS")
		if err != nil {
			return nil, err
		}
		cpu, err := cpuTime(pid)
		if err != nil {
			return nil, err
		}
		waits := make([][]time.Duration, len(tills))
		errs := make([]error, len(tills))
		var stop atomic.Bool
		var wg sync.WaitGroup
		start := time.Now()
		for i, till := range tills {
			wg.Go(func() {
				for last := time.Now(); !stop.Load(); {
					r, err := till.call(requests[i])
					if err == nil {
						err = r.wants(http.StatusAccepted)
					}
					if err != nil {
						errs[i] = fmt.Errorf("order at %s: %w", f.sites[i], err)
						return
					}
					now := time.Now()
					waits[i] = append(waits[i], now.Sub(last))
					last = now
				}
			})
		}
		waited := until(ctx, start.Add(turn))
		stop.Store(true)
		wg.Wait()
		took := time.Since(start)
		if err := errors.Join(append(errs, waited)...); err != nil {
			return nil, err
		}
		used, err := cpuTime(pid)
		if err != nil {
			return nil, err
		}
		var all []time.Duration
		for _, w := range waits {
			all = append(all, w...)
		}
		stored, err := h.stored(ctx, "POS")
		if err != nil {
			return nil, err
		}
		if stored-before != len(all) {
			return nil, fmt.Errorf("%d orders were accepted, the hub has %d more", len(all), stored-before)
		}
		for _, i := range []int{0, len(tills) - 1} {
			if err := storedOrder(ctx, f, h, i, edge, bodies[i]); err != nil {
				return nil, err
			}
		}
		return sample{"rate": float64(len(all)) / took.Seconds(), "p99": float64(percentile(all, 0.99)) / 1e6,
			"cpu": float64((used - cpu).Nanoseconds()) / 1e3 / float64(len(all))}, nil
	}, nil
}

// storedOrder opens the last order of a site that the hub has from an edge.
func storedOrder(ctx context.Context, f *fleet, h *hub, site int, edge string, want []byte) error {
	raw, err := h.last(ctx, "POS", "pos.0."+f.sites[site]+".order."+edge)
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
}
