package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

const (
	deliverSites = 1000
	deliverDead  = 10
	deliverRate  = 2000 // events a second
)

func deliverBenches() []bench {
	of := func(name string, dead int, with string) bench {
		return bench{
			name: name, turn: 4 * time.Second, quick: time.Second,
			rows: []row{{name: name, key: "cpu", unit: microseconds, budget: budget{kind: ratioAtMost, bound: 1.25},
				how: fmt.Sprintf("CPU of the bridge's process for an event delivered and reported, at %d/s over %d sites in one partition, each site in order%s; floor: consume, POST and publish a report, in no order",
					deliverRate, deliverSites, with)}},
			open: func(ctx context.Context, l *lab) (*pair, error) { return openDeliver(ctx, l, name, dead) },
		}
	}
	return []bench{
		of("deliver", 0, ""),
		of("deliver.dead", deliverDead, fmt.Sprintf(", and %d more sites whose Kitchens take connections and never answer", deliverDead)),
	}
}

// kitchen is the stub's process.
type kitchen struct {
	admin     string
	addresses map[string]string // host:port by site
}

// kitchenStats are what the stub counts.
type kitchenStats struct {
	Unique     int    `json:"unique"`
	Repeats    int    `json:"repeats"`
	Inversions int    `json:"inversions"`
	Opened     int    `json:"opened"`
	Wrong      int    `json:"wrong"`
	Dead       int    `json:"dead"`
	Why        string `json:"why"`
}

// startKitchen runs the stub; the last sites of the fleet are dead.
func (c *crew) startKitchen(ctx context.Context, f *fleet, dead int) (*kitchen, error) {
	type site struct {
		Name string `json:"name"`
		siteKey
		Dead bool `json:"dead"`
	}
	var sites []site
	for i, name := range f.sites {
		sites = append(sites, site{name, f.secrets[name], i >= len(f.sites)-dead})
	}
	file, err := c.writeSettings("kitchen-sites.json", sites)
	if err != nil {
		return nil, err
	}
	admin, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	if _, err := c.start(ctx, "kitchen", "kitchen", admin, "-admin", admin, "-sites", file, "-iterations", strconv.Itoa(cipherSettings.Iterations)); err != nil {
		return nil, err
	}
	k := &kitchen{admin: "http://" + admin}
	return k, k.get(ctx, "/addresses", &k.addresses)
}

func (k *kitchen) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.admin+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(into)
}

func (k *kitchen) stats(ctx context.Context) (s kitchenStats, err error) {
	err = k.get(ctx, "/stats", &s)
	return s, err
}

// complaint says what must not have happened between two looks.
func complaint(before, after kitchenStats) error {
	var errs []error
	if n := after.Wrong - before.Wrong; n > 0 {
		errs = append(errs, fmt.Errorf("the Kitchen could not use %d orders: %s", n, after.Why))
	}
	if n := after.Repeats - before.Repeats; n > 0 {
		errs = append(errs, fmt.Errorf("the Kitchen got %d orders twice", n))
	}
	if n := after.Inversions - before.Inversions; n > 0 {
		errs = append(errs, fmt.Errorf("the Kitchen got %d orders after a later one", n))
	}
	if after.Opened == before.Opened {
		errs = append(errs, errors.New("the Kitchen opened no order to look at it"))
	}
	return errors.Join(errs...)
}

// startBridge runs the product's bridge on a hub elsewhere, for Kitchens only.
func (c *crew) startBridge(ctx context.Context, f *fleet, k *kitchen, hubSettings map[string]any, more map[string]any) (*stack.Process, error) {
	admin, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	sites := make(map[string]any, len(f.sites))
	for _, name := range f.sites {
		sites[name] = map[string]any{"kitchen": map[string]any{"url": "http://" + k.addresses[name]}}
	}
	settings := map[string]any{"admin": map[string]any{"listen": admin}, "hub": hubSettings, "portal": f.portalSettings,
		"binding_file": f.bindingFile, "cipher": cipherMap(), "sites": sites}
	maps.Copy(settings, more)
	file, err := c.writeSettings("bridge.yaml", settings)
	if err != nil {
		return nil, err
	}
	return c.start(ctx, "bridge", "bridge", admin, "run", "--config", file)
}

func openDeliver(ctx context.Context, l *lab, name string, dead int) (_ *pair, err error) {
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	f, err := newFleet(ctx, c, siteNames(deliverSites+dead))
	if err != nil {
		return nil, err
	}
	k, err := c.startKitchen(ctx, f, dead)
	if err != nil {
		return nil, err
	}
	productHub, err := c.startHub(ctx, "hub-product", "interval", 1)
	if err != nil {
		return nil, err
	}
	floorHub, err := c.startHub(ctx, "hub-floor", "interval", 1)
	if err != nil {
		return nil, err
	}
	product, err := c.startBridge(ctx, f, k, map[string]any{"urls": []string{productHub.url}, "partitions": 1}, nil)
	if err != nil {
		return nil, err
	}
	kitchens, err := c.writeSettings("kitchens.json", k.addresses)
	if err != nil {
		return nil, err
	}
	admin, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	floor, err := c.start(ctx, "deliver", "floor", admin, "-hub", floorHub.url, "-admin", admin, "-kitchens", kitchens)
	if err != nil {
		return nil, err
	}
	floorFleet := *f
	floorFleet.epoch += "f" // its events are others, for the Kitchen that sees both
	return &pair{
		product: (&delivery{fleet: f, dead: dead, hub: productHub, kitchen: k, pid: product.PID()}).turn,
		floor:   (&delivery{fleet: &floorFleet, dead: dead, hub: floorHub, kitchen: k, pid: floor.PID()}).turn,
		close:   c.close,
	}, nil
}

// delivery is one side's state over its turns.
type delivery struct {
	fleet   *fleet
	dead    int
	hub     *hub
	kitchen *kitchen
	pid     int
	next    int // number of the next event, over all sites
}

// turn publishes at the set rate and waits until the Kitchens have, and the hub has
// reports of, every event of a living site.
func (d *delivery) turn(ctx context.Context, turn time.Duration) (sample, error) {
	n := int(turn.Seconds() * deliverRate)
	sites := len(d.fleet.sites)
	events := make([]planned, 0, n)
	alive := 0
	for range n {
		site, seq := d.next%sites, uint64(d.next/sites)+1
		d.next++
		e, err := d.fleet.event(site, seq)
		if err != nil {
			return nil, err
		}
		events = append(events, planned{e, site})
		if site < sites-d.dead {
			alive++
		}
	}
	before, err := d.kitchen.stats(ctx)
	if err != nil {
		return nil, err
	}
	reports, err := d.hub.stored(ctx, "KITCHEN")
	if err != nil {
		return nil, err
	}
	start, err := cpuTime(d.pid)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := d.hub.publish(ctx, events, deliverRate, nil); err != nil {
		return nil, err
	}
	published := time.Since(began)
	var after kitchenStats
	err = eventually(ctx, func() (bool, string, error) {
		var err error
		if after, err = d.kitchen.stats(ctx); err != nil {
			return false, "", err
		}
		stored, err := d.hub.stored(ctx, "KITCHEN")
		cooked, reported := after.Unique-before.Unique, stored-reports
		return cooked >= alive && reported >= alive, fmt.Sprintf("of %d events the Kitchens have %d, the hub has %d reports", alive, cooked, reported), err
	})
	if err != nil {
		return nil, err
	}
	end, err := cpuTime(d.pid)
	if err != nil {
		return nil, err
	}
	if err := complaint(before, after); err != nil {
		return nil, err
	}
	if after.Unique-before.Unique != alive {
		return nil, fmt.Errorf("the Kitchens have %d events of %d", after.Unique-before.Unique, alive)
	}
	return sample{"cpu": float64((end - start).Nanoseconds()) / 1e3 / float64(alive), "events": float64(alive), "s": time.Since(began).Seconds(), "published_s": published.Seconds()}, nil
}
