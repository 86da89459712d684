package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

var portals = scenario{
	name: "portal",
	about: `Keys rotate, once or several times in a row, and end; encryption is switched on and off; the Portal is away, and
answers about single sites, and about tokens, in every bad way the stub knows. Nothing waits for it but what needs it.`,
	plan: func(rng *rand.Rand) plan {
		p := plan{
			sites: mixed(8), load: 3500 * time.Millisecond, rate: 30, calm: true, integrator: rng.IntN(2) == 0,
			deadlines: map[string]time.Duration{"order": 3 * time.Second, "alert": 3 * time.Second},
			behaviour: kitchen.Behaviour{Latency: kitchen.Latency{Base: 2 * time.Millisecond, Jitter: 10 * time.Millisecond}},
			edge:      map[string]any{"portal": map[string]any{"timeout": "300ms"}},
			bridge:    map[string]any{"portal": map[string]any{"timeout": "300ms"}},
		}
		sites := slices.Sorted(maps.Keys(p.sites))
		end := p.load - 300*time.Millisecond
		for i, site := range sites {
			for at := between(rng, 100*time.Millisecond, 900*time.Millisecond); at < end; at += between(rng, 500*time.Millisecond, 1500*time.Millisecond) {
				p.steps = append(p.steps, rotate(at, site, 1+rng.IntN(5)/4+rng.IntN(5)/4, i < 2 && rng.IntN(2) == 0))
			}
		}
		// Bad answers at the sites whose keys do not end: there a key must always be left.
		deck := portal.Kinds()
		if p.integrator {
			// A 401 costs a token once a minute; here that is kept for the one that is revoked.
			deck = slices.DeleteFunc(deck, func(k portal.Kind) bool { return k == portal.Unauthorized })
		}
		rng.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		for _, site := range sites[2:] {
			for at := between(rng, 0, 700*time.Millisecond); at < end && len(deck) > 0; {
				long := between(rng, 300*time.Millisecond, 900*time.Millisecond)
				p.steps = append(p.steps, portalFault(at, site, deck[0]), portalFault(at+long, site, portal.None))
				deck = deck[1:]
				at += long + between(rng, 100*time.Millisecond, 700*time.Millisecond)
			}
		}
		away := between(rng, 300*time.Millisecond, end-time.Second)
		p.steps = append(p.steps, portalAway(away, between(rng, 200*time.Millisecond, 700*time.Millisecond)))
		for _, site := range []string{sites[2], sites[rng.IntN(len(sites))]} {
			at := between(rng, 200*time.Millisecond, end-800*time.Millisecond)
			on := !p.sites[site].Encryption
			p.steps = append(p.steps, encryption(at, site, on), encryption(at+between(rng, 400*time.Millisecond, 800*time.Millisecond), site, !on))
		}
		if p.integrator {
			p.steps = append(p.steps, revoke(between(rng, 200*time.Millisecond, end)))
			at := between(rng, 0, end-time.Second)
			p.steps = append(p.steps, portalFault(at, portal.TokenEndpoint, pick(rng, []portal.Kind{portal.Unauthorized, portal.ServerError, portal.HangUp, portal.HTML})),
				portalFault(at+between(rng, 200*time.Millisecond, 800*time.Millisecond), portal.TokenEndpoint, portal.None))
		}
		slices.SortStableFunc(p.steps, func(a, b step) int { return int(a.at - b.at) })
		return p
	},
}

// endsIn is how long a key stays valid that is told to end: long enough for a program
// that polls, and finds the Portal away, to get the next one.
const endsIn = 2500 * time.Millisecond

// rotate gives a site new keys; with ends, the one before them ends soon.
func rotate(at time.Duration, site string, times int, ends bool) step {
	what := fmt.Sprintf("%s: new key", site)
	if times > 1 {
		what = fmt.Sprintf("%s: %d new keys in a row", site, times)
	}
	if ends {
		what += ", the one before ends"
	}
	return step{at: at, what: what, do: func(_ context.Context, r *run) (int, error) {
		defer r.noteKeys()
		for range times {
			r.noteKeys()
			if _, err := r.stack.Portal.Rotate(site); err != nil {
				return 0, err
			}
		}
		if !ends {
			return 1, nil
		}
		keys := r.stack.Portal.Keys(site)
		keys[0].ValidUntil = time.Now().Add(endsIn)
		return 1, r.stack.Portal.SetKeys(site, keys...)
	}}
}

// portalFault spoils the Portal's answers about a site; None makes them good again.
func portalFault(at time.Duration, site string, kind portal.Kind) step {
	what := fmt.Sprintf("%s: Portal answers badly: %s", site, kind)
	if kind == portal.None {
		what = site + ": Portal answers well again"
	}
	return step{at: at, what: what, do: func(_ context.Context, r *run) (int, error) {
		f := portal.Fault{Kind: kind}
		switch kind {
		case portal.TooManyRequests:
			f.RetryAfter = "1"
		case portal.Unavailable:
			f.RetryAfter = time.Now().Add(time.Second).UTC().Format(http.TimeFormat)
		}
		return r.spoilPortal(site, f), nil
	}}
}

// spoilPortal sets a fault and returns how many requests met the one before it.
func (r *run) spoilPortal(site string, f portal.Fault) (struck int) {
	asked := r.stack.Portal.Fetches(site)
	if before, ok := r.spoiled[site]; ok {
		struck = asked - before
	}
	delete(r.spoiled, site)
	if f.Kind != portal.None {
		r.spoiled[site] = asked
	}
	r.stack.Portal.SetFault(site, f)
	return struck
}

// portalWell ends every fault of the Portal.
func (r *run) portalWell() error {
	for _, site := range slices.Sorted(maps.Keys(r.spoiled)) {
		r.faults += r.spoilPortal(site, portal.Fault{})
	}
	return r.stack.Portal.Up()
}

func portalAway(at, long time.Duration) step {
	return step{at: at, what: fmt.Sprintf("Portal away for %v", long), do: func(ctx context.Context, r *run) (int, error) {
		r.stack.Portal.Down()
		sleep(ctx, long)
		return 1, r.stack.Portal.Up()
	}}
}

func encryption(at time.Duration, site string, on bool) step {
	return step{at: at, what: fmt.Sprintf("%s: encryption %v", site, map[bool]string{true: "on", false: "off"}[on]), do: func(_ context.Context, r *run) (int, error) {
		return 1, r.stack.SetEncryption(site, on)
	}}
}

func revoke(at time.Duration) step {
	return step{at: at, what: "the Portal's issued tokens are worthless", do: func(_ context.Context, r *run) (int, error) {
		if r.stack.Portal.Stats().Tokens == 0 {
			return 0, errors.New("no token was ever asked for")
		}
		r.stack.Portal.RevokeTokens()
		return 1, nil
	}}
}
