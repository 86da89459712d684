package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/testenv/cluster"
)

// patience is how long a test waits for what must come, on a machine that others use too.
const patience = 20 * time.Second

// Codes of JetStream's errors, as they stand on the wire.
const (
	errNoLeader        = 10008 // of the cluster, now
	errMaxConsumers    = 10026
	errNoMessage       = 10037
	errMessageTooLarge = 10054
	errWrongLastSeq    = 10071
	errStoreFailed     = 10077 // full, in one of its ways
	errDuplicateInWork = 10158 // the same id is being stored
	errSeqInWork       = 10164 // something that a compare-and-set looks at is being stored
	errBatchDuplicate  = 10201
)

func TestMain(m *testing.M) {
	code := m.Run()
	common.end()
	os.Exit(code)
}

// common stands for all tests of the package: a cluster takes seconds to form.
var common standing

// standing is the testing.TB of what outlives a test.
type standing struct {
	testing.TB // nil: what is not defined below is not for something that outlives a test
	dir        string
	undo       []func()
}

func (s *standing) Helper()                        {}
func (s *standing) Cleanup(undo func())            { s.undo = append(s.undo, undo) }
func (s *standing) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }

func (s *standing) TempDir() string {
	if s.dir == "" {
		dir, err := os.MkdirTemp("", "conformance-")
		if err != nil {
			s.Fatalf("conformance: %v", err)
		}
		s.dir = dir
	}
	return s.dir
}

func (s *standing) end() {
	for i := len(s.undo) - 1; i >= 0; i-- {
		s.undo[i]()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir)
	}
}

var (
	single = sync.OnceValue(func() *server.Server {
		s := startServer(&common, filepath.Join(common.TempDir(), "single"), nil)
		keep(1, "", nats.InProcessServer(s))
		return s
	})
	threeNodes = sync.OnceValue(func() *cluster.Cluster {
		c := cluster.Start(&common, cluster.Config{SyncAlways: true})
		keep(3, strings.Join(c.URLs(), ","))
		return c
	})
)

// keep makes a stream that stands as long as its hub. A server removes the folder of all
// streams with the last of them, some time after it has said that this is deleted, and
// one made at that time has no place: "error creating store for stream".
func keep(replicas int, urls string, opts ...nats.Option) {
	nc, err := nats.Connect(urls, opts...)
	if err != nil {
		common.Fatalf("conformance: %v", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		common.Fatalf("conformance: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "KEEP", Subjects: []string{"keep"}, Replicas: replicas}); err != nil {
		common.Fatalf("conformance: %v", err)
	}
}

// startServer starts a server as the bridge embeds it: no listener, each message synced
// before it is acknowledged. It stops when t ends, if it has not before.
func startServer(t testing.TB, dir string, change func(*server.Options)) *server.Server {
	t.Helper()
	opts := &server.Options{
		ServerName: "embedded", DontListen: true, NoLog: true, NoSigs: true,
		JetStream: true, StoreDir: dir, SyncAlways: true,
		JetStreamMaxStore: 16 << 30, JetStreamMaxMemory: 1 << 30,
	}
	if change != nil {
		change(opts)
	}
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatalf("server: %v", err)
	}
	s.Start()
	if !s.ReadyForConnections(patience) {
		t.Fatalf("server: not ready within %v", patience)
	}
	t.Cleanup(func() { stopServer(s) })
	return s
}

func stopServer(s *server.Server) {
	s.Shutdown()
	s.WaitForShutdown()
}

// hub is a broker under test, as one test sees it.
type hub struct {
	replicas int
	dial     func(opts ...nats.Option) (*nats.Conn, error)
	nodes    *cluster.Cluster // nil: one server
	nc       *nats.Conn
	js       jetstream.JetStream
}

// onEach runs a test on the embedded single server and on three nodes.
func onEach(t *testing.T, test func(t *testing.T, h *hub)) {
	t.Helper()
	t.Run("single", func(t *testing.T) { test(t, singleHub(t, single())) })
	t.Run("three_nodes", func(t *testing.T) { test(t, clusterHub(t)) })
}

func singleHub(t testing.TB, s *server.Server) *hub {
	t.Helper()
	h := &hub{replicas: 1, dial: func(opts ...nats.Option) (*nats.Conn, error) {
		return nats.Connect("", append(opts, nats.InProcessServer(s))...)
	}}
	h.open(t)
	return h
}

func clusterHub(t testing.TB) *hub {
	t.Helper()
	c := threeNodes()
	h := &hub{replicas: 3, nodes: c, dial: func(opts ...nats.Option) (*nats.Conn, error) {
		// All of a test to the same server, as long as it is there: see known.
		return nats.Connect(strings.Join(c.URLs(), ","), append(opts, nats.DontRandomize())...)
	}}
	h.open(t)
	return h
}

func (h *hub) open(t testing.TB) {
	t.Helper()
	h.nc = h.connect(t)
	h.js = jetStream(t, h.nc)
}

// connect makes another connection, which ends with the test.
func (h *hub) connect(t testing.TB, opts ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := h.dial(append([]nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(20 * time.Millisecond)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func jetStream(t testing.TB, nc *nats.Conn) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	return js
}

var serial atomic.Int64

// root is a first token of subjects that no other test uses.
func root() string { return fmt.Sprintf("t%d", serial.Add(1)) }

// stream makes a stream that ends with the test. Name, storage and replicas are set here.
func (h *hub) stream(t testing.TB, cfg jetstream.StreamConfig) jetstream.Stream {
	t.Helper()
	cfg.Name = fmt.Sprintf("S%d", serial.Add(1))
	cfg.Replicas = h.replicas
	s := h.create(t, cfg)
	t.Cleanup(func() { h.remove(t, cfg.Name) })
	// Refused, and so not stored: it is for another stream.
	h.known(t, strings.ReplaceAll(cfg.Subjects[0], "*", "probe"), header("Nats-Expected-Stream", "NONE"), nil)
	return s
}

func (h *hub) create(t testing.TB, cfg jetstream.StreamConfig) (s jetstream.Stream) {
	t.Helper()
	must(t, func(ctx context.Context) (err error) {
		s, err = h.js.CreateStream(ctx, cfg)
		return err
	})
	return s
}

// known waits until the server that the tests are connected to knows who answers for a
// subject. One that another server of a cluster has just made is not known everywhere.
func (h *hub) known(t testing.TB, subject string, header nats.Header, body []byte) {
	t.Helper()
	eventually(t, "someone answers for "+subject, func() bool {
		_, err := h.nc.RequestMsg(&nats.Msg{Subject: subject, Header: header, Data: body}, patience)
		if err != nil && !errors.Is(err, nats.ErrNoResponders) {
			t.Fatal(err)
		}
		return err == nil
	})
}

func (h *hub) remove(t testing.TB, stream string) {
	t.Helper()
	must(t, func(ctx context.Context) error {
		err := h.js.DeleteStream(ctx, stream)
		if errors.Is(err, jetstream.ErrStreamNotFound) { // deleted, and the answer got lost
			return nil
		}
		return err
	})
}

// ask makes a request to JetStream's API that may be made twice. What has no leader at the
// moment does not answer, and what has just been restarted may act and not answer.
func ask(t testing.TB, request func(context.Context) error) (err error) {
	t.Helper()
	eventually(t, "an answer", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience/10)
		defer cancel()
		err = request(ctx)
		api, refused := errors.AsType[*jetstream.APIError](err)
		return !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, nats.ErrNoResponders) &&
			!(refused && api.ErrorCode == errNoLeader)
	})
	return err
}

func must(t testing.TB, request func(context.Context) error) {
	t.Helper()
	if err := ask(t, request); err != nil {
		t.Fatal(err)
	}
}

// eventually polls, for what no channel tells.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	until := time.After(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-until:
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
