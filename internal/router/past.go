package router

import (
	"slices"
	"strings"
)

// source counts its events from 1: a site's edge in one epoch of its store.
type source struct{ site, edge, epoch string }

// clone does not keep the message alive that its names were read from.
func (s source) clone() source {
	return source{strings.Clone(s.site), strings.Clone(s.edge), strings.Clone(s.epoch)}
}

// event names one event, wherever the hub keeps it.
type event struct {
	source
	seq uint64
}

// past is what a new owner of a partition knows about deliveries made before it: the
// report log is the set of what is done, and there is no second mechanism. It does not
// change once it is built.
type past map[delivery]runs

// delivery is a source's event at one endpoint, without the event's number.
type delivery struct {
	source
	endpoint string
	n        int
}

func (p past) isDone(d delivery, seq uint64) bool { return p[d].has(seq) }

func (p past) add(d delivery, seq uint64) {
	done, ok := p[d]
	if !ok {
		d.source, d.endpoint = d.source.clone(), strings.Clone(d.endpoint)
	}
	p[d] = done.add(seq)
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
