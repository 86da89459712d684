package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	directGet = "$JS.API.DIRECT.GET."
	leaderGet = "$JS.API.STREAM.MSG.GET."
)

// query is what a direct get, or a get from the leader, asks for.
type query struct {
	Seq       uint64     `json:"seq,omitempty"`
	StartTime *time.Time `json:"start_time,omitempty"`
	NextFor   string     `json:"next_by_subj,omitempty"`
	LastFor   string     `json:"last_by_subj,omitempty"`
	Batch     int        `json:"batch,omitempty"`
	MaxBytes  int        `json:"max_bytes,omitempty"`
}

func (q query) body(t testing.TB) []byte {
	t.Helper()
	body, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func request(t testing.TB, nc *nats.Conn, subject string, body []byte) *nats.Msg {
	t.Helper()
	var reply *nats.Msg
	eventually(t, "someone answers for "+subject, func() bool {
		var err error
		if reply, err = nc.Request(subject, body, patience); err != nil && !errors.Is(err, nats.ErrNoResponders) {
			t.Fatalf("%s: %v", subject, err)
		}
		return err == nil
	})
	return reply
}

// stored is a message as the leader has it.
type stored struct {
	Subject string    `json:"subject"`
	Seq     uint64    `json:"seq"`
	Header  []byte    `json:"hdrs"`
	Data    []byte    `json:"data"`
	Time    time.Time `json:"time"`
}

// leaders is the message that the leader has for a query, or the error's code.
func leaders(t testing.TB, nc *nats.Conn, s jetstream.Stream, q query) (stored, int) {
	t.Helper()
	var got struct {
		Message stored `json:"message"`
	}
	err := ask(t, func(ctx context.Context) error { return call(ctx, nc, leaderGet+name(s), q.body(t), &got) })
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		return stored{}, int(api.ErrorCode)
	}
	if err != nil {
		t.Fatal(err)
	}
	return got.Message, 0
}

// message of a sequence, which must be there.
func message(t testing.TB, nc *nats.Conn, s jetstream.Stream, seq uint64) stored {
	t.Helper()
	m, code := leaders(t, nc, s, query{Seq: seq})
	if code != 0 {
		t.Fatalf("message %d of %s: error %d", seq, name(s), code)
	}
	return m
}

func TestDirectGetTellsWhereAMessageStandsBehindItsPublishedHeaders(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		forged := header(hdrSequence, "99", hdrSubject, "forged", hdrStream, "forged", "Status", "404", "Own", "kept")
		seq := store(t, h.nc, r+".s1.order.e1", forged, "body")
		bySubject := request(t, h.nc, directGet+name(s)+"."+r+".*.s1.*.e1", nil)
		bySeq := request(t, h.nc, directGet+name(s), query{Seq: seq}.body(t))
		for how, m := range map[string]*nats.Msg{"by subject": bySubject, "by sequence": bySeq} {
			subject := fmt.Sprintf("%s.%d.s1.order.e1", r, partitionOf("s1", 4))
			if last(m, hdrSequence) != "1" || last(m, hdrSubject) != subject || last(m, hdrStream) != name(s) {
				t.Errorf("%s: %v, want sequence 1 of %s and %s behind the forged ones", how, m.Header, name(s), subject)
			}
			if m.Header.Get(hdrSequence) != "99" || m.Header.Get("Own") != "kept" || string(m.Data) != "body" {
				t.Errorf("%s: %v %q, want the published headers and body first", how, m.Header, m.Data)
			}
			if _, err := time.Parse(time.RFC3339Nano, last(m, hdrTimeStamp)); err != nil {
				t.Errorf("%s: time stored: %v", how, err)
			}
		}
	})
}

func TestDirectGetSaysNoneByAStatusWithoutSubjectOrSequence(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		store(t, h.nc, r+".s1.order.e1", nil, "")
		for what, m := range map[string]*nats.Msg{
			"nothing of an edge":     request(t, h.nc, directGet+name(s)+"."+r+".*.s1.*.e2", nil),
			"no such sequence":       request(t, h.nc, directGet+name(s), query{Seq: 2}.body(t)),
			"nothing to begin with":  request(t, h.nc, directGet+name(s), query{Seq: 2, NextFor: r + ".>", Batch: 10}.body(t)),
			"nothing with that name": request(t, h.nc, directGet+name(s), query{Seq: 1, NextFor: r + ".*.s2.>", Batch: 10}.body(t)),
		} {
			if m.Header.Get("Status") != "404" || last(m, hdrSequence) != "" || last(m, hdrSubject) != "" || len(m.Data) > 0 {
				t.Errorf("%s: %v %q, want 404 and no more", what, m.Header, m.Data)
			}
		}
	})
}

func TestDirectGetOfABatchTellsEachPredecessorAndItsEnd(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		for i := range 6 { // 1, 3 and 5 are orders
			store(t, h.nc, r+"."+[]string{"s1.order", "s1.alert"}[i%2]+".e1", nil, "body")
		}
		third := message(t, h.nc, s, 3)
		orders := r + ".*.*.order.*"
		for _, row := range []struct {
			name    string
			q       query
			seqs    []string
			pending string // behind the batch
		}{
			{"all from a sequence that is not one of them", query{Seq: 2, NextFor: orders, Batch: 10}, []string{"3", "5"}, "0"},
			{"from a time on", query{StartTime: &third.Time, NextFor: orders, Batch: 10}, []string{"3", "5"}, "0"},
			{"from before the first", query{StartTime: new(time.Unix(0, 0)), NextFor: orders, Batch: 10}, []string{"1", "3", "5"}, "0"},
			{"so many", query{Seq: 1, NextFor: orders, Batch: 2}, []string{"1", "3"}, "1"},
			{"so many bytes", query{Seq: 1, NextFor: orders, Batch: 10, MaxBytes: 1}, []string{"1"}, "2"},
		} {
			sub := subscribe(t, h.nc, h.nc.NewInbox())
			if err := h.nc.PublishRequest(directGet+name(s), sub.Subject, row.q.body(t)); err != nil {
				t.Fatal(err)
			}
			before := "0"
			for _, seq := range row.seqs {
				m := next(t, sub)
				if last(m, hdrSequence) != seq || last(m, hdrLastSequence) != before {
					t.Errorf("%s: %v, want %s after %s", row.name, m.Header, seq, before)
				}
				before = seq
			}
			code, m := status(t, sub)
			if code != "204" || last(m, hdrLastSequence) != before || last(m, hdrNumPending) != row.pending || last(m, hdrSequence) != "" {
				t.Errorf("%s: ends with %v, want 204 after %s with %s pending", row.name, m.Header, before, row.pending)
			}
		}
	})
}

// Any replica answers a direct get, one that has not yet applied what the leader has
// acknowledged too. One server is its own only replica.
func TestDirectGetMayMissWhatIsAcknowledgedOnThreeNodesAndTheLeaderNever(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		subject, filter := r+".s1.order.e1", r+".*.s1.*.e1"
		reader := h.nc
		if h.nodes != nil {
			// A server gives a direct get to its own replica; a follower's takes part some
			// seconds after it is made.
			follower, err := nats.Connect(h.nodes.URL((h.nodes.Leader(name(s)) + 1) % 3))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(follower.Close)
			reader = follower
		}
		older, none := false, false
		missed := func() bool {
			seq := store(t, h.nc, subject, nil, "")
			m := request(t, reader, directGet+name(s), query{Seq: seq}.body(t))
			switch {
			case m.Header.Get("Status") == "404":
				none = true
			case last(m, hdrSequence) != fmt.Sprint(seq):
				t.Fatalf("sequence %d: %v", seq, m.Header)
			}
			seq = store(t, h.nc, subject, nil, "")
			if m := request(t, reader, directGet+name(s)+"."+filter, nil); last(m, hdrSequence) != fmt.Sprint(seq) {
				older = true
			}
			seq = store(t, h.nc, subject, nil, "")
			if got, code := leaders(t, reader, s, query{Seq: seq, NextFor: filter}); got.Seq != seq {
				t.Fatalf("the leader does not have %d, which is acknowledged: %d, error %d", seq, got.Seq, code)
			}
			seq = store(t, h.nc, subject, nil, "")
			if got, code := leaders(t, reader, s, query{LastFor: filter}); got.Seq != seq {
				t.Fatalf("the leader's last is not %d, which is acknowledged: %d, error %d", seq, got.Seq, code)
			}
			return older && none
		}
		if h.replicas > 1 {
			eventually(t, "a replica answers with less than is acknowledged: an older last message, and none at a sequence", missed)
			return
		}
		for range 50 {
			missed()
		}
		if older || none {
			t.Errorf("a single server missed what it has acknowledged (an older last message: %v, none: %v)", older, none)
		}
	})
}

func TestLeaderGetFindsTheFirstAtOrBehindASequence(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		for _, subject := range []string{"s1.order.e1", "s2.order.e1", "s1.order.e1", "s2.order.e1"} {
			store(t, h.nc, r+"."+subject, nil, "")
		}
		filter := fmt.Sprintf("%s.%d.s1.>", r, partitionOf("s1", 4))
		for _, row := range []struct {
			q    query
			seq  uint64
			code int
		}{
			{q: query{Seq: 1, NextFor: filter}, seq: 1},
			{q: query{Seq: 2, NextFor: filter}, seq: 3},
			{q: query{Seq: 3, NextFor: filter}, seq: 3},
			{q: query{Seq: 4, NextFor: filter}, code: errNoMessage},
			{q: query{LastFor: filter}, seq: 3},
			{q: query{LastFor: r + ".*.s3.>"}, code: errNoMessage},
		} {
			if got, code := leaders(t, h.nc, s, row.q); got.Seq != row.seq || code != row.code {
				t.Errorf("%+v: sequence %d, error %d, want %d, %d", row.q, got.Seq, code, row.seq, row.code)
			}
		}
	})
}
