package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Reasons given to FeedConfig.Gap.
const (
	GapReset = "reset" // the stream was made anew or has lost its end: positions in it mean nothing any more
	GapLost  = "lost"  // the hub removed events before they were fed
)

const (
	defaultHeartbeat = 500 * time.Millisecond
	feedQueue        = 8192
	feedInactive     = 30 * time.Second // the hub forgets the consumer of a bridge that died
	feedSettle       = 2 * time.Second  // how long a new leader may seem to be behind
)

// Why a feed's consumer is made anew, as the metric says it.
const (
	feedLink   = "link"
	feedGap    = "gap"
	feedSilent = "silent"
	feedHub    = "hub"
)

// Feed is one ordered consumer over all of POS, for the screens of a bridge. It
// delivers each event once, in stream order, from the ones stored after Run first
// reached the hub. What is lost on the way is asked for again; what cannot be had
// again is told (FeedConfig.Gap). Its state on the hub ends with it.
type Feed struct {
	// Fixed at birth.
	b     *Broker
	cfg   FeedConfig
	start time.Time
	queue int // events waiting for Handle; beyond, what comes is lost and asked for again

	contact atomic.Int64  // of the last sign of the hub: since start, in ns; 0 = none yet
	head    atomic.Uint64 // stream sequence of the last event handed on, or of what was there before

	// Owned by Run.
	created time.Time // of the stream; zero before the first contact
}

// NewFeed checks the settings and starts nothing.
func (b *Broker) NewFeed(cfg FeedConfig) (*Feed, error) {
	cfg.Heartbeat = cmp.Or(cfg.Heartbeat, defaultHeartbeat)
	if cfg.Heartbeat < 100*time.Millisecond {
		return nil, fmt.Errorf("feed: heartbeat %v is less than 100ms", cfg.Heartbeat)
	}
	if cfg.Handle == nil {
		return nil, errors.New("feed: no handler")
	}
	if cfg.Gap == nil {
		cfg.Gap = func(string) {}
	}
	return &Feed{b: b, cfg: cfg, start: time.Now(), queue: feedQueue}, nil
}

// LastContact is when the feed last heard from the hub's consumer: an event, or the
// heartbeat that stands for none. Zero before the first. It tells a quiet stream from
// a broken hop: without contact for some heartbeats, what screens show is old.
func (f *Feed) LastContact() time.Time {
	ns := f.contact.Load()
	if ns == 0 {
		return time.Time{}
	}
	return f.start.Add(time.Duration(ns))
}

// Head is the stream sequence up to which events have been handed on.
func (f *Feed) Head() uint64 { return f.head.Load() }

// feedError says why a consumer is made anew.
type feedError struct {
	reason string
	err    error
}

func (e *feedError) Error() string { return e.err.Error() }
func (e *feedError) Unwrap() error { return e.err }

// Run feeds until ctx ends, and then returns nil.
func (f *Feed) Run(ctx context.Context) error {
	for attempt := 1; ctx.Err() == nil; attempt++ {
		began := time.Now()
		err := f.feed(ctx)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errClosed) {
			return fmt.Errorf("feed: %w", err)
		}
		if time.Since(began) >= calm {
			attempt = 1
		}
		reason := feedHub
		if e, ok := errors.AsType[*feedError](err); ok {
			reason = e.reason
		}
		f.b.metrics.feedRestarts.WithLabelValues(reason).Inc()
		f.b.log.Warn("hub: feed starts again", "reason", reason, "attempt", attempt, "seq", f.Head(), "err", err)
		pause(ctx, jitter(attempt, takeoverMin, takeoverMax))
	}
	return nil
}

// feed makes one consumer and hands on what comes, until something ends that.
func (f *Feed) feed(ctx context.Context) (err error) {
	life, end, err := f.b.session(ctx)
	if err != nil {
		return err
	}
	defer end()
	defer func() {
		if err != nil && errors.Is(context.Cause(life), errLinkDown) {
			err = &feedError{feedLink, err}
		}
	}()
	if err := f.position(life); err != nil {
		return err
	}

	in := make(chan *nats.Msg, f.queue)
	inbox := f.b.nc.NewInbox()
	sub, err := f.b.nc.ChanSubscribe(inbox, in)
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	defer sub.Unsubscribe()
	name := "screens-" + f.b.name + "-" + inbox[len(inbox)-8:] // a new name for a new life: nothing of an old one can come
	consumer := jetstream.ConsumerConfig{
		Name:              name,
		Description:       "events for the screens of " + f.b.name,
		FilterSubject:     "pos.>",
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       f.Head() + 1,
		DeliverSubject:    inbox,
		AckPolicy:         jetstream.AckNonePolicy,
		MaxDeliver:        1,
		MemoryStorage:     true,
		Replicas:          1,
		FlowControl:       true,
		IdleHeartbeat:     f.cfg.Heartbeat,
		InactiveThreshold: feedInactive,
	}
	if _, err := f.b.js.CreatePushConsumer(life, streamPOS, consumer); err != nil {
		return fmt.Errorf("create consumer %s: %w", name, err)
	}
	defer func() {
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if f.b.Connected() {
			// Best effort: the hub forgets it by itself.
			_ = f.b.js.DeleteConsumer(last, streamPOS, name)
		}
	}()

	var (
		seen   uint64 // consumer sequence of the last event handed on
		silent = max(3*f.cfg.Heartbeat, time.Second)
		watch  = time.NewTimer(silent)
	)
	defer watch.Stop()
	for {
		select {
		case <-life.Done():
			return context.Cause(life)
		case <-watch.C:
			return &feedError{feedSilent, fmt.Errorf("consumer %s: silent for %v", name, silent)}
		case m := <-in:
			watch.Reset(silent)
			f.contact.Store(int64(max(time.Since(f.start), 1)))
			at, err := parseMeta(m.Reply)
			if err != nil {
				if err := f.control(m, seen); err != nil {
					return err
				}
				continue
			}
			if at.consumer != seen+1 {
				return &feedError{feedGap, fmt.Errorf("delivery %d came where %d was due", at.consumer, seen+1)}
			}
			seen++
			f.cfg.Handle(f.b.deliver(m, at))
			f.head.Store(at.stream)
		}
	}
}

// control answers the hub's word that is no event: a heartbeat, or the question
// whether we keep up.
func (f *Feed) control(m *nats.Msg, seen uint64) error {
	if code, description := status(m); code != "100" {
		return fmt.Errorf("consumer ended: %.10s %.100s", code, description)
	}
	if m.Reply != "" {
		return f.b.nc.Publish(m.Reply, nil)
	}
	if last, err := strconv.ParseUint(m.Header.Get("Nats-Last-Consumer"), 10, 64); err == nil && last != seen {
		return &feedError{feedGap, fmt.Errorf("%d were delivered, %d have come", last, seen)}
	}
	if stalled := m.Header.Get("Nats-Consumer-Stalled"); stalled != "" {
		return f.b.nc.Publish(stalled, nil)
	}
	return nil
}

// position compares the stream with the one that was fed from before, and leaves head
// at the sequence to go on behind.
func (f *Feed) position(ctx context.Context) error {
	for began := time.Now(); ; {
		stream, err := f.b.js.Stream(ctx, streamPOS)
		if err != nil {
			return fmt.Errorf("stream %s: %w", streamPOS, err)
		}
		info := stream.CachedInfo()
		head, first, last := f.Head(), info.State.FirstSeq, info.State.LastSeq
		switch {
		case f.created.IsZero(): // from now
			f.head.Store(last)
		case !info.Created.Equal(f.created):
			f.head.Store(last)
			f.cfg.Gap(GapReset)
		case last < head:
			// A server that has just become leader may not have caught up with itself.
			if time.Since(began) < feedSettle {
				if !pause(ctx, 100*time.Millisecond) {
					return context.Cause(ctx)
				}
				continue
			}
			f.head.Store(last)
			f.cfg.Gap(GapReset)
		case last > head && first > head+1:
			f.head.Store(first - 1)
			f.cfg.Gap(GapLost)
		}
		f.created = info.Created
		return nil
	}
}
