package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Headers of JetStream, as they stand on the wire.
const (
	hdrMsgID        = "Nats-Msg-Id"
	hdrExpectSeq    = "Nats-Expected-Last-Subject-Sequence"
	hdrExpectFilter = "Nats-Expected-Last-Subject-Sequence-Subject"
	hdrBatchID      = "Nats-Batch-Id"
	hdrBatchSeq     = "Nats-Batch-Sequence"
	hdrBatchCommit  = "Nats-Batch-Commit"
	hdrSequence     = "Nats-Sequence"
	hdrSubject      = "Nats-Subject"
	hdrStream       = "Nats-Stream"
	hdrTimeStamp    = "Nats-Time-Stamp"
	hdrLastSequence = "Nats-Last-Sequence"
	hdrNumPending   = "Nats-Num-Pending"
	hdrPinID        = "Nats-Pin-Id"
	hdrPending      = "Nats-Pending-Messages"
	hdrLastConsumer = "Nats-Last-Consumer"
	hdrLastStream   = "Nats-Last-Stream"
	hdrStalled      = "Nats-Consumer-Stalled"
)

func header(pairs ...string) nats.Header {
	h := nats.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h.Add(pairs[i], pairs[i+1])
	}
	return h
}

// after is the condition that the last message matching the filter has this sequence.
func after(seq uint64, filter string) nats.Header {
	return header(hdrExpectSeq, strconv.FormatUint(seq, 10), hdrExpectFilter, filter)
}

// answer is a PubAck, or the error in its place.
type answer struct {
	Stream    string              `json:"stream"`
	Seq       uint64              `json:"seq"`
	Duplicate bool                `json:"duplicate"`
	Batch     string              `json:"batch"`
	Count     int                 `json:"count"`
	Error     *jetstream.APIError `json:"error"`
}

// code of the error, 0 when there is none.
func (a answer) code() int {
	if a.Error == nil {
		return 0
	}
	return int(a.Error.ErrorCode)
}

func (a answer) String() string {
	if a.Error != nil {
		return a.Error.Error()
	}
	return fmt.Sprintf("stored at %d, duplicate %v", a.Seq, a.Duplicate)
}

// publish sends one message and waits for its answer. Only when nobody was there to take
// it, in an election, does it send again.
func publish(t testing.TB, nc *nats.Conn, subject string, h nats.Header, body string) answer {
	t.Helper()
	var a answer
	eventually(t, "a stream answers for "+subject, func() bool {
		reply, err := nc.RequestMsg(&nats.Msg{Subject: subject, Header: h, Data: []byte(body)}, patience)
		if errors.Is(err, nats.ErrNoResponders) {
			return false
		}
		if err != nil {
			t.Fatalf("publish to %s: %v", subject, err)
		}
		a = parseAnswer(t, reply)
		return true
	})
	return a
}

func parseAnswer(t testing.TB, reply *nats.Msg) answer {
	t.Helper()
	var a answer
	if len(reply.Data) == 0 {
		return a // of a message of a batch that goes on
	}
	if err := json.Unmarshal(reply.Data, &a); err != nil {
		t.Fatalf("acknowledgement %q: %v", reply.Data, err)
	}
	return a
}

// store publishes a message that must be stored, and returns its sequence.
func store(t testing.TB, nc *nats.Conn, subject string, h nats.Header, body string) uint64 {
	t.Helper()
	a := publish(t, nc, subject, h, body)
	if a.Error != nil || a.Duplicate {
		t.Fatalf("publish to %s: %v", subject, a)
	}
	return a.Seq
}

// sendAtOnce sends all messages before it waits for the answer to any. Answers are in the
// messages' order.
func sendAtOnce(t testing.TB, nc *nats.Conn, msgs ...*nats.Msg) []answer {
	t.Helper()
	var subs []*nats.Subscription
	for range msgs {
		sub, err := nc.SubscribeSync(nc.NewInbox())
		if err != nil {
			t.Fatal(err)
		}
		defer sub.Unsubscribe()
		subs = append(subs, sub)
	}
	for i, m := range msgs {
		m.Reply = subs[i].Subject
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	var all []answer
	for _, sub := range subs {
		all = append(all, parseAnswer(t, next(t, sub)))
	}
	return all
}

// next is the next message of a subscription, whatever it is.
func next(t testing.TB, sub *nats.Subscription) *nats.Msg {
	t.Helper()
	m, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatalf("next message: %v", err)
	}
	return m
}

// delivery is the next message of a subscription, which must come from a consumer.
func delivery(t testing.TB, sub *nats.Subscription) (*nats.Msg, *nats.MsgMetadata) {
	t.Helper()
	m := next(t, sub)
	meta, err := m.Metadata()
	if err != nil {
		t.Fatalf("not a delivery: %s %s %v", m.Subject, m.Header, err)
	}
	return m, meta
}

// status is the next message of a subscription, which must be one of the hub's own.
func status(t testing.TB, sub *nats.Subscription) (code string, m *nats.Msg) {
	t.Helper()
	m = next(t, sub)
	code = m.Header.Get("Status")
	if code == "" {
		t.Fatalf("no status: %s %s %q", m.Subject, m.Header, m.Data)
	}
	return code, m
}

// last value of a header: the hub's stands behind those that were published.
func last(m *nats.Msg, key string) string {
	if values := m.Header[key]; len(values) > 0 {
		return values[len(values)-1]
	}
	return ""
}

func subscribe(t testing.TB, nc *nats.Conn, subject string) *nats.Subscription {
	t.Helper()
	sub, err := nc.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	return sub
}

// pullRequest asks a consumer for messages.
type pullRequest struct {
	Batch     int           `json:"batch"`
	Expires   time.Duration `json:"expires"`
	Heartbeat time.Duration `json:"idle_heartbeat,omitempty"`
	Group     string        `json:"group,omitempty"`
	PinID     string        `json:"id,omitempty"`
}

// pull asks, and returns where what comes arrives: somewhere new each time.
func pull(t testing.TB, nc *nats.Conn, c jetstream.Consumer, request pullRequest) *nats.Subscription {
	t.Helper()
	sub, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	body, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	info := c.CachedInfo()
	if err := nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+info.Stream+"."+info.Name, sub.Subject, body); err != nil {
		t.Fatal(err)
	}
	return sub
}

// call makes a request to JetStream's API that the client has no call for. An error in the
// answer is a *jetstream.APIError.
func call(ctx context.Context, nc *nats.Conn, subject string, body []byte, into any) error {
	reply, err := nc.RequestWithContext(ctx, subject, body)
	if err != nil {
		return err
	}
	var a answer
	if err := json.Unmarshal(reply.Data, &a); err != nil {
		return fmt.Errorf("answer %q: %w", reply.Data, err)
	}
	if a.Error != nil {
		return a.Error
	}
	return json.Unmarshal(reply.Data, into)
}

func acknowledge(t testing.TB, nc *nats.Conn, reply string) {
	t.Helper()
	if err := nc.Publish(reply, []byte("+ACK")); err != nil {
		t.Fatal(err)
	}
}

func name(s jetstream.Stream) string { return s.CachedInfo().Config.Name }

// state of a stream, from its leader.
func state(t testing.TB, s jetstream.Stream) jetstream.StreamState {
	t.Helper()
	return streamInfo(t, s).State
}

func streamInfo(t testing.TB, s jetstream.Stream) (info *jetstream.StreamInfo) {
	t.Helper()
	must(t, func(ctx context.Context) (err error) {
		info, err = s.Info(ctx)
		return err
	})
	return info
}

// holds checks how many messages a stream has, and the last sequence.
func holds(t testing.TB, s jetstream.Stream, msgs, lastSeq uint64) {
	t.Helper()
	if got := state(t, s); got.Msgs != msgs || got.LastSeq != lastSeq {
		t.Errorf("stream holds %d messages up to %d, want %d up to %d", got.Msgs, got.LastSeq, msgs, lastSeq)
	}
}

func consumerInfo(t testing.TB, c jetstream.Consumer) (info *jetstream.ConsumerInfo) {
	t.Helper()
	must(t, func(ctx context.Context) (err error) {
		info, err = c.Info(ctx)
		return err
	})
	return info
}

// reaches waits until a consumer's acknowledgement floor is at a stream sequence.
func reaches(t testing.TB, c jetstream.Consumer, floor uint64) {
	t.Helper()
	eventually(t, fmt.Sprintf("acknowledgement floor at %d", floor), func() bool {
		return consumerInfo(t, c).AckFloor.Stream == floor
	})
}
