package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// attemptTimeout is how long one publish waits for its acknowledgement before it is
	// repeated: longer than an fsync should take, shorter than an election does.
	attemptTimeout = 2 * time.Second
	retryMin       = 50 * time.Millisecond
	retryMax       = time.Second
)

// What a JetStream error in an acknowledgement can mean beside "refused".
const (
	codeTooManyRequests = 429   // the stream's queue is full; HTTP-like code
	errClusterNotAvail  = 10008 // no leader now
	errDuplicateInWork  = 10158 // the same id is being stored: an earlier attempt, whose end is open
)

// PublishEvent stores an event in POS. It repeats the attempt, under the same id, over
// lost connections, elections and full queues until the hub has answered or ctx ends.
// seq is the event's sequence in POS. duplicate: the hub had it already, from an
// earlier attempt or call within its duplicate window; seq is then that one's.
//
// The hub's word that something came twice does not say that it was this event: it
// compares ids only, and over all subjects. So the event is then looked for; when it is
// not its edge's last one of the site, its outcome is unknown. Of one (site, edge) call
// it for one event at a time.
//
// Errors: ErrInvalid, ErrRejected (ErrAway among them), ErrUnknown. After ErrUnknown
// publish the same event again before any newer one of its site.
func (b *Broker) PublishEvent(ctx context.Context, e *Event) (seq uint64, duplicate bool, err error) {
	msg, err := encodeEvent(e)
	if err != nil {
		return 0, false, err
	}
	ack, err := b.publish(ctx, "event", streamPOS, msg)
	if err != nil || !ack.Duplicate {
		return ack.Seq, false, err
	}
	last, at, err := b.LastEvent(ctx, e.Site, e.Edge)
	switch {
	case err != nil:
		return 0, true, fmt.Errorf("%w: it was called a duplicate: %w", ErrUnknown, err)
	case last.Epoch != e.Epoch || last.Seq != e.Seq || last.Tag != e.Tag:
		b.log.Error("hub: an event was called a duplicate, but the hub does not have it",
			"site", e.Site, "kind", e.Kind, "edge", e.Edge, "id", e.ID, "seq", e.Seq)
		return 0, true, fmt.Errorf("%w: it was called a duplicate of stream sequence %d, which it is not", ErrUnknown, ack.Seq)
	}
	return at, true, nil
}

// PublishReport stores a report in KITCHEN, as PublishEvent stores an event. A report
// of a delivery that the hub has one of already, within its duplicate window, is not
// stored again, whatever it says: the first terminal state wins.
func (b *Broker) PublishReport(ctx context.Context, r *Report) error {
	msg, err := encodeReport(r)
	if err != nil {
		return err
	}
	_, err = b.publish(ctx, "report", streamKitchen, msg)
	return err
}

// PublishDeadLetter stores a delivery that was given up in DLQ, as PublishEvent stores
// an event; once for each endpoint within DLQ's duplicate window of 24 hours.
func (b *Broker) PublishDeadLetter(ctx context.Context, d DeadLetter) error {
	msg, err := encodeDeadLetter(d)
	if err != nil {
		return err
	}
	_, err = b.publish(ctx, "dead-letter", streamDLQ, msg)
	return err
}

type pubAck struct {
	Error     *jetstream.APIError `json:"error"`
	Stream    string              `json:"stream"`
	Seq       uint64              `json:"seq"`
	Duplicate bool                `json:"duplicate"`
}

// verdict is what one attempt says about its message.
type verdict int

const (
	stored  verdict = iota
	refused         // certainly not stored, and trying again is of no use now
	missed          // certainly not stored by this attempt
	open            // nobody knows
)

func (b *Broker) publish(ctx context.Context, what, stream string, msg *nats.Msg) (pubAck, error) {
	ack, err := b.until(ctx, func(link context.Context) (pubAck, verdict, error) {
		return b.attempt(ctx, link, stream, msg)
	})
	outcome := "stored"
	switch {
	case errors.Is(err, ErrRejected):
		outcome = "rejected"
	case err != nil:
		outcome = "unknown"
	case ack.Duplicate:
		outcome = "duplicate"
	}
	b.metrics.published.WithLabelValues(what, outcome).Inc()
	if err != nil {
		return ack, fmt.Errorf("publish %s to %s: %w", what, msg.Subject, err)
	}
	return ack, nil
}

// until repeats attempts until one is stored or refused, or ctx ends, and puts what all
// of them say into one error.
func (b *Broker) until(ctx context.Context, attempt func(link context.Context) (pubAck, verdict, error)) (pubAck, error) {
	unknown := false  // an attempt may have been stored: only the hub's yes can still settle it
	answered := false // the last attempt was the hub's to refuse
	var why error
	for n := 1; ; n++ {
		link, err := b.await(ctx)
		if err != nil {
			if why == nil {
				why = err
			}
			break
		}
		ack, v, err := attempt(link)
		if v == stored {
			return ack, nil
		}
		why = err
		unknown = unknown || v == open
		_, answered = errors.AsType[*jetstream.APIError](err)
		answered = answered || v == refused
		if v == refused && !unknown || errors.Is(err, nats.ErrConnectionClosed) {
			break
		}
		if !pause(ctx, retryMin/2+jitter(n, retryMin, retryMax)) {
			break
		}
		b.metrics.retries.Inc()
	}
	switch {
	case unknown:
		return pubAck{}, fmt.Errorf("%w: %w", ErrUnknown, why)
	case answered:
		return pubAck{}, fmt.Errorf("%w: %w", ErrRejected, why)
	}
	return pubAck{}, &awayError{why}
}

func (b *Broker) attempt(ctx, link context.Context, stream string, msg *nats.Msg) (pubAck, verdict, error) {
	ctx, done := b.asks(ctx, link, msg.Subject, attemptTimeout)
	defer done()
	if link.Err() != nil {
		return pubAck{}, missed, context.Cause(link)
	}
	if ctx.Err() != nil {
		return pubAck{}, missed, context.Cause(ctx)
	}
	reply, err := b.nc.RequestMsgWithContext(ctx, msg)
	switch {
	case err == nil:
	case errors.Is(err, nats.ErrNoResponders):
		// The server we are connected to knew nobody to give it to.
		return pubAck{}, missed, fmt.Errorf("no stream answers for %s: %w", msg.Subject, err)
	case errors.Is(err, nats.ErrMaxPayload):
		return pubAck{}, refused, fmt.Errorf("larger than the hub takes: %w", err)
	case errors.Is(err, nats.ErrReconnectBufExceeded), errors.Is(err, nats.ErrConnectionDraining):
		return pubAck{}, missed, err // it never left
	case errors.Is(context.Cause(ctx), ErrDenied):
		return pubAck{}, refused, ErrDenied
	case ctx.Err() != nil:
		return pubAck{}, open, context.Cause(ctx)
	default:
		return pubAck{}, open, err
	}

	ack, err := readAck(reply.Data)
	if err != nil {
		return pubAck{}, open, fmt.Errorf("acknowledgement is not JSON: %w", err)
	}
	switch {
	case ack.Error != nil && ack.Error.ErrorCode == errDuplicateInWork:
		return pubAck{}, open, ack.Error
	case ack.Error != nil && (ack.Error.Code == codeTooManyRequests || ack.Error.ErrorCode == errClusterNotAvail):
		return pubAck{}, missed, ack.Error
	case ack.Error != nil:
		return pubAck{}, refused, ack.Error
	case ack.Stream != stream || ack.Seq == 0:
		return pubAck{}, open, fmt.Errorf("acknowledged by stream %.40q, not %s", ack.Stream, stream)
	}
	return ack, stored, nil
}

// readAck reads an acknowledgement. Nearly all are written in one of two ways, which need
// no decoder; what is written otherwise is decoded.
func readAck(data []byte) (pubAck, error) {
	if ack, ok := usualAck(data); ok {
		return ack, nil
	}
	var ack pubAck
	err := json.Unmarshal(data, &ack)
	return ack, err
}

// usualAck reads {"stream":"POS","seq":7} and {"stream":"POS","seq":7,"duplicate": true},
// as nats-server writes them, from POS and KITCHEN.
func usualAck(data []byte) (ack pubAck, ok bool) {
	rest, ok := bytes.CutPrefix(data, []byte(`{"stream":"`))
	if !ok {
		return pubAck{}, false
	}
	name, rest, ok := bytes.Cut(rest, []byte(`","seq":`))
	if !ok {
		return pubAck{}, false
	}
	switch string(name) {
	case streamPOS:
		ack.Stream = streamPOS
	case streamKitchen:
		ack.Stream = streamKitchen
	default:
		return pubAck{}, false
	}
	rest, ok = bytes.CutSuffix(rest, []byte(`}`))
	if !ok {
		return pubAck{}, false
	}
	rest, ack.Duplicate = bytes.CutSuffix(rest, []byte(`,"duplicate": true`))
	const sureToFit = 19 // digits
	if len(rest) == 0 || len(rest) > sureToFit || rest[0] == '0' {
		return pubAck{}, false
	}
	for _, c := range rest {
		if c < '0' || c > '9' {
			return pubAck{}, false
		}
		ack.Seq = 10*ack.Seq + uint64(c-'0')
	}
	return ack, true
}
