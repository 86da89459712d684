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

// anyEndpoint stands for all of them: what ended at one cannot have expired at the edge.
const anyEndpoint = ""

// isDone tells whether the delivery has ended, or its event reached no endpoint: that is the
// end of its delivery to each.
func (p past) isDone(d delivery, seq uint64) bool {
	if p[d].has(seq) {
		return true
	}
	d.endpoint = noEndpoint
	return p[d].has(seq)
}

// isSettled tells whether the event has ended anywhere.
func (p past) isSettled(src source, seq uint64) bool {
	return p[delivery{src, anyEndpoint, 0}].has(seq)
}

func (p past) add(d delivery, seq uint64) {
	done, ok := p[d]
	if !ok {
		d.source, d.endpoint = d.source.clone(), strings.Clone(d.endpoint)
	}
	p[d] = done.add(seq)
	if d.endpoint != anyEndpoint && d.n == 0 {
		d.endpoint = anyEndpoint
		p.add(d, seq)
	}
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

// without returns which of the sequences from..to the set lacks, in ascending order.
func (s runs) without(from, to uint64) runs {
	var lacks runs
	i, _ := s.find(from)
	if i > 0 && s[i-1].to >= from {
		i--
	}
	for ; i < len(s) && s[i].from <= to; i++ {
		if s[i].from > from {
			lacks = append(lacks, run{from, s[i].from - 1})
		}
		if s[i].to >= to {
			return lacks
		}
		from = s[i].to + 1
	}
	return append(lacks, run{from, to})
}

// addRun adds the sequences from..to.
func (s runs) addRun(from, to uint64) runs {
	// What it touches or overlaps becomes one.
	i, _ := slices.BinarySearchFunc(s, from, func(r run, from uint64) int {
		if r.to < from && from-r.to > 1 {
			return -1
		}
		return 1
	})
	j := i
	for ; j < len(s) && (s[j].from <= to || s[j].from-to == 1); j++ {
		from, to = min(from, s[j].from), max(to, s[j].to)
	}
	return slices.Replace(s, i, j, run{from, to})
}
