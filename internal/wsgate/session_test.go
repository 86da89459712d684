package wsgate

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

func TestEveryScreenGetsIsAliveEverySecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		start := time.Now()
		s.start()
		one, two := s.connect(headers(tokenOne), false).listen(), s.connect(headers(tokenTwo), true).listen()
		time.Sleep(1500 * time.Millisecond)
		late := s.connect(headers(tokenOne), false).listen()
		time.Sleep(4 * time.Second)
		synctest.Wait()
		for _, tc := range []struct {
			name   string
			screen *client
			first  int
		}{{"one", one, 1}, {"two, compressed", two, 1}, {"a late one", late, 2}} {
			beats := tc.screen.beats()
			if want := 5 - tc.first + 1; len(beats) != want {
				t.Fatalf("%s: %d heartbeats, want %d", tc.name, len(beats), want)
			}
			for i, at := range beats {
				if want := time.Duration(tc.first+i) * time.Second; at.Sub(start) != want {
					t.Errorf("%s: heartbeat %d came after %v, want %v", tc.name, i, at.Sub(start), want)
				}
			}
			tc.screen.wantOpen()
			tc.screen.close()
		}
		s.finish()
		s.wantCount("kb_wsgate_closes_total", closeClient, 3)
		s.wantCount("kb_wsgate_frames_total", "", 0)
		s.wantCount("kb_wsgate_screens", "", 0)
	})
}

// I10: a screen must be able to tell "no tickets" from "cut off".
func TestNoIsAliveWhileTheHubIsSilentThenClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false).listen()
		time.Sleep(3*time.Second + 300*time.Millisecond)
		if err := s.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
		silent := time.Now()
		s.feed.silence()

		time.Sleep(2*time.Second + time.Millisecond)
		if s.Ready() == nil {
			t.Error("ready though the hub is silent")
		}
		_, response, err := s.tryConnect(headers(tokenOne), false)
		if err == nil || response == nil || response.StatusCode != http.StatusServiceUnavailable || response.Header.Get("Retry-After") != "5" {
			t.Errorf("a new screen got %v, %v; want 503 and Retry-After", response, err)
		}
		// A refusal of the seed's comes before.
		_, response, err = s.tryConnect(http.Header{"Sec-Iv": {goodIV}}, false)
		if err == nil || response == nil || response.StatusCode != http.StatusBadRequest {
			t.Errorf("a new screen without headers got %v, %v; want 400", response, err)
		}

		time.Sleep(4 * time.Second)
		synctest.Wait()
		beats := screen.beats()
		if len(beats) == 0 {
			t.Fatal("no heartbeat at all")
		}
		if last := beats[len(beats)-1]; last.Sub(silent) > 2*time.Second || last.Before(silent) {
			t.Errorf("the last heartbeat came %v after the hub fell silent, want within 2s", last.Sub(silent))
		}
		screen.wantClosed(websocket.CloseTryAgainLater, byeStale.text)

		s.feed.back()
		again := s.connect(headers(tokenOne), false).listen()
		time.Sleep(time.Second)
		synctest.Wait()
		if len(again.beats()) != 1 {
			t.Errorf("%d heartbeats in the second after the hub came back, want 1", len(again.beats()))
		}
		screen.close()
		again.close()
		s.finish()
		s.wantCount("kb_wsgate_closes_total", closeStale, 1)
		s.wantCount("kb_wsgate_refusals_total", "503", 1)
		s.wantCount("kb_wsgate_refusals_total", "400/1", 1)
	})
}

func TestAHubThatComesBackSoonCostsHeartbeatsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false).listen()
		s.feed.silence() // heartbeats come after 1 s and 2 s, none after 3 s and 4 s
		time.Sleep(4500 * time.Millisecond)
		s.feed.back()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		screen.wantOpen()
		if got := len(screen.beats()); got != 4 {
			t.Errorf("%d heartbeats, want 2 before and 2 after", got)
		}
		screen.close()
		s.finish()
	})
}

func TestAHeartbeatThatWaitedIsNotSaidWhenItIsNoLongerTrue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false)
		s.feed.event(event(t, s.keys.Site("one"), 1, `{"n":1}`)) // nobody reads: the writer is held
		time.Sleep(1100 * time.Millisecond)                      // a heartbeat waits behind it
		s.feed.silence()
		time.Sleep(2100 * time.Millisecond)
		screen.listen()
		synctest.Wait()
		if len(screen.frames()) != 1 || len(screen.beats()) != 0 {
			t.Errorf("%d frames and %d heartbeats, want 1 and 0", len(screen.frames()), len(screen.beats()))
		}
		screen.close()
		s.finish()
	})
}

func TestAGapClosesScreensAndCountsNothingTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false).listen()
		d := event(t, s.keys.Site("one"), 1, `{"n":1}`)
		s.feed.event(d)
		synctest.Wait()
		s.feed.gap("reset")
		synctest.Wait()
		screen.wantClosed(websocket.CloseServiceRestart, byeGap.text)
		screen.close()

		again := s.connect(headers(tokenOne), false).listen()
		s.feed.event(d) // the edge sends again what the hub lost
		synctest.Wait()
		again.wantFrames()
		again.close()
		s.finish()
		s.wantCount("kb_wsgate_closes_total", closeGap, 1)
		s.wantCount("kb_wsgate_drops_total", dropRepeated, 1)
	})
}

func TestASlowScreenIsClosedAndDelaysNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := testConfig()
		cfg.QueueFrames = 4
		s := newStage(t, cfg)
		s.start()
		slow, quick := s.connect(headers(tokenOne), false), s.connect(headers(tokenOne), false).listen()
		site, start := s.keys.Site("one"), time.Now()
		// One is held in the write, four wait, the sixth finds the queue full.
		for i := range uint64(8) {
			s.feed.event(event(t, site, i+1, fmt.Sprintf(`{"n":%d}`, i)))
			synctest.Wait()
		}
		if n := len(quick.frames()); n != 8 || time.Since(start) != 0 {
			t.Errorf("the quick screen had %d of 8 frames after %v", n, time.Since(start))
		}
		slow.listen()
		synctest.Wait()
		if n := len(slow.frames()); n != 1 {
			t.Errorf("the slow screen got %d frames, want the one that was under way", n)
		}
		slow.wantClosed(websocket.CloseTryAgainLater, byeSlow.text)
		quick.wantOpen()
		slow.close()
		quick.close()
		s.finish()
		s.wantCount("kb_wsgate_drops_total", dropSlow, 5)
		s.wantCount("kb_wsgate_closes_total", closeSlow, 1)
		s.wantCount("kb_wsgate_frames_total", "", 9)
	})
}

func TestAScreenThatTakesNothingIsCutAfterTheWriteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		stuck := s.connect(headers(tokenOne), false)
		for i := range uint64(3) {
			s.feed.event(event(t, s.keys.Site("one"), i+1, `{}`))
		}
		time.Sleep(5*time.Second - time.Millisecond)
		synctest.Wait()
		s.wantCount("kb_wsgate_screens", "", 1)
		time.Sleep(time.Millisecond)
		synctest.Wait()
		s.wantCount("kb_wsgate_screens", "", 0)
		s.wantCount("kb_wsgate_closes_total", closeWrite, 1)
		s.wantCount("kb_wsgate_drops_total", dropClosed, 3)
		stuck.conn.Close()
		s.finish()
	})
}

func TestTheQueueIsBoundedInBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := testConfig()
		cfg.QueueBytes = 1000
		s := newStage(t, cfg)
		s.start()
		slow := s.connect(bearer(tokenClear), false)
		site := s.keys.Site("clear")
		payload := func(n int) string { return `"` + strings.Repeat("x", n-2) + `"` }
		s.feed.event(event(t, site, 1, payload(10))) // under way
		synctest.Wait()
		s.feed.event(event(t, site, 2, payload(5000))) // alone it passes, whatever its size
		synctest.Wait()
		s.wantCount("kb_wsgate_closes_total", closeSlow, 0)
		s.feed.event(event(t, site, 3, payload(10)))
		synctest.Wait()
		s.wantCount("kb_wsgate_closes_total", closeSlow, 1)
		s.wantCount("kb_wsgate_drops_total", dropSlow, 2)
		slow.listen()
		synctest.Wait()
		slow.wantFrames(payload(10))
		slow.close()
		// What has left counts no more.
		quick := s.connect(bearer(tokenClear), false).listen()
		for i := range uint64(10) {
			s.feed.event(event(t, site, i+4, payload(400)))
			s.feed.event(event(t, site, i+14, payload(400)))
			synctest.Wait()
		}
		quick.wantOpen()
		quick.close()
		s.finish()
	})
}

func TestAMessageFromAScreenIsAnsweredByClosing(t *testing.T) {
	raw := func(b ...byte) func(*websocket.Conn) error {
		return func(c *websocket.Conn) error {
			_, err := c.NetConn().Write(b)
			return err
		}
	}
	for _, tc := range []struct {
		name   string
		send   func(*websocket.Conn) error
		code   int
		text   string
		reason string
	}{
		{"text", func(c *websocket.Conn) error {
			return c.WriteMessage(websocket.TextMessage, []byte(`{"iv":"","fingerprint":"","message":""}`))
		}, 1003, byeMessage.text, closeMessage},
		{"binary", func(c *websocket.Conn) error { return c.WriteMessage(websocket.BinaryMessage, make([]byte, 100)) }, 1003, byeMessage.text, closeMessage},
		{"first fragment", raw(0x01, 0x81, 0, 0, 0, 0, 'x'), 1003, byeMessage.text, closeMessage},
		{"oversize", raw(0x82, 0xff, 0, 0, 0, 0, 0x40, 0, 0, 0, 1, 2, 3, 4), 1009, "", closeProtocol},
		{"not masked", raw(0x81, 0x00), 1002, "bad MASK", closeProtocol},
		{"unknown opcode", raw(0x83, 0x80, 0, 0, 0, 0), 1002, "bad opcode 3", closeProtocol},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t, testConfig())
				s.start()
				screen := s.connect(headers(tokenOne), false).listen()
				if err := tc.send(screen.conn); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				screen.wantClosed(tc.code, tc.text)
				screen.close()
				s.finish()
				s.wantCount("kb_wsgate_closes_total", tc.reason, 1)
			})
		})
	}
}

func TestAPingIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false)
		pong := make(chan string, 1)
		screen.conn.SetPongHandler(func(data string) error { pong <- data; return nil })
		screen.listen()
		if err := screen.conn.WriteControl(websocket.PingMessage, []byte("still there?"), time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if got := <-pong; got != "still there?" {
			t.Errorf("pong %q", got)
		}
		screen.close()
		s.finish()
	})
}

func TestANetworkThatBreaksIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false)
		screen.conn.NetConn().Close()
		synctest.Wait()
		s.wantCount("kb_wsgate_screens", "", 0)
		s.wantCount("kb_wsgate_closes_total", closeGone, 1)
		s.finish()
	})
}

func TestAnIdleScreenHoldsOneGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, burst = 50, 20
		s := newStage(t, testConfig())
		s.start()
		var screens []*client
		for range n {
			screens = append(screens, s.connect(headers(tokenOne), true))
		}
		wantIdle := func(when string) {
			t.Helper()
			synctest.Wait()
			stacks := make([]byte, 4<<20)
			sessions := 0
			for stack := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
				if strings.Contains(stack, "wsgate.(*screen)") {
					sessions++
				}
				if strings.Contains(stack, "net/http.(*conn).serve") {
					t.Errorf("%s: the handshake's goroutine is still there:\n%s", when, stack)
				}
			}
			if sessions != n {
				t.Errorf("%s: %d goroutines for %d screens", when, sessions, n)
			}
			for _, screen := range s.all() {
				if cap(screen.queue) > 8 {
					t.Errorf("%s: room for %d frames is kept", when, cap(screen.queue))
				}
			}
		}
		wantIdle("after the handshake")
		for i := range uint64(burst) {
			s.feed.event(event(t, s.keys.Site("one"), i+1, `{}`))
		}
		for _, c := range screens {
			for range burst {
				if _, _, err := c.conn.ReadMessage(); err != nil {
					t.Fatal(err)
				}
			}
		}
		wantIdle("after a burst")
		for _, c := range screens {
			c.conn.Close()
		}
		s.finish()
	})
}

func TestLeavingAHallTwiceTakesNobodyElseOut(t *testing.T) {
	h := &hall{site: "one"}
	var screens []*screen
	for range 3 {
		s := newScreen(nil, h, "")
		h.enter(s)
		screens = append(screens, s)
	}
	h.leave(screens[0])
	h.leave(screens[0])
	if got := h.appendTo(nil); len(got) != 2 || !slices.Contains(got, screens[1]) || !slices.Contains(got, screens[2]) {
		t.Errorf("%d screens are left, want the two others", len(got))
	}
	h.leave(screens[2])
	h.leave(screens[1])
	if got := h.appendTo(nil); len(got) != 0 {
		t.Errorf("%d screens are left", len(got))
	}
}

func TestShutdownFlushesWhatIsQueuedThenCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		screen := s.connect(headers(tokenOne), false)
		site := s.keys.Site("one")
		for i := range uint64(3) {
			s.feed.event(event(t, site, i+1, `{}`))
		}
		synctest.Wait()
		s.stop()
		synctest.Wait()
		if _, _, err := s.tryConnect(headers(tokenOne), false); err == nil {
			t.Error("a stopping gateway let a screen in")
		}
		start := time.Now()
		screen.listen()
		if err := <-s.stopped; err != nil {
			t.Errorf("Run: %v, want nil when told to stop", err)
		}
		if time.Since(start) >= time.Second {
			t.Errorf("stopping took %v with a screen that answers", time.Since(start))
		}
		screen.done.Wait()
		if n := len(screen.frames()); n != 3 {
			t.Errorf("%d frames before the end, want all 3", n)
		}
		screen.wantClosed(websocket.CloseServiceRestart, byeShutdown.text)
		screen.conn.Close()
		s.wantCount("kb_wsgate_closes_total", closeShutdown, 1)
		s.wantCount("kb_wsgate_drops_total", dropClosed, 0)
	})
}

func TestShutdownCutsWhatDoesNotCloseAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := testConfig()
		cfg.Drain, cfg.WriteTimeout = 3*time.Second, time.Minute
		s := newStage(t, cfg)
		s.start()
		stuck := s.connect(headers(tokenOne), false)
		deaf := s.connect(headers(tokenTwo), false) // takes the close frame, never answers it
		deaf.conn.SetCloseHandler(func(int, string) error { return nil })
		deaf.listen()
		for i := range uint64(3) {
			s.feed.event(event(t, s.keys.Site("one"), i+1, `{}`))
		}
		synctest.Wait()
		start := time.Now()
		s.stop()
		if err := <-s.stopped; err != nil {
			t.Errorf("Run: %v", err)
		}
		if got := time.Since(start); got != cfg.Drain {
			t.Errorf("stopping took %v, want the limit, %v", got, cfg.Drain)
		}
		deaf.done.Wait()
		deaf.wantClosed(websocket.CloseServiceRestart, byeShutdown.text)
		if want := `msg="screens were cut: they did not close in time" screens=1 frames=2 closed=1`; !strings.Contains(s.log.String(), want) {
			t.Errorf("the log does not say %s:\n%s", want, s.log)
		}
		s.wantCount("kb_wsgate_drops_total", dropClosed, 3)
		s.wantCount("kb_wsgate_screens", "", 0)
		stuck.conn.Close()
		deaf.conn.Close()
	})
}

// The gateway may stop between a handshake's check and its answer.
func TestASessionThatEndsDuringItsHandshake(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(*screen)
		code int // of the close frame; 1006 = none came
	}{
		{"is told why", func(s *screen) { s.end(byeShutdown) }, websocket.CloseServiceRestart},
		{"is cut", func(s *screen) { s.end(byeShutdown); s.cut() }, websocket.CloseAbnormalClosure},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t, testConfig())
				pipe := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
				server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					screen := newScreen(s.Gate, s.halls["one"], "grill")
					if refusal := s.begin(screen); refusal != nil {
						t.Errorf("refused: %+v", refusal)
					}
					tc.do(screen)
					conn, err := s.plain.Upgrade(w, r, nil)
					if err != nil {
						t.Error(err)
					}
					screen.upgraded <- conn
				})}
				go server.Serve(pipe)
				defer server.Close()
				s.pipe = pipe
				screen := s.connect(headers(tokenOne), false).listen()
				synctest.Wait()
				if !websocket.IsCloseError(screen.err, tc.code) {
					t.Errorf("reading ended with %v, want %d", screen.err, tc.code)
				}
				screen.close()
				s.sessions.Wait()
				if len(s.open) != 0 {
					t.Error("the session is left open")
				}
			})
		})
	}
}

func TestRunEndsWithTheFeedsError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, failure := range []error{errors.New("consumer deleted"), nil} {
			s := newStage(t, testConfig())
			s.start()
			screen := s.connect(headers(tokenOne), false).listen()
			s.feed.fail <- failure
			err := <-s.stopped
			if err == nil || failure != nil && !errors.Is(err, failure) || !strings.Contains(err.Error(), "feed ended") {
				t.Errorf("Run: %v, want the end of the feed", err)
			}
			screen.done.Wait()
			screen.wantClosed(websocket.CloseServiceRestart, byeShutdown.text)
			screen.conn.Close()
			s.stop()
		}
	})
}

func TestScreensOfOtherSitesSeeNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, testConfig())
		s.start()
		one, two := s.connect(headers(tokenOne), false).listen(), s.connect(headers(tokenTwo), false).listen()
		d := event(t, s.keys.Site("one"), 1, `{"n":1}`)
		s.feed.event(d)
		synctest.Wait()
		one.wantFrames(string(d.Event.Triple.AppendJSON(nil)))
		two.wantFrames()
		one.close()
		two.close()
		s.finish()
		s.wantCount("kb_wsgate_frames_total", "", 1)
	})
}

func TestFrameIsTheEventsTriple(t *testing.T) {
	ctr := envelope.Settings{Profile: envelope.A256CTR, Iterations: 1}
	for _, tc := range []struct {
		name     string
		settings envelope.Settings
		deflate  bool
	}{
		{"a256gcm", gcm, false}, {"a256gcm, compressed", gcm, true}, {"a256ctr", ctr, false}, {"a256ctr, compressed", ctr, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t, testConfig())
				site := newSite(t, "two", true)
				site.Settings = tc.settings
				ring, err := envelope.NewKeyring(tc.settings, newKey(t, tc.settings))
				if err != nil {
					t.Fatal(err)
				}
				site.Keyring = ring
				s.keys.set(site)
				s.start()
				iv := goodIV
				if tc.settings.Profile == envelope.A256CTR {
					iv = "AAAAAAAAAAAAAAAAAAAAAA=="
				}
				h := headers(tokenTwo)
				h.Set("Sec-Iv", iv)
				screen := s.connect(h, tc.deflate).listen()
				const payload = `{"_id":"o-1","items":["Crêpe","🍟"]}`
				// A POS's trailing line break is part of its message.
				d := event(t, site, 1, payload, func(e *envelope.Event) {
					e.Triple.Message = append(e.Triple.Message[:len(e.Triple.Message):len(e.Triple.Message)], '\n')
				})
				s.feed.event(d)
				synctest.Wait()
				frames := screen.frames()
				if len(frames) != 1 {
					t.Fatalf("%d frames", len(frames))
				}
				got, err := envelope.ParseTriple([]byte(frames[0]), 0)
				if err != nil {
					t.Fatal(err)
				}
				want := d.Event.Triple
				if string(got.IV) != string(want.IV) || string(got.Fingerprint) != string(want.Fingerprint) || string(got.Message) != string(want.Message) {
					t.Errorf("frame %s, want the triple %s", frames[0], want.AppendJSON(nil))
				}
				if plaintext, err := ring.Open(nil, got); err != nil || string(plaintext) != payload {
					t.Errorf("the frame opens to %q, %v", plaintext, err)
				}
				screen.close()
				s.finish()
			})
		})
	}
}
