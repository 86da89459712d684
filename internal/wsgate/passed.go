package wsgate

import (
	"math"
	"strings"
)

const (
	// windowSize is how far behind the highest sequence of a lane one can still be told
	// from a repeat. What is further behind counts as passed.
	windowSize = 1024
	// maxLanes bounds the memory: about 200 bytes a lane.
	maxLanes = 1 << 16
)

// passed remembers which events went by, so that a repeat at another place of the
// stream (a replay, or an edge sending again what the hub lost) is not shown twice, or
// after what replaced it. An event past its deadline is not shown anyway, so a lane is
// forgotten once its last deadline is over.
//
// Not safe for concurrent use: the feed's handler owns it.
type passed struct {
	lanes   map[lane]*window
	sweepAt int // number of lanes at which to look for those that are over
}

// lane is where sequences count: they start again at 1 in another epoch.
type lane struct{ site, edge, epoch string }

type window struct {
	top      uint64                  // highest sequence so far
	seen     [windowSize / 64]uint64 // by sequence modulo windowSize, of top and what is below it
	deadline int64                   // latest of the lane's events, Unix ms
}

func newPassed() *passed {
	return &passed{lanes: make(map[lane]*window), sweepAt: 1024}
}

// first tells whether seq did not pass before, and remembers it. now and deadline are
// Unix ms.
func (p *passed) first(l lane, seq uint64, deadline, now int64) bool {
	return p.window(l, seq, deadline, now).first(seq)
}

// run remembers all of from..to, of which some may have passed.
func (p *passed) run(l lane, from, to uint64, deadline, now int64) {
	w := p.window(l, to, deadline, now)
	for n := min(to-from, windowSize-1) + 1; n > 0; n-- {
		w.first(to - n + 1)
	}
}

// window returns the lane's; a new one begins at seq.
func (p *passed) window(l lane, seq uint64, deadline, now int64) *window {
	w := p.lanes[l]
	if w == nil {
		p.makeRoom(now)
		// The views of one message's headers must not be kept alive by a map's key.
		l = lane{strings.Clone(l.site), strings.Clone(l.edge), strings.Clone(l.epoch)}
		w = &window{top: seq}
		p.lanes[l] = w
	}
	w.deadline = max(w.deadline, deadline)
	return w
}

func (w *window) first(seq uint64) bool {
	switch {
	case seq > w.top && seq-w.top >= windowSize:
		clear(w.seen[:])
		w.top = seq
	case seq > w.top:
		for s := w.top + 1; s < seq; s++ {
			w.seen[s%windowSize/64] &^= 1 << (s % 64)
		}
		w.seen[seq%windowSize/64] &^= 1 << (seq % 64)
		w.top = seq
	case w.top-seq >= windowSize:
		return false
	}
	word, bit := &w.seen[seq%windowSize/64], uint64(1)<<(seq%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// makeRoom forgets the lanes that are over, once there are twice as many as were left
// the last time. When the bound is reached by living ones, the lane that ends first is
// forgotten: then a repeat of its events would be shown, which is better than hiding an
// order.
func (p *passed) makeRoom(now int64) {
	if len(p.lanes) >= p.sweepAt {
		for l, w := range p.lanes {
			if w.deadline < now {
				delete(p.lanes, l)
			}
		}
		p.sweepAt = min(max(1024, 2*len(p.lanes)), maxLanes)
	}
	if len(p.lanes) < maxLanes {
		return
	}
	var oldest lane
	ends := int64(math.MaxInt64)
	for l, w := range p.lanes {
		if w.deadline <= ends {
			oldest, ends = l, w.deadline
		}
	}
	delete(p.lanes, oldest)
}
