package keysync

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestRefreshIsSharedBySimultaneousCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		f.delay = time.Second
		r := fakeRig(t, f, 0, "s1")
		f.set("s1", siteObject(true, lasting("f1")))
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if err := r.Refresh(t.Context(), "s1"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := f.count("s1"); got != 1 {
			t.Errorf("%d requests for 100 callers", got)
		}
	})
}

func TestRefreshWithinASecondReturnsTheLastOutcome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 0, "s1")
		f.set("s1", siteObject(true, lasting("f1")))
		refresh := func(wantErr bool, wantCount int) {
			t.Helper()
			begin := time.Now()
			if err := r.Refresh(t.Context(), "s1"); (err != nil) != wantErr {
				t.Errorf("err %v, want an error: %v", err, wantErr)
			}
			if d := time.Since(begin); d > 0 {
				t.Errorf("waited %v", d)
			}
			if got := f.count("s1"); got != wantCount {
				t.Errorf("%d requests so far, want %d", got, wantCount)
			}
		}
		refresh(false, 1)
		f.fail("s1", refusal("the Portal", 500, nil))
		time.Sleep(999 * time.Millisecond)
		refresh(false, 1)
		time.Sleep(time.Millisecond)
		refresh(true, 2)
		f.fail("s1", nil)
		refresh(true, 2)
		time.Sleep(time.Second)
		refresh(false, 3)
	})
}

func TestRefreshOfAnUnconfiguredSite(t *testing.T) {
	r := fakeRig(t, newFakePortal(), 0, "s1")
	for name, err := range map[string]error{"Refresh": r.Refresh(t.Context(), "s2"), "RefreshFor": r.RefreshFor(t.Context(), "s2", "f")} {
		if !errors.Is(err, ErrNoSite) || !strings.Contains(err.Error(), `"s2"`) {
			t.Errorf("%s: %v, want ErrNoSite and the name", name, err)
		}
	}
}

// I9: an unknown fingerprint costs one refresh.
func TestRefreshForUnknownFingerprintAsksOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 0, "s1")
		f.set("s1", siteObject(true, lasting("f1")))
		ask := func(fp string, want error, wantCount int) {
			t.Helper()
			if err := r.RefreshFor(t.Context(), "s1", fp); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", fp, err, want)
			}
			if got := f.count("s1"); got != wantCount {
				t.Errorf("%s: %d requests so far, want %d", fp, got, wantCount)
			}
		}
		ask("f1", nil, 1) // not known yet, but the Portal has it
		ask("f1", nil, 1)
		time.Sleep(time.Second)
		ask("nobody's", ErrStillUnknown, 2)
		for range 29 {
			ask("nobody's", ErrStillUnknown, 2)
			time.Sleep(time.Second)
		}
		time.Sleep(time.Second)
		ask("nobody's", ErrStillUnknown, 3) // the memory has an end

		// A flood of different ones costs a request a second, and hides no real key.
		for i := range 1000 {
			ask(fmt.Sprint("random ", i), ErrStillUnknown, 3)
		}
		time.Sleep(time.Second)
		f.set("s1", siteObject(true, lasting("f1"), lasting("f2")))
		ask("random again", ErrStillUnknown, 4)
		ask("f2", nil, 4)

		// One asked about during the second was not looked for, so it is not remembered.
		ask("f3", ErrStillUnknown, 4)
		f.set("s1", siteObject(true, lasting("f2"), lasting("f3")))
		time.Sleep(time.Second)
		ask("f3", nil, 5)
	})
}

func TestRefreshForNamesNoKeyCanHave(t *testing.T) {
	f := newFakePortal()
	r := fakeRig(t, f, 0, "s1")
	for _, fp := range []string{strings.Repeat("f", 129), "kb:b1", "a\x00b"} {
		if err := r.RefreshFor(t.Context(), "s1", fp); !errors.Is(err, ErrStillUnknown) {
			t.Errorf("%.10q: %v, want ErrStillUnknown", fp, err)
		}
	}
	if got := f.count("s1"); got != 0 {
		t.Errorf("%d requests, want none", got)
	}
}

func TestRefreshForWhenThePortalCannotTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 0, "s1")
		f.fail("s1", refusal("the Portal", http.StatusBadGateway, nil))
		for range 2 { // the second within the second
			if err := r.RefreshFor(t.Context(), "s1", "f1"); err == nil || errors.Is(err, ErrStillUnknown) {
				t.Errorf("%v, want an error that is not ErrStillUnknown", err)
			}
		}
		f.fail("s1", nil)
		f.set("s1", siteObject(true, lasting("f1")))
		time.Sleep(time.Second)
		if err := r.RefreshFor(t.Context(), "s1", "f1"); err != nil {
			t.Errorf("once the Portal answers: %v", err)
		}
	})
}

// A door also asks for a key that it holds and that is not valid: the Portal may have
// given it another end.
func TestRefreshForAKeyOutsideItsValidity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 0, "s1")
		now := time.Now()
		ended := testKey{"f1", now.Add(-2 * time.Hour), now.Add(-time.Hour)}
		f.set("s1", siteObject(true, ended))
		if err := r.RefreshFor(t.Context(), "s1", "f1"); err != nil {
			t.Errorf("first: %v, want nil: look again", err)
		}
		time.Sleep(2 * time.Second)
		if err := r.RefreshFor(t.Context(), "s1", "f1"); !errors.Is(err, ErrStillUnknown) {
			t.Errorf("again: %v, want ErrStillUnknown", err)
		}
		if got := f.count("s1"); got != 1 {
			t.Errorf("%d requests, want one", got)
		}
		f.set("s1", siteObject(true, testKey{"f1", ended.after, now.Add(time.Hour)}))
		time.Sleep(unknownFor)
		if err := r.RefreshFor(t.Context(), "s1", "f1"); err != nil || !usableNow(r.Site("s1"), "f1") {
			t.Errorf("after its end was moved: %v", err)
		}
	})
}

// A fetch that was under way may have asked before the key was there.
func TestRefreshForAsksAgainAfterAFetchThatWasUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 0, "s1")
		f.set("s1", siteObject(true, lasting("f1")))
		f.delay = 2 * time.Second
		real := r.get
		hold := make(chan struct{})
		var asked atomic.Int32
		r.get = func(ctx context.Context, site, etag string) (answer, error) {
			if asked.Add(1) > 1 {
				return real(ctx, site, etag)
			}
			a := answer{body: siteObject(true, lasting("f1"))} // as of the question
			<-hold
			return a, nil
		}
		stop := r.run(t)
		defer stop()
		time.Sleep(5 * time.Second)
		f.set("s1", siteObject(true, lasting("f1"), lasting("f2")))
		result := make(chan error, 1)
		go func() { result <- r.RefreshFor(t.Context(), "s1", "f2") }()
		synctest.Wait()
		close(hold)
		if err := <-result; err != nil {
			t.Errorf("%v, want the key of the second fetch", err)
		}
	})
}

// I9: a site that hangs blocks nobody else.
func TestRefreshOfOneSiteDoesNotWaitForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakePortal()
		r := fakeRig(t, f, 0, append(manySites(20), "quick")...)
		real := r.get
		r.get = func(ctx context.Context, site, etag string) (answer, error) {
			if site != "quick" {
				<-ctx.Done()
				return answer{}, ctx.Err()
			}
			return real(ctx, site, etag)
		}
		f.set("quick", siteObject(true, lasting("f1")))
		defer r.run(t)()
		time.Sleep(time.Minute)
		begin := time.Now()
		if err := r.RefreshFor(t.Context(), "quick", "f1"); err != nil || time.Since(begin) > 0 {
			t.Errorf("%v after %v, while all places of the schedule hang", err, time.Since(begin))
		}
	})
}

func TestMemoryOfUnknownFingerprintsIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := fakeRig(t, newFakePortal(), 0, "s1")
		for i := range 3 * maxUnknown {
			id := fmt.Sprint("s1\x00", i)
			r.addUnknown(id)
			if !r.isUnknown(id) {
				t.Fatalf("entry %d was not remembered", i)
			}
			if got := len(r.unknown.newer) + len(r.unknown.older); got > maxUnknown {
				t.Fatalf("%d remembered, want at most %d", got, maxUnknown)
			}
		}
		time.Sleep(unknownFor)
		if r.isUnknown(fmt.Sprint("s1\x00", 3*maxUnknown-1)) {
			t.Error("remembered for longer than its time")
		}
	})
}
