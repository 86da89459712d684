package wsgate

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// From a real hub to a screen; and I10 when the hub goes away.
func TestFromTheHubToAScreen(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	hubConfig := broker.HubConfig{Sync: "interval"}
	hub, err := broker.StartEmbedded(broker.EmbeddedConfig{HubConfig: hubConfig, DataDir: t.TempDir(), Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	shutdown := sync.OnceFunc(hub.Shutdown)
	defer shutdown()
	conn, err := broker.Connect(t.Context(), broker.ConnectConfig{HubConfig: hubConfig, Name: "bridge", Embedded: hub, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.ApplyAssets(t.Context()); err != nil {
		t.Fatal(err)
	}

	cfg := testConfig()
	cfg.Heartbeat, cfg.StaleClose = 100*time.Millisecond, 2500*time.Millisecond
	cfg.Log = quiet
	s := &stage{t: t, keys: newFakeKeys(t), registry: prometheus.NewRegistry()}
	cfg.Metrics = s.registry
	s.Gate, err = New(cfg, s.keys, func(event func(*broker.Delivery), gap func(string)) (Feed, error) {
		return conn.NewFeed(broker.FeedConfig{Handle: event, Gap: gap, Heartbeat: 250 * time.Millisecond})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	s.run()
	eventually(t, "ready", func() bool { return s.Ready() == nil })
	screen := s.connect(headers(tokenOne), true).listen()

	var want []string
	for seq := range uint64(20) {
		d := event(t, s.keys.Site("one"), seq+1, `{"_id":"o-1"}`)
		if _, _, err := conn.PublishEvent(t.Context(), &d.Event); err != nil {
			t.Fatal(err)
		}
		want = append(want, string(d.Event.Triple.AppendJSON(nil)))
	}
	eventually(t, "20 frames", func() bool { return len(screen.frames()) == 20 })
	screen.wantFrames(want...)
	eventually(t, "a heartbeat", func() bool { return len(screen.beats()) > 0 })
	screen.wantOpen()

	shutdown()
	screen.done.Wait()
	screen.wantClosed(websocket.CloseTryAgainLater, byeStale.text)
	if s.Ready() == nil {
		t.Error("ready without a hub")
	}
	s.finish()
	s.wantCount("kb_wsgate_frames_total", "", 20)
}

// eventually waits for what another goroutine is about to bring about.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ticker := time.NewTicker(5 * time.Millisecond)
	defer ticker.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within 20s", what)
		case <-ticker.C:
		}
	}
}
