package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

var crash = scenario{
	name: "crash",
	about: `kill -9 of edge, bridge, both at once, and of the hub as a process of its own (half of the runs); programs frozen for
a while. At a moment of the clock, as the Kitchen cooks something (its answer is lost), or as a report is stored.`,
	plan: func(rng *rand.Rand) plan {
		p := plan{
			sites: mixed(6), apart: rng.IntN(2) == 0, load: 3200 * time.Millisecond, rate: 45,
			deadlines: map[string]time.Duration{"order": time.Minute, "alert": time.Minute},
			// The Kitchens take a while, so that a crash meets attempts in flight and a backlog.
			behaviour: kitchen.Behaviour{
				Latency: kitchen.Latency{Base: 3 * time.Millisecond, Jitter: 10 * time.Millisecond},
				Late:    kitchen.Late{Share: 0.3, Delay: kitchen.Latency{Jitter: 50 * time.Millisecond, Max: lateMost}},
			},
		}
		targets := [][]program{{theEdge}, {theBridge}, {theBridge}, {theEdge, theBridge}}
		if p.apart {
			targets = append(targets, []program{theHub}, []program{theHub}, []program{theHub, theBridge})
		}
		rng.Shuffle(len(targets), func(i, j int) { targets[i], targets[j] = targets[j], targets[i] })
		at := between(rng, 300*time.Millisecond, 600*time.Millisecond)
		for n := range 3 {
			p.steps = append(p.steps, kill(rng, at, targets[n]))
			at += between(rng, 600*time.Millisecond, 1100*time.Millisecond)
		}
		if rng.IntN(2) == 0 {
			frozen := []program{theEdge, theBridge}
			if p.apart {
				frozen = append(frozen, theHub)
			}
			p.steps = append(p.steps, freeze(rng, between(rng, 0, p.load-time.Second), pick(rng, frozen)))
		}
		slices.SortStableFunc(p.steps, func(a, b step) int { return int(a.at - b.at) })
		return p
	},
}

// program is one of the programs under test.
type program string

const (
	theEdge   program = "edge"
	theBridge program = "bridge"
	theHub    program = "hub"
)

func (r *run) process(p program) **stack.Process {
	switch p {
	case theEdge:
		return &r.stack.Edge
	case theBridge:
		return &r.stack.Bridge
	}
	return &r.stack.HubProc
}

func (r *run) start(ctx context.Context, p program) error {
	switch p {
	case theEdge:
		return r.stack.StartEdge(ctx)
	case theBridge:
		return r.stack.StartBridge(ctx)
	}
	return r.stack.StartHub(ctx)
}

// moment is what a crash waits for.
type moment string

const (
	atOnce   moment = "at once"
	asCooked moment = "as something is cooked"
	asStored moment = "as a report is stored"
)

// momentMost is how long a moment is waited for; then the fault strikes all the same.
const momentMost = 400 * time.Millisecond

// kill ends programs as a crash does, and starts them again after a while.
func kill(rng *rand.Rand, at time.Duration, programs []program) step {
	when := pick(rng, []moment{atOnce, asCooked, asCooked, asStored})
	down := between(rng, 0, 250*time.Millisecond)
	return step{at: at, what: fmt.Sprintf("kill %v %s, start after %v", programs, when, down), do: func(ctx context.Context, r *run) (int, error) {
		r.holding.Wait()
		var killed []*stack.Process
		for _, p := range programs {
			proc := *r.process(p)
			select {
			case <-proc.Done():
				return 0, proc.Ended()
			default:
				killed = append(killed, proc)
			}
		}
		r.at(ctx, when, func() {
			for _, p := range killed {
				// An error would say that it has ended, and Kill below waits for that anyway.
				_ = p.Signal(syscall.SIGKILL)
			}
		})
		from := time.Now()
		for _, p := range killed {
			p.Kill()
		}
		if !sleep(ctx, down) {
			return len(killed), context.Cause(ctx)
		}
		// The hub before the bridge: it may be what the others wait for.
		if r.isHub(programs) {
			r.outage(from, time.Now())
		}
		var errs []error
		for _, p := range []program{theHub, theBridge, theEdge} {
			if slices.Contains(programs, p) {
				errs = append(errs, r.start(ctx, p))
			}
		}
		return len(killed), errors.Join(errs...)
	}}
}

// isHub tells whether the hub is among the programs, embedded or not.
func (r *run) isHub(programs []program) bool {
	return slices.Contains(programs, theHub) || !r.plan.apart && slices.Contains(programs, theBridge)
}

// freeze stops a program as a machine without time for it does.
func freeze(rng *rand.Rand, at time.Duration, p program) step {
	long := between(rng, 100*time.Millisecond, 900*time.Millisecond)
	return step{at: at, what: fmt.Sprintf("freeze %s for %v", p, long), do: func(ctx context.Context, r *run) (int, error) {
		proc := *r.process(p)
		from := time.Now()
		if err := proc.Signal(syscall.SIGSTOP); err != nil {
			return 0, err
		}
		sleep(ctx, long)
		if r.isHub([]program{p}) && p != theBridge {
			r.outage(from, time.Now())
		}
		return 1, proc.Signal(syscall.SIGCONT)
	}}
}

// at does something at a moment, or when that does not come.
func (r *run) at(ctx context.Context, when moment, do func()) {
	done := make(chan struct{})
	strike := func() {
		do()
		close(done)
	}
	if when == atOnce {
		strike()
		return
	}
	trigger := &r.cooked
	if when == asStored {
		trigger = &r.reported
	}
	trigger.Store(&strike)
	t := time.NewTimer(momentMost)
	defer t.Stop()
	select {
	case <-done:
		return
	case <-t.C:
	case <-ctx.Done():
	}
	if trigger.CompareAndSwap(&strike, nil) {
		strike()
	}
	<-done
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
