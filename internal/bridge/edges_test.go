package bridge

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// fleet is edges at work in a bubble.
type fleet struct {
	*edges
	t    *testing.T
	away atomic.Bool
	log  bytes.Buffer // read after synctest.Wait
	reg  *prometheus.Registry
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, reg: prometheus.NewRegistry()}
	var err error
	log := slog.New(slog.NewTextHandler(&f.log, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	if f.edges, err = newEdges(log, func() bool { return !f.away.Load() }, f.reg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- f.watch(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return f
}

func beacon(edge string) broker.Beacon {
	return broker.Beacon{Edge: edge, Epoch: "ep1", At: time.Now()}
}

// during lets time pass in which edges send their beacons.
func (f *fleet) during(d time.Duration, names ...string) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(5 * time.Second) {
		for _, n := range names {
			f.heard(beacon(n))
		}
	}
}

// said returns how many lines have the text, and begins a new log.
func (f *fleet) said() func(text string) int {
	synctest.Wait()
	log := f.log.String()
	f.log.Reset()
	return func(text string) int { return strings.Count(log, text) }
}

func (f *fleet) count(state string) float64 {
	f.t.Helper()
	families, err := f.reg.Gather()
	if err != nil {
		f.t.Fatal(err)
	}
	for _, m := range families[0].GetMetric() {
		if m.GetLabel()[0].GetValue() == state {
			return m.GetGauge().GetValue()
		}
	}
	f.t.Fatalf("no state %s", state)
	return 0
}

const missingLine = "level=ERROR msg=\"edge is missing: it sends no beacon\" edge="

func TestASilentEdgeIsMissedOnceAndWelcomedBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.during(time.Minute, "front", "back")
		f.during(25*time.Second, "back")
		if said := f.said(); said("missing") != 0 || said("edge is present") != 2 || f.count("present") != 2 {
			t.Errorf("present: %v", f.count("present"))
		}
		f.during(10*time.Minute, "back")
		if said := f.said(); said(missingLine+"front") != 1 || said("msg=") != 1 {
			t.Errorf("missed %d times, %d lines", said(missingLine), said("msg="))
		}
		if f.count("present") != 1 || f.count("missing") != 1 {
			t.Errorf("%v present, %v missing", f.count("present"), f.count("missing"))
		}
		f.during(time.Minute, "front", "back")
		if said := f.said(); said("msg=\"edge is back\" edge=front") != 1 || said("msg=") != 1 || f.count("missing") != 0 {
			t.Errorf("%d lines", said("msg="))
		}
	})
}

// While the hub is away from the bridge, nobody can be heard: that says nothing of edges.
func TestNobodyIsMissedWhileTheHubIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.during(time.Minute, "front", "back")
		f.away.Store(true)
		time.Sleep(time.Hour)
		f.away.Store(false)
		time.Sleep(25 * time.Second) // they have to notice, too
		if said := f.said(); said("missing") != 0 {
			t.Error("missed while the hub was away")
		}
		f.during(time.Minute, "back")
		if said := f.said(); said(missingLine+"front") != 1 || said(missingLine) != 1 {
			t.Error("who did not come back is not missed")
		}
	})
}

func TestManySilentEdgesAreNotNamedOneByOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		for i := range 100 {
			f.heard(beacon(fmt.Sprintf("e%02d", i)))
		}
		time.Sleep(time.Minute)
		said := f.said()
		if said(missingLine) != loggedEdges || said("msg=\"more edges are missing\" edges=90") != 1 || f.count("missing") != 100 {
			t.Errorf("%d are named, %v missing", said(missingLine), f.count("missing"))
		}
	})
}

func TestEdgesAreForgottenInTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.heard(beacon("front"))
		time.Sleep(edgeForgotten + time.Minute)
		if f.count("missing") != 0 || f.count("present") != 0 {
			t.Error("remembered for ever")
		}
	})
}

// I13: what is remembered has a bound; missing ones make room, present ones do not.
func TestRememberedEdgesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		f.most = 3
		for _, n := range []string{"a", "b", "c", "d", "e"} {
			f.heard(beacon(n))
		}
		if said := f.said(); f.count("present") != 3 || said("level=ERROR msg=\"too many edges") != 1 {
			t.Errorf("%v present, %d lines", f.count("present"), said("too many"))
		}
		f.during(time.Minute, "b", "c") // a is missing by now
		f.heard(beacon("d"))
		if f.count("present") != 3 || f.count("missing") != 0 {
			t.Errorf("%v present, %v missing", f.count("present"), f.count("missing"))
		}
	})
}

func TestAWrongClockIsAlarmedOnce(t *testing.T) {
	ms := func(d time.Duration) *int64 { return new(d.Milliseconds()) }
	for _, row := range []struct {
		name   string
		offset *int64
		at     time.Duration // of the beacon's time
		alarms int
	}{
		{"right", ms(time.Second), 0, 0},
		{"two minutes ahead", ms(2 * time.Minute), 0, 0},
		{"more than two minutes ahead", ms(2*time.Minute + time.Millisecond), 0, 1},
		{"more than two minutes behind", ms(-2*time.Minute - time.Millisecond), 0, 1},
		{"an absurd number", new(int64(1<<63 - 1)), 0, 1},
		{"the lowest number", new(int64(-1 << 63)), 0, 1},
		{"measured as right, and the beacon was late", ms(0), -time.Hour, 0},
		{"not measured, and right", nil, -time.Second, 0},
		{"not measured, and a day behind", nil, -24 * time.Hour, 1},
		{"not measured, and at the end of time", nil, 1<<63 - 1, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t)
				for range 5 {
					b := beacon("front")
					b.OffsetMS, b.At = row.offset, b.At.Add(row.at)
					f.heard(b)
				}
				if said := f.said(); said("level=ERROR msg=\"edge's clock is wrong\"") != row.alarms {
					t.Errorf("%d alarms, want %d", said("clock is wrong"), row.alarms)
				}
				b := beacon("front")
				b.OffsetMS = ms(100 * time.Second) // not yet right
				f.heard(b)
				b.OffsetMS = ms(time.Second)
				f.heard(b)
				f.heard(b)
				if said := f.said(); said("clock is right again") != row.alarms || said("msg=") != row.alarms {
					t.Errorf("%d lines say that it is right again", said("right again"))
				}
			})
		})
	}
}

func TestTroublesAreLoggedWhenTheyChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t)
		tell := func(troubles ...string) {
			b := beacon("front")
			b.Trouble = troubles
			f.heard(b)
			time.Sleep(5 * time.Second)
		}
		tell()
		f.said()
		for i := range 20 { // the order and the numbers change
			if i%2 == 0 {
				tell(fmt.Sprintf("outbox: full: %d of 9 bytes", i), "keys: none")
			} else {
				tell("keys: none", fmt.Sprintf("outbox: full: %d of 9 bytes", i))
			}
		}
		if said := f.said(); said("level=WARN msg=\"edge is in trouble\" edge=front trouble=\"keys: none; outbox: full: 0 of 9 bytes\"") != 1 || said("msg=") != 1 {
			t.Errorf("%d lines", said("msg="))
		}
		tell("keys: none")
		if said := f.said(); said("trouble=\"keys: none\"") != 1 || said("msg=") != 1 {
			t.Errorf("one went: %d lines", said("msg="))
		}
		tell()
		tell()
		if said := f.said(); said("in trouble no more") != 1 || said("msg=") != 1 {
			t.Errorf("all went: %d lines", said("msg="))
		}
		long := make([]string, 100)
		for i := range long {
			long[i] = fmt.Sprintf("%d: %s", i, strings.Repeat("x", 1000))
		}
		tell(long...)
		synctest.Wait()
		if n := f.log.Len(); n > mostTroubles*(longTrouble+10)+500 {
			t.Errorf("%d bytes in the log", n)
		}
		// The wording alone is told again now and then.
		f.said()
		tell("outbox: 1")
		f.said()
		for range 2 * int(troubleAgain/(5*time.Second)) {
			tell("outbox: 2")
		}
		if said := f.said(); said("edge is in trouble") != 1 {
			t.Errorf("another wording was told %d times", said("edge is in trouble"))
		}
	})
}
