package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// scenario is one family of faults. What a run of it does is drawn from its seed alone.
type scenario struct {
	name  string
	about string
	plan  func(rng *rand.Rand) plan
}

// scenarios in the order of -list.
var scenarios = []scenario{crash, kitchens, portals, sockets}

func findScenario(name string) (scenario, error) {
	for _, s := range scenarios {
		if s.name == name {
			return s, nil
		}
	}
	return scenario{}, fmt.Errorf("no scenario %q; -list shows them", name)
}

// plan is one run: who takes part, how they are set, and what goes wrong when.
type plan struct {
	sites map[string]stack.Site
	// apart runs the hub as a process of its own.
	apart bool
	// integrator is the Stack's.
	integrator bool
	// load is how long POS send, rate how many messages a second at each site.
	load time.Duration
	rate float64
	// deadlines by kind, of the edge.
	deadlines map[string]time.Duration
	// within shortens the deadline at a site, nil: nowhere.
	within func(site string) time.Duration
	// edge and bridge are further settings, in the form of the programs' files.
	edge, bridge map[string]any
	kitchen      func(*kitchen.Config)
	behaviour    kitchen.Behaviour
	// calm is Evidence.Calm.
	calm    bool
	screens []screenPlan
	steps   []step
}

// String says what is not a step.
func (p *plan) String() string {
	where := "in the bridge"
	if p.apart {
		where = "apart"
	}
	return fmt.Sprintf("%d sites, %v messages a second at each, %d screens, hub %s", len(p.sites), p.rate, len(p.screens), where)
}

// screenPlan is one screen.
type screenPlan struct {
	site, name string
	deflate    bool
}

// step is one thing that happens while POS send.
type step struct {
	at   time.Duration // since the first message; a step waits for the one before it
	what string
	// do returns how many faults struck: a fault that met nobody is none.
	do func(ctx context.Context, r *run) (struck int, err error)
}

// settle and attempt are the programs' times in every scenario, short so that a run is.
const (
	settle         = 300 * time.Millisecond
	attemptTimeout = 600 * time.Millisecond
	// lateMost is how long after its client gave up a stub Kitchen may go on: less than
	// settle, or what the bridge promises could not hold.
	lateMost = 150 * time.Millisecond
)

// quick are the settings that make a run short: the programs' own times, far below what an
// operator would choose.
func quick(p *plan) (edge, bridge map[string]any) {
	kinds := map[string]any{}
	longest := map[string]any{}
	for kind, d := range p.deadlines {
		kinds[kind] = map[string]any{"deadline": d.String()}
		longest[kind] = d.String()
	}
	edge = map[string]any{"commit_wait": "700ms", "wait": "300ms", "shutdown": "3s", "kinds": kinds}
	bridge = map[string]any{"delivery": map[string]any{
		"attempt_timeout": attemptTimeout.String(), "settle": settle.String(),
		"backoff_min": "20ms", "backoff_max": "200ms", "retry_after_max": "1s", "drain_timeout": "3s",
		"max_deadline": longest,
	}, "screens": map[string]any{
		"heartbeat": screenTimes.Heartbeat.String(), "stale": screenTimes.Stale.String(), "stale_close": screenTimes.StaleClose.String(),
		"write_timeout": screenTimes.WriteTimeout.String(), "drain": "1s", "queue_frames": 64,
	}}
	return edge, bridge
}

// screenTimes: the hub's own heartbeat to the gate is every 500 ms and no setting.
var screenTimes = ScreenTimes{Heartbeat: 200 * time.Millisecond, Stale: 1200 * time.Millisecond, StaleClose: 2 * time.Second, WriteTimeout: time.Second}

// mixed are n sites: both profiles, some without encryption, some open as in the seed.
func mixed(n int) map[string]stack.Site {
	sites := map[string]stack.Site{}
	for i := range n {
		sites[siteName(i)] = stack.Site{Profile: []string{"a256gcm", "a256ctr"}[i%2], Encryption: i%3 != 2, Open: i%4 == 3}
	}
	return sites
}

func siteName(i int) string { return fmt.Sprintf("store-%d", i) }

// posOf says how the i-th site's POS sends. All that is random in it comes from the seed.
func posOf(i int, site stack.Site, cfg *pos.Config) {
	if site.Encryption && i%2 == 1 {
		cfg.Mode = pos.Encrypted
	}
	cfg.IdempotencyKeys = true
	switch i % 3 {
	case 0:
		cfg.Wait = -1 // 202 at once
	case 1:
		cfg.Wait = time.Second
	}
	cfg.Concurrency = 8
	cfg.Timeout = 3 * time.Second
	cfg.Attempts, cfg.Backoff, cfg.MaxBackoff = 40, 40*time.Millisecond, 250*time.Millisecond
	cfg.Grace = 3 * time.Second
	cfg.Poll, cfg.PollLimit = 100*time.Millisecond, 20*time.Second
}

// between draws a duration.
func between(rng *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(rng.Int64N(int64(most-least)+1))
}

func pick[T any](rng *rand.Rand, of []T) T { return of[rng.IntN(len(of))] }
