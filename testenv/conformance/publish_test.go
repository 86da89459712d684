package conformance

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// pos makes a stream as POS is: <root>.<site>.<kind>.<edge>, stored with the partition
// behind the root.
func (h *hub) pos(t testing.TB, partitions int, change func(*jetstream.StreamConfig)) (jetstream.Stream, string) {
	t.Helper()
	r := root()
	cfg := jetstream.StreamConfig{
		Subjects: []string{r + ".*.*.*"},
		SubjectTransform: &jetstream.SubjectTransformConfig{
			Source:      r + ".*.*.*",
			Destination: fmt.Sprintf("%s.{{partition(%d,1)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}", r, partitions),
		},
		Discard: jetstream.DiscardNew, AllowDirect: true, DenyDelete: true,
	}
	if change != nil {
		change(&cfg)
	}
	return h.stream(t, cfg), r
}

func TestCompareAndSetTakesAWildcardOverTheStoredName(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		mine := r + ".*.s1.*.e1"
		order, alert := r+".s1.order.e1", r+".s1.alert.e1"
		refused := func(why, subject string, seq uint64) {
			t.Helper()
			before := state(t, s)
			if a := publish(t, h.nc, subject, after(seq, mine), ""); a.code() != errWrongLastSeq {
				t.Errorf("%s: %v, want error %d", why, a, errWrongLastSeq)
			}
			holds(t, s, before.Msgs, before.LastSeq)
		}

		refused("nothing is stored, and something expected", order, 1)
		first := store(t, h.nc, order, after(0, mine), "")
		refused("something is stored, and nothing expected", order, 0)
		second := store(t, h.nc, alert, after(first, mine), "")
		refused("an alert came behind the order", order, first)
		third := store(t, h.nc, order, after(second, mine), "")
		// Other edges, sites, and what the filter does not name.
		for _, other := range []string{r + ".s1.order.e2", r + ".s2.order.e1"} {
			store(t, h.nc, other, after(0, strings.Replace(strings.TrimPrefix(other, r+"."), ".order.", ".*.", 1)), "")
		}
		store(t, h.nc, alert, after(third, mine), "")
		// The published name is not the stored one.
		store(t, h.nc, order, after(0, order), "")
		holds(t, s, 7, 7)
	})
}

func TestOfCompareAndSetsInFlightOneIsStored(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		at := uint64(0)
		for round := range uint64(10) {
			var msgs []*nats.Msg
			for _, kind := range []string{"order", "alert", "order", "status"} {
				msgs = append(msgs, &nats.Msg{Subject: r + ".s1." + kind + ".e1", Header: after(at, r+".*.s1.*.e1")})
			}
			stored := 0
			for _, a := range sendAtOnce(t, h.nc, msgs...) {
				switch {
				case a.Error == nil:
					stored++
					at = a.Seq
				case a.code() == errWrongLastSeq:
				case a.code() == errSeqInWork && h.replicas > 1:
				default:
					t.Errorf("round %d: %v", round, a)
				}
			}
			if stored != 1 {
				t.Fatalf("round %d: %d of %d were stored", round, stored, len(msgs))
			}
			holds(t, s, round+1, round+1)
		}
	})
}

// A message in flight is one that three nodes have not agreed on yet. A compare-and-set
// looks for it under the filter's own text, which finds a literal name only.
func TestCompareAndSetOverAWildcardDoesNotSeeWhatIsInFlightOnThreeNodes(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		const rounds = 20
		s, r := h.pos(t, 4, nil)
		partition := partitionOf("s1", 4)
		subject := r + ".s1.order.e1"
		both := func(filter string) (n int) {
			for range rounds {
				at := after(state(t, s).LastSeq, filter)
				a := sendAtOnce(t, h.nc, &nats.Msg{Subject: subject}, &nats.Msg{Subject: subject, Header: at})
				if a[0].Error != nil {
					t.Fatal(a[0])
				}
				switch a[1].code() {
				case 0:
					n++
				case errWrongLastSeq, errSeqInWork:
				default:
					t.Fatal(a[1])
				}
			}
			return n
		}
		if n := both(fmt.Sprintf("%s.%d.s1.order.e1", r, partition)); n > 0 {
			t.Errorf("over a literal name: %d of %d compare-and-sets did not see the message before them", n, rounds)
		}
		switch n := both(r + ".*.s1.*.e1"); {
		case h.replicas == 1 && n > 0:
			t.Errorf("over a wildcard: %d of %d compare-and-sets did not see the message before them", n, rounds)
		case h.replicas > 1 && n == 0:
			t.Errorf("over a wildcard: all %d compare-and-sets saw the message before them: the message's id is no longer what keeps a resumed edge from storing twice", rounds)
		}
	})
}

func TestDuplicateIsAcknowledgedWithTheOldSequence(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		subject, mine := r+".s1.order.e1", r+".*.s1.*.e1"
		old := store(t, h.nc, subject, header(hdrMsgID, "a"), "")
		newest := store(t, h.nc, subject, header(hdrMsgID, "b"), "")

		a := publish(t, h.nc, subject, header(hdrMsgID, "a"), "other body")
		if !a.Duplicate || a.Seq != old {
			t.Errorf("the same id again: %v, want a duplicate at %d", a, old)
		}
		holds(t, s, 2, newest)
		if a := publish(t, h.nc, subject, after(a.Seq, mine), ""); a.code() != errWrongLastSeq {
			t.Errorf("compare-and-set with a duplicate's sequence: %v, want error %d", a, errWrongLastSeq)
		}

		// The id alone makes it one, whatever the subject.
		if a := publish(t, h.nc, r+".s2.alert.e2", header(hdrMsgID, "a"), ""); !a.Duplicate || a.Seq != old {
			t.Errorf("the same id under another subject: %v, want a duplicate at %d", a, old)
		}
		right := after(newest, mine)
		right.Set(hdrMsgID, "c")
		store(t, h.nc, subject, right, "")
		holds(t, s, 3, newest+1)
	})
}

// One server looks at the condition first, three nodes look at the id first.
func TestDuplicateWhoseConditionIsWrongIsRefusedByOneServerOnly(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		subject := r + ".s1.order.e1"
		again := after(0, r+".*.s1.*.e1")
		again.Set(hdrMsgID, "a")
		store(t, h.nc, subject, again, "")
		switch a := publish(t, h.nc, subject, again, ""); {
		case h.replicas == 1 && a.code() != errWrongLastSeq:
			t.Errorf("one server: %v, want error %d", a, errWrongLastSeq)
		case h.replicas > 1 && (!a.Duplicate || a.Seq != 1):
			t.Errorf("three nodes: %v, want a duplicate at 1", a)
		}
		holds(t, s, 1, 1)
	})
}

func TestDuplicateOfAMessageInFlightIsStoredOnce(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, nil)
		for i := range uint64(20) {
			msg := func() *nats.Msg {
				return &nats.Msg{Subject: r + ".s1.order.e1", Header: header(hdrMsgID, fmt.Sprint(i))}
			}
			a := sendAtOnce(t, h.nc, msg(), msg())
			if a[0].Error != nil || a[0].Duplicate || a[0].Seq != i+1 {
				t.Fatalf("the first: %v", a[0])
			}
			switch {
			case a[1].Duplicate && a[1].Seq == i+1:
			case a[1].code() == errDuplicateInWork && h.replicas > 1: // not yet known where it will stand
			default:
				t.Fatalf("the second: %v", a[1])
			}
		}
		holds(t, s, 20, 20)
	})
}

func TestDuplicateWindowEnds(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		const window = 300 * time.Millisecond
		s, r := h.pos(t, 4, func(c *jetstream.StreamConfig) { c.Duplicates = window })
		subject := r + ".s1.order.e1"
		began := time.Now()
		store(t, h.nc, subject, header(hdrMsgID, "a"), "")
		eventually(t, "the same id is stored again", func() bool {
			a := publish(t, h.nc, subject, header(hdrMsgID, "a"), "")
			if a.Error != nil {
				t.Fatal(a)
			}
			return !a.Duplicate
		})
		if took := time.Since(began); took < window {
			t.Errorf("stored again %v after the first, the window is %v", took, window)
		}
		holds(t, s, 2, 2)
	})
}

// batch sends an atomic batch, and returns the answer to its commit.
func batch(t testing.TB, nc *nats.Conn, id string, msgs ...*nats.Msg) answer {
	t.Helper()
	for i, m := range msgs {
		if m.Header == nil {
			m.Header = nats.Header{}
		}
		m.Header.Set(hdrBatchID, id)
		m.Header.Set(hdrBatchSeq, fmt.Sprint(i+1))
		if i == len(msgs)-1 {
			m.Header.Set(hdrBatchCommit, "1")
			return publish(t, nc, m.Subject, m.Header, "")
		}
		if a := publish(t, nc, m.Subject, m.Header, ""); a != (answer{}) {
			t.Fatalf("message %d of batch %s: %v", i+1, id, a)
		}
	}
	return answer{}
}

func TestDuplicateInsideAnAtomicBatchRefusesTheWholeBatch(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, func(c *jetstream.StreamConfig) { c.AllowAtomicPublish = true })
		msg := func(id string) *nats.Msg {
			return &nats.Msg{Subject: r + ".s1.order.e1", Header: header(hdrMsgID, id)}
		}
		if a := batch(t, h.nc, "good", msg("a"), msg("b"), msg("c")); a.Error != nil || a.Seq != 3 || a.Batch != "good" || a.Count != 3 {
			t.Fatalf("a batch: %+v, want 3 messages up to 3", a)
		}
		holds(t, s, 3, 3)
		if a := batch(t, h.nc, "stored", msg("d"), msg("b"), msg("e")); a.code() != errBatchDuplicate {
			t.Errorf("a batch with an id that is stored: %v, want error %d", a, errBatchDuplicate)
		}
		if a := batch(t, h.nc, "twice", msg("d"), msg("e"), msg("d")); a.code() != errBatchDuplicate {
			t.Errorf("a batch with an id twice: %v, want error %d", a, errBatchDuplicate)
		}
		holds(t, s, 3, 3)
		// The ids of a refused batch are not remembered.
		store(t, h.nc, r+".s1.order.e1", header(hdrMsgID, "d"), "")
		if a := batch(t, h.nc, "later", msg("e"), msg("f")); a.Error != nil || a.Seq != 6 {
			t.Errorf("a batch without duplicates after one with: %+v", a)
		}
	})
}

func TestRefusedForRoomIsNotStored(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		for _, row := range []struct {
			name        string
			limit       func(*jetstream.StreamConfig)
			body        string
			code        int
			description string
		}{
			{
				name:  "the subject's messages",
				limit: func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject, c.DiscardNewPerSubject = 3, true },
				code:  errStoreFailed, description: "maximum messages per subject exceeded",
			},
			{
				name:  "the stream's bytes",
				limit: func(c *jetstream.StreamConfig) { c.MaxBytes = 4000 },
				body:  strings.Repeat("x", 1000),
				code:  errStoreFailed, description: "maximum bytes exceeded",
			},
			{
				name:  "the message's bytes",
				limit: func(c *jetstream.StreamConfig) { c.MaxMsgSize = 100 },
				body:  strings.Repeat("x", 101),
				code:  errMessageTooLarge, description: "message size exceeds maximum allowed",
			},
		} {
			t.Run(row.name, func(t *testing.T) {
				s, r := h.pos(t, 4, func(c *jetstream.StreamConfig) { row.limit(c); c.DenyDelete = false })
				subject := r + ".s1.order.e1"
				var n uint64
				var refused answer
				for refused.Error == nil {
					if refused = publish(t, h.nc, subject, header(hdrMsgID, fmt.Sprint(n+1)), row.body); refused.Error == nil {
						n++
					}
					if n > 3 {
						t.Fatal("not refused")
					}
				}
				if refused.code() != row.code || refused.Error.Description != row.description {
					t.Errorf("refused with %d %q, want %d %q", refused.code(), refused.Error.Description, row.code, row.description)
				}
				// Not what means "try again".
				if refused.Error.Code == 429 || refused.code() == errNoLeader {
					t.Errorf("refused with %+v", refused.Error)
				}
				holds(t, s, n, n)
				for range 2 { // and again: the first refusal has left nothing
					if a := publish(t, h.nc, subject, header(hdrMsgID, fmt.Sprint(n+1)), row.body); a.code() != row.code {
						t.Errorf("again: %v", a)
					}
				}
				holds(t, s, n, n)
				// Once there is room, the refused message's id is no duplicate.
				must(t, func(ctx context.Context) error { return s.Purge(ctx) })
				if seq := store(t, h.nc, subject, header(hdrMsgID, fmt.Sprint(n+1)), ""); seq != n+1 {
					t.Errorf("stored at %d once there was room, want %d", seq, n+1)
				}
			})
		}
	})
}

func TestPerSubjectLimitLeavesOtherSubjectsAlone(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s, r := h.pos(t, 4, func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject, c.DiscardNewPerSubject = 2, true })
		for range 2 {
			store(t, h.nc, r+".s1.order.e1", nil, "")
		}
		if a := publish(t, h.nc, r+".s1.order.e1", nil, ""); a.code() != errStoreFailed {
			t.Errorf("the third: %v, want error %d", a, errStoreFailed)
		}
		for _, subject := range []string{r + ".s1.alert.e1", r + ".s1.order.e2", r + ".s2.order.e1"} {
			store(t, h.nc, subject, nil, "")
		}
		holds(t, s, 5, 5)
	})
}

func TestFirstSequenceComesFromTheClockThatMadeTheStream(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		first := uint64(time.Now().UnixMicro())
		subject := root()
		s := h.stream(t, jetstream.StreamConfig{Subjects: []string{subject}, FirstSeq: first})
		if got := state(t, s); got.Msgs != 0 || got.FirstSeq != first || got.LastSeq != first-1 {
			t.Errorf("an empty stream says %d to %d, want %d to %d", got.FirstSeq, got.LastSeq, first, first-1)
		}
		for want := first; want < first+3; want++ {
			if seq := store(t, h.nc, subject, nil, ""); seq != want {
				t.Errorf("stored at %d, want %d", seq, want)
			}
		}
		must(t, func(ctx context.Context) error { return s.Purge(ctx) })
		if seq := store(t, h.nc, subject, nil, ""); seq != first+3 {
			t.Errorf("stored at %d after a purge, want %d", seq, first+3)
		}
	})
}
