package router

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// diary is a Kitchen that takes everything and notes what came when.
type diary struct {
	mu      sync.Mutex
	entries []entry
	// answer replaces the 200; it is given how many requests came before.
	answer func(n int, r *http.Request, body []byte) (*http.Response, error)
}

type entry struct {
	at, end time.Time
	seq     int
	attempt int
	id      string
	iv, fp  string
	body    string
}

func (k *diary) RoundTrip(r *http.Request) (*http.Response, error) {
	return kitchen(func(r *http.Request, body []byte) (*http.Response, error) {
		seq, _ := strconv.Atoi(r.Header.Get("Kb-Seq"))
		attempt, _ := strconv.Atoi(r.Header.Get("Kb-Attempt"))
		k.mu.Lock()
		n := len(k.entries)
		k.entries = append(k.entries, entry{
			at: time.Now(), seq: seq, attempt: attempt,
			id: r.Header.Get("Idempotency-Key"),
			iv: r.Header.Get("Sec-Iv"), fp: r.Header.Get("Sec-Fingerprint"), body: string(body),
		})
		k.mu.Unlock()
		defer func() {
			k.mu.Lock()
			k.entries[n].end = time.Now()
			k.mu.Unlock()
		}()
		if k.answer == nil {
			return reply(200, ""), nil
		}
		return k.answer(n, r, body)
	}).RoundTrip(r)
}

func (k *diary) all() []entry {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.entries)
}

func (k *diary) seqs() (seqs []int) {
	for _, e := range k.all() {
		seqs = append(seqs, e.seq)
	}
	return seqs
}

// always answers with a status.
func always(status int, body string, headers ...string) func(int, *http.Request, []byte) (*http.Response, error) {
	return func(int, *http.Request, []byte) (*http.Response, error) { return reply(status, body, headers...), nil }
}

// first gives the answers in order, and then 200.
func first(answers ...func(int, *http.Request, []byte) (*http.Response, error)) func(int, *http.Request, []byte) (*http.Response, error) {
	return func(n int, r *http.Request, body []byte) (*http.Response, error) {
		if n < len(answers) {
			return answers[n](n, r, body)
		}
		return reply(200, ""), nil
	}
}

func unheard(_ int, r *http.Request, body []byte) (*http.Response, error) { return silent(r, body) }

func waitSettled(t *testing.T, log *hubLog) {
	t.Helper()
	if err := log.settled(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// mustReport checks the end of a delivery as its report has it.
func mustReport(t *testing.T, log *hubLog, d *broker.Delivery, st state, r Reason) *storedReport {
	t.Helper()
	rep := log.reportOn(t, d)
	if rep == nil {
		t.Fatalf("no report on seq %d", d.Event.Seq)
	}
	if rep.State != string(st) || rep.Reason != string(r) {
		t.Errorf("report on seq %d: %s, %s; want %s, %s", d.Event.Seq, rep.State, rep.Reason, st, r)
	}
	if letter := log.letterOn(d); (letter != nil) != (st == stateFailed) {
		t.Errorf("seq %d is %s and has a dead letter: %t", d.Event.Seq, st, letter != nil)
	} else if letter != nil && letter.Reason != string(r) {
		t.Errorf("dead letter of seq %d says %s, the report %s", d.Event.Seq, letter.Reason, r)
	}
	return rep
}

func TestDeliversAndReports(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		k1 := &diary{answer: always(201, `{"ok":true}`, "Content-Type", "application/json", "X-Other", "x")}
		k2 := &diary{}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k1, "s2": k2})
		var events []*broker.Delivery
		for range 3 {
			events = append(events, log.store(e.event(t, "s1")), log.store(e.event(t, "s2")))
		}
		waitSettled(t, log)
		r.end(t)

		for _, k := range []*diary{k1, k2} {
			if got := k.seqs(); !slices.Equal(got, []int{1, 2, 3}) {
				t.Errorf("a kitchen got %v", got)
			}
		}
		for _, d := range events {
			rep := mustReport(t, log, d, stateDelivered, ReasonAccepted)
			binding := keys.Site(d.Site).Binding
			if err := binding.VerifyReport(&rep.Report.Report, rep.Bind, rep.Tag); err != nil {
				t.Errorf("report on %s %d: %v", d.Site, d.Event.Seq, err)
			}
			if log.acks(d) != 1 {
				t.Errorf("%s %d was acknowledged %d times", d.Site, d.Event.Seq, log.acks(d))
			}
		}
		rep := log.reportOn(t, events[0])
		plain, err := keys.Site("s1").Binding.OpenReport(nil, rep.Triple)
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			Status  int               `json:"status"`
			Headers map[string]string `json:"headers"`
			Body    string            `json:"body"`
		}
		if err := json.Unmarshal(plain, &got); err != nil {
			t.Fatalf("the sealed answer is not JSON: %v: %s", err, plain)
		}
		body, err := base64.StdEncoding.DecodeString(got.Body)
		if err != nil {
			t.Fatal(err)
		}
		if got.Status != 201 || string(body) != `{"ok":true}` || !cmp.Equal(got.Headers, map[string]string{"content-type": "application/json"}) {
			t.Errorf("the sealed answer is %s", plain)
		}
		ev := events[0].Event
		now := time.Now().UnixMilli()
		want := envelope.Report{
			Site: "s1", Edge: "e1", Epoch: "ep1", Seq: 1, ID: ev.ID, Endpoint: "kitchen", N: 0, State: "delivered", Reason: "accepted",
			Status: 201, Attempts: 1, Started: now, Settled: now, Triple: rep.Triple,
		}
		if diff := cmp.Diff(want, rep.Report.Report); diff != "" {
			t.Errorf("report (-want +got):\n%s", diff)
		}
		if rep.Kind != "order" || rep.StreamSeq != events[0].StreamSeq {
			t.Errorf("report: kind %q, stream sequence %d", rep.Kind, rep.StreamSeq)
		}
	})
}

// I8: dead letter, report, acknowledgement, each after the one before is stored.
func TestSettlesInOrder(t *testing.T) {
	tests := []struct {
		name   string
		status int
		want   []string
	}{
		{"delivered", 200, []string{"report", "ack"}},
		{"failed", 422, []string{"letter", "report", "ack"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log := newHubLog()
				hub := log.connect()
				var steps []string // one lane: nobody else writes
				failures := map[string]int{"letter": 2, "report": 2}
				try := func(step string) error {
					if failures[step]--; failures[step] >= 0 {
						return fmt.Errorf("%w: full", broker.ErrRejected)
					}
					steps = append(steps, step)
					return nil
				}
				hub.onLetter = func(context.Context, broker.DeadLetter) error { return try("letter") }
				hub.onReport = func(context.Context, *broker.Report) error { return try("report") }
				hub.loseAck = func(*broker.Delivery) bool { steps = append(steps, "ack"); return false }
				k := &diary{answer: always(tt.status, "")}
				r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
				log.store(newEdge(keys).event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				if !slices.Equal(steps, tt.want) {
					t.Errorf("steps %v, want %v", steps, tt.want)
				}
				if n := len(k.all()); n != 1 {
					t.Errorf("%d POSTs; a report that could not be stored must not cost another one", n)
				}
				if r.logs.alarms()[alarmStore] != 1 {
					t.Errorf("alarms: %v", r.logs.alarms())
				}
			})
		})
	}
}

// I3: what expires behind a Kitchen that never answers is reported at once.
func TestExpiresOnTimeBehindADeadHead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		k := &diary{answer: unheard}
		healthy := &diary{}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k, "s2": healthy})
		head := log.store(e.event(t, "s1"))
		var behind []*broker.Delivery
		for i := range 20 {
			behind = append(behind, log.store(e.event(t, "s1", ofKind("alert"), within(time.Duration(120-i)*time.Second))))
		}
		last := log.store(e.event(t, "s1", within(9*time.Minute)))
		other := log.store(e.event(t, "s2"))
		waitSettled(t, log)
		r.end(t)

		for _, d := range behind {
			rep := mustReport(t, log, d, stateFailed, ReasonExpired)
			if late := rep.at.Sub(time.UnixMilli(d.Event.Deadline)); late < 0 || late > time.Second {
				t.Errorf("seq %d reported %s after its deadline", d.Event.Seq, late)
			}
			if rep.Attempts != 0 || rep.Started != 0 || rep.Status != 0 {
				t.Errorf("seq %d was never posted; its report says attempts %d, started %d, status %d", d.Event.Seq, rep.Attempts, rep.Started, rep.Status)
			}
		}
		for _, d := range []*broker.Delivery{head, last} {
			rep := log.reportOn(t, d)
			if late := rep.at.Sub(time.UnixMilli(d.Event.Deadline)); late < 0 || late > time.Second {
				t.Errorf("seq %d reported %s after its deadline", d.Event.Seq, late)
			}
		}
		mustReport(t, log, head, stateFailed, ReasonOutcomeUnknown)
		for _, p := range k.all() {
			if p.seq != 1 {
				t.Errorf("seq %d was posted while the head was open", p.seq)
			}
		}
		// I5
		if rep := mustReport(t, log, other, stateDelivered, ReasonAccepted); rep.at.Sub(other.Stored) > time.Millisecond {
			t.Errorf("the healthy site waited %s", rep.at.Sub(other.Stored))
		}
	})
}

// I3: events whose end cannot be stored keep no others from theirs.
func TestExpiresOnTimeBesideAStuckSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		hub.onReport = func(ctx context.Context, r *broker.Report) error {
			if r.Site == "s1" {
				<-ctx.Done()
				return broker.ErrUnknown
			}
			return nil
		}
		dead := &diary{answer: unheard}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": dead, "s2": dead})
		for range sweepers / 2 {
			log.store(e.event(t, "s1", within(10*time.Second)))
		}
		var others []*broker.Delivery
		for range 20 {
			others = append(others, log.store(e.event(t, "s2", within(20*time.Second))))
		}
		time.Sleep(25 * time.Second)
		for _, d := range others {
			rep := log.reportOn(t, d)
			if rep == nil {
				t.Fatalf("no report on seq %d of the other site", d.Event.Seq)
			}
			if late := rep.at.Sub(time.UnixMilli(d.Event.Deadline)); late > time.Second {
				t.Errorf("seq %d reported %s after its deadline", d.Event.Seq, late)
			}
		}
		r.end(t)
	})
}

// I4: a POST begins settle after an unanswered one was cut off, of the same event or the next.
func TestWaitsAfterAnUnansweredAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		k := &diary{answer: first(unheard, func(int, *http.Request, []byte) (*http.Response, error) {
			return nil, errors.New("EOF")
		})}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k},
			func(c *Config) { c.BackoffMin, c.BackoffMax = time.Nanosecond, time.Nanosecond })
		d := log.store(e.event(t, "s1"))
		waitSettled(t, log)
		r.end(t)
		posts := k.all()
		if len(posts) != 3 {
			t.Fatalf("%d POSTs, want 3", len(posts))
		}
		if took := posts[0].end.Sub(posts[0].at); took != 3*time.Second {
			t.Errorf("the silent attempt took %s, want attempt_timeout", took)
		}
		for i := range 2 {
			if gap := posts[i+1].at.Sub(posts[i].end); gap != time.Second {
				t.Errorf("attempt %d began %s after the one before was cut, want settle", i+2, gap)
			}
		}
		for i, p := range posts {
			if p.attempt != i+1 || p.id != d.Event.ID {
				t.Errorf("POST %d: attempt %d, id %q", i, p.attempt, p.id)
			}
		}
		if rep := mustReport(t, log, d, stateDelivered, ReasonAccepted); rep.Attempts != 3 {
			t.Errorf("the report says %d attempts", rep.Attempts)
		}
	})
}

func TestAttemptEndsByTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		k := &diary{answer: first(unheard)}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		head := log.store(e.event(t, "s1", within(2*time.Second)))
		next := log.store(e.event(t, "s1"))
		waitSettled(t, log)
		r.end(t)
		posts := k.all()
		if len(posts) != 2 || posts[0].seq != 1 || posts[1].seq != 2 {
			t.Fatalf("POSTs: %+v", posts)
		}
		if took := posts[0].end.Sub(posts[0].at); took != 2*time.Second {
			t.Errorf("the attempt took %s, the deadline came after 2s", took)
		}
		if gap := posts[1].at.Sub(posts[0].end); gap < time.Second {
			t.Errorf("the next event was posted %s after the cut, before settle", gap)
		}
		mustReport(t, log, head, stateFailed, ReasonOutcomeUnknown)
		mustReport(t, log, next, stateDelivered, ReasonAccepted)
	})
}

// What the deadline ends is unknown only if the Kitchen may have the event.
func TestEndAtTheDeadline(t *testing.T) {
	refused := &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	tests := []struct {
		name     string
		kitchen  http.RoundTripper
		want     Reason
		status   int
		attempts bool
	}{
		{"503 to the end", &diary{answer: always(503, "")}, ReasonExpired, 503, true},
		{"silent to the end", &diary{answer: unheard}, ReasonOutcomeUnknown, 0, true},
		{"nobody there", unreachable{refused}, ReasonExpired, 0, true},
		{"no such host", unreachable{&net.DNSError{Err: "no such host", Name: "kitchen.example", IsNotFound: true}}, ReasonExpired, 0, true},
		{"silent, then 503", &diary{answer: func(n int, r *http.Request, b []byte) (*http.Response, error) {
			if n == 0 {
				return silent(r, b)
			}
			return reply(503, ""), nil
		}}, ReasonExpired, 503, true},
		{"silent, then nobody there", sequence(&diary{answer: unheard}, unreachable{refused}), ReasonOutcomeUnknown, 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log := newHubLog()
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": tt.kitchen})
				d := log.store(newEdge(keys).event(t, "s1", within(time.Minute)))
				waitSettled(t, log)
				r.end(t)
				rep := mustReport(t, log, d, stateFailed, tt.want)
				if rep.Status != tt.status {
					t.Errorf("status %d, want %d", rep.Status, tt.status)
				}
				if late := rep.at.Sub(time.UnixMilli(d.Event.Deadline)); late < 0 || late > time.Second {
					t.Errorf("reported %s after the deadline", late)
				}
				if rep.Attempts < 4 {
					t.Errorf("%d attempts in a minute", rep.Attempts)
				}
			})
		})
	}
}

// sequence uses each round tripper once, and then the last.
func sequence(all ...http.RoundTripper) http.RoundTripper {
	var n atomic.Int64
	return tripper(func(r *http.Request) (*http.Response, error) {
		i := min(int(n.Add(1)), len(all)) - 1
		return all[i].RoundTrip(r)
	})
}

type tripper func(*http.Request) (*http.Response, error)

func (f tripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// An edge's clock, or a broker, cannot keep an event alive longer than its kind allows.
func TestDeadlineIsClampedToTheKind(t *testing.T) {
	tests := []struct {
		kind string
		want time.Duration
	}{{"order", 10 * time.Minute}, {"alert", 2 * time.Minute}, {"catering", time.Hour}, {"other", 10 * time.Minute}}
	for _, tt := range tests {
		t.Run(tt.kind, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log := newHubLog()
				var told string
				k := kitchen(func(r *http.Request, _ []byte) (*http.Response, error) {
					told = r.Header.Get("Kb-Deadline")
					return reply(503, ""), nil
				})
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k},
					func(c *Config) { c.MaxDeadline = map[string]time.Duration{"catering": time.Hour} })
				d := log.store(newEdge(keys).event(t, "s1", ofKind(tt.kind), within(1000*time.Hour)))
				waitSettled(t, log)
				r.end(t)
				rep := mustReport(t, log, d, stateFailed, ReasonExpired)
				if after := rep.at.Sub(d.Stored); after < tt.want || after > tt.want+time.Second {
					t.Errorf("expired after %s, want %s", after, tt.want)
				}
				if want := strconv.FormatInt(d.Stored.Add(tt.want).UnixMilli(), 10); told != want {
					t.Errorf("Kb-Deadline %s, want %s", told, want)
				}
			})
		})
	}
}

// What the POS asked for holds by the hub's clock too when the edge's is wrong.
func TestDeadlineWhenTheEdgesClockIsWrong(t *testing.T) {
	const life = 30 * time.Second
	tests := []struct {
		name  string
		ahead time.Duration
		want  time.Duration // after it was stored
		warns int
	}{
		{"right", 0, life, 0},
		{"a bit ahead", 10 * time.Second, life, 0},
		{"an hour ahead", time.Hour, life, 1},
		{"a bit behind: the deadline is as stated", -10 * time.Second, life - 10*time.Second, 0},
		{"an hour behind, or the event was stored late: it has expired", -time.Hour, 0, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": &diary{answer: always(503, "")}})
				var all []*broker.Delivery
				for range 2 {
					all = append(all, log.store(e.event(t, "s1", within(life), func(ev *broker.Event) {
						ev.Accepted += tt.ahead.Milliseconds()
						ev.Deadline += tt.ahead.Milliseconds()
					})))
				}
				waitSettled(t, log)
				r.end(t)
				for _, d := range all {
					rep := mustReport(t, log, d, stateFailed, ReasonExpired)
					if after := rep.at.Sub(d.Stored); after < tt.want-time.Millisecond || after > tt.want+time.Second {
						t.Errorf("expired %s after it was stored, want %s", after, tt.want)
					}
				}
				warned := r.logs.count(slog.LevelWarn, warnClock)
				if warned != tt.warns {
					t.Errorf("%d warnings, want %d", warned, tt.warns)
				}
				if offset := r.logs.attr(warnClock, "offset"); warned > 0 && offset != tt.ahead.String() {
					t.Errorf("offset %s, want %s", offset, tt.ahead)
				}
			})
		})
	}
}

func TestWaitsBetweenAttempts(t *testing.T) {
	t.Run("back-off stays within its bounds", func(t *testing.T) {
		e := &endpoint{router: new(Config{}.withDefaults())}
		for _, tt := range []struct {
			failures int
			most     time.Duration
		}{{1, 250 * time.Millisecond}, {2, 500 * time.Millisecond}, {3, time.Second}, {6, 8 * time.Second}, {7, 10 * time.Second}, {64, 10 * time.Second}, {100_000, 10 * time.Second}} {
			var longest time.Duration
			for range 2000 {
				d := e.backoff(tt.failures)
				if d < 0 || d > tt.most {
					t.Fatalf("after %d failures: %s, want 0 to %s", tt.failures, d, tt.most)
				}
				longest = max(longest, d)
			}
			if longest < tt.most*9/10 {
				t.Errorf("after %d failures never more than %s of %s: not full jitter", tt.failures, longest, tt.most)
			}
		}
	})

	tests := []struct {
		name    string
		status  int
		header  string
		want    time.Duration
		expires bool
	}{
		{"seconds rule", 503, "42", 42 * time.Second, false},
		{"seconds rule for 429", 429, "90", 90 * time.Second, false},
		{"a date rules", 503, "date", 30 * time.Second, false},
		{"longer than retry_after_max is retry_after_max", 503, "86400", 5 * time.Minute, false},
		{"beyond the deadline it ends at the deadline", 429, "290", 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log := newHubLog()
				header := tt.header
				if header == "date" {
					// Dates count whole seconds; bubbles begin with one.
					header = time.Now().Add(time.Minute).UTC().Format(http.TimeFormat)
				}
				k := &diary{answer: first(always(tt.status, "", "Retry-After", header, "Date", time.Now().Add(30*time.Second).UTC().Format(http.TimeFormat)))}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k},
					func(c *Config) { c.RetryAfterMax = 5 * time.Minute })
				life := 10 * time.Minute
				if tt.expires {
					life = time.Minute
				}
				d := log.store(newEdge(keys).event(t, "s1", within(life)))
				waitSettled(t, log)
				r.end(t)
				posts := k.all()
				if tt.expires {
					mustReport(t, log, d, stateFailed, ReasonExpired)
					if len(posts) != 1 {
						t.Errorf("%d POSTs", len(posts))
					}
					return
				}
				mustReport(t, log, d, stateDelivered, ReasonAccepted)
				if len(posts) != 2 {
					t.Fatalf("%d POSTs, want 2", len(posts))
				}
				if gap := posts[1].at.Sub(posts[0].end); gap != tt.want {
					t.Errorf("waited %s, want %s", gap, tt.want)
				}
			})
		})
	}

	t.Run("a pause holds for the next event too", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			k := &diary{answer: first(always(429, "", "Retry-After", "90"))}
			r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
			a := log.store(e.event(t, "s1", within(time.Minute)))
			b := log.store(e.event(t, "s1"))
			waitSettled(t, log)
			r.end(t)
			mustReport(t, log, a, stateFailed, ReasonExpired)
			mustReport(t, log, b, stateDelivered, ReasonAccepted)
			posts := k.all()
			if len(posts) != 2 || posts[1].seq != 2 || posts[1].at.Sub(posts[0].at) != 90*time.Second {
				t.Errorf("POSTs: %+v", posts)
			}
		})
	})
}

func TestGoneStopsTheEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		k, healthy := &diary{answer: always(410, "")}, &diary{}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k, "s2": healthy})
		a, b, c := log.store(e.event(t, "s1")), log.store(e.event(t, "s1")), log.store(e.event(t, "s2"))
		waitSettled(t, log)
		r.end(t)
		mustReport(t, log, a, stateFailed, ReasonGone)
		mustReport(t, log, b, stateFailed, ReasonStopped)
		mustReport(t, log, c, stateDelivered, ReasonAccepted)
		if n := len(k.all()); n != 1 {
			t.Errorf("%d POSTs to a stopped endpoint", n)
		}
		if r.logs.alarms()[alarmGone] != 1 {
			t.Errorf("alarms: %v", r.logs.alarms())
		}
	})
}

func TestWrongCredentialIsRetriedWithAnAlarm(t *testing.T) {
	for _, tt := range []struct {
		name   string
		answer func(int, *http.Request, []byte) (*http.Response, error)
	}{
		{"401", always(401, "")},
		{"403", always(403, "")},
		{"400 code 1 with headers sent", always(400, `{"errorCode":1}`)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log := newHubLog()
				file := filepath.Join(t.TempDir(), "credential")
				write := func(s string) {
					if err := os.WriteFile(file, []byte(s+"\n"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				write("Bearer old")
				k := &diary{answer: func(n int, r *http.Request, b []byte) (*http.Response, error) {
					if r.Header.Get("Authorization") == "Bearer new" {
						return reply(200, ""), nil
					}
					return tt.answer(n, r, b)
				}}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k}, func(c *Config) {
					c.Sites["s1"] = KitchenConfig{URL: "https://kitchen.example", AuthorizationFile: file}
				})
				d := log.store(newEdge(keys).event(t, "s1"))
				time.Sleep(5*time.Minute + time.Second)
				if n := r.logs.alarms()[alarmCredential]; n < 3 || n > 6 {
					t.Errorf("%d alarms in five minutes, want about one a minute", n)
				}
				write("Bearer new")
				waitSettled(t, log)
				r.end(t)
				mustReport(t, log, d, stateDelivered, ReasonAccepted)
			})
		})
	}
}

func TestRewrapsUnderTheOtherKey(t *testing.T) {
	code := func(n int) string { return fmt.Sprintf(`{"errorCode":%d,"message":"x"}`, n) }
	for _, tt := range []struct {
		code int
		want Reason
	}{{2, ReasonUndecryptable}, {3, ReasonUnknownKey}} {
		// accepts answers with the code unless the event came under one of the keys.
		accepts := func(fps ...string) func(int, *http.Request, []byte) (*http.Response, error) {
			return func(_ int, r *http.Request, _ []byte) (*http.Response, error) {
				if slices.Contains(fps, r.Header.Get("Sec-Fingerprint")) {
					return reply(200, ""), nil
				}
				return reply(400, code(tt.code)), nil
			}
		}
		// site prepares keys: the second one comes with the refresh.
		site := func(t *testing.T, keys *fakeKeys) {
			s := keys.Site("s1")
			k1, _ := s.Keyring.Key([]byte("k1"))
			k2 := testKey(t, "k2", time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
			keys.refresh = func(string) error {
				keys.change("s1", func(s *keysync.Site) { s.Keyring = testRing(t, k1, k2) })
				return nil
			}
		}
		t.Run(fmt.Sprintf("code %d: opened, sealed under the new key, delivered", tt.code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				site(t, keys)
				log := newHubLog()
				k := &diary{answer: accepts("k2")}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				d := log.store(newEdge(keys).event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				rep := mustReport(t, log, d, stateDelivered, ReasonAccepted)
				if rep.at.Sub(d.Stored) > time.Millisecond || rep.Attempts != 2 {
					t.Errorf("took %s and %d attempts; the second key is tried at once", rep.at.Sub(d.Stored), rep.Attempts)
				}
				last := k.all()[1]
				plain, err := keys.Site("s1").Keyring.Open(nil, envelope.Triple{IV: []byte(last.iv), Fingerprint: []byte(last.fp), Message: []byte(last.body)})
				if err != nil || string(plain) != string(payload(1)) {
					t.Errorf("re-wrapped as %q, %v", plain, err)
				}
			})
		})
		t.Run(fmt.Sprintf("code %d: refused under both keys is a dead letter", tt.code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				site(t, keys)
				log, e := newHubLog(), newEdge(keys)
				n := 0
				k := &diary{answer: func(_ int, r *http.Request, _ []byte) (*http.Response, error) {
					if n++; n == 1 {
						return reply(200, ""), nil // the Kitchen is known to decrypt
					}
					return reply(400, code(tt.code)), nil
				}}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				log.store(e.event(t, "s1"))
				waitSettled(t, log)
				d := log.store(e.event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				rep := mustReport(t, log, d, stateFailed, tt.want)
				if rep.Attempts != 2 || rep.Status != 400 {
					t.Errorf("%d attempts, status %d", rep.Attempts, rep.Status)
				}
				if posts := k.all(); posts[1].fp == posts[2].fp {
					t.Errorf("both attempts under %s", posts[1].fp)
				}
			})
		})
		t.Run(fmt.Sprintf("code %d: no other key is a dead letter after the refresh", tt.code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{answer: func(n int, _ *http.Request, _ []byte) (*http.Response, error) {
					if n == 0 {
						return reply(200, ""), nil
					}
					return reply(400, code(tt.code)), nil
				}}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				log.store(e.event(t, "s1"))
				waitSettled(t, log)
				d := log.store(e.event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				if rep := mustReport(t, log, d, stateFailed, tt.want); rep.Attempts != 1 {
					t.Errorf("%d attempts", rep.Attempts)
				}
				if keys.refreshes.Load() != 1 {
					t.Errorf("%d refreshes", keys.refreshes.Load())
				}
			})
		})
		t.Run(fmt.Sprintf("code %d: the Portal is away, so later", tt.code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				site(t, keys)
				log := newHubLog()
				back, from := keys.refresh, time.Now().Add(time.Minute)
				keys.refresh = func(s string) error {
					if time.Now().Before(from) {
						return errors.New("portal away")
					}
					return back(s)
				}
				k := &diary{answer: accepts("k2")}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				d := log.store(newEdge(keys).event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				mustReport(t, log, d, stateDelivered, ReasonAccepted)
			})
		})
	}
}

// A Kitchen that never decrypted anything has another profile: its orders are not thrown
// away one by one.
func TestWrongProfilePausesTheSite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		fixed := time.Now().Add(3 * time.Minute)
		k := &diary{answer: func(int, *http.Request, []byte) (*http.Response, error) {
			if time.Now().Before(fixed) {
				return reply(400, `{"errorCode":2}`), nil
			}
			return reply(200, ""), nil
		}}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		a, b := log.store(e.event(t, "s1")), log.store(e.event(t, "s1"))
		waitSettled(t, log)
		mustReport(t, log, a, stateDelivered, ReasonAccepted)
		mustReport(t, log, b, stateDelivered, ReasonAccepted)
		if n := r.logs.alarms()[alarmProfile]; n < 2 || n > 4 {
			t.Errorf("%d alarms in three minutes", n)
		}

		k.answer = always(400, `{"errorCode":2}`)
		c := log.store(e.event(t, "s1"))
		waitSettled(t, log)
		r.end(t)
		if rep := mustReport(t, log, c, stateFailed, ReasonUndecryptable); rep.at.Sub(c.Stored) > time.Millisecond {
			t.Errorf("after the first success a dead letter took %s", rep.at.Sub(c.Stored))
		}
	})
}

func TestKitchenWantsEncryptionAfterAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		on := keys.Site("s1")
		keys.change("s1", func(s *keysync.Site) { s.Encryption, s.Keyring = false, testRing(t) })
		keys.refresh = func(string) error {
			keys.change("s1", func(s *keysync.Site) { s.Encryption, s.Keyring = true, on.Keyring })
			return nil
		}
		log := newHubLog()
		k := &diary{answer: func(_ int, r *http.Request, _ []byte) (*http.Response, error) {
			if r.Header.Get("Sec-Iv") == "" {
				return reply(400, `{"errorCode":1}`), nil
			}
			return reply(200, ""), nil
		}}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		d := log.store(newEdge(keys).event(t, "s1", plainSealed(t, keys)))
		waitSettled(t, log)
		r.end(t)
		mustReport(t, log, d, stateDelivered, ReasonAccepted)
		posts := k.all()
		if len(posts) != 2 || posts[0].body != string(payload(1)) || posts[0].fp != "" || posts[1].fp != "k1" {
			t.Errorf("POSTs: %+v", posts)
		}
	})
}

// Nothing to post with: the keys may come back within the deadline.
func TestWaitsForKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		fetched := keys.Site("s1").Fetched
		keys.change("s1", func(s *keysync.Site) { s.Encryption, s.Fetched = false, time.Time{} })
		log, e := newHubLog(), newEdge(keys)
		k := &diary{}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		a := log.store(e.event(t, "s1", plainSealed(t, keys), within(30*time.Second)))
		b := log.store(e.event(t, "s1", plainSealed(t, keys)))
		time.Sleep(2 * time.Minute)
		if keys.refreshes.Load() < 5 {
			t.Errorf("%d refreshes while waiting", keys.refreshes.Load())
		}
		keys.change("s1", func(s *keysync.Site) { s.Fetched = fetched })
		waitSettled(t, log)
		r.end(t)
		if rep := mustReport(t, log, a, stateFailed, ReasonExpired); rep.Attempts != 0 {
			t.Errorf("%d attempts", rep.Attempts)
		}
		mustReport(t, log, b, stateDelivered, ReasonAccepted)
		if r.logs.alarms()[alarmKeys] == 0 {
			t.Error("no alarm")
		}
	})
}

// I7: what no edge sent is neither delivered nor reported, and the next event is.
func TestQuarantine(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(t *testing.T, keys *fakeKeys, e *edge, d *broker.Delivery)
		want  cause
	}{
		{"headers malformed", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Err = broker.ErrMalformed }, causeMalformed},
		{"headers malformed, and nothing read", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) {
			d.Err, d.Event = broker.ErrMalformed, broker.Event{}
		}, causeMalformed},
		{"message altered", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) {
			d.Event.Triple.Message = append([]byte("A"), d.Event.Triple.Message[1:]...)
			d.Event.Triple.Message[0] ^= 1
		}, causeTag},
		{"deadline altered", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Event.Deadline++ }, causeTag},
		{"deadline altered to the past", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Event.Deadline = 1 }, causeTag},
		{"sequence altered", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Event.Seq = 1 << 63 }, causeTag},
		{"kind altered", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Kind, d.Event.Kind = "alert", "alert" }, causeTag},
		{"moved from another site", func(t *testing.T, _ *fakeKeys, e *edge, d *broker.Delivery) {
			d.Event = e.event(t, "s2")
			d.Event.Site = "s1"
		}, causeTag},
		{"binding key unknown", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Event.Bind = "b9" }, causeUnknownBind},
		{"no tag", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Event.Tag = "" }, causeTag},
		{"site unknown", func(_ *testing.T, _ *fakeKeys, _ *edge, d *broker.Delivery) { d.Site, d.Event.Site = "s9", "s9" }, causeUnknownSite},
		{"reserved kind, and no run", func(t *testing.T, keys *fakeKeys, e *edge, d *broker.Delivery) {
			d.Kind = broker.KindExpired
			d.Event = e.event(t, "s1", ofKind(broker.KindExpired))
		}, causeRun},
		{"one event for several numbers", func(t *testing.T, keys *fakeKeys, e *edge, d *broker.Delivery) {
			e.seq["s1"]++
			d.Event = e.event(t, "s1", func(ev *broker.Event) { ev.From-- })
		}, causeRun},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1", "s2")
				log, e := newHubLog(), newEdge(keys)
				hub := log.connect()
				// Stored before the start, so that it can be spoiled at rest.
				bad := log.store(e.event(t, "s1"))
				tt.spoil(t, keys, e, bad)
				good := log.store(e.event(t, "s1"))
				k := &diary{}
				r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
				waitSettled(t, log)
				r.end(t)
				letter := log.letterOn(bad)
				if letter == nil || letter.Reason != string(ReasonQuarantine) {
					t.Fatalf("dead letter: %+v", letter)
				}
				mustReport(t, log, good, stateDelivered, ReasonAccepted)
				if n := len(log.reports); n != 1 {
					t.Errorf("%d reports; one on what does not verify would be a lie", n)
				}
				for _, p := range k.all() {
					if uint64(p.seq) != good.Event.Seq {
						t.Errorf("seq %d was posted", p.seq)
					}
				}
				if n := r.counted(t, "kb_router_quarantined_total", "cause", string(tt.want)); n != 1 {
					t.Errorf("quarantined for %s: %v", tt.want, n)
				}
				if r.logs.alarms()[alarmQuarantine] != 1 {
					t.Errorf("alarms: %v", r.logs.alarms())
				}
			})
		})
	}

	t.Run("acknowledged after the dead letter is stored", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			hub := log.connect()
			var full atomic.Bool
			full.Store(true)
			hub.onLetter = func(context.Context, broker.DeadLetter) error {
				if full.Load() {
					return broker.ErrUnknown
				}
				return nil
			}
			bad := log.store(e.event(t, "s1"))
			bad.Event.Tag = "x"
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{}})
			time.Sleep(time.Minute)
			if log.acks(bad) != 0 {
				t.Error("acknowledged without a dead letter")
			}
			full.Store(false)
			waitSettled(t, log)
			r.end(t)
		})
	})
}

// I8: a dead letter that the hub certainly refuses is dropped, alarmed and counted, and the
// report is stored all the same. It stops neither its Kitchen nor another.
func TestRefusedDeadLetters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		hub := log.connect()
		var refuse atomic.Bool
		refuse.Store(true)
		hub.onLetter = func(context.Context, broker.DeadLetter) error {
			if refuse.Load() {
				return fmt.Errorf("%w: maximum bytes exceeded", broker.ErrRejected)
			}
			return nil
		}
		k := &diary{answer: func(_ int, r *http.Request, _ []byte) (*http.Response, error) {
			if r.Header.Get("Kb-Seq") == "21" {
				return reply(200, ""), nil
			}
			return reply(422, ""), nil
		}}
		r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
		began := time.Now()
		var bad []*broker.Delivery
		for range 20 {
			bad = append(bad, log.store(e.event(t, "s1")))
		}
		good := log.store(e.event(t, "s1"))
		waitSettled(t, log)
		if took := time.Since(began); took < letterPatience || took > 2*letterPatience {
			t.Errorf("the lane went on after %s; want a try for %s, once", took, letterPatience)
		}
		mustReport(t, log, good, stateDelivered, ReasonAccepted)
		for _, d := range bad {
			if rep := log.reportOn(t, d); rep == nil || rep.Reason != string(ReasonRefused) {
				t.Fatalf("report on seq %d: %+v", d.Event.Seq, rep)
			}
		}
		if n := r.counted(t, "kb_router_dropped_dead_letters_total", "cause", "refused"); n != 20 {
			t.Errorf("%v counted, want 20", n)
		}
		if r.logs.alarms()[alarmDropped] != 1 {
			t.Errorf("alarms: %v", r.logs.alarms())
		}

		refuse.Store(false)
		mustStore := log.store(e.event(t, "s1"))
		waitSettled(t, log)
		r.end(t)
		mustReport(t, log, mustStore, stateFailed, ReasonRefused)
	})
}

// A hub that is away, or whose word is missing, refuses nothing: its dead letter waits.
func TestDeadLettersWaitForTheHub(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
	}{{"away", broker.ErrAway}, {"away, which is certain too", errors.Join(broker.ErrRejected, broker.ErrAway)}, {"unknown", broker.ErrUnknown}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log := newHubLog()
				hub := log.connect()
				back := time.Now().Add(10 * time.Minute)
				hub.onLetter = func(context.Context, broker.DeadLetter) error {
					if time.Now().Before(back) {
						return tt.err
					}
					return nil
				}
				r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{answer: always(422, "")}})
				d := log.store(newEdge(keys).event(t, "s1"))
				waitSettled(t, log)
				r.end(t)
				mustReport(t, log, d, stateFailed, ReasonRefused)
			})
		})
	}
	t.Run("and then refuses", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log := newHubLog()
			hub := log.connect()
			tries := 0
			hub.onLetter = func(ctx context.Context, _ broker.DeadLetter) error {
				if tries++; tries == 1 {
					<-ctx.Done() // as the broker after an attempt without an answer: only a yes could end it
					return broker.ErrUnknown
				}
				return broker.ErrRejected
			}
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": &diary{answer: always(422, "")}})
			d := log.store(newEdge(keys).event(t, "s1"))
			waitSettled(t, log)
			r.end(t)
			if rep := log.reportOn(t, d); rep == nil || rep.at.Sub(d.Stored) > 2*(letterTry+letterPatience) {
				t.Errorf("report: %+v", rep)
			}
		})
	})
}

// Garbage does not fill DLQ: a sample of it is kept, all of it is acknowledged and counted.
func TestQuarantineKeepsSamples(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log, e := newHubLog(), newEdge(keys)
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": &diary{}})
		for range 100 {
			log.store(e.event(t, "s1", func(ev *broker.Event) { ev.Bind = "b9" }))
		}
		waitSettled(t, log)   // so that they have their part of all samples
		for i := range 1000 { // names that somebody invents
			ev := e.event(t, "s1")
			ev.Site = fmt.Sprintf("junk-%d", i)
			log.store(ev)
		}
		waitSettled(t, log)
		if n := len(log.letters); n != samplesAll {
			t.Errorf("%d dead letters, want %d", n, samplesAll)
		}
		ofSite := 0
		for _, letter := range log.letters {
			if letter.Delivery.Site == "s1" {
				ofSite++
			}
		}
		if ofSite != samplesEach {
			t.Errorf("%d dead letters of one site, edge and cause, want %d", ofSite, samplesEach)
		}
		if n := r.counted(t, "kb_router_quarantined_total", "cause", "unknown-bind"); n != 100 {
			t.Errorf("%v of 100 counted", n)
		}
		if n := r.counted(t, "kb_router_dropped_dead_letters_total", "cause", "sampled"); n != 1100-samplesAll {
			t.Errorf("%v dropped are counted, want %d", n, 1100-samplesAll)
		}
		time.Sleep(time.Minute)
		later := log.store(e.event(t, "s1", func(ev *broker.Event) { ev.Bind = "b9" }))
		waitSettled(t, log)
		r.end(t)
		if log.letterOn(later) == nil {
			t.Error("no sample in the next minute")
		}
	})
}

// I7: an event that was taken up before and lies at another place of the stream is
// neither delivered nor reported again, whatever became of the first.
func TestReplay(t *testing.T) {
	tests := []struct {
		name   string
		answer func(int, *http.Request, []byte) (*http.Response, error)
		life   time.Duration
		wait   time.Duration // between the event and its copy
		want   Reason
	}{
		{"of a delivered event", always(200, ""), time.Minute, time.Second, ReasonAccepted},
		{"of a refused one", always(422, ""), time.Minute, time.Second, ReasonRefused},
		{"of an expired one", always(503, ""), time.Minute, 2 * time.Minute, ReasonExpired},
		{"of one in flight", func(int, *http.Request, []byte) (*http.Response, error) {
			time.Sleep(2 * time.Second)
			return reply(200, ""), nil
		}, time.Minute, time.Second, ReasonAccepted},
		{"of a queued one, which then expires", always(503, ""), time.Minute, time.Second, ReasonExpired},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				keys := testKeys(t, "s1")
				log, e := newHubLog(), newEdge(keys)
				k := &diary{answer: tt.answer}
				r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
				log.store(e.event(t, "s1", within(tt.life)))
				first := log.store(e.event(t, "s1", within(tt.life)))
				time.Sleep(tt.wait)
				last := log.store(e.event(t, "s1", within(tt.life)))
				again := log.store(first.Event)
				waitSettled(t, log)
				r.end(t)
				rep := log.reportOn(t, first) // it complains about two
				if rep == nil || rep.Reason != string(tt.want) || rep.StreamSeq != first.StreamSeq {
					t.Fatalf("report: %+v", rep)
				}
				if log.reportOn(t, last) == nil {
					t.Error("the event after it has no report")
				}
				if letter := log.letterOn(again); letter == nil || letter.Reason != string(ReasonQuarantine) || log.acks(again) != 1 {
					t.Errorf("the replay: acknowledged %d times, dead letter %+v", log.acks(again), letter)
				}
				if n := r.counted(t, "kb_router_quarantined_total", "cause", "replay"); n != 1 {
					t.Errorf("%v counted", n)
				}
				posts := k.seqs()
				if !slices.IsSorted(posts) {
					t.Errorf("POSTs %v: the old state of an order came after the new", posts)
				}
			})
		})
	}

	t.Run("of what an earlier owner reported", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			hub := log.connect()
			hub.loseAck = func(*broker.Delivery) bool { return true }
			k := &diary{}
			r := start(t, hub, keys, map[string]http.RoundTripper{"s1": k})
			first := log.store(e.event(t, "s1"))
			time.Sleep(time.Second)
			r.kill(t)
			r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
			waitSettled(t, log)
			again := log.store(first.Event)
			waitSettled(t, log)
			r.end(t)
			if log.letterOn(again) == nil || len(k.all()) != 1 {
				t.Errorf("%d POSTs, dead letter: %t", len(k.all()), log.letterOn(again) != nil)
			}
			if n := r.counted(t, "kb_router_skipped_total", "cause", "reported"); n != 1 {
				t.Errorf("%v redeliveries of what is reported, want 1", n)
			}
		})
	})
	t.Run("of one that an earlier owner settled, known by its report alone", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			slow := &diary{answer: func(int, *http.Request, []byte) (*http.Response, error) {
				time.Sleep(2 * time.Second)
				return reply(200, ""), nil
			}}
			r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": slow})
			first := log.store(e.event(t, "s1"))
			time.Sleep(time.Second)
			log.store(e.event(t, "s1")) // the oldest unacknowledged, stored before the first was reported
			time.Sleep(1500 * time.Millisecond)
			r.kill(t)
			k := &diary{}
			r = start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
			again := log.store(first.Event)
			waitSettled(t, log)
			r.end(t)
			if log.acks(first) != 1 || log.letterOn(again) == nil || !slices.Equal(k.seqs(), []int{2}) {
				t.Errorf("first acknowledged %d times, replay with a dead letter: %t, POSTs %v", log.acks(first), log.letterOn(again) != nil, k.seqs())
			}
		})
	})
	t.Run("not: a number in another epoch, of another edge or site", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1", "s2")
			log, e := newHubLog(), newEdge(keys)
			k := &diary{}
			r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k, "s2": k})
			log.store(e.event(t, "s1"))
			log.store(e.event(t, "s2"))
			for _, change := range []eventOption{func(e *broker.Event) { e.Epoch = "ep2" }, func(e *broker.Event) { e.Edge = "e2" }} {
				e.seq["s1"] = 0
				log.store(e.event(t, "s1", change))
			}
			waitSettled(t, log)
			r.end(t)
			if n := len(k.all()); n != 4 {
				t.Errorf("%d POSTs of 4 events", n)
			}
		})
	})
	t.Run("not: what only claims to be another", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			keys := testKeys(t, "s1")
			log, e := newHubLog(), newEdge(keys)
			r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": &diary{}})
			real := e.event(t, "s1")
			forged := real
			forged.Tag = "x"
			log.store(forged)
			d := log.store(real)
			waitSettled(t, log)
			r.end(t)
			mustReport(t, log, d, stateDelivered, ReasonAccepted)
		})
	})
}

func TestSiteWithoutAKitchen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1", "s2")
		log, e := newHubLog(), newEdge(keys)
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": &diary{}})
		a, b := log.store(e.event(t, "s2")), log.store(e.event(t, "s1"))
		waitSettled(t, log)
		tenure := r.parts[0].tenure.Load()
		tenure.mu.Lock()
		lanes := sortedKeys(tenure.lanes)
		tenure.mu.Unlock()
		r.end(t)
		if rep := mustReport(t, log, a, stateFailed, ReasonNoRoute); rep.Endpoint != "-" || rep.Attempts != 0 {
			t.Errorf("report: endpoint %q, attempts %d", rep.Endpoint, rep.Attempts)
		}
		mustReport(t, log, b, stateDelivered, ReasonAccepted)
		if !slices.Equal(lanes, []string{"s1"}) {
			t.Errorf("lanes kept: %v; of a site that is not configured nothing may stay", lanes)
		}
	})
}

// A lane costs a goroutine only while it has work.
func TestIdleLanesCostNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sites []string
		kitchens := make(map[string]http.RoundTripper)
		for i := range 200 {
			site := fmt.Sprintf("s%d", i)
			sites = append(sites, site)
			kitchens[site] = &diary{}
		}
		keys := testKeys(t, sites...)
		log, e := newHubLog(), newEdge(keys)
		r := start(t, log.connect(), keys, kitchens)
		synctest.Wait()
		before := runtime.NumGoroutine()
		for _, s := range sites {
			log.store(e.event(t, s))
		}
		waitSettled(t, log)
		synctest.Wait()
		if after := runtime.NumGoroutine(); after > before {
			t.Errorf("%d goroutines after 200 sites had an event, %d before", after, before)
		}
		r.end(t)
	})
}

func TestLogsSayWhenAKitchenFailsAndWorksAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys := testKeys(t, "s1")
		log := newHubLog()
		k := &diary{answer: first(always(503, ""), always(503, ""), always(503, ""))}
		r := start(t, log.connect(), keys, map[string]http.RoundTripper{"s1": k})
		log.store(newEdge(keys).event(t, "s1"))
		waitSettled(t, log)
		r.end(t)
		if !r.logs.has(slog.LevelWarn, "kitchen fails; attempts go on until the deadline") || !r.logs.has(slog.LevelInfo, "kitchen answers again") {
			t.Error("neither failure nor recovery is logged")
		}
		if a := r.logs.alarms(); len(a) != 0 {
			t.Errorf("a 503 is no alarm: %v", a)
		}
	})
}
