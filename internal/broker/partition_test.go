package broker

import (
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

func TestPartitionDeliversInStreamOrderFromTheOldestUnacknowledged(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	site := siteOf(t, b, 2)
	publish(t, b, site, 1, 10)

	first := own(t, b, 2)
	if at := first.takeover(); at.OldestUnacked.IsZero() || at.Last != 10 {
		t.Errorf("ten events wait, and the take-over was told %+v", at)
	}
	got := first.deliveries(1, 10)
	for i, d := range got {
		if d.Site != site || d.Kind != "order" || d.Edge != "edge-1" || d.ConsumerSeq != uint64(i+1) || d.Redelivered {
			t.Fatalf("delivery %d is %+v", i, d)
		}
		if i != 3 && i != 6 { // two stay open
			if err := d.Ack(); err != nil {
				t.Fatal(err)
			}
		}
	}
	settle(t, b, 2, got[2].StreamSeq)
	first.stop()

	second := own(t, b, 2)
	if at := second.takeover(); !at.OldestUnacked.Equal(got[3].Stored) || at.Last != 10 {
		t.Errorf("oldest unacknowledged was stored %v, take-over was told %+v", got[3].Stored, at)
	}
	again := second.deliveries(4, 10) // settled ones too: the reports say which
	for _, d := range again {
		if err := d.Ack(); err != nil {
			t.Fatal(err)
		}
	}
	settle(t, b, 2, again[6].StreamSeq)
	second.stop()

	third := own(t, b, 2)
	at := third.takeover()
	if !at.OldestUnacked.IsZero() || at.Last != 10 {
		t.Errorf("nothing waits, ten were handed out before, and the take-over was told %+v", at)
	}
	publish(t, b, site, 11, 11)
	if d := third.delivery(11); d.StreamSeq <= at.Last {
		t.Errorf("an event stored after the take-over is at %d, the take-over was told of %d", d.StreamSeq, at.Last)
	}
}

func TestPartitionIsTakenOverAgain(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		disturb func(t *testing.T, p *hubProcess, b *Broker, last *Delivery)
		refill  bool // the events are gone: publish them again
	}{
		{name: "when the hub was restarted", disturb: func(t *testing.T, p *hubProcess, b *Broker, _ *Delivery) {
			p.stop()
			p.start()
		}},
		{name: "when the hub has lost everything", refill: true, disturb: func(t *testing.T, p *hubProcess, b *Broker, _ *Delivery) {
			p.stop()
			p.wipe()
			p.start()
			apply(t, b)
		}},
		{name: "when its consumer was deleted", disturb: func(t *testing.T, _ *hubProcess, b *Broker, _ *Delivery) {
			if err := b.js.DeleteConsumer(deadline(t), streamPOS, consumerName(0)); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "when the stream was made anew", refill: true, disturb: func(t *testing.T, _ *hubProcess, b *Broker, _ *Delivery) {
			if err := b.js.DeleteStream(deadline(t), streamPOS); err != nil {
				t.Fatal(err)
			}
			apply(t, b)
		}},
		{name: "when its consumer was reset by someone else", disturb: func(t *testing.T, _ *hubProcess, b *Broker, _ *Delivery) {
			if _, err := b.js.ResetConsumer(deadline(t), streamPOS, consumerName(0)); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "when another client has stolen a delivery", disturb: func(t *testing.T, _ *hubProcess, b *Broker, _ *Delivery) {
			steal(t, b)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t)
			b := remote(t, "bridge", p.hub.ClientURL())
			apply(t, b)
			site := siteOf(t, b, 0)
			publish(t, b, site, 1, 5)
			o := own(t, b, 0)
			o.takeover()
			before := o.deliveries(1, 5)
			for _, d := range before[:2] {
				if err := d.Ack(); err != nil {
					t.Fatal(err)
				}
			}
			settle(t, b, 0, before[1].StreamSeq)

			row.disturb(t, p, b, before[4])
			if row.refill {
				publish(t, b, site, 1, 8)
			} else {
				publish(t, b, site, 6, 8)
			}
			o.takeover()
			// What is not acknowledged comes again, in order; what is may, when the hub forgot.
			next := uint64(0)
			for next != 8 {
				v := o.next()
				d, ok := v.(*Delivery)
				if !ok { // once more: then all from the oldest again
					next = 0
					continue
				}
				if next != 0 && d.Event.Seq != next+1 || next == 0 && d.Event.Seq > 3 {
					t.Fatalf("event %d came after %d", d.Event.Seq, next)
				}
				next = d.Event.Seq
			}
			if err := before[2].Ack(); !errors.Is(err, ErrStale) {
				t.Errorf("acknowledging a delivery from before: %v, want ErrStale", err)
			}
		})
	}
}

// steal makes the hub deliver the next event of partition 0 to a client that is not the owner.
func steal(t *testing.T, b *Broker) {
	t.Helper()
	if err := b.unpin(deadline(t), consumerName(0)); err != nil {
		t.Fatal(err)
	}
	sub, err := b.nc.SubscribeSync(b.nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	request, err := json.Marshal(map[string]any{"batch": 1, "expires": 5 * time.Second, "group": pullGroup})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+streamPOS+"."+consumerName(0), sub.Subject, request); err != nil {
		t.Fatal(err)
	}
}

func TestPartitionDoesNotWaitForThePinOfADeadBridge(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	b := remote(t, "bridge", p.hub.ClientURL())
	apply(t, b)
	site := siteOf(t, b, 1)
	publish(t, b, site, 1, 3)

	// A bridge that is killed: its connection ends, its pin stays.
	dead, err := nats.Connect(p.hub.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	sub, err := dead.SubscribeSync("dead")
	if err != nil {
		t.Fatal(err)
	}
	request, err := json.Marshal(map[string]any{"batch": 100, "expires": time.Minute, "group": pullGroup})
	if err != nil {
		t.Fatal(err)
	}
	if err := dead.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+streamPOS+"."+consumerName(1), "dead", request); err != nil {
		t.Fatal(err)
	}
	if _, err := sub.NextMsg(patience); err != nil {
		t.Fatal(err)
	}
	dead.Close()

	began := time.Now()
	o := own(t, b, 1)
	o.takeover()
	o.deliveries(1, 3)
	if took := time.Since(began); took > pinnedTTL/3 {
		t.Errorf("took %v: the pin was waited for", took)
	}
}

func TestPartitionIsNotTakenFromAClientThatPulls(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	b, other := remote(t, "bridge", p.hub.ClientURL()), remote(t, "bridge-2", p.hub.ClientURL())
	apply(t, b)
	site := siteOf(t, b, 0)
	first := own(t, b, 0)
	first.takeover()
	eventually(t, "the first bridge pulls", func() bool {
		c, err := b.js.Consumer(deadline(t), streamPOS, consumerName(0))
		return err == nil && c.CachedInfo().NumWaiting > 0
	})
	second := own(t, other, 0)
	publish(t, b, site, 1, 5)
	for _, d := range first.deliveries(1, 5) {
		if err := d.Ack(); err != nil {
			t.Fatal(err)
		}
	}
	first.stop()
	second.takeover()
	publish(t, b, site, 6, 6)
	second.delivery(6)
}

func TestPartitionTakesOverAgainWhenTheCallerCannot(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	calls := 0
	err := b.ConsumePartition(ctx, 0, func(context.Context, Takeover) error {
		if calls++; calls < 3 {
			return errors.New("reports unreadable")
		}
		cancel()
		return nil
	}, func(*Delivery) { t.Error("delivery before a take-over has succeeded") })
	if err != nil {
		t.Errorf("told to stop: %v", err)
	}
	if calls != 3 {
		t.Errorf("take-over called %d times, want 3", calls)
	}
}

func TestPartitionHandsOnWhatIsMalformed(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	site := siteOf(t, b, 3)
	publish(t, b, site, 1, 1)
	if _, err := b.js.Publish(deadline(t), "pos."+site+".order.edge-1", []byte("{}")); err != nil {
		t.Fatal(err)
	}
	publish(t, b, site, 2, 2)
	o := own(t, b, 3)
	o.takeover()
	o.delivery(1)
	d, ok := o.next().(*Delivery)
	if !ok || !errors.Is(d.Err, ErrMalformed) || d.Site != site || string(d.Body) != "{}" {
		t.Fatalf("got %+v, want a malformed delivery", d)
	}
	if err := d.Ack(); err != nil {
		t.Error(err)
	}
	o.delivery(2)
}

func TestPartitionOutOfRangeIsRefused(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	for _, p := range []int{-1, b.Partitions()} {
		if err := b.ConsumePartition(t.Context(), p, nil, nil); err == nil {
			t.Errorf("partition %d of %d was accepted", p, b.Partitions())
		}
	}
}

func TestWhatRunsEndsWhenTheConnectionIsClosed(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	f, err := b.NewFeed(FeedConfig{Handle: func(*Delivery) {}})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { ended <- f.Run(deadline(t)) }()
	taken := make(chan struct{}, 10)
	go func() {
		ended <- b.ConsumePartition(deadline(t), 0, func(context.Context, Takeover) error {
			taken <- struct{}{}
			return nil
		}, func(*Delivery) {})
	}()
	<-taken
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ended; !errors.Is(err, errClosed) {
			t.Errorf("ended with %v, want %v", err, errClosed)
		}
	}
	if _, _, err := b.PublishEvent(deadline(t), event("store-1", 1)); !errors.Is(err, ErrAway) {
		t.Errorf("publish after Close: %v, want ErrAway", err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
}
