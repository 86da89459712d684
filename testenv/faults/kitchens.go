package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
)

// misery is one way in which a Kitchen is of no use for a while.
type misery struct {
	name string
	// make draws a behaviour; canary is a text of the payload, for answers that repeat it.
	make func(rng *rand.Rand, canary string) kitchen.Behaviour
	// last strikes for good: the endpoint is stopped by it until the next start.
	last bool
}

// status answers so for as long as it lasts.
func status(code int, body string) misery {
	name := fmt.Sprint(code)
	if body != "" {
		name += " " + body
	}
	return misery{name: name, make: func(*rand.Rand, string) kitchen.Behaviour {
		return kitchen.Behaviour{Faults: []kitchen.Fault{{Status: code, Body: body}}}
	}}
}

// some answers so a few times, among healthy answers.
func some(f kitchen.Fault) func(*rand.Rand, string) kitchen.Behaviour {
	return func(rng *rand.Rand, _ string) kitchen.Behaviour {
		f.Share = 0.2 + 0.5*rng.Float64()
		return kitchen.Behaviour{Faults: []kitchen.Fault{f}}
	}
}

func seedError(code int, text string) string {
	return fmt.Sprintf(`{"errorCode":%d,"message":%q}`, code, text)
}

// miseries is every row of the table of failures, and what HTTP can do besides.
var miseries = []misery{
	{name: "slow", make: func(rng *rand.Rand, _ string) kitchen.Behaviour {
		return kitchen.Behaviour{Latency: kitchen.Latency{Base: between(rng, 20*time.Millisecond, 200*time.Millisecond), Jitter: 100 * time.Millisecond}}
	}},
	{name: "slower than an attempt, and late", make: func(*rand.Rand, string) kitchen.Behaviour {
		return kitchen.Behaviour{Latency: kitchen.Latency{Base: attemptTimeout - 50*time.Millisecond, Jitter: 100 * time.Millisecond, Max: 2 * attemptTimeout},
			Late: kitchen.Late{Share: 0.7, Delay: kitchen.Latency{Jitter: 50 * time.Millisecond, Max: lateMost}}}
	}},
	{name: "dead", make: func(*rand.Rand, string) kitchen.Behaviour { return kitchen.Refusing() }},
	{name: "hanging", make: func(*rand.Rand, string) kitchen.Behaviour {
		return kitchen.Behaviour{Faults: []kitchen.Fault{{Do: kitchen.Hang}}, Late: kitchen.Late{Share: 0.5, Delay: kitchen.Latency{Jitter: 50 * time.Millisecond, Max: lateMost}}}
	}},
	{name: "cooks, and resets before it answers", make: some(kitchen.Fault{Do: kitchen.Drop, Processed: true})},
	{name: "resets, cooks nothing", make: some(kitchen.Fault{Do: kitchen.Drop})},
	{name: "cooks, resets in the middle of the answer", make: some(kitchen.Fault{Do: kitchen.Reset, Processed: true, Body: strings.Repeat("x", 2000)})},
	{name: "resets in the middle of a 500", make: some(kitchen.Fault{Do: kitchen.Reset, Status: 500, Body: strings.Repeat("x", 2000)})},
	{name: "cooks, ends in the middle of the answer", make: some(kitchen.Fault{Do: kitchen.Truncate, Processed: true, Body: "{"})},
	{name: "cooks, stalls in the middle of the answer", make: some(kitchen.Fault{Do: kitchen.Stall, Processed: true, Body: "{"})},
	{name: "cooks, answers a megabyte", make: some(kitchen.Fault{Do: kitchen.Huge, Processed: true, Size: 1 << 20})},
	{name: "cooks, answers 201", make: some(kitchen.Fault{Status: 201, Processed: true})},
	{name: "cooks, answers 204", make: some(kitchen.Fault{Status: 204, Processed: true})},
	{name: "cooks, answers 500", make: some(kitchen.Fault{Status: 500, Processed: true})},
	{name: "answers with the order itself", make: func(_ *rand.Rand, canary string) kitchen.Behaviour {
		return kitchen.Behaviour{Faults: []kitchen.Fault{
			{Status: 200, Processed: true, Share: 0.5, Body: `{"echo":"` + canary + `"}`, Header: http.Header{"X-Echo": {canary}}},
			{Status: 422, Share: 0.5, Body: canary, Header: http.Header{"Content-Type": {canary}}}}}
	}},
	{name: "loses answers, says 409 to repeats", make: func(*rand.Rand, string) kitchen.Behaviour {
		return kitchen.Behaviour{Repeat: 409, Faults: []kitchen.Fault{{Do: kitchen.Drop, Processed: true, Share: 0.4}}}
	}},
	{name: "409", make: some(kitchen.Fault{Status: 409})},
	{name: "redirects", make: some(kitchen.Fault{Do: kitchen.Redirect})},
	{name: "redirects for good", make: some(kitchen.Fault{Do: kitchen.Redirect, Status: 301})},
	{name: "503 with Retry-After in seconds", make: some(kitchen.Fault{Status: 503, RetryAfter: time.Second})},
	{name: "429 with Retry-After as a date", make: some(kitchen.Fault{Status: 429, RetryAfter: time.Second, RetryAfterDate: true})},
	{name: "503 with a Retry-After far away", make: func(*rand.Rand, string) kitchen.Behaviour {
		return kitchen.Behaviour{Faults: []kitchen.Fault{{Status: 503, RetryAfter: time.Hour, Next: 1}}}
	}},
	{name: "410", last: true, make: func(*rand.Rand, string) kitchen.Behaviour {
		return kitchen.Behaviour{Faults: []kitchen.Fault{{Status: 410, Next: 1}}}
	}},
	status(400, seedError(1, "Incorrect security headers")), status(400, seedError(2, "Unable to decrypt payload")),
	status(400, seedError(3, "Security credential mismatch")), status(400, ""), status(400, `{"errorCode":"3"}`),
	status(401, ""), status(403, ""), status(404, ""), status(405, ""), status(408, ""), status(413, ""), status(415, ""), status(418, ""),
	status(422, ""), status(425, ""), status(429, ""), status(500, ""), status(501, ""), status(502, ""), status(503, ""), status(504, ""), status(599, ""),
}

var kitchens = scenario{
	name: "kitchen",
	about: `Kitchens that are slow, dead, hang, reset, answer late, half, too much, or with each code of the table of failures
(Retry-After in both forms); events that expire meanwhile; and a forger who publishes altered events on the hub.`,
	plan: func(rng *rand.Rand) plan {
		p := plan{
			sites: mixed(9), load: 3500 * time.Millisecond, rate: 30, calm: true,
			deadlines: map[string]time.Duration{"order": 2500 * time.Millisecond, "alert": 1500 * time.Millisecond},
			within: func(site string) time.Duration {
				if site == siteName(1) || site == siteName(4) {
					return time.Second
				}
				return 0
			},
			kitchen: func(c *kitchen.Config) { c.Separate = true },
		}
		// Every misery comes to some site in about two runs; the last site stays healthy, and
		// must not notice anything.
		deck := slices.Clone(miseries)
		rng.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		sites := slices.Sorted(maps.Keys(p.sites))
		for _, site := range sites[:len(sites)-1] {
			at := between(rng, 0, 500*time.Millisecond)
			for at < p.load-600*time.Millisecond && len(deck) > 0 {
				m := deck[0]
				deck = deck[1:]
				long := between(rng, 300*time.Millisecond, 900*time.Millisecond)
				p.steps = append(p.steps, spoil(rng, at, site, m)...)
				if m.last {
					break
				}
				p.steps = append(p.steps, heal(at+long, site))
				at += long + between(rng, 200*time.Millisecond, 700*time.Millisecond)
			}
		}
		// No more than the bridge keeps dead letters of.
		for _, n := range []int{2, 2, 1} {
			p.steps = append(p.steps, forge(rng, between(rng, 500*time.Millisecond, p.load), n))
		}
		slices.SortStableFunc(p.steps, func(a, b step) int { return int(a.at - b.at) })
		return p
	},
}

// spoil gives a site's Kitchen a bad behaviour. Whether it meets anybody is seen when it
// is healed, or at the end.
func spoil(rng *rand.Rand, at time.Duration, site string, m misery) []step {
	seed := rng.Uint64()
	return []step{{at: at, what: fmt.Sprintf("%s: Kitchen %s", site, m.name), do: func(_ context.Context, r *run) (int, error) {
		return r.behave(site, m.make(rand.New(rand.NewPCG(seed, 2)), r.canary()))
	}}}
}

func heal(at time.Duration, site string) step {
	return step{at: at, what: site + ": Kitchen well again", do: func(_ context.Context, r *run) (int, error) {
		return r.behave(site, kitchen.Behaviour{})
	}}
}

// conduct is how a Kitchen behaves, and what it had counted when that began.
type conduct struct {
	behaviour kitchen.Behaviour
	requests  uint64
	faults    uint64
}

// behave sets a Kitchen's behaviour and returns how many requests the one before it struck.
func (r *run) behave(site string, b kitchen.Behaviour) (struck int, err error) {
	struck = r.struck(site)
	if err := r.stack.Kitchen.Set(site, b); err != nil {
		return struck, err
	}
	requests, faults := r.counts(site)
	r.conducts[site] = conduct{b, requests, faults}
	return struck, nil
}

func (r *run) counts(site string) (requests, faults uint64) {
	c := r.stack.Kitchen.Stats().Sites[site]
	for _, n := range c.Faults {
		faults += n
	}
	return c.Requests, faults
}

// struck counts the requests that met the site's present behaviour, if that is a bad one.
func (r *run) struck(site string) int {
	c, ok := r.conducts[site]
	requests, faults := r.counts(site)
	switch {
	case !ok:
		return 0
	case c.behaviour.Refuse:
		return 1 // the connections that were refused left no trace
	case len(c.behaviour.Faults) > 0:
		return int(faults - c.faults)
	case c.behaviour.Latency != (kitchen.Latency{}):
		return int(requests - c.requests)
	}
	return 0
}
