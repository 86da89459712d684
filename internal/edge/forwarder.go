package edge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oklog/ulid/v2"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// position is a place in the outbox's log.
type position struct {
	record uint64 // sequence of the record; the first is 1 or later
	index  int    // of the entry in the record
}

func (p position) before(q position) bool {
	return p.record < q.record || p.record == q.record && p.index < q.index
}

// queued is an event of the outbox that the hub has to be told of.
type queued struct {
	pos     position
	event   *broker.Event // as committed: numbered, tagged; Triple included
	expired bool          // it is settled as failed, expired (fsynced): goes into a run, never out as itself
	settled bool          // it has a final state from elsewhere (a report): only its number is of interest
	unsent  bool          // it certainly was never sent
}

// backlog is what the forwarder needs of the outbox. All methods are safe for concurrent
// use.
type backlog interface {
	epoch() string
	// cursor: everything up to it is settled with the hub.
	cursor() position
	// next returns what comes after a position, in log order, without waiting; empty:
	// nothing is there. At most most events and about maxBytes bytes, but at least one. What
	// it has returned is expired by nobody but the forwarder.
	next(ctx context.Context, after position, most, maxBytes int) ([]queued, error)
	// wait returns when there is something after the position.
	wait(ctx context.Context, after position) error
	// sending is called before anything up to there is sent; it fsyncs a mark unless one
	// covers it.
	sending(ctx context.Context, upTo position) error
	// forwarded: the hub has, or was told of, everything up to there. It moves the cursor
	// (logged soon) and the states.
	forwarded(upTo position)
	// expire ends events as failed, reason expired: fsynced, then their POS are told. What
	// is final already stays as it is.
	expire(ctx context.Context, events []queued) error
	// resend returns the events of the current epoch up to the cursor above number after
	// that are unsettled, in order: the hub lost them.
	resend(ctx context.Context, site string, after uint64) ([]queued, error)
	// last returns the last number given in the current epoch.
	last(site string) uint64
	// resumed: all open sites were looked up, and the hub is not ahead of the log.
	resumed()
	// renew starts a new epoch: what is above the cursor, and not at the hub by its word (the
	// last number it has of the ending epoch, by site), is numbered and tagged anew; positions
	// change.
	renew(ctx context.Context, why string, hub ...map[string]uint64) error
	// open returns the sites that have unsettled events.
	open() []string
}

// forwardHub is the hub as the forwarder needs it; *broker.Broker is one.
type forwardHub interface {
	Session(ctx context.Context) (context.Context, context.CancelFunc, error)
	Reconnect() error
	LastEvent(ctx context.Context, site, edge string) (*broker.Event, uint64, error)
	PublishAfter(ctx context.Context, e *broker.Event, after uint64) (uint64, error)
	PublishBatch(ctx context.Context, batch []broker.Next) (int, error)
}

const (
	chunkEvents  = 4096
	chunkBytes   = 8 << 20
	singly       = 32 // a backlog up to this is sent one by one
	lookups      = 32 // at once
	maxRun       = 1000
	maxRunBytes  = 160 << 10 // sealed and encoded it fits into an event
	forwardRetry = 50 * time.Millisecond
)

type forwarderConfig struct {
	Edge    string // required, as the next three
	Hub     forwardHub
	Backlog backlog
	Keys    door.Keys
	// Now is the hub's time, by which deadlines are judged. Required.
	Now func() time.Time
	// Rate bounds the events of a backlog by the second. 0: no bound.
	Rate int
	// Stall is how long nothing may be acknowledged before the link is made anew. Default 30s.
	Stall time.Duration
	// RetryMax bounds the pause before another attempt. Default 30s.
	RetryMax time.Duration
	Log      *slog.Logger
	Metrics  prometheus.Registerer // nil: not registered
}

// forwarder brings the outbox to the hub: one walk over its log, first in first out, for
// all sites. Whatever goes wrong ends a session; the next one asks the hub how far it has
// come. Each site's first publish of a session carries the hub's last event as condition,
// so that nothing is stored twice, late or out of order (I2), whatever the answer to that
// question was: a replica that lags costs another attempt.
//
// An event is never sent once its deadline is over (I3); the hub is told of it by a run.
type forwarder struct {
	// Fixed at birth.
	cfg     forwarderConfig
	limit   *rate.Limiter // nil: none
	chunk   int
	kick    chan struct{} // flush
	linked  atomic.Bool
	sent    *prometheus.CounterVec // by outcome
	resyncs *prometheus.CounterVec // by reason
	stalled prometheus.Counter

	mu sync.Mutex
	// Guarded by mu.
	busySince time.Time // since when there is something to send and nothing is acknowledged; zero: idle
	troubles  string    // what is wrong now, "" when nothing is

	// Owned by run.
	attempt int
}

func newForwarder(cfg forwarderConfig) (*forwarder, error) {
	cfg.Stall = cmp.Or(cfg.Stall, 30*time.Second)
	cfg.RetryMax = cmp.Or(cfg.RetryMax, 30*time.Second)
	cfg.Log = cmp.Or(cfg.Log, slog.Default())
	f := &forwarder{cfg: cfg, chunk: chunkEvents, kick: make(chan struct{}, 1),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_edge_forwarded_total", Help: "What the hub was told of: event, run (expired events in runs), present (it had it), rejected.",
		}, []string{"outcome"}),
		resyncs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_edge_resyncs_total", Help: "Sessions with the hub that ended, by reason; lost: the hub lost events, which were sent again.",
		}, []string{"reason"}),
		stalled: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kb_edge_resync_stalled_total", Help: "Links made anew because nothing was acknowledged.",
		}),
	}
	if cfg.Rate > 0 {
		f.chunk = max(singly+1, min(chunkEvents, cfg.Rate))
		f.limit = rate.NewLimiter(rate.Limit(cfg.Rate), f.chunk)
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{f.sent, f.resyncs, f.stalled} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("forwarder: metrics: %w", err)
			}
		}
	}
	return f, nil
}

// flush makes the forwarder go on now: it waits for no pause, and dials when it has no link.
func (f *forwarder) flush() error {
	select {
	case f.kick <- struct{}{}:
	default:
	}
	if f.linked.Load() {
		return nil
	}
	return f.cfg.Hub.Reconnect()
}

// trouble says what is wrong, "" when nothing is.
func (f *forwarder) trouble() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.troubles
}

func (f *forwarder) setTrouble(text string) {
	f.mu.Lock()
	before := f.troubles
	f.troubles = text
	f.mu.Unlock()
	switch {
	case before == text:
	case text == "":
		f.cfg.Log.Info("forwarding goes on")
	default:
		f.cfg.Log.Warn("forwarding is held up; nothing is lost, and it is tried again", "reason", text)
	}
}

// pending: there is something to send. progress: the hub acknowledged. idle: neither.
func (f *forwarder) pending() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.busySince.IsZero() {
		f.busySince = time.Now()
	}
}

func (f *forwarder) progress() {
	f.attempt = 0
	f.mu.Lock()
	f.busySince = time.Now()
	f.mu.Unlock()
	f.setTrouble("")
}

func (f *forwarder) idle() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.busySince = time.Time{}
}

var errRenewed = errors.New("a new epoch has begun")

// run forwards until ctx ends, and returns nil then.
func (f *forwarder) run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { f.watch(ctx) })
	for {
		link, end, err := f.cfg.Hub.Session(ctx)
		if ctx.Err() != nil {
			if err == nil {
				end()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("forward: %w", err)
		}
		f.linked.Store(true)
		s := &session{forwarder: f, sites: make(map[string]*siteState), epoch: f.cfg.Backlog.epoch()}
		err = s.run(link)
		lost := link.Err() != nil
		end()
		if ctx.Err() != nil {
			return nil
		}
		if lost {
			f.linked.Store(false)
			f.idle()
		}
		f.ended(err, lost)
		if !f.pause(ctx) {
			return nil
		}
	}
}

// ended says why a session ended.
func (f *forwarder) ended(err error, lost bool) {
	reason := "unknown"
	switch {
	case lost:
		reason = "link"
	case errors.Is(err, errRenewed):
		reason = "epoch"
	case errors.Is(err, broker.ErrBehind):
		reason = "behind"
	case errors.Is(err, broker.ErrAway):
		reason = "away"
	case errors.Is(err, broker.ErrDenied):
		reason = "denied"
		f.setTrouble("the hub does not let this edge publish: look at its permissions")
	case errors.Is(err, broker.ErrRejected):
		reason = "rejected"
		f.setTrouble("hub back-pressure: it takes no events; look at the limits of its stream POS")
	}
	if errors.Is(err, broker.ErrRejected) && !errors.Is(err, broker.ErrAway) {
		f.idle() // it answered: another link would not help
	}
	f.resyncs.WithLabelValues(reason).Inc()
	f.cfg.Log.Debug("session with the hub ended", "reason", reason, "attempt", f.attempt, "err", err)
}

// pause waits before the next session: full jitter. It returns false when ctx ended.
func (f *forwarder) pause(ctx context.Context) bool {
	most := f.cfg.RetryMax
	if f.attempt < 16 {
		most = min(forwardRetry<<f.attempt, most)
	}
	f.attempt++
	t := time.NewTimer(mathrand.N(most) + time.Millisecond)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-f.kick:
		f.attempt = 0
	case <-t.C:
	}
	return true
}

// watch makes the link anew when it is believed alive and brings nothing.
func (f *forwarder) watch(ctx context.Context) {
	tick := time.NewTicker(max(f.cfg.Stall/8, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f.mu.Lock()
		stalled := f.linked.Load() && !f.busySince.IsZero() && time.Since(f.busySince) >= f.cfg.Stall
		if stalled {
			f.busySince = time.Now()
		}
		f.mu.Unlock()
		if !stalled {
			continue
		}
		f.stalled.Inc()
		f.cfg.Log.Warn("the hub acknowledges nothing: the link is made anew", "after", f.cfg.Stall)
		if err := f.cfg.Hub.Reconnect(); err != nil {
			f.cfg.Log.Warn("reconnect", "err", err)
		}
	}
}

// session is what is known of the hub while one link holds.
type session struct {
	*forwarder
	epoch string
	// sites that were looked up.
	sites map[string]*siteState
}

// siteState is how far the hub has come with a site.
type siteState struct {
	site   string
	number uint64 // the last one it has of my epoch
	seq    uint64 // of its last event in POS
	known  bool   // seq is
	// Of the chunk under way.
	run     []queued
	touched bool
}

func (s *session) run(ctx context.Context) error {
	b := s.cfg.Backlog
	if sites := b.open(); len(sites) > 0 {
		s.pending()
		if err := s.lookUp(ctx, sites); err != nil {
			return err
		}
	}
	b.resumed()
	s.idle()
	for after := b.cursor(); ; {
		chunk, err := b.next(ctx, after, s.chunk, chunkBytes)
		if err != nil {
			return err
		}
		if len(chunk) == 0 {
			s.idle()
			s.setTrouble("")
			if err := b.wait(ctx, after); err != nil {
				return err
			}
			if chunk, err = b.next(ctx, after, s.chunk, chunkBytes); err != nil {
				return err
			}
			if len(chunk) == 0 { // what is there was moved; its successors are to come
				if !sleep(ctx, forwardRetry) {
					return context.Cause(ctx)
				}
				continue
			}
		}
		s.pending()
		if err := s.lookUp(ctx, missing(s.sites, chunk)); err != nil {
			return err
		}
		if err := s.send(ctx, chunk, false); err != nil {
			return err
		}
		after = chunk[len(chunk)-1].pos
		s.progress()
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// missing returns the sites of a chunk that were not looked up.
func missing(known map[string]*siteState, chunk []queued) []string {
	var sites []string
	var seen map[string]bool
	for i := range chunk {
		site := chunk[i].event.Site
		if known[site] != nil || seen[site] {
			continue
		}
		if seen == nil {
			seen = make(map[string]bool)
		}
		seen[site] = true
		sites = append(sites, site)
	}
	return sites
}

// look asks the hub for its last event of a site.
func (s *session) look(ctx context.Context, site string) (siteState, error) {
	e, seq, err := s.cfg.Hub.LastEvent(ctx, site, s.cfg.Edge)
	at := siteState{site: site, seq: seq, known: true}
	switch {
	case err == nil && e.Epoch == s.epoch:
		at.number = e.Seq
	case err == nil, errors.Is(err, broker.ErrNone):
	case errors.Is(err, broker.ErrMalformed) && seq > 0:
		s.cfg.Log.Error("the hub's last event of this edge is none of its own: somebody else publishes in its name", "site", site, "seq", seq, "err", err)
	default:
		return at, err
	}
	return at, nil
}

// lookUp finds out how far the hub has come with sites, and sends again what it lost: of
// the events up to the cursor those that are unsettled and above the hub's number. That
// holds too when the hub has none of my epoch: what it keeps for 72 hours it has until after
// the deadline, and unsettled ones end by themselves 72 hours later. So events that are
// unsettled and not there were lost, or have come to their end.
func (s *session) lookUp(ctx context.Context, sites []string) error {
	if len(sites) == 0 {
		return nil
	}
	found := make([]siteState, len(sites))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(lookups)
	for i, site := range sites {
		g.Go(func() (err error) {
			found[i], err = s.look(gctx, site)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range found {
		s.sites[found[i].site] = &found[i]
	}
	b := s.cfg.Backlog
	for i := range found {
		at := &found[i]
		if last := b.last(at.site); at.number > last {
			s.cfg.Log.Error("the hub has more of this edge than its outbox: the disk was rolled back or copied",
				"site", at.site, "seq", at.number, "last", last)
			hub := make(map[string]uint64, len(s.sites))
			for site, at := range s.sites {
				hub[site] = at.number
			}
			if err := b.renew(ctx, "the hub is ahead of the outbox", hub); err != nil {
				return err
			}
			return errRenewed
		}
	}
	for i := range found {
		if err := s.again(ctx, &found[i]); err != nil {
			return err
		}
	}
	return nil
}

// again sends what the hub lost of a site. That it was lost, and not merely unseen by a
// replica that lags, is certain when the hub has taken it under the condition.
func (s *session) again(ctx context.Context, at *siteState) error {
	for n := 0; ; n++ {
		before := at.number
		lost, err := s.cfg.Backlog.resend(ctx, at.site, before)
		if err != nil || len(lost) == 0 {
			return err
		}
		lost = lost[:min(len(lost), s.chunk)]
		s.pending()
		if err := s.send(ctx, lost, true); err != nil {
			return err
		}
		if at.number == before {
			return nil // nothing of it could be said
		}
		s.progress()
		if n == 0 {
			s.resyncs.WithLabelValues("lost").Inc()
			s.cfg.Log.Error("the hub lost events that it had acknowledged: they were sent again; look at its disks and at what was restored there",
				"site", at.site, "seq", before+1, "messages", len(lost))
		}
	}
}

// outgoing is one publish.
type outgoing struct {
	event  *broker.Event
	at     *siteState
	events int      // that it stands for
	expire []queued // to be ended when the hub has it
}

// send brings a chunk to the hub, and moves the cursor as far as it came. resent: the chunk
// is from below the cursor, and its end is the bridge's to say: it may have delivered it.
func (s *session) send(ctx context.Context, chunk []queued, resent bool) error {
	live, mark := 0, position{}
	for i := range chunk {
		if q := &chunk[i]; s.wanted(q) && !q.expired && !s.over(q) {
			live++
			mark = q.pos
		}
	}
	if s.limit != nil && len(chunk) > singly && live > 0 {
		if err := s.limit.WaitN(ctx, min(live, s.limit.Burst())); err != nil {
			return err
		}
	}
	if live > 0 && !resent {
		if err := s.cfg.Backlog.sending(ctx, mark); err != nil {
			return err
		}
	}
	// From here on the deadlines are looked at again: time has passed.
	var ended []queued
	over := make([]bool, len(chunk))
	for i := range chunk {
		q := &chunk[i]
		over[i] = s.wanted(q) && !q.expired && s.over(q)
		if over[i] && q.unsent && !resent {
			ended = append(ended, *q)
		}
	}
	if len(ended) > 0 {
		if err := s.cfg.Backlog.expire(ctx, ended); err != nil {
			return err
		}
	}

	out := make([]outgoing, 0, len(chunk))
	of := make([]int, len(chunk)) // which of out an entry is in; -1: none
	var touched []*siteState
	var in map[position]int
	if len(chunk) > 0 {
		in = make(map[position]int)
	}
	closeRun := func(at *siteState) error {
		if len(at.run) == 0 {
			return nil
		}
		run := at.run
		at.run = nil
		e, err := s.makeRun(at.site, run)
		if err != nil {
			return err
		}
		if e == nil {
			return nil
		}
		o := outgoing{event: e, at: at, events: len(run)}
		for _, q := range run {
			i := in[q.pos]
			of[i] = len(out)
			if over[i] && !q.unsent && !resent {
				o.expire = append(o.expire, q)
			}
		}
		out = append(out, o)
		return nil
	}
	bytes := make(map[*siteState]int)
	for i := range chunk {
		q := &chunk[i]
		of[i] = -1
		if q.event.Epoch != s.epoch {
			return errRenewed
		}
		at := s.sites[q.event.Site]
		if !s.wanted(q) {
			if !q.settled {
				s.sent.WithLabelValues("present").Inc()
			}
			continue
		}
		if !at.touched {
			at.touched = true
			touched = append(touched, at)
		}
		if q.expired || over[i] {
			size := len(q.event.ID) + len(q.event.Kind) + 80
			if n := len(at.run); n > 0 && (n == maxRun || bytes[at]+size > maxRunBytes || at.run[n-1].event.Seq+1 != q.event.Seq) {
				if err := closeRun(at); err != nil {
					return err
				}
			}
			if len(at.run) == 0 {
				bytes[at] = 0
			}
			bytes[at] += size
			in[q.pos] = i
			at.run = append(at.run, *q)
			continue
		}
		if err := closeRun(at); err != nil {
			return err
		}
		of[i] = len(out)
		out = append(out, outgoing{event: q.event, at: at, events: 1})
	}
	for _, at := range touched {
		at.touched = false
		if err := closeRun(at); err != nil {
			return err
		}
	}

	done, err := s.publish(ctx, out, chunk)
	for _, o := range out[:done] {
		o.at.number = o.event.Seq
		if o.event.Kind == broker.KindExpired {
			s.sent.WithLabelValues("run").Add(float64(o.events))
		} else {
			s.sent.WithLabelValues("event").Inc()
		}
		if len(o.expire) > 0 {
			if err := s.cfg.Backlog.expire(ctx, o.expire); err != nil {
				return err
			}
		}
	}
	if !resent {
		upTo := -1
		for i := range chunk {
			if of[i] >= done {
				break
			}
			upTo = i
		}
		if upTo >= 0 {
			s.cfg.Backlog.forwarded(chunk[upTo].pos)
		}
	}
	if done > 0 {
		s.progress()
	}
	return err
}

// wanted tells whether the hub has to be told of q.
func (s *session) wanted(q *queued) bool {
	at := s.sites[q.event.Site]
	return at != nil && q.event.Seq > at.number && (!q.settled || q.expired)
}

func (s *session) over(q *queued) bool { return s.cfg.Now().UnixMilli() >= q.event.Deadline }

// publish returns how many of out the hub has, from the front.
func (s *session) publish(ctx context.Context, out []outgoing, chunk []queued) (done int, err error) {
	if len(out) <= singly {
		for i, o := range out {
			if !o.at.known {
				if err := s.relook(ctx, o.at); err != nil {
					return i, err
				}
			}
			seq, err := s.cfg.Hub.PublishAfter(ctx, o.event, o.at.seq)
			if err != nil {
				return i, s.unfit(ctx, o, chunk, err)
			}
			o.at.seq = seq
			o.at.number = o.event.Seq
			s.progress()
		}
		return len(out), nil
	}
	batch := make([]broker.Next, len(out))
	var touched []*siteState
	for i, o := range out {
		batch[i].Event = o.event
		if o.at.touched {
			continue
		}
		o.at.touched = true
		touched = append(touched, o.at)
		batch[i].First = true
	}
	for _, at := range touched {
		at.touched = false
	}
	for i := range batch {
		if !batch[i].First {
			continue
		}
		at := out[i].at
		if !at.known {
			if err := s.relook(ctx, at); err != nil {
				return 0, err
			}
		}
		batch[i].After = at.seq
	}
	for _, at := range touched {
		at.known = false
	}
	done, err = s.cfg.Hub.PublishBatch(ctx, batch)
	if err != nil && done == 0 {
		err = s.unfit(ctx, out[0], chunk, err)
	}
	return done, err
}

// relook finds the sequence of what was last stored by a batch. A replica that does not
// have it yet is asked again.
func (s *session) relook(ctx context.Context, at *siteState) error {
	for n := 0; ; n++ {
		now, err := s.look(ctx, at.site)
		if err != nil {
			return err
		}
		if now.number == at.number {
			at.seq, at.known = now.seq, true
			return nil
		}
		if n == 5 {
			return fmt.Errorf("%w: site %s: it has number %d, not %d", broker.ErrBehind, at.site, now.number, at.number)
		}
		if !sleep(ctx, 10*time.Millisecond<<n) {
			return context.Cause(ctx)
		}
	}
}

// unfit ends an event that cannot be put on the wire for what it is, so that it does not
// block the line: the next session puts it into a run. A run that is unfit stays an error.
func (s *session) unfit(ctx context.Context, o outgoing, chunk []queued, err error) error {
	if !errors.Is(err, broker.ErrInvalid) || o.event.Kind == broker.KindExpired {
		return err
	}
	for i := range chunk {
		if chunk[i].event != o.event {
			continue
		}
		s.sent.WithLabelValues("rejected").Inc()
		s.cfg.Log.Error("an event cannot be sent to the hub as it is: it ends as failed; tell the store, it is not delivered",
			"site", o.event.Site, "kind", o.event.Kind, "id", o.event.ID, "seq", o.event.Seq, "reason", "rejected-by-hub", "err", err)
		return errors.Join(err, s.cfg.Backlog.expire(ctx, chunk[i:i+1]))
	}
	return err
}

// makeRun makes the event that tells of a run; nil when the site has no binding key here,
// which leaves a hole in its numbers that the bridges raise an alarm for: the POS know.
func (s *session) makeRun(site string, run []queued) (*broker.Event, error) {
	keys := s.cfg.Keys.Site(site)
	if keys == nil || keys.Binding == nil {
		s.sent.WithLabelValues("rejected").Add(float64(len(run)))
		s.cfg.Log.Error("the bridges are not told of expired events: the site has no binding key here; set the site again until its backlog is gone",
			"site", site, "seq", run[0].event.Seq, "messages", len(run))
		return nil, nil
	}
	body := make([]byte, 0, 96*len(run)+16)
	body = append(body, `{"expired":[`...)
	for i, q := range run {
		if i > 0 {
			body = append(body, ',')
		}
		// Ids and kinds are names: nothing in them needs an escape.
		body = append(body, `{"id":"`...)
		body = append(body, q.event.ID...)
		body = append(body, `","kind":"`...)
		body = append(body, q.event.Kind...)
		body = append(body, `","accepted":`...)
		body = strconv.AppendInt(body, q.event.Accepted, 10)
		body = append(body, `,"deadline":`...)
		body = strconv.AppendInt(body, q.event.Deadline, 10)
		body = append(body, '}')
	}
	body = append(body, "]}"...)
	key := keys.Binding.Current()
	sealed, err := key.AppendSealPlain(nil, body)
	if err != nil {
		return nil, fmt.Errorf("run of site %s: %w", site, err)
	}
	triple, err := envelope.ParseTriple(sealed, 0)
	if err != nil {
		return nil, fmt.Errorf("run of site %s: %w", site, err)
	}
	last := run[len(run)-1].event
	e := &broker.Event{Event: envelope.Event{
		Site: site, Kind: broker.KindExpired, Edge: s.cfg.Edge, Epoch: last.Epoch, From: run[0].event.Seq, Seq: last.Seq,
		ID: strings.ToLower(ulid.Make().String()), Accepted: last.Accepted, Deadline: last.Deadline, Via: "hub", Triple: triple,
	}, Bind: key.ID()}
	e.Tag = key.TagEvent(&e.Event)
	return e, nil
}
