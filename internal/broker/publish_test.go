package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
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
	}{{1, 1, false}, {1, 1, true}, {2, 2, false}, {2, 2, true}, {2, 2, true}, {3, 3, false}} {
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

func TestAnAttemptIsJudgedByItsAnswer(t *testing.T) {
	t.Parallel()
	refusal := func(code int, errCode jetstream.ErrorCode, text string) pubAck {
		return pubAck{Error: &jetstream.APIError{Code: code, ErrorCode: errCode, Description: text}}
	}
	p := startProcess(t)
	b := remote(t, "edge-1", p.hub.ClientURL())
	msg, err := encodeEvent(event("store-1", 1))
	if err != nil {
		t.Fatal(err)
	}
	link, err := b.await(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, v, err := b.attempt(deadline(t), link, streamPOS, msg); v != missed || !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("no stream: verdict %v, %v", v, err)
	}

	var reply []byte // nil: none
	nc, err := nats.Connect(p.hub.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var mu sync.Mutex
	if _, err = nc.Subscribe("pos.>", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		if reply != nil {
			_ = m.Respond(reply)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name   string
		answer any // a string is sent as it is; nil: none
		want   verdict
	}{
		{"stored", pubAck{Stream: streamPOS, Seq: 7}, stored},
		{"stored before", pubAck{Stream: streamPOS, Seq: 7, Duplicate: true}, stored},
		{"full", refusal(503, 10077, "maximum bytes exceeded"), refused},
		{"too large", refusal(400, 10054, "message size exceeds maximum allowed"), refused},
		{"queue full", refusal(429, 10167, "too many requests"), missed},
		{"election", refusal(503, 10008, "JetStream system temporarily unavailable"), missed},
		{"an earlier attempt is being stored", refusal(409, 10158, "duplicate message id is in process"), open},
		{"stored by another stream", pubAck{Stream: "OTHER", Seq: 7}, open},
		{"stored nowhere", pubAck{Stream: streamPOS}, open},
		{"nonsense", "no JSON", open},
		{"none", nil, open},
	} {
		t.Run(row.name, func(t *testing.T) {
			ctx := deadline(t)
			mu.Lock()
			switch answer := row.answer.(type) {
			case nil:
				reply = nil
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
				defer cancel()
			case string:
				reply = []byte(answer)
			default:
				var err error
				if reply, err = json.Marshal(answer); err != nil {
					t.Fatal(err)
				}
			}
			mu.Unlock()
			ack, v, err := b.attempt(ctx, link, streamPOS, msg)
			if v != row.want || (err == nil) != (v == stored) {
				t.Errorf("verdict %v, %v, want %v", v, err, row.want)
			}
			if v == stored && ack.Seq != 7 {
				t.Errorf("sequence %d, want 7", ack.Seq)
			}
		})
	}

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, v, _ := b.attempt(ended, link, streamPOS, msg); v != missed {
		t.Errorf("told to stop before it began: verdict %v", v)
	}
	p.stop()
	<-link.Done()
	if _, v, err := b.attempt(deadline(t), link, streamPOS, msg); v != missed {
		t.Errorf("link lost before it began: verdict %v, %v", v, err)
	}
}

// The quick reader of acknowledgements reads what the hub writes, and nothing that a decoder
// of JSON would read otherwise.
func TestAnAcknowledgementIsReadAsADecoderWould(t *testing.T) {
	t.Parallel()
	for _, row := range acks {
		t.Run(row.data, func(t *testing.T) {
			sameAsDecoded(t, []byte(row.data))
			if _, quick := usualAck([]byte(row.data)); quick != row.quick {
				t.Errorf("read without the decoder: %v, want %v", quick, row.quick)
			}
		})
	}
}

func FuzzAcknowledgement(f *testing.F) {
	for _, row := range acks {
		f.Add([]byte(row.data))
	}
	f.Fuzz(sameAsDecoded)
}

var acks = []struct {
	data  string
	quick bool
}{
	{`{"stream":"POS","seq":7}`, true},
	{`{"stream":"KITCHEN","seq":1234567890123456789}`, true},
	{`{"stream":"POS","seq":9999999999999999999}`, true},
	{`{"stream":"POS","seq":18446744073709551615}`, false},
	{`{"stream":"POS","seq":18446744073709551616}`, false},
	{`{"stream":"POS","seq":7,"duplicate": true}`, true},
	{`{"stream":"POS","seq":7,"duplicate":true}`, false},
	{`{"stream":"POS","seq":7,"duplicate": false}`, false},
	{`{"stream":"POS", "seq":7}`, false},
	{`{"stream":"POS","domain":"hub","seq":7}`, false},
	{`{"stream":"POS","seq":7,"batch":"b","count":2}`, false},
	{`{"stream":"OTHER","seq":7}`, false},
	{`{"stream":"P\u004fS","seq":7}`, false},
	{`{"stream":"POS","seq":0}`, false},
	{`{"stream":"POS","seq":07}`, false},
	{`{"stream":"POS","seq":+7}`, false},
	{`{"stream":"POS","seq":-7}`, false},
	{`{"stream":"POS","seq":7.0}`, false},
	{`{"stream":"POS","seq":7e0}`, false},
	{`{"stream":"POS","seq":"7"}`, false},
	{`{"stream":"POS","seq": 7}`, false},
	{`{"stream":"POS","seq":7 }`, false},
	{`{"stream":"POS","seq":}`, false},
	{`{"stream":"POS","seq":,"duplicate": true}`, false},
	{`{"stream":"POS","seq":7`, false},
	{`{"stream":"POS","seq":7}}`, false},
	{`{"stream":"POS","seq":7}x`, false},
	{"{\"stream\":\"POS\",\"seq\":7}\n", false},
	{`{"stream":"POS","seq":7,"seq":8}`, false},
	{`{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"POS","seq":0}`, false},
	{`{}`, false},
	{`null`, false},
	{`no JSON`, false},
	{``, false},
}

func sameAsDecoded(t *testing.T, data []byte) {
	var want pubAck
	wantErr := json.Unmarshal(data, &want)
	got, err := readAck(data)
	if fmt.Sprint(err) != fmt.Sprint(wantErr) || !reflect.DeepEqual(got, want) {
		t.Errorf("read %q as %+v, %v; the decoder as %+v, %v", data, got, err, want, wantErr)
	}
}

func TestAnOutcomeIsWhatAllAttemptsSay(t *testing.T) {
	t.Parallel()
	full := &jetstream.APIError{Code: 503, ErrorCode: 10077}
	busy := &jetstream.APIError{Code: 429, ErrorCode: 10167}
	for _, row := range []struct {
		name     string
		attempts []verdict // the last is repeated
		err      error     // of those that are not stored
		away     bool      // no connection at all
		want     error     // nil: stored
		never    []error
		tries    int // exactly; 0: until the time is over
	}{
		{name: "stored", attempts: []verdict{stored}, tries: 1},
		{name: "missed, then stored", attempts: []verdict{missed, missed, stored}, err: busy, tries: 3},
		{name: "unknown, then stored", attempts: []verdict{open, stored}, err: busy, tries: 2},
		{name: "refused", attempts: []verdict{refused}, err: full, want: ErrRejected, never: []error{ErrUnknown, ErrAway}, tries: 1},
		{name: "missed, then refused", attempts: []verdict{missed, refused}, err: full, want: ErrRejected, never: []error{ErrUnknown, ErrAway}, tries: 2},
		{name: "missed all along, for a stated reason", attempts: []verdict{missed}, err: busy, want: ErrRejected, never: []error{ErrUnknown, ErrAway}},
		{name: "missed all along, nobody there", attempts: []verdict{missed}, err: nats.ErrNoResponders, want: ErrAway, never: []error{ErrUnknown}},
		{name: "unknown all along", attempts: []verdict{open}, err: errLinkDown, want: ErrUnknown, never: []error{ErrRejected, ErrAway}},
		{name: "unknown, then missed", attempts: []verdict{open, missed}, err: busy, want: ErrUnknown, never: []error{ErrRejected, ErrAway}},
		{name: "unknown, then refused: the first may be stored", attempts: []verdict{open, refused}, err: full, want: ErrUnknown, never: []error{ErrRejected, ErrAway}},
		{name: "unknown, then refused, then stored", attempts: []verdict{open, refused, stored}, err: full, tries: 3},
		{name: "closed", attempts: []verdict{missed}, err: nats.ErrConnectionClosed, want: ErrAway, never: []error{ErrUnknown}, tries: 1},
		{name: "away", away: true, want: ErrAway, never: []error{ErrUnknown}},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, err := newMetrics(nil)
				if err != nil {
					t.Fatal(err)
				}
				b := &Broker{metrics: m, linked: make(chan struct{}), closed: make(chan struct{}), trouble: errLinkDown}
				if !row.away {
					b.link = t.Context()
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				tries := 0
				ack, err := b.until(ctx, func(context.Context) (pubAck, verdict, error) {
					v := row.attempts[min(tries, len(row.attempts)-1)]
					tries++
					if v == stored {
						return pubAck{Seq: 7}, v, nil
					}
					return pubAck{}, v, row.err
				})
				if !errors.Is(err, row.want) {
					t.Errorf("error is %v, want %v", err, row.want)
				}
				for _, never := range row.never {
					if errors.Is(err, never) {
						t.Errorf("error is %v, which is also %v", err, never)
					}
				}
				if errors.Is(err, ErrAway) && !errors.Is(err, ErrRejected) {
					t.Error("away and not rejected: nobody could tell that it is certain")
				}
				if err == nil && ack.Seq != 7 {
					t.Errorf("acknowledgement %+v", ack)
				}
				switch {
				case row.tries > 0 && tries != row.tries:
					t.Errorf("%d attempts, want %d", tries, row.tries)
				case row.tries == 0 && !row.away && (tries < 50 || ctx.Err() == nil): // a minute, at most a second apart
					t.Errorf("gave up after %d attempts", tries)
				}
			})
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
