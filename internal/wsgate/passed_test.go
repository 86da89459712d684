package wsgate

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

func TestPassedTellsARepeatFromTheFirst(t *testing.T) {
	const far = int64(1 << 50)
	for _, tc := range []struct {
		name string
		seqs []uint64
		want []bool
	}{
		{"in order", []uint64{1, 2, 3}, []bool{true, true, true}},
		{"the same again", []uint64{1, 1}, []bool{true, false}},
		{"an older one again", []uint64{1, 2, 3, 2, 1}, []bool{true, true, true, false, false}},
		{"what was jumped over", []uint64{1, 4, 3, 2, 3}, []bool{true, true, true, true, false}},
		{"from the middle: what came before was not seen", []uint64{500, 499, 499}, []bool{true, true, false}},
		{"a jump over the whole window", []uint64{1, 5000, 5000 - windowSize + 1, 5000 - windowSize, 1, 5000}, []bool{true, true, true, false, false, false}},
		{"a jump of exactly the window", []uint64{1, 1 + windowSize, 1, 2}, []bool{true, true, false, true}},
		{"the ends of the counter", []uint64{0, 0, 1<<64 - 1, 1<<64 - 1, 0}, []bool{true, false, true, false, false}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPassed()
			for i, seq := range tc.seqs {
				if got := p.first(lane{"one", "front", "e"}, seq, far, 0); got != tc.want[i] {
					t.Errorf("%d: seq %d: first %v, want %v", i, seq, got, tc.want[i])
				}
			}
		})
	}
}

// A run uses up the places of its numbers, and of no others.
func TestPassedRemembersRuns(t *testing.T) {
	const far, end = int64(1 << 50), uint64(1<<64 - 1)
	l := lane{"one", "front", "e"}
	for _, tc := range []struct {
		name     string
		from, to uint64
		passed   []uint64
		fresh    []uint64
	}{
		{"the first of its lane", 3, 5, []uint64{3, 4, 5}, []uint64{2, 6}},
		{"as long as the window", 2, windowSize + 1, []uint64{2, 500, windowSize + 1}, []uint64{windowSize + 2}},
		{"longer than the window", 1, 5000, []uint64{1, 4000, 5000}, []uint64{5001}},
		{"the last numbers", end - 2, end, []uint64{end - 2, end}, []uint64{end - 3}},
		{"all numbers", 1, end, []uint64{1, end - 5, end}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPassed()
			p.run(l, tc.from, tc.to, far, 0)
			for _, seq := range tc.passed {
				if p.first(l, seq, far, 0) {
					t.Errorf("%d did not pass, it is said", seq)
				}
			}
			for _, seq := range tc.fresh {
				if !p.first(l, seq, far, 0) {
					t.Errorf("%d passed, it is said", seq)
				}
			}
		})
	}
}

// A window must agree with a set of everything that passed, for all that is not too far
// behind.
func TestPassedAgreesWithASet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p, seen := newPassed(), make(map[uint64]bool)
		top := uint64(0)
		for i, step := range rapid.SliceOfN(rapid.Int64Range(-windowSize-50, windowSize+50), 1, 300).Draw(t, "steps") {
			seq := max(int64(top)+step, 0)
			if i == 0 {
				seq = 5000 + step
			}
			s := uint64(seq)
			got := p.first(lane{"one", "front", "e"}, s, 1, 0)
			top = max(top, s)
			want := !seen[s] && top-s < windowSize
			if got != want {
				t.Fatalf("seq %d (top %d): first %v, want %v", s, top, got, want)
			}
			seen[s] = true
		}
	})
}

func TestPassedForgetsWhatIsOver(t *testing.T) {
	p := newPassed()
	// A fleet whose edges start anew all the time: each epoch lives for 100 ms.
	for now := range int64(200_000) {
		p.first(lane{"one", "front", fmt.Sprint(now)}, 1, now+100, now)
	}
	if n := len(p.lanes); n > 1024 {
		t.Errorf("%d lanes are kept, of which 100 live", n)
	}
}

func TestPassedIsBoundedWhenNothingIsOver(t *testing.T) {
	p := newPassed()
	for i := range int64(maxLanes + 3) {
		if !p.first(lane{"one", "front", fmt.Sprint(i)}, 1, 1000+i, 0) {
			t.Fatalf("lane %d: a first event was called a repeat", i)
		}
	}
	if n := len(p.lanes); n != maxLanes {
		t.Errorf("%d lanes are kept, want the bound, %d", n, maxLanes)
	}
	if p.lanes[lane{"one", "front", "0"}] != nil || p.lanes[lane{"one", "front", "3"}] == nil {
		t.Error("not those that end first were forgotten")
	}
}
