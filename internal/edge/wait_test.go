package edge

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// timed sends c and tells how long the answer took.
func (r *rig) timed(ctx context.Context, c call) (*httptest.ResponseRecorder, time.Duration) {
	begun := time.Now()
	w := r.do(ctx, c)
	return w, time.Since(begun)
}

// reportsAfter makes the Kitchen take its time.
func (r *rig) reportsAfter(d time.Duration, wg *sync.WaitGroup) {
	r.store.kitchen = func(dr *draft) *reply {
		seq := r.store.seq[dr.site]
		wg.Go(func() {
			time.Sleep(d)
			r.follow.take(r.store.reportOf(dr, seq, cooks(dr)))
		})
		return nil
	}
}

func TestIngestWaitsForTheKitchenAsAskedFor(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prefer  string
		kitchen time.Duration
		status  int
		took    time.Duration
	}{
		{"the Kitchen is quicker than the default", "", time.Second, 201, time.Second},
		{"it is slower", "", 3 * time.Second, 202, 2 * time.Second},
		{"the POS waits longer", "wait=5", 3 * time.Second, 201, 3 * time.Second},
		{"the POS waits less", "wait=1", 3 * time.Second, 202, time.Second},
		{"the POS does not wait", "wait=0", time.Millisecond, 202, 0},
		{"the POS would wait for ever", "wait=100000", time.Hour, 202, 30 * time.Second},
		{"what the POS prefers cannot be read", "wait=a", time.Hour, 202, 2 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil)
				var wg sync.WaitGroup
				r.reportsAfter(tc.kitchen, &wg)
				w, took := r.timed(t.Context(), call{token: tokenTill1, body: order, header: with("Prefer", tc.prefer)})
				if w.Code != tc.status || took != tc.took {
					t.Errorf("%d after %v, want %d after %v", w.Code, took, tc.status, tc.took)
				}
				wg.Wait()
				// It is delivered in the end, and the POS can see that.
				got := r.do(t.Context(), call{method: http.MethodGet, path: "/messages/" + w.Header().Get("Kb-Id"), token: tokenTill1})
				if !strings.Contains(got.Body.String(), `"state":"delivered"`) {
					t.Errorf("in the end: %s", got.Body)
				}
			})
		})
	}
}

func TestIngestAnswersWaitingRequestsWhenItStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		time.AfterFunc(time.Second, func() { close(r.ingest.stopping) })
		if w, took := r.timed(t.Context(), call{token: tokenTill1, body: order, header: with("Prefer", "wait=20")}); w.Code != 202 || took != time.Second {
			t.Errorf("%d after %v", w.Code, took)
		}
	})
}

func TestIngestEndsTheWaitOfAPOSThatHasGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, took := r.timed(ctx, call{token: tokenTill1, body: order, header: with("Prefer", "wait=20")}); took != time.Second {
			t.Errorf("ended after %v", took)
		}
		if got := len(r.store.stored()); got != 1 {
			t.Errorf("%d stored", got)
		}
	})
}

// Requests that wait hold no slot, and beyond the bound they do not wait: a slow Kitchen
// must not keep orders out.
func TestIngestTakesOrdersWhileManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.MaxRequests, c.MaxSiteRequests, c.MaxWaiting = 2, 2, 10 })
		var mu sync.Mutex
		took := make(map[time.Duration]int)
		var wg sync.WaitGroup
		for range 25 {
			wg.Go(func() {
				w, d := r.timed(t.Context(), call{token: tokenTill1, body: order})
				if w.Code != 202 {
					t.Errorf("%d: %s", w.Code, w.Body)
				}
				mu.Lock()
				defer mu.Unlock()
				took[d]++
			})
			synctest.Wait()
		}
		wg.Wait()
		if took[0] != 15 || took[2*time.Second] != 10 {
			t.Errorf("waits: %v, want 10 that waited and 15 that did not", took)
		}
		if len(r.ingest.slots) != 0 || len(r.edge.sites["gcm"].gate) != 0 || r.ingest.waiting.Load() != 0 {
			t.Error("something was not given back")
		}
	})
}

func TestIngestConcurrentRepeatsAreOneMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.store.commit = func(*draft) error { time.Sleep(time.Second); return nil }
		var kitchens sync.WaitGroup
		r.reportsAfter(time.Second, &kitchens)
		var mu sync.Mutex
		var answers []string
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				// Each under its own IV, as a POS that repeats must do it.
				iv, message := sealed(t, "a256gcm", order)
				w, took := r.timed(t.Context(), call{token: tokenTill1, body: message, header: with("Sec-Iv", iv, "Sec-Fingerprint", fpCurrent, "Idempotency-Key", "k", "Prefer", "wait=9")})
				mu.Lock()
				defer mu.Unlock()
				answers = append(answers, fmt.Sprint(w.Code, w.Header().Get("Kb-Id"), w.Body, took))
			})
		}
		wg.Wait()
		kitchens.Wait()
		if len(slices.Compact(answers)) != 1 || !strings.HasPrefix(answers[0], "201") {
			t.Errorf("answers differ, or are not the Kitchen's: %v", slices.Compact(answers))
		}
		if got := len(r.store.stored()); got != 1 {
			t.Errorf("%d commits", got)
		}
	})
}

func TestIngestRepeatJoinsAnUnknownOutcome(t *testing.T) {
	for _, tc := range []struct {
		name   string
		after  time.Duration // until the outcome is known
		status int
		took   time.Duration
	}{
		{"it is known soon", 3 * time.Second, 202, 3 * time.Second},
		{"it is not", time.Hour, 503, 5 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil)
				r.store.commit = func(*draft) error { return errUnknown }
				c := call{token: tokenTill1, body: order, header: with("Idempotency-Key", "k", "Prefer", "wait=0")}
				first := r.do(t.Context(), c)
				if first.Code != 503 || problemOf(t, first.Body.Bytes())["outcome"] != "unknown" {
					t.Fatalf("%d: %s", first.Code, first.Body)
				}
				asked := r.do(t.Context(), call{method: http.MethodGet, path: first.Header().Get("Location"), token: tokenTill1})
				if !strings.Contains(asked.Body.String(), `"state":"unknown"`) {
					t.Errorf("asked: %s", asked.Body)
				}
				known := time.AfterFunc(tc.after, func() { r.store.stored()[0].progress.stored() })
				defer known.Stop()
				again, took := r.timed(t.Context(), c)
				if again.Code != tc.status || took != tc.took || again.Header().Get("Kb-Id") != first.Header().Get("Kb-Id") {
					t.Errorf("%d after %v: %s", again.Code, took, again.Body)
				}
				if got := len(r.store.stored()); got != 1 {
					t.Errorf("%d commits", got)
				}
			})
		})
	}
}

// When the first attempt certainly is not stored, those that joined it hear so, and the
// next one is a first attempt.
func TestIngestRepeatOfWhatWasNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		refuse := true
		r.store.commit = func(*draft) error {
			time.Sleep(time.Second)
			if refuse {
				return notStored(errAway)
			}
			return nil
		}
		c := call{token: tokenTill1, body: order, header: with("Idempotency-Key", "k", "Prefer", "wait=0")}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				w, took := r.timed(t.Context(), c)
				if w.Code != 503 || took != time.Second || problemOf(t, w.Body.Bytes())["outcome"] != "not-stored" {
					t.Errorf("%d after %v: %s", w.Code, took, w.Body)
				}
			})
		}
		wg.Wait()
		if got := r.edge.register.waiting(); got != 0 {
			t.Errorf("%d remembered", got)
		}
		refuse = false
		if w := r.do(t.Context(), c); w.Code != 202 {
			t.Errorf("afterwards: %d: %s", w.Code, w.Body)
		}
	})
}

// A Kitchen's report may be quicker than the hub's acknowledgement.
func TestIngestReportBeforeTheAcknowledgement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, nil)
		r.store.commit = func(d *draft) error {
			r.follow.take(r.store.reportOf(d, 1, cooks(d)))
			time.Sleep(time.Second)
			return errUnknown // and the acknowledgement is lost
		}
		if w := r.do(t.Context(), call{token: tokenTill1, body: order}); w.Code != 201 || w.Body.String() != `{"ticket":17}` {
			t.Errorf("%d: %s", w.Code, w.Body)
		}
	})
}

func TestIngestIsFullOfUnsettledMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.Messages = 100 })
		c := call{token: tokenTill1, body: order, header: with("Prefer", "wait=0")}
		for range 100 {
			if w := r.do(t.Context(), c); w.Code != 202 {
				t.Fatalf("%d: %s", w.Code, w.Body)
			}
		}
		w := r.do(t.Context(), c)
		if w.Code != 503 || problemOf(t, w.Body.Bytes())["outcome"] != "not-stored" || len(r.store.stored()) != 100 {
			t.Errorf("%d: %s, %d stored", w.Code, w.Body, len(r.store.stored()))
		}
		d := r.store.stored()[0]
		r.follow.take(r.store.reportOf(d, 1, cooks(d)))
		if w := r.do(t.Context(), c); w.Code != 202 {
			t.Errorf("after one was settled: %d", w.Code)
		}
	})
}

// A site whose messages cannot be stored takes its own room only.
func TestIngestAStuckSiteHoldsUpItselfOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.MaxSiteRequests, c.MaxRequests = 4, 8 })
		r.store.commit = func(d *draft) error {
			if d.site == "gcm" {
				time.Sleep(5 * time.Second)
				return notStored(errTurn)
			}
			return nil
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		reasons := make(map[any]int)
		for range 20 {
			wg.Go(func() {
				w := r.do(t.Context(), call{token: tokenTill1, body: order})
				mu.Lock()
				defer mu.Unlock()
				reasons[problemOf(t, w.Body.Bytes())["reason"]]++
			})
		}
		synctest.Wait()
		for range 50 {
			if w, took := r.timed(t.Context(), call{token: tokenClear, body: order, header: with("Prefer", "wait=0")}); w.Code != 202 || took != 0 {
				t.Errorf("another site: %d after %v", w.Code, took)
			}
		}
		wg.Wait()
		if reasons["hub-slow"] != 4 || reasons["busy"] != 16 {
			t.Errorf("answers: %v", reasons)
		}
	})
}

// Made-up fingerprints while the Portal is slow take the room of their own site only (I9).
func TestIngestUnknownFingerprintsHoldUpTheirSiteOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(c *Config) { c.MaxSiteRequests, c.MaxRequests = 4, 16 })
		r.portal.refresh = func() error { time.Sleep(10 * time.Second); return context.DeadlineExceeded }
		iv, message := sealed(t, "a256gcm", order)
		var wg sync.WaitGroup
		var mu sync.Mutex
		at := make(map[time.Duration]int)
		for i := range 12 {
			wg.Go(func() {
				w, took := r.timed(t.Context(), call{token: tokenTill1, body: message, header: with("Sec-Iv", iv, "Sec-Fingerprint", fmt.Sprint("made-up-", i))})
				if w.Code != 503 {
					t.Errorf("%d: %s", w.Code, w.Body)
				}
				mu.Lock()
				defer mu.Unlock()
				at[took]++
			})
		}
		synctest.Wait()
		if w, took := r.timed(t.Context(), call{token: tokenStrict, body: message, header: with("Sec-Iv", iv, "Sec-Fingerprint", fpCurrent, "Prefer", "wait=0")}); w.Code != 202 || took != 0 {
			t.Errorf("another site: %d after %v", w.Code, took)
		}
		wg.Wait()
		if at[0] != 8 || at[10*time.Second] != 4 {
			t.Errorf("answers by time: %v, want four that waited", at)
		}
	})
}

func TestIngestOrderAndDeadlineOfADraft(t *testing.T) {
	r := newRig(t, nil)
	lane := r.portal.Site("gcm").Binding.Lane()
	post := func(c call) *draft {
		t.Helper()
		c.header = c.header.Clone()
		if c.header == nil {
			c.header = http.Header{}
		}
		c.header.Set("Prefer", "wait=0")
		if w := r.do(t.Context(), c); w.Code != 202 {
			t.Fatalf("%d: %s", w.Code, w.Body)
		}
		all := r.store.stored()
		return all[len(all)-1]
	}
	iv, message := sealed(t, "a256gcm", `{"_id":"o-1001","v":2}`)
	for _, tc := range []struct {
		name  string
		call  call
		order string
	}{
		{"a plain order", call{token: tokenTill1, body: order}, lane.Order("o-1001")},
		{"its update, encrypted", call{token: tokenTill1, body: message, header: with("Sec-Iv", iv, "Sec-Fingerprint", fpCurrent)}, lane.Order("o-1001")},
		{"an id that is a number", call{token: tokenTill1, body: `{"_id":17}`}, lane.Order("17")},
		{"no id", call{token: tokenTill1, body: `{"id":"x"}`}, ""},
		{"no object", call{token: tokenTill1, body: `[1]`}, ""},
		{"a pointer of the site's own", call{token: tokenClear, body: `{"_id":"o-1","items":[{"name":"soup"}]}`}, lane.Order("soup")},
	} {
		if got := post(tc.call); got.order != tc.order {
			t.Errorf("%s: order %q, want %q", tc.name, got.order, tc.order)
		}
	}
	if got := post(call{token: tokenTill1, body: order, header: with("Kb-Within", "30")}); got.within != 30*time.Second {
		t.Errorf("within %v", got.within)
	}
	if got := post(call{token: tokenTill1, body: order, header: with("Kb-Within", "3600")}); got.within != 10*time.Minute {
		t.Errorf("within %v", got.within)
	}
	trace := "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	if got := post(call{token: tokenTill1, body: order, header: with("Traceparent", trace)}); got.trace != trace {
		t.Errorf("trace %q", got.trace)
	}
}

func TestIngestListenerOfOneSite(t *testing.T) {
	r := newRig(t, nil)
	r.handler = r.ingest.handler(listener{site: "ctr", loopback: true})
	for _, tc := range []struct {
		name   string
		call   call
		status int
	}{
		{"the listener names the site", call{body: order}, 202},
		{"the path may name it too", call{path: "/sites/ctr/order", body: order}, 202},
		{"another site's path", call{path: "/sites/gcm/order", body: order}, 404},
		{"another site's token", call{token: tokenTill1, body: order}, 403},
		{"another site's path and token", call{path: "/sites/gcm/order", token: tokenTill1, body: order}, 403},
	} {
		c := tc.call
		c.header = with("Prefer", "wait=0")
		if w := r.do(t.Context(), c); w.Code != tc.status {
			t.Errorf("%s: %d, want %d: %s", tc.name, w.Code, tc.status, w.Body)
		}
	}
}

func TestIngestPathsThatAreNone(t *testing.T) {
	r := newRig(t, nil)
	for _, path := range []string{"/", "//order", "/order/", "/./order", "/orders", "/sites/ctr", "/sites//order", "/sites/ctr/x/order", "/messages", "/messages/", "/metrics", "/sites/ctr/messages"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete} {
			w := httptest.NewRecorder()
			req := httptest.NewRequest(method, "http://edge.example/x", strings.NewReader(order))
			req.URL.Path = path
			r.handler.ServeHTTP(w, req)
			if w.Code != 404 || w.Header().Get("Content-Type") != "application/problem+json" {
				t.Errorf("%s %s: %d %s", method, path, w.Code, w.Body)
			}
		}
	}
	w := httptest.NewRecorder()
	star := httptest.NewRequest(http.MethodGet, "http://edge.example/x", nil)
	star.URL, star.RequestURI = &url.URL{Path: "*"}, "*" // as net/http reads it
	r.handler.ServeHTTP(w, star)
	if w.Code != 404 || w.Header().Get("Content-Type") != "application/problem+json" {
		t.Errorf("GET *: %d %s", w.Code, w.Body)
	}
	if w := r.do(t.Context(), call{method: http.MethodDelete, path: "/messages/x"}); w.Code != 405 || w.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("%d, Allow %q", w.Code, w.Header().Get("Allow"))
	}
}
