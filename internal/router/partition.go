package router

import (
	"context"
	"fmt"
	"maps"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// partition is one of the stream's, for the life of the router. What it knows of events
// is its tenure's: from one take-over to the next.
type partition struct {
	// Fixed at birth.
	r *Router
	n int
	// Set by Run.
	consuming context.Context // ends when no further attempt may begin
	io        context.Context // ends when what is in flight is to be cut

	tenure atomic.Pointer[tenure] // set by takeover

	// Owned by takeover and, after the consumer has returned, by Run.
	carried map[event]*progress
	// since is when this process became the owner. Whoever was before may have been killed
	// in the middle of an attempt, whose event is then unacknowledged and was stored before
	// the take-over: a lane that has such events posts nothing for settle (I4). Set before
	// the first tenure.
	since time.Time
}

// keepCarried is how long what was in hand is remembered for an event that does not come
// back: as long as the hub keeps events.
const keepCarried = 72 * time.Hour

// takeover begins a tenure: nothing of the previous one is queued or in flight any more,
// and what the reports say is done will not be done again.
func (p *partition) takeover(ctx context.Context, at broker.Takeover) error {
	p.end()
	oldest := at.OldestUnacked
	past, believed, err := p.r.readPast(ctx, p.n, oldest)
	if err != nil {
		return fmt.Errorf("partition %d: reports since %s: %w", p.n, oldest.UTC().Format(time.RFC3339), err)
	}
	now := time.Now()
	maps.DeleteFunc(p.carried, func(_ event, pr *progress) bool { return now.Sub(pr.deadline) > keepCarried })
	first := p.since.IsZero()
	if first {
		p.since = now
	}
	t := newTenure(p, at.Last, first, past, p.carried)
	p.carried = nil
	p.tenure.Store(t)
	t.start()
	p.r.log.Info("lanes begin", "partition", p.n, "oldest_unacked", oldest, "last", at.Last, "reports", believed)
	return nil
}

// end waits for what the tenure has in flight and returns how many events it leaves
// unacknowledged.
func (p *partition) end() (left int) {
	t := p.tenure.Swap(nil)
	if t == nil {
		return 0
	}
	left, carried := t.end()
	if p.carried == nil {
		p.carried = carried
	} else {
		maps.Copy(p.carried, carried)
	}
	return left
}

// enqueue is the consumer's handler.
func (p *partition) enqueue(d *broker.Delivery) {
	if t := p.tenure.Load(); t != nil {
		t.enqueue(d)
	}
}

// readPast reads what the report log says is done. Reports that do not verify are not
// believed: the broker cannot make an order disappear by saying that it was delivered.
func (r *Router) readPast(ctx context.Context, partition int, oldest time.Time) (past, int, error) {
	if oldest.IsZero() || faultNoReports {
		return nil, 0, nil
	}
	past := make(past)
	believed := 0
	err := r.hub.ReportsSince(ctx, oldest, partition, func(rep *broker.Report) error {
		binding := r.binding(rep.Site)
		if binding == nil {
			return nil // nothing of the site is delivered here
		}
		if _, known := binding.Key(rep.Bind); !known {
			r.keys.RereadBinding()
			binding = r.binding(rep.Site)
		}
		if err := binding.VerifyReport(&rep.Report, rep.Bind, rep.Tag); err != nil {
			r.metrics.badReports.Inc()
			r.reportLog.Do(func() {
				r.log.Error(alarmReport, "site", rep.Site, "edge", rep.Edge, "seq", rep.Seq, "err", err)
			})
			return nil
		}
		believed++
		past.add(delivery{source{rep.Site, rep.Edge, rep.Epoch}, rep.Endpoint, rep.N}, rep.Seq)
		if e := r.endpoints[rep.Site]; e != nil && e.name == rep.Endpoint && rep.State == string(stateDelivered) {
			e.prove()
		}
		return nil
	})
	return past, believed, err
}
