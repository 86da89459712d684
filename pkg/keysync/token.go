package keysync

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// tokens holds the Portal token: one for all sites, asked for by one caller at a time
// while the others wait or go on with the one that still lives.
type tokens struct {
	// Fixed at birth.
	life   time.Duration // 0: it ends only when the Portal says so
	obtain func(context.Context) (envelope.Secret, error)
	turn   chan struct{} // held by whoever obtains

	mu sync.Mutex
	// Guarded by mu.
	token    envelope.Secret // "" for none
	got      time.Time
	dropped  time.Time // when a 401 last cost a token
	failures int       // in a row
	retry    time.Time // no attempt before
	err      error     // of the latest attempt
}

// dropEvery is how often a 401 may cost an issued token. Without a bound, one site that
// always gets 401 would have a token issued at every poll.
const dropEvery = time.Minute

func newTokens(life time.Duration, obtain func(context.Context) (envelope.Secret, error)) *tokens {
	return &tokens{life: life, obtain: obtain, turn: make(chan struct{}, 1)}
}

// get returns the token, a new one if need be. Within the back-off after a failure it
// returns that failure at once.
func (s *tokens) get(ctx context.Context) (envelope.Secret, error) {
	if token, err, settled := s.look(false); settled {
		return token, err
	}
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	defer func() { <-s.turn }()
	// Whoever had the turn before may have settled it.
	if token, err, settled := s.look(true); settled {
		return token, err
	}
	token, err := s.obtain(ctx)
	if err != nil && ctx.Err() != nil {
		return "", context.Cause(ctx) // the caller left; that says nothing about the endpoint
	}
	return s.keep(token, err)
}

// look tells what get can return without asking anybody.
func (s *tokens) look(myTurn bool) (_ envelope.Secret, _ error, settled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	waiting := now.Before(s.retry)
	switch {
	case s.token == "" || s.life > 0 && now.Sub(s.got) >= s.life:
		return "", s.err, waiting
	case s.life == 0 || now.Sub(s.got) < s.life-tokenEarly:
		return s.token, nil, true
	}
	// It lives, and is due to be renewed: one caller does that, the others do not wait.
	return s.token, nil, waiting || !myTurn && len(s.turn) > 0
}

func (s *tokens) keep(token envelope.Secret, err error) (envelope.Secret, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.err = err
	if err == nil {
		s.token, s.got, s.failures, s.retry = token, now, 0, time.Time{}
		return token, nil
	}
	wait := backoff(s.failures, time.Second, time.Minute)
	if bad, ok := errors.AsType[*fetchError](err); ok {
		wait = max(wait, bad.retryAfter)
	}
	s.failures++
	s.retry = now.Add(wait)
	if s.token != "" && now.Sub(s.got) < s.life {
		return s.token, nil
	}
	return "", err
}

// drop gives up a token that was answered with 401, and reports whether get may now
// have another one.
func (s *tokens) drop(token envelope.Secret) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token != token {
		return true // somebody was faster
	}
	now := time.Now()
	if s.life > 0 && now.Sub(s.dropped) < dropEvery {
		return false
	}
	s.token, s.dropped = "", now
	return true
}
