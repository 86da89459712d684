package edge

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

func TestReportsSettleOnlyWhatTheyProve(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(r *broker.Report) // after it was tagged
		retag bool                   // and tag it again: the bridge said so
		state state
		drop  string
	}{
		{name: "as the bridge sent it", state: stateDelivered},
		{name: "state changed", spoil: func(r *broker.Report) { r.State = "failed" }, state: stateAccepted, drop: dropUnverified},
		{name: "status changed", spoil: func(r *broker.Report) { r.Status = 500 }, state: stateAccepted, drop: dropUnverified},
		{name: "of another message", spoil: func(r *broker.Report) { r.ID = "other" }, state: stateAccepted, drop: dropUnverified},
		{name: "of another site", spoil: func(r *broker.Report) { r.Site = "strict" }, state: stateAccepted, drop: dropUnverified},
		{name: "of a site that is not here", spoil: func(r *broker.Report) { r.Site = "nowhere" }, state: stateAccepted, drop: dropUnknown},
		{name: "answer changed", spoil: func(r *broker.Report) { r.Triple.Message = []byte("AAAA" + string(r.Triple.Message[4:])) }, state: stateAccepted, drop: dropUnverified},
		{name: "binding key that is none", spoil: func(r *broker.Report) { r.Bind = "b9" }, state: stateAccepted, drop: dropUnverified},
		{name: "no tag", spoil: func(r *broker.Report) { r.Tag = "" }, state: stateAccepted, drop: dropUnverified},
		{name: "of another edge", spoil: func(r *broker.Report) { r.Edge = "store-8" }, state: stateAccepted},
		{name: "of the epoch before", spoil: func(r *broker.Report) { r.Epoch = "epochbefore" }, retag: true, state: stateAccepted, drop: dropUnknown},
		{name: "of another number", spoil: func(r *broker.Report) { r.Seq = 9 }, retag: true, state: stateAccepted, drop: dropUnknown},
		{name: "a state that is none", spoil: func(r *broker.Report) { r.State = "accepted" }, retag: true, state: stateAccepted, drop: dropMalformed},
		{name: "an answer that does not open", spoil: func(r *broker.Report) { r.Triple.Message = []byte("AAAA") }, retag: true, state: stateDelivered, drop: dropAnswerSeal},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t, nil)
			w := r.do(t.Context(), call{token: tokenTill1, body: order, header: with("Idempotency-Key", "k", "Prefer", "wait=0")})
			d := r.store.stored()[0]
			report := r.store.reportOf(d, 1, cooks(d))
			if tc.spoil != nil {
				tc.spoil(report)
			}
			if tc.retag {
				report.Tag = r.portal.Site("gcm").Binding.Current().TagReport(&report.Report)
			}
			r.follow.take(report)
			v, ok := r.edge.register.find(w.Header().Get("Kb-Id"), "gcm", "till-1")
			if !ok || v.state != tc.state {
				t.Errorf("state %s, want %s", v.state, tc.state)
			}
			for _, reason := range []string{dropUnverified, dropUnknown, dropMalformed, dropAnswerSeal} {
				want := 0
				if reason == tc.drop {
					want = 1
				}
				if got := drops(t, r.edge.metrics, reason); got != want {
					t.Errorf("%s counted %d times, want %d", reason, got, want)
				}
			}
			if tc.state != stateDelivered {
				return
			}
			again := r.do(t.Context(), call{token: tokenTill1, body: order, header: with("Idempotency-Key", "k", "Prefer", "wait=0")})
			want := `{"ticket":17}`
			if tc.drop == dropAnswerSeal {
				want = ""
			}
			if again.Code != 201 || again.Body.String() != want {
				t.Errorf("asked again: %d %s", again.Code, again.Body)
			}
		})
	}
}

// The bridge may have read a new binding file before the edge: its report settles the message
// all the same, and one under a key that is in no file does not.
func TestReportUnderABindingKeyThatIsInTheFileOnly(t *testing.T) {
	for _, found := range []bool{true, false} {
		t.Run(fmt.Sprint(found), func(t *testing.T) {
			r := newRig(t, nil)
			w := r.do(t.Context(), call{token: tokenTill1, body: order, header: with("Idempotency-Key", "k", "Prefer", "wait=0")})
			d := r.store.stored()[0]
			report := r.store.reportOf(d, 1, cooks(d))
			fresh, err := envelope.NewBindingKey("b2", bytes.Repeat([]byte{7}, 32))
			if err != nil {
				t.Fatal(err)
			}
			before := r.portal.Site("gcm")
			sealed, err := fresh.SealReport([]byte(`{"status":201,"headers":{},"body":""}`))
			if err != nil {
				t.Fatal(err)
			}
			report.Bind, report.Triple = "b2", sealed
			report.Tag = fresh.TagReport(&report.Report)
			looks := 0
			r.portal.reread = func() {
				looks++
				if !found {
					return
				}
				both, err := envelope.NewBinding("gcm", before.Binding.Lane(), fresh, before.Binding.Current())
				if err != nil {
					t.Fatal(err)
				}
				now := *before
				now.Binding = both
				r.portal.mu.Lock()
				defer r.portal.mu.Unlock()
				r.portal.sites["gcm"] = &now
			}
			r.follow.take(report)
			want, unverified := stateDelivered, 0
			if !found {
				want, unverified = stateAccepted, 1
			}
			if v, ok := r.edge.register.find(w.Header().Get("Kb-Id"), "gcm", "till-1"); !ok || v.state != want {
				t.Errorf("state %s, want %s", v.state, want)
			}
			if n := drops(t, r.edge.metrics, dropUnverified); n != unverified || looks != 1 {
				t.Errorf("%d unverified, want %d; %d looks at the file", n, unverified, looks)
			}
		})
	}
}

func TestReportsWarnOfAFloodOnce(t *testing.T) {
	var log strings.Builder
	r := newRig(t, func(c *Config) { c.Log = textLog(&log) })
	r.follow.log = r.edge.log
	forged := &broker.Report{}
	forged.Edge, forged.Site, forged.State = "store-7", "gcm", "delivered"
	for range 100 {
		r.follow.take(forged)
	}
	if n := strings.Count(log.String(), "report is not usable"); n != 1 {
		t.Errorf("%d lines", n)
	}
	if got := drops(t, r.edge.metrics, dropUnverified); got != 100 {
		t.Errorf("%d counted", got)
	}
}
