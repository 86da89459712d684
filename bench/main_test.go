package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		name string
		args string
		runs int
		only []string
		err  string
	}{
		{"nothing", "", 5, nil, ""},
		{"quick", "-quick", 3, nil, ""},
		{"quick with its own runs", "-quick -runs 7", 7, nil, ""},
		{"some", "-only deliver,ws.idle", 5, []string{"deliver", "ws.idle"}, ""},
		{"runs out of range", "-runs 100", 0, nil, "-runs"},
		{"negative runs", "-runs -1", 0, nil, "-runs"},
		{"an argument", "deliver", 0, nil, "no arguments"},
		{"a table of some rows", "-write x -only ws", 0, nil, "-only"},
		{"a table of short turns", "-write x -quick", 0, nil, "-quick"},
		{"an unknown flag", "-fast", 0, nil, "fast"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o, err := parse(strings.Fields(c.args), &bytes.Buffer{})
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("error %v, want one about %s", err, c.err)
				}
				return
			}
			if err != nil || o.runs != c.runs || !slices.Equal(o.only, c.only) {
				t.Errorf("%+v, %v", o, err)
			}
		})
	}
}

func TestChooseTakesRowsByTheBeginningOfTheirNames(t *testing.T) {
	names := func(benches []bench) (out []string) {
		for _, b := range benches {
			for _, r := range b.rows {
				out = append(out, r.name)
			}
		}
		return out
	}
	all := names(benches())
	for _, c := range []struct {
		only string
		want func(string) bool
	}{
		{"", func(string) bool { return true }},
		{"ws", func(n string) bool { return strings.HasPrefix(n, "ws.") }},
		{"envelope.seal.allocs", func(n string) bool { return n == "envelope.seal.allocs" }},
		{"deliver,order", func(n string) bool { return strings.HasPrefix(n, "deliver") || strings.HasPrefix(n, "order") }},
	} {
		var only []string
		if c.only != "" {
			only = strings.Split(c.only, ",")
		}
		chosen, err := choose(benches(), only)
		if err != nil {
			t.Fatal(err)
		}
		want := slices.DeleteFunc(slices.Clone(all), func(n string) bool { return !c.want(n) })
		if got := names(chosen); len(got) == 0 || !slices.Equal(got, want) {
			t.Errorf("-only %q chose %v, want %v", c.only, got, want)
		}
	}
	if _, err := choose(benches(), []string{"ws", "wz"}); err == nil || !strings.Contains(err.Error(), "wz") {
		t.Errorf("a name that means nothing: %v", err)
	}
}

func TestEveryRowCanBeReadAndJudged(t *testing.T) {
	seen := make(map[string]bool)
	for _, b := range benches() {
		if b.open == nil || b.turn <= 0 || b.quick <= 0 || b.quick > b.turn || len(b.rows) == 0 {
			t.Errorf("bench %s is not whole", b.name)
		}
		for _, r := range b.rows {
			if r.name != b.name && !strings.HasPrefix(r.name, b.name+".") {
				t.Errorf("row %s is of bench %s", r.name, b.name)
			}
			if seen[r.name] {
				t.Errorf("row %s is there twice", r.name)
			}
			seen[r.name] = true
			if r.key == "" || r.unit == "" || r.how == "" || strings.ContainsAny(r.how, "\n|") || strings.HasSuffix(r.how, ".") {
				t.Errorf("row %s: key %q, unit %q, how %q", r.name, r.key, r.unit, r.how)
			}
			if strings.ContainsAny(r.name+r.budget.text(r.unit), " ") {
				t.Errorf("row %s is not one word, or its budget %s", r.name, r.budget.text(r.unit))
			}
		}
	}
	for _, name := range []string{"envelope.seal", "envelope.open", "envelope.triple", "edge.accept.hub", "deliver", "deliver.dead",
		"ws.fanout.1x1000", "ws.fanout.1x1000.p99", "ws.fanout.100x10", "ws.fanout.100x10.p99", "ws.idle", "order.e2e"} {
		if !seen[name] {
			t.Errorf("the design budgets %s, and there is no such row", name)
		}
	}
}

func TestListMeasuresNothing(t *testing.T) {
	var out bytes.Buffer
	if code := run(t.Context(), options{list: true}, benches(), &out, &bytes.Buffer{}); code != exitOK {
		t.Fatalf("exit %d", code)
	}
	if !strings.Contains(out.String(), "deliver budget=ratio<=1.25\n") {
		t.Errorf("%s", out.String())
	}
}
