package pos

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// edge is a fake: it notes what it is sent and answers as the test says. As a
// RoundTripper it needs no sockets, so that synctest can hold its clock.
type edge struct {
	// answer gets the request and how many came before it.
	answer func(n int, r seen) reply

	mu   sync.Mutex
	seen []seen
}

type seen struct {
	method, path string
	header       http.Header
	body         []byte
	at           time.Time
	ctx          context.Context
}

type reply struct {
	status int
	header http.Header
	body   string
	err    error // in place of an answer
	hang   bool
}

func (e *edge) note(r *http.Request) reply {
	s := seen{method: r.Method, path: r.URL.Path, header: r.Header.Clone(), at: time.Now(), ctx: r.Context()}
	if r.Body != nil {
		s.body, _ = io.ReadAll(r.Body)
		r.Body.Close()
	}
	e.mu.Lock()
	n := len(e.seen)
	e.seen = append(e.seen, s)
	e.mu.Unlock()
	return e.answer(n, s)
}

func (e *edge) RoundTrip(r *http.Request) (*http.Response, error) {
	a := e.note(r)
	if a.hang {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	if a.err != nil {
		return nil, a.err
	}
	w := httptest.NewRecorder()
	maps.Copy(w.Header(), a.header)
	w.WriteHeader(a.status)
	_, _ = w.WriteString(a.body)
	return w.Result(), nil
}

func (e *edge) all() []seen {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.seen)
}

func id(s string) http.Header { return http.Header{"Kb-Id": {s}} }

func at(s string) http.Header { return http.Header{"Kb-Id": {s}, "Location": {"/messages/" + s}} }

var (
	delivered = reply{status: 201, header: id("m1"), body: `{"status":"queued"}`}
	accepted  = reply{status: 202, header: at("m1"), body: `{"id":"m1","state":"accepted"}`}
	failed    = reply{status: 502, header: id("m1"), body: `{"reason":"refused","kitchen_status":422,"state":"failed"}`}
	notStored = reply{status: 503, header: id("m1"), body: `{"reason":"hub-away","outcome":"not-stored"}`}
	silent    = reply{status: 503, header: at("m1"), body: `{"reason":"hub-silent","outcome":"unknown"}`}
	lost      = reply{err: errors.New("connection reset")}
	refused   = reply{err: &net.OpError{Op: "dial", Err: errors.New("connection refused")}}
	mismatch  = reply{status: 400, body: `{"errorCode":3,"message":"Security credential mismatch"}`}
	otherBody = reply{status: 422, header: id("m1"), body: `{"reason":"other-payload"}`}
)

func script(rs ...reply) func(int, seen) reply {
	return func(n int, _ seen) reply { return rs[min(n, len(rs)-1)] }
}

var quick = vendorcrypto.Profile{Cipher: "a256gcm", Iterations: 2}

func oneKey(string) (bool, []vendorcrypto.Key) {
	return true, []vendorcrypto.Key{{Fingerprint: "fp", Passphrase: "phrase"}}
}

func driver(t *testing.T, cfg Config) *Driver {
	t.Helper()
	cfg.BaseURL = cmp.Or(cfg.BaseURL, "http://edge.test")
	cfg.Site = cmp.Or(cfg.Site, "s1")
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func run(t *testing.T, d *Driver) {
	t.Helper()
	if err := d.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// Each row sends one message; what the edge does to it is the row's script.
func TestOneMessageEndsAsTheAnswersSay(t *testing.T) {
	for _, row := range []struct {
		name     string
		keys     bool
		mode     Mode
		script   []reply
		state    State
		attempts int
		doubtful bool
	}{
		{"the Kitchen's answer", true, Plain, []reply{delivered}, Delivered, 1, false},
		{"a 409 counted as delivered", true, Plain, []reply{{status: 200, header: id("m1"), body: `{"id":"m1","state":"delivered","kitchen_status":409}`}}, Delivered, 1, false},
		{"202", true, Plain, []reply{accepted}, Pending, 1, false},
		{"202 as a plain 200", true, Plain, []reply{{status: 200, header: at("m1"), body: accepted.body}}, Pending, 1, false},
		{"the Kitchen's own 202", true, Plain, []reply{{status: 202, header: id("m1"), body: `{}`}}, Delivered, 1, false},
		{"reported as failed", true, Plain, []reply{failed}, Failed, 1, false},
		{"a 4xx", true, Plain, []reply{{status: 413}}, Refused, 1, false},
		{"a redirect is not followed", true, Plain, []reply{{status: 307, header: http.Header{"Location": {"/elsewhere"}}}, delivered}, Refused, 1, false},
		{"not stored, then accepted", true, Plain, []reply{notStored, refused, {status: 429}, accepted}, Pending, 4, false},
		{"not stored, then accepted, without a key", false, Plain, []reply{notStored, refused, {status: 429}, accepted}, Pending, 4, false},
		{"never stored", true, Plain, []reply{notStored}, Refused, 5, false},
		{"keys not fetched says no outcome", true, Plain, []reply{{status: 503, body: `{"reason":"keys-not-fetched"}`}}, Refused, 5, false},
		{"no connection at all", true, Plain, []reply{refused}, Refused, 5, false},
		{"answer lost, told at the second attempt", true, Plain, []reply{lost, delivered}, Delivered, 2, true},
		{"answer lost, no key: not sent again", false, Plain, []reply{lost, delivered}, Unknown, 1, true},
		{"answer lost, no key, encrypted: the same bytes again", false, Encrypted, []reply{lost, delivered}, Delivered, 2, true},
		{"outcome unknown, no key", false, Plain, []reply{silent, delivered}, Unknown, 1, true},
		{"outcome unknown, then the first answer", true, Plain, []reply{silent, silent, accepted}, Pending, 3, true},
		{"time-out", true, Plain, []reply{{hang: true}, delivered}, Delivered, 2, true},
		{"time-outs only", true, Plain, []reply{{hang: true}}, Unknown, 5, true},
		{"in doubt, then refused: still in doubt", true, Plain, []reply{lost, notStored}, Unknown, 5, true},
		{"in doubt, then a 4xx: still in doubt", true, Plain, []reply{lost, otherBody}, Unknown, 2, true},
		{"a 502 of a proxy", true, Plain, []reply{{status: 502, body: "bad gateway"}, delivered}, Delivered, 2, true},
		{"mismatch, sealed again once", true, Encrypted, []reply{mismatch, delivered}, Delivered, 2, false},
		{"mismatch, sealed again once, without a key", false, Encrypted, []reply{mismatch, delivered}, Delivered, 2, false},
		{"mismatch twice", true, Encrypted, []reply{mismatch, mismatch, delivered}, Refused, 2, false},
		{"mismatch in doubt, without a key: a fresh IV would be another message", false, Encrypted, []reply{lost, mismatch, delivered}, Unknown, 2, true},
		{"mismatch in doubt, with a key", true, Encrypted, []reply{lost, mismatch, delivered}, Delivered, 3, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := &edge{answer: func(n int, r seen) reply {
					if r.method == http.MethodGet {
						return reply{status: 200, body: `{"state":"unknown"}`}
					}
					return script(row.script...)(n, r)
				}}
				d := driver(t, Config{Transport: e, Count: 1, Concurrency: 1, IdempotencyKeys: row.keys, Mode: row.mode, Profile: quick, Keys: oneKey, Poll: time.Hour})
				run(t, d)
				l := d.Ledger()
				if len(l) != 1 {
					t.Fatalf("%d entries", len(l))
				}
				got := l[0]
				if got.State != row.state || got.Attempts != row.attempts || got.Doubtful != row.doubtful || got.IDMoved {
					t.Errorf("%+v", got)
				}
				if got.State.Accepted() && got.ID != "m1" {
					t.Errorf("id %q", got.ID)
				}
				tally := d.Tally()
				counts := map[State]uint64{Delivered: tally.Delivered, Failed: tally.Failed, Pending: tally.Pending, Refused: tally.Refused, Unknown: tally.Unknown, Sending: tally.Sending}
				for state, n := range counts {
					if n != map[bool]uint64{true: 1}[state == row.state] {
						t.Errorf("%d %s in %+v", n, state, tally)
					}
				}
				if (tally.Accepted == 1) != row.state.Accepted() || tally.Begun != 1 || tally.Attempts != uint64(row.attempts) {
					t.Errorf("%+v", tally)
				}
				// What went out.
				all := e.all()
				if len(all) != row.attempts {
					t.Fatalf("%d requests for %d attempts", len(all), row.attempts)
				}
				ivs := map[string]bool{}
				resealed := row.keys || slices.ContainsFunc(row.script, func(r reply) bool { return r.body == mismatch.body }) && !row.doubtful
				for _, s := range all {
					if key := s.header.Get("Idempotency-Key"); (key != "") != row.keys || key != got.Key {
						t.Errorf("key %q, entry %q", key, got.Key)
					}
					ivs[s.header.Get("Sec-Iv")] = true
				}
				if want := map[bool]int{true: len(all), false: 1}[row.mode == Encrypted && resealed]; len(ivs) != want {
					t.Errorf("%d IVs in %d attempts, want %d", len(ivs), len(all), want)
				}
			})
		})
	}
}

func TestRequestsSayWhatTheConfigSays(t *testing.T) {
	for _, row := range []struct {
		name string
		cfg  Config
		path string // of an order
		want map[string]string
	}{
		{"the least", Config{}, "/order", map[string]string{
			"Content-Type": "application/json", "Authorization": "", "Idempotency-Key": "", "Prefer": "", "Kb-Within": "", "Sec-Iv": "", "Sec-Fingerprint": ""}},
		{"everything", Config{BaseURL: "http://edge.test/base/", SitePath: true, Token: "tok", Wait: 1500 * time.Millisecond, Within: 30 * time.Second}, "/base/sites/s1/order",
			map[string]string{"Authorization": "Bearer tok", "Prefer": "wait=2", "Kb-Within": "30"}},
		{"no waiting", Config{Wait: -1}, "/order", map[string]string{"Prefer": "wait=0"}},
		{"encrypted, and the Portal says no", Config{Mode: Encrypted, Profile: quick, Keys: func(string) (bool, []vendorcrypto.Key) { return false, nil }}, "/order",
			map[string]string{"Sec-Iv": "", "Sec-Fingerprint": ""}},
		{"encrypted", Config{Mode: Encrypted, Profile: quick, Keys: oneKey}, "/order", map[string]string{"Sec-Fingerprint": "fp"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := &edge{answer: script(delivered)}
			row.cfg.Transport, row.cfg.Count, row.cfg.Concurrency = e, 20, 1
			d := driver(t, row.cfg)
			run(t, d)
			orders := 0
			for i, s := range e.all() {
				entry := d.Ledger()[i]
				if s.method != http.MethodPost || s.path != strings.TrimSuffix(row.path, "order")+entry.Kind {
					t.Errorf("%s %s", s.method, s.path)
				}
				if entry.Kind == "order" {
					orders++
				}
				for name, want := range row.want {
					if got := s.header.Get(name); got != want {
						t.Errorf("%s: %q, want %q", name, got, want)
					}
				}
				if entry.TripleHash != vendorcrypto.TripleHash(s.header.Get("Sec-Iv"), s.header.Get("Sec-Fingerprint"), s.body) || entry.Bytes != len(s.body) {
					t.Error("the ledger's hash is not of what was sent")
				}
				if s.header.Get("Sec-Iv") == "" && entry.PayloadHash != vendorcrypto.PayloadHash(s.body) {
					t.Error("the ledger's payload hash is not of the payload")
				}
			}
			if orders == 0 {
				t.Error("no order was sent")
			}
		})
	}
}

func TestWithoutAValidKeyNothingIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &edge{answer: script(delivered)}
		d := driver(t, Config{Transport: e, Count: 1, Mode: Encrypted, Profile: quick, Keys: func(string) (bool, []vendorcrypto.Key) {
			return true, []vendorcrypto.Key{{Fingerprint: "old", Passphrase: "p", ValidUntil: time.Now().Add(-time.Second)}}
		}})
		run(t, d)
		if l := d.Ledger(); l[0].State != Refused || !strings.Contains(l[0].Err, "valid") || len(e.all()) != 0 {
			t.Errorf("%+v, %d requests", l[0], len(e.all()))
		}
	})
}

func TestBetweenAttemptsItWaitsAsToldAndNoLongerThanItsBound(t *testing.T) {
	for _, row := range []struct {
		name     string
		after    func() string
		min, max time.Duration // of the first pause
	}{
		{"by itself", func() string { return "" }, 0, 100 * time.Millisecond},
		{"in seconds", func() string { return "2" }, 2 * time.Second, 2 * time.Second},
		{"as a date", func() string { return time.Now().Add(2 * time.Second).UTC().Format(http.TimeFormat) }, 2 * time.Second, 2 * time.Second},
		{"too long", func() string { return "3600" }, 3 * time.Second, 3 * time.Second},
		{"nonsense", func() string { return "soon" }, 0, 100 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := &edge{answer: func(int, seen) reply {
					return reply{status: 503, header: http.Header{"Retry-After": {row.after()}}}
				}}
				d := driver(t, Config{Transport: e, Count: 1, IdempotencyKeys: true, MaxBackoff: 3 * time.Second, Attempts: 40})
				run(t, d)
				all := e.all()
				if len(all) != 40 {
					t.Fatalf("%d attempts", len(all))
				}
				if pause := all[1].at.Sub(all[0].at); pause < row.min || pause > row.max {
					t.Errorf("waited %v, want %v to %v", pause, row.min, row.max)
				}
				for i := range all[1:] {
					if pause := all[i+1].at.Sub(all[i].at); pause > 3*time.Second {
						t.Errorf("waited %v before attempt %d", pause, i+2)
					}
				}
			})
		})
	}
}

// A message's versions leave in order, each after the answer to the one before, however
// many are under way.
func TestUpdatesFollowTheAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type spanOf struct{ sent, answered time.Time }
		var mu sync.Mutex
		spans := map[string][]spanOf{}
		versions := map[string][]int{}
		e := &edge{answer: func(n int, r seen) reply {
			var o struct {
				ID      string `json:"_id"`
				Version int    `json:"version"`
			}
			if err := json.Unmarshal(r.body, &o); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Duration(n%7) * 10 * time.Millisecond)
			mu.Lock()
			defer mu.Unlock()
			spans[o.ID] = append(spans[o.ID], spanOf{r.at, time.Now()})
			versions[o.ID] = append(versions[o.ID], o.Version)
			return []reply{delivered, accepted, failed}[n%3]
		}}
		d := driver(t, Config{Transport: e, Count: 400, Concurrency: 16, Poll: time.Hour})
		run(t, d)
		updates := 0
		for id, vs := range versions {
			updates += len(vs) - 1
			for i, v := range vs {
				if v != i+1 {
					t.Errorf("%s: versions %v", id, vs)
				}
				if i > 0 && spans[id][i].sent.Before(spans[id][i-1].answered) {
					t.Errorf("%s: version %d left before the answer to %d", id, v, v-1)
				}
			}
		}
		if updates < 40 {
			t.Errorf("only %d updates in 400 messages", updates)
		}
	})
}

func TestAfterARefusalOrADoubtTheOrderIsLeftAlone(t *testing.T) {
	for _, r := range []reply{{status: 413}, lost} {
		e := &edge{answer: script(r)}
		d := driver(t, Config{Transport: e, Count: 200})
		run(t, d)
		for _, entry := range d.Ledger() {
			if entry.Version != 1 {
				t.Fatalf("an update was sent: %+v", entry)
			}
		}
	}
}

func TestWhatIsPendingIsAskedAboutUntilItIsSettled(t *testing.T) {
	for _, row := range []struct {
		name   string
		first  reply
		polls  []reply
		state  State
		asked  int
		pass   func(Entry) bool
		failed bool // Drain says so
	}{
		{name: "delivered", first: accepted, polls: []reply{{status: 200, body: `{"state":"pending"}`}, {status: 200, body: `{"state":"accepted"}`}, {status: 200, body: `{"state":"delivered","kitchen_status":201}`}},
			state: Delivered, asked: 3, pass: func(e Entry) bool { return e.Kitchen == 201 && e.Settled.Sub(e.Answered) == 3*time.Second }},
		{name: "failed", first: accepted, polls: []reply{{status: 200, body: `{"state":"failed","reason":"expired"}`}},
			state: Failed, asked: 1, pass: func(e Entry) bool { return e.Reason == "expired" }},
		{name: "through an outage of the edge", first: accepted, polls: []reply{lost, {status: 500}, {status: 200, body: "<html>"}, {status: 404}, {status: 200, body: `{"state":"delivered"}`}},
			state: Delivered, asked: 5},
		{name: "overdue, to the limit", first: accepted, polls: []reply{{status: 200, body: `{"state":"accepted","overdue":true}`}},
			state: Pending, asked: 10, failed: true, pass: func(e Entry) bool { return e.Overdue && e.PollCode == 200 }},
		{name: "unknown, then accepted, then delivered", first: silent, polls: []reply{{status: 200, body: `{"state":"unknown"}`}, {status: 200, body: `{"state":"accepted"}`}, {status: 200, body: `{"state":"delivered"}`}},
			state: Delivered, asked: 3},
		{name: "unknown, and the edge knows nothing", first: silent, polls: []reply{{status: 404}}, state: Unknown, asked: 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				asked := 0
				e := &edge{answer: func(_ int, r seen) reply {
					if r.method == http.MethodPost {
						return row.first
					}
					if r.path != "/messages/m1" || r.header.Get("Authorization") != "Bearer tok" || r.header.Get("Sec-Iv") == "" || r.header.Get("Sec-Fingerprint") != "fp" {
						t.Errorf("%s %s %v", r.method, r.path, r.header)
					}
					asked++
					return row.polls[min(asked, len(row.polls))-1]
				}}
				d := driver(t, Config{Transport: e, Count: 1, Token: "tok", Mode: Encrypted, Profile: quick, Keys: oneKey, Attempts: 1, Poll: time.Second, PollLimit: 10 * time.Second})
				run(t, d)
				time.Sleep(time.Second)
				if err := d.Drain(t.Context()); (err != nil) != row.failed {
					t.Errorf("drain: %v", err)
				}
				got := d.Ledger()[0]
				if got.State != row.state || asked != row.asked || got.Polls != asked || row.pass != nil && !row.pass(got) {
					t.Errorf("asked %d times: %+v", asked, got)
				}
				tally := d.Tally()
				if tally.Accepted != tally.Delivered+tally.Failed+tally.Pending || tally.Accepted+tally.Unknown != 1 {
					t.Errorf("%+v", tally)
				}
			})
		})
	}
}

func TestDrainEndsWithItsContextAndSaysWhatIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &edge{answer: func(_ int, r seen) reply {
			if r.method == http.MethodGet {
				return reply{hang: true}
			}
			return accepted
		}}
		d := driver(t, Config{Transport: e, Count: 30})
		run(t, d)
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("enough"))
		defer cancel()
		err := d.Drain(ctx)
		if err == nil || !strings.Contains(err.Error(), "30 of 30") || !strings.Contains(err.Error(), "enough") {
			t.Error(err)
		}
	})
}

func TestTheTokenGoesToTheEdgeOnly(t *testing.T) {
	e := &edge{}
	hosts := map[string]bool{}
	e.answer = func(_ int, r seen) reply {
		if r.method == http.MethodGet {
			return reply{status: 200, body: `{"state":"delivered"}`}
		}
		return reply{status: 202, header: http.Header{"Location": {"https://user:pw@elsewhere.test/messages/m1?x=1"}}}
	}
	d := driver(t, Config{Token: "tok", Count: 1, Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		hosts[r.URL.Scheme+"://"+r.URL.Host] = true
		return e.RoundTrip(r)
	})})
	run(t, d)
	if err := d.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := map[string]bool{"http://edge.test": true}; !gocmp.Equal(hosts, want) {
		t.Errorf("asked %v", hosts)
	}
	if got := d.Ledger()[0]; got.ID != "m1?x=1" || got.State != Delivered {
		t.Errorf("%+v", got)
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestTwoIDsForOneMessageAreFound(t *testing.T) {
	for _, row := range []struct {
		name  string
		keys  bool
		mode  Mode
		moved bool
	}{
		{"with a key", true, Plain, true},
		{"the same bytes, encrypted", false, Encrypted, true},
		{"plain without a key: each attempt is a message", false, Plain, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				first := notStored
				first.header = id("m0")
				d := driver(t, Config{Transport: &edge{answer: script(first, delivered)}, Count: 1, IdempotencyKeys: row.keys, Mode: row.mode, Profile: quick, Keys: oneKey})
				run(t, d)
				if got := d.Ledger()[0]; got.IDMoved != row.moved || (d.Tally().IDMoved == 1) != row.moved {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

func TestTheRateIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &edge{answer: func(int, seen) reply { time.Sleep(300 * time.Millisecond); return delivered }}
		d := driver(t, Config{Transport: e, Rate: 20, Concurrency: 8})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := d.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if n := len(e.all()); n < 199 || n > 201 {
			t.Errorf("%d messages in 10 s at 20 a second", n)
		}
		q := d.Tally().Answer
		if q.N < 199 || q.Max != 300*time.Millisecond || q.P50 < 285*time.Millisecond || q.P99 > 300*time.Millisecond {
			t.Errorf("%+v", q)
		}
	})
}

func TestWhenToldToStopItFinishesWhatIsUnderWay(t *testing.T) {
	for _, row := range []struct {
		name   string
		answer reply
		takes  time.Duration
		ends   time.Duration
		state  State
	}{
		{"answers come", delivered, 3 * time.Second, 6 * time.Second, Delivered},
		{"answers do not come", reply{hang: true}, 0, 9 * time.Second, Unknown},
		{"never stored", notStored, 0, 9 * time.Second, Refused},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := &edge{answer: func(int, seen) reply { time.Sleep(row.takes); return row.answer }}
				d := driver(t, Config{Transport: e, Concurrency: 1, IdempotencyKeys: true, Attempts: 1000, MaxBackoff: 3 * time.Second, Backoff: time.Second, Timeout: time.Hour, Grace: 4 * time.Second})
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				begun := time.Now()
				if err := d.Run(ctx); err != nil {
					t.Fatal(err)
				}
				l := d.Ledger()
				if took := time.Since(begun); took != row.ends || l[len(l)-1].State != row.state || d.Tally().Sending != 0 {
					t.Errorf("ended after %v: %+v", took, l[len(l)-1])
				}
			})
		})
	}
}

func TestTheLedgerIsBoundedTheTallyIsNot(t *testing.T) {
	var changes []Entry
	d := driver(t, Config{Transport: &edge{answer: script(delivered)}, Count: 25, Concurrency: 1, MaxEntries: 10, OnChange: func(e Entry) { changes = append(changes, e) }})
	run(t, d)
	l, tally := d.Ledger(), d.Tally()
	if len(l) != 10 || l[0].N != 16 || l[9].N != 25 || tally.Dropped != 15 || tally.Delivered != 25 || tally.Statuses[201] != 25 {
		t.Errorf("%d entries from %d; %+v", len(l), l[0].N, tally)
	}
	if first, last := changes[0], changes[len(changes)-1]; first.State != Sending || first.N != 1 || first.Latency() != 0 || last.State != Delivered || last.N != 25 || last.Latency() < 0 {
		t.Errorf("first told %+v, last %+v", first, last)
	}
	text, err := json.Marshal(l[0])
	if err != nil {
		t.Fatal(err)
	}
	var back Entry
	if err := json.Unmarshal(text, &back); err != nil || back.TripleHash != l[0].TripleHash || !back.Sent.Equal(l[0].Sent) {
		t.Errorf("%v: %s", err, text)
	}
	if err := d.Run(t.Context()); err == nil {
		t.Error("Run ran twice")
	}
}

func TestQuantilesAreWithinFivePercent(t *testing.T) {
	var h histogram
	for i := range 1000 {
		h.add(time.Duration(i+1) * time.Millisecond)
	}
	q := h.quantiles()
	for got, want := range map[time.Duration]time.Duration{q.P50: 500 * time.Millisecond, q.P90: 900 * time.Millisecond, q.P99: 990 * time.Millisecond} {
		if got < want || float64(got) > 1.05*float64(want)+1e6 {
			t.Errorf("got %v for %v", got, want)
		}
	}
	if q.Max != time.Second || q.N != 1000 {
		t.Errorf("%+v", q)
	}
	h = histogram{}
	if h.quantiles() != (Quantiles{}) {
		t.Error("quantiles of nothing")
	}
	h.add(0)
	h.add(100 * time.Hour)
	if q := h.quantiles(); q.P50 != 0 && q.P50 > time.Microsecond || q.Max != 100*time.Hour {
		t.Errorf("%+v", q)
	}
}

// The driver and the stub Kitchen speak the protocol to each other: what one says it has
// sent, the other says it got, byte for byte.
func TestWhatThePOSSealsTheKitchenOpens(t *testing.T) {
	for _, profile := range []vendorcrypto.Profile{quick, {Cipher: "a256ctr", Hash: "sha1", Salt: "s", Iterations: 2, IVEncoding: "hex", MessageEncoding: "base64url"}} {
		for _, keys := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, idempotency keys %v", profile.Cipher, keys), func(t *testing.T) {
				k, err := kitchen.Start(kitchen.Config{Sites: []string{"s1", "s2"}, Keys: oneKey, Profile: profile, Seed: 1,
					Token: func(string) vendorcrypto.Secret { return "tok" },
					// What is lost here was cooked: the repeat must be told from a new order.
					Behaviour: kitchen.Behaviour{Faults: []kitchen.Fault{{Share: 0.1, Status: 503}, {Share: 0.1, Do: kitchen.Reset, Processed: keys}}}})
				if err != nil {
					t.Fatal(err)
				}
				defer k.Close()
				d := driver(t, Config{BaseURL: strings.TrimSuffix(k.URL("s1"), "/sites/s1"), SitePath: true, Token: "tok", Mode: Encrypted, Profile: profile, Keys: oneKey,
					IdempotencyKeys: keys, Count: 150, Concurrency: 4, Seed: 5, Backoff: time.Millisecond, MaxBackoff: time.Millisecond, Attempts: 30})
				run(t, d)
				tally, st := d.Tally(), k.Stats()
				if tally.Delivered != 150 || st.Delivered != 150 || len(st.Problems) != 0 || st.Refused != 0 || st.Requests != tally.Attempts || (st.Repeats > 0) != keys {
					t.Fatalf("POS %+v\nKitchen %+v", tally, st)
				}
				byHash := map[string]kitchen.Record{}
				for _, r := range k.Ledger() {
					byHash[r.TripleHash] = r
				}
				for _, e := range d.Ledger() {
					r, ok := byHash[e.TripleHash]
					if !ok || r.PayloadHash != e.PayloadHash || r.OrderID != e.OrderID || r.Version != int64(e.Version) || r.Key != e.Key || r.Kind != e.Kind {
						t.Fatalf("POS %+v\nKitchen %+v", e, r)
					}
				}
			})
		}
	}
}

func TestTheEdgesCertificateIsChecked(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Kb-Id", "m1")
	}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	for _, row := range []struct {
		name  string
		roots *x509.CertPool
		state State
	}{{"known", roots, Delivered}, {"unknown: nothing is sent", x509.NewCertPool(), Refused}} {
		d := driver(t, Config{BaseURL: srv.URL, Roots: row.roots, Count: 3, Attempts: 2, Backoff: time.Millisecond})
		run(t, d)
		for _, e := range d.Ledger() {
			if e.State != row.state {
				t.Errorf("%s: %+v", row.name, e)
			}
		}
	}
}

func TestMistakesAreReportedAllAtOnceAndNoSecretIs(t *testing.T) {
	cfg := Config{BaseURL: "ftp://x", Token: "hunter2", Mode: Encrypted, Count: -1, Rate: -1, Attempts: -1, Transport: &edge{}, Roots: x509.NewCertPool()}
	_, err := New(cfg)
	for _, word := range []string{"base_url", "site", "keys", "profile", "count", "rate", "attempts", "transport"} {
		if err == nil || !strings.Contains(err.Error(), word+":") {
			t.Errorf("%s is not reported: %v", word, err)
		}
	}
	if _, err := New(Config{BaseURL: "http://x", Site: "s", Mode: "both"}); err == nil || !strings.Contains(err.Error(), "mode") {
		t.Error(err)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "%v %+v %#v %v", cfg, cfg, cfg, err)
	if strings.Contains(out.String(), "hunter2") {
		t.Errorf("the token is in %s", &out)
	}
}
