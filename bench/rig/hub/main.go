// Command hub is the product's embedded hub in a process of its own, so that what the
// hub costs is not counted as anybody else's.
package main

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"os"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

func main() { os.Exit(rig.Main("hub", run)) }

func run(ctx context.Context) (err error) {
	var cfg broker.EmbeddedConfig
	var admin string
	flag.StringVar(&admin, "admin", "", "host:port of /readyz")
	flag.StringVar(&cfg.Listen, "listen", "", "host:port of the hub")
	flag.StringVar(&cfg.Sync, "sync", "interval", "always or interval")
	flag.IntVar(&cfg.Partitions, "partitions", 1, "of the POS stream")
	flag.StringVar(&cfg.DataDir, "data", "", "folder of the streams")
	flag.Parse()
	cfg.Log = slog.Default()

	hub, err := broker.StartEmbedded(cfg)
	if err != nil {
		return err
	}
	defer hub.Shutdown()
	conn, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: cfg.HubConfig, Name: "hub", Embedded: hub})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if err := conn.ApplyAssets(ctx); err != nil {
		return err
	}
	return rig.Serve(ctx, admin, nil, func() error { return nil })
}
