package edge

import (
	"container/heap"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// disk is the log that the outbox is kept in; *broker.Store is one.
type disk interface {
	Append(ctx context.Context, record []byte) (seq uint64, err error)
	Read(ctx context.Context, from uint64, f func(seq uint64, record []byte) bool) error
	Purge(upTo uint64) error
	State() broker.StoreState
	Durability() string
}

// via is Kb-Via: who is to deliver.
const via = "hub"

const (
	// maxRecordEvents and maxRecordBytes bound one record: what the store takes as one.
	maxRecordEvents = 512
	maxRecordBytes  = 700 << 10
	// maxTail bounds what is held in memory of the log's end, so that the forwarder need not
	// read what has just been written.
	maxTail = 8 << 20
	// lazily is how long an end that the hub knows may wait for another record to be logged with.
	lazily = time.Second
	// sweepEvery is how often deadlines are looked at.
	sweepEvery = 200 * time.Millisecond
	// purgeEvery is how often what is not needed any more is removed from the log.
	purgeEvery = 10 * time.Second
	// onlyOrders is the share of the log above which only orders are taken, crowded the one
	// above which settled messages are forgotten before their time.
	onlyOrders = 0.9
	crowded    = 0.8
	// reserve is added to the log's bound for what is not an event: ends, marks.
	reserve = 16 << 20

	// resolveMin and resolveMax bound the pause between two attempts to store a record of
	// unknown outcome: it is drawn between zero and a cap that doubles from one to the other.
	resolveMin = 20 * time.Millisecond
	resolveMax = time.Second
)

var (
	errStopped    = errors.New("the edge is stopping")
	errDraining   = errors.New("the edge is draining")
	errOutboxFull = errors.New("the outbox is full")
	errSiteFull   = errors.New("the site fills its share of the outbox")
	errSlow       = errors.New("the disk is slow")
	errDisk       = errors.New("the disk does not take it")
)

// outbox is where accepted events wait for the hub: a log on the disk, with one writer. It
// gives each event its number, tags it, and answers when the disk has it; requests that
// are in flight at the same time share one fsync, and one alone does not wait for others.
//
// How many requests of a site wait is bounded by who calls (the site's gate in ingest); how
// long, by wait.
type outbox struct {
	// Fixed at birth.
	edge     string
	disk     disk
	register *register
	clock    *clock
	keys     door.Keys
	linked   func() bool // a connection to the hub is there: what is accepted now is sent at once
	patience time.Duration
	max      int64   // bytes for events
	share    float64 // of it for one site
	log      *slog.Logger
	metrics  *metrics

	wake chan struct{} // has a token when the writer has something to do
	quit chan struct{} // closed by stop
	done chan struct{} // closed when the writer has ended
	used atomic.Int64  // bytes of the log, as the writer last saw it

	mu       sync.Mutex // Guards what follows. register.mu is taken before it, never after.
	events   []*job
	notes    []*note // urgent ones, in order
	later    []settledEntry
	laterBy  time.Time // when the first of later came
	stopped  bool
	draining bool

	// Guarded by register.mu.
	ep        string
	seqs      map[string]stated // by site: the last number given in ep
	mark      position          // nothing above it was ever sent, as far as the disk knows
	claimed   position          // the same, as far as this process knows; not before mark
	doubt     position          // see renew
	tip       position          // of the last event
	tail      []tailed          // the log's end
	tailBytes int
	tailFloor position      // everything above it is in tail
	arrived   chan struct{} // closed when an event arrives; nil while nobody waits
	unknown   bool          // the record under way has an unknown outcome

	// Owned by the writer.
	buf      []byte
	upcoming uint64 // sequence of the next record
	full     bool   // it was said
}

// stated is a site's last number, and the record that says so.
type stated struct{ seq, record uint64 }

// job is an event that wants to be stored.
type job struct {
	entry eventEntry
	m     *message
	draft *draft
	moved bool // renumbered: it has its times
	err   error
	done  chan struct{}
}

// note is something else that has to be stored before somebody goes on.
type note struct {
	put  func(b []byte, next uint64) ([]byte, bool) // register.mu held; false: nothing to say any more
	done func(err error)                            // register.mu not held
}

type tailed struct {
	pos   position
	event *broker.Event
	size  int
}

type outboxConfig struct {
	Edge     string
	Disk     disk
	Register *register
	Clock    *clock
	Keys     door.Keys
	Linked   func() bool
	Wait     time.Duration // for the disk
	MaxBytes int64
	Share    float64
	Log      *slog.Logger
	Metrics  *metrics
}

// openOutbox reads the log, puts the register in order, and starts the writer.
func openOutbox(ctx context.Context, cfg outboxConfig) (*outbox, error) {
	o := &outbox{
		edge: cfg.Edge, disk: cfg.Disk, register: cfg.Register, clock: cfg.Clock, keys: cfg.Keys, linked: cfg.Linked,
		patience: cfg.Wait, max: cfg.MaxBytes, share: cfg.Share, log: cfg.Log, metrics: cfg.Metrics,
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
		seqs: make(map[string]stated),
	}
	lost, err := o.restore(ctx)
	if err != nil {
		return nil, fmt.Errorf("outbox: %w", err)
	}
	o.register.ended = o.ended
	go o.write()
	switch {
	case lost:
		err = o.renew(ctx, "records of the outbox are lost", nil)
	case o.scattered():
		err = o.move(ctx)
	}
	if err != nil {
		o.abandon()
		<-o.done
		return nil, fmt.Errorf("outbox: %w", err)
	}
	return o, nil
}

// restore rebuilds everything from the log.
func (o *outbox) restore(ctx context.Context) (lost bool, err error) {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	begun := time.Now()
	state := o.disk.State()
	var last recordHeader
	var damage error
	numbers := make(map[string]stated) // of the epoch that last is of
	err = o.disk.Read(ctx, 0, func(seq uint64, record []byte) bool {
		o.upcoming = seq + 1
		h, err := readRecord(record, false, recordVisitor{
			event: func(i int, e eventEntry) {
				pos := position{seq, i}
				e.event.Edge = o.edge
				r.restore(pos, &e, entrySize(&e))
				o.tip = pos
				if e.event.Epoch != last.epoch {
					numbers = make(map[string]stated)
					last.epoch = e.event.Epoch
				}
				numbers[e.event.Site] = stated{e.event.Seq, seq}
			},
			settled: func(s settledEntry) {
				m := r.byID[s.id]
				if m == nil || m.site != s.site || !m.is(number{s.epoch, s.seq}) || m.state.final() {
					return
				}
				f := fateSettled
				if s.reason == reasonExpired && s.attempts == 0 || s.reason == reasonNoReport {
					f = fateExpired
				}
				r.end(m, verdict{state: s.state, reason: s.reason, attempts: s.attempts, kitchenStatus: s.kitchenStatus, answer: s.answer}, time.UnixMilli(s.at), f)
			},
			envelope: func(e envelopeEntry) {
				if m := r.byID[e.id]; m != nil && r.byEnvelope[e.envelope] == nil {
					r.remember(m, e.envelope)
				}
			},
			number: func(epoch string, e numberEntry) {
				if epoch != last.epoch {
					numbers = make(map[string]stated)
					last.epoch = epoch
				}
				numbers[e.site] = stated{e.seq, seq}
			},
		})
		if err != nil {
			damage = fmt.Errorf("record %d: %w", seq, err)
			return !errors.Is(err, errRecord) || h.epoch != "" // go on past an entry, not past a version
		}
		last = h
		return true
	})
	if err != nil {
		return false, err
	}
	if damage != nil && last.epoch == "" {
		return false, damage
	}
	if damage != nil {
		o.log.Error("outbox is damaged: what could be read of it is sent", "err", damage)
	}
	if o.upcoming == 0 {
		o.upcoming = state.Last + 1
	}
	o.clock.restore(last.at)
	r.advance(last.cursor, o.clock.now())
	o.mark, o.claimed, o.doubt = last.mark, last.mark, last.doubt
	o.tailFloor = o.tip
	o.ep = last.epoch
	if o.ep == "" {
		o.ep = newEpoch()
	} else {
		o.seqs = numbers
		if o.doubt == (position{}) {
			o.doubt = o.tip
		}
	}
	o.used.Store(state.Bytes)
	for r.settled.first != nil && len(r.byID) > r.maxMessages {
		r.forget(r.settled.first, dropMessage)
	}
	if n := len(r.slots); n > 0 {
		o.log.Info("outbox read", "epoch", o.ep, "messages", n, "unsettled", r.unsettled.n, "waiting", n-r.slotAfter(r.cursor), "took", time.Since(begun).Round(time.Millisecond))
	}
	return state.Lost || damage != nil, nil
}

// newEpoch mints an epoch: 16 random characters of a-z and 2-7.
func newEpoch() string {
	return strings.ToLower(rand.Text()[:16])
}

func entrySize(e *eventEntry) int64 {
	t := e.event.Triple
	return int64(350 + len(t.IV) + len(t.Fingerprint) + len(t.Message))
}

// Commit stores d as an event. ctx is the request's.
//
// nil: stored, and the disk has it. errNotStored: certainly not, and nothing of it remains.
// errUnknown: nobody knows yet; it is found out in the background.
func (o *outbox) Commit(ctx context.Context, d *draft) error {
	j := &job{draft: d, m: d.message, done: make(chan struct{})}
	j.entry = eventEntry{event: &broker.Event{
		Event:       envelope.Event{Site: d.site, Kind: d.kind, Edge: o.edge, ID: d.id, Order: d.order, Via: via, Triple: d.triple},
		Traceparent: d.trace,
	}, who: d.message.who, hash: d.message.hash, envelope: d.envelope, withoutKey: d.message.withoutKey}
	if err := o.room(&j.entry); err != nil {
		return notStored(err)
	}
	if ctx.Err() != nil {
		return notStored(context.Cause(ctx))
	}
	o.mu.Lock()
	switch {
	case o.stopped:
		o.mu.Unlock()
		return notStored(errStopped)
	case o.draining:
		o.mu.Unlock()
		return notStored(errDraining)
	}
	o.events = append(o.events, j)
	o.mu.Unlock()
	o.poke()
	t := time.NewTimer(o.patience)
	defer t.Stop()
	why := errSlow
	select {
	case <-j.done:
		return j.err
	case <-t.C:
	case <-ctx.Done():
		why = context.Cause(ctx)
	}
	o.mu.Lock()
	if i := slices.Index(o.events, j); i >= 0 {
		o.events = slices.Delete(o.events, i, i+1)
		o.mu.Unlock()
		return notStored(why)
	}
	o.mu.Unlock()
	select {
	case <-j.done:
		return j.err
	default:
	}
	d.message.unknown()
	return fmt.Errorf("%w: %w", errUnknown, why)
}

// room refuses what has none: nothing that is unsettled ever has to go for it (I13).
func (o *outbox) room(e *eventEntry) error {
	used, size := o.used.Load(), entrySize(e)
	most := o.max
	if e.event.Kind != "order" {
		most = int64(float64(most) * onlyOrders)
	}
	if used+size > most {
		return errOutboxFull
	}
	if o.share < 1 {
		o.register.mu.Lock()
		held := o.register.held[e.event.Site]
		o.register.mu.Unlock()
		if float64(held+size) > o.share*float64(o.max) {
			return errSiteFull
		}
	}
	return nil
}

func (o *outbox) poke() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

// ended hears of an end that is not logged yet. What the hub has said it says again, so it
// may wait for the next record. register.mu is held.
func (o *outbox) ended(s settledEntry) {
	o.mu.Lock()
	if len(o.later) == 0 {
		o.laterBy = time.Now().Add(lazily)
	}
	o.later = append(o.later, s)
	crowd := len(o.later) >= maxRecordEvents
	o.mu.Unlock()
	if crowd {
		o.poke()
	}
}

// seen notes that a message came again in another envelope. It is logged with the next record.
func (o *outbox) seen(id, envelope string) {
	o.enqueue(&note{
		put:  func(b []byte, _ uint64) ([]byte, bool) { return putEnvelope(b, envelopeEntry{id, envelope}), true },
		done: func(error) {},
	})
}

// enqueue has a note stored. It returns false when the writer has stopped.
func (o *outbox) enqueue(n *note) bool {
	o.mu.Lock()
	if o.stopped {
		o.mu.Unlock()
		return false
	}
	o.notes = append(o.notes, n)
	o.mu.Unlock()
	o.poke()
	return true
}

// say has a note stored and waits for it.
func (o *outbox) say(ctx context.Context, put func(b []byte, next uint64) ([]byte, bool), applied func()) error {
	ch := make(chan error, 1)
	if !o.enqueue(&note{put: put, done: func(err error) {
		if err == nil && applied != nil {
			applied()
		}
		ch <- err
	}}) {
		return errStopped
	}
	select {
	case err := <-ch:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// write is the writer: the only one who stores records.
func (o *outbox) write() {
	defer close(o.done)
	tick := time.NewTicker(lazily / 4)
	defer tick.Stop()
	purge := time.NewTicker(purgeEvery)
	defer purge.Stop()
	logged := o.register.position()
	for {
		o.mu.Lock()
		busy := len(o.events) > 0 || len(o.notes) > 0
		late := len(o.later) > 0 && (len(o.later) >= maxRecordEvents || !time.Now().Before(o.laterBy))
		stopped := o.stopped
		o.mu.Unlock()
		switch {
		case busy, late:
			logged = o.record(logged)
		case stopped:
			if o.idle(logged) {
				return
			}
			logged = o.record(logged)
			return
		default:
			select {
			case <-o.wake:
			case <-tick.C:
				if c := o.register.position(); logged.before(c) && !o.busy() {
					logged = o.record(logged)
				}
			case <-purge.C:
				o.purge()
			case <-o.quit:
				o.mu.Lock()
				o.stopped = true
				o.mu.Unlock()
			}
		}
	}
}

func (o *outbox) busy() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.events) > 0 || len(o.notes) > 0
}

func (o *outbox) idle(logged position) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.later) == 0 && !logged.before(o.register.position())
}

// position is the cursor.
func (r *register) position() position {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cursor
}

// placed is an event of the record under way.
type placed struct {
	job  *job
	pos  position
	size int64
}

// record stores one record of what waits. It returns the cursor that is logged.
func (o *outbox) record(logged position) position {
	o.mu.Lock()
	notes, later := o.notes, o.later
	o.notes, o.later = nil, nil
	if len(notes) > maxRecordEvents {
		o.notes = slices.Clone(notes[maxRecordEvents:])
		notes = notes[:maxRecordEvents]
	}
	if len(later) > maxRecordEvents {
		o.later = slices.Clone(later[maxRecordEvents:])
		later = later[:maxRecordEvents]
	}
	events := o.events
	o.events = nil
	o.mu.Unlock()
	if len(events) > maxRecordEvents {
		o.giveBack(events[maxRecordEvents:])
		events = events[:maxRecordEvents]
	}

	r := o.register
	r.mu.Lock()
	h := recordHeader{cursor: r.cursor, mark: o.mark, doubt: o.doubt, at: o.clock.moment(), epoch: o.ep}
	// What is accepted while the hub is there is sent at once: the mark need not be written
	// for it by itself.
	if o.linked() && len(events) > 0 {
		h.mark = position{o.upcoming, 1<<31 - 1}
	}
	b := putHeader(o.buf[:0], &h)
	n := 0
	var said, silent []*note
	for i, note := range notes {
		if len(b) > maxRecordBytes {
			o.unread(notes[i:], nil)
			break
		}
		next, ok := note.put(b, o.upcoming)
		if ok {
			if len(next) > len(b) {
				n++
			}
			b = next
			said = append(said, note)
		} else {
			silent = append(silent, note)
		}
	}
	for i := range later {
		if len(b) > maxRecordBytes {
			o.unread(nil, later[i:])
			later = later[:i]
			break
		}
		b = putSettled(b, &later[i])
		n++
	}
	place := make([]placed, 0, len(events))
	given := make(map[string]uint64, 8)
	for _, j := range events {
		if len(b)+int(entrySize(&j.entry)) > maxRecordBytes && n > 0 {
			break
		}
		o.number(j, given)
		before := len(b)
		b = putEvent(b, &j.entry)
		place = append(place, placed{j, position{o.upcoming, n}, int64(len(b) - before)})
		n++
	}
	r.mu.Unlock()
	o.giveBack(events[len(place):])

	err := o.append(b, place)
	o.buf = b[:0]
	if cap(o.buf) > 4<<20 {
		o.buf = nil
	}
	if err != nil {
		for _, p := range place {
			p.job.err = notStored(err)
			close(p.job.done)
		}
		for _, note := range said {
			note.done(err)
		}
		for _, note := range silent {
			note.done(nil)
		}
		o.unread(nil, later)
		return logged
	}
	o.apply(&h, place)
	for _, p := range place {
		close(p.job.done)
	}
	for _, note := range said {
		note.done(nil)
	}
	for _, note := range silent {
		note.done(nil)
	}
	if used := o.used.Load(); float64(used) > crowded*float64(o.max) {
		o.reclaim()
	}
	return h.cursor
}

func further(a, b position) position {
	if a.before(b) {
		return b
	}
	return a
}

// giveBack puts events back that had no room in the record, before those that came since.
func (o *outbox) giveBack(events []*job) {
	if len(events) == 0 {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events = append(slices.Clone(events), o.events...)
}

// unread puts back what had no room.
func (o *outbox) unread(notes []*note, later []settledEntry) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.notes = append(slices.Clone(notes), o.notes...)
	if len(later) > 0 {
		o.later = append(slices.Clone(later), o.later...)
		o.laterBy = time.Now().Add(lazily)
	}
}

// number makes j's event whole. given are the numbers of this record so far; they count
// once it is stored. register.mu is held.
func (o *outbox) number(j *job, given map[string]uint64) {
	ev := j.entry.event
	if !j.moved {
		accepted := o.clock.now()
		ev.Accepted, ev.Deadline = accepted.UnixMilli(), accepted.Add(j.draft.within).UnixMilli()
	}
	binding := j.draft.binding
	key := binding.Current()
	seq, ok := given[ev.Site]
	if !ok {
		seq = o.seqs[ev.Site].seq
	}
	seq++
	given[ev.Site] = seq
	ev.Epoch, ev.From, ev.Seq, ev.Bind = o.ep, seq, seq, key.ID()
	ev.Tag = key.TagEvent(&ev.Event)
}

// append stores a record. An unknown outcome is found out, however long it takes, before
// anything else is stored. Error: it is certainly not stored.
func (o *outbox) append(record []byte, place []placed) error {
	ctx := context.Background()
	for attempt := 0; ; attempt++ {
		seq, err := o.disk.Append(ctx, record)
		if err == nil {
			if attempt > 0 {
				o.setUnknown(false)
				o.log.Info("outcome known: the disk has the record", "attempts", attempt+1)
			}
			o.upcoming = seq + 1
			o.used.Store(o.disk.State().Bytes)
			if o.full {
				o.full = false
				o.log.Info("disk takes orders again")
			}
			return nil
		}
		if !errors.Is(err, broker.ErrUnknown) {
			o.setUnknown(false)
			if !o.full {
				o.full = true
				o.log.Error("disk takes nothing: orders are refused with 503 until it does", "err", err)
			}
			if errors.Is(err, broker.ErrStoreFull) {
				return fmt.Errorf("%w: %w", errOutboxFull, err)
			}
			return fmt.Errorf("%w: %w", errDisk, err)
		}
		if attempt == 0 {
			o.setUnknown(true)
			o.log.Error("outcome unknown: the disk did not say whether it has a record; it is asked until it does", "events", len(place), "err", err)
			for _, p := range place {
				p.job.m.unknown()
			}
		}
		select {
		case <-time.After(backoff(attempt)):
		case <-o.quit:
			if attempt > 8 {
				return fmt.Errorf("%w: %w", errStopped, err)
			}
			time.Sleep(backoff(attempt))
		}
	}
}

func (o *outbox) setUnknown(b bool) {
	o.register.mu.Lock()
	o.unknown = b
	o.register.mu.Unlock()
}

// backoff is the pause before an attempt, counted from 0.
func backoff(attempt int) time.Duration {
	most := resolveMax
	if attempt < 16 {
		most = min(resolveMin<<attempt, resolveMax)
	}
	return mathrand.N(most) + time.Millisecond
}

// apply puts what has been stored into effect.
func (o *outbox) apply(h *recordHeader, place []placed) {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	o.mark = further(o.mark, h.mark)
	o.claimed = further(o.claimed, o.mark)
	for _, p := range place {
		ev := p.job.entry.event
		r.stored(p.job.m, p.pos, &p.job.entry, p.size)
		o.seqs[ev.Site] = stated{ev.Seq, p.pos.record}
		o.tip = p.pos
		size := int(p.size)
		o.tail = append(o.tail, tailed{p.pos, ev, size})
		o.tailBytes += size
	}
	for o.tailBytes > maxTail {
		o.dropTail()
	}
	if len(place) > 0 && o.arrived != nil {
		close(o.arrived)
		o.arrived = nil
	}
}

// dropTail forgets the first of the tail. register.mu is held.
func (o *outbox) dropTail() {
	t := &o.tail[0]
	o.tailFloor = t.pos
	o.tailBytes -= t.size
	*t = tailed{}
	o.tail = o.tail[1:]
}

// reclaim makes room: what is settled is forgotten before its time.
func (o *outbox) reclaim() {
	for {
		o.purge()
		if float64(o.used.Load()) <= crowded*float64(o.max) || o.register.forgetSome(1024) == 0 {
			return
		}
	}
}

// purge removes from the log's front what nobody needs any more: what is settled with
// POS and hub and forgotten. It is called by the writer.
func (o *outbox) purge() {
	r := o.register
	r.mu.Lock()
	upTo, n := o.upcoming-1, 0 // the last record stays: its header is needed
	for _, s := range r.slots {
		if s.m != nil || r.cursor.before(s.pos) {
			upTo = min(upTo, s.pos.record)
			break
		}
		n++
	}
	if upTo <= 1 {
		r.mu.Unlock()
		return
	}
	upTo--
	first := o.disk.State().First
	if upTo < first {
		r.mu.Unlock()
		return
	}
	// The numbers of sites that will not be in the log any more.
	var numbers []numberEntry
	for site, s := range o.seqs {
		if s.record <= upTo {
			numbers = append(numbers, numberEntry{site, s.seq})
		}
	}
	r.mu.Unlock()
	for part := range slices.Chunk(numbers, maxRecordEvents) {
		r.mu.Lock()
		h := recordHeader{cursor: r.cursor, mark: o.mark, doubt: o.doubt, at: o.clock.moment(), epoch: o.ep}
		r.mu.Unlock()
		b := putHeader(nil, &h)
		for _, e := range part {
			b = putNumber(b, e)
		}
		at := o.upcoming
		if err := o.append(b, nil); err != nil {
			return
		}
		r.mu.Lock()
		for _, e := range part {
			if o.seqs[e.site].seq == e.seq {
				o.seqs[e.site] = stated{e.seq, at}
			}
		}
		r.mu.Unlock()
	}
	if err := o.disk.Purge(upTo); err != nil {
		o.log.Warn("outbox not purged; it is tried again", "err", err)
		return
	}
	r.mu.Lock()
	i := 0
	for i < len(r.slots) && r.slots[i].pos.record <= upTo {
		i++
	}
	r.slots = r.slots[i:]
	r.mu.Unlock()
	o.used.Store(o.disk.State().Bytes)
}

// stop stores what waits and ends the writer. Nothing may be committed any more.
func (o *outbox) stop() {
	o.abandon()
	<-o.done
}

func (o *outbox) abandon() {
	o.mu.Lock()
	was := o.stopped
	o.stopped = true
	o.mu.Unlock()
	if !was {
		close(o.quit)
	}
	o.poke()
}

// What follows is for the forwarder: backlog says what each does.

func (o *outbox) epoch() string {
	o.register.mu.Lock()
	defer o.register.mu.Unlock()
	return o.ep
}

func (o *outbox) cursor() position { return o.register.position() }

func (o *outbox) last(site string) uint64 {
	o.register.mu.Lock()
	defer o.register.mu.Unlock()
	return o.seqs[site].seq
}

func (o *outbox) open() []string {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := make(map[string]bool)
	var sites []string
	for m := r.unsettled.first; m != nil; m = m.next {
		if m.seq != 0 && !seen[m.site] {
			seen[m.site] = true
			sites = append(sites, m.site)
		}
	}
	return sites
}

func (o *outbox) wait(ctx context.Context, after position) error {
	for {
		o.register.mu.Lock()
		if after.before(o.tip) {
			o.register.mu.Unlock()
			return nil
		}
		if o.arrived == nil {
			o.arrived = make(chan struct{})
		}
		ch := o.arrived
		o.register.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (o *outbox) next(ctx context.Context, after position, most, maxBytes int) ([]queued, error) {
	r := o.register
	r.mu.Lock()
	if !after.before(o.tip) {
		r.mu.Unlock()
		return nil, nil
	}
	if !after.before(o.tailFloor) {
		var out []queued
		for i, bytes := o.tailAfter(after), 0; i < len(o.tail) && len(out) < most && (bytes < maxBytes || len(out) == 0); i++ {
			out = append(out, queued{pos: o.tail[i].pos, event: o.tail[i].event})
			bytes += o.tail[i].size
		}
		out = o.judge(out)
		r.mu.Unlock()
		return out, nil
	}
	r.mu.Unlock()

	for from := after; ; {
		out, at, err := o.fetch(ctx, from, most, maxBytes)
		if err != nil {
			return nil, err
		}
		r.mu.Lock()
		out = o.judge(out)
		end := !at.before(o.tip)
		r.mu.Unlock()
		if len(out) > 0 || end || at == from {
			return out, nil
		}
		from = at // all of it was moved
	}
}

// fetch reads events from the disk. at is as far as it has read.
func (o *outbox) fetch(ctx context.Context, after position, most, maxBytes int) (out []queued, at position, err error) {
	at = after
	bytes := 0
	var damage error
	err = o.disk.Read(ctx, max(after.record, 1), func(seq uint64, record []byte) bool {
		_, damage = readRecord(record, true, recordVisitor{event: func(i int, e eventEntry) {
			pos := position{seq, i}
			if !after.before(pos) || len(out) >= most || bytes >= maxBytes && len(out) > 0 {
				return
			}
			e.event.Edge = o.edge
			out = append(out, queued{pos: pos, event: e.event})
			bytes += int(entrySize(&e))
			at = pos
		}})
		return damage == nil && len(out) < most && bytes < maxBytes
	})
	if err == nil {
		err = damage
	}
	return out, at, err
}

// tailAfter is the index in tail of the first event behind after. register.mu is held.
func (o *outbox) tailAfter(after position) int {
	i, _ := slices.BinarySearchFunc(o.tail, after, func(t tailed, p position) int {
		if p.before(t.pos) {
			return 1
		}
		return -1
	})
	return i
}

// judge says of each what has become of it meanwhile, and leaves out what was moved. From
// now on none of them is expired but by the forwarder. register.mu is held.
func (o *outbox) judge(in []queued) []queued {
	out := in[:0]
	for _, q := range in {
		i, ok := o.register.slotAt(q.pos)
		if !ok {
			continue
		}
		switch o.register.slots[i].fate {
		case fateMoved:
			continue
		case fateExpired:
			q.expired = true
		case fateSettled:
			q.settled = true
		}
		if o.register.slots[i].m == nil && !q.expired {
			q.settled = true
		}
		o.claimed = further(o.claimed, q.pos)
		out = append(out, q)
	}
	return out
}

func (o *outbox) sending(ctx context.Context, upTo position) error {
	o.register.mu.Lock()
	covered := !o.mark.before(upTo)
	o.register.mu.Unlock()
	if covered {
		return nil
	}
	err := o.say(ctx, func(b []byte, _ uint64) ([]byte, bool) {
		if !o.mark.before(upTo) {
			return b, false
		}
		return putMark(b, upTo), true
	}, func() {
		o.register.mu.Lock()
		defer o.register.mu.Unlock()
		o.mark = further(o.mark, upTo)
		o.claimed = further(o.claimed, upTo)
	})
	if errors.Is(err, errDisk) || errors.Is(err, errOutboxFull) {
		// A disk that takes nothing must not keep from the hub what is on it already.
		o.log.Warn("sending without a mark on the disk: after a crash now, an order could be told expired that the hub has", "err", err)
		o.register.mu.Lock()
		defer o.register.mu.Unlock()
		o.mark = further(o.mark, upTo)
		o.claimed = further(o.claimed, upTo)
		return nil
	}
	return err
}

func (o *outbox) forwarded(upTo position) {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	r.advance(upTo, o.clock.now())
	for len(o.tail) > 0 && !upTo.before(o.tail[0].pos) {
		o.dropTail()
	}
}

func (o *outbox) told(site string) uint64 {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.told[site]; n.epoch == o.ep {
		return n.seq
	}
	return 0
}

func (o *outbox) reject(ctx context.Context, events []queued, reason string) error {
	r := o.register
	ms := make([]*message, 0, len(events))
	r.mu.Lock()
	for _, q := range events {
		if m := r.byID[q.event.ID]; m != nil && m.pos == q.pos {
			ms = append(ms, m)
		}
	}
	r.mu.Unlock()
	return o.fail(ctx, ms, reason, true)
}

// fail ends messages on the edge's own word: the disk has it before anybody is told.
// Unless forced, what may have been sent is left alone.
func (o *outbox) fail(ctx context.Context, ms []*message, reason string, forced bool) error {
	r := o.register
	for part := range slices.Chunk(ms, maxRecordEvents) {
		var put []*message
		now := o.clock.now()
		err := o.say(ctx, func(b []byte, _ uint64) ([]byte, bool) {
			for _, m := range part {
				if m.state.final() || !forced && !o.claimed.before(m.pos) && !faultNoMark {
					continue
				}
				b = putSettled(b, &settledEntry{site: m.site, epoch: m.epoch, id: m.id, seq: m.seq, state: stateFailed, reason: reason, at: now.UnixMilli()})
				put = append(put, m)
			}
			return b, len(put) > 0
		}, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			for _, m := range put {
				if !m.state.final() {
					r.end(m, verdict{state: stateFailed, reason: reason}, now, fateExpired)
				}
			}
		})
		if err != nil {
			return err
		}
		o.metrics.drops.WithLabelValues(reason).Add(float64(len(put)))
	}
	return nil
}

func (o *outbox) resend(ctx context.Context, site string, after uint64) ([]queued, error) {
	r := o.register
	r.mu.Lock()
	var wanted []position
	for i := range r.slots {
		s := &r.slots[i]
		if r.cursor.before(s.pos) {
			break
		}
		if m := s.m; m != nil && m.site == site && m.epoch == o.ep && m.seq > after && !m.state.final() {
			wanted = append(wanted, s.pos)
		}
	}
	r.mu.Unlock()
	var out []queued
	for _, pos := range wanted {
		got, _, err := o.fetch(ctx, position{pos.record, pos.index - 1}, 1, 1)
		if err != nil {
			return nil, err
		}
		if len(got) == 1 && got[0].pos == pos {
			out = append(out, got[0])
		}
	}
	return out, nil
}

// resumed: the hub was looked at, and is not ahead of the log. What is numbered from now on
// is known to go on from there.
func (o *outbox) resumed() {
	o.register.mu.Lock()
	defer o.register.mu.Unlock()
	o.doubt = position{}
}

// renew starts a new epoch. What stands above the cursor is numbered and tagged anew; but
// what the hub has is not sent twice: hub says by site how far it has come in the epoch
// that ends. Numbers of a rolled back log have been given twice, so the hub's word counts
// only for what was in the log when it was first opened without having seen the hub since
// (doubt): those are the events that the hub has under these numbers.
func (o *outbox) renew(ctx context.Context, why string, hub map[string]uint64) error {
	r := o.register
	r.mu.Lock()
	old := o.ep
	o.ep = newEpoch()
	now := o.clock.now()
	for i := r.slotAfter(r.cursor); i < len(r.slots); i++ {
		s := &r.slots[i]
		if s.m == nil || s.m.epoch != old || o.doubt.before(s.pos) || s.m.seq > hub[s.m.site] {
			continue
		}
		if s.m.state == stateAccepted {
			s.m.state, s.m.forwarded = stateForwarded, now
			s.m.wake()
		}
		s.fate = fateMoved // nothing is to be done about it
	}
	o.seqs = make(map[string]stated)
	o.doubt = position{}
	ep := o.ep
	r.mu.Unlock()
	o.metrics.epochs.Inc()
	o.log.Error("new epoch: numbers begin anew, and what is not at the hub is numbered again", "why", why, "epoch", ep, "before", old)
	return o.move(ctx)
}

// scattered tells whether a move was interrupted.
func (o *outbox) scattered() bool {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := r.slotAfter(r.cursor); i < len(r.slots); i++ {
		if s := r.slots[i]; s.m != nil && s.fate != fateMoved && s.m.epoch != o.ep {
			return true
		}
	}
	return false
}

// move numbers anew what stands above the cursor under an epoch that has ended, in its
// order, and then sets the cursor behind the old ones.
func (o *outbox) move(ctx context.Context) error {
	r := o.register
	r.mu.Lock()
	from, end := r.cursor, o.tip
	r.mu.Unlock()
	for from.before(end) {
		got, at, err := o.fetch(ctx, from, maxRecordEvents/2, maxRecordBytes/2)
		if err != nil {
			return err
		}
		if at == from {
			break
		}
		from = at
		var jobs []*job
		r.mu.Lock()
		for _, q := range got {
			i, ok := r.slotAt(q.pos)
			if end.before(q.pos) || !ok || r.slots[i].m == nil || r.slots[i].fate == fateMoved || q.event.Epoch == o.ep {
				continue
			}
			m := r.slots[i].m
			site := o.keys.Site(m.site)
			if site == nil || site.Binding == nil {
				o.log.Error("order of a site that is not configured stays behind", "site", m.site, "id", m.id)
				continue
			}
			j := &job{m: m, moved: true, done: make(chan struct{}), draft: &draft{binding: site.Binding},
				entry: eventEntry{event: q.event, who: m.who, hash: m.hash, withoutKey: m.withoutKey}}
			if len(m.envelopes) > 0 {
				j.entry.envelope = m.envelopes[0]
			}
			jobs = append(jobs, j)
		}
		r.mu.Unlock()
		if len(jobs) == 0 {
			continue
		}
		o.mu.Lock()
		o.events = append(jobs, o.events...) // before anything newer
		o.mu.Unlock()
		o.poke()
		for _, j := range jobs {
			select {
			case <-j.done:
				if j.err != nil {
					return j.err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}
	o.forwarded(end)
	return nil
}

// sweep looks at deadlines until ctx ends.
func (o *outbox) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	lastTidy := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			o.clock.watch()
			if err := o.lookAtDeadlines(ctx); err != nil && ctx.Err() == nil {
				o.log.Warn("ends of messages not stored; they are tried again", "err", err)
			}
			if now.Sub(lastTidy) > time.Minute {
				lastTidy = now
				o.register.sweep(o.clock.now())
			}
		}
	}
}

// lookAtDeadlines ends what has expired here, notes what is overdue, and gives up what
// nobody will report any more.
func (o *outbox) lookAtDeadlines(ctx context.Context) error {
	r := o.register
	now := o.clock.now()
	var expired, unreported []*message
	late := 0
	r.mu.Lock()
	for len(r.due) > 0 && r.due[0].due <= now.UnixMilli() {
		m := r.due[0]
		switch {
		case now.Sub(m.deadline) > noReportAfter:
			unreported = append(unreported, m)
			m.due = now.Add(time.Second).UnixMilli() // again, if the disk does not take it
		case faultNoMark || o.claimed.before(m.pos):
			expired = append(expired, m)
			m.due = now.Add(time.Second).UnixMilli()
		case now.Sub(m.deadline) < overdueGrace:
			m.due = m.deadline.Add(overdueGrace).UnixMilli()
		default:
			if !m.overdue {
				m.overdue = true
				r.late++
				late++
				m.wake()
			}
			m.due = m.deadline.Add(noReportAfter + time.Second).UnixMilli()
		}
		heap.Fix(&r.due, 0)
	}
	r.mu.Unlock()
	if late > 0 {
		o.metrics.overdue.Add(float64(late))
		o.log.Warn("messages are overdue: their deadline is over, and no bridge has said how they ended", "messages", late)
	}
	err := o.fail(ctx, expired, reasonExpired, false)
	if len(expired) > 0 && err == nil {
		o.log.Warn("messages expired before they reached the hub; their POS are told", "messages", len(expired), "reason", reasonExpired)
	}
	if len(unreported) > 0 && err == nil {
		if err = o.fail(ctx, unreported, reasonNoReport, true); err == nil {
			o.log.Error("no report came for messages 72 hours after their deadline: they count as failed", "messages", len(unreported), "id", unreported[0].id, "reason", reasonNoReport)
		}
	}
	return err
}

// gauges are figures of the outbox.
type gauges struct {
	backlog, unsettled, overdue int
	age                         time.Duration // of the oldest that is not at the hub
	unknown                     bool
}

func (o *outbox) gauge() gauges {
	r := o.register
	r.mu.Lock()
	defer r.mu.Unlock()
	g := gauges{unsettled: r.unsettled.n, overdue: r.late, unknown: o.unknown}
	at := r.slotAfter(r.cursor)
	g.backlog = len(r.slots) - at
	for ; at < len(r.slots); at++ {
		if m := r.slots[at].m; m != nil {
			g.age = max(0, o.clock.now().Sub(m.accepted))
			break
		}
	}
	return g
}
