package router

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// kill cuts a router off from everything, as kill -9 does: what it does from now on has no
// effect. It returns when the router has noticed.
func (r *running) kill(t testing.TB) {
	t.Helper()
	r.hub.die()
	r.stop()
	if err := <-r.done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// mortal cuts the Kitchen's connections of a killed router.
func mortal(hub *fakeHub, k http.RoundTripper) http.RoundTripper {
	return tripper(func(r *http.Request) (*http.Response, error) {
		if hub.dead.Err() != nil {
			return nil, errors.New("dead")
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(hub.dead, cancel)()
		return k.RoundTrip(r.WithContext(ctx))
	})
}

// Killed between the Kitchen's answer and the report: the event is posted again with the
// same id, and the Kitchen's 409 is then a delivery.
func TestKilledBeforeTheReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		taken := make(map[string]int)
		k := &diary{answer: func(_ int, r *http.Request, _ []byte) (*http.Response, error) {
			id := r.Header.Get("Idempotency-Key")
			if taken[id]++; taken[id] > 1 {
				return reply(409, ""), nil
			}
			return reply(200, ""), nil
		}}
		hub := log.connect()
		answered := make(chan struct{})
		hub.onReport = func(ctx context.Context, _ *broker.Report) error {
			close(answered)
			hub.die()
			<-ctx.Done()
			return errCut
		}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
		a, b := log.store(e.event(t, "s1")), log.store(e.event(t, "s1"))
		<-answered
		r.kill(t)
		if len(log.reports) != 0 || log.acks(a) != 0 {
			t.Fatal("the kill came too late")
		}

		began := time.Now()
		r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		waitSettled(t, log)
		r.end(t)
		mustReport(t, log, a, stateDelivered, ReasonRepeated)
		mustReport(t, log, b, stateDelivered, ReasonAccepted)
		posts := k.all()
		if !slices.Equal(k.seqs(), []int{1, 1, 2}) || posts[0].id != posts[1].id {
			t.Errorf("POSTs %v", k.seqs())
		}
		if quiet := posts[1].at.Sub(began); quiet < time.Second {
			t.Errorf("the new owner posted after %s: the old one may have been cut in the middle of an attempt", quiet)
		}
	})
}

// Who may have attempted an event before is told by the stream's order, not by clocks:
// the hub's may be ahead of the bridge's, or behind.
func TestClocksDoNotTellWhoWasFirst(t *testing.T) {
	for _, skew := range []time.Duration{-5 * time.Second, 0, 5 * time.Second, time.Hour} {
		t.Run(skew.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				log.skew = skew
				k := &diary{answer: always(409, "")}
				inherited := log.store(e.event(t, "s1"))
				time.Sleep(time.Second)
				began := time.Now()
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				waitSettled(t, log)
				fresh := log.store(e.event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				mustReport(t, log, inherited, stateDelivered, ReasonRepeated)
				mustReport(t, log, fresh, stateFailed, ReasonConflict)
				if quiet := k.all()[0].at.Sub(began); quiet < time.Second {
					t.Errorf("posted after %s, though the owner before may have been killed in the middle of an attempt", quiet)
				}
			})
		})
	}
}

// Killed between the report and the acknowledgement: the report log knows.
func TestKilledBeforeTheAcknowledgement(t *testing.T) {
	for _, status := range []int{200, 422} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{answer: always(status, "")}
				hub := log.connect()
				reported := make(chan struct{}, 10)
				hub.loseAck = func(*broker.Delivery) bool { reported <- struct{}{}; return true }
				r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
				var events []*broker.Delivery
				for range 3 {
					events = append(events, log.store(e.event(t, "s1")))
				}
				for range 3 {
					<-reported
				}
				r.kill(t)
				time.Sleep(20 * time.Minute) // past the deadlines: done is done

				r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				last := log.store(e.event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				if !slices.Equal(k.seqs(), []int{1, 2, 3, 4}) {
					t.Errorf("POSTs %v; the report log has the first three", k.seqs())
				}
				for _, d := range append(events, last) {
					if rep := log.reportOn(t, d); rep == nil || rep.Status != status {
						t.Errorf("seq %d: report %+v", d.Event.Seq, rep)
					}
				}
				if n := r.counted(t, "kb_router_skipped_total", "cause", "reported"); n != 3 {
					t.Errorf("%v skipped", n)
				}
			})
		})
	}
}

// The broker cannot make an order disappear by saying that it was delivered.
func TestForgedReportIsNotBelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		d := log.store(e.event(t, "s1"))
		forged := broker.Report{Kind: "order", StreamSeq: 1, Bind: "b1", Tag: "x"}
		forged.Site, forged.Edge, forged.Epoch, forged.Seq, forged.Endpoint, forged.State = "s1", "e1", "ep1", 1, "kitchen", "delivered"
		// Of another site, with that site's tag.
		moved := forged
		moved.Site = "s2"
		moved.Tag = keys.Site("s2").Binding.Current().TagReport(&moved.Report)
		moved.Site = "s1"
		log.reports = append(log.reports, &storedReport{forged, time.Now(), time.Now()}, &storedReport{moved, time.Now(), time.Now()})
		k := &diary{}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		waitSettled(t, log)
		r.end(t)
		if !slices.Equal(k.seqs(), []int{1}) || log.acks(d) != 1 {
			t.Errorf("POSTs %v", k.seqs())
		}
		if r.logs.alarms()[alarmReport] != 1 {
			t.Errorf("alarms: %v", r.logs.alarms())
		}
	})
}

// An event that never was verified does not become done by naming one that is.
func TestDoneIsLookedUpAfterTheTag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		hub.loseAck = func(*broker.Delivery) bool { return true }
		k := &diary{}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
		d := log.store(e.event(t, "s1"))
		for log.reportOn(t, d) == nil {
			time.Sleep(time.Millisecond)
		}
		r.kill(t)
		ev := d.Event
		ev.Triple.Message = []byte("something else")
		forged := log.store(ev)
		r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		waitSettled(t, log)
		r.end(t)
		if letter := log.letterOn(forged); letter == nil || letter.Reason != "quarantine" {
			t.Errorf("the forged copy: %+v", letter)
		}
	})
}

// The hub starts over while attempts are in flight: they are waited for, and neither they
// nor a report that could not be stored cost another POST.
func TestTakenOverInTheMiddle(t *testing.T) {
	t.Run("of an attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			k := &diary{answer: func(int, *http.Request, []byte) (*http.Response, error) {
				time.Sleep(2 * time.Second)
				return reply(200, ""), nil
			}}
			hub := log.connect()
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
			for range 3 {
				log.store(e.event(t, "s1"))
			}
			time.Sleep(time.Second)
			hub.order(order{restart: true})
			waitSettled(t, log)
			r.end(t)
			if !slices.Equal(k.seqs(), []int{1, 2, 3}) {
				t.Errorf("POSTs %v", k.seqs())
			}
			if hub.takes != 2 {
				t.Errorf("%d take-overs", hub.takes)
			}
		})
	})
	t.Run("of storing a report", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			k := &diary{}
			hub := log.connect()
			var away atomic.Bool
			away.Store(true)
			hub.onReport = func(ctx context.Context, _ *broker.Report) error {
				if away.Load() {
					<-ctx.Done() // as the broker does: it tries until it is told to end
					return broker.ErrUnknown
				}
				return nil
			}
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
			a, b := log.store(e.event(t, "s1")), log.store(e.event(t, "s1"))
			time.Sleep(time.Minute)
			hub.order(order{restart: true})
			time.Sleep(time.Minute)
			hub.order(order{restart: true}) // and once more, before it could be stored
			time.Sleep(20 * time.Minute)    // past the deadline: delivered is delivered
			away.Store(false)
			hub.order(order{restart: true})
			waitSettled(t, log)
			r.end(t)
			if !slices.Equal(k.seqs(), []int{1}) {
				t.Errorf("POSTs %v; the second expired", k.seqs())
			}
			mustReport(t, log, a, stateDelivered, ReasonAccepted)
			mustReport(t, log, b, stateFailed, ReasonExpired)
		})
	})
	t.Run("twice before the event comes again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log := newHubLog()
			k := &diary{}
			hub := log.connect()
			var away atomic.Bool
			hub.onReport = func(ctx context.Context, _ *broker.Report) error {
				if away.Load() {
					<-ctx.Done()
					return broker.ErrUnknown
				}
				return nil
			}
			r, err := New(Config{Sites: map[string]KitchenConfig{"s1": {URL: "https://kitchen.example"}}, Log: quietLog}, hub, keys)
			if err != nil {
				t.Fatal(err)
			}
			r.endpoints["s1"].rt = k
			p := r.parts[0]
			p.consuming, p.io = t.Context(), t.Context()
			takeover := func() {
				if err := p.takeover(t.Context(), broker.Takeover{}); err != nil {
					t.Fatal(err)
				}
			}
			takeover()
			time.Sleep(time.Second)
			d := log.store(newEdge(keys).event(t, "s1"))
			d.AckFunc = func() error { return hub.ack(d) }
			away.Store(true)
			p.enqueue(d)
			synctest.Wait()
			takeover()
			takeover()
			away.Store(false)
			p.enqueue(d)
			waitSettled(t, log)
			if left := p.end(); left != 0 || len(p.carried) != 0 {
				t.Errorf("%d events left, %d remembered", left, len(p.carried))
			}
			if n := len(k.all()); n != 1 {
				t.Errorf("%d POSTs", n)
			}
		})
	})
	t.Run("of waiting after an unanswered attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			k := &diary{answer: first(unheard)}
			hub := log.connect()
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k},
				func(c *Config) { c.Settle = 20 * time.Second })
			d := log.store(e.event(t, "s1"))
			time.Sleep(5 * time.Second)
			hub.order(order{restart: true})
			waitSettled(t, log)
			r.end(t)
			posts := k.all()
			if len(posts) != 2 || posts[1].attempt != 2 || posts[1].at.Sub(posts[0].end) != 20*time.Second {
				t.Errorf("POSTs: %+v", posts)
			}
			if rep := mustReport(t, log, d, stateDelivered, ReasonAccepted); rep.Attempts != 2 {
				t.Errorf("%d attempts reported", rep.Attempts)
			}
		})
	})
}

// Copies that the hub delivers again are dropped; of settled events they are acknowledged
// once more, as the first acknowledgement was lost.
func TestRedeliveredCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		lost := make(map[uint64]bool)
		hub.loseAck = func(d *broker.Delivery) bool {
			first := d.StreamSeq == 1 && !lost[1]
			lost[d.StreamSeq] = true
			return first
		}
		k := &diary{answer: func(n int, r *http.Request, body []byte) (*http.Response, error) {
			if n == 1 {
				time.Sleep(2 * time.Second)
			}
			return reply(200, ""), nil
		}}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
		log.store(e.event(t, "s1"))
		log.store(e.event(t, "s1"))
		log.store(e.event(t, "s1"))
		time.Sleep(time.Second) // 1 is settled and not acknowledged, 2 is in flight, 3 is queued
		for _, seq := range []uint64{1, 2, 3} {
			hub.order(order{again: seq})
		}
		waitSettled(t, log)
		r.end(t)
		if !slices.Equal(k.seqs(), []int{1, 2, 3}) {
			t.Errorf("POSTs %v", k.seqs())
		}
		if n := r.counted(t, "kb_router_skipped_total", "cause", "redelivered"); n != 3 {
			t.Errorf("%v copies counted", n)
		}
		for seq, n := range log.acked {
			if n != 1 {
				t.Errorf("%d acknowledged %d times", seq, n)
			}
		}
	})
}

// I14: no further attempt, those in flight are finished and reported, within a limit.
func TestShutdown(t *testing.T) {
	t.Run("finishes what is in flight", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			k := &diary{answer: func(int, *http.Request, []byte) (*http.Response, error) {
				time.Sleep(2 * time.Second)
				return reply(200, ""), nil
			}}
			r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
			a, b := log.store(e.event(t, "s1")), log.store(e.event(t, "s1"))
			time.Sleep(time.Second)
			r.end(t)
			mustReport(t, log, a, stateDelivered, ReasonAccepted)
			if log.acks(a) != 1 || log.acks(b) != 0 || !slices.Equal(k.seqs(), []int{1}) {
				t.Errorf("acknowledged %d and %d times, POSTs %v", log.acks(a), log.acks(b), k.seqs())
			}
			if r.logs.attr("router stopped; the hub delivers again what is left", "left") != "1" {
				t.Error("the log does not say what is left")
			}
		})
	})
	t.Run("within drain_timeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1", "s2")
			log, e := newHubLog(), newEdge(keys)
			hub := log.connect()
			hub.onReport = func(ctx context.Context, _ *broker.Report) error { <-ctx.Done(); return broker.ErrUnknown }
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{}, "s2": &diary{answer: unheard}})
			log.store(e.event(t, "s1"))
			log.store(e.event(t, "s2"))
			time.Sleep(time.Second)
			began := time.Now()
			r.end(t)
			if took := time.Since(began); took != 10*time.Second {
				t.Errorf("the stop took %s", took)
			}
		})
	})
	t.Run("is an error when a partition cannot be consumed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			hub := &deaf{newHubLog().connect()}
			r, err := New(Config{}, hub, keys)
			if err != nil {
				t.Fatal(err)
			}
			if r.Ready() == nil {
				t.Error("ready before anything was taken over")
			}
			err = r.Run(t.Context())
			if err == nil || !errors.Is(err, errDeaf) {
				t.Errorf("Run: %v", err)
			}
		})
	})
}

var errDeaf = errors.New("no such consumer")

type deaf struct{ *fakeHub }

func (d *deaf) Partitions() int { return 3 }
func (d *deaf) ConsumePartition(ctx context.Context, p int, _ func(context.Context, broker.Takeover) error, _ func(*broker.Delivery)) error {
	if p == 1 {
		return errDeaf
	}
	<-ctx.Done()
	return nil
}

// An attempt that the deadline cut off is waited for by the next owner too, whose next
// event is another one (I4).
func TestStoppedAfterAnUnansweredAttempt(t *testing.T) {
	for _, how := range []string{"stopped", "killed"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{answer: first(unheard)}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				d := log.store(e.event(t, "s1", within(2*time.Second)))
				time.Sleep(2100 * time.Millisecond)
				mustReport(t, log, d, stateFailed, ReasonOutcomeUnknown)
				if how == "killed" {
					r.hub.die()
					go func() { r.kill(t) }() // its end takes until drain_timeout; the next owner comes at once
				} else {
					r.end(t)
				}
				next := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				log.store(e.event(t, "s1"))
				waitSettled(t, log)
				next.end(t)
				posts := k.all()
				if len(posts) != 2 || posts[1].seq != 2 {
					t.Fatalf("POSTs: %+v", posts)
				}
				if gap := posts[1].at.Sub(posts[0].end); gap < time.Second {
					t.Errorf("the next owner posted %s after the cut", gap)
				}
			})
		})
	}
}

// A stop ends the attempts, not the events: nothing is begun in their place.
func TestNoAttemptBeginsAfterAStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		other := testKey(t, "k2", time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
		k1, _ := keys.Site("s1").Keyring.Key([]byte("k1"))
		log := newHubLog()
		var r *running
		k := &diary{answer: func(int, *http.Request, []byte) (*http.Response, error) {
			r.stop()
			keys.change("s1", func(s *keysync.Site) { s.Keyring = testRing(t, k1, other) })
			return reply(400, `{"errorCode":3}`), nil
		}}
		r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		d := log.store(newEdge(keys).event(t, "s1"))
		if err := <-r.done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if n := len(k.all()); n != 1 || log.acks(d) != 0 {
			t.Errorf("%d POSTs, acknowledged %d times", n, log.acks(d))
		}
	})
}
