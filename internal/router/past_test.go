package router

import (
	"testing"

	"pgregory.net/rapid"
)

// mustBeShort: there is one form of a set.
func mustBeShort(t *rapid.T, s runs) {
	for i, r := range s {
		if r.from > r.to || i > 0 && s[i-1].to+1 >= r.from {
			t.Fatalf("%v is not the shortest form", s)
		}
	}
}

// runs is a set.
func TestRunsAreASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		added := rapid.SliceOf(rapid.Uint64Range(1, 60)).Draw(t, "added")
		var s runs
		model := make(map[uint64]bool)
		for _, seq := range added {
			s = s.add(seq)
			model[seq] = true
		}
		for seq := range uint64(62) {
			if s.has(seq) != model[seq] {
				t.Fatalf("%v has %d: %t", s, seq, s.has(seq))
			}
		}
		mustBeShort(t, s)
	})
}

func TestRunsOfAllReportsAreOne(t *testing.T) {
	var s runs
	for seq := range uint64(100_000) {
		s = s.add(seq + 1)
	}
	if len(s) != 1 || cap(s) > 4 {
		t.Errorf("%d runs, room for %d: what a take-over remembers must not grow with what is done", len(s), cap(s))
	}
}

// Whole runs of numbers behave as their numbers do one by one.
func TestRunsTakeRuns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s runs
		model := make(map[uint64]bool)
		for range rapid.IntRange(0, 12).Draw(t, "steps") {
			from := rapid.Uint64Range(1, 60).Draw(t, "from")
			to := from + rapid.Uint64Range(0, 20).Draw(t, "more")
			lacks := s.without(from, to)
			for seq := from; seq <= to; seq++ {
				if lacks.has(seq) == model[seq] {
					t.Fatalf("%v without %d..%d is %v", s, from, to, lacks)
				}
			}
			if len(lacks) > 0 && (lacks[0].from < from || lacks[len(lacks)-1].to > to) {
				t.Fatalf("%v without %d..%d is %v", s, from, to, lacks)
			}
			s = s.addRun(from, to)
			for seq := from; seq <= to; seq++ {
				model[seq] = true
			}
			for seq := range uint64(90) {
				if s.has(seq) != model[seq] {
					t.Fatalf("%v has %d: %t", s, seq, s.has(seq))
				}
			}
			mustBeShort(t, s)
		}
	})
	const end = 1<<64 - 1
	if s := (runs{{end, end}}).addRun(end-1, end); len(s) != 1 || s[0] != (run{end - 1, end}) {
		t.Errorf("at the end of all numbers: %v", s)
	}
	if s := (runs{{end, end}}).without(end-1, end); len(s) != 1 || s[0] != (run{end - 1, end - 1}) {
		t.Errorf("at the end of all numbers: %v", s)
	}
}
