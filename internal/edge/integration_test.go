package edge

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

// bench is a real hub that listens, a real Portal, and what a bridge would do with the
// events: verify, open, report.
type bench struct {
	t        *testing.T
	hubCfg   broker.HubConfig
	dir      string
	hub      *broker.Embedded
	bindings map[string]*envelope.Binding
	portal   *portal.Portal
	config   Config

	mu     sync.Mutex
	events []broker.Event
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir(), hubCfg: broker.HubConfig{Listen: "127.0.0.1:0", MaxBytes: 64 << 20}}
	b.startHub()
	b.hubCfg.Listen = strings.TrimPrefix(b.hub.ClientURL(), "nats://")

	p, err := portal.Start(portal.Config{Sites: map[string]portal.SiteConfig{"gcm": {Encryption: true}, "clear": {}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	b.portal = p
	ca, token, _, err := p.WriteCredentials(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	bindingFile := filepath.Join(t.TempDir(), "binding.json")
	if err := keysync.MintBindingFile(bindingFile, []string{"gcm", "clear"}); err != nil {
		t.Fatal(err)
	}
	if b.bindings, err = keysync.ReadBindingFile(bindingFile); err != nil {
		t.Fatal(err)
	}
	cipher := envelope.Settings{Profile: envelope.A256GCM, Iterations: 1000}
	b.config = Config{
		Name:        "store-7",
		Listen:      []ListenConfig{{Addr: "127.0.0.1:0"}},
		Admin:       AdminConfig{Listen: freeAddr(t)},
		Hub:         broker.HubConfig{URLs: []string{b.hub.ClientURL()}, ReconnectMax: 50 * time.Millisecond},
		Portal:      keysync.PortalConfig{URL: p.URL(), CAFile: ca, TokenFile: token},
		BindingFile: bindingFile,
		Cipher:      cipher,
		Sites: map[string]SiteConfig{
			"gcm":   {SiteConfig: door.SiteConfig{Tokens: tokens("till-1", tokenTill1)}},
			"clear": {SiteConfig: door.SiteConfig{Tokens: tokens("till-4", tokenClear)}},
		},
		MaxBody: 193520,
		Log:     slog.New(slog.DiscardHandler),
	}
	return b
}

func (b *bench) startHub() {
	b.t.Helper()
	hub, err := broker.StartEmbedded(broker.EmbeddedConfig{HubConfig: b.hubCfg, DataDir: b.dir, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.t.Fatal(err)
	}
	b.hub = hub
	b.t.Cleanup(hub.Shutdown)
}

// bridge takes every event and reports what the Kitchen says, until the test ends or
// stop is called.
func (b *bench) bridge(kitchen func(*broker.Event) *reply) (stop func()) {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: b.hubCfg, Name: "bridge", Embedded: b.hub, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.t.Fatal(err)
	}
	if err := c.ApplyAssets(ctx); err != nil {
		b.t.Fatal(err)
	}
	feed, err := c.NewFeed(broker.FeedConfig{Handle: func(d *broker.Delivery) {
		if d.Err != nil {
			b.t.Errorf("malformed: %v", d.Err)
			return
		}
		if err := b.bindings[d.Site].VerifyEvent(&d.Event.Event, d.Event.Bind, d.Event.Tag); err != nil {
			b.t.Errorf("tag: %v", err)
			return
		}
		b.mu.Lock()
		b.events = append(b.events, d.Event)
		b.mu.Unlock()
		if r := kitchen(&d.Event); r != nil {
			if err := c.PublishReport(ctx, b.report(&d.Event, d.StreamSeq, r)); err != nil && ctx.Err() == nil {
				b.t.Errorf("report: %v", err)
			}
		}
	}})
	if err != nil {
		b.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := feed.Run(ctx); err != nil && ctx.Err() == nil {
			b.t.Errorf("feed: %v", err)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if err := c.Close(); err != nil {
			b.t.Error(err)
		}
	})
	b.t.Cleanup(stop)
	eventually(b.t, "the feed is there", func() bool { return !feed.LastContact().IsZero() })
	return stop
}

func (b *bench) report(e *broker.Event, streamSeq uint64, r *reply) *broker.Report {
	key := b.bindings[e.Site].Current()
	text, err := json.Marshal(map[string]any{"status": r.status, "headers": map[string]string{"content-type": r.contentType}, "body": []byte(r.body)})
	if err != nil {
		b.t.Error(err)
	}
	sealed, err := key.SealReport(text)
	if err != nil {
		b.t.Error(err)
	}
	now := time.Now().UnixMilli()
	out := &broker.Report{Kind: e.Kind, StreamSeq: streamSeq, Bind: key.ID(), Report: envelope.Report{
		Site: e.Site, Edge: e.Edge, Epoch: e.Epoch, Seq: e.Seq, ID: e.ID, Endpoint: "kitchen",
		State: r.state, Reason: r.reason, Status: r.status, Attempts: 1, Started: now, Settled: now, Triple: sealed,
	}}
	out.Tag = key.TagReport(&out.Report)
	return out
}

// edge runs an edge of b's configuration until the test ends, and returns its address.
func (b *bench) edge() string {
	b.t.Helper()
	opened := make(chan string, 1)
	cfg := b.config
	cfg.Listening = func(addrs []net.Addr) { opened <- "http://" + addrs[0].String() }
	e, err := New(cfg)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	b.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("edge: %v", err)
		}
	})
	return <-opened
}

func (b *bench) ready(client *http.Client, base string) {
	b.t.Helper()
	eventually(b.t, "the edge is ready", func() bool {
		status, _ := send(b.t, client, base, call{method: http.MethodGet, path: "/readyz"})
		return status == 200
	})
}

func TestAnOrderThroughARealHub(t *testing.T) {
	b := newBench(t)
	b.bridge(func(e *broker.Event) *reply {
		if e.Kind == "alert" {
			return &reply{state: "failed", reason: "refused", status: 422}
		}
		return cooks(nil)
	})
	base, client := b.edge(), testClient(t)
	b.ready(client, base)

	for _, c := range []struct {
		name   string
		call   call
		status int
	}{
		{"encrypted on its way to the Kitchen", call{token: tokenTill1, body: order, header: with("Prefer", "wait=20")}, 201},
		{"encryption off", call{token: tokenClear, body: order, header: with("Prefer", "wait=20")}, 201},
		{"refused by the Kitchen", call{path: "/alert", token: tokenTill1, body: order, header: with("Prefer", "wait=20")}, 502},
		{"as large as may be", call{token: tokenTill1, body: `"` + strings.Repeat("x", 193518) + `"`, header: with("Prefer", "wait=20")}, 201},
		{"as large as may be, encryption off", call{token: tokenClear, body: `"` + strings.Repeat("x", 193518) + `"`, header: with("Prefer", "wait=20")}, 201},
	} {
		if status, body := send(t, client, base, c.call); status != c.status {
			t.Errorf("%s: %d, want %d: %.300s", c.name, status, c.status, body)
		}
	}

	b.mu.Lock()
	defer b.mu.Unlock()
	seqs := make(map[string]uint64)
	for _, e := range b.events {
		if seqs[e.Site]++; e.Seq != seqs[e.Site] {
			t.Errorf("site %s: number %d where %d was due", e.Site, e.Seq, seqs[e.Site])
		}
		if strings.Contains(string(e.Triple.Message), "o-1001") {
			t.Error("the hub has it in clear")
		}
	}
	first := b.events[0]
	if first.Order != b.bindings["gcm"].Lane().Order("o-1001") || first.Via != "hub" || first.Deadline-first.Accepted != (10*time.Minute).Milliseconds() {
		t.Errorf("%+v", first)
	}
	plain, err := b.bindings["clear"].OpenPlain(nil, b.events[1].Triple)
	if err != nil || string(plain) != order {
		t.Errorf("encryption off: %s, %v", plain, err)
	}
}

// The hub goes and comes back under load: every answer was true, and what the hub has is
// in order, without holes, each once.
func TestTheHubGoesAndComesBack(t *testing.T) {
	b := newBench(t)
	b.config.CommitWait = time.Second
	stop := b.bridge(func(*broker.Event) *reply { return nil })
	base, client := b.edge(), testClient(t)
	b.ready(client, base)

	var mu sync.Mutex
	answers := make(map[string]int) // by id: the last status
	statuses := make(map[int]int)
	var wg sync.WaitGroup
	ends := make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for i, token := range []string{tokenTill1, tokenTill1, tokenTill1, tokenClear} {
		wg.Go(func() {
			for n := 0; ; n++ {
				c := call{token: token, body: fmt.Sprintf(`{"_id":"%d-%d"}`, i, n), header: with("Prefer", "wait=0", "Idempotency-Key", fmt.Sprintf("%d-%d", i, n))}
				for { // as a POS does: until it knows
					resp, err := client.Do(c.request(base))
					if err != nil {
						t.Error(err)
						return
					}
					id := resp.Header.Get("Kb-Id")
					resp.Body.Close()
					mu.Lock()
					answers[id] = resp.StatusCode
					statuses[resp.StatusCode]++
					mu.Unlock()
					if resp.StatusCode == 202 {
						break
					}
					select {
					case <-time.After(10 * time.Millisecond):
					case <-ctx.Done():
						t.Errorf("message %d-%d: still %d in the end", i, n, resp.StatusCode)
						return
					}
				}
				select {
				case <-ends:
					return
				default:
				}
			}
		})
	}
	settled := func(n int) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return statuses[202] > n }
	}
	eventually(t, "orders are stored", settled(50))
	stop() // the bridge lives in the hub's process
	b.hub.Shutdown()
	eventually(t, "orders are refused", func() bool { mu.Lock(); defer mu.Unlock(); return statuses[503] > 20 })
	mu.Lock()
	before := statuses[202]
	mu.Unlock()
	b.startHub()
	eventually(t, "orders are stored again", settled(before+50))
	close(ends)
	wg.Wait()

	seen := make(map[string]bool)
	next := make(map[string]uint64)
	for _, e := range b.everything() {
		if next[e.Site]++; e.Seq != next[e.Site] {
			t.Errorf("site %s: number %d where %d was due", e.Site, e.Seq, next[e.Site])
		}
		if seen[e.ID] {
			t.Errorf("%s is there twice", e.ID)
		}
		seen[e.ID] = true
	}
	for id, status := range answers {
		if status == 202 && !seen[id] {
			t.Errorf("%s was accepted, and the hub does not have it", id)
		}
	}
	if len(seen) < 100 || len(seen) != len(answers) {
		t.Errorf("%d events for %d messages", len(seen), len(answers))
	}
}

// everything reads all events that the hub has, from its partitions.
func (b *bench) everything() []broker.Event {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	defer cancel()
	c, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: b.hubCfg, Name: "reader", Embedded: b.hub, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	last := make(map[string]uint64)
	for site := range b.bindings {
		if e, _, err := c.LastEvent(ctx, site, b.config.Name); err == nil {
			last[site] = e.Seq
		}
	}
	var mu sync.Mutex
	var events []broker.Event
	var wg sync.WaitGroup
	for p := range c.Partitions() {
		wg.Go(func() {
			err := c.ConsumePartition(ctx, p, func(context.Context, broker.Takeover) error { return nil }, func(d *broker.Delivery) {
				mu.Lock()
				defer mu.Unlock()
				events = append(events, d.Event)
				if d.Event.Seq == last[d.Event.Site] {
					delete(last, d.Event.Site)
				}
				if len(last) == 0 {
					cancel()
				}
			})
			if err != nil && ctx.Err() == nil {
				b.t.Errorf("partition %d: %v", p, err)
			}
		})
	}
	wg.Wait()
	return events
}
