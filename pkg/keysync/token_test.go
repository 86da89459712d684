package keysync

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const day = 24 * time.Hour

// issuer hands out numbered tokens; owned by the test, whose bubble runs one caller at a
// time through it.
type issuer struct {
	issued int
	err    error
	delay  time.Duration
}

func (i *issuer) obtain(ctx context.Context) (envelope.Secret, error) {
	select {
	case <-time.After(i.delay):
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	if i.err != nil {
		return "", i.err
	}
	i.issued++
	return envelope.Secret(fmt.Sprint("token ", i.issued)), nil
}

func TestTokenIsKeptTwentyDaysAndRenewedBeforeItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{}
		s := newTokens(tokenLife, i.obtain)
		get := func(want string, wantErr error) {
			t.Helper()
			got, err := s.get(t.Context())
			if got.Reveal() != want || !errors.Is(err, wantErr) {
				t.Errorf("after %d issued: %q %v, want %q %v", i.issued, got.Reveal(), err, want, wantErr)
			}
		}
		get("token 1", nil)
		time.Sleep(20*day - time.Second)
		get("token 1", nil)
		time.Sleep(time.Second)
		get("token 2", nil)

		// An endpoint that fails on the last day costs nothing; after it, everything.
		i.err = refused(tokenFailed, "down")
		time.Sleep(20 * day)
		for range 23 {
			get("token 2", nil)
			time.Sleep(time.Hour)
		}
		time.Sleep(time.Hour)
		get("", i.err)
		i.err = nil
		time.Sleep(time.Minute)
		get("token 3", nil)
	})
}

func TestTokenFailureIsReturnedDuringItsBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		down := &fetchError{reason: tokenFailed, text: "down", retryAfter: 30 * time.Second}
		s := newTokens(tokenLife, func(context.Context) (envelope.Secret, error) { asked++; return "", down })
		for range 29 {
			if _, err := s.get(t.Context()); !errors.Is(err, down) {
				t.Errorf("%v, want the failure", err)
			}
			time.Sleep(time.Second)
		}
		if asked != 1 {
			t.Errorf("asked %d times within Retry-After", asked)
		}
		time.Sleep(time.Second)
		if _, err := s.get(t.Context()); err == nil || asked != 2 {
			t.Errorf("asked %d times after it: %v", asked, err)
		}
	})
}

func TestTokenIsObtainedByOneCallerForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: time.Second}
		s := newTokens(tokenLife, i.obtain)
		all := func(wait time.Duration, want ...string) {
			t.Helper()
			begin := time.Now()
			var wg sync.WaitGroup
			got := map[string]int{}
			var mu sync.Mutex
			for range 50 {
				wg.Go(func() {
					token, err := s.get(t.Context())
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					got[token.Reveal()]++
					mu.Unlock()
				})
			}
			wg.Wait()
			if d := time.Since(begin); d != wait {
				t.Errorf("took %v, want %v", d, wait)
			}
			if len(got) != len(want) {
				t.Errorf("tokens %v, want %v", got, want)
			}
			for _, w := range want {
				if got[w] == 0 {
					t.Errorf("tokens %v, want %v", got, want)
				}
			}
		}
		all(time.Second, "token 1")
		time.Sleep(20 * day)
		// One renews, which takes its second; the others go on with what still lives.
		all(time.Second, "token 1", "token 2")
		all(0, "token 2")
	})
}

func TestTokenCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{delay: time.Minute}
		s := newTokens(tokenLife, i.obtain)
		why := errors.New("left")
		ctx, cancel := context.WithCancelCause(t.Context())
		results := make(chan error, 2)
		for range 2 { // one obtains, one waits for its turn
			go func() {
				_, err := s.get(ctx)
				results <- err
			}()
		}
		synctest.Wait()
		cancel(why)
		for range 2 {
			if err := <-results; !errors.Is(err, why) {
				t.Errorf("%v, want the cause", err)
			}
		}
		if token, err := s.get(t.Context()); err != nil || token != "token 1" {
			t.Errorf("the next caller: %q %v: leaving counted as a failure", token.Reveal(), err)
		}
	})
}

func TestTokenIsDroppedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &issuer{}
		s := newTokens(tokenLife, i.obtain)
		get := func() envelope.Secret {
			t.Helper()
			token, err := s.get(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		first := get()
		for range 2 { // two requests with the same token may both meet 401
			if !s.drop(first) {
				t.Error("the first 401 does not cost the token")
			}
		}
		second := get()
		if !s.drop(first) {
			t.Error("a late 401 of an old token is not told that there is a new one")
		}
		if s.drop(second) {
			t.Error("a token was given up within a minute of the one before")
		}
		time.Sleep(dropEvery)
		if !s.drop(second) || get() == second {
			t.Error("a token was not given up after a minute")
		}
	})
}

func TestIsToken(t *testing.T) {
	for text, want := range map[string]bool{
		"abc": true, "eyJh.eyJz.sig-_": true, "a+b/c==": true, "id:secret": true,
		"": false, "two words": false, `{"token":"x"}`: false, "<html>": false, "a\nb": false, "a\x00": false, "é": false,
	} {
		if got := isToken(text); got != want {
			t.Errorf("isToken(%q) = %v", text, got)
		}
	}
}
