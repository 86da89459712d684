package conformance

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// push makes a consumer as the feed of the screens has one.
func (h *hub) push(t testing.TB, s jetstream.Stream, inbox string) {
	t.Helper()
	must(t, func(ctx context.Context) error {
		_, err := h.js.CreatePushConsumer(ctx, name(s), jetstream.ConsumerConfig{
			Name: "screens", DeliverSubject: inbox,
			DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: 1,
			AckPolicy: jetstream.AckNonePolicy, MaxDeliver: 1, MemoryStorage: true, Replicas: 1,
			FlowControl: true, IdleHeartbeat: 100 * time.Millisecond, InactiveThreshold: 30 * time.Second,
		})
		return err
	})
}

func TestPushHeartbeatTellsTheLastDelivery(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 0)
		subject := s.CachedInfo().Config.Subjects[0]
		sub := subscribe(t, h.nc, h.nc.NewInbox())
		h.push(t, s, sub.Subject)
		for n := range 3 { // deliveries so far
			code, m := status(t, sub)
			if code != "100" || m.Reply != "" || last(m, hdrLastConsumer) != fmt.Sprint(n) || last(m, hdrLastStream) != fmt.Sprint(n) {
				t.Errorf("after %d deliveries: %s %v, want a heartbeat that says so", n, code, m.Header)
			}
			store(t, h.nc, subject, nil, "")
			for { // one more heartbeat may be on its way
				if m := next(t, sub); m.Header.Get("Status") == "" {
					at, err := m.Metadata()
					if err != nil || at.Sequence.Consumer != uint64(n+1) {
						t.Fatalf("delivery %d: %v, %v", n+1, at, err)
					}
					break
				}
			}
		}
	})
}

func TestLostDeliveryShowsInTheNextHeartbeatAndTheNextDelivery(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		const n = 50
		s := h.events(t, 0)
		subject := s.CachedInfo().Config.Subjects[0]
		// The client drops what does not fit.
		nc := h.connect(t, nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		in := make(chan *nats.Msg, 2)
		sub, err := nc.ChanSubscribe(nc.NewInbox(), in)
		if err != nil {
			t.Fatal(err)
		}
		h.push(t, s, sub.Subject)
		var msgs []*nats.Msg
		for range n {
			msgs = append(msgs, &nats.Msg{Subject: subject})
		}
		sendAtOnce(t, h.nc, msgs...)
		eventually(t, "most are dropped", func() bool {
			dropped, err := sub.Dropped()
			return err == nil && dropped >= n/2
		})

		came := 0
		lost := false
		for !lost {
			select {
			case m := <-in:
				if _, err := m.Metadata(); err == nil {
					came++
				} else {
					lost = last(m, hdrLastConsumer) == fmt.Sprint(n)
				}
			case <-time.After(patience):
				t.Fatalf("no heartbeat tells of %d deliveries", n)
			}
		}
		if came >= n {
			t.Fatalf("all %d came: nothing was lost", n)
		}
		store(t, h.nc, subject, nil, "")
		for {
			select {
			case m := <-in:
				at, err := m.Metadata()
				if err != nil {
					continue // a heartbeat that was on its way
				}
				if at.Sequence.Consumer != n+1 {
					t.Errorf("delivery %d after %d that came, want %d: the lost ones count", at.Sequence.Consumer, came, n+1)
				}
				return
			case <-time.After(patience):
				t.Fatal("no delivery")
			}
		}
	})
}

func TestFlowControlHoldsDeliveriesBackUntilItIsAnswered(t *testing.T) {
	for _, way := range []string{"the question", "the heartbeat that repeats it"} {
		t.Run("answer_to_"+strings.ReplaceAll(way, " ", "_"), func(t *testing.T) {
			onEach(t, func(t *testing.T, h *hub) {
				const n = 48 // of 64 KiB: more than the hub sends unasked
				subject := root()
				s := h.stream(t, jetstream.StreamConfig{Subjects: []string{subject}})
				for range n {
					store(t, h.nc, subject, nil, strings.Repeat("x", 64<<10))
				}
				sub := subscribe(t, h.nc, h.nc.NewInbox())
				h.push(t, s, sub.Subject)

				var question, stalled string
				came := uint64(0)
				for stalled == "" {
					m := next(t, sub)
					if at, err := m.Metadata(); err == nil {
						if came++; at.Sequence.Consumer != came {
							t.Fatalf("delivery %d came as number %d", at.Sequence.Consumer, came)
						}
						continue
					}
					if code := m.Header.Get("Status"); code != "100" {
						t.Fatalf("status %s %v", code, m.Header)
					}
					if m.Reply != "" {
						question = m.Reply
					}
					stalled = last(m, hdrStalled)
				}
				if came == 0 || came == n {
					t.Fatalf("%d of %d came before an answer", came, n)
				}
				if question == "" || question != stalled {
					t.Fatalf("asked at %q, and the heartbeat says %q", question, stalled)
				}
				reply := question
				if way != "the question" {
					reply = stalled
				}
				if err := h.nc.Publish(reply, nil); err != nil {
					t.Fatal(err)
				}
				for came < n {
					m := next(t, sub)
					if at, err := m.Metadata(); err == nil {
						if came++; at.Sequence.Consumer != came {
							t.Fatalf("delivery %d came as number %d", at.Sequence.Consumer, came)
						}
					} else if m.Reply != "" {
						if err := h.nc.Publish(m.Reply, nil); err != nil {
							t.Fatal(err)
						}
					}
				}
			})
		})
	}
}
