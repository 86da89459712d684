package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	pullGroup     = "own"            // the priority group of the partitions' consumers
	pullBatch     = 256              // messages asked for ahead
	pullExpires   = 5 * time.Second  // well below the pin's time to live
	pullHeartbeat = time.Second      // the consumer shows that it is there
	pullSilence   = 4 * time.Second  // so long without a sign, and it is not
	pullBehind    = 2 * time.Second  // so long a delivery may be on its way
	pinnedTTL     = 15 * time.Second // how long a pin outlives its client; a take-over does not wait for it

	unpinTimeout = 2 * time.Second // at a clean stop

	takeoverMin = 50 * time.Millisecond
	takeoverMax = 5 * time.Second
	calm        = 30 * time.Second // an ownership that held so long starts the back-off anew
)

// Why a partition is taken over again, as the metric says it.
const (
	takeoverStart  = "start"
	takeoverLink   = "link"   // the connection was lost
	takeoverGap    = "gap"    // a delivery was missing or out of place
	takeoverHub    = "hub"    // the hub ended or refused the consumer
	takeoverCaller = "caller" // the take-over callback failed
)

// takeoverError says why an ownership has ended.
type takeoverError struct {
	reason string
	err    error
}

func (e *takeoverError) Error() string { return e.err.Error() }
func (e *takeoverError) Unwrap() error { return e.err }

// ownership is one life of a partition's consumer in this process, from a take-over
// to the next.
type ownership struct{ over atomic.Bool }

// Takeover is what a new owner of a partition is told before its first event.
type Takeover struct {
	// OldestUnacked is when the hub stored the oldest event that is not acknowledged, by
	// the hub's clock; zero when there is none.
	OldestUnacked time.Time
	// Last is the stream's last sequence, read while nobody pulled: an event at or below
	// it may have been handed to an earlier owner, one above it was handed to nobody.
	Last uint64
}

// ConsumePartition owns partition p (0 ≤ p < Partitions) until ctx ends; it then gives
// the consumer free and returns nil. It hands each event to handle, one at a time, in
// stream order, from the oldest that was not acknowledged. handle must only enqueue:
// while it does not return, nothing is received.
//
// Before the first event, and again whenever deliveries could have been lost or come
// out of order (the connection was cut, the consumer or the stream was made anew, a
// delivery is missing), it takes the partition over: it waits until nobody pulls,
// frees a pin that a dead client left, resets the consumer to its acknowledgement
// floor and then calls takeover. takeover must drop everything queued, see attempts
// under way to their end, and only then read the reports (ReportsSince): every event
// that is not acknowledged comes again, in order, among them ones that are settled.
// Deliveries from before cannot be acknowledged any more (ErrStale). When takeover
// fails, all of this is repeated after a pause. It and handle are never called at the
// same time.
//
// As long as another client pulls, the partition is that one's and this call waits.
func (b *Broker) ConsumePartition(ctx context.Context, p int, takeover func(ctx context.Context, at Takeover) error, handle func(*Delivery)) error {
	if p < 0 || p >= b.partitions {
		return fmt.Errorf("consume partition %d: there are %d, from 0", p, b.partitions)
	}
	reason := takeoverStart
	for attempt := 1; ctx.Err() == nil; attempt++ {
		b.metrics.takeovers.WithLabelValues(reason).Inc()
		began := time.Now()
		err := b.own(ctx, p, takeover, handle)
		if ctx.Err() != nil {
			break
		}
		if errors.Is(err, errClosed) {
			return fmt.Errorf("consume partition %d: %w", p, err)
		}
		if time.Since(began) >= calm {
			attempt = 1
		}
		reason = takeoverHub
		if t, ok := errors.AsType[*takeoverError](err); ok {
			reason = t.reason
		}
		b.log.Warn("hub: partition will be taken over again", "partition", p, "reason", reason, "attempt", attempt, "err", err)
		pause(ctx, jitter(attempt, takeoverMin, takeoverMax))
	}
	return nil
}

// own takes the partition over and delivers until something ends that: the error, or ctx.
func (b *Broker) own(ctx context.Context, p int, takeover func(context.Context, Takeover) error, handle func(*Delivery)) (err error) {
	life, end, err := b.session(ctx)
	if err != nil {
		return err
	}
	defer end()
	defer func() {
		if err != nil && errors.Is(context.Cause(life), errLinkDown) {
			err = &takeoverError{takeoverLink, fmt.Errorf("%w: %w", errLinkDown, err)}
		}
	}()

	owner := &ownership{}
	b.mu.Lock()
	if before := b.owners[p]; before != nil {
		before.over.Store(true)
	}
	b.owners[p] = owner
	b.mu.Unlock()

	name := consumerName(p)
	at, err := b.takeOver(life, p, name)
	if err != nil {
		return err
	}
	if err := takeover(life, at); err != nil {
		return &takeoverError{takeoverCaller, fmt.Errorf("take-over: %w", err)}
	}
	b.log.Info("hub: partition taken over", "partition", p, "oldest_unacked", at.OldestUnacked, "last", at.Last)

	// A clean stop frees the pin, so that the next owner need not find out that we are gone.
	defer func() {
		if ctx.Err() == nil || !b.Connected() {
			return
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), unpinTimeout)
		defer cancel()
		if err := b.unpin(last, name); err != nil {
			b.log.Debug("hub: consumer left pinned", "partition", p, "err", err)
		}
	}()
	return b.deliverInOrder(life, name, owner, handle)
}

// takeOver leaves the consumer reset to its acknowledgement floor with nobody pulling
// from it.
//
// The order matters on a replicated consumer: deliveries under way when a reset is
// applied make it skip their sequences, so nobody may pull before it.
func (b *Broker) takeOver(ctx context.Context, p int, name string) (at Takeover, err error) {
	c, err := b.js.Consumer(ctx, streamPOS, name)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		// Replicated consumers live in memory, and a hub that lost all its servers at once
		// has lost them. The new one begins at the start of the stream; the reports say what
		// of that is done.
		replicas, rerr := b.replicas(ctx)
		if rerr != nil {
			return at, rerr
		}
		b.log.Warn("hub: consumer missing, made anew", "consumer", name)
		c, err = b.js.CreateConsumer(ctx, streamPOS, partitionConsumer(p, replicas))
	}
	if transient(err) {
		// The stream may well have a leader. A consumer in memory needs a server that has been
		// up with it all the time, and the votes of all others that have not.
		return at, fmt.Errorf("consumer %s has no leader; if that lasts, bring back all of the hub's servers, or delete it with `nats consumer rm %s %s`: it is then made anew: %w",
			name, streamPOS, name, err)
	}
	if err != nil {
		return at, fmt.Errorf("consumer %s: %w", name, err)
	}

	// A dead client's pulls go with its connection, or expire.
	deadline := time.Now().Add(pullExpires + time.Second)
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, 250*time.Millisecond) {
		info, err := c.Info(ctx)
		if err != nil {
			return at, fmt.Errorf("consumer %s: %w", name, err)
		}
		if info.NumWaiting == 0 {
			break
		}
		if time.Now().After(deadline) {
			return at, fmt.Errorf("consumer %s: another client is pulling (%d requests wait): stop the other bridge", name, info.NumWaiting)
		}
		if !pause(ctx, wait) {
			return at, context.Cause(ctx)
		}
	}
	if err := b.unpin(ctx, name); err != nil {
		return at, err
	}
	if !faultNoReset {
		if _, err := b.js.ResetConsumer(ctx, streamPOS, name); err != nil {
			return at, fmt.Errorf("reset consumer %s: %w", name, err)
		}
	}

	stream, err := b.js.Stream(ctx, streamPOS)
	if err != nil {
		return at, fmt.Errorf("stream %s: %w", streamPOS, err)
	}
	at.Last = stream.CachedInfo().State.LastSeq
	for {
		info, err := c.Info(ctx)
		if err != nil {
			return at, fmt.Errorf("consumer %s: %w", name, err)
		}
		if info.NumPending == 0 {
			return at, nil
		}
		m, err := b.askLeader(ctx, streamPOS, info.Config.FilterSubject, info.AckFloor.Stream+1)
		if err == nil {
			at.OldestUnacked = m.Stored
			return at, nil
		}
		if !errors.Is(err, ErrNone) {
			return at, fmt.Errorf("oldest event of %s: %w", name, err)
		}
		// It has just been removed by age, or the count was not yet up to date: look again.
		if !pause(ctx, 50*time.Millisecond) {
			return at, context.Cause(ctx)
		}
	}
}

func (b *Broker) unpin(ctx context.Context, consumer string) error {
	body, err := json.Marshal(struct {
		Group string `json:"group"`
	}{pullGroup})
	if err != nil {
		return err
	}
	m, err := b.request(ctx, "$JS.API.CONSUMER.UNPIN."+streamPOS+"."+consumer, body)
	if err != nil {
		return fmt.Errorf("unpin consumer %s: %w", consumer, err)
	}
	var answer struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fmt.Errorf("unpin consumer %s: %w", consumer, err)
	}
	if answer.Error != nil {
		return fmt.Errorf("unpin consumer %s: %w", consumer, answer.Error)
	}
	return nil
}

// deliverInOrder pulls from the consumer and hands on what comes, as long as the
// consumer's sequences are 1, 2, 3, …
//
// It speaks the pull protocol itself: nats.go's own loop asks again by itself after a
// reconnect, an election or a lost pin, where an owner must take over again first.
func (b *Broker) deliverInOrder(ctx context.Context, name string, owner *ownership, handle func(*Delivery)) error {
	gap := func(format string, args ...any) error {
		return &takeoverError{takeoverGap, fmt.Errorf("consumer %s: "+format, append([]any{name}, args...)...)}
	}
	ended := func(format string, args ...any) error {
		return &takeoverError{takeoverHub, fmt.Errorf("consumer %s: "+format, append([]any{name}, args...)...)}
	}

	// Never full: it holds what was asked for, and the status messages between.
	in := make(chan *nats.Msg, 4*pullBatch)
	inbox := b.nc.NewInbox()
	sub, err := b.nc.ChanSubscribe(inbox, in)
	if err != nil {
		return ended("subscribe: %w", err)
	}
	defer sub.Unsubscribe()

	var (
		next  = "$JS.API.CONSUMER.MSG.NEXT." + streamPOS + "." + name
		asked int    // messages asked for and neither come nor given back
		pin   string // ours, once the first message has told it
	)
	pull := func() error {
		request, err := json.Marshal(struct {
			Batch     int           `json:"batch"`
			Expires   time.Duration `json:"expires"`
			Heartbeat time.Duration `json:"idle_heartbeat"`
			Group     string        `json:"group"`
			PinID     string        `json:"id,omitempty"`
		}{pullBatch - asked, pullExpires, pullHeartbeat, pullGroup, pin})
		if err != nil {
			return err
		}
		if err := b.nc.PublishRequest(next, inbox, request); err != nil {
			return ended("pull: %w", err)
		}
		asked = pullBatch
		return nil
	}
	if err := pull(); err != nil {
		return err
	}

	expect := uint64(1)
	heard := time.Now()
	var behind time.Time // since when the hub says it has delivered more than has come; zero: it does not
	watch := time.NewTicker(pullHeartbeat)
	defer watch.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-watch.C:
			if time.Since(heard) > pullSilence {
				return ended("silent for %v", pullSilence)
			}
			continue
		case m := <-in:
			heard = time.Now()
			at, err := parseMeta(m.Reply)
			if err != nil { // no event, then: the hub's word about a pull
				given, err := pullStatus(m)
				if err != nil {
					return ended("%w", err)
				}
				asked -= given
				switch sent, err := strconv.ParseUint(m.Header.Get("Nats-Last-Consumer"), 10, 64); {
				case err != nil || sent < expect:
					behind = time.Time{}
				case behind.IsZero():
					behind = heard
				case heard.Sub(behind) > pullBehind: // and nothing comes that would show the gap
					return gap("delivery %d has not come, and the hub is at %d", expect, sent)
				}
				break
			}
			behind = time.Time{}
			if at.consumer != expect {
				return gap("delivery %d came where %d was due (stream sequence %d)", at.consumer, expect, at.stream)
			}
			expect++
			asked--
			if pins := m.Header["Nats-Pin-Id"]; len(pins) > 0 {
				pin = pins[len(pins)-1] // the hub's stands behind what an edge may have written
				delete(m.Header, "Nats-Pin-Id")
			}
			d := b.deliver(m, at)
			d.AckFunc = func() error { return b.ack(owner, m.Reply) }
			handle(d)
		}
		if asked < pullBatch/2 {
			if err := pull(); err != nil {
				return err
			}
		}
	}
}

// pullStatus reads a status message: how many messages of a pull will not come, or
// that pulling is over.
func pullStatus(m *nats.Msg) (int, error) {
	switch code, description := status(m); code {
	case "100": // heartbeat
		return 0, nil
	case "408": // the pull has expired
		n, err := parseUint(m.Header.Get("Nats-Pending-Messages"), pullBatch)
		if err != nil {
			return 0, fmt.Errorf("Nats-Pending-Messages: %w", err)
		}
		return int(n), nil
	default: // 409 deleted, 423 another client is pinned, 503 nobody there, …
		return 0, fmt.Errorf("%.10s %.100s", code, description)
	}
}

var ackPayload = []byte("+ACK")

func (b *Broker) ack(owner *ownership, reply string) error {
	if owner.over.Load() {
		return ErrStale
	}
	if err := b.nc.Publish(reply, ackPayload); err != nil {
		return fmt.Errorf("acknowledge: %w", err)
	}
	return nil
}
