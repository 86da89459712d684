// Package bridge is the bridge program: the hub or the way to it, the sites' keys,
// delivery to Kitchens and the gate for screens, put together in one straight line.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/kitchenbridge/kitchenbridge/internal/admin"
	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/router"
	"github.com/kitchenbridge/kitchenbridge/internal/wsgate"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Bridge is the program. Make it with New, then Run it once.
type Bridge struct {
	cfg     Config // with defaults
	log     *slog.Logger
	metrics *prometheus.Registry
	keys    *keysync.Keys
}

// New checks the configuration and reads the files it names. It starts nothing.
func New(cfg Config) (*Bridge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	b := &Bridge{cfg: cfg, log: cfg.Log, metrics: prometheus.NewRegistry()}
	b.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	sites := make(map[string]envelope.Settings, len(cfg.Sites))
	for name := range cfg.Sites {
		sites[name] = cfg.cipher(name)
	}
	var err error
	b.keys, err = keysync.New(keysync.Config{Portal: cfg.Portal, BindingFile: cfg.BindingFile, Sites: sites, Log: b.log, Metrics: b.metrics})
	if err := errors.Join(append(below("hub.", cfg.Hub.CheckFiles()), err)...); err != nil {
		return nil, err
	}
	return b, nil
}

// Open connects to the hub that cfg names, after starting it when it is embedded. Close
// ends both. It is what Run and the sub-commands for a hub's assets share.
func Open(ctx context.Context, cfg Config, metrics prometheus.Registerer) (*broker.Broker, func() error, error) {
	cfg = cfg.withDefaults()
	var hub *broker.Embedded
	stop := func() {}
	if len(cfg.Hub.URLs) == 0 {
		var err error
		if hub, err = broker.StartEmbedded(broker.EmbeddedConfig{HubConfig: cfg.Hub, DataDir: cfg.Data, Log: cfg.Log}); err != nil {
			return nil, nil, fmt.Errorf("hub: %w", err)
		}
		stop = hub.Shutdown
	}
	conn, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: cfg.Hub, Name: cfg.Name, Embedded: hub, Log: cfg.Log, Metrics: metrics})
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("hub: %w", err)
	}
	return conn, func() error {
		err := conn.Close()
		stop()
		return err
	}, nil
}

// Run works until ctx ends, then stops in this order: the gate and the router, which
// finish what they have begun; the connection; the embedded hub. It returns nil when it
// was told to stop and left nothing behind.
func (b *Bridge) Run(ctx context.Context) (err error) {
	hub, closeHub, err := Open(ctx, b.cfg, b.metrics)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeHub()) }()

	deliver, err := router.New(b.delivery(), hub, b.keys)
	if err != nil {
		return err
	}
	var gate *wsgate.Gate
	if len(b.cfg.Screens.Listen) > 0 {
		open := func(event func(*broker.Delivery), gap func(reason string)) (wsgate.Feed, error) {
			return hub.NewFeed(broker.FeedConfig{Handle: event, Gap: gap})
		}
		if gate, err = wsgate.New(b.screens(), b.keys, open); err != nil {
			return err
		}
	}

	var settled atomic.Bool // the hub's assets are as they should be
	g, ctx := errgroup.WithContext(ctx)
	if b.cfg.Admin.Listen != "off" {
		ready := map[string]func() error{
			"hub": func() error {
				if !hub.Connected() {
					return errors.New(hub.Status())
				}
				return nil
			},
			"assets": func() error {
				if !settled.Load() {
					return errors.New("the hub's streams and consumers have not been checked yet")
				}
				return nil
			},
			"keys":     b.keys.Ready,
			"delivery": deliver.Ready,
		}
		if gate != nil {
			ready["screens"] = gate.Ready
		}
		ops, err := admin.New(admin.Config{Listen: b.cfg.Admin.Listen, Metrics: b.metrics, Log: b.log, Ready: ready})
		if err != nil {
			return err
		}
		g.Go(func() error { return ops.Run(ctx) })
	}
	g.Go(func() error { return b.keys.Run(ctx) })
	g.Go(func() error {
		if err := b.assets(ctx, hub); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		settled.Store(true)
		b.log.Info("hub ready", "durability", hub.Durability(), "partitions", hub.Partitions())
		inner, ctx := errgroup.WithContext(ctx)
		inner.Go(func() error { return deliver.Run(ctx) })
		if gate != nil {
			inner.Go(func() error { return gate.Run(ctx) })
		}
		return inner.Wait()
	})
	return g.Wait()
}

// assets makes what an embedded hub lacks, and only compares on a foreign one: what
// differs there is its operator's to decide.
func (b *Bridge) assets(ctx context.Context, hub *broker.Broker) error {
	if len(b.cfg.Hub.URLs) == 0 {
		if err := hub.ApplyAssets(ctx); err != nil {
			return fmt.Errorf("hub assets: %w", err)
		}
	}
	// A foreign hub may be away when the bridge starts: that is waited out, differences are not.
	for wait := time.Second; ; wait = min(2*wait, 30*time.Second) {
		err := hub.CheckAssets(ctx)
		if err == nil || hub.Connected() {
			return err
		}
		b.log.Warn("hub away", "err", err, "retry_in", wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

func (b *Bridge) delivery() router.Config {
	c := b.cfg.delivery()
	c.Metrics = b.metrics
	return c
}

func (b *Bridge) screens() wsgate.Config {
	c := b.cfg.screens()
	c.Metrics = b.metrics
	return c
}

// Assets are what the sub-commands for a foreign hub need of it.
type Assets interface {
	Connected() bool
	Status() string
	ApplyAssets(ctx context.Context) error
	CheckAssets(ctx context.Context) error
}
