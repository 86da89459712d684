package broker

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"
)

// ErrBehind: the hub's last event of the edge at the site is not the one that was said. The
// message is certainly not stored.
var ErrBehind = errors.New("the hub has another last event")

const (
	errWrongLastSequence = 10071
	errConditionInFlight = 10164 // on three servers: another message of the condition is being stored
	errBatchesOff        = 10205 // the stream takes no fast batches

	// batchTimeout is how long a batch may wait for the hub's acknowledgements.
	batchTimeout = 10 * time.Second
	batchFlow    = 200
	batchAhead   = 4 // so many flows may be unacknowledged
)

// lastSubject is what the last event of an edge at a site is found and compared by: it holds
// for all kinds, and for the partition that the stream puts in.
func lastSubject(site, edge string) string { return "pos.*." + site + ".*." + edge }

// expect makes the hub store msg only if the edge's last event of the site is at that
// sequence of POS; 0: if it has none.
func expect(msg *nats.Msg, e *Event, after uint64) {
	if faultNoCompare {
		return
	}
	msg.Header[jetstream.ExpectedLastSubjSeqHeader] = []string{strconv.FormatUint(after, 10)}
	msg.Header["Nats-Expected-Last-Subject-Sequence-Subject"] = []string{lastSubject(e.Site, e.Edge)}
}

// Session waits for a connection and returns a context that ends with it or with ctx.
// Error: ctx has ended, or the connection is closed for good.
func (b *Broker) Session(ctx context.Context) (context.Context, context.CancelFunc, error) {
	return b.session(ctx)
}

// Reconnect ends the connection and dials again at once.
func (b *Broker) Reconnect() error { return b.nc.ForceReconnect() }

// PublishAfter stores one event in POS, if the hub's last event of its edge at its site is
// the one at sequence after (0: there is none). It is one attempt. seq is the event's
// sequence.
//
// Errors: ErrBehind, ErrRejected (ErrAway and ErrDenied among them), ErrInvalid: certainly not
// stored. ErrUnknown.
func (b *Broker) PublishAfter(ctx context.Context, e *Event, after uint64) (seq uint64, err error) {
	msg, err := encodeEvent(e)
	if err != nil {
		return 0, err
	}
	expect(msg, e, after)
	link := b.up()
	if link == nil {
		return 0, &awayError{errLinkDown}
	}
	ack, v, err := b.attempt(ctx, link, streamPOS, msg)
	outcome := "stored"
	defer func() { b.metrics.published.WithLabelValues("event", outcome).Inc() }()
	switch {
	case v == stored && !ack.Duplicate:
		return ack.Seq, nil
	case v == stored:
		outcome = "duplicate"
		last, at, err := b.LastEvent(ctx, e.Site, e.Edge)
		if err == nil && last.Epoch == e.Epoch && last.Seq == e.Seq && last.Tag == e.Tag {
			return at, nil
		}
		return 0, fmt.Errorf("%w: it was called a duplicate of stream sequence %d, which it is not, or not any more", ErrUnknown, ack.Seq)
	case behind(err):
		outcome = "behind"
		return 0, fmt.Errorf("%w: %w", ErrBehind, err)
	case v == open:
		outcome = "unknown"
		return 0, fmt.Errorf("%w: %w", ErrUnknown, err)
	case v == missed:
		outcome = "rejected"
		return 0, &awayError{err}
	}
	outcome = "rejected"
	return 0, fmt.Errorf("%w: %w", ErrRejected, err)
}

// up is the link, nil when there is none.
func (b *Broker) up() context.Context {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.link
}

func behind(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && (api.ErrorCode == errWrongLastSequence || api.ErrorCode == errConditionInFlight)
}

// Next is one event of a batch.
type Next struct {
	Event *Event
	// First: it is the first of its edge and site in the batch, and stored only if the hub's
	// last one is at sequence After of POS (0: there is none). The others follow it.
	First bool
	After uint64
}

// PublishBatch stores events in POS in their order, by one fast batch that ends at the first
// one that is not stored. It returns how many are certainly stored, from the front; the error
// is nil only when all are. After an error more of them may be: look again.
//
// Errors as PublishAfter's. A hub whose stream takes no batches gets the events one by one.
func (b *Broker) PublishBatch(ctx context.Context, batch []Next) (done int, err error) {
	if len(batch) == 0 {
		return 0, nil
	}
	if b.oneByOne.Load() {
		return b.publishEach(ctx, batch)
	}
	link := b.up()
	if link == nil {
		return 0, &awayError{errLinkDown}
	}
	var mu sync.Mutex
	var first error // Guarded by mu: the hub's first complaint
	fp, err := jetstreamext.NewFastPublisher(b.js,
		jetstreamext.FastPublishFlowControl{Flow: batchFlow, MaxOutstandingAcks: batchAhead, AckTimeout: batchTimeout},
		jetstreamext.WithFastPublisherErrorHandler(func(err error) {
			mu.Lock()
			defer mu.Unlock()
			if first == nil {
				first = err
			}
		}))
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	complaint := func() error {
		mu.Lock()
		defer mu.Unlock()
		return first
	}
	end := func(err error) error {
		if c := complaint(); c != nil {
			err = c
		}
		switch {
		case behind(err):
			return fmt.Errorf("%w: %w", ErrBehind, err)
		case link.Err() != nil:
			return fmt.Errorf("%w: %w", ErrUnknown, context.Cause(link))
		}
		return fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	for i := range batch {
		msg, err := encodeEvent(batch[i].Event)
		if err != nil {
			if i == 0 {
				return 0, err
			}
			break // what comes before it is stored; it is the first of the next one
		}
		if batch[i].First {
			expect(msg, batch[i].Event, batch[i].After)
		}
		if link.Err() != nil || ctx.Err() != nil || complaint() != nil {
			break
		}
		if _, err := fp.AddMsg(msg); err != nil {
			if api, ok := errors.AsType[*jetstream.APIError](err); i == 0 && ok && api.ErrorCode == errBatchesOff {
				b.oneByOne.Store(true)
				b.log.Warn("hub: stream POS takes no batches, so a backlog is sent one by one: let the stream allow batch publishing", "err", err)
				return b.publishEach(ctx, batch)
			}
			return 0, end(err)
		}
	}
	wait, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	defer context.AfterFunc(link, cancel)()
	ack, err := fp.Close(wait)
	if err != nil {
		return 0, end(err)
	}
	done = min(int(ack.BatchSize), len(batch))
	b.metrics.published.WithLabelValues("event", "stored").Add(float64(done))
	if done < len(batch) {
		return done, end(fmt.Errorf("the hub took %d of %d", done, len(batch)))
	}
	return done, nil
}

func (b *Broker) publishEach(ctx context.Context, batch []Next) (int, error) {
	at := make(map[[2]string]uint64)
	for i, n := range batch {
		of := [2]string{n.Event.Site, n.Event.Edge}
		if n.First {
			at[of] = n.After
		}
		seq, err := b.PublishAfter(ctx, n.Event, at[of])
		if err != nil {
			return i, err
		}
		at[of] = seq
	}
	return len(batch), nil
}
