package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// view shows what happens: a table that is drawn over itself on a terminal, a line a
// second elsewhere.
type view struct {
	out      io.Writer
	stack    *stack.Stack
	drivers  []*till
	terminal bool
	started  time.Time
	drawn    int // lines of the table on the terminal
}

// tally adds up POS drivers.
type tally struct {
	accepted, delivered, failed, pending, unknown uint64

	p50, p99 time.Duration // the worst of its POS
}

func (t *tally) add(d pos.Tally) {
	t.accepted += d.Accepted
	t.delivered += d.Delivered
	t.failed += d.Failed
	t.pending += d.Pending
	t.unknown += d.Unknown
	t.p50, t.p99 = max(t.p50, d.Answer.P50), max(t.p99, d.Answer.P99)
}

func (v *view) run(ctx context.Context) {
	every := time.Second
	if v.terminal {
		every = 250 * time.Millisecond
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			v.draw()
		case <-ctx.Done():
			v.draw()
			return
		}
	}
}

func (v *view) draw() {
	bySite := make(map[string]*tally)
	var all tally
	for _, d := range v.drivers {
		t := d.Tally()
		if bySite[d.site] == nil {
			bySite[d.site] = &tally{}
		}
		bySite[d.site].add(t)
		all.add(t)
	}
	if !v.terminal {
		fmt.Fprintf(v.out, "%4.0fs accepted %d delivered %d failed %d pending %d p50 %v p99 %v rotations %d\n", time.Since(v.started).Seconds(),
			all.accepted, all.delivered, all.failed, all.pending, round(all.p50), round(all.p99), v.stack.Portal.Rotations())
		return
	}
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, "\x1b[2K"+format+"\n", a...) }
	line("%-9s %-8s %9s %9s %7s %8s %8s %8s  %s", "site", "cipher", "accepted", "delivered", "failed", "pending", "p50", "p99", "key in use")
	for _, name := range slices.Sorted(maps.Keys(bySite)) {
		t := bySite[name]
		cipher, key := v.stack.Endpoints[name].Profile, v.stack.Kitchen.LastFingerprint(name)
		if !sites[name].Encryption {
			cipher, key = "off", "-"
		}
		line("%-9s %-8s %9d %9d %7d %8d %8v %8v  %.12s", name, cipher, t.accepted, t.delivered, t.failed, t.pending, round(t.p50), round(t.p99), key)
	}
	line("%-9s %-8s %9d %9d %7d %8d %8v %8v  %d rotations, %.0f s", "all", "", all.accepted, all.delivered, all.failed, all.pending,
		round(all.p50), round(all.p99), v.stack.Portal.Rotations(), time.Since(v.started).Seconds())
	if v.drawn > 0 {
		fmt.Fprintf(v.out, "\x1b[%dA", v.drawn)
	}
	v.drawn = strings.Count(b.String(), "\n")
	io.WriteString(v.out, b.String())
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
