package kitchen

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// A sender that goes on as soon as it has given up is found out by late processing; one
// that waits long enough is not.
func TestLateProcessingInvertsForASenderThatGoesOnTooSoon(t *testing.T) {
	for _, row := range []struct {
		name     string
		settle   time.Duration // between giving up and the next event
		inverted uint64
	}{
		{"goes on at once", 0, 1},
		{"waits until the Kitchen has settled", time.Second, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := still(t, Config{Behaviour: Behaviour{
					Faults: []Fault{{Do: Hang, Next: 1}},
					Late:   Late{Share: 1, Delay: Latency{Base: 500 * time.Millisecond}},
				}})
				var wg sync.WaitGroup
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				wg.Go(func() { k.direct(ctx, t, event{key: "a", edge: "e.1", seq: 1, body: `{"_id":"x","version":1}`}) })
				<-ctx.Done()
				synctest.Wait() // the Kitchen has noticed, and cooks it in 500 ms
				time.Sleep(row.settle)
				k.direct(t.Context(), t, event{key: "b", edge: "e.1", seq: 2, body: `{"_id":"x","version":2}`})
				if err := k.Idle(t.Context()); err != nil {
					t.Fatal(err)
				}
				wg.Wait()
				st := k.Stats()
				if st.Inversions != row.inverted || st.LateInversions != row.inverted || st.Delivered != 2 || st.Late != 1 || st.GaveUp != 1 {
					t.Errorf("%+v", st)
				}
				a := k.Ledger()[0]
				if !a.GaveUp || !a.Late || a.Status != 0 || !a.Answered.IsZero() || a.Processed.Sub(a.Received) != 3500*time.Millisecond || a.Inverted() != (row.inverted == 1) {
					t.Errorf("%+v", a)
				}
			})
		})
	}
}

func TestLateProcessingOfAKeyAlreadyCookedIsARepeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := still(t, Config{Behaviour: Behaviour{
			Faults: []Fault{{Do: Hang, Next: 1}},
			Late:   Late{Share: 1, Delay: Latency{Base: time.Second}},
		}})
		var wg sync.WaitGroup
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		e := event{key: "a", edge: "e.1", seq: 1, body: `{"_id":"x","version":1}`}
		wg.Go(func() { k.direct(ctx, t, e) })
		<-ctx.Done()
		synctest.Wait()
		if w := k.direct(t.Context(), t, e); w.Code != 200 {
			t.Fatal(w.Code)
		}
		wg.Wait()
		first := k.Ledger()[0]
		if st := k.Stats(); st.Delivered != 1 || st.Repeats != 1 || st.Late != 1 || st.Inversions != 0 || !first.Repeat || !first.Late || first.Place != 2 {
			t.Errorf("%+v, first %+v", st, first)
		}
	})
}

func TestWithoutLateAnAbandonedRequestIsNotCooked(t *testing.T) {
	for _, row := range []struct {
		name string
		b    Behaviour
		body string
		late uint64
	}{
		{"no late processing", Slow(time.Minute), `{}`, 0},
		{"late, and the answer would have been an error", Behaviour{Latency: Latency{Base: time.Minute}, Late: Late{Share: 1}, Faults: []Fault{{Status: 503}}}, `{}`, 0},
		{"late, and the body is refused", Behaviour{Latency: Latency{Base: time.Minute}, Late: Late{Share: 1}}, `{`, 0},
		{"late", Behaviour{Latency: Latency{Base: time.Minute}, Late: Late{Share: 1}}, `{}`, 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := still(t, Config{Behaviour: row.b})
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				k.direct(ctx, t, event{key: "a", body: row.body})
				if st := k.Stats(); st.GaveUp != 1 || st.Delivered != row.late || st.Late != row.late {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

func TestLateProcessingEndsWithTheKitchen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := still(t, Config{Behaviour: Behaviour{Faults: []Fault{{Do: Hang}}, Late: Late{Share: 1, Delay: Latency{Base: time.Hour}}}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { k.direct(ctx, t, event{key: "a", body: `{}`}) })
		<-ctx.Done()
		synctest.Wait()
		if err := k.Idle(ctx); err == nil || !strings.Contains(err.Error(), "1 requests in flight") {
			t.Errorf("idle: %v", err)
		}
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if st := k.Stats(); st.Delivered != 0 || st.GaveUp != 1 {
			t.Errorf("%+v", st)
		}
	})
}

func TestLatencyStaysWithinItsBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := still(t, Config{Seed: 3, Behaviour: Behaviour{Latency: Latency{Base: 5 * time.Millisecond, Jitter: 10 * time.Millisecond, Max: 40 * time.Millisecond}}})
		var sum, longest time.Duration
		const n = 2000
		for range n {
			begun := time.Now()
			k.direct(t.Context(), t, event{body: `{}`})
			d := time.Since(begun)
			if d < 5*time.Millisecond || d > 40*time.Millisecond {
				t.Fatalf("%v is out of bounds", d)
			}
			sum += d
			longest = max(longest, d)
		}
		if mean := sum / n; mean < 13*time.Millisecond || mean > 16*time.Millisecond {
			t.Errorf("mean %v, want about 14.7 ms", mean)
		}
		if longest != 40*time.Millisecond {
			t.Errorf("longest %v, want the bound of 40 ms", longest)
		}
	})
}

// outcome is what a client saw of an answer.
type outcome struct {
	status int
	err    string // of the body or the request: "", "eof", "reset", "timeout"
	size   int
}

func post(t *testing.T, c *http.Client, url string, e event, timeout time.Duration) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	kind := func(err error) string {
		switch {
		case err == nil:
			return ""
		case errors.Is(err, context.DeadlineExceeded):
			return "timeout"
		case errors.Is(err, syscall.ECONNREFUSED):
			return "refused"
		case errors.Is(err, syscall.ECONNRESET):
			return "reset"
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return "eof"
		}
		return err.Error()
	}
	res, err := c.Do(e.request(ctx, t, url))
	if err != nil {
		return outcome{err: kind(err)}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return outcome{res.StatusCode, kind(err), len(body)}
}

func TestEveryFaultLooksToTheClientAsItShould(t *testing.T) {
	const long, short = 5 * time.Second, 100 * time.Millisecond
	for _, row := range []struct {
		name    string
		fault   Fault
		timeout time.Duration
		want    outcome
		gaveUp  bool
	}{
		{"500 by default", Fault{}, long, outcome{status: 500, size: len(`{"message":"internal server error"}`)}, false},
		{"any status", Fault{Status: 418, Body: "tea"}, long, outcome{status: 418, size: 3}, false},
		{"a status without body", Fault{Status: 204}, long, outcome{status: 204}, false},
		{"hang", Fault{Do: Hang}, short, outcome{err: "timeout"}, true},
		{"drop", Fault{Do: Drop}, long, outcome{err: "reset"}, false},
		{"reset", Fault{Do: Reset, Body: `{"status":"que`}, long, outcome{status: 200, err: "reset", size: -1}, false},
		{"truncate", Fault{Do: Truncate, Body: `{"status":"que`}, long, outcome{status: 200, err: "eof", size: 14}, false},
		{"stall", Fault{Do: Stall, Body: `{"status":"que`}, short, outcome{status: 200, err: "timeout", size: 14}, true},
		{"huge", Fault{Do: Huge, Size: 300_001}, long, outcome{status: 200, size: 300_001}, false},
		{"redirect", Fault{Do: Redirect}, long, outcome{status: 307, size: len(`{"message":"temporary redirect"}`)}, false},
	} {
		for _, processed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, processed %v", row.name, processed), func(t *testing.T) {
				row.fault.Processed = processed
				k := start(t, Config{Behaviour: Behaviour{Faults: []Fault{row.fault}}})
				got := post(t, client(t), k.URL("s1"), event{key: "a", body: `{"_id":"x"}`}, row.timeout)
				if row.want.size == -1 { // a reset may overtake the bytes before it
					got.size = -1
				}
				if got != row.want && !(row.fault.Do == Reset && got.err == "reset") {
					t.Errorf("got %+v, want %+v", got, row.want)
				}
				if err := k.Idle(t.Context()); err != nil {
					t.Fatal(err)
				}
				r := k.last()
				action := row.fault.Do
				if action == "" {
					action = Answer
				}
				if r.Delivered() != processed || r.GaveUp != row.gaveUp || r.Action != action || k.Stats().Faults[action] != 1 {
					t.Errorf("ledger says %+v", r)
				}
				// A lost answer is made up for by the repeat.
				if err := k.Set("s1", Behaviour{}); err != nil {
					t.Fatal(err)
				}
				if got := post(t, client(t), k.URL("s1"), event{key: "a", body: `{"_id":"x"}`}, long); got.status != 200 {
					t.Errorf("repeat: %+v", got)
				}
				if st := k.Stats(); st.Delivered != 1 || st.Repeats == 1 != processed {
					t.Errorf("%+v", st)
				}
			})
		}
	}
}

func TestAHugeAnswerEndsWhenTheClientLeaves(t *testing.T) {
	k := start(t, Config{Behaviour: Behaviour{Faults: []Fault{{Do: Huge, Size: 1 << 40}}}})
	res, err := client(t).Do(event{body: `{}`}.request(t.Context(), t, k.URL("s1")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, res.Body, 1<<20); err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if err := k.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !k.last().GaveUp {
		t.Error("the ledger does not say that the client left")
	}
}

func TestARedirectThatIsFollowedIsCountedNotCooked(t *testing.T) {
	k := start(t, Config{Behaviour: Behaviour{Faults: []Fault{{Do: Redirect}}}})
	c := client(t)
	c.CheckRedirect = nil
	if got := post(t, c, k.URL("s1"), event{key: "a", body: `{}`}, 5*time.Second); got.status != 200 {
		t.Fatalf("%+v", got)
	}
	if st := k.Stats(); st.Followed != 1 || st.Delivered != 0 || st.Requests != 1 {
		t.Errorf("%+v", st)
	}
}

func TestRetryAfterComesInBothForms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(300 * time.Millisecond) // off the full second
		for _, row := range []struct {
			date bool
			want string
		}{
			{false, "2"},
			{true, time.Now().Add(1500 * time.Millisecond).Truncate(time.Second).Add(time.Second).UTC().Format(http.TimeFormat)},
		} {
			k := still(t, Config{Behaviour: Behaviour{Faults: []Fault{{Status: 503, RetryAfter: 1500 * time.Millisecond, RetryAfterDate: row.date, Header: http.Header{"x-why": {"busy"}}}}}})
			w := k.direct(t.Context(), t, event{body: `{}`})
			if got := w.Header().Get("Retry-After"); w.Code != 503 || got != row.want || w.Header().Get("X-Why") != "busy" {
				t.Errorf("%d, Retry-After %q, want %q; %v", w.Code, got, row.want, w.Header())
			}
		}
	})
}

func TestFaultsStrikeInOrderForKindsAndCounts(t *testing.T) {
	k := still(t, Config{Behaviour: Behaviour{Faults: []Fault{
		{Kind: "alert", Status: 429},
		{Status: 503, Next: 2},
		{Status: 422, Next: 1},
	}}})
	var got []int
	for _, kind := range []string{"order", "alert", "order", "order", "order", "alert", "order"} {
		got = append(got, k.direct(t.Context(), t, event{kind: kind, body: `{}`}).Code)
	}
	if want := []int{503, 429, 503, 422, 200, 429, 200}; !cmp.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestNamedBehavioursDoWhatTheirNamesSay(t *testing.T) {
	for _, row := range []struct {
		name string
		b    Behaviour
		want int // 0: no answer
		took time.Duration
	}{
		{"status", Status(429), 429, 0},
		{"slow", Slow(3 * time.Second), 200, 3 * time.Second},
		{"hanging", Hanging(), 0, time.Minute},
		{"refusing, where the listener is shared", Refusing(), 0, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				k := still(t, Config{Behaviour: row.b})
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				begun := time.Now()
				k.direct(ctx, t, event{body: `{}`})
				if r := k.last(); r.Status != row.want || time.Since(begun) != row.took || r.Delivered() != (row.want == 200) {
					t.Errorf("after %v: %+v", time.Since(begun), r)
				}
			})
		})
	}
}

func TestASeedReplaysAndAnotherDiffers(t *testing.T) {
	b := Behaviour{Latency: Latency{Jitter: time.Second}, Faults: []Fault{{Share: 0.3, Status: 503}, {Share: 0.3, Status: 429}}, Late: Late{Share: 0.5}}
	fates := func(seed uint64, site string, sets uint64) (out []string) {
		c := newConduct(b, seed, site, sets)
		for range 200 {
			p := c.plan("order")
			status := 200
			if p.fault != nil {
				status = p.fault.Status
			}
			out = append(out, fmt.Sprint(p.latency, status, p.late))
		}
		return out
	}
	base := fates(1, "s1", 0)
	if !cmp.Equal(base, fates(1, "s1", 0)) {
		t.Error("one seed, two fates")
	}
	for name, other := range map[string][]string{"seed": fates(2, "s1", 0), "site": fates(1, "s2", 0), "setting": fates(1, "s1", 1)} {
		if cmp.Equal(base, other) {
			t.Errorf("another %s, the same fates", name)
		}
	}
	counts := map[string]int{}
	for _, f := range base {
		for _, word := range []string{" 200 ", " 503 ", " 429 "} {
			if strings.Contains(f, word) {
				counts[word]++
			}
		}
	}
	if counts[" 503 "] < 40 || counts[" 503 "] > 80 || counts[" 429 "] < 25 || counts[" 429 "] > 60 || counts[" 200 "] < 70 {
		t.Errorf("of 200 requests at 30 %% and 30 %% of the rest: %v", counts)
	}
}

func TestASiteWithItsOwnListenerRefusesAlone(t *testing.T) {
	k := start(t, Config{Sites: []string{"s1", "s2"}, Separate: true})
	c := client(t)
	url := k.URL("s1")
	check := func(want1, want2 outcome) {
		t.Helper()
		for site, want := range map[string]outcome{"s1": want1, "s2": want2} {
			got := post(t, c, k.URL(site), event{body: `{}`}, 5*time.Second)
			got.size = 0
			if got != want {
				t.Errorf("%s: %+v, want %+v", site, got, want)
			}
		}
	}
	fine, refused := outcome{status: 200}, outcome{err: "refused"}
	check(fine, fine)
	for range 3 {
		if err := k.Set("s1", Refusing()); err != nil {
			t.Fatal(err)
		}
		check(refused, fine)
		if err := k.Set("s1", Behaviour{}); err != nil {
			t.Fatal(err)
		}
		check(fine, fine)
	}
	if k.URL("s1") != url {
		t.Errorf("the address moved from %s to %s", url, k.URL("s1"))
	}
	if n := k.Stats().Sites["s1"].Requests; n != 4 {
		t.Errorf("%d requests at s1, want 4: a closed listener sees none", n)
	}
}

func TestOnASharedListenerARefusingSiteIsReset(t *testing.T) {
	k := start(t, Config{Sites: []string{"s1", "s2"}})
	c := client(t)
	if err := k.Set("s1", Refusing()); err != nil {
		t.Fatal(err)
	}
	if got := post(t, c, k.URL("s1"), event{body: `{}`}, 5*time.Second); got.err != "reset" {
		t.Errorf("s1: %+v", got)
	}
	if got := post(t, c, k.URL("s2"), event{body: `{}`}, 5*time.Second); got.status != 200 {
		t.Errorf("s2: %+v", got)
	}
	if err := k.SetAll(Refusing()); err != nil {
		t.Fatal(err)
	}
	if got := post(t, c, k.URL("s2"), event{body: `{}`}, 5*time.Second); got.err != "refused" {
		t.Errorf("s2, all refusing: %+v", got)
	}
	if err := k.SetAll(Behaviour{}); err != nil {
		t.Fatal(err)
	}
	if got := post(t, c, k.URL("s1"), event{body: `{}`}, 5*time.Second); got.status != 200 {
		t.Errorf("s1, all back: %+v", got)
	}
}

func TestRefusingAndRestartLoseWhatWasInHand(t *testing.T) {
	for _, row := range []struct {
		name string
		down func(*Kitchen) error
	}{
		{"refusing", func(k *Kitchen) error { return k.Set("s1", Refusing()) }},
		{"restart", (*Kitchen).Restart},
	} {
		t.Run(row.name, func(t *testing.T) {
			k := start(t, Config{Behaviour: Slow(time.Hour)})
			c := client(t)
			got := make(chan outcome, 1)
			var wg sync.WaitGroup
			defer wg.Wait()
			wg.Go(func() { got <- post(t, c, k.URL("s1"), event{key: "a", body: `{}`}, time.Minute) })
			eventually(t, "the request has arrived", func() bool { return len(k.Ledger()) == 1 })
			if err := row.down(k); err != nil {
				t.Fatal(err)
			}
			if o := <-got; o.err == "" || o.err == "timeout" {
				t.Errorf("%+v", o)
			}
			if err := k.Set("s1", Behaviour{}); err != nil {
				t.Fatal(err)
			}
			if o := post(t, c, k.URL("s1"), event{key: "a", body: `{}`}, 5*time.Second); o.status != 200 {
				t.Errorf("afterwards: %+v", o)
			}
			st := k.Stats()
			if st.Requests != 2 || st.Delivered != 1 || st.Repeats != 0 || st.GaveUp != 0 || k.last().Attempt != 2 {
				t.Errorf("%+v", st)
			}
		})
	}
}

func TestAClientThatGivesUpIsNoticed(t *testing.T) {
	k := start(t, Config{Behaviour: Behaviour{Latency: Latency{Base: time.Hour}, Late: Late{Share: 1}}})
	if got := post(t, client(t), k.URL("s1"), event{key: "a", body: `{}`}, 50*time.Millisecond); got.err != "timeout" {
		t.Fatalf("%+v", got)
	}
	if err := k.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "processed late", func() bool { return k.Stats().Late == 1 })
	if r := k.last(); !r.GaveUp || !r.Delivered() {
		t.Errorf("%+v", r)
	}
}

func TestABodyCutShortIsNotCooked(t *testing.T) {
	k := start(t, Config{Behaviour: Behaviour{Late: Late{Share: 1}}})
	conn, err := net.Dial("tcp", strings.TrimPrefix(k.URL("s1"), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "POST /order HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{}"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the request has arrived", func() bool { return len(k.Ledger()) == 1 })
	conn.Close()
	eventually(t, "the Kitchen has noticed", func() bool { return k.last().GaveUp })
	if k.last().Delivered() {
		t.Error("half a body was cooked")
	}
}

func TestLimitsAndStrays(t *testing.T) {
	k := start(t, Config{Sites: []string{"s1", "s2"}, MaxBody: 100})
	c := client(t)
	base := strings.TrimSuffix(k.URL("s1"), "/sites/s1")
	if got := post(t, c, k.URL("s1"), event{body: strings.Repeat(" ", 101)}, 5*time.Second); got.status != 413 {
		t.Errorf("too large: %+v", got)
	}
	for name, url := range map[string]string{
		"no such site": base + "/sites/s3", "no site in the path of a shared listener": base, "a name that is none": base + "/sites/s1/order",
	} {
		if got := post(t, c, url, event{body: `{}`}, 5*time.Second); got.status != 404 {
			t.Errorf("%s: %+v", name, got)
		}
	}
	res, err := c.Get(k.URL("s1") + "/order")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 405 {
		t.Errorf("GET: %d", res.StatusCode)
	}
	if st := k.Stats(); st.Strays != 4 || st.Requests != 1 || st.Refused != 1 {
		t.Errorf("%+v", st)
	}
	if k.URL("s3") != "" {
		t.Error("a site not served has a URL")
	}
}

func TestOneSiteAnswersAtBothPaths(t *testing.T) {
	k := start(t, Config{})
	for _, url := range []string{k.URL("s1"), k.URL("s1") + "/sites/s1"} {
		if got := post(t, client(t), url, event{body: `{}`}, 5*time.Second); got.status != 200 {
			t.Errorf("%s: %+v", url, got)
		}
	}
}

func TestServesTLS(t *testing.T) {
	borrowed := httptest.NewTLSServer(nil)
	cert, pool := borrowed.TLS.Certificates, borrowed.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	borrowed.Close()
	k := start(t, Config{TLS: &tls.Config{Certificates: cert}, Behaviour: Behaviour{Faults: []Fault{{Do: Drop, Next: 1}}}})
	c := client(t)
	c.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: pool}
	if got := post(t, c, k.URL("s1"), event{body: `{}`}, 5*time.Second); got.err == "" {
		t.Errorf("%+v", got)
	}
	if got := post(t, c, k.URL("s1"), event{body: `{}`}, 5*time.Second); got.status != 200 {
		t.Errorf("%+v", got)
	}
}

func TestTheBoundIsKeptAndSaid(t *testing.T) {
	k := still(t, Config{MaxRecords: 10})
	for i := range 25 {
		k.direct(t.Context(), t, event{key: fmt.Sprint(i), edge: "e.1", seq: i + 1, body: `{}`})
	}
	l := k.Ledger()
	if len(l) != 10 || l[0].N != 16 || l[9].N != 25 {
		t.Fatalf("%d records from %d to %d", len(l), l[0].N, l[len(l)-1].N)
	}
	st := k.Stats()
	if st.Dropped != 15 || st.Forgotten != 30 || st.Delivered != 25 { // keys and numbers, 15 each
		t.Errorf("%+v", st)
	}
	k.direct(t.Context(), t, event{key: "24", body: `{}`})
	if k.Stats().Repeats != 1 {
		t.Error("a key within the bound was forgotten")
	}
}

func TestRecordsSayWhatWasSentAndWhatWasProcessed(t *testing.T) {
	var seen []Record
	k := still(t, Config{Keys: oneKey, Profile: quick, OrderPointer: "/order/0/a~1b", VersionPointer: "/order/1",
		OnProcessed: func(r Record) { seen = append(seen, r) }})
	plain := `{"order":[{"a/b":17},3]}`
	s := seal(t, quick, testKey, plain)
	s.message += "\n"
	before := time.Now()
	k.direct(t.Context(), t, event{kind: "bump-bar", key: "k", edge: "store-1.01J", seq: 9, sealed: s})
	r := k.last()
	if r.Received.Before(before) || r.Processed.Before(r.Received) || r.Answered.Before(r.Processed) {
		t.Errorf("times are out of order: %+v", r)
	}
	want := Record{
		N: 1, Site: "s1", Kind: "bump-bar", Key: "k", Edge: "store-1", Epoch: "01J", Seq: 9, Attempt: 1,
		IV: s.iv, Fingerprint: "fp-1", Bytes: len(s.message), TripleHash: vendorcrypto.TripleHash(s.iv, "fp-1", []byte(s.message)),
		PayloadHash: vendorcrypto.PayloadHash([]byte(plain)), OrderID: "17", Version: 3, Place: 1, Status: 200,
	}
	got := r
	got.Received, got.Processed, got.Answered = time.Time{}, time.Time{}, time.Time{}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if len(seen) != 1 || seen[0].Place != 1 || seen[0].Key != "k" {
		t.Errorf("OnProcessed got %+v", seen)
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Record
	if err := json.Unmarshal(b, &back); err != nil || !back.Processed.Equal(r.Processed) || back.TripleHash != r.TripleHash {
		t.Errorf("%v: %s", err, b)
	}
}

func TestPointersThatMeetNothingAreNoError(t *testing.T) {
	k := still(t, Config{})
	for _, body := range []string{`[]`, `"x"`, `{"_id":{},"version":"1"}`, `{"_id":null,"version":1.5}`, `17`} {
		if w := k.direct(t.Context(), t, event{body: body}); w.Code != 200 {
			t.Errorf("%s: %d", body, w.Code)
		}
		if r := k.last(); r.OrderID != "" || r.Version != 0 {
			t.Errorf("%s: %+v", body, r)
		}
	}
	if at(map[string]any{"a": []any{1}}, "/a/1") != nil || at(map[string]any{"a": []any{1}}, "/a/x") != nil {
		t.Error("an index beyond the end meets something")
	}
}

func TestBehaviourSurvivesJSON(t *testing.T) {
	b := Behaviour{Refuse: true, Latency: Latency{1, 2, 3}, Late: Late{0.5, Latency{4, 5, 6}}, Repeat: 409,
		Faults: []Fault{{Reset, "order", 0.25, 3, true, 201, http.Header{"X": {"y"}}, "b", time.Second, true, 9}}}
	text, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	var back Behaviour
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(b, back); d != "" {
		t.Error(d)
	}
	if text, _ := json.Marshal(Behaviour{}); string(text) != "{}" {
		t.Errorf("healthy is %s", text)
	}
}

func TestMistakesAreReportedAllAtOnce(t *testing.T) {
	_, err := Start(Config{
		Sites: []string{"s1", "s1", "No.Name"}, Addr: "nowhere", Skew: -1, OrderPointer: "id", Keys: oneKey,
		Profiles:  map[string]vendorcrypto.Profile{"s9": {}},
		Behaviour: Behaviour{Repeat: 1, Latency: Latency{Base: -1}, Late: Late{Share: 2}, Faults: []Fault{{Do: "explode", Share: -1, Status: 99, Next: -1}, {Do: Redirect, Status: 200}}},
	})
	for _, word := range []string{"listed twice", "No.Name", "profile of site", `"s9"`, "addr", "skew", "order_pointer",
		"repeat: 1", "latency: negative", "late.share", "faults[0].do", "faults[0].share", "faults[0].status", "faults[0]: a negative", "faults[1].status"} {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%q is not in\n%v", word, err)
		}
	}
	if _, err := Start(Config{}); err == nil || !strings.Contains(err.Error(), "sites: required") {
		t.Error(err)
	}
	if _, err := Start(Config{Sites: []string{"a", "b"}, Separate: true, Addr: "127.0.0.1:8080"}); err == nil || !strings.Contains(err.Error(), "separate") {
		t.Error(err)
	}
	k := still(t, Config{})
	if err := k.Set("s9", Behaviour{}); err == nil || !strings.Contains(err.Error(), `"s9"`) {
		t.Error(err)
	}
	if err := k.SetAll(Behaviour{Repeat: 1}); err == nil {
		t.Error("a wrong behaviour was taken")
	}
}

func TestStartReportsAnAddressInUse(t *testing.T) {
	k := start(t, Config{})
	_, err := net.Listen("tcp", strings.TrimPrefix(k.URL("s1"), "http://"))
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the Kitchen does not listen where it says: %v", err)
	}
}

func TestHoldsUnderLoadWhileEverythingChanges(t *testing.T) {
	sites := []string{"s1", "s2", "s3"}
	var processed atomic.Int64
	k := start(t, Config{Sites: sites, Separate: true, Keys: oneKey, Profile: quick, OnProcessed: func(Record) { processed.Add(1) },
		Behaviour: Behaviour{Latency: Latency{Jitter: time.Millisecond}, Faults: []Fault{{Share: 0.1, Status: 503}, {Share: 0.1, Do: Reset, Processed: true}}}})
	c := client(t)
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			site := sites[w%3]
			edge := fmt.Sprintf("e%d.1", w)
			for i := range 30 {
				e := event{key: fmt.Sprint(w, "-", i), edge: edge, seq: i + 1, sealed: seal(t, quick, testKey, `{}`)}
				for range 200 { // until it is answered: the sender goes on only then
					if post(t, c, k.URL(site), e, 5*time.Second).status == 200 {
						break
					}
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 10 {
			_ = k.Stats()
			_ = k.Ledger()
			if err := errors.Join(k.Set("s1", Refusing()), k.Set("s1", Slow(time.Millisecond))); err != nil {
				t.Error(err)
			}
			if i%5 == 0 {
				if err := k.Restart(); err != nil {
					t.Error(err)
				}
			}
		}
	})
	wg.Wait()
	if err := k.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	st := k.Stats()
	if st.Delivered != 180 || len(st.Problems) != 0 || st.Forgotten != 0 || uint64(processed.Load()) != st.Delivered+st.Repeats {
		t.Errorf("%+v, %d callbacks", st, processed.Load())
	}
	var sum uint64
	for _, s := range st.Sites {
		sum += s.Requests
	}
	if sum != st.Requests || int(st.Requests) != len(k.Ledger()) {
		t.Errorf("%d requests, %d over the sites, %d records", st.Requests, sum, len(k.Ledger()))
	}
}

func TestCloseIsFinalAndCanBeRepeated(t *testing.T) {
	k, err := Start(Config{Sites: []string{"s1"}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(k.Restart(), k.Set("s1", Behaviour{})); err != nil {
		t.Fatal(err)
	}
	if got := post(t, client(t), k.URL("s1"), event{body: `{}`}, time.Second); got.err != "refused" {
		t.Errorf("%+v", got)
	}
}
