package broker

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/cluster"
)

// onCluster connects to a cluster as to a hub elsewhere, and has its assets made.
func onCluster(t *testing.T, c *cluster.Cluster) *Broker {
	t.Helper()
	cfg := HubConfig{MaxBytes: 64 << 20, URLs: c.URLs(), Partitions: 4, ReconnectMax: 20 * time.Millisecond}
	b := connect(t, ConnectConfig{HubConfig: cfg, Name: "bridge"})
	apply(t, b)
	return b
}

func TestClusterGetsReplicatedAssets(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Config{})
	b := onCluster(t, c)
	if err := b.CheckAssets(deadline(t)); err != nil {
		t.Error(err)
	}
	stream, err := b.js.Stream(deadline(t), streamPOS)
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().Config.Replicas; n != 3 {
		t.Errorf("POS has %d replicas, want 3 by default", n)
	}
	consumer, err := b.js.Consumer(deadline(t), streamPOS, consumerName(0))
	if err != nil {
		t.Fatal(err)
	}
	if !consumer.CachedInfo().Config.MemoryStorage {
		t.Error("consumers of a cluster are on disk")
	}
}

// Everything at once, as in production: an edge publishes, a bridge delivers, reports
// and acknowledges, screens look on, and the leaders of stream and consumer are stopped.
func TestClusterKeepsEveryPromiseWhenALeaderStops(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Config{})
	b := onCluster(t, c)
	f := feed(t, b, nil)
	site := siteOf(t, b, 0)
	const n = 300

	// The bridge: what no report says is delivered, then reported, then acknowledged.
	var (
		mu        sync.Mutex
		delivered []uint64
		takeovers int
		done      = make(map[uint64]bool)
	)
	all := make(chan struct{})
	queue := make(chan *Delivery, 10*n)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		err := b.ConsumePartition(ctx, 0, func(ctx context.Context, at Takeover) error {
			mu.Lock()
			defer mu.Unlock()
			takeovers++
			for len(queue) > 0 {
				<-queue
			}
			if at.OldestUnacked.IsZero() {
				return nil
			}
			return b.ReportsSince(ctx, at.OldestUnacked, 0, func(r *Report) error {
				done[r.Seq] = true
				return nil
			})
		}, func(d *Delivery) { queue <- d })
		if err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		for {
			var d *Delivery
			select {
			case <-ctx.Done():
				return
			case d = <-queue:
			}
			mu.Lock()
			if d.Err != nil {
				t.Errorf("event: %v", d.Err)
			} else if !done[d.Event.Seq] {
				if len(delivered) > 0 && d.Event.Seq != delivered[len(delivered)-1]+1 {
					t.Errorf("event %d was delivered after %d", d.Event.Seq, delivered[len(delivered)-1])
				}
				delivered = append(delivered, d.Event.Seq)
				if err := b.PublishReport(deadline(t), report(site, d.Event.Seq)); err != nil {
					t.Error(err)
				}
				done[d.Event.Seq] = true
				if len(delivered) == n {
					close(all)
				}
			}
			_ = d.Ack() // stale or lost: it comes again
			mu.Unlock()
		}
	})
	defer wg.Wait()
	defer cancel()

	// The edge, over the leader's end and return.
	publish(t, b, site, 1, n/3)
	stopped := c.Leader(streamPOS)
	c.Stop(stopped)
	publish(t, b, site, n/3+1, 2*n/3)
	c.Restart(stopped)
	c.StepDown(streamPOS)
	publish(t, b, site, 2*n/3+1, n-1)
	c.Stop(c.ConsumerLeader(streamPOS, consumerName(0)))
	publish(t, b, site, n, n)

	select {
	case <-all:
	case <-time.After(patience):
		mu.Lock()
		defer mu.Unlock()
		t.Fatalf("%d of %d delivered, %d take-overs", len(delivered), n, takeovers)
	}
	f.events(1, n)
	if e, seq, err := b.LastEvent(deadline(t), site, "edge-1"); err != nil || e.Seq != n || seq != n {
		t.Errorf("last event is %+v at %d, %v, want %d at %d", e, seq, err, n, n)
	}
	reports := reportsSince(t, b, time.Time{}, 0)
	if len(reports) != n {
		t.Errorf("%d reports, want %d", len(reports), n)
	}
	mu.Lock()
	defer mu.Unlock()
	if takeovers < 2 {
		t.Errorf("%d take-overs: the end of the consumer's leader was not noticed", takeovers)
	}
}

func TestClusterPartitionIsContiguousAfterItsConsumersLeaderStops(t *testing.T) {
	t.Parallel()
	c := cluster.Start(t, cluster.Config{})
	b := onCluster(t, c)
	site := siteOf(t, b, 1)
	publish(t, b, site, 1, 50)
	o := own(t, b, 1)
	o.takeover()
	o.deliveries(1, 50)
	c.Stop(c.ConsumerLeader(streamPOS, consumerName(1)))
	o.takeover()
	publish(t, b, site, 51, 60)
	for next := uint64(1); next <= 60; {
		v := o.next()
		d, ok := v.(*Delivery)
		if !ok { // once more: then from the start, as nothing is acknowledged
			next = 1
			continue
		}
		if d.Event.Seq != next {
			t.Fatalf("event %d where %d was due", d.Event.Seq, next)
		}
		next++
	}
}
