// Command fanout is the floor under the gate: events from the hub to all screens of their
// site by WebSocket.
//
// Unavoidable: to consume, to find the screens of the event's site, to frame the event
// once, to write it to each screen, and to say "isAlive?" to every screen each second, as
// the seed wants. A screen costs a goroutine that reads, as pings and closing must be
// answered.
//
// How: one push consumer without acknowledgements; gorilla/websocket with its smallest
// buffers and a pool for what is written; a PreparedMessage for each event, written to
// one screen after the other by the goroutine that consumes. A screen that does not read
// would hold up all others.
//
// Left out, as the product's own: authorization, the tag, queues, time-outs, slow screens,
// closing with a reason, noticing that the hub is away, metrics.
//
// Could it be 10 % faster? Nearly all of it is the kernel's write, with the receiver's
// side of the loopback done inside it. Writing the frame's bytes past gorilla/websocket
// would save its lock and look-up, about 3 %. One io_uring submission for many sockets
// would save more, and Go has none.
package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
)

func main() { os.Exit(rig.Main("fanout", run)) }

func run(ctx context.Context) error {
	hub := flag.String("hub", "", "nats://host:port")
	listen := flag.String("listen", "", "host:port for screens: /sites/<site>")
	admin := flag.String("admin", "", "host:port of /readyz and /metrics")
	flag.Parse()
	f, err := newFanout()
	if err != nil {
		return err
	}
	nc, err := nats.Connect(*hub)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	inbox := nats.NewInbox()
	if _, err := nc.Subscribe(inbox, func(m *nats.Msg) { f.show(m.Subject, m.Data) }); err != nil {
		return err
	}
	if _, err := js.CreatePushConsumer(ctx, "POS", jetstream.ConsumerConfig{DeliverSubject: inbox, DeliverPolicy: jetstream.DeliverNewPolicy,
		AckPolicy: jetstream.AckNonePolicy, MaxDeliver: 1, MemoryStorage: true, InactiveThreshold: time.Minute}); err != nil {
		return err
	}

	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { f.beat(ctx) })
	srv := &http.Server{Addr: *listen, Handler: f, ReadHeaderTimeout: 10 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	failed := make(chan error, 1)
	wg.Go(func() {
		if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			failed <- err
			cancel()
		}
	})
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector())
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	err = rig.Serve(ctx, *admin, mux, func() error { return nil })
	cancel()
	srv.Close()
	f.closeAll()
	select {
	case failure := <-failed:
		return errors.Join(err, failure)
	default:
		return err
	}
}

type fanout struct {
	// Fixed at birth.
	alive    *websocket.PreparedMessage
	upgrader websocket.Upgrader

	readers sync.WaitGroup

	// mu guards the screens and is held while they are written to: a connection has one
	// writer at a time.
	mu      sync.Mutex
	screens map[string]map[*websocket.Conn]struct{} // by site
}

func newFanout() (*fanout, error) {
	alive, err := websocket.NewPreparedMessage(websocket.TextMessage, []byte("isAlive?"))
	return &fanout{alive: alive, screens: make(map[string]map[*websocket.Conn]struct{}),
		upgrader: websocket.Upgrader{ReadBufferSize: 256, WriteBufferPool: new(sync.Pool)}}, err
}

func (f *fanout) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	site, ok := strings.CutPrefix(r.URL.Path, "/sites/")
	if !ok {
		http.NotFound(w, r)
		return
	}
	conn, err := f.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // Upgrade has answered
	}
	f.mu.Lock()
	if f.screens[site] == nil {
		f.screens[site] = make(map[*websocket.Conn]struct{})
	}
	f.screens[site][conn] = struct{}{}
	f.mu.Unlock()
	f.readers.Go(func() { f.read(site, conn) })
}

// read answers pings and ends with the connection.
func (f *fanout) read(site string, conn *websocket.Conn) {
	conn.SetReadLimit(4 << 10)
	for {
		if _, _, err := conn.NextReader(); err != nil {
			break
		}
	}
	conn.Close()
	f.mu.Lock()
	delete(f.screens[site], conn)
	f.mu.Unlock()
}

// show brings an event to its site's screens. A message without data is a heartbeat.
func (f *fanout) show(subject string, data []byte) {
	parts := strings.SplitN(subject, ".", 4) // pos.<partition>.<site>.<kind>.<edge>
	if len(data) == 0 || len(parts) < 4 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	screens := f.screens[parts[2]]
	if len(screens) == 0 {
		return
	}
	m, err := websocket.NewPreparedMessage(websocket.TextMessage, data)
	if err != nil {
		return // it cannot be: no option was set
	}
	write(screens, m)
}

// write sends to one screen after the other.
func write(screens map[*websocket.Conn]struct{}, m *websocket.PreparedMessage) {
	for c := range screens {
		if c.WritePreparedMessage(m) != nil {
			c.Close() // its reader takes it out
		}
	}
}

// beat says "isAlive?" to all, each second.
func (f *fanout) beat(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f.sayAlive()
	}
}

func (f *fanout) sayAlive() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, screens := range f.screens {
		write(screens, f.alive)
	}
}

func (f *fanout) closeAll() {
	f.mu.Lock()
	for _, screens := range f.screens {
		for c := range screens {
			c.Close()
		}
	}
	f.mu.Unlock()
	f.readers.Wait()
}
