package keysync

import (
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func manySites(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("s%d", i)
	}
	return names
}

func TestRunFetchesAllAtOnceEightAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		f.delay = 100 * time.Millisecond
		sites := manySites(100)
		r := fakeRig(t, f, 0, sites...)
		for _, s := range sites {
			f.set(s, siteObject(true, lasting("f-"+s)))
		}
		if err := r.Ready(); err == nil || strings.Count(err.Error(), "not asked for yet") != 100 {
			t.Errorf("before Run: %v, want every site named", err)
		}
		defer r.run(t)()
		// 100 sites in rounds of 8, 100 ms each, after a spread of at most a second.
		time.Sleep(time.Second + 13*100*time.Millisecond + time.Millisecond)
		synctest.Wait()
		if err := r.Ready(); err != nil {
			t.Error(err)
		}
		if _, most := f.all(); most != concurrency {
			t.Errorf("%d requests at once, want %d", most, concurrency)
		}
		for _, s := range sites {
			if got := fingerprints(r.Site(s)); !slices.Equal(got, []string{"f-" + s}) {
				t.Errorf("site %s has keys %v", s, got)
			}
		}
	})
}

func TestEachSiteIsPolledEveryPollGiveOrTakeATenth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		sites := manySites(20)
		r := fakeRig(t, f, time.Minute, sites...)
		for _, s := range sites {
			f.set(s, siteObject(true, lasting("f")))
		}
		stop := r.run(t)
		time.Sleep(30 * time.Minute)
		stop()
		seconds := map[time.Time]bool{}
		for _, s := range sites {
			times := f.times(s)
			if len(times) < 27 || len(times) > 35 {
				t.Errorf("site %s was asked for %d times in 30 polls", s, len(times))
			}
			for i, at := range times[2:] {
				if gap := at.Sub(times[i+1]); gap < 54*time.Second || gap > 66*time.Second {
					t.Errorf("site %s: %v between two polls", s, gap)
				}
			}
			if gap := times[1].Sub(times[0]); gap < 6*time.Second || gap > time.Minute {
				t.Errorf("site %s: second request after %v, want within the first poll", s, gap)
			}
			seconds[times[1].Truncate(time.Second)] = true
		}
		if len(seconds) < 5 {
			t.Errorf("after the first burst the sites stay together: %d different seconds", len(seconds))
		}
	})
}

func TestFailureBacksOffAndIsLoggedThreeTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, time.Minute, "s1")
		f.set("s1", siteObject(true, lasting("f1")))
		defer r.run(t)()
		time.Sleep(5 * time.Second)
		ring := r.Site("s1").Keyring
		r.log.clear()
		f.fail("s1", refusal("the Portal", http.StatusInternalServerError, nil))
		begin := f.count("s1")
		time.Sleep(24 * time.Hour)
		times := f.times("s1")[begin:]
		if len(times) < 24*12 || len(times) > 24*60 {
			t.Errorf("asked %d times in a day of failures", len(times))
		}
		longest := time.Duration(0)
		for i, at := range times[1:] {
			longest = max(longest, at.Sub(times[i]))
		}
		if longest > 5*time.Minute || longest < 3*time.Minute {
			t.Errorf("longest wait %v, want up to five polls", longest)
		}
		if r.Site("s1").Keyring != ring {
			t.Error("I9: a day of failures took the keys away")
		}
		f.fail("s1", nil)
		time.Sleep(6 * time.Minute)
		want := []string{"WARN refresh from the portal failed", "WARN refresh from the portal failed", "INFO refresh from the portal works again"}
		if got := r.log.lines(t); !slices.Equal(got, want) {
			t.Errorf("logged %q, want the first failure, the one at the back-off's cap, and the recovery", got)
		}
	})
}

func TestBackoff(t *testing.T) {
	const base, limit = time.Second, 5 * time.Minute
	for failures := range 200 {
		most := limit
		if failures < 9 {
			most = min(limit, base<<failures)
		}
		var longest time.Duration
		for range 300 {
			d := backoff(failures, base, limit)
			if d < base/10 || d > most {
				t.Fatalf("after %d failures: %v, want %v to %v", failures, d, base/10, most)
			}
			longest = max(longest, d)
		}
		if longest < most/2 {
			t.Errorf("after %d failures: never above %v of %v", failures, longest, most)
		}
	}
	for _, row := range []struct{ poll, cap time.Duration }{
		{100 * time.Millisecond, 500 * time.Millisecond}, {time.Minute, 5 * time.Minute}, {5 * time.Minute, 10 * time.Minute}, {time.Hour, time.Hour},
	} {
		if got := (&Keys{poll: row.poll}).backoffCap(); got != row.cap {
			t.Errorf("poll %v: back-off ends at %v, want %v", row.poll, got, row.cap)
		}
	}
}

func TestSiteIsPolledEarlierWhenItsLastKeyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, time.Hour, "s1", "s2")
		start := time.Now()
		end := start.Add(65 * time.Minute)
		ending := testKey{"f1", start.Add(-time.Hour), end}
		f.set("s1", siteObject(true, ending))
		f.set("s2", siteObject(true, lasting("f2")))
		defer r.run(t)()
		time.Sleep(time.Until(end.Add(-20 * time.Minute)))
		successor := testKey{"f3", time.Now(), end.Add(24 * time.Hour)}
		f.set("s1", siteObject(true, ending, successor))
		time.Sleep(time.Until(end.Add(-time.Second)))
		if got := fingerprints(r.Site("s1")); !slices.Equal(got, []string{"f1", "f3"}) {
			t.Errorf("just before the key's end: keys %v, want the successor to be there", got)
		}
		if primary, err := r.Site("s1").Keyring.Primary(time.Now()); err != nil || primary.Fingerprint() != "f3" {
			t.Errorf("just before the key's end: sealed with %v, %v", primary, err)
		}
		if got := f.count("s2"); got > 3 {
			t.Errorf("the other site was asked for %d times in 65 minutes", got)
		}
	})
}

// A key that ended without a successor does not make the site busy for ever.
func TestEndedKeyDoesNotHurryForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, time.Hour, "s1")
		f.set("s1", siteObject(true, testKey{"f1", time.Now().Add(-time.Hour), time.Now().Add(time.Hour)}))
		defer r.run(t)()
		time.Sleep(2 * time.Hour)
		before := f.count("s1")
		if before > 8 {
			t.Errorf("asked %d times round the key's end", before)
		}
		time.Sleep(24 * time.Hour)
		if got := f.count("s1") - before; got < 20 || got > 28 {
			t.Errorf("asked %d times in the day after, want one for each poll", got)
		}
		if len(r.Site("s1").Keyring.Keys()) != 1 {
			t.Error("the ended key was dropped: it still opens what was sealed with it")
		}
	})
}

func TestRateLimitSilencesEverySite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		sites := manySites(50)
		r := fakeRig(t, f, time.Minute, sites...)
		for _, s := range sites {
			f.set(s, siteObject(true, lasting("f")))
		}
		defer r.run(t)()
		time.Sleep(5 * time.Second)
		f.fail("s0", refusal("the Portal", http.StatusTooManyRequests, http.Header{"Retry-After": {"300"}}))
		if err := r.Refresh(t.Context(), "s0"); err == nil {
			t.Fatal("no error")
		}
		f.fail("s0", nil)
		before, _ := f.all()
		time.Sleep(299 * time.Second)
		within, _ := f.all()
		if got := len(within) - len(before); got > 0 {
			t.Errorf("%d requests within Retry-After", got)
		}
		begin := time.Now()
		if err := r.Refresh(t.Context(), "s1"); err == nil || time.Since(begin) > 0 {
			t.Errorf("%v after %v: a caller waits for the rate limit, or was told nothing", err, time.Since(begin))
		}
		time.Sleep(2 * time.Minute)
		after, _ := f.all()
		if got := len(after) - len(within); got < 50 {
			t.Errorf("%d requests in the two minutes after it, want every site again", got)
		}
		perSecond := map[int64]int{}
		for _, at := range after[len(within):] {
			perSecond[at.Unix()]++
		}
		for _, n := range perSecond {
			if n > 25 {
				t.Errorf("%d requests in one second after the rate limit", n)
			}
		}
	})
}

func TestRetryAfterOfOneSiteLeavesTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, time.Minute, "s1", "s2")
		f.set("s1", siteObject(true, lasting("f1")))
		f.fail("s2", refusal("the Portal", http.StatusServiceUnavailable, http.Header{"Retry-After": {"600"}}))
		defer r.run(t)()
		time.Sleep(599 * time.Second)
		if got := f.count("s2"); got != 1 {
			t.Errorf("the site was asked for %d times within its Retry-After", got)
		}
		if got := f.count("s1"); got < 9 {
			t.Errorf("the other site was asked for %d times only", got)
		}
		time.Sleep(2 * time.Minute)
		if got := f.count("s2"); got != 2 {
			t.Errorf("the site was asked for %d times, want again after its Retry-After", got)
		}
	})
}

func TestRunStopsAtOnceAndForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		f.delay = time.Hour
		r := fakeRig(t, f, time.Minute, "s1", "s2")
		stop := r.run(t)
		time.Sleep(time.Minute)
		begin := time.Now()
		stop()
		if d := time.Since(begin); d > 0 {
			t.Errorf("took %v to stop while a request hung", d)
		}
		if err := r.Refresh(t.Context(), "s1"); err == nil || r.fetches(t) == nil {
			t.Error("Refresh works after Run ended")
		}
		if err := r.RefreshFor(t.Context(), "s1", "f"); err == nil {
			t.Error("RefreshFor works after Run ended")
		}
		if got := r.fetches(t); len(got) != 0 {
			t.Errorf("counted %v: stopping is no failure of the Portal", got)
		}
		if err := r.Run(t.Context()); err == nil {
			t.Error("Run ran twice")
		}
		if r.Site("s1") == nil {
			t.Error("the keys are not readable any more")
		}
	})
}

// One scheduler for all: no goroutine and no timer for each site.
func TestTenThousandSitesShareOneScheduler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		sites := manySites(10_000)
		r := fakeRig(t, f, 10*time.Minute, sites...)
		doc := siteObject(false)
		for _, s := range sites {
			f.docs[s] = doc
		}
		before := runtime.NumGoroutine()
		defer r.run(t)()
		time.Sleep(5 * time.Minute)
		if got := runtime.NumGoroutine() - before; got > 2*concurrency+5 {
			t.Errorf("%d goroutines for 10,000 sites", got)
		}
		if err := r.Ready(); err != nil {
			t.Errorf("after five minutes: %d bytes of reasons", len(err.Error()))
		}
		time.Sleep(7 * time.Minute)
		if asked, _ := f.all(); len(asked) < 20_000 || len(asked) > 30_000 {
			t.Errorf("%d requests in 12 minutes, want two to three for each site", len(asked))
		}
	})
}

// An outage of the Portal is not told once for each site.
func TestOutageOfManySitesIsLoggedInFewLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		sites := manySites(500)
		r := fakeRig(t, f, time.Minute, sites...)
		for _, s := range sites {
			f.set(s, siteObject(false))
		}
		defer r.run(t)()
		time.Sleep(time.Minute)
		r.log.clear()
		for _, s := range sites {
			f.fail(s, refusal("the Portal", http.StatusBadGateway, nil))
		}
		time.Sleep(time.Hour)
		for _, s := range sites {
			f.fail(s, nil)
		}
		time.Sleep(10 * time.Minute)
		got := r.log.lines(t)
		if len(got) > 3*fewSites+10 {
			t.Errorf("%d lines", len(got))
		}
		if !slices.Contains(got, "WARN refresh from the portal fails for many sites") || !slices.Contains(got, "INFO refresh from the portal works again for all sites") {
			t.Errorf("logged %q", got)
		}
		synctest.Wait()
		if r.failing != 0 {
			t.Errorf("%d sites still count as failing", r.failing)
		}
	})
}

func TestReadyNamesEachSiteAndWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, time.Minute, "s1", "s2", "s3")
		f.set("s1", siteObject(false))
		f.set("s3", siteObject(true))
		defer r.run(t)()
		time.Sleep(10 * time.Second)
		err := r.Ready()
		if err == nil {
			t.Fatal("ready")
		}
		for _, want := range []string{"site s2: ", "404 (not_found)", "site s3: ", "(no_keys)"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
		if strings.Contains(err.Error(), "s1") || strings.Count(err.Error(), "\n") != 1 {
			t.Errorf("%q: want one line for each site that has no keys", err)
		}
		f.set("s2", siteObject(false))
		f.set("s3", siteObject(true, lasting("f")))
		time.Sleep(time.Minute)
		if err := r.Ready(); err != nil {
			t.Error(err)
		}
		f.fail("s1", refusal("the Portal", 500, nil))
		time.Sleep(10 * time.Minute)
		if err := r.Ready(); err != nil {
			t.Errorf("a failing refresh takes readiness away: %v", err)
		}
	})
}

func TestAgesInMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 24*time.Hour, "s1", "s2", "s3")
		time.Sleep(time.Minute)
		m := r.metrics(t)
		if got := m["kb_keysync_keyring_age_seconds"]; got != 60 {
			t.Errorf("age before any fetch: %v, want the 60 s since the start", got)
		}
		if _, has := m["kb_keysync_key_ends_seconds"]; has {
			t.Error("an end without any key")
		}
		now := time.Now()
		f.set("s1", siteObject(true, testKey{"f1", now.Add(-time.Hour), now.Add(time.Hour)}, testKey{"f2", now, now.Add(3 * time.Hour)}))
		f.set("s2", siteObject(true, testKey{"f3", now.Add(-time.Hour), now.Add(5 * time.Hour)}))
		f.set("s3", siteObject(false))
		for _, s := range []string{"s1", "s2", "s3"} {
			if err := r.Refresh(t.Context(), s); err != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Second)
		}
		m = r.metrics(t)
		if got := m["kb_keysync_keyring_age_seconds"]; got != 30 {
			t.Errorf("age %v, want that of the site fetched first", got)
		}
		if got, want := m["kb_keysync_key_ends_seconds"], (3*time.Hour - 30*time.Second).Seconds(); got != want {
			t.Errorf("ends in %v, want %v: the last key of the site that is first without one", got, want)
		}
		time.Sleep(4 * time.Hour)
		if got := r.metrics(t)["kb_keysync_key_ends_seconds"]; got >= 0 {
			t.Errorf("ends in %v, want a negative time after the end", got)
		}
	})
}
