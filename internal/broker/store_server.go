package broker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	streamOut  = "OUT"
	subjectOut = "out"
	// storeReadBatch and storeReadBytes bound one request for records: what waits in memory.
	storeReadBatch, storeReadBytes = 512, 4 << 20
	// storePing is longer than any process lives: a disk that hangs must not look like a
	// connection that is gone.
	storePing = 100 * 24 * time.Hour
	// storeAPITimeout bounds what is not an append or a read.
	storeAPITimeout = 30 * time.Second
)

var (
	errStoreStopped  = errors.New("the store's server was stopped")
	errSequenceTaken = errors.New("the stream's last sequence is another")
)

// JetStream's errors of an append.
const (
	errStoreSequence = 10071
	errStoreFailed   = 10077 // full, or the disk failed
)

// gap is a run of sequences that the stream does not have.
type gap struct{ From, To uint64 }

// storeServer is one run of the store's server, and the connections to it.
type storeServer struct {
	// Fixed at birth.
	srv    *server.Server
	nc     *nats.Conn     // of the writer
	reads  *nats.Conn     // so that no acknowledgement waits behind what is read
	inbox  string         // prefix of where acknowledgements go
	acks   chan *nats.Msg // what comes there
	blocks string         // folder of the stream's blocks
	gone   chan struct{}  // closed when it stops, or the connection is lost
	failed chan struct{}  // closed when it takes nothing more, also by gone
	cause  func() error   // why, once failed is closed
	stop   func()

	// As it was found.
	first, last uint64
	bytes       int64
	gaps        []gap
	made        bool // the stream was made
}

// startStore starts a server on what is in cfg.Dir. data tells whether there are records;
// otherwise a stream is made, beginning with sequence first.
func startStore(ctx context.Context, cfg StoreConfig, key string, data bool, first uint64) (*storeServer, error) {
	blocks := blocksDir(cfg.Dir)
	if data {
		if err := prepareBlocks(blocks); err != nil {
			return nil, err
		}
	}
	opts := &server.Options{
		ServerName: "kitchenbridge-out", DontListen: true, NoSigs: true, NoLog: true,
		JetStream: true, DisableJetStreamBanner: true, StoreDir: cfg.Dir,
		JetStreamMaxStore: 1 << 60, JetStreamMaxMemory: 1 << 20,
		JetStreamKey: key, JetStreamCipher: server.ChaCha,
		SyncAlways: cfg.Sync != syncInterval,
		MaxPayload: storeMaxRecord + 4096, PingInterval: storePing,
	}
	if !opts.SyncAlways {
		opts.SyncInterval = syncEvery
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, err
	}
	failed, fail, cause := failure()
	log := &storeLog{serverLog: &serverLog{log: cfg.Log}, fail: fail}
	srv.SetLoggerV2(log, false, false, false)
	srv.Start() // returns with JetStream recovered, or logs a fatal error
	if err := log.fatal(); err == nil && !srv.ReadyForConnections(10*time.Second) {
		log.Fatalf("not ready for connections within 10 s")
	}
	s := &storeServer{srv: srv, blocks: blocks, gone: make(chan struct{}), failed: failed, cause: cause, acks: make(chan *nats.Msg, 64)}
	left := sync.OnceFunc(func() {
		fail(errStoreStopped)
		close(s.gone)
	})
	s.stop = sync.OnceFunc(func() {
		left()
		for _, nc := range []*nats.Conn{s.nc, s.reads} {
			if nc != nil {
				nc.Close()
			}
		}
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if err := log.fatal(); err != nil {
		s.stop()
		return nil, err
	}
	for _, nc := range []**nats.Conn{&s.nc, &s.reads} {
		if *nc, err = nats.Connect("", nats.InProcessServer(srv), nats.NoReconnect(), nats.Name("outbox"),
			nats.PingInterval(storePing), nats.ClosedHandler(func(*nats.Conn) { left() }),
			nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
				cfg.Log.Warn("outbox: the server's client reports", "err", err)
			})); err != nil {
			s.stop()
			return nil, err
		}
	}
	if err := s.find(ctx, cfg, data, first); err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

// failure is a channel that the first call of fail closes, and what cause then returns.
func failure() (failed chan struct{}, fail func(error), cause func() error) {
	failed = make(chan struct{})
	var once sync.Once
	var why error
	return failed, func(err error) {
			once.Do(func() {
				why = err
				close(failed)
			})
		}, func() error {
			<-failed
			return why
		}
}

// storeLog is the server's log. The server does not answer a message that it could not
// write, nor any after it: that it logs the error is the only sign.
type storeLog struct {
	*serverLog
	fail func(error)
}

func (l *storeLog) Errorf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	if strings.Contains(strings.ToLower(text), "critical write error") {
		l.fail(errors.New(text))
	}
	l.log.Error("outbox: server error", "text", text)
}

func (l *storeLog) Warnf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	if strings.Contains(text, "disabling JetStream") {
		l.fail(errors.New(text))
	}
	l.log.Warn("outbox: server warns", "text", text)
}

// find looks at the stream, or makes it.
func (s *storeServer) find(ctx context.Context, cfg StoreConfig, data bool, first uint64) error {
	js, err := jetstream.New(s.nc)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storeAPITimeout)
	defer cancel()
	want := jetstream.StreamConfig{
		Name: streamOut, Subjects: []string{subjectOut}, Description: "records of the outbox",
		Storage: jetstream.FileStorage, Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew,
		MaxBytes: cfg.MaxBytes, MaxMsgs: -1, MaxMsgsPerSubject: -1, MaxMsgSize: -1,
		Replicas: 1, AllowDirect: true, Duplicates: 100 * time.Millisecond,
	}
	st, err := js.Stream(ctx, streamOut)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound) && data:
		return fmt.Errorf("the records in it cannot be opened: what describes them (%s) is damaged. "+
			"Restore the folder from a copy; or, to give up the orders in it, move it away, and the key file with it", filepath.Dir(s.blocks))
	case errors.Is(err, jetstream.ErrStreamNotFound):
		// What is there without a record is from a start that was cut short.
		if err := moveAside(filepath.Dir(s.blocks), filepath.Join(cfg.Dir, streamOut)); err != nil {
			return err
		}
		want.FirstSeq, s.made = first, true
		st, err = js.CreateStream(ctx, want)
	case err == nil && st.CachedInfo().Config.MaxBytes != cfg.MaxBytes:
		want.FirstSeq = st.CachedInfo().Config.FirstSeq
		st, err = js.UpdateStream(ctx, want)
	}
	if err != nil {
		return err
	}
	// The server syncs what it writes and the folders that it writes to. It does not sync those
	// above, which it has made as well.
	for dir := s.blocks; ; dir = filepath.Dir(dir) {
		if err := syncDir(dir); err != nil {
			return fmt.Errorf("the disk cannot be written: %w", err)
		}
		if dir == filepath.Clean(cfg.Dir) {
			break
		}
	}
	if err := syncDir(filepath.Dir(filepath.Clean(cfg.Dir))); err != nil {
		return fmt.Errorf("the disk cannot be written: %w", err)
	}
	info, err := st.Info(ctx, jetstream.WithDeletedDetails(true))
	if err != nil {
		return err
	}
	at := info.State
	s.first, s.last, s.bytes = at.FirstSeq, at.LastSeq, int64(at.Bytes)
	if at.Msgs == 0 {
		s.first = at.LastSeq + 1
	}
	for _, seq := range at.Deleted {
		if n := len(s.gaps); n > 0 && s.gaps[n-1].To+1 == seq {
			s.gaps[n-1].To = seq
		} else {
			s.gaps = append(s.gaps, gap{seq, seq})
		}
	}
	if n := at.LastSeq + 1 - s.first - at.Msgs; n > 0 && len(s.gaps) == 0 {
		return fmt.Errorf("%d records are missing, and the server does not say which", n)
	}

	s.inbox = s.nc.NewInbox() + "."
	_, err = s.nc.ChanSubscribe(s.inbox+"*", s.acks)
	return err
}

// isGone tells whether it can still be asked, hasFailed whether it can still store.
func (s *storeServer) isGone() bool    { return isClosed(s.gone) }
func (s *storeServer) hasFailed() bool { return isClosed(s.failed) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// append asks the server to store a record behind the one with sequence last. n is another
// number at each call. verdict: stored; missed: it was not asked; open: it did not answer in
// time; refused: it answered err, which is ErrStoreFull or errSequenceTaken, or leaves open
// what is on the disk.
func (s *storeServer) append(ctx context.Context, n uint64, record []byte, last uint64) (uint64, verdict, error) {
	if ctx.Err() != nil {
		return 0, missed, context.Cause(ctx)
	}
	reply := s.inbox + strconv.FormatUint(n, 36)
	msg := &nats.Msg{Subject: subjectOut, Reply: reply, Data: record,
		Header: nats.Header{jetstream.ExpectedLastSeqHeader: {strconv.FormatUint(last, 10)}}}
	if err := s.nc.PublishMsg(msg); err != nil {
		return 0, refused, err
	}
	late := time.NewTimer(storeTimeout)
	defer late.Stop()
	for {
		select {
		case m := <-s.acks:
			if m.Subject != reply {
				continue // of an attempt that was given up
			}
			return readStoreAck(m)
		case <-s.failed:
			return 0, refused, s.cause()
		case <-ctx.Done():
			return 0, open, context.Cause(ctx)
		case <-late.C:
			return 0, open, fmt.Errorf("the disk has not answered within %v", storeTimeout)
		}
	}
}

func readStoreAck(m *nats.Msg) (uint64, verdict, error) {
	if rest, ok := bytes.CutPrefix(m.Data, []byte(`{"stream":"`+streamOut+`","seq":`)); ok {
		if digits, ok := bytes.CutSuffix(rest, []byte(`}`)); ok {
			if seq, err := strconv.ParseUint(string(digits), 10, 64); err == nil {
				return seq, stored, nil
			}
		}
	}
	if code, text := status(m); code != "" {
		return 0, refused, fmt.Errorf("the server says %s %s", code, text)
	}
	var ack pubAck
	if err := json.Unmarshal(m.Data, &ack); err != nil {
		return 0, refused, fmt.Errorf("acknowledgement is not JSON: %w", err)
	}
	switch {
	case ack.Error == nil:
		return ack.Seq, refused, fmt.Errorf("acknowledged by stream %.40q as sequence %d", ack.Stream, ack.Seq)
	case ack.Error.ErrorCode == errStoreSequence:
		return 0, refused, fmt.Errorf("%w: %w", errSequenceTaken, ack.Error)
	case ack.Error.ErrorCode == errStoreFailed && ack.Error.Description == server.ErrMaxBytes.Error():
		return 0, refused, fmt.Errorf("%w: its bound is reached", ErrStoreFull)
	}
	return 0, refused, ack.Error
}

// get returns the record with that sequence, if there is one.
func (s *storeServer) get(ctx context.Context, seq uint64) (record []byte, found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, storeTimeout)
	defer cancel()
	m, err := s.reads.RequestWithContext(ctx, directGet+streamOut, fmt.Appendf(nil, `{"seq":%d}`, seq))
	if err != nil {
		return nil, false, err
	}
	at, err := parseStored(m)
	switch {
	case errors.Is(err, ErrNone):
		return nil, false, nil
	case err != nil:
		return nil, false, err
	case at.seq != seq:
		return nil, false, fmt.Errorf("asked for record %d and got %d: %w", seq, at.seq, ErrMalformed)
	}
	return m.Data, true, nil
}

// read hands f the records of [next, last] and returns where to go on.
func (s *storeServer) read(ctx context.Context, next, last uint64, f func(uint64, []byte) bool) (uint64, error) {
	in := make(chan *nats.Msg, storeReadBatch+8)
	inbox := s.reads.NewInbox() + "."
	sub, err := s.reads.ChanSubscribe(inbox+"*", in)
	if err != nil {
		if s.isGone() {
			err = errStoreStopped
		}
		return next, err
	}
	defer func() { _ = sub.Unsubscribe() }() // fails only when the connection is closed
	late := time.NewTimer(storeTimeout)
	defer late.Stop()
	for n := uint64(0); next <= last; n++ {
		reply := inbox + strconv.FormatUint(n, 36)
		query := fmt.Appendf(nil, `{"seq":%d,"batch":%d,"max_bytes":%d}`, next, min(storeReadBatch, last-next+1), storeReadBytes)
		if err := s.reads.PublishRequest(directGet+streamOut, reply, query); err != nil {
			if s.isGone() {
				err = errStoreStopped
			}
			return next, err
		}
		late.Reset(storeTimeout)
		begun := next
		for more := true; more; {
			select {
			case m := <-in:
				if m.Subject != reply {
					continue
				}
				if code, text := status(m); code != "" && m.Header.Get("Nats-Sequence") == "" {
					switch code {
					case "204":
						if more = false; next == begun {
							return next, errors.New("the server has it, and does not give it")
						}
						continue
					case "404": // nothing at or behind next
						return last + 1, nil
					}
					return next, fmt.Errorf("the server says %s %s", code, text)
				}
				at, err := parseStored(m)
				switch {
				case err != nil:
					return next, err
				case at.seq < next:
					return next, fmt.Errorf("record %d came after %d: %w", at.seq, next-1, ErrMalformed)
				case at.seq > last:
					return last + 1, nil
				}
				next = at.seq + 1
				if !f(at.seq, m.Data) {
					return last + 1, nil
				}
				late.Reset(storeTimeout)
			case <-s.gone:
				return next, errStoreStopped
			case <-ctx.Done():
				return next, context.Cause(ctx)
			case <-late.C:
				return next, fmt.Errorf("no answer within %v", storeTimeout)
			}
		}
	}
	return next, nil
}

// purge removes the records up to and with that one and returns what is there after.
func (s *storeServer) purge(upTo uint64) (first uint64, size int64, err error) {
	js, err := jetstream.New(s.reads)
	if err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), storeAPITimeout)
	defer cancel()
	st, err := js.Stream(ctx, streamOut)
	if err != nil {
		return 0, 0, err
	}
	if err := st.Purge(ctx, jetstream.WithPurgeSequence(upTo+1)); err != nil {
		return 0, 0, err
	}
	info, err := st.Info(ctx)
	if err != nil {
		return 0, 0, err
	}
	first = info.State.FirstSeq
	if info.State.Msgs == 0 {
		first = info.State.LastSeq + 1
	}
	return first, int64(info.State.Bytes), nil
}

// storeOverhead is what the server adds to a record that is stored behind sequence last: its
// own header and checksum, the subject, and the header that names last.
func storeOverhead(last uint64) int64 {
	const fixed = 22 + 4 + 8 + len(subjectOut) + len("NATS/1.0\r\n"+jetstream.ExpectedLastSeqHeader+": \r\n\r\n")
	return int64(fixed + len(strconv.FormatUint(last, 10)))
}

// blocksDir is where the server keeps the stream's blocks.
func blocksDir(dir string) string {
	return filepath.Join(dir, "jetstream", "$G", "streams", streamOut, "msgs")
}

// blockFiles returns the stream's blocks that hold anything, with their numbers.
func blockFiles(blocks string) (map[int]string, error) {
	names, err := filepath.Glob(filepath.Join(escapeGlob(blocks), "*.blk"))
	if err != nil {
		return nil, err
	}
	found := make(map[int]string)
	for _, name := range names {
		n, err := strconv.Atoi(filepath.Base(name[:len(name)-len(".blk")]))
		if err != nil {
			continue
		}
		info, err := os.Stat(name)
		if err != nil {
			return nil, err
		}
		if info.Size() > 0 {
			found[n] = name
		}
	}
	return found, nil
}

// hasBlocks tells whether there may be records in the store's folder.
func hasBlocks(dir string) (bool, error) {
	found, err := blockFiles(blocksDir(dir))
	return len(found) > 0, err
}

// prepareBlocks makes the server read everything, and what it will read be on the disk.
//
// A write whose fsync failed, or whose process was killed before it, can be read back
// although the disk does not have it: Linux keeps the page, as clean. The end of the last
// block is therefore written once more, byte for byte, and synced. The server's index is
// removed, since with it the server does not look into the blocks: it makes a new one.
func prepareBlocks(blocks string) error {
	found, err := blockFiles(blocks)
	if err != nil {
		return err
	}
	newest := -1
	for n := range found {
		newest = max(newest, n)
	}
	if newest >= 0 {
		if err := rewriteEnd(found[newest]); err != nil {
			return fmt.Errorf("the disk cannot be written: %w", err)
		}
	}
	if err := os.Remove(filepath.Join(blocks, "index.db")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the disk cannot be written: %w", err)
	}
	return syncDir(blocks)
}

func rewriteEnd(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	const largest = storeMaxRecord + 4096 // of what can be unsynced: one record
	from := max(0, info.Size()-largest)
	end := make([]byte, info.Size()-from)
	if _, err := f.ReadAt(end, from); err != nil {
		return err
	}
	if _, err := f.WriteAt(end, from); err != nil {
		return err
	}
	return f.Sync()
}
