package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	directGet = "$JS.API.DIRECT.GET."
	msgGet    = "$JS.API.STREAM.MSG.GET."
)

// request asks the hub and repeats that over lost connections, elections and time-outs
// until there is an answer or ctx ends.
func (b *Broker) request(ctx context.Context, subject string, body []byte) (*nats.Msg, error) {
	for n := 1; ; n++ {
		link, err := b.await(ctx)
		if err != nil {
			return nil, err
		}
		reply, err := func() (*nats.Msg, error) {
			rctx, done := b.asks(ctx, link, subject, apiTimeout)
			defer done()
			reply, err := b.nc.RequestWithContext(rctx, subject, body)
			if err != nil && rctx.Err() != nil {
				err = context.Cause(rctx)
			}
			return reply, err
		}()
		switch {
		case err == nil:
			return reply, nil
		case errors.Is(err, ErrDenied):
			return nil, fmt.Errorf("%w: %s: %w", ErrRejected, subject, err)
		case errors.Is(err, nats.ErrConnectionClosed):
			return nil, err
		}
		if !pause(ctx, retryMin/2+jitter(n, retryMin, retryMax)) {
			return nil, fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		}
	}
}

// LastEvent returns the hub's last event of an edge at a site, and its sequence in
// POS. It needs no right but the direct get of that. Any replica of the stream may
// answer, so one published a moment ago may be missing. Errors: ErrNone when there is
// none, ErrMalformed.
func (b *Broker) LastEvent(ctx context.Context, site, edge string) (*Event, uint64, error) {
	if err := errors.Join(envelope.ValidName(site), envelope.ValidName(edge)); err != nil {
		return nil, 0, fmt.Errorf("last event of %.64q at %.64q: %w: %w", edge, site, ErrInvalid, err)
	}
	m, err := b.request(ctx, directGet+streamPOS+".pos.*."+site+".*."+edge, nil)
	if err != nil {
		return nil, 0, fmt.Errorf("last event of %s at %s: %w", edge, site, err)
	}
	at, err := parseStored(m)
	if err != nil {
		return nil, 0, fmt.Errorf("last event of %s at %s: %w", edge, site, err)
	}
	e, err := decodeEvent(at.subject, m.Header, m.Data, 0)
	if err != nil {
		b.metrics.malformed.WithLabelValues("event").Inc()
		return nil, at.seq, fmt.Errorf("last event of %s at %s, stream sequence %d: %w", edge, site, at.seq, err)
	}
	return &e, at.seq, nil
}

// storedAt is what the hub says of a message that was asked for by direct get.
type storedAt struct {
	subject  string
	seq      uint64
	previous uint64 // in a batch: sequence of the message before; 0 for the first
}

// parseStored reads what the hub adds to a message's own headers: behind them, so that
// a header of the same name that was stored does not count. Error: ErrNone.
func parseStored(m *nats.Msg) (storedAt, error) {
	last := func(key string) string {
		if values := m.Header[key]; len(values) > 0 {
			return values[len(values)-1]
		}
		return ""
	}
	at := storedAt{subject: last("Nats-Subject")}
	seq := last("Nats-Sequence")
	if at.subject == "" || seq == "" {
		switch code, description := status(m); code {
		case "404":
			return at, ErrNone
		default:
			return at, fmt.Errorf("direct get: %s %s", code, description)
		}
	}
	var err error
	if at.seq, err = strconv.ParseUint(seq, 10, 64); err != nil {
		return at, fmt.Errorf("direct get: sequence %.40q: %w", seq, ErrMalformed)
	}
	if previous := last("Nats-Last-Sequence"); previous != "" {
		at.previous, _ = strconv.ParseUint(previous, 10, 64)
	}
	return at, nil
}

// leaderMsg is a message as the stream's leader has it: never behind what was
// acknowledged, unlike a direct get.
type leaderMsg struct {
	Seq    uint64    `json:"seq"`
	Stored time.Time `json:"time"`
}

const errNoMessage = 10037

// askLeader gets the first message at or after seq that matches the filter; seq 0: the
// last one. Error: ErrNone.
func (b *Broker) askLeader(ctx context.Context, stream, filter string, seq uint64) (leaderMsg, error) {
	var query struct {
		Seq     uint64 `json:"seq,omitempty"`
		NextFor string `json:"next_by_subj,omitempty"`
		LastFor string `json:"last_by_subj,omitempty"`
	}
	if seq > 0 {
		query.Seq, query.NextFor = seq, filter
	} else {
		query.LastFor = filter
	}
	body, err := json.Marshal(query)
	if err != nil {
		return leaderMsg{}, err
	}
	m, err := b.request(ctx, msgGet+stream, body)
	if err != nil {
		return leaderMsg{}, err
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message leaderMsg           `json:"message"`
	}
	switch err := json.Unmarshal(m.Data, &answer); {
	case err != nil:
		return leaderMsg{}, fmt.Errorf("message of %s: %w", stream, err)
	case answer.Error != nil && answer.Error.ErrorCode == errNoMessage:
		return leaderMsg{}, ErrNone
	case answer.Error != nil:
		return leaderMsg{}, fmt.Errorf("message of %s: %w", stream, answer.Error)
	}
	return answer.Message, nil
}
