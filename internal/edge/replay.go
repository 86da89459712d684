package edge

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// replayHub is what the replayer needs of the hub.
type replayHub interface {
	Connected() bool
	AskReports(ctx context.Context, q broker.ReplayRequest, f func(*broker.Report)) (broker.ReplayAnswer, error)
}

const (
	// replaySites is how many sites are asked about at once.
	replaySites = 8
	// replayLimit bounds one question.
	replayLimit = 10 * time.Second
	// replayAge: a message is asked about once it is so old; before, its report comes by itself.
	replayAge = 2 * time.Second
)

// replayer asks the bridges for reports that were missed: when the hub is there again, and
// from time to time while anything is unsettled. Their answers also tell the hub's time.
type replayer struct {
	// Fixed at birth.
	hub     replayHub
	outbox  *outbox
	reports *reports
	clock   *clock
	edge    string
	every   time.Duration
	log     *slog.Logger
	metrics *metrics

	mu   sync.Mutex                     // Guards what follows; reports.take is called with it held.
	seen map[string]broker.ReplayAnswer // by site: how far its reports are known
	warn rate.Sometimes
}

func (p *replayer) run(ctx context.Context) error {
	p.seen = make(map[string]broker.ReplayAnswer)
	p.warn = rate.Sometimes{First: 1, Interval: 5 * time.Minute}
	look := min(p.every, time.Second)
	tick := time.NewTicker(look)
	defer tick.Stop()
	var asked time.Time
	linked := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			was := linked
			linked = p.hub.Connected()
			if !linked || was && now.Sub(asked) < p.every {
				continue
			}
			asked = now
			p.ask(ctx)
		}
	}
}

// ask asks about every site that has something to be asked about.
func (p *replayer) ask(ctx context.Context) {
	oldest := p.outbox.unreported(replayAge)
	if len(oldest) == 0 {
		return
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, replaySites)
	for site, since := range oldest {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			defer func() { <-slots }()
			p.askSite(ctx, site, since)
		})
	}
	wg.Wait()
}

func (p *replayer) askSite(ctx context.Context, site string, since time.Time) {
	ctx, cancel := context.WithTimeout(ctx, replayLimit)
	defer cancel()
	p.mu.Lock()
	known := p.seen[site]
	p.mu.Unlock()
	answer, err := p.hub.AskReports(ctx, broker.ReplayRequest{Site: site, Edge: p.edge, Stream: known.Stream, After: known.Last, Since: since}, func(r *broker.Report) {
		p.reports.take(r)
	})
	switch {
	case err == nil:
		p.mu.Lock()
		p.seen[site] = broker.ReplayAnswer{Stream: answer.Stream, Last: answer.Last}
		p.mu.Unlock()
		p.clock.measured(answer.Now, answer.RTT)
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded):
	default:
		p.warn.Do(func() {
			p.log.Warn("no bridge answers which messages are settled; it is asked again", "site", site, "err", err)
		})
	}
}

// unreported returns, by site, when the oldest message was accepted that the hub has, that
// nobody has reported, and that is older than age.
func (o *outbox) unreported(age time.Duration) map[string]time.Time {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	now := o.clock.now()
	oldest := make(map[string]time.Time)
	for m := r.unsettled.first; m != nil; m = m.next {
		if m.seq == 0 || now.Sub(m.accepted) < age {
			continue
		}
		if t, ok := oldest[m.site]; !ok || m.accepted.Before(t) {
			oldest[m.site] = m.accepted
		}
	}
	return oldest
}
