package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// safeguard is something the programs do so that a promise holds. Builds with the tag
// faultswitch do without it when FAULTSWITCH_OFF names it.
type safeguard struct {
	name, about string
	scenario    *scenario // that must notice
	want        []Class   // one of these, or
	trouble     string    // a text in what else went wrong
}

// safeguards are taken away one at a time.
var safeguards = []safeguard{
	{"ack-last", "the source is acknowledged after the report, not before the POST", &crash, []Class{Lost}, ""},
	{"reset", "a take-over resets the consumer to what was not acknowledged", &crash, []Class{Lost, Unreported, Inverted}, ""},
	{"reports", "a take-over reads the report log for what is already done", &crash, []Class{Late}, ""},
	{"dedupe", "the edge recognizes a message that comes again under its Idempotency-Key", &sockets, []Class{Inverted}, ""},
	{"tag", "the router delivers only events whose tag verifies", &kitchens, []Class{Inverted}, ""},
	{"screen-tag", "the gate shows only events whose tag verifies", &sockets, []Class{Inverted}, ""},
	{"keys", "what cannot be fetched from the Portal leaves a site's keys as they were", &portals, nil, "has no key of"},
}

// mostTries is how many seeds a scenario has to notice that a safeguard is gone.
const mostTries = 20

// selftest shows that the harness notices what it is there for: first that the programs
// with every safeguard pass, then that they do not without any one of them.
func (b *bench) selftest(ctx context.Context, seed uint64) error {
	var err error
	if b.built, err = build(ctx, filepath.Join(b.dir, "bin-switched"), "faultswitch"); err != nil {
		return err
	}
	seen := map[*scenario]bool{}
	for _, g := range safeguards {
		if seen[g.scenario] {
			continue
		}
		seen[g.scenario] = true
		res, err := b.run(ctx, *g.scenario, seed, nil)
		if err != nil {
			return err
		}
		if res.bad() {
			res.describe(b.out, *g.scenario, seed, 10)
			return fmt.Errorf("scenario %s seed %d fails with every safeguard in place: without one it would prove nothing", g.scenario.name, seed)
		}
		fmt.Fprintf(b.out, "safeguard none scenario %s seed %d clean\n", g.scenario.name, seed)
	}
	var errs []error
	for _, g := range safeguards {
		errs = append(errs, b.without(ctx, g, seed))
	}
	return errors.Join(errs...)
}

// without looks for a seed that notices that a safeguard is gone.
func (b *bench) without(ctx context.Context, g safeguard, seed uint64) error {
	kept := b.keep
	defer func() { b.keep = kept }() // what fails here is meant to
	for s := seed; s < seed+mostTries; s++ {
		b.keep = kept
		res, err := b.run(ctx, *g.scenario, s, []string{"FAULTSWITCH_OFF=" + g.name})
		if err != nil {
			return fmt.Errorf("safeguard %s scenario %s seed %d: %w", g.name, g.scenario.name, s, err)
		}
		if what, as := g.missed(&res); what != "" {
			fmt.Fprintf(b.out, "safeguard %s scenario %s seed %d caught: %s\n  %s; as in: %s\n", g.name, g.scenario.name, s, what, g.about, as)
			return nil
		}
		if b.verbose {
			fmt.Fprintf(b.out, "safeguard %s scenario %s seed %d not noticed\n", g.name, g.scenario.name, s)
		}
	}
	fmt.Fprintf(b.out, "safeguard %s scenario %s NOT caught by %d seeds from %d on\n", g.name, g.scenario.name, mostTries, seed)
	return fmt.Errorf("safeguard %s (%s) can be missing and nobody notices", g.name, g.about)
}

// missed says how a run shows that the safeguard is gone, with an example; "" when it
// does not.
func (g safeguard) missed(res *result) (what, example string) {
	for _, want := range g.want {
		for _, v := range res.Violations {
			if v.Class == want {
				return fmt.Sprintf("%s %d", want, res.Count(want)), v.String()
			}
		}
	}
	for _, t := range res.trouble {
		if g.trouble != "" && strings.Contains(t, g.trouble) {
			return "trouble", t
		}
	}
	return "", ""
}
