package broker

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// What Store.Append says of a record beside ErrInvalid and ErrUnknown.
var (
	// ErrStoreFull: the store has no room, or its disk has none. The record is certainly not
	// stored.
	ErrStoreFull = errors.New("store is full")
	// ErrStoreUnwell: the store cannot write, or is closed. The record is certainly not stored.
	ErrStoreUnwell = errors.New("store takes nothing")
)

const (
	// storeMaxRecord is the size of the largest record, in bytes.
	storeMaxRecord = 1 << 20
	// storeTimeout is how long one append or read waits for the server. An fsync can take
	// longer; its outcome is then unknown until it has ended.
	storeTimeout = 5 * time.Second
	// reopenEvery is the least time between two attempts to open a store that failed.
	reopenEvery = time.Second
	// The store leaves the disk's last bytes alone: this many or that share of the disk,
	// whichever is smaller.
	diskReserve, diskReserveShare = 32 << 20, 50
	// diskEvery is how often the room on the disk is looked at.
	diskEvery = time.Second
)

// StoreConfig is where a Store is kept, and how.
type StoreConfig struct {
	// Dir is the store's folder, made when missing, locked while the store is open. Required.
	Dir string
	// KeyFile holds the key that the store is encrypted with: 32 random bytes in base64, mode
	// 0600; made when it is missing and the store has no data. Required.
	KeyFile string
	// Sync is "always" (default): Append returns when the disk has the record; or "interval":
	// the disk has it within a second.
	Sync string
	// MaxBytes bounds the records and what the server adds to each, about 100 bytes. Required.
	MaxBytes int64
	Log      *slog.Logger          // nil: slog.Default()
	Metrics  prometheus.Registerer // nil: not registered
}

// Validate reports every mistake, one a line.
func (c StoreConfig) Validate() error {
	var errs []error
	if c.Dir == "" {
		errs = append(errs, errors.New("dir: required"))
	}
	if c.KeyFile == "" {
		errs = append(errs, errors.New("key_file: required"))
	}
	if !slices.Contains([]string{"", syncAlways, syncInterval}, c.Sync) {
		errs = append(errs, fmt.Errorf("sync: %q is neither %s nor %s", c.Sync, syncAlways, syncInterval))
	}
	if c.MaxBytes < 2*storeMaxRecord {
		errs = append(errs, fmt.Errorf("max_bytes: %d is less than two records of the largest size take (%d)", c.MaxBytes, 2*storeMaxRecord))
	}
	return errors.Join(errs...)
}

// StoreState is how a store is.
type StoreState struct {
	First, Last     uint64 // sequences; Last is First-1 when the store is empty
	Bytes, MaxBytes int64  // records and what the server adds to them
	DiskFree        int64  // bytes that this user may still write, at most a second old; -1: not known
	// Lost: the disk does not have records that it had and that nobody purged. It stands from
	// the opening that found it until the first Append after; when it is found while the store
	// is open, the store takes nothing more.
	Lost bool
	Err  error // why it takes nothing now; nil: it does
}

// Store is a log of records on a disk of this machine: the stream OUT of an embedded server
// of its own, which nobody else can reach. Records are encrypted at rest, and numbered
// without gaps; only the front can be removed. It has one writer, and any number of readers.
//
// When a write fails, the server freezes the stream. The store is then closed and opened
// again, at most once a second, by the Append that failed and those after it.
type Store struct {
	// Fixed at birth.
	cfg     StoreConfig
	log     *slog.Logger
	key     string
	errors  *prometheus.CounterVec // reason
	reopens prometheus.Counter
	side    *storeSide
	unlock  func()
	disk    func(dir string) (free, total int64)

	writer sync.Mutex // held over an Append, and while the server is exchanged
	// Guarded by writer.
	pending []byte    // the record of unknown outcome; nil: none
	tried   time.Time // when the server was last started
	asked   uint64    // appends asked of the server

	mu sync.Mutex
	// Guarded by mu.
	now    *storeServer // nil: the server is not running
	state  StoreState
	why    error     // why now is nil, or the store takes nothing for good
	fatal  bool      // why is for good
	total  int64     // size of the disk
	diskAt time.Time // when the disk was looked at
	closed bool
}

// OpenStore opens the store in cfg.Dir, or makes it. It fails, and changes nothing, when
// another process has the folder, when the key is missing or another one than the data were
// written with, and when the disk cannot be written. The data of a process that was killed
// are recovered first, which takes as long as it needs: everything is read once, so that
// what the disk has lost is known (State().Lost).
func OpenStore(ctx context.Context, cfg StoreConfig) (*Store, error) {
	return openStore(ctx, cfg, diskSpace)
}

func openStore(ctx context.Context, cfg StoreConfig, disk func(string) (free, total int64)) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &Store{cfg: cfg, log: cfg.Log, disk: disk}
	if err := s.register(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("store: metrics: %w", err)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	var err error
	if s.unlock, err = lockFile(filepath.Join(cfg.Dir, "store.lock")); err != nil {
		return nil, fmt.Errorf("store: folder %s: %w", cfg.Dir, err)
	}
	if err := s.open(ctx); err != nil {
		if s.side != nil {
			s.side.close()
		}
		s.unlock()
		return nil, fmt.Errorf("store: folder %s: %w", cfg.Dir, err)
	}
	if cfg.Sync == syncInterval {
		s.log.Warn("outbox acknowledges before the disk has it", "sync", syncInterval, "may_lose", syncEvery.String())
	}
	return s, nil
}

func (s *Store) register(r prometheus.Registerer) error {
	s.errors = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kb_broker_store_errors_total", Help: "Records that the local store did not take at once, by reason: full, unwell, unknown.",
	}, []string{"reason"})
	reopens := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kb_broker_store_reopens_total", Help: "Times that the local store was closed and opened after it had failed.",
	}, nil)
	if r != nil {
		for _, c := range []**prometheus.CounterVec{&s.errors, &reopens} {
			err := r.Register(*c)
			if there, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
				if *c, ok = there.ExistingCollector.(*prometheus.CounterVec); ok {
					continue
				}
			}
			if err != nil {
				return err
			}
		}
	}
	s.reopens = reopens.WithLabelValues()
	return nil
}

// open is the first opening: it compares what is there with what is known to have been.
func (s *Store) open(ctx context.Context) error {
	data, err := hasBlocks(s.cfg.Dir)
	if err != nil {
		return err
	}
	if s.side, err = openSide(s.cfg.Dir); err != nil {
		return err
	}
	known := s.side.get()
	if s.key, err = storeKey(s.cfg.KeyFile, data); err != nil {
		return err
	}
	if err := checkKey(s.cfg.Dir, s.cfg.KeyFile, s.key, data); err != nil {
		return err
	}
	if err := s.start(ctx, data, known.last+1); err != nil {
		return err
	}
	st := &s.state
	told, err := s.side.told()
	if err != nil {
		s.log.Warn("outbox: list of records known to be lost cannot be read", "err", err)
	}
	gap := slices.ContainsFunc(s.now.gaps, func(g gap) bool { return !told.has(g) })
	if known.lost || gap || st.Last < known.last || st.First > known.floor+1 || s.now.made && known.floor < known.last {
		st.Lost = true
		s.log.Error("outbox: records are lost: the disk does not have what it had",
			"first", st.First, "last", st.Last, "expected_first", known.floor+1, "expected_last", known.last, "gaps", len(s.now.gaps))
	}
	if err := s.side.put(sideState{last: st.Last, floor: st.First - 1, lost: st.Lost}, true); err != nil {
		s.stop(nil)
		return err
	}
	return nil
}

// start starts the server and takes over its state. s.now must be nil.
func (s *Store) start(ctx context.Context, data bool, first uint64) error {
	s.tried = time.Now()
	now, err := startStore(ctx, s.cfg, s.key, data, first)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now, s.why = now, nil
	s.state.First, s.state.Last, s.state.Bytes, s.state.MaxBytes = now.first, now.last, now.bytes, s.cfg.MaxBytes
	return nil
}

// stop stops the server, if it runs.
func (s *Store) stop(why error) {
	s.mu.Lock()
	now := s.now
	s.now, s.why = nil, why
	s.mu.Unlock()
	if now != nil {
		now.stop()
	}
}

// Append stores a record of 1 byte to 1 MiB and returns its sequence when the disk has it
// (see StoreConfig.Sync). One caller at a time.
//
// Errors: ErrStoreFull, ErrStoreUnwell, ErrInvalid: certainly not stored. ErrUnknown: nobody
// knows yet; the next Append must be of the same record, and returns its sequence if it had
// been stored.
func (s *Store) Append(ctx context.Context, record []byte) (seq uint64, err error) {
	return s.take(ctx, record, 1)
}

// AppendReserved is Append for what makes room, or says what has become of records: it may
// use three quarters of what the store otherwise leaves free of the disk.
func (s *Store) AppendReserved(ctx context.Context, record []byte) (seq uint64, err error) {
	return s.take(ctx, record, 4)
}

func (s *Store) take(ctx context.Context, record []byte, share int64) (uint64, error) {
	s.writer.Lock()
	defer s.writer.Unlock()
	seq, err := s.append(ctx, record, share)
	switch {
	case err == nil:
	case errors.Is(err, ErrStoreFull):
		s.errors.WithLabelValues("full").Inc()
	case errors.Is(err, ErrUnknown):
		s.errors.WithLabelValues("unknown").Inc()
	case errors.Is(err, ErrStoreUnwell):
		s.errors.WithLabelValues("unwell").Inc()
	}
	return seq, err
}

func (s *Store) append(ctx context.Context, record []byte, share int64) (uint64, error) {
	if len(record) == 0 || len(record) > storeMaxRecord {
		return 0, fmt.Errorf("%w: a record of %d bytes; 1 to %d are taken", ErrInvalid, len(record), storeMaxRecord)
	}
	if s.pending != nil && !bytes.Equal(s.pending, record) {
		return 0, fmt.Errorf("%w: the outcome of the record before is unknown: append that one again first", ErrInvalid)
	}
	now, last, err := s.current()
	if err != nil {
		return 0, s.undecided(err)
	}
	if now == nil || now.hasFailed() {
		return s.settle(ctx, record, share)
	}
	if s.pending == nil {
		if err := s.room(int64(len(record)), share); err != nil {
			return 0, err
		}
	}

	s.asked++
	seq, v, err := now.append(ctx, s.asked, record, last)
	switch {
	case v == stored && seq == last+1:
		return s.appended(seq, record), nil
	case v == missed && s.pending == nil: // it never left
		return 0, fmt.Errorf("%w: %w", ErrStoreUnwell, err)
	case v == missed, v == open:
		if s.pending == nil {
			s.pending = bytes.Clone(record)
		}
		s.note(err)
		return 0, fmt.Errorf("%w: %w", ErrUnknown, err)
	case errors.Is(err, ErrStoreFull) && s.pending == nil:
		s.note(err)
		return 0, err
	case errors.Is(err, ErrStoreFull), errors.Is(err, errSequenceTaken) && s.pending != nil:
		// The earlier attempt has been decided before this one.
		return s.find(ctx, now, last, record, err)
	case err == nil:
		err = fmt.Errorf("acknowledged with sequence %d, expected %d", seq, last+1)
	}
	s.fail(record, err)
	return s.settle(ctx, record, share)
}

// current returns the server, and the last sequence. Error: the store takes nothing for good.
func (s *Store) current() (*storeServer, uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, 0, errors.New("the store is closed")
	case s.fatal:
		return nil, 0, s.why
	}
	return s.now, s.state.Last, nil
}

// undecided is the error of an append that could not be tried.
func (s *Store) undecided(why error) error {
	if s.pending != nil {
		return fmt.Errorf("%w: %w", ErrUnknown, why)
	}
	return fmt.Errorf("%w: %w", ErrStoreUnwell, why)
}

// fail stops the server after a write that failed.
func (s *Store) fail(record []byte, why error) {
	s.log.Error("outbox: write failed; the store is opened again", "err", why)
	if s.pending == nil {
		s.pending = bytes.Clone(record)
	}
	s.stop(why)
}

// settle opens the store again after it failed, and says what has become of the record
// whose outcome is unknown. When none is, the record is appended.
func (s *Store) settle(ctx context.Context, record []byte, share int64) (uint64, error) {
	s.mu.Lock()
	now, last, why := s.now, s.state.Last, s.why
	s.mu.Unlock()
	if now != nil {
		why = now.cause()
	}
	if wait := reopenEvery - time.Since(s.tried); wait > 0 {
		return 0, s.undecided(fmt.Errorf("opened again in %v: %w", wait.Round(time.Millisecond), why))
	}
	s.stop(why)
	s.reopens.Inc()
	if err := s.start(ctx, true, 0); err != nil {
		s.tried = time.Now()
		s.stop(err)
		s.log.Error("outbox: cannot be opened", "err", err)
		return 0, s.undecided(err)
	}
	s.mu.Lock()
	now = s.now
	s.mu.Unlock()
	s.setLast(last) // until it is known what stands behind it
	s.log.Info("outbox: opened again", "last", now.last)
	switch {
	case now.last == last && s.pending == nil:
		return s.append(ctx, record, share)
	case now.last == last || now.last == last+1 && s.pending != nil:
		return s.find(ctx, now, last, record, why)
	}
	s.mu.Lock()
	s.state.Lost = s.state.Lost || now.last < last
	s.mu.Unlock()
	return 0, s.giveUp(fmt.Errorf("after a failure the last record is %d, expected %d: restart", now.last, last))
}

// find looks for the record of unknown outcome behind last, when the server has decided it.
func (s *Store) find(ctx context.Context, now *storeServer, last uint64, record []byte, why error) (uint64, error) {
	there, found, err := now.get(ctx, last+1)
	switch {
	case err != nil:
		return 0, s.undecided(fmt.Errorf("look for it: %w", err))
	case !found:
		s.pending = nil
		if errors.Is(why, ErrStoreFull) {
			return 0, why
		}
		return 0, fmt.Errorf("%w: the disk failed, and does not have it: %w", ErrStoreUnwell, why)
	case !bytes.Equal(there, record):
		return 0, s.giveUp(fmt.Errorf("record %d is another than the one that was appended: restart", last+1))
	}
	return s.appended(last+1, record), nil
}

// giveUp ends the store's taking anything until it is opened anew.
func (s *Store) giveUp(why error) error {
	s.log.Error("outbox: takes nothing more", "err", why)
	if err := s.side.update(func(k *sideState) { k.lost = true }, true); err != nil {
		s.log.Error("outbox: what is lost is not noted", "err", err)
	}
	s.mu.Lock()
	s.why, s.fatal = why, true
	s.mu.Unlock()
	return s.undecided(why)
}

// appended notes that the disk has a record.
func (s *Store) appended(seq uint64, record []byte) uint64 {
	s.pending = nil
	s.mu.Lock()
	lost := s.state.Lost
	s.state.Last, s.state.Lost, s.state.Err = seq, false, nil
	s.state.Bytes += int64(len(record)) + storeOverhead(seq-1)
	s.mu.Unlock()
	if lost {
		if err := s.side.tell(s.now.gaps); err != nil {
			s.log.Warn("outbox: the loss that was told is told again at the next start", "err", err)
			s.mu.Lock()
			s.state.Lost = true
			s.mu.Unlock()
		}
	}
	// Behind is harmless: what is lost of the end may go unnoticed then.
	_ = s.side.update(func(k *sideState) { k.last = seq }, false)
	return seq
}

// setLast is for a sequence that only looks taken.
func (s *Store) setLast(last uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Last = last
}

func (s *Store) note(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.Err = why
}

// room says whether the disk has enough for a record of n bytes.
func (s *Store) room(n, share int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roomLocked(n, share)
}

// roomLocked is room. s.mu is held.
func (s *Store) roomLocked(n, share int64) error {
	if now := time.Now(); now.Sub(s.diskAt) >= diskEvery {
		s.state.DiskFree, s.total = s.disk(s.cfg.Dir)
		s.diskAt = now
	}
	if s.state.DiskFree < 0 {
		return nil
	}
	keep := min(diskReserve, s.total/diskReserveShare) / share
	if s.state.DiskFree-n >= keep {
		s.state.DiskFree -= n // until it is looked at
		return nil
	}
	return fmt.Errorf("%w: the disk has %d KiB free, of which %d KiB are left alone: make room on it", ErrStoreFull, s.state.DiskFree>>10, keep>>10)
}

// State is how the store is. It does not wait for the disk.
func (s *Store) State() StoreState {
	s.mu.Lock()
	defer s.mu.Unlock()
	full := s.roomLocked(0, 1)
	st := s.state
	switch {
	case s.closed:
		st.Err = fmt.Errorf("%w: closed", ErrStoreUnwell)
	case s.now != nil && s.now.hasFailed():
		st.Err = fmt.Errorf("%w: %w", ErrStoreUnwell, s.now.cause())
	case s.now == nil || s.fatal:
		st.Err = fmt.Errorf("%w: %w", ErrStoreUnwell, s.why)
	case full != nil:
		st.Err = full
	}
	return st
}

// Durability is "fsync" when the disk has an appended record, "interval" when it will have
// it within a second.
func (s *Store) Durability() string {
	if s.cfg.Sync == syncInterval {
		return syncInterval
	}
	return "fsync"
}

// Purge removes all records up to and with that one. What is removed may be there again when
// the store is opened after a crash.
func (s *Store) Purge(upTo uint64) error {
	s.mu.Lock()
	now := s.now
	upTo = min(upTo, s.state.Last)
	nothing := upTo < s.state.First
	why := s.why
	s.mu.Unlock()
	switch {
	case nothing:
		return nil
	case now == nil:
		return fmt.Errorf("purge the store: %w: %w", ErrStoreUnwell, why)
	}
	// On the disk before it is done, so that a front that is missing was purged or lost.
	if err := s.side.update(func(k *sideState) { k.floor = max(k.floor, upTo) }, true); err != nil {
		return fmt.Errorf("purge the store: %w", err)
	}
	first, size, err := now.purge(upTo)
	if err != nil {
		return fmt.Errorf("purge the store: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state.First, s.state.Bytes = max(s.state.First, first), size
	if errors.Is(s.state.Err, ErrStoreFull) {
		s.state.Err = nil
	}
	return nil
}

// Read hands f the records from sequence from on, in order, up to the one that was last when
// it was called; false from f ends it. Sequences may be missing where records were lost. It
// is safe beside everything else; a store that is opened again meanwhile is read on. record
// is valid during f only. Error: what there is could not be read, or ctx ended.
func (s *Store) Read(ctx context.Context, from uint64, f func(seq uint64, record []byte) bool) error {
	s.mu.Lock()
	last := s.state.Last
	next := max(from, s.state.First)
	s.mu.Unlock()
	var before *storeServer
	for next <= last {
		s.mu.Lock()
		now, why := s.now, s.why
		s.mu.Unlock()
		if now == nil || now == before {
			return fmt.Errorf("read the store: %w: %w", ErrStoreUnwell, cmp.Or(why, errStoreStopped))
		}
		before = now
		var err error
		next, err = now.read(ctx, next, last, f) // to the end, unless it says why not
		if err != nil && !errors.Is(err, errStoreStopped) {
			return fmt.Errorf("read the store, record %d: %w", next, err)
		}
	}
	return nil
}

// Close closes the store. An Append that runs has ended then.
func (s *Store) Close() error {
	s.mu.Lock()
	was := s.closed
	s.closed = true
	s.mu.Unlock()
	if was {
		return nil
	}
	s.writer.Lock()
	defer s.writer.Unlock()
	s.stop(errors.New("closed"))
	err := s.side.close()
	s.unlock()
	return err
}
