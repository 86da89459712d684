package main

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestReadFrame(t *testing.T) {
	long := strings.Repeat("x", 300)
	for _, c := range []struct {
		name string
		in   string
		want string
		err  bool
	}{
		{"short", "\x81\x08isAlive?", "isAlive?", false},
		{"long", "\x81\x7e\x01\x2c" + long, long, false},
		{"empty", "\x81\x00", "", false},
		{"a close frame", "\x88\x02\x03\xf5", "", true},
		{"a part", "\x01\x01a", "", true},
		{"compressed", "\xc1\x01a", "", true},
		{"masked", "\x81\x81\x00\x00\x00\x00a", "", true},
		{"cut off", "\x81\x05ab", "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := readFrame(bufio.NewReader(strings.NewReader(c.in)), nil)
			if (err != nil) != c.err || err == nil && string(got) != c.want {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// testFleet are sites with keys and bindings, and no program.
func testFleet(t *testing.T, sites int) *fleet {
	t.Helper()
	c, err := labFor(t, true).crew("fleet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	})
	f, err := newFleet(t.Context(), c, siteNames(sites))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestEventsVerifyAndOpen(t *testing.T) {
	f := testFleet(t, 2)
	a := newAudience(f)
	events, err := a.events(4, 2)
	if err != nil {
		t.Fatal(err)
	}
	one, err := f.event(1, 9)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range append(events, planned{one, 1}) {
		e := p.event
		if err := f.bindings[p.site].VerifyEvent(&e.Event, e.Bind, e.Tag); err != nil {
			t.Errorf("event %d: %v", i, err)
		}
		plain, err := f.keys[p.site].Open(nil, e.Triple)
		if err != nil || len(plain) != eventBytes || !bytes.Contains(plain, []byte(`"site":"`+f.sites[p.site]+`"`)) {
			t.Errorf("event %d opens to %d bytes: %v", i, len(plain), err)
		}
	}
	if events[0].event.Seq != 2 || events[1].event.Seq != 2 || events[2].event.Seq != 3 {
		t.Errorf("the sites' numbers go on from %d, %d, %d", events[0].event.Seq, events[1].event.Seq, events[2].event.Seq)
	}
}

func TestAScreenNotesEachEventOnceAndNothingElse(t *testing.T) {
	f := testFleet(t, 1)
	a := newAudience(f)
	a.now.Store(&broadcast{begun: time.Now(), first: 5, sent: make([]atomic.Int64, 3)})
	frame := func(i int) []byte {
		iv := binary.BigEndian.AppendUint64(bytes.Clone(a.run[:]), uint64(i))
		return []byte(`{"iv":"` + base64.StdEncoding.EncodeToString(iv) + `","fingerprint":"f","message":"m"}`)
	}
	v := &viewer{last: -1}
	for _, i := range []int{5, 6} {
		if err := a.note(v, frame(i)); err != nil {
			t.Errorf("event %d: %v", i, err)
		}
	}
	for name, text := range map[string][]byte{
		"the same again": frame(6), "an earlier one": frame(5), "one of no turn": frame(8), "one of an earlier turn": frame(4),
		"another run's": []byte(`{"iv":"AAAAAAAAAAAAAAAH","fingerprint":"f","message":"m"}`), "plain JSON": []byte(`{"_id":"1"}`), "nothing": nil,
	} {
		if err := a.note(v, text); err == nil {
			t.Errorf("%s was counted", name)
		}
	}
	if got := a.frames.Load(); got != 2 || len(v.waits) != 2 {
		t.Errorf("%d frames were counted, %d timed, want 2", got, len(v.waits))
	}
}

func TestCheckOpensWhatTheScreensGot(t *testing.T) {
	f := testFleet(t, 2)
	a := newAudience(f)
	events, err := a.events(4, 0)
	if err != nil {
		t.Fatal(err)
	}
	a.screens = []*viewer{{site: 0, last: 2, text: events[2].event.Triple.AppendJSON(nil)}, {site: 1, last: 3, text: events[3].event.Triple.AppendJSON(nil)}}
	if err := a.check(); err != nil {
		t.Errorf("what is right: %v", err)
	}
	a.screens[1].last = 1 // another event of the site
	if err := a.check(); err == nil {
		t.Error("another order passes")
	}
	a.screens[1].last, a.screens[1].text = 3, events[2].event.Triple.AppendJSON(nil)
	if err := a.check(); err == nil {
		t.Error("another site's order passes")
	}
}

func TestAHeartbeatIsCountedAndLeavesTheEventBefore(t *testing.T) {
	f := testFleet(t, 1)
	a := newAudience(f)
	a.now.Store(&broadcast{begun: time.Now(), sent: make([]atomic.Int64, 2)})
	events, err := a.events(2, 0)
	if err != nil {
		t.Fatal(err)
	}
	var in bytes.Buffer
	for _, e := range events {
		text := e.event.Triple.AppendJSON(nil)
		in.Write(binary.BigEndian.AppendUint16([]byte{0x81, 126}, uint16(len(text))))
		in.Write(text)
		in.WriteString("\x81\x08isAlive?")
	}
	v := &viewer{last: -1}
	a.screens = []*viewer{v}
	a.closing.Store(true) // the end of the input is no failure
	a.watch(v, bufio.NewReader(&in))
	if err := a.check(); err != nil {
		t.Error(err)
	}
	if a.beats.Load() != 2 || a.frames.Load() != 2 {
		t.Errorf("%d heartbeats and %d frames, want 2 of each", a.beats.Load(), a.frames.Load())
	}
}
