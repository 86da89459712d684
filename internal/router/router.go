// Package router delivers events from the hub's POS stream to the Kitchens' HTTP
// endpoints, and reports what became of each.
//
// It promises: the events of a site reach its Kitchen in the order of the stream, one at
// a time (I4); no attempt begins after an event's deadline, each ends by it, and what
// expires is reported within a second, also behind a Kitchen that does not answer (I3);
// every event that verifies ends as delivered or failed, reported once for each delivery
// (I2); what does not verify is neither delivered nor reported but quarantined (I7); the
// hub's event is acknowledged only after the report is stored, and before it, for a
// failure, the dead letter, unless the hub certainly refuses that one (I8); a dead, slow or refusing Kitchen delays its own site only
// (I5), as long as fewer events wait for it than the hub hands out unacknowledged.
//
// What an edge says has expired with it is posted to nobody: each number of such a run is
// reported as failed, expired, unless it has ended otherwise. Runs of a site are taken in
// the order of the stream, beside its deliveries, which they do not wait for.
//
// A delivery is made at least once. It is made again when the bridge is killed between
// the Kitchen's answer and the stored report; then, as with every attempt, it carries the
// same Idempotency-Key.
package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Hub is what the router asks of the broker. *broker.Broker is one.
type Hub interface {
	Partitions() int
	// ConsumePartition hands the partition's events to h, in the order of the stream, from
	// the oldest that was not acknowledged, until ctx ends. It calls takeover before the
	// first event of each start over, never while h runs; h is not called for an earlier
	// start after that.
	ConsumePartition(ctx context.Context, partition int, takeover func(ctx context.Context, at broker.Takeover) error, h func(*broker.Delivery)) error
	// ReportsSince reads the reports on the partition's sites stored since t, up to the
	// last there was when it was called.
	ReportsSince(ctx context.Context, t time.Time, partition int, f func(*broker.Report) error) error
	// PublishReport and PublishDeadLetter return nil when the hub has stored it. The same
	// one twice is stored once.
	PublishReport(ctx context.Context, report *broker.Report) error
	PublishDeadLetter(ctx context.Context, letter broker.DeadLetter) error
}

// Keys is what the router asks of the sites' keys. *keysync.Keys is one.
type Keys interface {
	// Site returns nil for a site that is not configured.
	Site(name string) *keysync.Site
	// Refresh asks the Portal for the site's keys, unless that was done just now.
	Refresh(ctx context.Context, site string) error
	// RereadBinding looks whether there are new binding keys, which Site then has.
	RereadBinding()
}

// Router delivers. Make one with New, and Run it once.
type Router struct {
	// Fixed at birth.
	cfg       Config
	hub       Hub
	keys      Keys
	log       *slog.Logger
	metrics   *metrics
	endpoints map[string]*endpoint // by site
	parts     []*partition
	closing   context.Context // ends when Run does
	closed    context.CancelFunc

	// Safe for concurrent use.
	quarantineLog rate.Sometimes
	storeLog      rate.Sometimes
	refusedLog    rate.Sometimes
	reportLog     rate.Sometimes
	droppedLog    rate.Sometimes
	clocks        quota[edgeName] // warnings about clocks
	samples       quota[sample]   // dead letters of quarantined events
}

// New checks the settings, all of them, and that every configured site has keys to
// verify with. It starts nothing.
func New(cfg Config, hub Hub, keys Keys) (*Router, error) {
	errs := lines(cfg.Validate())
	r := &Router{
		cfg:           cfg.withDefaults(),
		hub:           hub,
		keys:          keys,
		endpoints:     make(map[string]*endpoint, len(cfg.Sites)),
		quarantineLog: rate.Sometimes{First: 10, Interval: time.Second},
		storeLog:      rate.Sometimes{First: 1, Interval: time.Minute},
		refusedLog:    rate.Sometimes{First: 1, Interval: time.Minute},
		reportLog:     rate.Sometimes{First: 1, Interval: time.Minute},
		droppedLog:    rate.Sometimes{First: 1, Interval: time.Minute},
		clocks:        quota[edgeName]{each: 1, all: mostClockWarnings},
		samples:       quota[sample]{each: samplesEach, all: samplesAll},
	}
	r.log = r.cfg.Log
	for _, site := range slices.Sorted(maps.Keys(cfg.Sites)) {
		switch s := keys.Site(site); {
		case s == nil:
			errs = append(errs, fmt.Errorf("sites.%s: its keys are not configured, so nothing of it could be verified", site))
		case s.Binding == nil:
			errs = append(errs, fmt.Errorf("sites.%s: the binding file does not have it, so nothing of it could be verified", site))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	r.closing, r.closed = context.WithCancel(context.Background())
	for site, c := range cfg.Sites {
		e, err := newEndpoint(site, c, &r.cfg, r.closing)
		if err != nil {
			return nil, err
		}
		r.endpoints[site] = e
	}
	var err error
	if r.metrics, err = newMetrics(cfg.Metrics); err != nil {
		return nil, err
	}
	for n := range hub.Partitions() {
		r.parts = append(r.parts, &partition{r: r, n: n})
	}
	return r, nil
}

// Run takes over all partitions and delivers until ctx ends. Then it begins no further
// attempt, waits up to DrainTimeout for those in flight and their reports, says what it
// left unacknowledged, which the next start gets again, and returns nil. It returns an
// error when a partition cannot be consumed.
func (r *Router) Run(ctx context.Context) error {
	defer r.closed()
	consuming, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	io, abort := context.WithCancelCause(context.WithoutCancel(ctx))
	defer abort(nil)

	var all sync.WaitGroup
	drained := make(chan struct{})
	all.Go(func() {
		<-consuming.Done()
		t := time.NewTimer(r.cfg.DrainTimeout)
		defer t.Stop()
		select {
		case <-t.C:
			abort(errors.New("drain_timeout passed"))
		case <-drained:
		}
	})

	var consumers sync.WaitGroup
	errs := make([]error, len(r.parts))
	for i, p := range r.parts {
		p.consuming, p.io = consuming, io
		consumers.Go(func() {
			err := r.hub.ConsumePartition(consuming, p.n, p.takeover, p.enqueue)
			switch {
			case consuming.Err() != nil:
			case err == nil:
				errs[i] = fmt.Errorf("partition %d: the hub ended the consumer", p.n)
			default:
				errs[i] = fmt.Errorf("partition %d: %w", p.n, err)
			}
			stop(errs[i])
		})
	}
	consumers.Wait()
	left := 0
	for _, p := range r.parts {
		left += p.end()
	}
	close(drained)
	all.Wait()
	for _, e := range r.endpoints {
		e.close()
	}
	if left > 0 {
		r.log.Warn("router stopped; the hub delivers again what is left", "left", left)
	} else {
		r.log.Info("router stopped", "left", left)
	}
	return errors.Join(errs...)
}

// Ready returns nil when every partition has been taken over.
func (r *Router) Ready() error {
	waiting := 0
	for _, p := range r.parts {
		if p.tenure.Load() == nil {
			waiting++
		}
	}
	if waiting > 0 {
		return fmt.Errorf("%d of %d partitions are not taken over yet", waiting, len(r.parts))
	}
	return nil
}
