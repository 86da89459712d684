// Command gate is the product's gate for screens in a process of its own: keys, feed and
// gate put together as the bridge does it, without the router, whose deliveries would
// otherwise be counted as the gate's.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
	"github.com/kitchenbridge/kitchenbridge/internal/admin"
	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/internal/wsgate"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

func main() { os.Exit(rig.Main("gate", run)) }

// settings is the file that the bench writes.
type settings struct {
	Hub         string            `json:"hub"`
	Listen      string            `json:"listen"`
	Admin       string            `json:"admin"`
	PortalURL   string            `json:"portal_url"`
	TokenFile   string            `json:"token_file"`
	CAFile      string            `json:"ca_file"`
	BindingFile string            `json:"binding_file"`
	Iterations  int               `json:"iterations"`
	Screens     map[string]string `json:"screens"` // SHA-256 of the token, by site
}

func run(ctx context.Context) (err error) {
	file := flag.String("config", "", "JSON file")
	flag.Parse()
	raw, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var s settings
	if err := json.Unmarshal(raw, &s); err != nil {
		return err
	}
	ciphers := make(map[string]envelope.Settings)
	doors := make(map[string]wsgate.SiteConfig)
	for name, sum := range s.Screens {
		ciphers[name] = envelope.Settings{Profile: envelope.A256GCM, Iterations: s.Iterations}
		doors[name] = wsgate.SiteConfig{SiteConfig: door.SiteConfig{Tokens: []door.TokenConfig{{Name: "bench", SHA256: sum}}}}
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector())
	keys, err := keysync.New(keysync.Config{BindingFile: s.BindingFile, Sites: ciphers, Metrics: metrics,
		Portal: keysync.PortalConfig{URL: s.PortalURL, TokenFile: s.TokenFile, CAFile: s.CAFile, Poll: 24 * time.Hour}})
	if err != nil {
		return err
	}
	hub, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: broker.HubConfig{URLs: []string{s.Hub}, Partitions: 1}, Name: "gate", Metrics: metrics})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hub.Close()) }()
	gate, err := wsgate.New(wsgate.Config{Listen: []wsgate.ListenConfig{{Addr: s.Listen}}, Sites: doors, Metrics: metrics}, keys,
		func(event func(*broker.Delivery), gap func(string)) (wsgate.Feed, error) {
			return hub.NewFeed(broker.FeedConfig{Handle: event, Gap: gap})
		})
	if err != nil {
		return err
	}
	ops, err := admin.New(admin.Config{Listen: s.Admin, Metrics: metrics, Ready: map[string]func() error{"keys": keys.Ready, "gate": gate.Ready}})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return keys.Run(ctx) })
	g.Go(func() error { return gate.Run(ctx) })
	g.Go(func() error { return ops.Run(ctx) })
	return g.Wait()
}
