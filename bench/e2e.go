package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

const (
	e2eSites = 100
	e2eRate  = 500 // orders a second, over all sites
)

func e2eBenches() []bench {
	const name = "order.e2e"
	return []bench{{
		name: name, turn: 4 * time.Second, quick: 1500 * time.Millisecond,
		rows: []row{
			{name: name, key: "p99", unit: milliseconds, budget: budget{kind: valueAtMost, bound: 60},
				how: fmt.Sprintf("from when an order is due at the POS to when it has the Kitchen's own answer, the slowest hundredth, at %d/s over %d sites through edge, embedded hub (sync: always) and bridge: two fsyncs on the way, the order's and its report's", e2eRate, e2eSites)},
			{name: name + ".p50", key: "p50", unit: milliseconds, budget: budget{kind: reported}, how: "the same, half of the orders"},
			{name: name + ".kitchen.p99", key: "kitchen99", unit: milliseconds, budget: budget{kind: reported}, how: "from when an order is due to when the Kitchen has it, the slowest hundredth"},
			{name: name + ".kitchen.p50", key: "kitchen50", unit: milliseconds, budget: budget{kind: reported}, how: "the same, half of the orders"},
		},
		open: func(ctx context.Context, l *lab) (*pair, error) { return openE2E(ctx, l, name) },
	}}
}

func openE2E(ctx context.Context, l *lab, name string) (_ *pair, err error) {
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	f, err := newFleet(ctx, c, siteNames(e2eSites))
	if err != nil {
		return nil, err
	}
	k, err := c.startKitchen(ctx, f, 0)
	if err != nil {
		return nil, err
	}
	listen, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	if _, err := c.startBridge(ctx, f, k, map[string]any{"listen": listen}, map[string]any{"data": c.file("hub")}); err != nil {
		return nil, err
	}
	_, address, tokens, err := c.startEdge(ctx, f, "nats://"+listen, nil)
	if err != nil {
		return nil, err
	}
	e := &endToEnd{fleet: f, kitchen: k, address: address, tokens: tokens, tills: make([][]*caller, e2eSites)}
	c.later(e.close)
	return &pair{product: e.turn, close: c.close}, nil
}

// endToEnd sends orders when they are due, whatever became of those before: each uses a
// connection of its site that is free, or a new one.
type endToEnd struct {
	fleet   *fleet
	kitchen *kitchen
	address string
	tokens  []string
	next    int

	mu    sync.Mutex
	tills [][]*caller // Guarded by mu: free connections by site
}

func (e *endToEnd) turn(ctx context.Context, turn time.Duration) (sample, error) {
	n := int(turn.Seconds() * e2eRate)
	before, err := e.kitchen.stats(ctx)
	if err != nil {
		return nil, err
	}
	due := make([]time.Time, n)
	ids := make([]string, n)
	waits := make([]time.Duration, n)
	errs := make([]error, n)
	start := time.Now().Add(10 * time.Millisecond)
	var wg sync.WaitGroup
	for i := range n {
		due[i] = start.Add(time.Duration(i) * time.Second / e2eRate)
		if err := until(ctx, due[i]); err != nil {
			errs[i] = err
			break
		}
		site := (e.next + i) % e2eSites
		body := orderOf(e.fleet.sites[site], uint64(e.next+i), eventBytes)
		wg.Go(func() {
			r, err := e.order(ctx, site, body)
			waits[i] = time.Since(due[i])
			ids[i], errs[i] = r.id, err
		})
	}
	wg.Wait()
	e.next += n
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	after, err := e.kitchen.stats(ctx)
	if err != nil {
		return nil, err
	}
	if err := complaint(before, after); err != nil {
		return nil, err
	}
	if got := after.Unique - before.Unique; got != n {
		return nil, fmt.Errorf("the Kitchens have %d orders of %d", got, n)
	}
	arrivals := make(map[string]int64)
	if err := e.kitchen.get(ctx, "/arrivals", &arrivals); err != nil {
		return nil, err
	}
	reached := make([]time.Duration, n)
	for i, id := range ids {
		at, ok := arrivals[id]
		if !ok {
			return nil, fmt.Errorf("order %q was answered, and the Kitchen does not have it", id)
		}
		reached[i] = time.Unix(0, at).Sub(due[i])
	}
	ms := func(d time.Duration) float64 { return float64(d) / 1e6 }
	return sample{"p50": ms(percentile(waits, 0.5)), "p99": ms(percentile(waits, 0.99)),
		"kitchen50": ms(percentile(reached, 0.5)), "kitchen99": ms(percentile(reached, 0.99))}, nil
}

// order sends one order and waits for the Kitchen's own answer.
func (e *endToEnd) order(ctx context.Context, site int, body []byte) (reply, error) {
	till := e.take(site)
	if till == nil {
		var err error
		if till, err = dial(ctx, e.address); err != nil {
			return reply{}, err
		}
	}
	r, err := till.call(orderRequest(e.address, e.tokens[site], "wait=20", body))
	if err == nil {
		err = r.wants(http.StatusOK)
	}
	if err == nil && string(r.body) != kitchenAnswer {
		err = fmt.Errorf("answered with %.100q, which is not the Kitchen's", r.body)
	}
	if err != nil {
		return r, errors.Join(fmt.Errorf("order at %s: %w", e.fleet.sites[site], err), till.close())
	}
	e.mu.Lock()
	e.tills[site] = append(e.tills[site], till)
	e.mu.Unlock()
	return r, nil
}

// kitchenAnswer is what the stub answers.
const kitchenAnswer = `{"ok":true}`

func (e *endToEnd) take(site int) *caller {
	e.mu.Lock()
	defer e.mu.Unlock()
	free := e.tills[site]
	if len(free) == 0 {
		return nil
	}
	e.tills[site] = free[:len(free)-1]
	return free[len(free)-1]
}

func (e *endToEnd) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	for _, free := range e.tills {
		for _, till := range free {
			errs = append(errs, till.close())
		}
	}
	return errors.Join(errs...)
}
