package main

import (
	"slices"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
)

var t0 = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func at(ms int) time.Time { return t0.Add(time.Duration(ms) * time.Millisecond) }

// sound is the evidence of a run without fault: two orders of one site delivered, one
// failed, one forged event quarantined, a screen that was shown all three.
func sound() *Evidence {
	e := &Evidence{
		Deadlines: map[string]time.Duration{"order": 10 * time.Second},
		Settle:    300 * time.Millisecond,
		Calm:      true,
		Screen:    ScreenTimes{Heartbeat: 200 * time.Millisecond, Stale: time.Second, StaleClose: 2 * time.Second, WriteTimeout: time.Second},
	}
	screen := Session{Site: "s", Name: "one", Opened: at(-10), Beats: []time.Time{at(0), at(200)}}
	for i, id := range []string{"a", "b", "c"} {
		seq, ms := uint64(i+1), 100*(i+1)
		ev := eventID{"s", "edge", "epoch", seq}
		iv, hash := "iv-"+id, "hash-"+id
		state, kitchenStatus := "delivered", 200
		entry := pos.Entry{N: seq, Site: "s", Kind: "order", State: pos.Delivered, ID: id, Status: 202, PayloadHash: hash, Sent: at(ms - 5)}
		r := kitchen.Record{N: seq, Site: "s", Kind: "order", Key: id, Edge: "edge", Epoch: "epoch", Seq: seq, Attempt: 1, Received: at(ms + 5), Answered: at(ms + 8), Status: 200}
		if id == "c" {
			state, kitchenStatus, entry.State, r.Status = "failed", 422, pos.Failed, 422
			e.Dead = append(e.Dead, Dead{eventID: ev, ID: id, Reason: "refused", At: at(ms + 9)})
		} else {
			r.Processed, r.Place = at(ms+7), seq
		}
		e.Told = append(e.Told, Told{Entry: entry, WantID: id})
		e.Asked = append(e.Asked, r)
		e.Stored = append(e.Stored, Stored{eventID: ev, Kind: "order", ID: id, StreamSeq: seq, At: at(ms), Accepted: at(ms - 1), Deadline: at(ms - 1 + 10_000), IV: iv, Fingerprint: "fp"})
		e.Settled = append(e.Settled, Settled{eventID: ev, ID: id, Kind: "order", Endpoint: "kitchen", State: state, Status: kitchenStatus, Attempts: 1, At: at(ms + 10)})
		screen.Frames = append(screen.Frames, Frame{At: at(ms + 1), IV: iv, Fingerprint: "fp", PayloadHash: hash})
	}
	e.Screens = []Session{screen}
	forged := eventID{"s", "edge", "epoch", 2}
	e.Stored = append(e.Stored, Stored{eventID: forged, Kind: "order", ID: "forged", StreamSeq: 4, At: at(500), Accepted: at(400), Deadline: at(9000), IV: "iv-x", Fingerprint: "fp", Forged: "another id"})
	e.Dead = append(e.Dead, Dead{eventID: forged, ID: "forged", Reason: quarantine, StreamSeq: 4, At: at(510)})
	return e
}

func TestSoundEvidenceIsSound(t *testing.T) {
	o := Reconcile(sound())
	if len(o.Violations) > 0 || o.Accepted != 3 || o.Delivered != 2 || o.Failed != 1 || o.Repeated != 0 {
		t.Errorf("a sound run is judged %+v", o)
	}
}

func TestEachViolationIsFound(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*Evidence)
		want  Class
	}{
		{"accepted, and the hub never had it", func(e *Evidence) {
			e.Stored, e.Settled, e.Asked = e.Stored[1:], e.Settled[1:], e.Asked[1:]
			e.Screens[0].Frames = e.Screens[0].Frames[1:]
		}, Lost},
		{"reported as delivered and never cooked", func(e *Evidence) { e.Asked = e.Asked[1:] }, Lost},
		{"neither cooked nor reported", func(e *Evidence) { e.Asked, e.Settled = e.Asked[1:], e.Settled[1:] }, Lost},
		{"cooked and not reported", func(e *Evidence) { e.Settled = e.Settled[1:] }, Unreported},
		{"dead letter and not reported", func(e *Evidence) { e.Settled = e.Settled[:2] }, Unreported},
		{"reported twice", func(e *Evidence) { e.Settled = append(e.Settled, e.Settled[0]) }, Unreported},
		{"reported as delivered and as failed", func(e *Evidence) {
			r := e.Settled[0]
			r.State = "failed"
			e.Settled = append(e.Settled, r)
			e.Dead = append(e.Dead, Dead{eventID: r.eventID, ID: r.ID, Reason: "expired"})
		}, Unreported},
		{"failed, without a dead letter", func(e *Evidence) { e.Dead = e.Dead[1:] }, Unreported},
		{"failed, though the Kitchen said yes", func(e *Evidence) {
			e.Settled[0].State, e.Told[0].State = "failed", pos.Failed
			e.Dead = append(e.Dead, Dead{eventID: e.Settled[0].eventID, ID: "a", Reason: "expired"})
		}, Unreported},
		{"delivered, though the Kitchen said no", func(e *Evidence) { e.Settled[2].State, e.Told[2].State = "delivered", pos.Delivered }, Unreported},
		{"a report on an event that nobody sent", func(e *Evidence) {
			r := e.Settled[0]
			r.Seq, r.ID = 77, "z"
			e.Settled = append(e.Settled, r)
		}, Unreported},
		{"a report with another event's id", func(e *Evidence) { e.Settled[0].ID = "b" }, Unreported},
		{"a state that is none", func(e *Evidence) { e.Settled[0].State = "perhaps" }, Unreported},
		{"the POS was told another end", func(e *Evidence) { e.Told[0].State = pos.Failed }, Unreported},
		{"the POS was told of no end", func(e *Evidence) { e.Told[0].State = pos.Pending }, Unreported},
		{"the POS was told that it is not stored", func(e *Evidence) { e.Told[0].State = pos.Refused }, Unreported},
		{"reported long after the deadline", func(e *Evidence) {
			e.Settled[2].At = e.Stored[2].Deadline.Add(reportMost + time.Second)
		}, Unreported},
		{"an edge's event was quarantined", func(e *Evidence) {
			e.Dead = append(e.Dead, Dead{eventID: e.Stored[0].eventID, ID: "a", Reason: quarantine, StreamSeq: 1})
		}, Unreported},
		{"a forged event without a trace", func(e *Evidence) { e.Dead = e.Dead[:1] }, Unreported},
		{"a forged event was cooked", func(e *Evidence) {
			r := e.Asked[0]
			r.Key, r.Seq, r.Place = "forged", 2, 9
			e.Asked = append(e.Asked, r)
		}, Inverted},
		{"a forged event was posted and refused", func(e *Evidence) {
			r := e.Asked[2]
			r.Key, r.Seq = "forged", 2
			e.Asked = append(e.Asked, r)
		}, Inverted},
		{"cooked in another order than stored", func(e *Evidence) { e.Asked[0].Place, e.Asked[1].Place = 2, 1 }, Inverted},
		{"the Kitchen saw a sequence inverted", func(e *Evidence) { e.Asked[1].Problems = []kitchen.Problem{kitchen.SeqInverted} }, Inverted},
		{"the Kitchen saw a version cooked twice", func(e *Evidence) { e.Asked[1].Problems = []kitchen.Problem{kitchen.VersionRepeated} }, Inverted},
		{"cooked and not on the hub", func(e *Evidence) { e.Asked[0].Seq = 99 }, Inverted},
		{"one number for two events", func(e *Evidence) {
			s := e.Stored[0]
			s.StreamSeq, s.ID = 9, "y"
			e.Stored = append(e.Stored, s)
		}, Inverted},
		{"one message stored twice", func(e *Evidence) {
			s, r := e.Stored[0], e.Settled[0]
			s.Seq, s.StreamSeq = 4, 9
			r.eventID = s.eventID
			e.Stored, e.Settled = append(e.Stored, s), append(e.Settled, r)
		}, Inverted},
		{"one message under two ids", func(e *Evidence) { e.Told[0].IDMoved = true }, Inverted},
		{"another id than the protocol's", func(e *Evidence) { e.Told[0].WantID = "b" }, Inverted},
		{"attempt after the deadline", func(e *Evidence) {
			e.Stored[0].Deadline, e.Stored[0].Accepted = at(-100), at(-200)
		}, Late},
		{"cooked after the deadline and settle", func(e *Evidence) { e.Asked[0].Processed = e.Stored[0].Deadline.Add(e.Settle + time.Second) }, Late},
		{"attempt after the report", func(e *Evidence) { e.Asked[0].Received = at(200) }, Late},
		{"a longer life than the kind allows", func(e *Evidence) { e.Stored[0].Deadline = at(20_000) }, Late},
		{"a longer life than the POS asked for", func(e *Evidence) { e.Told[0].Within = time.Second }, Late},
		{"a clock of its own", func(e *Evidence) { e.Stored[0].Accepted = at(5000) }, Late},
		{"a hole in what a screen was shown", func(e *Evidence) {
			e.Screens[0].Frames = slices.Delete(e.Screens[0].Frames, 1, 2)
		}, Lost},
		{"the beginning is missing at a screen", func(e *Evidence) { e.Screens[0].Frames = e.Screens[0].Frames[1:] }, Lost},
		{"the end is missing at a connected screen", func(e *Evidence) { e.Screens[0].Frames = e.Screens[0].Frames[:2] }, Lost},
		{"a screen was told too late that it misses something", func(e *Evidence) {
			e.Screens[0].Frames, e.Screens[0].Closed = e.Screens[0].Frames[:2], at(9000)
		}, Lost},
		{"a screen could not open a frame", func(e *Evidence) { e.Screens[0].Frames[1].PayloadHash = "" }, Lost},
		{"a screen was shown something twice", func(e *Evidence) {
			e.Screens[0].Frames = append(e.Screens[0].Frames, e.Screens[0].Frames[2])
		}, Inverted},
		{"a screen was shown a forged event", func(e *Evidence) {
			e.Screens[0].Frames = append(e.Screens[0].Frames, Frame{IV: "iv-x", Fingerprint: "fp", PayloadHash: "x"})
		}, Inverted},
		{"isAlive? while the hub is gone", func(e *Evidence) {
			e.Outages = []Span{{at(1000), at(2900)}}
			e.Screens[0].Beats = append(e.Screens[0].Beats, at(2800))
		}, Lost},
		{"a socket without isAlive?", func(e *Evidence) {
			e.Screens[0].Beats, e.Screens[0].Closed = nil, at(2000)
		}, Lost},
		{"a socket that stays open without a hub", func(e *Evidence) { e.Outages = []Span{{at(1000), at(9000)}} }, Lost},
		{"a leak", func(e *Evidence) { e.Leaks = []Leak{{"a canary", "a log"}} }, Leaked},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := sound()
			c.spoil(e)
			o := Reconcile(e)
			if o.Count(c.want) == 0 {
				t.Errorf("no %s in %v", c.want, o.Violations)
			}
		})
	}
}

func TestWhatIsNoViolation(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*Evidence)
	}{
		{"a message that nobody was told of is delivered", func(e *Evidence) { e.Told[0].State = pos.Unknown }},
		{"a pending one, when the edge may have missed the report", func(e *Evidence) {
			e.Calm = false
			e.Told[0].State = pos.Pending
		}},
		{"a repeat of an attempt whose answer was lost", func(e *Evidence) {
			r := e.Asked[0]
			r.Attempt, r.Repeat, r.Received = 2, true, at(108)
			e.Asked = append(e.Asked, r)
		}},
		{"cooked late, within settle", func(e *Evidence) { e.Asked[0].Processed = e.Stored[0].Deadline.Add(e.Settle) }},
		{"cooked, and reported as of unknown outcome", func(e *Evidence) {
			e.Settled[0].State, e.Settled[0].Reason, e.Told[0].State = "failed", "outcome-unknown", pos.Failed
			e.Dead = append(e.Dead, Dead{eventID: e.Settled[0].eventID, ID: "a", Reason: "outcome-unknown"})
		}},
		{"the same message again in another epoch of its edge", func(e *Evidence) {
			s, r := e.Stored[0], e.Settled[0]
			s.Epoch, s.Seq, s.StreamSeq, s.At, s.IV = "later", 1, 9, at(900), "iv-again"
			s.Accepted, s.Deadline = at(899), at(9000)
			r.eventID, r.At = s.eventID, at(950)
			q := e.Asked[0]
			q.Epoch, q.Repeat, q.Received, q.Processed = "later", true, at(910), at(911)
			e.Stored, e.Settled, e.Asked = append(e.Stored, s), append(e.Settled, r), append(e.Asked, q)
			e.Screens = nil
		}},
		{"a screen that was closed before the last events", func(e *Evidence) {
			e.Screens[0].Frames, e.Screens[0].Closed = e.Screens[0].Frames[:1], at(600)
		}},
		{"a screen that came later", func(e *Evidence) {
			e.Screens[0].Frames, e.Screens[0].Opened = e.Screens[0].Frames[1:], at(150)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := sound()
			c.spoil(e)
			if o := Reconcile(e); len(o.Violations) > 0 || o.Accepted != o.Delivered+o.Failed {
				t.Errorf("judged %+v", o)
			}
		})
	}
}

func TestTooLittleProvesNothing(t *testing.T) {
	good := Outcome{Accepted: 2 * minAccepted, Delivered: 2*minAccepted - 5, Failed: 5}
	if err := enough(&good, 2, 2); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(o *Outcome, runs, faults *int){
		"too few accepted":    func(_ *Outcome, runs, faults *int) { *runs, *faults = 3, 3 },
		"nothing delivered":   func(o *Outcome, _, _ *int) { o.Failed, o.Delivered = o.Accepted, 0 },
		"too few faults":      func(_ *Outcome, _, faults *int) { *faults = 1 },
		"unbalanced accounts": func(o *Outcome, _, _ *int) { o.Failed++ },
	} {
		t.Run(name, func(t *testing.T) {
			o, runs, faults := good, 2, 2
			spoil(&o, &runs, &faults)
			if enough(&o, runs, faults) == nil {
				t.Error("it was enough")
			}
		})
	}
}
