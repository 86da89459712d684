package edge

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// publisher is what the committer needs of the hub; *broker.Broker is one.
type publisher interface {
	Connected() bool
	PublishEvent(ctx context.Context, e *broker.Event) (seq uint64, duplicate bool, err error)
	LastEvent(ctx context.Context, site, edge string) (*broker.Event, uint64, error)
}

// via is Kb-Via: who is to deliver.
const via = "hub"

const (
	// resolveMin and resolveMax bound the pause between two looks at an unknown outcome: it
	// is drawn between zero and a cap that doubles from one to the other.
	resolveMin = 50 * time.Millisecond
	resolveMax = 2 * time.Second
)

// committer stores events at the hub. It gives each its number, and tags it.
//
// Of one site it publishes one event at a time, each only when the one before it is
// settled: acknowledged, or certainly refused. With two on their way a broken connection
// could lose the first and store the second, and sending the first again would invert
// them, or leave a hole for good. Sites do not wait for each other.
//
// An event whose outcome is unknown stays at the head of its site's line, and is published
// again, unchanged, until the hub has acknowledged it. Its number is never given to
// another: the hub would take that one for a duplicate, acknowledge it and drop it.
//
// How many requests of a site wait for their turn is bounded by who calls (the site's
// gate in ingest); how long, by wait.
type committer struct {
	// Fixed at birth.
	edge, epoch string
	hub         publisher
	wait        time.Duration
	lines       map[string]*line
	log         *slog.Logger

	// The life of what is published. It is not that of the request: a POS that goes away
	// does not take its event with it.
	ctx     context.Context
	cancel  context.CancelCauseFunc
	wg      sync.WaitGroup
	unknown atomic.Int64 // lines with an unknown head
}

// line is one site's order of events.
type line struct {
	site string
	// turn holds one token while somebody publishes: who has it owns seq. Waiting senders are
	// served first come, first served.
	turn chan struct{}
	seq  uint64 // the last number that is in use
}

type committerConfig struct {
	Edge  string
	Epoch string
	Hub   publisher
	Sites []string
	Wait  time.Duration // for a turn and the hub's acknowledgement together; a turn takes half of it at most
	Log   *slog.Logger
}

func newCommitter(cfg committerConfig) *committer {
	c := &committer{edge: cfg.Edge, epoch: cfg.Epoch, hub: cfg.Hub, wait: cfg.Wait, log: cfg.Log, lines: make(map[string]*line, len(cfg.Sites))}
	for _, site := range cfg.Sites {
		c.lines[site] = &line{site: site, turn: make(chan struct{}, 1)}
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// newEpoch mints an epoch: 16 random characters of a-z and 2-7.
func newEpoch() string {
	return strings.ToLower(rand.Text()[:16])
}

var (
	errStopped = errors.New("the edge is stopping")
	errAway    = errors.New("the hub cannot be reached")
	errTurn    = errors.New("the events before it took too long")
	errHub     = errors.New("the hub did not acknowledge in time")
)

// Commit gives d its number, tags it and has the hub store it. ctx is the request's: it
// ends the wait for a turn, not what has begun after it.
//
// nil: stored. errNotStored: certainly not, and nothing of it remains. errUnknown: nobody
// knows yet; it is found out in the background, and d.progress hears of it.
func (c *committer) Commit(ctx context.Context, d *draft) error {
	l := c.lines[d.site]
	if l == nil {
		return notStored(fmt.Errorf("site %q has no line", d.site))
	}
	deadline := time.Now().Add(c.wait)
	// What has its turn has time to be acknowledged too: publishing late and giving up at
	// once would make unknown outcomes.
	if err := c.take(ctx, l, c.wait/2); err != nil {
		return notStored(err)
	}
	if ctx.Err() != nil {
		l.release()
		return notStored(context.Cause(ctx))
	}
	e := c.number(l, d)
	publish, cancel := context.WithDeadlineCause(c.ctx, deadline, errHub)
	defer cancel()
	_, _, err := c.hub.PublishEvent(publish, e)
	switch {
	case err == nil:
		l.seq = e.Seq
		l.release()
		d.progress.stored()
		return nil
	case errors.Is(err, broker.ErrRejected), errors.Is(err, broker.ErrInvalid):
		l.release()
		return notStored(err)
	}
	l.seq = e.Seq
	d.progress.unknown()
	c.log.Warn("outcome unknown: the event is published again until the hub acknowledges it",
		"site", d.site, "kind", d.kind, "id", d.id, "seq", e.Seq, "err", err)
	c.unknown.Add(1)
	c.wg.Go(func() { c.resolve(l, e, d) })
	return fmt.Errorf("%w: %w", errUnknown, err)
}

// take waits for the line's turn. While the hub is away it does not wait at all: what is
// at the head then cannot be settled, and nobody behind it could be stored.
func (c *committer) take(ctx context.Context, l *line, most time.Duration) error {
	if c.ctx.Err() != nil {
		return errStopped
	}
	if !c.hub.Connected() {
		return errAway
	}
	select {
	case l.turn <- struct{}{}:
		return nil
	default:
	}
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case l.turn <- struct{}{}:
		return nil
	case <-t.C:
		return errTurn
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.ctx.Done():
		return errStopped
	}
}

func (l *line) release() { <-l.turn }

// number makes the event of d. Call with the line's turn.
func (c *committer) number(l *line, d *draft) *broker.Event {
	// The edge's own clock stands for the hub's until the offset between them is measured.
	accepted := time.Now()
	deadline := accepted.Add(d.within)
	key := d.binding.Current()
	seq := l.seq + 1
	e := &broker.Event{
		Event: envelope.Event{
			Site: d.site, Kind: d.kind, Edge: c.edge, Epoch: c.epoch, From: seq, Seq: seq, ID: d.id,
			Accepted: accepted.UnixMilli(), Deadline: deadline.UnixMilli(), Order: d.order, Via: via, Triple: d.triple,
		},
		Bind:        key.ID(),
		Traceparent: d.trace,
	}
	e.Tag = key.TagEvent(&e.Event)
	// Before it is published: the Kitchen's report may be quicker than the acknowledgement.
	d.progress.numbered(seq, accepted, deadline)
	return e
}

// resolve finds out what became of an event, however long it takes, and then gives the
// line's turn back.
func (c *committer) resolve(l *line, e *broker.Event, d *draft) {
	defer c.unknown.Add(-1)
	since := time.Now()
	for attempt := 0; ; attempt++ {
		pause := time.NewTimer(backoff(attempt))
		select {
		case <-c.ctx.Done():
			pause.Stop()
			c.log.Error("stopped before the outcome of an event was known; the hub may have it or not",
				"site", d.site, "kind", d.kind, "id", d.id, "seq", e.Seq)
			return
		case <-pause.C:
		}
		if !c.hub.Connected() {
			continue
		}
		err := c.again(e)
		if err == nil {
			break
		}
		// The first, and then about one a minute.
		if attempt == 0 || attempt%30 == 0 {
			c.log.Warn("outcome still unknown", "site", d.site, "id", d.id, "seq", e.Seq, "attempt", attempt+1, "err", err)
		}
	}
	l.release()
	d.progress.stored()
	c.log.Info("outcome known: the hub has the event", "site", d.site, "id", d.id, "seq", e.Seq, "after", time.Since(since).Round(time.Millisecond))
}

// again returns nil when the hub has the event. It looks first: the hub takes a second
// copy for a duplicate only for a while, and this one may be older than that. A refusal
// settles nothing here, since it is about the copy.
func (c *committer) again(e *broker.Event) error {
	look, cancel := context.WithTimeoutCause(c.ctx, c.wait, errHub)
	defer cancel()
	if last, _, err := c.hub.LastEvent(look, e.Site, e.Edge); err == nil && last.Epoch == e.Epoch && last.Seq == e.Seq {
		return nil
	}
	publish, cancel := context.WithTimeoutCause(c.ctx, c.wait, errHub)
	defer cancel()
	_, _, err := c.hub.PublishEvent(publish, e)
	return err
}

// abandon gives up what is under way: its outcome is unknown then.
func (c *committer) abandon() { c.cancel(errStopped) }

// stop waits until every outcome is known, or ctx ends, and leaves the rest behind. No
// Commit may be running any more.
func (c *committer) stop(ctx context.Context) {
	defer context.AfterFunc(ctx, c.abandon)()
	c.wg.Wait()
	c.abandon()
}

// backoff is the pause before an attempt, counted from 0.
func backoff(attempt int) time.Duration {
	most := resolveMax
	if attempt < 16 {
		most = min(resolveMin<<attempt, resolveMax)
	}
	return mathrand.N(most) + time.Millisecond
}
