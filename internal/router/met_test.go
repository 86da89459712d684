package router

import (
	"fmt"
	"testing"
	"time"
)

// What is remembered of events has a bound, and forgets what is old first.
func TestMetIsBounded(t *testing.T) {
	now := time.Unix(0, 0)
	src := func(i int) source { return source{"s1", "e1", fmt.Sprint(i)} }

	t.Run("by the gaps of a source", func(t *testing.T) {
		m := newMet()
		for seq := uint64(2); seq <= 20*mostRuns; seq += 2 {
			if !m.first(event{src(0), seq}, now) {
				t.Fatalf("%d was met before, it is said", seq)
			}
		}
		s := m.sources[src(0)].seqs
		if len(s) != mostRuns || !s.has(20*mostRuns) || s.has(2) {
			t.Errorf("%d runs, from %d", len(s), s[0].from)
		}
	})
	t.Run("by the time since a source was heard of", func(t *testing.T) {
		m := newMet()
		for i := range 20 * forgetFrom {
			if !m.first(event{src(i), 1}, now.Add(time.Duration(i)*keepMet/forgetFrom)) {
				t.Fatalf("source %d was met before, it is said", i)
			}
		}
		if len(m.sources) > 4*forgetFrom {
			t.Errorf("%d sources are remembered, %d were heard of within %s", len(m.sources), forgetFrom, keepMet)
		}
		if m.first(event{src(20*forgetFrom - 1), 1}, now.Add(20*keepMet)) {
			t.Error("the latest is forgotten")
		}
	})
}
