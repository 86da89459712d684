package router

import "time"

const (
	// keepMet is how long a source is remembered after its last event: as long as the hub
	// keeps events. What comes again later is past its deadline anyway.
	keepMet = 72 * time.Hour
	// mostRuns bounds what is remembered of one source. Its events come in order and
	// without gaps, as one run; the lowest is forgotten first.
	mostRuns = 256
	// forgetFrom is how many sources there must be before old ones are looked for.
	forgetFrom = 1024
)

// met is the set of events that were taken up in one tenure, so that one that lies at a
// second place of the stream is told from the first. Only verified events may be added:
// what anybody can write to the hub would fill it. What is forgotten could be delivered
// once more within its deadline, which is better than to hide an order. Not safe for
// concurrent use.
type met struct {
	sources  map[source]*sightings
	forgetAt int // number of sources at which to look for old ones
}

type sightings struct {
	seqs runs
	last time.Time
}

func newMet() met {
	return met{sources: make(map[source]*sightings), forgetAt: forgetFrom}
}

// first tells whether the event was not met before, and remembers it.
func (m *met) first(ev event, now time.Time) bool {
	s := m.of(ev.source, now)
	if s.seqs.has(ev.seq) {
		return false
	}
	s.seqs = s.seqs.add(ev.seq)
	s.bound()
	return true
}

// take returns which numbers of a run were not met before, and remembers all of them.
func (m *met) take(src source, from, to uint64, now time.Time) runs {
	s := m.of(src, now)
	fresh := s.seqs.without(from, to)
	s.seqs = s.seqs.addRun(from, to)
	s.bound()
	return fresh
}

func (m *met) of(src source, now time.Time) *sightings {
	s := m.sources[src]
	if s == nil {
		m.forget(now)
		s = new(sightings)
		m.sources[src.clone()] = s
	}
	s.last = now
	return s
}

func (s *sightings) bound() {
	if len(s.seqs) > mostRuns {
		s.seqs = append(s.seqs[:0], s.seqs[1:]...)
	}
}

// forget drops sources that sent nothing for keepMet, once there are twice as many as
// were left the last time.
func (m *met) forget(now time.Time) {
	if len(m.sources) < m.forgetAt {
		return
	}
	for src, s := range m.sources {
		if now.Sub(s.last) > keepMet {
			delete(m.sources, src)
		}
	}
	m.forgetAt = max(forgetFrom, 2*len(m.sources))
}
