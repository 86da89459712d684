// Package cluster runs a NATS cluster with JetStream in the test's own process: real
// servers, real elections, stopped and started again on their own data.
package cluster

import (
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Config of a cluster. The zero value is three servers with the server's own disk sync.
type Config struct {
	// Nodes, default 3.
	Nodes int
	// SyncAlways writes each message to the disk before it is acknowledged.
	SyncAlways bool
}

// Cluster is a running cluster. Its methods fail the test instead of returning an
// error; they are for the test's own goroutine.
type Cluster struct {
	t     testing.TB
	dir   string
	nodes []*node
}

type node struct {
	opts server.Options
	srv  *server.Server // nil while stopped
}

const patience = 20 * time.Second

// Start starts a cluster whose data is in t.TempDir, and returns when it has elected a
// leader. It is stopped when the test ends.
func Start(t testing.TB, cfg Config) *Cluster {
	t.Helper()
	if cfg.Nodes == 0 {
		cfg.Nodes = 3
	}
	c := &Cluster{t: t, dir: t.TempDir()} // removed after what is registered next
	t.Cleanup(c.stopAll)
	// A port that was free may be taken before it is used: then all begin again with others.
	for attempt := 1; ; attempt++ {
		c.configure(cfg)
		err := c.startAll()
		if err == nil {
			break
		}
		c.stopAll()
		if attempt == 3 {
			t.Fatalf("cluster: %v", err)
		}
	}
	c.eventually("an elected leader of the cluster", func() bool {
		for _, n := range c.nodes {
			if n.srv.JetStreamIsLeader() && len(n.srv.JetStreamClusterPeers()) == cfg.Nodes {
				return true
			}
		}
		return false
	})
	return c
}

func (c *Cluster) configure(cfg Config) {
	c.t.Helper()
	c.nodes = nil
	ports := freePorts(c.t, 2*cfg.Nodes)
	var routes []*url.URL
	for _, port := range ports[:cfg.Nodes] {
		routes = append(routes, &url.URL{Scheme: "nats", Host: fmt.Sprintf("127.0.0.1:%d", port)})
	}
	for i := range cfg.Nodes {
		c.nodes = append(c.nodes, &node{opts: server.Options{
			ServerName:         fmt.Sprintf("node-%d", i),
			Host:               "127.0.0.1",
			Port:               ports[cfg.Nodes+i],
			NoLog:              true,
			NoSigs:             true,
			JetStream:          true,
			StoreDir:           filepath.Join(c.dir, strconv.Itoa(ports[i])),
			JetStreamMaxStore:  64 << 30,
			JetStreamMaxMemory: 1 << 30,
			SyncAlways:         cfg.SyncAlways,
			Routes:             routes,
			Cluster:            server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: ports[i]},
		}})
	}
}

func (c *Cluster) startAll() error {
	for i := range c.nodes {
		if err := c.start(i); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) stopAll() {
	for i := range c.nodes {
		c.stop(i)
	}
}

// freePorts finds ports that nobody listens on now.
func freePorts(t testing.TB, n int) []int {
	t.Helper()
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatalf("cluster: free port: %v", err)
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}

func (c *Cluster) start(i int) error {
	n := c.nodes[i]
	opts := n.opts // the server changes what it is given
	srv, err := server.NewServer(&opts)
	if err != nil {
		return fmt.Errorf("node %d: %w", i, err)
	}
	n.srv = srv
	log := &fatalLog{}
	srv.SetLoggerV2(log, false, false, false)
	srv.Start()
	for range 100 { // a fatal error need not be waited for
		if log.first.Load() != nil || srv.ReadyForConnections(patience/100) {
			break
		}
	}
	if fatal := log.first.Load(); fatal != nil {
		return fmt.Errorf("node %d: %s", i, *fatal)
	}
	if !srv.ReadyForConnections(time.Millisecond) {
		return fmt.Errorf("node %d is not ready within %v", i, patience)
	}
	return nil
}

// fatalLog keeps the server's first fatal error, which a server in process only logs.
type fatalLog struct{ first atomic.Pointer[string] }

func (l *fatalLog) Noticef(string, ...any) {}
func (l *fatalLog) Warnf(string, ...any)   {}
func (l *fatalLog) Errorf(string, ...any)  {}
func (l *fatalLog) Debugf(string, ...any)  {}
func (l *fatalLog) Tracef(string, ...any)  {}
func (l *fatalLog) Fatalf(format string, v ...any) {
	s := fmt.Sprintf(format, v...)
	l.first.CompareAndSwap(nil, &s)
}

func (c *Cluster) stop(i int) {
	if n := c.nodes[i]; n.srv != nil {
		n.srv.Shutdown()
		n.srv.WaitForShutdown()
		n.srv = nil
	}
}

// URLs of all nodes, stopped ones included.
func (c *Cluster) URLs() []string {
	var urls []string
	for i := range c.nodes {
		urls = append(urls, c.URL(i))
	}
	return urls
}

// URL of one node.
func (c *Cluster) URL(node int) string {
	return fmt.Sprintf("nats://127.0.0.1:%d", c.nodes[node].opts.Port)
}

// Stop stops a node and keeps its data.
func (c *Cluster) Stop(node int) {
	c.t.Helper()
	if c.nodes[node].srv == nil {
		c.t.Fatalf("cluster: node %d is not running", node)
	}
	c.stop(node)
}

// Restart starts a stopped node on its data and its address, and returns when it is
// healthy: caught up in every stream and consumer. Whoever stops the next node earlier
// may take a replicated consumer in memory away from all that have its state; it then
// has no leader until all nodes are back.
func (c *Cluster) Restart(node int) {
	c.t.Helper()
	if c.nodes[node].srv != nil {
		c.t.Fatalf("cluster: node %d is running", node)
	}
	if err := c.start(node); err != nil {
		c.t.Fatalf("cluster: %v", err)
	}
	c.eventually(fmt.Sprintf("health of node %d", node), func() bool {
		return c.nodes[node].srv.Healthz(&server.HealthzOptions{}).Error == ""
	})
}

// Leader returns the node that leads a stream. It waits for an election to end.
func (c *Cluster) Leader(stream string) int {
	c.t.Helper()
	return c.leader("stream "+stream, func(s *server.Server) bool {
		return s.JetStreamIsStreamLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream)
	})
}

// ConsumerLeader returns the node that leads a consumer. It waits for an election to end.
func (c *Cluster) ConsumerLeader(stream, consumer string) int {
	c.t.Helper()
	return c.leader(strings.Join([]string{"consumer", stream, consumer}, " "), func(s *server.Server) bool {
		return s.JetStreamIsConsumerLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream, consumer)
	})
}

// StepDown makes the leader of a stream give up its office, and returns when another
// node, or the same again, has it.
func (c *Cluster) StepDown(stream string) int {
	c.t.Helper()
	if err := c.nodes[c.Leader(stream)].srv.JetStreamStepdownStream(server.DEFAULT_GLOBAL_ACCOUNT, stream); err != nil {
		c.t.Fatalf("cluster: step down: %v", err)
	}
	return c.Leader(stream)
}

func (c *Cluster) leader(what string, is func(*server.Server) bool) int {
	c.t.Helper()
	leader := -1
	c.eventually("a leader of "+what, func() bool {
		for i, n := range c.nodes {
			if n.srv != nil && is(n.srv) {
				leader = i
				return true
			}
		}
		return false
	})
	return leader
}

func (c *Cluster) eventually(what string, is func() bool) {
	c.t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-deadline:
			c.t.Fatalf("cluster: no %s within %v", what, patience)
		}
	}
}
