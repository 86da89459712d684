package router

import (
	"testing"

	"pgregory.net/rapid"
)

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
		for i, r := range s {
			if r.from > r.to || i > 0 && s[i-1].to+1 >= r.from {
				t.Fatalf("%v is not the shortest form", s)
			}
		}
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
