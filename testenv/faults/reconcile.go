package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
)

// Class is one kind of violation. docs/testing.md defines each.
type Class string

const (
	Lost       Class = "lost"
	Inverted   Class = "inverted"
	Late       Class = "late"
	Unreported Class = "unreported"
	Leaked     Class = "leaked"
)

var classes = []Class{Lost, Inverted, Late, Unreported, Leaked}

// Violation is one broken promise.
type Violation struct {
	Class Class
	Site  string
	ID    string // of the message, "" when it is not about one
	What  string
}

func (v Violation) String() string {
	return fmt.Sprintf("%s: site %s id %s: %s", v.Class, cmp.Or(v.Site, "-"), cmp.Or(v.ID, "-"), v.What)
}

// Outcome is what a run's evidence adds up to.
type Outcome struct {
	Accepted  int // messages a POS was told yes for
	Delivered int // of these: the Kitchen has it, and no report says otherwise
	Failed    int // of these: reported as failed
	Repeated  int // requests under a key that was cooked before
	// Reasons counts the failed reports by reason.
	Reasons map[string]int
	Untold  int // accepted ones whose end the POS was not told; a violation only when Evidence.Calm
	// Violations, the most telling of each message first.
	Violations []Violation
}

// Count returns the number of violations of a class.
func (o *Outcome) Count(c Class) int {
	n := 0
	for _, v := range o.Violations {
		if v.Class == c {
			n++
		}
	}
	return n
}

const (
	// attemptSlack is how long after a deadline the head of a request may reach the Kitchen
	// that was begun before: two processes and a scheduler lie between.
	attemptSlack = 150 * time.Millisecond
	// reportMost is how long after its deadline an event may be without a report.
	reportMost = 2 * time.Second
	// clockSlack is how far apart two readings of this machine's clock may lie.
	clockSlack = 20 * time.Millisecond
)

// message names a message: what one POS means by one id, over all epochs of its edge.
type message struct{ site, id string }

// books is the evidence, indexed.
type books struct {
	*Evidence
	out     Outcome
	stored  map[eventID]*Stored
	byID    map[message][]*Stored
	settled map[eventID][]*Settled
	dead    map[eventID][]*Dead
	asked   map[message][]*kitchen.Record
	told    map[message][]*Told
}

// Reconcile judges a run. It looks at nothing but the evidence.
func Reconcile(e *Evidence) Outcome {
	b := &books{
		Evidence: e,
		stored:   map[eventID]*Stored{}, byID: map[message][]*Stored{}, settled: map[eventID][]*Settled{}, dead: map[eventID][]*Dead{},
		asked: map[message][]*kitchen.Record{}, told: map[message][]*Told{},
	}
	for i := range e.Stored {
		s := &e.Stored[i]
		if s.Forged != "" {
			continue
		}
		if first := b.stored[s.eventID]; first != nil {
			b.violated(Inverted, s.Site, s.ID, "the edge stored two events under %v, at %d and %d", s.eventID, first.StreamSeq, s.StreamSeq)
			continue
		}
		b.stored[s.eventID] = s
		b.byID[message{s.Site, s.ID}] = append(b.byID[message{s.Site, s.ID}], s)
	}
	for m, events := range b.byID {
		epochs := map[string]*Stored{}
		for _, s := range events {
			if first := epochs[s.Epoch]; first != nil {
				b.violated(Inverted, m.site, m.id, "the edge stored one message twice, at %d and %d", first.StreamSeq, s.StreamSeq)
			}
			epochs[s.Epoch] = s
		}
	}
	for i := range e.Settled {
		b.settled[e.Settled[i].eventID] = append(b.settled[e.Settled[i].eventID], &e.Settled[i])
	}
	for i := range e.Dead {
		b.dead[e.Dead[i].eventID] = append(b.dead[e.Dead[i].eventID], &e.Dead[i])
	}
	for i := range e.Asked {
		r := &e.Asked[i]
		b.asked[message{r.Site, r.Key}] = append(b.asked[message{r.Site, r.Key}], r)
		if r.Repeat {
			b.out.Repeated++
		}
	}
	for i := range e.Told {
		t := &e.Told[i]
		b.told[message{t.Site, t.id()}] = append(b.told[message{t.Site, t.id()}], t)
	}
	for i := range e.Told {
		b.judgeTold(&e.Told[i])
	}
	for i := range e.Stored {
		if s := &e.Stored[i]; b.stored[s.eventID] == s {
			b.judgeStored(s)
		}
	}
	b.judgeReports()
	b.judgeForged()
	b.judgeOrder()
	b.judgeTime()
	b.judgeScreens()
	for _, l := range e.Leaks {
		b.violated(Leaked, "", "", "%s in %s", l.What, l.Where)
	}
	return b.out
}

func (b *books) violated(c Class, site, id, format string, args ...any) {
	b.out.Violations = append(b.out.Violations, Violation{c, site, id, fmt.Sprintf(format, args...)})
}

// taken tells whether the Kitchen has the message: it cooked it, or it said that it has
// it already.
func (b *books) taken(m message) bool {
	return slices.ContainsFunc(b.asked[m], func(r *kitchen.Record) bool { return r.Delivered() || r.Status == 409 })
}

// reports returns those on every event of the message.
func (b *books) reports(m message) (all []*Settled) {
	for _, s := range b.byID[m] {
		all = append(all, b.settled[s.eventID]...)
	}
	return all
}

func (b *books) judgeTold(t *Told) {
	m := message{t.Site, t.id()}
	if t.IDMoved || t.WantID != "" && t.ID != "" && t.ID != t.WantID {
		b.violated(Inverted, t.Site, t.ID, "attempts at one message got different ids: the edge took one for two (want %s)", t.WantID)
	}
	if t.Within > 0 {
		for _, s := range b.byID[m] {
			if life := s.Deadline.Sub(s.Accepted); life > t.Within {
				b.violated(Late, t.Site, m.id, "a deadline %v after acceptance, and the POS asked for %v", life, t.Within)
			}
		}
	}
	reports := b.reports(m)
	ended := func(state string) bool {
		return slices.ContainsFunc(reports, func(r *Settled) bool { return r.State == state })
	}
	if !t.State.Accepted() {
		if t.State == pos.Refused && len(b.byID[m]) > 0 && m.id != "" {
			b.violated(Unreported, t.Site, m.id, "the POS was told that it is not stored (%d %s), and it is", t.Status, t.Reason)
		}
		return
	}
	b.out.Accepted++
	switch taken := b.taken(m); {
	case ended("delivered") && taken:
		b.out.Delivered++
	case ended("failed"):
		b.out.Failed++
	case taken && len(b.byID[m]) > 0:
		b.out.Delivered++ // and judgeStored misses the report
	case len(b.byID[m]) == 0:
		b.violated(Lost, t.Site, m.id, "the POS was told %d (%s), and the hub does not have it", t.Status, t.State)
	case ended("delivered"):
		b.violated(Lost, t.Site, m.id, "reported as delivered, and the Kitchen never took it (%d requests)", len(b.asked[m]))
	default:
		b.violated(Lost, t.Site, m.id, "the POS was told %d (%s), and it was neither cooked nor reported (%d requests)", t.Status, t.State, len(b.asked[m]))
	}
	switch {
	case t.State == pos.Pending:
		b.out.Untold++
		if b.Calm {
			b.violated(Unreported, t.Site, m.id, "the POS still asks in vain (last answer %d)", t.PollCode)
		}
	case !ended(string(t.State)):
		b.violated(Unreported, t.Site, m.id, "the POS was told %s, and no report says so", t.State)
	}
}

func (b *books) judgeStored(s *Stored) {
	reports := b.settled[s.eventID]
	if len(reports) == 0 {
		where := "nothing became of it"
		if b.taken(message{s.Site, s.ID}) {
			where = "the Kitchen took it"
		} else if len(b.dead[s.eventID]) > 0 {
			where = "it is a dead letter: " + b.dead[s.eventID][0].Reason
		}
		b.violated(Unreported, s.Site, s.ID, "event %v at %d has no report; %s", s.eventID, s.StreamSeq, where)
	}
	if len(reports) > 0 && b.Calm {
		if over := reports[0].At.Sub(s.Deadline); over > reportMost {
			b.violated(Unreported, s.Site, s.ID, "event %v was reported %v after its deadline", s.eventID, over)
		}
	}
	if len(reports) > 1 {
		b.violated(Unreported, s.Site, s.ID, "event %v has %d reports: %s, then %s", s.eventID, len(reports), reports[0].State, reports[1].State)
	}
}

func (b *books) judgeReports() {
	for i := range b.Settled {
		r := &b.Settled[i]
		s := b.stored[r.eventID]
		if s == nil {
			b.violated(Unreported, r.Site, r.ID, "report on event %v, which no edge stored", r.eventID)
			continue
		}
		if s.ID != r.ID {
			b.violated(Unreported, r.Site, r.ID, "report on event %v names another id than the event, %s", r.eventID, s.ID)
		}
		// Requests for this event alone: another epoch may have sent the same message.
		var asked []*kitchen.Record
		for _, q := range b.asked[message{r.Site, r.ID}] {
			if q.Edge == r.Edge && q.Epoch == r.Epoch && q.Seq == r.Seq {
				asked = append(asked, q)
			}
		}
		yes := slices.ContainsFunc(asked, func(q *kitchen.Record) bool { return q.Status/100 == 2 || q.Status == 409 })
		switch r.State {
		case "delivered":
			if !yes {
				b.violated(Unreported, r.Site, r.ID, "reported as delivered, and the Kitchen said yes to none of %d requests", len(asked))
			}
		case "failed":
			if b.out.Reasons == nil {
				b.out.Reasons = map[string]int{}
			}
			b.out.Reasons[r.Reason]++
			if len(b.dead[r.eventID]) == 0 {
				b.violated(Unreported, r.Site, r.ID, "reported as failed (%s), and there is no dead letter", r.Reason)
			}
			if yes && b.Calm && r.Reason != "outcome-unknown" && slices.ContainsFunc(asked, clearYes) {
				b.violated(Unreported, r.Site, r.ID, "reported as failed (%s), and the Kitchen had answered yes", r.Reason)
			}
		default:
			b.violated(Unreported, r.Site, r.ID, "report of state %q", r.State)
		}
	}
	for i := range b.Dead {
		d := &b.Dead[i]
		if s := b.stored[d.eventID]; s != nil && s.StreamSeq == d.StreamSeq && d.Reason == quarantine {
			b.violated(Unreported, d.Site, d.ID, "event %v of an edge was quarantined", d.eventID)
		}
	}
}

// clearYes: a whole answer that the client waited for.
func clearYes(q *kitchen.Record) bool { return q.Status/100 == 2 && q.Action == "" && !q.GaveUp }

// judgeForged: what no edge made is neither cooked nor reported, and leaves a trace. One
// that bears the number of a true event shows, when it is posted, as an attempt too many.
func (b *books) judgeForged() {
	traced := map[uint64]bool{}
	for i := range b.Dead {
		if b.Dead[i].Reason == quarantine {
			traced[b.Dead[i].StreamSeq] = true
		}
	}
	for i := range b.Stored {
		s := &b.Stored[i]
		if s.Forged == "" {
			continue
		}
		if !traced[s.StreamSeq] {
			b.violated(Unreported, s.Site, s.ID, "a forged event (%s) is on the hub, at %d, and was not quarantined", s.Forged, s.StreamSeq)
		}
		if m := (message{s.Site, s.ID}); len(b.byID[m]) == 0 && len(b.asked[m]) > 0 {
			b.violated(Inverted, s.Site, s.ID, "a forged event (%s) reached the Kitchen (answer %d)", s.Forged, b.asked[m][0].Status)
		}
	}
}

// judgeOrder: each site's Kitchen cooks in the order of the stream, everything once.
func (b *books) judgeOrder() {
	var cooked []*kitchen.Record
	for i := range b.Asked {
		r := &b.Asked[i]
		for _, p := range r.Problems {
			if r.Late && b.Lag > b.Settle-lateMost && (p == kitchen.SeqInverted || p == kitchen.VersionInverted) {
				continue // the stub itself took longer than settle
			}
			b.violated(Inverted, r.Site, r.Key, "the Kitchen saw %s: seq %d of epoch %s, order %s version %d", p, r.Seq, r.Epoch, r.OrderID, r.Version)
		}
		if r.Delivered() {
			cooked = append(cooked, r)
		}
	}
	slices.SortFunc(cooked, func(x, y *kitchen.Record) int { return cmp.Compare(x.Place, y.Place) })
	last := map[string]*Stored{}
	for _, r := range cooked {
		s := b.stored[eventID{r.Site, r.Edge, r.Epoch, r.Seq}]
		if s == nil {
			b.violated(Inverted, r.Site, r.Key, "the Kitchen cooked an event that is not on the hub: seq %d of %s.%s", r.Seq, r.Edge, r.Epoch)
			continue
		}
		if before := last[r.Site]; before != nil && before.StreamSeq > s.StreamSeq && !r.Inverted() && !r.Late {
			b.violated(Inverted, r.Site, r.Key, "stream sequence %d was cooked after %d", s.StreamSeq, before.StreamSeq)
		} else {
			last[r.Site] = s
		}
	}
}

// judgeTime: no attempt after the deadline or the end, nothing cooked after both.
func (b *books) judgeTime() {
	for i := range b.Stored {
		s := &b.Stored[i]
		if b.stored[s.eventID] != s {
			continue
		}
		want, ok := b.Deadlines[s.Kind]
		if life := s.Deadline.Sub(s.Accepted); ok && (life > want || life <= 0) {
			b.violated(Late, s.Site, s.ID, "a deadline %v after acceptance, and the edge was told %v", life, want)
		}
		// The edge's clock is the machine's: it cannot have accepted what was not sent yet,
		// nor later than the hub stored it.
		if s.Accepted.After(s.At.Add(clockSlack)) {
			b.violated(Late, s.Site, s.ID, "accepted at %v, after the hub stored it", s.Accepted)
		}
	}
	for i := range b.Asked {
		r := &b.Asked[i]
		id := eventID{r.Site, r.Edge, r.Epoch, r.Seq}
		s := b.stored[id]
		if s == nil {
			continue
		}
		// Of a request whose client is gone nobody knows when it was begun; and what was cut off
		// may be read late by a Kitchen without time.
		begun := func(end time.Time) time.Duration {
			if r.GaveUp {
				return 0
			}
			return r.Received.Sub(end) - b.Lag
		}
		if over := begun(s.Deadline); over > attemptSlack {
			b.violated(Late, r.Site, r.Key, "attempt %d reached the Kitchen %v after the deadline (lag %v, answer %d)", r.Attempt, over, b.Lag, r.Status)
		}
		if over := r.Processed.Sub(s.Deadline); !r.Processed.IsZero() && over > b.Settle+attemptSlack+b.Lag {
			b.violated(Late, r.Site, r.Key, "cooked %v after the deadline; settle is %v (lag %v)", over, b.Settle, b.Lag)
		}
		if reports := b.settled[id]; len(reports) > 0 {
			if over := begun(reports[0].At); over > clockSlack {
				b.violated(Late, r.Site, r.Key, "attempt %d reached the Kitchen %v after the report (%s) was stored (lag %v, answer %d)", r.Attempt, over, reports[0].State, b.Lag, r.Status)
			}
		}
	}
}

// screenSlack is how late a screen may hear of something on a busy machine.
const screenSlack = 300 * time.Millisecond

// judgeScreens: a connected screen misses nothing in silence, and is not told that all is
// well while the hub is away.
func (b *books) judgeScreens() {
	byTriple := map[string]*Stored{}
	bySite := map[string][]*Stored{}
	for i := range b.Stored {
		if s := &b.Stored[i]; b.stored[s.eventID] == s {
			byTriple[tripleOf(s.Site, s.Fingerprint, s.IV)] = s
			bySite[s.Site] = append(bySite[s.Site], s)
		}
	}
	byPayload := map[message]*Stored{} // id is the payload's hash
	for _, told := range b.told {
		for _, t := range told {
			if events := b.byID[message{t.Site, t.id()}]; len(events) > 0 {
				byPayload[message{t.Site, t.PayloadHash}] = events[0]
			}
		}
	}
	for i := range b.Screens {
		sc := &b.Screens[i]
		var last *Stored
		got := map[*Stored]bool{}
		for _, f := range sc.Frames {
			s := byTriple[tripleOf(sc.Site, f.Fingerprint, f.IV)]
			if f.IV == "" || s == nil { // plain, or sealed anew for the screen
				s = byPayload[message{sc.Site, f.PayloadHash}]
			}
			switch {
			case s == nil:
				b.violated(Inverted, sc.Site, "", "screen %s was shown what no edge stored", sc.Name)
				continue
			case f.PayloadHash == "":
				b.violated(Lost, sc.Site, s.ID, "screen %s could not open it", sc.Name)
			case last != nil && s.StreamSeq <= last.StreamSeq:
				b.violated(Inverted, sc.Site, s.ID, "screen %s was shown stream sequence %d after %d", sc.Name, s.StreamSeq, last.StreamSeq)
			}
			got[s] = true
			if last == nil || s.StreamSeq > last.StreamSeq {
				last = s
			}
		}
		// One violation for each run of events that a screen missed says as much as one for each.
		var missed []*Stored
		for _, s := range bySite[sc.Site] {
			switch {
			case got[s]:
				b.missed(sc, last, missed)
				missed = nil
			case s.At.After(sc.Opened.Add(clockSlack)):
				missed = append(missed, s)
			}
		}
		b.missed(sc, last, missed)
		if !sc.Slow {
			b.judgeBeats(sc)
		}
	}
}

// missed judges a run of events that a screen was not shown while it was connected. last
// is the last event that it was shown.
func (b *books) missed(sc *Session, last *Stored, missed []*Stored) {
	if len(missed) == 0 {
		return
	}
	first := missed[0]
	what := fmt.Sprintf("screen %s, %d frames and %d isAlive? in all (%d of them after this), was not shown %d events from %d on", sc.Name, len(sc.Frames), len(sc.Beats),
		len(slices.DeleteFunc(slices.Clone(sc.Beats), first.At.After)), len(missed), first.StreamSeq)
	switch silent := sc.Closed.Sub(first.At); {
	case last != nil && first.StreamSeq < last.StreamSeq:
		b.violated(Lost, sc.Site, first.ID, "%s, and was shown %d", what, last.StreamSeq)
	case sc.Closed.IsZero():
		b.violated(Lost, sc.Site, first.ID, "%s, and is connected", what)
	case !sc.Slow && silent-b.Lag > b.Screen.StaleClose+b.Screen.WriteTimeout+b.Screen.Heartbeat+2*screenSlack:
		b.violated(Lost, sc.Site, first.ID, "%s, and was told %v later", what, silent)
	}
}

func tripleOf(site, fingerprint, iv string) string { return site + " " + fingerprint + " " + iv }

// last is when the session showed that it was there: its end, or the last that came.
func (sc *Session) last() time.Time {
	at := sc.Closed
	if n := len(sc.Frames); n > 0 && sc.Frames[n-1].At.After(at) {
		at = sc.Frames[n-1].At
	}
	return at
}

// judgeBeats: in an outage isAlive? stops, then the socket closes.
func (b *books) judgeBeats(sc *Session) {
	calm := !slices.ContainsFunc(b.Outages, func(out Span) bool {
		return out.To.After(sc.Opened) && (sc.Closed.IsZero() || out.From.Before(sc.Closed))
	})
	if long := sc.last().Sub(sc.Opened); len(sc.Beats) == 0 && calm && long > 3*b.Screen.Heartbeat+screenSlack+b.Lag {
		b.violated(Lost, sc.Site, "", "screen %s was connected for %v and never heard isAlive?", sc.Name, long)
	}
	for _, out := range b.Outages {
		silent := out.From.Add(b.Screen.Stale + b.Screen.Heartbeat + screenSlack + b.Lag)
		for _, at := range sc.Beats {
			if at.After(silent) && at.Before(out.To) {
				b.violated(Lost, sc.Site, "", "screen %s was told isAlive? %v after the hub was gone", sc.Name, at.Sub(out.From))
				break
			}
		}
		gone := out.From.Add(b.Screen.StaleClose + b.Screen.Heartbeat + 2*screenSlack + b.Lag)
		if out.To.After(gone) && sc.Opened.Before(out.From) && (sc.Closed.IsZero() || sc.Closed.After(gone)) {
			b.violated(Lost, sc.Site, "", "screen %s stayed connected for more than %v without a hub", sc.Name, gone.Sub(out.From))
		}
	}
}
