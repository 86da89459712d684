package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// hub is a hub and the bench's way into it.
type hub struct {
	url string
	pub *broker.Broker      // publishes as an edge does
	js  jetstream.JetStream // looks at what is stored
}

// startHub runs a hub as a process of its own.
func (c *crew) startHub(ctx context.Context, label, sync string, partitions int) (*hub, error) {
	listen, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	admin, err := stack.FreeAddr("")
	if err != nil {
		return nil, err
	}
	if _, err := c.start(ctx, "hub", label, admin, "-admin", admin, "-listen", listen, "-sync", sync,
		"-partitions", strconv.Itoa(partitions), "-data", c.file(label)); err != nil {
		return nil, err
	}
	return c.enter(ctx, "nats://"+listen)
}

// enter connects to a hub that runs.
func (c *crew) enter(ctx context.Context, url string) (*hub, error) {
	h := &hub{url: url}
	var err error
	h.pub, err = broker.Connect(ctx, broker.ConnectConfig{HubConfig: broker.HubConfig{URLs: []string{url}}, Name: benchEdge, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	c.later(h.pub.Close)
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, err
	}
	c.later(func() error { nc.Close(); return nil })
	h.js, err = jetstream.New(nc)
	return h, err
}

// stored is how many messages a stream holds.
func (h *hub) stored(ctx context.Context, stream string) (int, error) {
	s, err := h.js.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	return int(s.CachedInfo().State.Msgs), nil
}

// last is the body of the last message of a subject.
func (h *hub) last(ctx context.Context, stream, subject string) ([]byte, error) {
	s, err := h.js.Stream(ctx, stream)
	if err != nil {
		return nil, err
	}
	m, err := s.GetLastMsgForSubject(ctx, subject)
	if err != nil {
		return nil, fmt.Errorf("last message of %s: %w", subject, err)
	}
	return m.Data, nil
}

// planned is an event that is to be published.
type planned struct {
	event *broker.Event
	site  int // the events of one site are published one after the other
}

// publishers is how many goroutines publish. Each waits for its acknowledgement, so they
// bound what is on its way.
const publishers = 32

// publish stores the events, the i-th no earlier than i/rate after the start. sent is
// called just before each leaves, by many goroutines; nil is fine.
func (h *hub) publish(ctx context.Context, events []planned, rate float64, sent func(i int)) error {
	lanes := make([][]int, publishers)
	for i, e := range events {
		lanes[e.site%publishers] = append(lanes[e.site%publishers], i)
	}
	start := time.Now()
	errs := make([]error, publishers)
	var wg sync.WaitGroup
	for n, lane := range lanes {
		wg.Go(func() {
			for _, i := range lane {
				if err := until(ctx, start.Add(time.Duration(float64(i)/rate*float64(time.Second)))); err != nil {
					errs[n] = err
					return
				}
				if sent != nil {
					sent(i)
				}
				if _, duplicate, err := h.pub.PublishEvent(ctx, events[i].event); err != nil || duplicate {
					errs[n] = errors.Join(err, fmt.Errorf("publish event %d (duplicate: %t)", i, duplicate))
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// until waits for a time.
func until(ctx context.Context, t time.Time) error {
	d := time.Until(t)
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// settleLimit is how long what was sent may take to arrive after the last was sent.
const settleLimit = 20 * time.Second

// eventually polls until done says so. what it says otherwise is the error at the end.
func eventually(ctx context.Context, done func() (bool, string, error)) error {
	limit := time.Now().Add(settleLimit)
	for {
		ok, what, err := done()
		if ok || err != nil {
			return err
		}
		if time.Now().After(limit) {
			return fmt.Errorf("not complete %v after the end: %s", settleLimit, what)
		}
		if err := until(ctx, time.Now().Add(5*time.Millisecond)); err != nil {
			return fmt.Errorf("%w: %s", err, what)
		}
	}
}
