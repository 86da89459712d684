package broker

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func TestEventIsStoredOnceHoweverOftenItIsPublished(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	for i, want := range []struct {
		event     uint64
		seq       uint64
		duplicate bool
	}{{1, 1, false}, {2, 2, false}, {1, 1, true}, {2, 2, true}, {3, 3, false}} {
		seq, duplicate, err := b.PublishEvent(deadline(t), event("store-1", want.event))
		if err != nil || seq != want.seq || duplicate != want.duplicate {
			t.Errorf("publish %d: %d, %v, %v, want %+v", i, seq, duplicate, err, want)
		}
	}
}

func TestPublishSaysWhenAMessageIsCertainlyNotStored(t *testing.T) {
	t.Parallel()
	cfg := HubConfig{MaxBytes: 1 << 20}
	_, b := embedded(t, cfg)
	large := func(n int, seq uint64) *Event {
		e := event("store-1", seq)
		e.Triple.Message = []byte(strings.Repeat("A", n))
		return e
	}
	check := func(t *testing.T, err error, want string) {
		t.Helper()
		if !errors.Is(err, ErrRejected) || errors.Is(err, ErrUnknown) || errors.Is(err, ErrAway) || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want ErrRejected with %q", err, want)
		}
	}
	t.Run("larger than the stream takes", func(t *testing.T) {
		_, _, err := b.PublishEvent(deadline(t), large(maxEventSize, 1))
		check(t, err, "message size exceeds maximum")
	})
	t.Run("larger than the hub takes", func(t *testing.T) {
		_, _, err := b.PublishEvent(deadline(t), large(2<<20, 1))
		check(t, err, "larger than the hub takes")
	})
	t.Run("not fit for the wire", func(t *testing.T) {
		_, _, err := b.PublishEvent(deadline(t), &Event{})
		if !errors.Is(err, ErrInvalid) {
			t.Errorf("error is %v, want ErrInvalid", err)
		}
	})
	t.Run("the stream is full", func(t *testing.T) {
		var err error
		stored := uint64(0)
		for seq := uint64(1); err == nil && seq < 20; seq++ {
			if _, _, err = b.PublishEvent(deadline(t), large(100<<10, seq)); err == nil {
				stored = seq
			}
		}
		check(t, err, "maximum bytes exceeded")
		if e, _, err := b.LastEvent(deadline(t), "store-1", "edge-1"); err != nil || e.Seq != stored {
			t.Errorf("the hub's last is %+v, %v, want event %d", e, err, stored)
		}
	})
}

func TestPublishWithoutAStreamIsAway(t *testing.T) {
	t.Parallel()
	hub := startHub(t, small, t.TempDir())
	b := connect(t, ConnectConfig{HubConfig: small, Name: "bridge", Embedded: hub})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.PublishReport(ctx, report("store-1", 1)); !errors.Is(err, ErrAway) || errors.Is(err, ErrUnknown) {
		t.Errorf("error is %v, want ErrAway", err)
	}
	stopped, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.PublishReport(stopped, report("store-1", 1)); !errors.Is(err, ErrAway) {
		t.Errorf("told to stop before it began: %v, want ErrAway", err)
	}
}

// answer stands in for a stream, so that acknowledgements can be lost and strange ones
// given. It returns how many attempts have come.
func answer(t *testing.T, p *hubProcess, reply func(attempt int) any) func() int {
	t.Helper()
	nc, err := nats.Connect(p.hub.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	var mu sync.Mutex
	n := 0
	_, err = nc.Subscribe("pos.>", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		n++
		answer := reply(n)
		if answer == nil {
			return
		}
		raw, ok := answer.(string)
		if !ok {
			b, err := json.Marshal(answer)
			if err != nil {
				t.Error(err)
			}
			raw = string(b)
		}
		if err := m.Respond([]byte(raw)); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return n
	}
}

func TestPublishOutcomes(t *testing.T) {
	t.Parallel()
	refusal := func(code int, errCode jetstream.ErrorCode, text string) pubAck {
		return pubAck{Error: &jetstream.APIError{Code: code, ErrorCode: errCode, Description: text}}
	}
	yes := pubAck{Stream: streamPOS, Seq: 7}
	full := refusal(503, 10077, "maximum bytes exceeded")
	for _, row := range []struct {
		name    string
		answers []any // to the attempts, the last to all further ones; nil: none
		want    error // nil: stored
		not     error
		min     int // attempts at least
		limit   time.Duration
	}{
		{name: "acknowledged", answers: []any{yes}, min: 1},
		{name: "refused", answers: []any{full}, want: ErrRejected, not: ErrUnknown, min: 1},
		{name: "queue full, then stored", answers: []any{refusal(429, 10167, "too many requests"), yes}, min: 2},
		{name: "queue full for long", answers: []any{refusal(429, 10167, "too many requests")}, want: ErrRejected, not: ErrUnknown, min: 2, limit: 500 * time.Millisecond},
		{name: "election, then stored", answers: []any{refusal(503, 10008, "temporarily unavailable"), yes}, min: 2},
		{name: "never answered", answers: []any{nil}, want: ErrUnknown, not: ErrRejected, min: 1, limit: 100 * time.Millisecond},
		{name: "an earlier attempt is being stored", answers: []any{refusal(409, 10158, "duplicate message id is in process")}, want: ErrUnknown, not: ErrRejected, min: 2, limit: 500 * time.Millisecond},
		{name: "an earlier attempt was being stored, and is", answers: []any{refusal(409, 10158, "duplicate message id is in process"), pubAck{Stream: streamPOS, Seq: 7, Duplicate: true}}, min: 2},
		{name: "unknown, then refused: the first may be stored", answers: []any{"no JSON", full}, want: ErrUnknown, not: ErrRejected, min: 2, limit: 500 * time.Millisecond},
		{name: "unknown, then stored", answers: []any{"no JSON", yes}, min: 2},
		{name: "acknowledged by another stream", answers: []any{pubAck{Stream: "OTHER", Seq: 1}}, want: ErrUnknown, not: ErrRejected, min: 1, limit: 200 * time.Millisecond},
		{name: "acknowledged without a sequence", answers: []any{pubAck{Stream: streamPOS}}, want: ErrUnknown, not: ErrRejected, min: 1, limit: 200 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			p := startProcess(t)
			b := remote(t, "edge-1", p.hub.ClientURL())
			attempts := answer(t, p, func(n int) any { return row.answers[min(n, len(row.answers))-1] })
			ctx := deadline(t)
			if row.limit > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, row.limit)
				defer cancel()
			}
			seq, _, err := b.PublishEvent(ctx, event("store-1", 1))
			if row.want == nil && (err != nil || seq != 7) {
				t.Errorf("%d, %v, want it stored", seq, err)
			}
			if row.want != nil && (!errors.Is(err, row.want) || errors.Is(err, row.not)) {
				t.Errorf("error is %v, want %v", err, row.want)
			}
			if n := attempts(); n < row.min {
				t.Errorf("%d attempts, want %d", n, row.min)
			}
		})
	}
}

func TestPublishOutlastsARestartOfTheHub(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	b := remote(t, "edge-1", p.hub.ClientURL())
	apply(t, b)
	const n = 200
	done := make(chan struct{})
	go func() {
		defer close(done)
		for seq := uint64(1); seq <= n; seq++ {
			if _, _, err := b.PublishEvent(deadline(t), event("store-1", seq)); err != nil {
				t.Errorf("event %d: %v", seq, err)
			}
		}
	}()
	eventually(t, "some are published", func() bool {
		_, seq, err := b.LastEvent(deadline(t), "store-1", "edge-1")
		return err == nil && seq > 20
	})
	p.stop()
	p.start()
	<-done
	stream, err := b.js.Stream(deadline(t), streamPOS)
	if err != nil {
		t.Fatal(err)
	}
	if got := stream.CachedInfo().State.Msgs; got != n {
		t.Errorf("%d events stored, want %d: each once", got, n)
	}
}

func TestDeadLetterIsStoredOnceForEachEndpoint(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	publish(t, b, "store-1", 1, 1)
	o := own(t, b, b.PartitionOf("store-1"))
	o.takeover()
	d := o.delivery(1)
	for _, endpoint := range []string{"main", "main", "backup", ""} {
		if err := b.PublishDeadLetter(deadline(t), DeadLetter{Delivery: d, Endpoint: endpoint, Reason: "rejected", Attempts: 1, Status: 422}); err != nil {
			t.Fatal(err)
		}
	}
	stream, err := b.js.Stream(deadline(t), streamDLQ)
	if err != nil {
		t.Fatal(err)
	}
	if got := stream.CachedInfo().State.Msgs; got != 3 {
		t.Errorf("%d dead letters, want 3", got)
	}
	m, err := stream.GetLastMsgForSubject(deadline(t), "dlq.store-1.order")
	if err != nil {
		t.Fatal(err)
	}
	if m.Header.Get("Kb-Tag") != "tag-1" || m.Header.Get("Kb-Dead-Reason") != "rejected" || string(m.Data) != string(d.Body) {
		t.Errorf("dead letter %v %s", m.Header, m.Data)
	}
}
