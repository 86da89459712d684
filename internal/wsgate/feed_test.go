package wsgate

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// I7: what was altered, moved or replayed is not shown.
func TestWhatIsNotShownIsCountedByReason(t *testing.T) {
	for _, tc := range []struct {
		name   string
		make   func(t *testing.T, site *keysync.Site) []*broker.Delivery
		reason string // "" = nothing is counted
		shown  int
	}{
		{name: "an event is shown", shown: 1, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 1, `{}`)}
		}},
		{name: "malformed", reason: dropMalformed, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Err = errors.New("Kb-Seq: missing")
			return []*broker.Delivery{d}
		}},
		{name: "altered message", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Event.Triple = seal(t, site, `{"forged":true}`)
			return []*broker.Delivery{d}
		}},
		{name: "deadline put off", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Event.Deadline += 60_000
			return []*broker.Delivery{d}
		}},
		{name: "no tag", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Event.Tag = ""
			return []*broker.Delivery{d}
		}},
		{name: "tag of a binding key that the site has not", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			stranger := *site
			stranger.Binding = newBinding(t, site.Name, 'x')
			return []*broker.Delivery{event(t, &stranger, 1, `{}`)}
		}},
		{name: "unknown binding key", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Event.Bind = "b9"
			return []*broker.Delivery{d}
		}},
		{name: "another site's event, moved", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, newSite(t, "two", true), 1, `{}`)
			d.Site = site.Name
			return []*broker.Delivery{d}
		}},
		{name: "moved to another kind's subject", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Kind = "alert"
			return []*broker.Delivery{d}
		}},
		{name: "moved to another edge's subject", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`)
			d.Edge = "back"
			return []*broker.Delivery{d}
		}},
		{name: "expired", reason: dropExpired, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 1, `{}`, func(e *envelope.Event) { e.Deadline = time.Now().UnixMilli() })}
		}},
		{name: "expired by the hub's clock, its edge's is ahead", reason: dropExpired, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`, func(e *envelope.Event) {
				e.Accepted += time.Hour.Milliseconds()
				e.Deadline = e.Accepted + 30_000
			})
			d.Stored = d.Stored.Add(-30 * time.Second)
			return []*broker.Delivery{d}
		}},
		{name: "its edge's clock is ahead, and it is in time", shown: 1, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			d := event(t, site, 1, `{}`, func(e *envelope.Event) {
				e.Accepted += time.Hour.Milliseconds()
				e.Deadline = e.Accepted + 30_000
			})
			d.Stored = d.Stored.Add(-29 * time.Second)
			return []*broker.Delivery{d}
		}},
		{name: "a run of events that expired at their edge", make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 7, `{}`, expiredRun(1))}
		}},
		{name: "a run again: it is no drop", make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 7, `{}`, expiredRun(1)), event(t, site, 7, `{}`, expiredRun(1))}
		}},
		{name: "a run that nobody tagged", reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			forged := event(t, site, 7, `{}`, expiredRun(1))
			forged.Event.From = 3
			return []*broker.Delivery{forged}
		}},
		{name: "an event whose number a run had", reason: dropRepeated, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 7, `{}`, expiredRun(1)), event(t, site, 4, `{}`)}
		}},
		{name: "the events before and after a run", shown: 2, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 1, `{}`), event(t, site, 7, `{}`, expiredRun(2)), event(t, site, 8, `{}`)}
		}},
		{name: "a site without screens", make: func(t *testing.T, _ *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, newSite(t, "elsewhere", true), 1, `{}`)}
		}},
		{name: "repeated", shown: 1, reason: dropRepeated, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			again := event(t, site, 1, `{}`)
			again.StreamSeq = 99
			return []*broker.Delivery{event(t, site, 1, `{}`), again}
		}},
		{name: "an older one, repeated after a newer", shown: 2, reason: dropRepeated, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 1, `{}`), event(t, site, 2, `{}`), event(t, site, 1, `{}`)}
		}},
		{name: "a forgery does not use up the real one's place", shown: 1, reason: dropTag, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			forged := event(t, site, 1, `{}`)
			forged.Event.Tag = strings.Repeat("A", 43)
			return []*broker.Delivery{forged, event(t, site, 1, `{}`)}
		}},
		{name: "the same number of another epoch and another edge", shown: 3, make: func(t *testing.T, site *keysync.Site) []*broker.Delivery {
			return []*broker.Delivery{event(t, site, 1, `{}`),
				event(t, site, 1, `{}`, func(e *envelope.Event) { e.Epoch = "other" }),
				event(t, site, 1, `{}`, func(e *envelope.Event) { e.Edge = "back" })}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t, testConfig())
				s.start()
				screen := s.connect(headers(tokenOne), false).listen()
				for _, d := range tc.make(t, s.keys.Site("one")) {
					s.feed.event(d)
				}
				synctest.Wait()
				if got := len(screen.frames()); got != tc.shown {
					t.Errorf("%d frames, want %d", got, tc.shown)
				}
				screen.close()
				s.finish()
				for _, reason := range []string{dropMalformed, dropTag, dropExpired, dropRepeated, dropKeys, dropRewrap, dropSlow, dropClosed} {
					want := 0
					if reason == tc.reason {
						want = 1
					}
					s.wantCount("kb_wsgate_drops_total", reason, want)
				}
			})
		})
	}
}

func TestNothingIsShownOfASiteWhoseKeysAreNotKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false).listen()
		site := s.keys.Site("one")
		unread, unbound := *site, *site
		unread.Fetched, unbound.Binding = time.Time{}, nil
		for i, keys := range []*keysync.Site{&unread, &unbound, nil} {
			if keys == nil {
				s.keys.sites.Delete("one")
			} else {
				s.keys.set(keys)
			}
			s.feed.event(event(t, site, uint64(i+1), `{}`))
		}
		synctest.Wait()
		screen.wantFrames()
		screen.close()
		s.finish()
		s.wantCount("kb_wsgate_drops_total", dropKeys, 3)
	})
}

func TestWhatPassedBeforeAScreenCameIsNotShownLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		site := s.keys.Site("one")
		older := event(t, site, 1, `{"version":1}`)
		s.feed.event(older)
		s.feed.event(event(t, site, 2, `{"version":2}`))
		screen := s.connect(headers(tokenOne), false).listen()
		s.feed.event(older)
		synctest.Wait()
		screen.wantFrames()
		screen.close()
		s.finish()
	})
}

func TestPlainFramesWhileThePortalHasEncryptionOff(t *testing.T) {
	for _, tc := range []struct{ name, payload, want string }{
		{"as it is", `{ "_id":"o-1", "items":["Crêpe"] }`, `{ "_id":"o-1", "items":["Crêpe"] }`},
		{"a text frame is UTF-8, whatever a POS put into a string", "{\"comment\":\"caf\xe9\"}", "{\"comment\":\"caf\uFFFD\"}"},
	} {
		for _, deflate := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, deflate %v", tc.name, deflate), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newStage(t, testConfig())
					s.start()
					screen := s.connect(bearer(tokenClear), deflate).listen()
					s.feed.event(event(t, s.keys.Site("clear"), 1, tc.payload))
					synctest.Wait()
					screen.wantFrames(tc.want)
					screen.close()
					s.finish()
				})
			})
		}
	}
}

func TestAnEventSealedBeforeThePortalsSwitchWasTurned(t *testing.T) {
	const payload = `{"_id":"o-1"}`
	on := func(t *testing.T) *keysync.Site { return newSite(t, "one", true) }
	off := func(t *testing.T) *keysync.Site { return newSite(t, "one", false) }

	t.Run("on: plain-sealed is sealed with the primary", func(t *testing.T) {
		text, err := frameText(on(t), seal(t, off(t), payload), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		triple, err := envelope.ParseTriple(text, 0)
		if err != nil {
			t.Fatal(err)
		}
		if string(triple.Fingerprint) != fingerprint {
			t.Errorf("fingerprint %s", triple.Fingerprint)
		}
		if got, err := on(t).Keyring.Open(nil, triple); err != nil || string(got) != payload {
			t.Errorf("opens to %q, %v", got, err)
		}
	})
	t.Run("on, but no key is valid", func(t *testing.T) {
		site := on(t)
		if text, err := frameText(site, seal(t, off(t), payload), time.Now().Add(2*time.Hour)); !errors.Is(err, envelope.ErrNoKey) {
			t.Errorf("%s, %v; want ErrNoKey", text, err)
		}
	})
	t.Run("off: sealed with a key of the Portal is opened", func(t *testing.T) {
		site := on(t)
		site.Encryption = false
		text, err := frameText(site, seal(t, on(t), payload), time.Now())
		if err != nil || string(text) != payload {
			t.Errorf("%q, %v; want the plaintext", text, err)
		}
	})
	t.Run("off, and the key is gone", func(t *testing.T) {
		if text, err := frameText(off(t), seal(t, on(t), payload), time.Now()); !errors.Is(err, envelope.ErrUnknownFingerprint) {
			t.Errorf("%s, %v; want ErrUnknownFingerprint", text, err)
		}
	})
	t.Run("plain-sealed, and altered", func(t *testing.T) {
		triple := seal(t, off(t), payload)
		triple.Message = []byte("AAAA" + string(triple.Message[4:]))
		if text, err := frameText(off(t), triple, time.Now()); !errors.Is(err, envelope.ErrDecrypt) {
			t.Errorf("%s, %v; want ErrDecrypt", text, err)
		}
	})
	t.Run("impossible: not shown, counted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t, testConfig())
			s.start()
			screen := s.connect(headers(tokenOne), false).listen()
			site := s.keys.Site("one")
			d := event(t, site, 1, payload, func(e *envelope.Event) {
				e.Triple = seal(t, off(t), payload)
				e.Triple.Message = []byte("AAAA" + string(e.Triple.Message[4:]))
			})
			s.feed.event(d)
			synctest.Wait()
			screen.wantFrames()
			screen.close()
			s.finish()
			s.wantCount("kb_wsgate_drops_total", dropRewrap, 1)
			if !strings.Contains(s.log.String(), `msg="event not shown" site=one edge=front kind=order id=01jz seq=1 reason=rewrap`) {
				t.Errorf("the log does not say so:\n%s", s.log)
			}
			if strings.Contains(s.log.String(), payload) || strings.Contains(s.log.String(), string(d.Event.Triple.Message)) {
				t.Errorf("the log holds the message:\n%s", s.log)
			}
		})
	})
}

func TestCompressionSavesWhatItCan(t *testing.T) {
	payload := `{"items":["` + strings.Repeat("fries ", 2000) + `"]}`
	sizes := make(map[bool]int)
	for _, deflate := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t, testConfig())
			s.start()
			wire := &wire{}
			s.pipe.wrap = wire.wrap
			screen := s.connect(bearer(tokenClear), deflate).listen()
			wire.n.Store(0)
			s.feed.event(event(t, s.keys.Site("clear"), 1, payload))
			synctest.Wait()
			sizes[deflate] = int(wire.n.Load())
			screen.wantFrames(payload)
			screen.close()
			s.finish()
		})
	}
	if sizes[false] != len(payload)+4 || sizes[true] > len(payload)/20 {
		t.Errorf("%d bytes of payload took %d on the wire, %d compressed", len(payload), sizes[false], sizes[true])
	}
}

func TestAClientThatAsksForASmallWindowGetsNoCompression(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		h := headers(tokenOne)
		// In small letters the dialer lets it through.
		h["sec-websocket-extensions"] = []string{"permessage-deflate; server_max_window_bits=9"}
		dialer := websocket.Dialer{NetDialContext: s.pipe.dial}
		conn, response, err := dialer.Dial("ws://gate.example/", h)
		if err != nil {
			t.Fatal(err)
		}
		if got := response.Header.Get("Sec-Websocket-Extensions"); got != "" {
			t.Errorf("answered with %q", got)
		}
		conn.Close()
		s.finish()
	})
}

// expiredRun makes an event a run from a number on, whose deadline is over.
func expiredRun(from uint64) func(*envelope.Event) {
	return func(e *envelope.Event) {
		e.Kind, e.From = broker.KindExpired, from
		e.Accepted -= time.Hour.Milliseconds()
		e.Deadline = e.Accepted + 60_000
	}
}

// An edge may have read a new binding file before the bridge: that looks, and shows.
func TestUnknownBindingKeyIsLookedForInTheFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false).listen()
		looks := 0
		s.keys.reread = func() { looks++ }
		s.feed.event(event(t, s.keys.Site("one"), 1, `{}`))
		if looks != 0 {
			t.Error("looked for a known key")
		}
		key, err := envelope.NewBindingKey("b9", bytes.Repeat([]byte{'x'}, 32))
		if err != nil {
			t.Fatal(err)
		}
		fresh := *s.keys.Site("one")
		if fresh.Binding, err = envelope.NewBinding("one", fresh.Binding.Lane(), key, fresh.Binding.Current()); err != nil {
			t.Fatal(err)
		}
		s.keys.reread = func() { looks++; s.keys.set(&fresh) }
		s.feed.event(event(t, &fresh, 2, `{}`))
		synctest.Wait()
		if n := len(screen.frames()); looks != 1 || n != 2 {
			t.Errorf("%d looks at the file, %d frames", looks, n)
		}
		screen.close()
		s.finish()
	})
}
