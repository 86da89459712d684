package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
)

var sockets = scenario{
	name: "sockets",
	about: `Screens in the seed's dialect, some with compression: cut, and too slow to read; the hub killed or frozen for shorter
and longer than the gate waits, the bridge killed, keys rotated, events forged. A connected screen misses nothing in
silence, and hears isAlive? only while that is so.`,
	plan: func(rng *rand.Rand) plan {
		p := plan{
			sites: mixed(3), apart: rng.IntN(4) > 0, load: 4500 * time.Millisecond, rate: 90,
			deadlines: map[string]time.Duration{"order": time.Minute, "alert": time.Minute},
			behaviour: kitchen.Behaviour{Latency: kitchen.Latency{Base: time.Millisecond, Jitter: 3 * time.Millisecond}},
			bridge:    map[string]any{"screens": map[string]any{"queue_frames": 16}},
		}
		sites := slices.Sorted(maps.Keys(p.sites))
		for _, site := range sites {
			for n := range screensEach {
				p.screens = append(p.screens, screenPlan{site: site, name: screenName(len(p.screens)), deflate: n == 1})
			}
		}
		for at := between(rng, 100*time.Millisecond, 500*time.Millisecond); at < p.load-time.Second; at += between(rng, 100*time.Millisecond, 500*time.Millisecond) {
			n := rng.IntN(len(p.screens))
			if rng.IntN(2) == 0 {
				p.steps = append(p.steps, cutScreen(at, n))
			} else {
				p.steps = append(p.steps, stallScreen(at, n, min(between(rng, 200*time.Millisecond, 2*time.Second), p.load-at)))
			}
		}
		for range 2 {
			p.steps = append(p.steps, rotate(between(rng, 0, p.load), pick(rng, sites), 1, false))
		}
		// Before the trouble with the hub: an edge that does not know whether it stored an event
		// would find a forged one in its place, and wait.
		p.steps = append(p.steps, forge(rng, between(rng, 300*time.Millisecond, 450*time.Millisecond), 4))
		// One long trouble with the hub, in which gate and screens must notice it, and a short one.
		at := between(rng, 500*time.Millisecond, 900*time.Millisecond)
		long := between(rng, 100*time.Millisecond, screenTimes.StaleClose+900*time.Millisecond)
		held, killed := theBridge, []program{theBridge}
		if p.apart {
			held, killed[0] = theHub, pick(rng, []program{theHub, theBridge})
		}
		p.steps = append(p.steps, hold(at, held, long, rng.IntN(2) == 0), kill(rng, at+long+between(rng, 300*time.Millisecond, time.Second), killed))
		slices.SortStableFunc(p.steps, func(a, b step) int { return int(a.at - b.at) })
		return p
	},
}

const screensEach = 3

// screenName names the n-th screen.
func screenName(n int) string { return fmt.Sprintf("%s/%d", siteName(n/screensEach), n%screensEach) }

func cutScreen(at time.Duration, n int) step {
	return step{at: at, what: fmt.Sprintf("cut screen %s", screenName(n)), do: func(_ context.Context, r *run) (int, error) {
		if r.screens[n].cut() {
			return 1, nil
		}
		return 0, nil
	}}
}

func stallScreen(at time.Duration, n int, long time.Duration) step {
	return step{at: at, what: fmt.Sprintf("screen %s does not read for %v", screenName(n), long), do: func(_ context.Context, r *run) (int, error) {
		over := r.screens[n].stall(long)
		r.later(func() error {
			<-over
			return nil
		})
		return 1, nil
	}}
}

// hold keeps a program from working for a while: killed or frozen. It does not wait: other
// things go wrong meanwhile.
func hold(at time.Duration, p program, long time.Duration, frozen bool) step {
	how := map[bool]string{true: "frozen", false: "killed"}[frozen]
	return step{at: at, what: fmt.Sprintf("%s %s for %v", p, how, long), do: func(ctx context.Context, r *run) (int, error) {
		proc := *r.process(p)
		from := time.Now()
		if frozen {
			if err := proc.Signal(syscall.SIGSTOP); err != nil {
				return 0, err
			}
		} else {
			proc.Kill()
		}
		r.holding.Add(1)
		r.later(func() error {
			defer r.holding.Done()
			sleep(ctx, long)
			if r.isHub([]program{p}) && !(frozen && p == theBridge) {
				r.outage(from, time.Now())
			}
			if frozen {
				return proc.Signal(syscall.SIGCONT)
			}
			return r.start(ctx, p)
		})
		return 1, nil
	}}
}
