package router

import (
	"slices"
	"time"
)

// source counts its events from 1: a site's edge in one epoch of its store.
type source struct{ site, edge, epoch string }

// event names one event, wherever the hub keeps it.
type event struct {
	source
	seq uint64
}

// past is what a new owner of a partition knows about deliveries made before it: the
// report log is the set of what is done, and there is no second mechanism.
//
// It does not change once it is built. Items keep it alive: when the consumer has passed
// what was stored before, the owner lets go of it, and the last item takes it along.
type past struct {
	done    map[delivery]runs
	highest uint64 // stream sequence of the last event in it
}

// delivery is a source's event at one endpoint, without the event's number.
type delivery struct {
	source
	endpoint string
	n        int
}

func (p *past) isDone(d delivery, seq uint64) bool {
	return p != nil && p.done[d].has(seq)
}

// clockTolerance is by how much the hub's clock may be ahead of ours before past is
// dropped too early.
const clockTolerance = time.Minute

// behind tells whether an event with this stream sequence, stored then, comes after all
// that p knows of. Both must say so: sequences start again with a hub's new life, and
// clocks differ.
func (p *past) behind(seq uint64, stored, owned time.Time) bool {
	return seq > p.highest && stored.After(owned.Add(clockTolerance))
}

// runs is a set of sequences as disjoint ranges in ascending order. Reports come nearly
// in order and without gaps, so a source costs one range, and one more for each event
// that is still unsettled among settled ones.
type runs []run

type run struct{ from, to uint64 } // inclusive

func (s runs) has(seq uint64) bool {
	i, found := s.find(seq)
	return found || i > 0 && s[i-1].to >= seq
}

// find returns the first run that begins at or after seq.
func (s runs) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(s, seq, func(r run, seq uint64) int {
		switch {
		case r.from < seq:
			return -1
		case r.from > seq:
			return 1
		}
		return 0
	})
}

func (s runs) add(seq uint64) runs {
	i, found := s.find(seq)
	if found || i > 0 && s[i-1].to >= seq {
		return s
	}
	afterLast := i > 0 && s[i-1].to+1 == seq
	beforeNext := i < len(s) && s[i].from == seq+1
	switch {
	case afterLast && beforeNext:
		s[i-1].to = s[i].to
		return slices.Delete(s, i, i+1)
	case afterLast:
		s[i-1].to = seq
		return s
	case beforeNext:
		s[i].from = seq
		return s
	}
	return slices.Insert(s, i, run{seq, seq})
}
