package edge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// position is a place in the outbox's log. No event stands at the zero.
type position struct {
	record uint64 // sequence of the record; the first is 1
	index  int    // of the entry in the record
}

func (p position) before(q position) bool {
	return p.record < q.record || p.record == q.record && p.index < q.index
}

// queued is an event of the outbox that the hub has to be told of.
type queued struct {
	pos     position
	event   *broker.Event // as committed: numbered, tagged, with its triple
	expired bool          // it is settled as failed on the edge's word: told by a run, never sent itself
	settled bool          // it has an end from elsewhere, so the hub has had it: nothing is sent
}

// backlog is what the forwarder needs of the outbox.
type backlog interface {
	epoch() string
	// cursor: everything up to it is settled with the hub.
	cursor() position
	// next returns what comes after a position, in the log's order, without waiting; empty:
	// nothing is there. What it returns, nobody but the forwarder expires from then on.
	next(ctx context.Context, after position, most, maxBytes int) ([]queued, error)
	// wait returns when there is something after the position.
	wait(ctx context.Context, after position) error
	// sending is called before anything up to there is sent; the disk has a mark of it then.
	sending(ctx context.Context, upTo position) error
	// forwarded: the hub has, or was told of, everything up to there.
	forwarded(upTo position)
	// fail ends events on the edge's word: the disk has it, then the POS are told.
	reject(ctx context.Context, events []queued, reason string) error
	// resend returns the unsettled events of the current epoch up to the cursor and above
	// number after, in order.
	resend(ctx context.Context, site string, after uint64) ([]queued, error)
	// last is the last number given in the current epoch, told the last one up to the cursor.
	last(site string) uint64
	told(site string) uint64
	// resumed: the hub is not ahead of the log.
	resumed()
	// renew starts a new epoch. hub says by site how far the hub is in the one that ends.
	renew(ctx context.Context, why string, hub map[string]uint64) error
	// open returns the sites that have unsettled events.
	open() []string
}

// forwardHub is what the forwarder needs of the hub; *broker.Broker is one.
type forwardHub interface {
	Session(ctx context.Context) (context.Context, context.CancelFunc, error)
	Reconnect() error
	LastEvent(ctx context.Context, site, edge string) (*broker.Event, uint64, error)
	PublishAfter(ctx context.Context, e *broker.Event, after uint64) (seq uint64, err error)
	PublishBatch(ctx context.Context, batch []broker.Next) (done int, err error)
}

const (
	// fewEvents are sent one by one: a batch costs two round trips more.
	fewEvents     = 16
	batchEvents   = 4096
	batchBytes    = 8 << 20
	maxRun        = 1000 // events that one run stands for
	lookAtOnce    = 32
	lookLimit     = 5 * time.Second
	lagLimit      = 3 * time.Second // for a replica of the hub to have what is known to be there
	lagPause      = 50 * time.Millisecond
	retryMin      = 50 * time.Millisecond
	reasonRefused = "refused-by-hub" // the hub will never take the event
)

// Reasons of kb_edge_resyncs_total.
const (
	resyncLink    = "link"    // the connection ended
	resyncBehind  = "behind"  // the hub has another last event than was thought
	resyncUnknown = "unknown" // the hub did not say whether it has an event
	resyncRefused = "refused" // the hub takes nothing now
	resyncDisk    = "disk"    // the outbox cannot be read or marked
	resyncLost    = "lost"    // the hub has lost events that it had acknowledged
	resyncAhead   = "ahead"   // the hub is ahead of the outbox
)

type forwarderConfig struct {
	Edge     string
	Hub      forwardHub
	Backlog  backlog
	Keys     door.Keys
	Now      func() time.Time // hub time
	Rate     int              // events a second of a backlog
	Stall    time.Duration
	RetryMax time.Duration
	Log      *slog.Logger
	Metrics  prometheus.Registerer
}

// forwarder brings the outbox to the hub: one walk over the log, first in first out, behind
// a cursor. The hub takes an event only after the one that it says is the edge's last of that
// site, so whatever is lost, delayed or sent twice on the way: the hub has each number once, in
// order (REVIEW 1; NATS.md 3.1). After every doubt it is asked anew how far it is.
type forwarder struct {
	// Fixed at birth.
	forwarderConfig
	pace      *rate.Limiter
	kick      chan struct{} // has a token: do not wait for the next attempt
	forwarded *prometheus.CounterVec
	resyncs   *prometheus.CounterVec
	stalled   prometheus.Counter

	progress atomic.Int64 // Unix ns of the last acknowledgement, or since there was nothing to send
	busy     atomic.Bool  // a session has something to send

	mu      sync.Mutex
	trouble error // Guarded by mu: why the hub was not told, nil when it was
}

func newForwarder(cfg forwarderConfig) (*forwarder, error) {
	f := &forwarder{
		forwarderConfig: cfg, kick: make(chan struct{}, 1),
		pace: rate.NewLimiter(rate.Limit(cfg.Rate), max(cfg.Rate, 1)),
		forwarded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_edge_forwarded_total", Help: "Messages that the hub has been told of: event, expired (by a run), resent.",
		}, []string{"as"}),
		resyncs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_edge_resyncs_total", Help: "How often the hub was asked anew how far it is, by reason.",
		}, []string{"reason"}),
		stalled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kb_edge_resync_stalled_total", Help: "Connections given up because nothing was acknowledged over them.",
		}),
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{f.forwarded, f.resyncs, f.stalled} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("metrics: %w", err)
			}
		}
	}
	return f, nil
}

// run forwards until ctx ends.
func (f *forwarder) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { f.watch(ctx) })
	for attempt := 0; ; attempt++ {
		link, end, err := f.Hub.Session(ctx)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		before := f.progress.Load()
		err = f.session(link)
		f.busy.Store(false)
		lost := link.Err() != nil
		end()
		if ctx.Err() != nil {
			return nil
		}
		if f.progress.Load() != before {
			attempt = 0
		}
		reason := reasonOf(err, lost)
		f.resyncs.WithLabelValues(reason).Inc()
		if f.note(err) && !lost {
			f.Log.Warn("outbox is not sent; it is tried again", "reason", reason, "err", err)
		}
		f.rest(ctx, attempt)
	}
}

// rest waits before another attempt, for a random time, unless it is to go on at once.
func (f *forwarder) rest(ctx context.Context, attempt int) {
	most := f.RetryMax
	if attempt < 16 {
		most = min(retryMin<<attempt, most)
	}
	t := time.NewTimer(mathrand.N(most) + time.Millisecond)
	defer t.Stop()
	select {
	case <-t.C:
	case <-f.kick:
	case <-ctx.Done():
	}
}

// flush lets the next attempt begin at once, over a new connection if there is none.
func (f *forwarder) flush() {
	select {
	case f.kick <- struct{}{}:
	default:
	}
}

// note remembers why the hub was not told, and returns whether that is news.
func (f *forwarder) note(err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	news := err != nil && (f.trouble == nil || f.trouble.Error() != err.Error())
	f.trouble = err
	return news
}

// why says why the hub is not told, nil when it is.
func (f *forwarder) why() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trouble
}

var (
	errHubAhead = errors.New("the hub is ahead of the outbox")
	errHubLost  = errors.New("the hub has lost events that it had acknowledged")
	errBacklog  = errors.New("outbox")
)

func reasonOf(err error, lost bool) string {
	switch {
	case errors.Is(err, errHubAhead):
		return resyncAhead
	case errors.Is(err, errHubLost):
		return resyncLost
	case errors.Is(err, errBacklog):
		return resyncDisk
	case lost, errors.Is(err, broker.ErrAway):
		return resyncLink
	case errors.Is(err, broker.ErrBehind):
		return resyncBehind
	case errors.Is(err, broker.ErrRejected), errors.Is(err, broker.ErrInvalid):
		return resyncRefused
	}
	return resyncUnknown
}

// watch ends a connection over which nothing is acknowledged any more, although it seems to
// be there.
func (f *forwarder) watch(ctx context.Context) {
	tick := time.NewTicker(max(f.Stall/8, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if !f.busy.Load() || time.Since(time.Unix(0, f.progress.Load())) < f.Stall {
			continue
		}
		f.stalled.Inc()
		f.progress.Store(time.Now().UnixNano())
		f.Log.Warn("nothing is acknowledged: the connection is made anew", "after", f.Stall, "err", f.why())
		if err := f.Hub.Reconnect(); err != nil {
			f.Log.Warn("connection not made anew", "err", err)
		}
	}
}

// spot is how far the hub is with one site.
type spot struct {
	number uint64 // the last one of this epoch that it has; 0: none
	after  uint64 // sequence of its last event in POS; 0: none
	stale  bool   // after is not known any more, number is
}

// session forwards over one connection until that ends, or something is in doubt.
func (f *forwarder) session(ctx context.Context) error {
	f.progress.Store(time.Now().UnixNano())
	f.busy.Store(true)
	epoch := f.Backlog.epoch()
	spots := make(map[string]*spot)
	sites := f.Backlog.open()
	if err := f.look(ctx, spots, sites, epoch); err != nil {
		return err
	}
	if err := f.compare(ctx, spots, sites); err != nil {
		return err
	}
	f.Backlog.resumed()
	f.note(nil)
	at := f.Backlog.cursor()
	for {
		items, err := f.Backlog.next(ctx, at, batchEvents, batchBytes)
		if err != nil {
			return fmt.Errorf("%w: %w", errBacklog, err)
		}
		if len(items) == 0 {
			f.busy.Store(false)
			if err := f.Backlog.wait(ctx, at); err != nil {
				return err
			}
			f.progress.Store(time.Now().UnixNano())
			f.busy.Store(true)
			continue
		}
		var fresh []string
		for i := range items {
			site := items[i].event.Site
			if _, known := spots[site]; !known {
				spots[site] = nil
				fresh = append(fresh, site)
			}
		}
		if len(fresh) > 0 {
			if err := f.look(ctx, spots, fresh, epoch); err != nil {
				return err
			}
			if err := f.compare(ctx, spots, fresh); err != nil {
				return err
			}
		}
		upTo := items[len(items)-1].pos
		if err := f.Backlog.sending(ctx, upTo); err != nil {
			return fmt.Errorf("%w: %w", errBacklog, err)
		}
		if len(items) > fewEvents {
			err = f.send(ctx, spots, items, epoch)
		} else {
			for i := range items {
				if err = f.send(ctx, spots, items[i:i+1], epoch); err != nil {
					break
				}
				f.Backlog.forwarded(items[i].pos)
			}
		}
		if err != nil {
			return err
		}
		f.Backlog.forwarded(upTo)
		f.progress.Store(time.Now().UnixNano())
		f.note(nil)
		at = upTo
	}
}

// look asks the hub how far it is with each of the sites. A replica of the hub that lags is
// asked again for a while, so that it does not look as if the hub had lost something.
func (f *forwarder) look(ctx context.Context, spots map[string]*spot, sites []string, epoch string) error {
	var mu sync.Mutex
	var failed error
	var wg sync.WaitGroup
	slots := make(chan struct{}, lookAtOnce)
	for _, site := range sites {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			s, err := f.lookAt(ctx, site, epoch, f.Backlog.told(site))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			spots[site] = s
		})
	}
	wg.Wait()
	return failed
}

func (f *forwarder) lookAt(ctx context.Context, site, epoch string, least uint64) (*spot, error) {
	until := time.Now().Add(lagLimit)
	for {
		ask, cancel := context.WithTimeout(ctx, lookLimit)
		last, seq, err := f.Hub.LastEvent(ask, site, f.Edge)
		cancel()
		s := &spot{}
		switch {
		case errors.Is(err, broker.ErrNone):
		case errors.Is(err, broker.ErrMalformed):
			s.after = seq // nothing of ours that counts
		case err != nil:
			return nil, fmt.Errorf("how far the hub is with site %s: %w", site, err)
		default:
			s.after = seq
			if last.Epoch == epoch {
				s.number = last.Seq
			}
		}
		if s.number >= least || time.Now().After(until) {
			return s, nil
		}
		select {
		case <-time.After(lagPause):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// compare draws the conclusions: a hub that is ahead of the outbox has seen a future that
// the disk has lost; one that is behind has lost what it had.
func (f *forwarder) compare(ctx context.Context, spots map[string]*spot, sites []string) error {
	for _, site := range sites {
		if n, last := spots[site].number, f.Backlog.last(site); n > last {
			hub := make(map[string]uint64)
			for site, s := range spots {
				if s != nil {
					hub[site] = s.number
				}
			}
			why := fmt.Sprintf("the hub has number %d of site %s, the outbox gave none above %d: its disk was set back", n, site, last)
			if err := f.Backlog.renew(ctx, why, hub); err != nil {
				return fmt.Errorf("%w: %w", errBacklog, err)
			}
			return errHubAhead
		}
	}
	for _, site := range sites {
		s := spots[site]
		told := f.Backlog.told(site)
		if s.number >= told {
			continue
		}
		items, err := f.Backlog.resend(ctx, site, s.number)
		if err != nil {
			return fmt.Errorf("%w: %w", errBacklog, err)
		}
		f.resyncs.WithLabelValues(resyncLost).Inc()
		f.Log.Error("hub has lost events that it had acknowledged: what the outbox has of them is sent again", "site", site, "hub", s.number, "acknowledged", told, "messages", len(items))
		for part := range chunks(items, batchEvents) {
			if err := f.send(ctx, spots, part, f.Backlog.epoch()); err != nil {
				return fmt.Errorf("%w: %w", errHubLost, err)
			}
			f.forwarded.WithLabelValues("resent").Add(float64(len(part)))
			f.progress.Store(time.Now().UnixNano())
		}
	}
	return nil
}

func chunks[T any](s []T, n int) func(func([]T) bool) {
	return func(yield func([]T) bool) {
		for len(s) > 0 {
			k := min(n, len(s))
			if !yield(s[:k]) {
				return
			}
			s = s[k:]
		}
	}
}

// run is events that expired at the edge, with consecutive numbers.
type run struct {
	site     string
	items    []queued
	from, to uint64
}

// send brings items to the hub, in order: what is alive as itself, what has expired as runs.
// What the hub has already is passed over.
func (f *forwarder) send(ctx context.Context, spots map[string]*spot, items []queued, epoch string) error {
	now := f.Now().UnixMilli()
	batch := make([]broker.Next, 0, len(items))
	var late []queued // ended by their run
	runs := make(map[string]*run)
	expired := 0
	add := func(e *broker.Event) {
		batch = append(batch, broker.Next{Event: e})
	}
	flush := func(r *run) error {
		e, err := f.runOf(r, epoch)
		if err != nil {
			return err
		}
		add(e)
		expired += len(r.items)
		delete(runs, r.site)
		return nil
	}
	for _, q := range items {
		e := q.event
		if e.Epoch != epoch || e.Seq <= spots[e.Site].number || q.settled {
			continue
		}
		r := runs[e.Site]
		if !q.expired && e.Deadline > now {
			if r != nil {
				if err := flush(r); err != nil {
					return err
				}
			}
			add(e)
			continue
		}
		if !q.expired {
			late = append(late, q)
		}
		if r != nil && (r.to+1 != e.Seq || len(r.items) >= maxRun) {
			if err := flush(r); err != nil {
				return err
			}
			r = nil
		}
		if r == nil {
			r = &run{site: e.Site, from: e.Seq}
			runs[e.Site] = r
		}
		r.items, r.to = append(r.items, q), e.Seq
	}
	for _, r := range runs {
		if err := flush(r); err != nil {
			return err
		}
	}
	if len(batch) == 0 {
		return nil
	}
	if len(items) > fewEvents {
		if err := f.pace.WaitN(ctx, min(len(batch), f.pace.Burst())); err != nil {
			return err
		}
	}
	if err := f.publish(ctx, spots, batch, epoch); err != nil {
		if len(batch) == 1 && errors.Is(err, broker.ErrInvalid) {
			f.Log.Error("message can never be sent to the hub: it is given up", "site", items[0].event.Site, "id", items[0].event.ID, "reason", reasonRefused, "err", err)
			if err := f.Backlog.reject(ctx, items, reasonRefused); err != nil {
				return fmt.Errorf("%w: %w", errBacklog, err)
			}
		}
		return err
	}
	f.forwarded.WithLabelValues("event").Add(float64(len(batch)))
	f.forwarded.WithLabelValues("expired").Add(float64(expired))
	if len(late) > 0 {
		// The hub has the run, so nothing of them that is still on its way can be stored.
		if err := f.Backlog.reject(ctx, late, reasonExpired); err != nil {
			return fmt.Errorf("%w: %w", errBacklog, err)
		}
	}
	return nil
}

// publish stores a batch behind what the hub has, and moves the spots.
func (f *forwarder) publish(ctx context.Context, spots map[string]*spot, batch []broker.Next, epoch string) error {
	seen := make(map[string]bool)
	var stale []string
	for i := range batch {
		site := batch[i].Event.Site
		if !seen[site] {
			seen[site] = true
			batch[i].First = true
			if spots[site].stale {
				stale = append(stale, site)
			}
		}
	}
	if len(stale) > 0 {
		known := make(map[string]uint64, len(stale))
		for _, site := range stale {
			known[site] = spots[site].number
		}
		again := make(map[string]*spot)
		if err := f.look(ctx, again, stale, epoch); err != nil {
			return err
		}
		for site, s := range again {
			if s.number != known[site] {
				return fmt.Errorf("%w: site %s is at %d, not %d", broker.ErrBehind, site, s.number, known[site])
			}
			spots[site] = s
		}
	}
	for i := range batch {
		if batch[i].First {
			batch[i].After = spots[batch[i].Event.Site].after
		}
	}
	if len(batch) <= fewEvents {
		for i := range batch {
			e := batch[i].Event
			s := spots[e.Site]
			seq, err := f.Hub.PublishAfter(ctx, e, s.after)
			if err != nil {
				return err
			}
			s.after, s.number = seq, e.Seq
		}
		return nil
	}
	done, err := f.Hub.PublishBatch(ctx, batch)
	if done > 0 {
		f.progress.Store(time.Now().UnixNano())
	}
	if err != nil {
		return err
	}
	for i := range batch {
		s := spots[batch[i].Event.Site]
		s.number, s.stale = batch[i].Event.Seq, true
	}
	return nil
}

// expiredEntry is one event in a run; docs/spec/runs.md.
type expiredEntry struct {
	ID       string `json:"id"`
	Kind     string `json:"kind"`
	Accepted int64  `json:"accepted"`
	Deadline int64  `json:"deadline"`
}

// runOf makes the event that stands for a run: its ids are sealed, as everything is.
func (f *forwarder) runOf(r *run, epoch string) (*broker.Event, error) {
	site := f.Keys.Site(r.site)
	if site == nil || site.Binding == nil {
		return nil, fmt.Errorf("%w: site %s is not configured", errBacklog, r.site)
	}
	body := struct {
		Expired []expiredEntry `json:"expired"`
	}{make([]expiredEntry, len(r.items))}
	for i, q := range r.items {
		body.Expired[i] = expiredEntry{q.event.ID, q.event.Kind, q.event.Accepted, q.event.Deadline}
	}
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	key := site.Binding.Current()
	sealed, err := key.AppendSealPlain(nil, text)
	if err != nil {
		return nil, err
	}
	triple, err := envelope.ParseTriple(sealed, 0)
	if err != nil {
		return nil, err
	}
	last := r.items[len(r.items)-1].event
	e := &broker.Event{Event: envelope.Event{
		Site: r.site, Kind: broker.KindExpired, Edge: f.Edge, Epoch: epoch, From: r.from, Seq: r.to,
		ID: strings.ToLower(ulid.Make().String()), Accepted: last.Accepted, Deadline: last.Deadline, Via: via, Triple: triple,
	}, Bind: key.ID()}
	e.Tag = key.TagEvent(&e.Event)
	return e, nil
}
