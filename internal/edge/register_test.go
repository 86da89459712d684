package edge

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// drops reads kb_edge_drops_total of a reason.
func drops(tb testing.TB, m *metrics, reason string) int {
	tb.Helper()
	return counted(tb, m.drops.WithLabelValues(reason))
}

// counted reads a counter.
func counted(tb testing.TB, c prometheus.Collector) int {
	tb.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(c)
	families, err := r.Gather()
	if err != nil {
		tb.Fatal(err)
	}
	return int(families[0].GetMetric()[0].GetCounter().GetValue())
}

func claimed(tb testing.TB, r *register, id string) *message {
	tb.Helper()
	m, fresh, err := r.claim(claim{id: id, site: "one", who: "till"})
	if err != nil || !fresh {
		tb.Fatalf("%s: fresh %v, %v", id, fresh, err)
	}
	m.numbered(1, time.Now(), time.Now().Add(time.Minute))
	return m
}

func settled(r *register, id string, body int) {
	r.settle(verdict{site: "one", id: id, seq: 1, state: stateDelivered, answer: answer{body: make([]byte, body)}}, time.Now())
}

func has(r *register, id string) bool { _, ok := r.find(id, "one", "till"); return ok }

func TestRegisterForgetsTheOldestSettledAndNeverTheUnsettled(t *testing.T) {
	m := newMetrics()
	r := newRegister(3, 1<<20, m.drops)
	for _, id := range []string{"a", "b", "c"} {
		claimed(t, r, id).stored()
	}
	if _, _, err := r.claim(claim{id: "d", site: "one"}); !errors.Is(err, errFull) {
		t.Fatalf("with three unsettled: %v", err)
	}
	settled(r, "c", 0)
	settled(r, "a", 0)
	claimed(t, r, "d")
	if has(r, "c") || !has(r, "a") || !has(r, "b") {
		t.Error("the one settled first was c")
	}
	claimed(t, r, "e")
	if has(r, "a") || !has(r, "b") {
		t.Error("next was a; b is unsettled")
	}
	if got := drops(t, m, dropMessage); got != 2 {
		t.Errorf("%d counted", got)
	}
	if got := r.waiting(); got != 3 {
		t.Errorf("%d unsettled, want b, d, e", got)
	}
}

func TestRegisterBoundsTheAnswersItKeeps(t *testing.T) {
	m := newMetrics()
	r := newRegister(100, 1000, m.drops)
	for _, id := range []string{"a", "b", "c", "d"} {
		claimed(t, r, id)
	}
	settled(r, "b", 600)
	settled(r, "a", 300)
	settled(r, "c", 300)
	if has(r, "b") || !has(r, "a") || !has(r, "c") || r.bytes != 600 {
		t.Errorf("b alone had to go; %d bytes", r.bytes)
	}
	settled(r, "d", 5000) // alone above the bound: it stays until another comes
	if has(r, "a") || has(r, "c") || !has(r, "d") || r.bytes != 5000 {
		t.Errorf("only d can stay; %d bytes", r.bytes)
	}
	if got := drops(t, m, dropAnswer); got != 3 {
		t.Errorf("%d counted", got)
	}
}

func TestRegisterRecognizesWhatCameBefore(t *testing.T) {
	r := newRegister(100, 1<<20, newMetrics().drops)
	one := claim{id: "a", envelope: "e1", site: "one", hash: [32]byte{1}}
	first, fresh, err := r.claim(one)
	if err != nil || !fresh {
		t.Fatal(err)
	}
	again := one
	again.envelope = "e2"
	if m, fresh, err := r.claim(again); m != first || fresh || err != nil {
		t.Errorf("under a fresh envelope: %v, %v", fresh, err)
	}
	other := one
	other.hash = [32]byte{2}
	if _, _, err := r.claim(other); !errors.Is(err, errOtherPayload) {
		t.Errorf("another payload: %v", err)
	}
	for _, e := range []string{"e1", "e2"} {
		if _, _, err := r.claim(claim{id: "b", envelope: e, site: "one", hash: [32]byte{1}}); !errors.Is(err, errEnvelopeSeen) {
			t.Errorf("envelope %s under another id: %v", e, err)
		}
	}
	// What certainly is not stored leaves nothing behind.
	first.refuse(errAway)
	if m, fresh, err := r.claim(other); m == first || !fresh || err != nil {
		t.Errorf("after it was refused: %v, %v", fresh, err)
	}
	if len(r.byEnvelope) != 1 || r.unsettled.n != 1 {
		t.Errorf("%d envelopes, %d unsettled", len(r.byEnvelope), r.unsettled.n)
	}
}

func TestRegisterBoundsTheEnvelopesOfAMessage(t *testing.T) {
	m := newMetrics()
	r := newRegister(100, 1<<20, m.drops)
	for i := range 3 * maxEnvelopes {
		if _, fresh, err := r.claim(claim{id: "a", envelope: fmt.Sprint(i), site: "one"}); err != nil || fresh != (i == 0) {
			t.Fatal(fresh, err)
		}
	}
	if len(r.byEnvelope) != maxEnvelopes || drops(t, m, dropEnvelope) != 2*maxEnvelopes {
		t.Errorf("%d kept, %d counted", len(r.byEnvelope), drops(t, m, dropEnvelope))
	}
	if _, _, err := r.claim(claim{id: "b", envelope: fmt.Sprint(3*maxEnvelopes - 1), site: "one"}); !errors.Is(err, errEnvelopeSeen) {
		t.Error("the newest was forgotten")
	}
}

func TestTheFirstEndWins(t *testing.T) {
	r := newRegister(100, 1<<20, newMetrics().drops)
	m := claimed(t, r, "a")
	at := time.Now()
	for _, v := range []verdict{
		{site: "two", id: "a", seq: 1, state: stateFailed},
		{site: "one", id: "a", seq: 2, state: stateFailed},
		{site: "one", id: "b", seq: 1, state: stateFailed},
	} {
		if r.settle(v, at) {
			t.Errorf("%+v was taken for it", v)
		}
	}
	if m.now().state != statePending {
		t.Fatal("settled by what is not about it")
	}
	// The report may come before the acknowledgement; that and everything else come too late.
	if !r.settle(verdict{site: "one", id: "a", seq: 1, state: stateFailed, reason: "refused"}, at) {
		t.Fatal("not found")
	}
	if !r.settle(verdict{site: "one", id: "a", seq: 1, state: stateDelivered}, at) {
		t.Error("a second report is about a message that is known")
	}
	m.unknown()
	m.stored()
	m.refuse(errAway)
	if v := m.now(); v.state != stateFailed || v.reason != "refused" {
		t.Errorf("state %s, reason %s", v.state, v.reason)
	}
	if r.waiting() != 0 || r.settled.n != 1 {
		t.Errorf("%d unsettled, %d settled", r.waiting(), r.settled.n)
	}
}

func TestSweep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegister(100, 1<<20, newMetrics().drops)
		old := claimed(t, r, "old")
		old.stored()
		silent := claimed(t, r, "silent")
		silent.unknown()
		claimed(t, r, "gone")
		settled(r, "gone", 10)

		time.Sleep(rememberFor)
		if got := r.sweep(time.Now()); got != nil || !has(r, "gone") {
			t.Errorf("after 24 h: %v, gone remembered: %v", got, has(r, "gone"))
		}
		time.Sleep(time.Second)
		young := claimed(t, r, "young")
		young.stored()
		r.sweep(time.Now())
		if has(r, "gone") || r.bytes != 0 {
			t.Error("settled for more than 24 h, and remembered")
		}

		time.Sleep(noReportAfter - rememberFor + time.Minute - time.Second)
		if got := r.sweep(time.Now()); got != nil {
			t.Errorf("72 h after the deadline: %v", got)
		}
		time.Sleep(time.Second)
		if got := r.sweep(time.Now()); !slices.Equal(got, []string{"old"}) {
			t.Errorf("later: %v, want the stored one only", got)
		}
		if v := old.now(); v.state != stateFailed || v.reason != "no-report" {
			t.Errorf("state %s, reason %s", v.state, v.reason)
		}
		if silent.now().state != stateUnknown || young.now().state != stateAccepted {
			t.Error("another one was ended too")
		}
	})
}

// Many at once: nothing is lost from the lists, whatever the order of events.
func TestRegisterUnderManyAtOnce(t *testing.T) {
	r := newRegister(50, 4096, newMetrics().drops)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(g), 7))
			for range 500 {
				id := fmt.Sprint(random.IntN(80))
				m, fresh, err := r.claim(claim{id: id, envelope: "e" + id, site: "one", who: "till"})
				if err != nil || !fresh {
					continue
				}
				m.numbered(1, time.Now(), time.Now().Add(time.Minute))
				switch random.IntN(4) {
				case 0:
					m.refuse(errAway)
				default:
					m.stored()
					r.settle(verdict{site: "one", id: id, seq: 1, state: stateDelivered, answer: answer{body: make([]byte, random.IntN(200))}}, time.Now())
				}
			}
		})
	}
	wg.Wait()
	if r.unsettled.n != 0 || r.settled.n != len(r.byID) || len(r.byEnvelope) != len(r.byID) || len(r.byID) > 50 {
		t.Errorf("%d unsettled, %d settled, %d by id, %d by envelope", r.unsettled.n, r.settled.n, len(r.byID), len(r.byEnvelope))
	}
	var bytes int64
	n := 0
	for m := r.settled.first; m != nil; m = m.next {
		bytes += int64(len(m.answer.body))
		n++
	}
	if bytes != r.bytes || bytes > 4096 || n != r.settled.n {
		t.Errorf("%d bytes counted as %d; %d messages counted as %d", bytes, r.bytes, n, r.settled.n)
	}
}

func TestDocumentSaysWhatIsOverdue(t *testing.T) {
	at := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	for _, tc := range []struct {
		state state
		after time.Duration
		want  bool
	}{
		{stateAccepted, time.Minute, false},
		{stateAccepted, time.Minute + 1, true},
		{stateUnknown, time.Hour, true},
		{stateDelivered, time.Hour, false},
		{stateFailed, time.Hour, false},
	} {
		v := view{state: tc.state, accepted: at, deadline: at.Add(time.Minute)}
		if got := v.document(at.Add(tc.after)).Overdue; got != tc.want {
			t.Errorf("%s after %v: overdue %v", tc.state, tc.after, got)
		}
	}
	if strings.Contains(fmt.Sprint(view{state: statePending}.document(at)), "true") {
		t.Error("what has no deadline yet cannot be overdue")
	}
}
