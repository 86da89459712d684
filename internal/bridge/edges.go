package bridge

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

const (
	// edgeSilence is how long an edge may send no beacon; it sends one every 5 s.
	edgeSilence = 30 * time.Second
	// edgeForgotten is how long one is missed: who comes back later is new.
	edgeForgotten = 72 * time.Hour
	// clockOff is how far an edge's clock may be from the hub's, and clockRight from where on
	// it is right again. Deadlines are told in the hub's time.
	clockOff   = 2 * time.Minute
	clockRight = 90 * time.Second
	// clockMost bounds what an edge says of its clock.
	clockMost = 100 * 365 * 24 * time.Hour

	// mostEdges bounds the memory, about 300 bytes for each. Names of edges are the hub's
	// users, so it takes a wrong configuration to get there.
	mostEdges = 50_000
	// loggedEdges is how many edges that fall silent at once are named in the log.
	loggedEdges = 10

	// An edge's troubles: so many texts, each so long, and when only their wording changes
	// (numbers in it), so seldom are they logged again.
	mostTroubles = 8
	longTrouble  = 300
	troubleAgain = 10 * time.Minute
)

// alarmClock has the offset beside it: above zero, the edge's clock is ahead.
const alarmClock = "edge's clock is wrong"

// edges knows which edges there are by their beacons, and says what a person must know of
// them. It is safe for concurrent use.
type edges struct {
	// Fixed at birth.
	log       *slog.Logger
	connected func() bool // to the hub
	most      int

	mu sync.Mutex
	// Guarded by mu.
	known   map[string]*edgeState
	missing int
	away    time.Time // until then the hub was away, and nobody could be heard
	full    bool      // that was logged
}

// edgeState is what is remembered of an edge. It is guarded by edges.mu.
type edgeState struct {
	heard    time.Time
	missing  bool
	clockOff bool
	troubles []string  // sorted, as they were logged
	told     time.Time // when they were
}

func newEdges(log *slog.Logger, connected func() bool, metrics prometheus.Registerer) (*edges, error) {
	e := &edges{log: log, connected: connected, most: mostEdges, known: make(map[string]*edgeState)}
	if metrics == nil {
		return e, nil
	}
	return e, metrics.Register(e)
}

var edgesDesc = prometheus.NewDesc("kb_bridge_edges",
	"Edges by their beacons, since this bridge started: present, or missing for more than 30 s and less than 72 h.", []string{"state"}, nil)

// Describe and Collect make edges a prometheus.Collector.
func (e *edges) Describe(ch chan<- *prometheus.Desc) { ch <- edgesDesc }

func (e *edges) Collect(ch chan<- prometheus.Metric) {
	e.mu.Lock()
	present, missing := len(e.known)-e.missing, e.missing
	e.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(edgesDesc, prometheus.GaugeValue, float64(present), "present")
	ch <- prometheus.MustNewConstMetric(edgesDesc, prometheus.GaugeValue, float64(missing), "missing")
}

// watch looks for edges that fell silent, until ctx ends.
func (e *edges) watch(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			e.look(time.Now())
		}
	}
}

// look misses edges that could have been heard and were not.
func (e *edges) look(now time.Time) {
	connected := e.connected()
	type lost struct {
		name  string
		heard time.Time
	}
	var fresh []lost
	e.mu.Lock()
	if !connected {
		e.away = now
	}
	for name, s := range e.known {
		silent := now.Sub(s.heard)
		switch {
		case s.missing && silent > edgeForgotten:
			delete(e.known, name)
			e.missing--
			e.full = false
		case !s.missing && silent > edgeSilence && now.Sub(e.away) > edgeSilence:
			s.missing = true
			e.missing++
			fresh = append(fresh, lost{name, s.heard})
		}
	}
	e.mu.Unlock()

	slices.SortFunc(fresh, func(a, b lost) int { return strings.Compare(a.name, b.name) })
	for i, l := range fresh {
		if i == loggedEdges {
			e.log.Error("more edges are missing", "edges", len(fresh)-i)
			break
		}
		e.log.Error("edge is missing: it sends no beacon", "edge", l.name, "since", l.heard.UTC().Format(time.RFC3339))
	}
}

// heard takes a beacon, whose edge the broker vouches for.
func (e *edges) heard(b broker.Beacon) {
	now := time.Now()
	var say []func()
	later := func(level slog.Level, message string, attrs ...any) {
		say = append(say, func() { e.log.Log(context.Background(), level, message, append([]any{"edge", b.Edge}, attrs...)...) })
	}
	e.mu.Lock()
	s := e.known[b.Edge]
	if s == nil {
		if len(e.known) >= e.most && !e.evict() {
			first := !e.full
			e.full = true
			e.mu.Unlock()
			if first {
				e.log.Error("too many edges send beacons, further ones are not watched", "edges", e.most)
			}
			return
		}
		s = &edgeState{}
		e.known[b.Edge] = s
		later(slog.LevelInfo, "edge is present", "epoch", b.Epoch, "sites", b.Sites, "backlog", b.Backlog)
	}
	if s.missing {
		s.missing = false
		e.missing--
		later(slog.LevelInfo, "edge is back", "epoch", b.Epoch, "silent", now.Sub(s.heard).Round(time.Second), "backlog", b.Backlog)
	}
	s.heard = now

	offset := clockOf(&b, now)
	switch {
	case !s.clockOff && offset.Abs() > clockOff:
		s.clockOff = true
		later(slog.LevelError, alarmClock, "offset", offset.Round(time.Second))
	case s.clockOff && offset.Abs() < clockRight:
		s.clockOff = false
		later(slog.LevelInfo, "edge's clock is right again", "offset", offset.Round(time.Second))
	}

	troubles := troublesOf(&b)
	switch changed := !slices.EqualFunc(troubles, s.troubles, func(a, b string) bool { return subjectOf(a) == subjectOf(b) }); {
	case changed && len(troubles) == 0:
		later(slog.LevelInfo, "edge is in trouble no more")
		s.troubles = nil
	case changed, now.Sub(s.told) >= troubleAgain && !slices.Equal(troubles, s.troubles):
		later(slog.LevelWarn, "edge is in trouble", "trouble", strings.Join(troubles, "; "),
			"backlog", b.Backlog, "overdue", b.Overdue, "store_bytes", b.StoreBytes, "store_max", b.StoreMax, "disk_free", b.DiskFree)
		s.troubles, s.told = troubles, now
	}
	e.mu.Unlock()
	for _, f := range say {
		f()
	}
}

// evict makes room by forgetting the edge that has been missing for longest; false when none
// is. The caller holds mu.
func (e *edges) evict() bool {
	var oldest string
	for name, s := range e.known {
		if s.missing && (oldest == "" || s.heard.Before(e.known[oldest].heard)) {
			oldest = name
		}
	}
	if oldest == "" {
		return false
	}
	delete(e.known, oldest)
	e.missing--
	return true
}

// clockOf is how far the edge's clock is ahead: as it has measured, else by its beacon, which
// then has its own time.
func clockOf(b *broker.Beacon, now time.Time) time.Duration {
	if b.OffsetMS == nil {
		return min(max(b.At.Sub(now), -clockMost), clockMost)
	}
	const most = int64(clockMost / time.Millisecond)
	return time.Duration(min(max(*b.OffsetMS, -most), most)) * time.Millisecond
}

// troublesOf returns an edge's troubles in an order of their own, within bounds.
func troublesOf(b *broker.Beacon) []string {
	all := slices.Sorted(slices.Values(b.Trouble))
	all = all[:min(len(all), mostTroubles)]
	for i, t := range all {
		if len(t) > longTrouble {
			all[i] = strings.ToValidUTF8(t[:longTrouble], "") + "…"
		}
	}
	return all
}

// subjectOf is what a trouble is about: the part before the colon. The rest may hold numbers.
func subjectOf(trouble string) string {
	subject, _, _ := strings.Cut(trouble, ":")
	return subject
}
