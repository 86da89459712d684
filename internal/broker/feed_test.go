package broker

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// fed is a running feed that shows what it is told, in order.
type fed struct {
	t    testing.TB
	feed *Feed
	tell chan any // *Delivery, or the reason of a gap
	stop func()
}

func feed(t testing.TB, b *Broker, hold <-chan struct{}) *fed {
	t.Helper()
	f := &fed{t: t, tell: make(chan any, 100_000)}
	var err error
	f.feed, err = b.NewFeed(FeedConfig{
		Heartbeat: 100 * time.Millisecond,
		Handle: func(d *Delivery) {
			if hold != nil {
				<-hold
			}
			f.tell <- d
		},
		Gap: func(reason string) { f.tell <- reason },
	})
	if err != nil {
		t.Fatal(err)
	}
	if hold != nil {
		f.feed.queue = 4
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f.feed.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	}()
	f.stop = func() { cancel(); <-done }
	t.Cleanup(f.stop)
	eventually(t, "the feed hears from the hub", func() bool { return !f.feed.LastContact().IsZero() })
	return f
}

func (f *fed) next() any {
	f.t.Helper()
	select {
	case v := <-f.tell:
		return v
	case <-time.After(patience):
		f.t.Fatal("nothing came from the feed")
		return nil
	}
}

func (f *fed) events(from, to uint64) {
	f.t.Helper()
	for seq := from; seq <= to; seq++ {
		d, ok := f.next().(*Delivery)
		if !ok || d.Err != nil || d.Event.Seq != seq {
			f.t.Fatalf("got %+v where event %d was due", d, seq)
		}
		if err := d.Ack(); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fed) gap(reason string) {
	f.t.Helper()
	if got := f.next(); got != reason {
		f.t.Fatalf("got %v, want the gap %q", got, reason)
	}
}

func TestFeedBringsEveryEventFromNowOnInOrder(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	publish(t, b, "store-1", 1, 5) // from before
	f := feed(t, b, nil)
	if got := f.feed.Head(); got != 5 {
		t.Errorf("head is %d before the first event, want 5", got)
	}
	publish(t, b, "store-1", 6, 8)
	publish(t, b, "store-2", 9, 12)
	f.events(6, 12)
	eventually(t, "head is at the last event", func() bool { return f.feed.Head() == 12 })
	stream, err := b.js.Stream(deadline(t), streamPOS)
	if err != nil {
		t.Fatal(err)
	}
	before := stream.CachedInfo().State.Consumers
	f.stop()
	info, err := stream.Info(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	if after := info.State.Consumers; after != before-1 {
		t.Errorf("%d consumers while it ran, %d after: it leaves one behind", before, after)
	}
}

func TestFeedHearsTheHubWhenThereIsNoEvent(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	b := remote(t, "bridge", p.hub.ClientURL())
	apply(t, b)
	f := feed(t, b, nil)
	first := f.feed.LastContact()
	eventually(t, "a later heartbeat", func() bool { return f.feed.LastContact().After(first) })
	p.stop()
	eventually(t, "contact ends with the hub", func() bool { return time.Since(f.feed.LastContact()) > 400*time.Millisecond })
	p.start()
	stopped := f.feed.LastContact()
	eventually(t, "contact again", func() bool { return f.feed.LastContact().After(stopped) })
}

// deleteFeeds deletes the consumers of feeds.
func deleteFeeds(t *testing.T, b *Broker) {
	t.Helper()
	stream, err := b.js.Stream(deadline(t), streamPOS)
	if err != nil {
		t.Fatal(err)
	}
	names := stream.ConsumerNames(deadline(t))
	for name := range names.Name() {
		if !strings.HasPrefix(name, "screens-") {
			continue
		}
		if err := b.js.DeleteConsumer(deadline(t), streamPOS, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := names.Err(); err != nil {
		t.Fatal(err)
	}
}

func TestFeedLosesNothing(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		disturb func(t *testing.T, p *hubProcess, b *Broker)
	}{
		{"when the hub is restarted", func(t *testing.T, p *hubProcess, b *Broker) {
			p.stop()
			p.start()
		}},
		{"when its consumer is deleted", func(t *testing.T, _ *hubProcess, b *Broker) { deleteFeeds(t, b) }},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t)
			b := remote(t, "bridge", p.hub.ClientURL())
			apply(t, b)
			f := feed(t, b, nil)
			publish(t, b, "store-1", 1, 20)
			f.events(1, 20)
			row.disturb(t, p, b)
			publish(t, b, "store-1", 21, 40)
			f.events(21, 40)
		})
	}
	t.Run("when it cannot keep up", func(t *testing.T) {
		t.Parallel()
		_, b := embedded(t, small)
		hold := make(chan struct{})
		f := feed(t, b, hold) // with a queue for 4
		publish(t, b, "store-1", 1, 50)
		close(hold)
		publish(t, b, "store-1", 51, 60)
		f.events(1, 60)
	})
}

func TestFeedSaysWhatItCannotBring(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name    string
		disturb func(t *testing.T, p *hubProcess, b *Broker)
		gap     string
	}{
		{"the hub has lost everything", func(t *testing.T, p *hubProcess, b *Broker) {
			p.stop()
			p.wipe()
			p.start()
			apply(t, b)
		}, GapReset},
		{"the stream was made anew", func(t *testing.T, _ *hubProcess, b *Broker) {
			if err := b.js.DeleteStream(deadline(t), streamPOS); err != nil {
				t.Fatal(err)
			}
			apply(t, b)
		}, GapReset},
		{"events were removed before they came", func(t *testing.T, _ *hubProcess, b *Broker) {
			deleteFeeds(t, b)
			publish(t, b, "store-1", 4, 6)
			stream, err := b.js.Stream(deadline(t), streamPOS)
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Purge(deadline(t)); err != nil {
				t.Fatal(err)
			}
		}, GapLost},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t)
			b := remote(t, "bridge", p.hub.ClientURL())
			apply(t, b)
			f := feed(t, b, nil)
			publish(t, b, "store-1", 1, 3)
			f.events(1, 3)
			row.disturb(t, p, b)
			f.gap(row.gap)
			publish(t, b, "store-1", 7, 9)
			f.events(7, 9)
		})
	}
	t.Run("the end of the stream", func(t *testing.T) { // a hub restored from a copy, or cut off without fsync
		_, b := embedded(t, small)
		publish(t, b, "store-1", 1, 3)
		f, err := b.NewFeed(FeedConfig{Handle: func(*Delivery) {}})
		if err != nil {
			t.Fatal(err)
		}
		var reasons []string
		f.cfg.Gap = func(reason string) { reasons = append(reasons, reason) }
		if err := f.position(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.head.Store(7)
		if err := f.position(t.Context()); err != nil {
			t.Fatal(err)
		}
		if f.Head() != 3 || len(reasons) != 1 || reasons[0] != GapReset {
			t.Errorf("head %d, gaps %v", f.Head(), reasons)
		}
	})
}

func TestFeedAnswersTheHubsControlMessages(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	f, err := b.NewFeed(FeedConfig{Handle: func(*Delivery) {}})
	if err != nil {
		t.Fatal(err)
	}
	sub, err := b.nc.SubscribeSync("flow")
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	header := func(pairs ...string) nats.Header {
		h := nats.Header{"Status": {"100"}}
		for i := 0; i < len(pairs); i += 2 {
			h[pairs[i]] = []string{pairs[i+1]}
		}
		return h
	}
	for _, row := range []struct {
		name    string
		m       *nats.Msg
		answers bool
		fails   bool
	}{
		{name: "heartbeat", m: &nats.Msg{Header: header("Nats-Last-Consumer", "5")}},
		{name: "do you keep up?", m: &nats.Msg{Header: header(), Reply: "flow"}, answers: true},
		{name: "I wait for your answer", m: &nats.Msg{Header: header("Nats-Last-Consumer", "5", "Nats-Consumer-Stalled", "flow")}, answers: true},
		{name: "heartbeat that knows of more", m: &nats.Msg{Header: header("Nats-Last-Consumer", "6")}, fails: true},
		{name: "consumer deleted", m: &nats.Msg{Header: nats.Header{"Status": {"409"}}}, fails: true},
		{name: "no word at all", m: &nats.Msg{}, fails: true},
	} {
		if err := f.control(row.m, 5); (err != nil) != row.fails {
			t.Errorf("%s: error is %v", row.name, err)
		}
		if row.answers {
			if _, err := sub.NextMsg(patience); err != nil {
				t.Errorf("%s: no answer: %v", row.name, err)
			}
		}
	}
}

func TestFeedRefusesWrongSettings(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	for name, cfg := range map[string]FeedConfig{
		"no handler":            {},
		"a heartbeat too often": {Handle: func(*Delivery) {}, Heartbeat: time.Millisecond},
		"a heartbeat backwards": {Handle: func(*Delivery) {}, Heartbeat: -time.Second},
	} {
		if _, err := b.NewFeed(cfg); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}
