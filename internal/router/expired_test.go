package router

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// run makes a run of the next n numbers of a site, all of which expired an hour ago.
func (e *edge) run(t testing.TB, site string, n int, opts ...func(*broker.Event, *[]expiry)) broker.Event {
	t.Helper()
	from := e.seq[site] + 1
	e.seq[site] += uint64(n)
	return e.runOver(t, site, from, e.seq[site], opts...)
}

// runOver makes a run of these numbers, whatever has been numbered before.
func (e *edge) runOver(t testing.TB, site string, from, to uint64, opts ...func(*broker.Event, *[]expiry)) broker.Event {
	t.Helper()
	accepted := time.Now().Add(-70 * time.Minute).UnixMilli()
	var list []expiry
	for seq := from; seq <= to; seq++ {
		list = append(list, expiry{ID: fmt.Sprintf("id-%s-%d", site, seq), Kind: []string{"order", "alert"}[seq%2], Accepted: accepted, Deadline: accepted + 600_000})
	}
	ev := broker.Event{Event: envelope.Event{
		Site: site, Kind: broker.KindExpired, Edge: e.name, Epoch: "ep1", From: from, Seq: to, ID: fmt.Sprintf("run-%d-%d", from, to),
		Accepted: accepted, Deadline: accepted + 600_000, Via: "hub",
	}, Bind: "b1"}
	for _, o := range opts {
		o(&ev, &list)
	}
	if ev.Triple.Message == nil {
		plain, err := json.Marshal(map[string]any{"expired": list})
		if err != nil {
			t.Fatal(err)
		}
		e.sealRun(t, &ev, plain)
	}
	ev.Tag = e.keys.Site(site).Binding.Current().TagEvent(&ev.Event)
	return ev
}

func (e *edge) sealRun(t testing.TB, ev *broker.Event, plain []byte) {
	t.Helper()
	b, err := e.keys.Site(ev.Site).Binding.Current().AppendSealPlain(nil, plain)
	if err != nil {
		t.Fatal(err)
	}
	if ev.Triple, err = envelope.ParseTriple(b, 0); err != nil {
		t.Fatal(err)
	}
}

// expired returns the numbers of a site that are reported as expired at their edge, in the
// order of the log, and fails when one has two reports of any kind.
func (l *hubLog) expired(t testing.TB, site string) (seqs []uint64) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	seen := make(map[uint64]bool)
	for _, r := range l.reports {
		if r.Site != site {
			continue
		}
		if seen[r.Seq] {
			t.Errorf("number %d of %s has two reports", r.Seq, site)
		}
		seen[r.Seq] = true
		if r.Endpoint == noEndpoint {
			seqs = append(seqs, r.Seq)
		}
	}
	return seqs
}

func numbers(from, to uint64) (seqs []uint64) {
	for ; from <= to; from++ {
		seqs = append(seqs, from)
	}
	return seqs
}

func mustExpire(t *testing.T, log *hubLog, site string, want []uint64) {
	t.Helper()
	if got := slices.Sorted(slices.Values(log.expired(t, site))); !slices.Equal(got, want) {
		t.Errorf("reported as expired at the edge: %v, want %v", got, want)
	}
}

// I2, I3: each number of a run is a failed delivery, reported once; none is posted.
func TestRunIsReportedAndNotPosted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		k := &diary{}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		log.store(e.event(t, "s1"))
		run := log.store(e.run(t, "s1", 4))
		log.store(e.event(t, "s1"))
		waitSettled(t, log)
		r.end(t)
		if got := k.seqs(); !slices.Equal(got, []int{1, 6}) {
			t.Errorf("POSTs %v", got)
		}
		mustExpire(t, log, "s1", []uint64{2, 3, 4, 5})
		if log.acks(run) != 1 || log.letterOn(run) != nil {
			t.Errorf("the run: %d acknowledgements, dead letter %+v", log.acks(run), log.letterOn(run))
		}
		for _, rep := range log.reports {
			binding := keys.Site("s1").Binding
			if err := binding.VerifyReport(&rep.Report.Report, rep.Bind, rep.Tag); err != nil {
				t.Errorf("number %d: %v", rep.Seq, err)
			}
			if rep.Seq != 3 {
				continue
			}
			want := envelope.Report{Site: "s1", Edge: "e1", Epoch: "ep1", Seq: 3, ID: "id-s1-3", Endpoint: "-", State: "failed", Reason: "expired",
				Settled: time.Now().UnixMilli(), Triple: rep.Triple}
			if diff := cmp.Diff(want, rep.Report.Report); diff != "" {
				t.Errorf("report (-want +got):\n%s", diff)
			}
			if rep.Kind != "alert" || rep.StreamSeq != run.StreamSeq {
				t.Errorf("kind %s, stream sequence %d", rep.Kind, rep.StreamSeq)
			}
			if plain, err := binding.OpenReport(nil, rep.Triple); err != nil || string(plain) != `{"status":0,"headers":{},"body":""}` {
				t.Errorf("answer %s, %v", plain, err)
			}
		}
		if n := r.counted(t, "kb_router_deliveries_total", "reason", string(ReasonExpired)); n != 4 {
			t.Errorf("%v failed deliveries counted", n)
		}
		if r.logs.count(slog.LevelWarn, "events expired at their edge") != 1 || r.logs.has(slog.LevelWarn, warnClock) {
			t.Error("a run is one line in the log, and says nothing about clocks")
		}
	})
}

// I8: not acknowledged before the last of its reports is stored.
func TestRunIsAcknowledgedLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		var away atomic.Bool
		away.Store(true)
		hub.onReport = func(_ context.Context, r *broker.Report) error {
			if r.Seq == 2 && away.Load() {
				return broker.ErrAway
			}
			return nil
		}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{}})
		run := log.store(e.run(t, "s1", 3))
		time.Sleep(5 * time.Minute)
		mustExpire(t, log, "s1", []uint64{1, 3})
		if log.acks(run) != 0 {
			t.Error("acknowledged while a report was missing")
		}
		away.Store(false)
		waitSettled(t, log)
		r.end(t)
		mustExpire(t, log, "s1", []uint64{1, 2, 3})
	})
}

// A kill between two reports of a run costs nothing: the next owner reports the others.
func TestKilledInTheMiddleOfARun(t *testing.T) {
	for _, stored := range []int{0, 1, 150, 299, 300} {
		t.Run(fmt.Sprintf("%d reports stored", stored), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{}
				hub := log.connect()
				hub.loseAck = func(*broker.Delivery) bool { return true }
				var asked atomic.Int64
				hub.onReport = func(ctx context.Context, _ *broker.Report) error {
					if asked.Add(1) > int64(stored) {
						<-ctx.Done()
						return errCut
					}
					return nil
				}
				r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
				run := log.store(e.run(t, "s1", 300))
				time.Sleep(time.Second)
				r.kill(t)
				if n := len(log.reports); n != stored {
					t.Fatalf("%d reports", n)
				}
				time.Sleep(time.Hour) // past the window in which the hub would drop a repeat

				hub = log.connect()
				var again atomic.Int64
				hub.onReport = func(context.Context, *broker.Report) error { again.Add(1); return nil }
				r = start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
				log.store(e.event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				mustExpire(t, log, "s1", numbers(1, 300))
				if n := again.Load(); n != int64(300-stored)+1 {
					t.Errorf("the second owner stored %d reports, %d of the run were missing", n, 300-stored)
				}
				if log.acks(run) == 0 || log.letterOn(run) != nil || len(k.all()) != 1 {
					t.Errorf("the run: %d acknowledgements, dead letter %v, %d POSTs", log.acks(run), log.letterOn(run), len(k.all()))
				}
			})
		})
	}
}

// The hub starts over in the middle of a run: that goes on where it was.
func TestTakenOverInTheMiddleOfARun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		var asked atomic.Int64
		hub.onReport = func(ctx context.Context, _ *broker.Report) error {
			if n := asked.Add(1); n > 100 && n <= 100+mostTellers {
				<-ctx.Done()
				return errCut
			}
			return nil
		}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{}})
		run := log.store(e.run(t, "s1", 500))
		time.Sleep(time.Second)
		hub.order(order{restart: true})
		waitSettled(t, log)
		r.end(t)
		mustExpire(t, log, "s1", numbers(1, 500))
		if log.acks(run) != 1 {
			t.Errorf("%d acknowledgements", log.acks(run))
		}
	})
}

// The rules of a replay hold for each number of a run.
func TestRunsOverNumbersThatHaveAnEnd(t *testing.T) {
	type stage struct {
		*testing.T
		log  *hubLog
		e    *edge
		hub  *fakeHub
		r    *running
		k    *diary
		keys *fakeKeys
	}
	anew := func(s *stage) {
		s.r.kill(s.T)
		time.Sleep(time.Hour)
		s.hub = s.log.connect()
		s.r = start(s.T, s.hub, s.keys, map[string]http.RoundTripper{"s1": s.k})
	}
	settle := func(s *stage) { waitSettled(s.T, s.log) }
	tests := []struct {
		name    string
		do      func(s *stage)
		expired []uint64
		posted  []int
		replays float64
	}{
		{"the same run twice", func(s *stage) {
			run := s.e.run(s, "s1", 3)
			s.log.store(run)
			settle(s)
			s.log.store(run)
		}, numbers(1, 3), nil, 1},
		{"the same run twice, both waiting", func(s *stage) {
			run := s.e.run(s, "s1", 3)
			s.log.store(run)
			s.log.store(run)
		}, numbers(1, 3), nil, 1},
		{"the same run again after a restart that has its report log", func(s *stage) {
			s.hub.loseAck = func(*broker.Delivery) bool { return true }
			run := s.e.run(s, "s1", 3)
			s.log.store(run)
			time.Sleep(time.Second)
			anew(s)
			s.log.store(run)
		}, numbers(1, 3), nil, 1},
		{"another run over some of the numbers", func(s *stage) {
			s.log.store(s.e.run(s, "s1", 3))
			s.log.store(s.e.runOver(s, "s1", 2, 6))
		}, numbers(1, 6), nil, 0},
		{"a run over delivered numbers", func(s *stage) {
			for range 3 {
				s.log.store(s.e.event(s, "s1"))
			}
			settle(s)
			s.log.store(s.e.runOver(s, "s1", 2, 6))
		}, numbers(4, 6), []int{1, 2, 3}, 0},
		{"a run over nothing but delivered numbers", func(s *stage) {
			for range 3 {
				s.log.store(s.e.event(s, "s1"))
			}
			settle(s)
			s.log.store(s.e.runOver(s, "s1", 1, 3))
		}, nil, []int{1, 2, 3}, 1},
		{"a run over delivered numbers after a restart", func(s *stage) {
			s.hub.loseAck = func(*broker.Delivery) bool { return true }
			for range 3 {
				s.log.store(s.e.event(s, "s1"))
			}
			time.Sleep(time.Second)
			anew(s)
			s.log.store(s.e.runOver(s, "s1", 2, 6))
		}, numbers(4, 6), []int{1, 2, 3}, 0},
		{"a run over a number that a Kitchen works on: it waits for that", func(s *stage) {
			s.k.answer = first(func(int, *http.Request, []byte) (*http.Response, error) {
				time.Sleep(2 * time.Second)
				return reply(200, ""), nil
			})
			s.log.store(s.e.event(s, "s1"))
			s.log.store(s.e.event(s, "s1"))
			run := s.log.store(s.e.runOver(s, "s1", 1, 4))
			time.Sleep(time.Second)
			if got := s.log.expired(s, "s1"); len(got) > 0 {
				s.Errorf("%v were reported before the events ahead of the run had their end", got)
			}
			settle(s)
			if s.log.acks(run) != 1 {
				s.Errorf("the run has %d acknowledgements", s.log.acks(run))
			}
		}, numbers(3, 4), []int{1, 2}, 0},
		{"an event whose number a run had", func(s *stage) {
			s.log.store(s.e.run(s, "s1", 3))
			settle(s)
			s.e.seq["s1"] = 1
			s.log.store(s.e.event(s, "s1"))
		}, numbers(1, 3), nil, 1},
		{"an event whose number a run had, after a restart", func(s *stage) {
			s.hub.loseAck = func(*broker.Delivery) bool { return true }
			s.log.store(s.e.run(s, "s1", 3))
			time.Sleep(time.Second)
			anew(s)
			s.e.seq["s1"] = 1
			s.log.store(s.e.event(s, "s1"))
		}, numbers(1, 3), nil, 1},
		{"the numbers of another epoch", func(s *stage) {
			s.log.store(s.e.event(s, "s1"))
			s.log.store(s.e.runOver(s, "s1", 1, 2, func(ev *broker.Event, _ *[]expiry) { ev.Edge = "e2" }))
		}, numbers(1, 2), []int{1}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				s := &stage{T: t, log: newHubLog(), e: newEdge(keys), k: &diary{}, keys: keys}
				s.hub = s.log.connect()
				s.r = start(t, s.hub, keys, map[string]http.RoundTripper{"s1": s.k})
				tt.do(s)
				settle(s)
				s.r.end(t)
				seen := make(map[string]int)
				var expired []uint64
				for _, r := range s.log.reports {
					seen[fmt.Sprint(r.Edge, r.Seq)]++
					if r.Endpoint == noEndpoint {
						expired = append(expired, r.Seq)
					}
				}
				for number, n := range seen {
					if n > 1 {
						t.Errorf("%s has %d reports", number, n)
					}
				}
				if slices.Sort(expired); !slices.Equal(expired, tt.expired) {
					t.Errorf("reported as expired %v, want %v", expired, tt.expired)
				}
				if got := s.k.seqs(); !slices.Equal(got, tt.posted) {
					t.Errorf("POSTs %v, want %v", got, tt.posted)
				}
				if n := s.r.counted(t, "kb_router_quarantined_total", "cause", string(causeReplay)); n != tt.replays {
					t.Errorf("%v replays, want %v", n, tt.replays)
				}
			})
		})
	}
}

// I3, I5: a Kitchen that does not answer delays no run, and a run no order.
func TestRunsGoBesideDeliveries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		var mu sync.Mutex
		open := false
		hub.onReport = func(_ context.Context, r *broker.Report) error {
			mu.Lock()
			defer mu.Unlock()
			if r.Site == "s2" && r.Endpoint == noEndpoint && !open {
				return broker.ErrAway
			}
			return nil
		}
		k := &diary{}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": kitchen(silent), "s2": k})
		log.store(e.event(t, "s1"))
		for range 3 {
			log.store(e.run(t, "s1", 10))
		}
		log.store(e.run(t, "s2", 10))
		log.store(e.event(t, "s2"))
		time.Sleep(time.Second)
		if got := log.expired(t, "s1"); len(got) != 30 {
			t.Errorf("%d of 30 numbers reported behind a Kitchen that does not answer", len(got))
		} else {
			for i := range 3 {
				if part := slices.Sorted(slices.Values(got[10*i : 10*i+10])); part[0] != uint64(10*i+2) {
					t.Errorf("run %d was not reported in its turn: %v", i, got)
				}
			}
		}
		if got := k.seqs(); !slices.Equal(got, []int{11}) {
			t.Errorf("POSTs behind a run whose reports are not stored: %v", got)
		}
		mu.Lock()
		open = true
		mu.Unlock()
		waitSettled(t, log)
		r.end(t)
	})
}

// Reports of runs are stored side by side, but not without bound, however many sites have runs.
func TestReportsOfRunsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sites := []string{"s1", "s2", "s3"}
		keys := testKeys(t, sites...)
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		var now, most atomic.Int64
		hub.onReport = func(context.Context, *broker.Report) error {
			n := now.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(time.Millisecond)
			now.Add(-1)
			return nil
		}
		r := start(t, hub, keys, nil)
		began := time.Now()
		for _, site := range sites {
			log.store(e.run(t, site, mostExpired))
		}
		waitSettled(t, log)
		took := time.Since(began)
		r.end(t)
		for _, site := range sites {
			mustExpire(t, log, site, numbers(1, mostExpired))
		}
		if n := most.Load(); n > mostTellers || took > 6*mostExpired/mostTellers*time.Millisecond {
			t.Errorf("%d at once, all in %s", n, took)
		}
	})
}

// I14: a stop in the middle of a run leaves it unacknowledged, in time.
func TestStopInTheMiddleOfARun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		hub.onReport = func(ctx context.Context, r *broker.Report) error {
			if r.Seq > 5 {
				return broker.ErrAway
			}
			return nil
		}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{}}, func(c *Config) { c.DrainTimeout = 3 * time.Second })
		run := log.store(e.run(t, "s1", 10))
		log.store(e.run(t, "s1", 10))
		time.Sleep(time.Second)
		began := time.Now()
		r.end(t)
		if took := time.Since(began); took > 4*time.Second || log.acks(run) != 0 {
			t.Errorf("stopped in %s, %d acknowledgements", took, log.acks(run))
		}
		r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": &diary{}})
		waitSettled(t, log)
		r.end(t)
		mustExpire(t, log, "s1", numbers(1, 20))
	})
}

// A site without a Kitchen, and names that nobody knows, keep nothing in memory.
func TestRunsOfASiteWithoutAKitchen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		r := start(t, log.connect(), keys, nil)
		log.store(e.run(t, "s1", 3))
		waitSettled(t, log)
		lanes := func() int {
			ten := r.parts[0].tenure.Load()
			ten.mu.Lock()
			defer ten.mu.Unlock()
			return len(ten.lanes)
		}
		synctest.Wait()
		if n := lanes(); n != 0 {
			t.Errorf("%d lanes are kept", n)
		}
		r.end(t)
		mustExpire(t, log, "s1", numbers(1, 3))
	})
}

// I7: a run that no edge would write is quarantined as a whole.
func TestBadRuns(t *testing.T) {
	body := func(text string) func(*testing.T, *edge) broker.Event {
		return func(t *testing.T, e *edge) broker.Event {
			return e.run(t, "s1", 2, func(ev *broker.Event, _ *[]expiry) { e.sealRun(t, ev, []byte(text)) })
		}
	}
	list := func(change func([]expiry) []expiry) func(*testing.T, *edge) broker.Event {
		return func(t *testing.T, e *edge) broker.Event {
			return e.run(t, "s1", 2, func(_ *broker.Event, l *[]expiry) { *l = change(*l) })
		}
	}
	entry := func(change func(*expiry)) func(*testing.T, *edge) broker.Event {
		return list(func(l []expiry) []expiry { change(&l[1]); return l })
	}
	const one = `{"id":"a","kind":"order","accepted":1,"deadline":2}`
	for _, tt := range []struct {
		name string
		make func(t *testing.T, e *edge) broker.Event
		want cause
	}{
		{"one entry too few", list(func(l []expiry) []expiry { return l[1:] }), causeRun},
		{"one entry too many", list(func(l []expiry) []expiry { return append(l, l[0]) }), causeRun},
		{"no entries", list(func([]expiry) []expiry { return nil }), causeRun},
		{"more than a run may have", func(t *testing.T, e *edge) broker.Event { return e.run(t, "s1", mostExpired+1) }, causeRun},
		{"all numbers there are", func(t *testing.T, e *edge) broker.Event {
			return e.run(t, "s1", 2, func(ev *broker.Event, _ *[]expiry) { ev.From, ev.Seq = 1, 1<<64-1 })
		}, causeRun},
		{"kind that is no name", entry(func(x *expiry) { x.Kind = "Or der" }), causeRun},
		{"kind expired", entry(func(x *expiry) { x.Kind = "expired" }), causeRun},
		{"kind report", entry(func(x *expiry) { x.Kind = "report" }), causeRun},
		{"no id", entry(func(x *expiry) { x.ID = "" }), causeRun},
		{"id that is none", entry(func(x *expiry) { x.ID = "a.b" }), causeRun},
		{"id of 129 characters", entry(func(x *expiry) { x.ID = strings.Repeat("a", 129) }), causeRun},
		{"deadline before acceptance", entry(func(x *expiry) { x.Deadline = x.Accepted - 1 }), causeRun},
		{"negative time", entry(func(x *expiry) { x.Accepted = -1 }), causeRun},
		{"time after 9999", entry(func(x *expiry) { x.Deadline = latestTime + 1 }), causeRun},
		{"with an order key", func(t *testing.T, e *edge) broker.Event {
			return e.run(t, "s1", 2, func(ev *broker.Event, _ *[]expiry) { ev.Order = "o" })
		}, causeRun},
		{"not JSON", body(`{"expired":[` + one), causeRun},
		{"another member", body(`{"expired":[` + one + `,` + one + `],"more":1}`), causeRun},
		{"another member of an entry", body(`{"expired":[` + one + `,{"id":"a","kind":"order","accepted":1,"deadline":2,"order":"x"}]}`), causeRun},
		{"more behind it", body(`{"expired":[` + one + `,` + one + `]} {}`), causeRun},
		{"sealed with a Portal's key", func(t *testing.T, e *edge) broker.Event {
			return e.run(t, "s1", 2, func(ev *broker.Event, _ *[]expiry) { ev.Triple = e.event(t, "s1").Triple })
		}, causeRun},
		{"altered", func(t *testing.T, e *edge) broker.Event {
			ev := e.run(t, "s1", 2)
			ev.From--
			ev.From = max(ev.From, 1)
			ev.Deadline++
			return ev
		}, causeTag},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				bad := log.store(tt.make(t, e))
				good := log.store(e.run(t, "s1", 1))
				waitSettled(t, log)
				r.end(t)
				if letter := log.letterOn(bad); letter == nil || letter.Reason != string(ReasonQuarantine) {
					t.Errorf("dead letter: %+v", letter)
				}
				mustExpire(t, log, "s1", []uint64{good.Event.Seq})
				if n := r.counted(t, "kb_router_quarantined_total", "cause", string(tt.want)); n != 1 || len(k.all()) != 0 {
					t.Errorf("quarantined for %s: %v; %d POSTs", tt.want, n, len(k.all()))
				}
				for _, rec := range r.logs.records {
					rec.Attrs(func(a slog.Attr) bool {
						if strings.Contains(a.Value.String(), "expired\":") {
							t.Errorf("the log quotes the run: %v", a)
						}
						return true
					})
				}
			})
		})
	}
}

// An edge may have read a new binding file before the bridge: that looks once, then it says
// that the key is unknown. What is tagged with known keys costs no look.
func TestUnknownBindingKeyIsLookedForInTheFile(t *testing.T) {
	for _, found := range []bool{true, false} {
		t.Run(fmt.Sprint(found), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				log.store(e.event(t, "s1"))
				waitSettled(t, log)
				if n := keys.rereads.Load(); n != 0 {
					t.Errorf("%d looks at the file for a known key", n)
				}
				fresh, err := envelope.NewBindingKey("b2", slices.Repeat([]byte{7}, 32))
				if err != nil {
					t.Fatal(err)
				}
				if found {
					old, _ := keys.Site("s1").Binding.Key("b1")
					keys.reread = func() {
						both, err := envelope.NewBinding("s1", keys.Site("s1").Binding.Lane(), fresh, old)
						if err != nil {
							t.Error(err)
						}
						keys.change("s1", func(s *keysync.Site) { s.Binding = both })
					}
				}
				ev := e.event(t, "s1")
				ev.Bind, ev.Tag = "b2", fresh.TagEvent(&ev.Event)
				log.store(ev)
				waitSettled(t, log)
				r.end(t)
				if n := keys.rereads.Load(); n != 1 {
					t.Errorf("%d looks at the file", n)
				}
				want, quarantined := []int{1, 2}, 0.0
				if !found {
					want, quarantined = []int{1}, 1
				}
				if got := k.seqs(); !slices.Equal(got, want) {
					t.Errorf("POSTs %v, want %v", got, want)
				}
				if n := r.counted(t, "kb_router_quarantined_total", "cause", string(causeUnknownBind)); n != quarantined {
					t.Errorf("%v quarantined, want %v", n, quarantined)
				}
			})
		})
	}
}

func TestRunOnARealHub(t *testing.T) {
	hub := realHub(t)
	keys := testKeys(t, "s1")
	e := newEdge(keys)
	publish := func(ev broker.Event) {
		t.Helper()
		if _, _, err := hub.PublishEvent(t.Context(), &ev); err != nil {
			t.Fatal(err)
		}
	}
	publish(e.event(t, "s1"))
	publish(e.run(t, "s1", mostExpired))
	publish(e.event(t, "s1"))
	var l ledger
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{site}/{kind}", func(_ http.ResponseWriter, r *http.Request) { l.take(r) })
	stop := runOn(t, hub, keys, mux.ServeHTTP, "s1")
	all := reports(t, hub, mostExpired+2)
	stop()
	seen := make(map[uint64]int)
	for _, r := range all {
		seen[r.Seq]++
		if expired := r.Seq > 1 && r.Seq < mostExpired+2; expired != (r.Endpoint == noEndpoint && r.Reason == string(ReasonExpired)) {
			t.Errorf("number %d: %s at %s, %s", r.Seq, r.State, r.Endpoint, r.Reason)
		}
	}
	if len(seen) != mostExpired+2 || len(all) != len(seen) {
		t.Errorf("%d reports on %d numbers", len(all), len(seen))
	}
	if got := l.got("s1"); !slices.Equal(got, []string{"1", fmt.Sprint(mostExpired + 2)}) {
		t.Errorf("POSTs %v", got)
	}
}
