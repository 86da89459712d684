package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const group = "own"

// events stores n messages on one subject of a new stream.
func (h *hub) events(t testing.TB, n int) jetstream.Stream {
	t.Helper()
	subject := root()
	s := h.stream(t, jetstream.StreamConfig{Subjects: []string{subject}})
	more(t, h.nc, subject, n)
	return s
}

func more(t testing.TB, nc *nats.Conn, subject string, n int) {
	t.Helper()
	for range n {
		store(t, nc, subject, nil, "")
	}
}

// consumer makes a consumer as each partition has one: in memory where it is replicated.
func (h *hub) consumer(t testing.TB, s jetstream.Stream, change func(*jetstream.ConsumerConfig)) jetstream.Consumer {
	t.Helper()
	cfg := jetstream.ConsumerConfig{
		Durable: "d", DeliverPolicy: jetstream.DeliverAllPolicy, AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: 2 * time.Minute, MaxDeliver: -1, MaxAckPending: 4096, MaxWaiting: 64, MemoryStorage: h.replicas > 1,
	}
	if change != nil {
		change(&cfg)
	}
	var c jetstream.Consumer
	must(t, func(ctx context.Context) (err error) {
		c, err = s.CreateConsumer(ctx, cfg)
		return err
	})
	h.known(t, "$JS.API.CONSUMER.MSG.NEXT."+name(s)+"."+cfg.Durable, nil, []byte("{")) // a bad request
	return c
}

func pinned(ttl time.Duration) func(*jetstream.ConsumerConfig) {
	return func(c *jetstream.ConsumerConfig) {
		c.PriorityPolicy, c.PriorityGroups, c.PinnedTTL = jetstream.PriorityPolicyPinned, []string{group}, ttl
	}
}

func unpin(t testing.TB, nc *nats.Conn, c jetstream.Consumer) {
	t.Helper()
	info := c.CachedInfo()
	must(t, func(ctx context.Context) error {
		return call(ctx, nc, "$JS.API.CONSUMER.UNPIN."+info.Stream+"."+info.Name, fmt.Appendf(nil, `{"group":%q}`, group), &struct{}{})
	})
}

func reset(t testing.TB, h *hub, c jetstream.Consumer) {
	t.Helper()
	info := c.CachedInfo()
	must(t, func(ctx context.Context) error {
		_, err := h.js.ResetConsumer(ctx, info.Stream, info.Name)
		return err
	})
}

// inOrder takes the next deliveries, and checks both sequences of each.
func inOrder(t testing.TB, sub *nats.Subscription, n int, stream, consumer uint64) []*nats.Msg {
	t.Helper()
	var all []*nats.Msg
	for i := range uint64(n) {
		m, at := delivery(t, sub)
		if at.Sequence.Stream != stream+i || at.Sequence.Consumer != consumer+i {
			t.Fatalf("stream sequence %d came as delivery %d, want %d as %d", at.Sequence.Stream, at.Sequence.Consumer, stream+i, consumer+i)
		}
		if at.NumDelivered != 1 {
			t.Errorf("stream sequence %d counts as delivered %d times", at.Sequence.Stream, at.NumDelivered)
		}
		all = append(all, m)
	}
	return all
}

func TestResetWhileNobodyPullsDeliversAgainFromTheOldestUnacknowledged(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 6)
		c := h.consumer(t, s, pinned(time.Minute))
		first := inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 6, Expires: time.Minute, Group: group}), 6, 1, 1)
		for _, i := range []int{0, 1, 3} { // 3, 5 and 6 stay open
			acknowledge(t, h.nc, first[i].Reply)
		}
		eventually(t, "three acknowledged", func() bool {
			info := consumerInfo(t, c)
			return info.AckFloor.Stream == 2 && info.NumAckPending == 3
		})
		if n := consumerInfo(t, c).NumWaiting; n != 0 {
			t.Fatalf("%d pulls wait", n)
		}

		unpin(t, h.nc, c)
		reset(t, h, c)
		info := consumerInfo(t, c)
		if info.AckFloor.Stream != 2 || info.AckFloor.Consumer != 0 || info.Delivered.Consumer != 0 {
			t.Errorf("after the reset the floor is %+v, delivered %+v", info.AckFloor, info.Delivered)
		}
		// What is acknowledged behind the floor counts as pending again.
		if info.NumPending != 4 || info.NumAckPending != 0 || info.NumRedelivered != 0 {
			t.Errorf("after the reset %d are pending, %d unacknowledged, %d redelivered; want 4, 0, 0", info.NumPending, info.NumAckPending, info.NumRedelivered)
		}
		more(t, h.nc, s.CachedInfo().Config.Subjects[0], 1)
		inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 5, Expires: time.Minute, Group: group}), 5, 3, 1)
	})
}

func TestAcknowledgementFromBeforeAResetSettlesTheSameStreamSequence(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 3)
		c := h.consumer(t, s, nil)
		before := inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 3, Expires: time.Minute}), 3, 1, 1)
		acknowledge(t, h.nc, before[0].Reply)
		reaches(t, c, 1)
		reset(t, h, c)
		inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 2, Expires: time.Minute}), 2, 2, 1)
		acknowledge(t, h.nc, before[1].Reply) // it was delivery 2, and is now delivery 1
		reaches(t, c, 2)
	})
}

// A reset that meets deliveries under way can leave some out: a pull of a client that has
// just died takes them, and on three nodes one that waits for its quorum takes the place
// of its copy. Whether it happens is luck and only told (go test -v); what must hold is
// that it shows. What a dead client was sent comes again at once, in the same count and
// not marked as redelivered.
func TestDeliveriesContiguousAfterAnyResetSkipNothing(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		const n, rounds = 200, 3
		subject := root()
		s := h.stream(t, jetstream.StreamConfig{Subjects: []string{subject}})
		var msgs []*nats.Msg
		for range n {
			msgs = append(msgs, &nats.Msg{Subject: subject})
		}
		sendAtOnce(t, h.nc, msgs...)
		c := h.consumer(t, s, nil)
		gaps, copies := 0, 0
		for range rounds {
			eventually(t, "nobody pulls", func() bool { return consumerInfo(t, c).NumWaiting == 0 })
			reset(t, h, c)
			other := h.connect(t)
			delivery(t, pull(t, other, c, pullRequest{Batch: n, Expires: time.Minute}))
			other.Close()
			reset(t, h, c)
			sub := pull(t, h.nc, c, pullRequest{Batch: 2 * n, Expires: time.Minute})
			gap, again := contiguous(t, sub, n)
			if copies += again; gap {
				gaps++
			}
			if err := sub.Unsubscribe(); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("%d of %d resets left a gap; %d copies", gaps, rounds, copies)
	})
}

// contiguous reads deliveries until stream sequence n has come, or until the first that
// is missing or out of place. Before that no stream sequence may be left out.
func contiguous(t *testing.T, sub *nats.Subscription, n uint64) (gap bool, copies int) {
	t.Helper()
	highest := uint64(0)
	for want := uint64(1); highest < n; want++ {
		m, err := sub.NextMsg(500 * time.Millisecond)
		if err != nil {
			return true, copies
		}
		at, err := m.Metadata()
		if err != nil {
			t.Fatal(err)
		}
		if at.Sequence.Consumer != want {
			return true, copies
		}
		switch seq := at.Sequence.Stream; {
		case seq <= highest:
			copies++
		case seq == highest+1:
			highest = seq
		default:
			t.Fatalf("no gap shows, and stream sequence %d came after %d, as delivery %d", seq, highest, want)
		}
	}
	return false, copies
}

func TestUnpinFreesAPinAtOnce(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 1)
		c := h.consumer(t, s, pinned(time.Minute))
		owner, heir := h.connect(t), h.connect(t)
		m, _ := delivery(t, pull(t, owner, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group}))
		pin := last(m, hdrPinID)
		if pin == "" {
			t.Fatalf("no pin in %v", m.Header)
		}
		waits := pull(t, heir, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group})
		more(t, h.nc, s.CachedInfo().Config.Subjects[0], 1)
		eventually(t, "the heir's pull waits, though there is a message", func() bool {
			info := consumerInfo(t, c)
			return info.NumWaiting == 1 && info.NumPending == 1
		})

		unpin(t, h.nc, c)
		m, at := delivery(t, waits) // within patience, a third of the pin's time
		if at.Sequence.Stream != 2 {
			t.Errorf("the heir got %d, want 2", at.Sequence.Stream)
		}
		if heirs := last(m, hdrPinID); heirs == "" || heirs == pin {
			t.Errorf("the heir's pin is %q, the owner's was %q", heirs, pin)
		}
		// The owner learns it from its next pull.
		more(t, h.nc, s.CachedInfo().Config.Subjects[0], 1)
		code, m := status(t, pull(t, owner, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group, PinID: pin}))
		if code != "423" {
			t.Errorf("a pull with a lost pin ends with %s %s, want 423", code, m.Header.Get("Description"))
		}
	})
}

func TestPinOutlivesItsClientUntilItsTimeToLive(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		const ttl = 700 * time.Millisecond
		s := h.events(t, 2)
		c := h.consumer(t, s, pinned(ttl))
		owner := h.connect(t)
		began := time.Now()
		delivery(t, pull(t, owner, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group}))
		owner.Close()

		delivery(t, pull(t, h.nc, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group}))
		if took := time.Since(began); took < ttl {
			t.Errorf("another client got a message %v after the pin's last sign, its time to live is %v", took, ttl)
		}
	})
}

func TestPinIsToldBehindAPublishedHeaderOfItsName(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		subject := root()
		s := h.stream(t, jetstream.StreamConfig{Subjects: []string{subject}})
		store(t, h.nc, subject, header(hdrPinID, "forged"), "")
		c := h.consumer(t, s, pinned(time.Minute))
		m, _ := delivery(t, pull(t, h.nc, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group}))
		if pins := m.Header[hdrPinID]; len(pins) != 2 || pins[0] != "forged" || pins[1] == "" || pins[1] == "forged" {
			t.Fatalf("pins %q, want the forged one and behind it the hub's", pins)
		}
		more(t, h.nc, subject, 1)
		delivery(t, pull(t, h.nc, c, pullRequest{Batch: 1, Expires: time.Minute, Group: group, PinID: last(m, hdrPinID)}))
	})
}

func TestPullsOfADeadClientGoWithItsConnection(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		c := h.consumer(t, h.events(t, 0), pinned(time.Minute))
		dead := h.connect(t)
		pull(t, dead, c, pullRequest{Batch: 10, Expires: 5 * time.Minute, Group: group})
		eventually(t, "the pull waits", func() bool { return consumerInfo(t, c).NumWaiting == 1 })
		dead.Close()
		eventually(t, "no pull waits", func() bool { return consumerInfo(t, c).NumWaiting == 0 })
	})
}

func TestPullHeartbeatTellsTheLastDelivery(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		c := h.consumer(t, h.events(t, 2), nil)
		sub := pull(t, h.nc, c, pullRequest{Batch: 5, Expires: time.Minute, Heartbeat: 100 * time.Millisecond})
		inOrder(t, sub, 2, 1, 1)
		code, m := status(t, sub)
		if code != "100" || last(m, hdrLastConsumer) != "2" || last(m, hdrLastStream) != "2" {
			t.Errorf("heartbeat %s %v, want 100 with delivery 2 of stream sequence 2", code, m.Header)
		}
		if m.Reply != "" {
			t.Errorf("a heartbeat asks for a reply to %s", m.Reply)
		}
	})
}

func TestExpiredPullGivesBackWhatDidNotCome(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		c := h.consumer(t, h.events(t, 2), nil)
		sub := pull(t, h.nc, c, pullRequest{Batch: 5, Expires: 200 * time.Millisecond})
		inOrder(t, sub, 2, 1, 1)
		if code, m := status(t, sub); code != "408" || last(m, hdrPending) != "3" {
			t.Errorf("expired pull: %s %v, want 408 with 3 pending", code, m.Header)
		}
	})
}

func TestDeletedConsumerEndsItsPulls(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 0)
		c := h.consumer(t, s, nil)
		sub := pull(t, h.nc, c, pullRequest{Batch: 5, Expires: time.Minute})
		eventually(t, "the pull waits", func() bool { return consumerInfo(t, c).NumWaiting == 1 })
		must(t, func(ctx context.Context) error { return s.DeleteConsumer(ctx, "d") })
		if code, m := status(t, sub); code != "409" {
			t.Errorf("pull of a deleted consumer: %s %v, want 409", code, m.Header)
		}
	})
}

func TestDeliveryTellsItsSequencesInItsReplySubject(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 1)
		c := h.consumer(t, s, nil)
		m, at := delivery(t, pull(t, h.nc, c, pullRequest{Batch: 1, Expires: time.Minute}))
		want := fmt.Sprintf("$JS.ACK.%s.d.1.1.1.%d.0", name(s), at.Timestamp.UnixNano())
		if m.Reply != want {
			t.Errorf("reply subject is %s, want %s", m.Reply, want)
		}
	})
}

func TestConsumersOfAStreamAreLimited(t *testing.T) {
	limited := func(t *testing.T, h *hub, max, limit int) {
		s := h.stream(t, jetstream.StreamConfig{Subjects: []string{root()}, MaxConsumers: max})
		create := func(name string) error {
			return ask(t, func(ctx context.Context) error {
				_, err := s.CreateConsumer(ctx, jetstream.ConsumerConfig{Name: name, AckPolicy: jetstream.AckNonePolicy, MemoryStorage: true, Replicas: 1})
				return err
			})
		}
		var wg sync.WaitGroup
		next := make(chan int, limit)
		for i := range limit {
			next <- i
		}
		close(next)
		for range 8 {
			wg.Go(func() {
				for i := range next {
					if err := create(fmt.Sprintf("c%d", i)); err != nil {
						t.Errorf("consumer %d of %d: %v", i, limit, err)
					}
				}
			})
		}
		wg.Wait()
		api, ok := errors.AsType[*jetstream.APIError](create("one-more"))
		if !ok || api.ErrorCode != errMaxConsumers || !strings.Contains(api.Description, "maximum consumers limit") {
			t.Errorf("consumer %d of %d: %v, want error %d", limit+1, limit, api, errMaxConsumers)
		}
	}
	onEach(t, func(t *testing.T, h *hub) { limited(t, h, 3, 3) })
	t.Run("1000_when_the_stream_says_unlimited", func(t *testing.T) { limited(t, singleHub(t, single()), -1, 1000) })
}
