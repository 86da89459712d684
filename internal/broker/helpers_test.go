package broker

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

func TestMain(m *testing.M) {
	if os.Getenv(holdLockEnv) != "" {
		holdLock()
	}
	goleak.VerifyTestMain(m)
}

const patience = 20 * time.Second

var quiet = slog.New(slog.DiscardHandler)

// startHub starts an embedded hub for the test.
func startHub(t testing.TB, cfg HubConfig, dir string) *Embedded {
	t.Helper()
	hub, err := StartEmbedded(EmbeddedConfig{HubConfig: cfg, DataDir: dir, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(hub.Shutdown)
	return hub
}

// small is a hub whose streams do not fill the disk.
var small = HubConfig{MaxBytes: 64 << 20}

// embedded starts a hub with its assets, and connects as a bridge does.
func embedded(t testing.TB, cfg HubConfig) (*Embedded, *Broker) {
	t.Helper()
	hub := startHub(t, cfg, t.TempDir())
	b := connect(t, ConnectConfig{HubConfig: cfg, Name: "bridge", Embedded: hub})
	apply(t, b)
	return hub, b
}

func connect(t testing.TB, cfg ConnectConfig) *Broker {
	t.Helper()
	if cfg.Log == nil {
		cfg.Log = quiet
	}
	b, err := Connect(deadline(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func apply(t testing.TB, b *Broker) {
	t.Helper()
	if err := b.ApplyAssets(deadline(t)); err != nil {
		t.Fatal(err)
	}
}

// remote connects over TCP, as to a hub elsewhere, with short pauses.
func remote(t testing.TB, name string, urls ...string) *Broker {
	t.Helper()
	cfg := small
	cfg.URLs, cfg.Partitions, cfg.ReconnectMax = urls, defaultEmbeddedPartitions, 20*time.Millisecond
	return connect(t, ConnectConfig{HubConfig: cfg, Name: name})
}

// hubProcess is a hub elsewhere: it can be stopped and started again on its folder and address.
type hubProcess struct {
	t   testing.TB
	cfg HubConfig
	dir string
	hub *Embedded
}

func startProcess(t testing.TB) *hubProcess {
	t.Helper()
	p := &hubProcess{t: t, cfg: small, dir: t.TempDir()}
	p.cfg.Listen = "127.0.0.1:0"
	p.start()
	p.cfg.Listen = strings.TrimPrefix(p.hub.ClientURL(), "nats://")
	return p
}

func (p *hubProcess) start() {
	p.t.Helper()
	p.hub = startHub(p.t, p.cfg, p.dir)
}

func (p *hubProcess) stop() { p.hub.Shutdown() }

// wipe loses all data of a stopped hub.
func (p *hubProcess) wipe() {
	p.t.Helper()
	if err := os.RemoveAll(filepath.Join(p.dir, "jetstream")); err != nil {
		p.t.Fatal(err)
	}
}

func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls, for what no channel tells.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	until := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-until:
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// event makes event seq of a site, from edge-1.
func event(site string, seq uint64) *Event {
	id := strconv.FormatUint(seq, 10)
	return &Event{
		Event: envelope.Event{
			Site: site, Kind: "order", Edge: "edge-1", Epoch: "e1", From: seq, Seq: seq, ID: "id" + id,
			Accepted: 1_700_000_000_000, Deadline: 1_700_000_600_000, Order: "order" + id, Via: "hub",
			Triple: envelope.Triple{IV: []byte("AAECAwQFBgcICQoL"), Fingerprint: []byte("0cc175b9c0f1b6a8"), Message: []byte("Y2lwaGVydGV4dA==")},
		},
		Bind: "b1", Tag: "tag-" + id, Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
}

// report makes the report of event seq of a site.
func report(site string, seq uint64) *Report {
	id := strconv.FormatUint(seq, 10)
	return &Report{
		Report: envelope.Report{
			Site: site, Edge: "edge-1", Epoch: "e1", Seq: seq, ID: "id" + id, Endpoint: "main", State: StateDelivered,
			Status: 200, Attempts: 1, Started: 1_700_000_000_100, Settled: 1_700_000_000_200,
			Triple: envelope.Triple{IV: []byte("AAECAwQFBgcICQoL"), Fingerprint: []byte("kb:b1"), Message: []byte("c2VhbGVk")},
		},
		Kind: "order", StreamSeq: 7, Bind: "b1", Tag: "tag-" + id,
	}
}

func publish(t testing.TB, b *Broker, site string, from, to uint64) {
	t.Helper()
	for seq := from; seq <= to; seq++ {
		if _, _, err := b.PublishEvent(deadline(t), event(site, seq)); err != nil {
			t.Fatal(err)
		}
	}
}

// siteOf finds a site in partition p.
func siteOf(t testing.TB, b *Broker, p int) string {
	t.Helper()
	for i := range 1000 {
		if site := fmt.Sprintf("store-%d", i); b.PartitionOf(site) == p {
			return site
		}
	}
	t.Fatalf("no site in partition %d", p)
	return ""
}

// owner runs ConsumePartition and shows what it is told, in order.
type owner struct {
	t      testing.TB
	cancel context.CancelFunc
	done   chan struct{}
	tell   chan any // Takeover for a take-over, *Delivery for a delivery
}

func own(t testing.TB, b *Broker, p int) *owner {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	o := &owner{t: t, cancel: cancel, done: make(chan struct{}), tell: make(chan any, 10_000)}
	go func() {
		defer close(o.done)
		err := b.ConsumePartition(ctx, p, func(_ context.Context, at Takeover) error {
			o.tell <- at
			return nil
		}, func(d *Delivery) { o.tell <- d })
		if err != nil {
			t.Errorf("ConsumePartition: %v", err)
		}
	}()
	t.Cleanup(o.stop)
	return o
}

func (o *owner) stop() {
	o.cancel()
	<-o.done
}

func (o *owner) next() any {
	o.t.Helper()
	select {
	case v := <-o.tell:
		return v
	case <-time.After(patience):
		o.t.Fatal("nothing came from the partition")
		return nil
	}
}

// takeover expects to be told of a take-over, and passes over deliveries before it.
func (o *owner) takeover() Takeover {
	o.t.Helper()
	for {
		if at, ok := o.next().(Takeover); ok {
			return at
		}
	}
}

// delivery expects the event seq next.
func (o *owner) delivery(seq uint64) *Delivery {
	o.t.Helper()
	v := o.next()
	d, ok := v.(*Delivery)
	if !ok {
		o.t.Fatalf("take-over where event %d was due", seq)
	}
	if d.Err != nil {
		o.t.Fatalf("event %d: %v", seq, d.Err)
	}
	if d.Event.Seq != seq {
		o.t.Fatalf("event %d where %d was due", d.Event.Seq, seq)
	}
	return d
}

func (o *owner) deliveries(from, to uint64) []*Delivery {
	o.t.Helper()
	var all []*Delivery
	for seq := from; seq <= to; seq++ {
		all = append(all, o.delivery(seq))
	}
	return all
}

// settle waits until the hub has the acknowledgements: its floor is at the stream sequence.
func settle(t testing.TB, b *Broker, p int, streamSeq uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("acknowledged up to %d", streamSeq), func() bool {
		c, err := b.js.Consumer(deadline(t), streamPOS, consumerName(p))
		if err != nil {
			return false
		}
		return c.CachedInfo().AckFloor.Stream >= streamSeq
	})
}

// followed follows the reports of sites until the test ends; the hub knows of it when
// this returns.
func followed(t testing.TB, b *Broker, sites ...string) <-chan *Report {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	subscribed := b.nc.NumSubscriptions() + len(slices.Compact(slices.Sorted(slices.Values(sites))))
	reports, done := make(chan *Report, 1000), make(chan struct{})
	go func() {
		defer close(done)
		if err := b.FollowReports(ctx, sites, func(r *Report) { reports <- r }); err != nil {
			t.Errorf("FollowReports: %v", err)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	eventually(t, "the subscriptions are made", func() bool { return b.nc.NumSubscriptions() >= subscribed })
	if err := b.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	return reports
}
