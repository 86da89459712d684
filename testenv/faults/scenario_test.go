package main

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

// script is a plan as text: what a seed must bring back.
func script(sc scenario, seed uint64) string {
	p := sc.plan(source(sc.name, seed))
	var b strings.Builder
	fmt.Fprintln(&b, p.String())
	for _, s := range p.steps {
		fmt.Fprintln(&b, s.at, s.what)
	}
	return b.String()
}

func TestASeedBringsItsPlanBack(t *testing.T) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			seen := map[string]bool{}
			for seed := range uint64(20) {
				first := script(sc, seed)
				if again := script(sc, seed); again != first {
					t.Fatalf("seed %d gives two plans:\n%s\n%s", seed, first, again)
				}
				seen[first] = true
			}
			if len(seen) != 20 {
				t.Errorf("20 seeds give %d plans", len(seen))
			}
		})
	}
}

func TestStepsComeInOrderAndWithinTheLoad(t *testing.T) {
	for _, sc := range scenarios {
		for seed := range uint64(50) {
			p := sc.plan(source(sc.name, seed))
			if len(p.steps) == 0 {
				t.Fatalf("scenario %s seed %d: nothing goes wrong", sc.name, seed)
			}
			for i, s := range p.steps {
				if i > 0 && s.at < p.steps[i-1].at || s.at < 0 {
					t.Errorf("scenario %s seed %d: %q at %v comes after a later one", sc.name, seed, s.what, s.at)
				}
			}
		}
	}
}

// TestEverythingThatCanGoWrongDoes holds the promise of -list, over as many runs as the
// harness is asked for.
func TestEverythingThatCanGoWrongDoes(t *testing.T) {
	const runs = 50
	var wants = map[string][]string{
		"crash":   {"kill [edge]", "kill [bridge]", "kill [edge bridge]", "kill [hub]", "kill [hub bridge]", "freeze edge", "freeze bridge", "freeze hub", string(atOnce), string(asCooked), string(asStored), "hub apart", "hub in the bridge"},
		"sockets": {"cut screen", "does not read", "hub killed", "hub frozen", "bridge killed", "bridge frozen", "new key", "forge"},
		"portal":  {"new keys in a row", "the one before ends", "encryption on", "encryption off", "Portal away", "worthless", portal.TokenEndpoint},
		"kitchen": {"well again"},
	}
	for _, k := range portal.Kinds() {
		wants["portal"] = append(wants["portal"], "badly: "+string(k)+"\n")
	}
	for _, m := range miseries {
		wants["kitchen"] = append(wants["kitchen"], "Kitchen "+m.name+"\n")
	}
	for _, f := range forgeries {
		wants["kitchen"] = append(wants["kitchen"], f.what)
	}
	for _, sc := range scenarios {
		var all strings.Builder
		for seed := range uint64(runs) {
			all.WriteString(script(sc, seed))
		}
		if len(wants[sc.name]) == 0 {
			t.Errorf("scenario %s: nobody says what it must do", sc.name)
		}
		for _, want := range wants[sc.name] {
			if !strings.Contains(all.String(), want) {
				t.Errorf("scenario %s: %q happens in none of %d runs", sc.name, want, runs)
			}
		}
	}
}

func TestSafeguardsAndScenariosBelongTogether(t *testing.T) {
	noticed := map[string]bool{}
	for _, g := range safeguards {
		if _, err := findScenario(g.scenario.name); err != nil || len(g.want) == 0 && g.trouble == "" {
			t.Errorf("safeguard %s: %v, wants %v", g.name, err, g.want)
		}
		noticed[g.scenario.name] = true
	}
	for _, sc := range scenarios {
		if !noticed[sc.name] {
			t.Errorf("scenario %s is the one that notices for no safeguard", sc.name)
		}
	}
}

func TestListExplainsEveryScenario(t *testing.T) {
	var out bytes.Buffer
	if err := start(context.Background(), options{list: true}, &out); err != nil {
		t.Fatal(err)
	}
	for _, s := range scenarios {
		if !strings.Contains(out.String(), s.name+"\n"+s.about) {
			t.Errorf("%s is not explained", s.name)
		}
	}
}
