package main

import (
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// newHub is a server in process.
func newHub(t *testing.T) jetstream.JetStream {
	t.Helper()
	srv, err := server.NewServer(&server.Options{DontListen: true, NoSigs: true, NoLog: true, JetStream: true, StoreDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(10 * time.Second) {
		t.Fatal("not ready")
	}
	nc, err := nats.Connect("", nats.InProcessServer(srv))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestAllEventsAreStoredInOrder(t *testing.T) {
	js := newHub(t)
	pos, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "POS", Subjects: []string{"pos.>"}, AllowBatchPublish: true})
	if err != nil {
		t.Fatal(err)
	}
	const events = 2500
	if err := newBacklog(3, 100).send(t.Context(), js, events); err != nil {
		t.Fatal(err)
	}
	info, err := pos.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.State.Msgs != events {
		t.Errorf("%d of %d are stored", info.State.Msgs, events)
	}
	for seq, want := range map[uint64]struct{ subject, number string }{
		1: {"pos.store-0000.order.floor", "1"}, 6: {"pos.store-0002.order.floor", "2"}, events: {"pos.store-0000.order.floor", "834"},
	} {
		m, err := pos.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if m.Subject != want.subject || m.Header.Get("Kb-Seq") != want.number || len(m.Data) != 100 || m.Header.Get("Nats-Msg-Id") == "" {
			t.Errorf("%d: %s number %s, %d bytes, want %v", seq, m.Subject, m.Header.Get("Kb-Seq"), len(m.Data), want)
		}
	}
}
