// Command hub is the hub in a process of its own, so that a fault run can kill it apart
// from the bridge: the server that the bridge would embed, with the bridge's assets.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

func main() {
	listen := flag.String("listen", "", "host:port for edges and bridges; loopback only")
	ready := flag.String("ready", "", "host:port that answers /readyz once the hub has its streams")
	data := flag.String("data", "", "folder of the hub's data")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *listen, *ready, *data); err != nil {
		fmt.Fprintln(os.Stderr, "hub:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, listen, ready, data string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	cfg := broker.HubConfig{Listen: listen}
	hub, err := broker.StartEmbedded(broker.EmbeddedConfig{HubConfig: cfg, DataDir: data, Log: log})
	if err != nil {
		return err
	}
	defer hub.Shutdown()
	conn, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: cfg, Name: "hub", Embedded: hub, Log: log})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.ApplyAssets(ctx); err != nil {
		return err
	}

	srv := &http.Server{Addr: ready, Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), ReadHeaderTimeout: time.Second}
	go func() {
		<-ctx.Done()
		srv.Close()
	}()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
