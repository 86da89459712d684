// Package edge is the edge program: where the traffic of POS enters. It takes orders,
// alerts and further kinds over HTTP, seals what is plain, checks what is encrypted and
// passes it on byte for byte, has it stored at the hub, and tells the POS what became of
// it.
//
// It promises:
//
//   - A 202 or a Kitchen's answer means that the hub has stored the message (I1). A 503
//     says whether it is certain that nothing is stored.
//   - Within a site, messages are numbered without gaps and stored in the order of their
//     numbers, over every failure of the hub and of the way to it.
//   - One Idempotency-Key is one message: a repeat gets the first answer.
//   - Sites do not wait for each other, and no queue is without a bound (I13).
//
// docs/spec/ingest.md is what a POS may rely on.
package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/admin"
	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Limits of a request, before anything is known of it.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 15 * time.Second // headers and body together
	writeTimeout      = 10 * time.Second // for the answer alone
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10

	sweepEvery = time.Minute
)

// Edge is one edge. Make it with New, then Run it once.
type Edge struct {
	// Fixed at birth.
	cfg      Config // with defaults
	certs    []*tls.Certificate
	keys     keys
	door     *door.Door
	sites    map[string]*site
	metrics  *metrics
	register *register
	log      *slog.Logger
}

// keys is what the edge needs of the sites' keys; *keysync.Keys is one.
type keys interface {
	door.Keys
	RereadBinding()
	Ready() error
	Run(ctx context.Context) error
}

// New checks cfg, reads the files that it names, and reports every mistake at once. It
// opens no address and starts nothing.
func New(cfg Config) (*Edge, error) {
	return newEdge(cfg, func(c keysync.Config) (keys, error) { return keysync.New(c) })
}

func newEdge(cfg Config, newKeys func(keysync.Config) (keys, error)) (*Edge, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	if cfg.Metrics == nil {
		cfg.Metrics = prometheus.NewRegistry()
		cfg.Metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	}
	e := &Edge{cfg: cfg, log: cfg.Log.With("edge", cfg.Name), metrics: newMetrics()}

	errs := prefixed("hub.", cfg.Hub.CheckFiles())
	for i, l := range cfg.Listen {
		var cert *tls.Certificate
		if l.TLS.on() {
			c, err := tls.LoadX509KeyPair(l.TLS.CertFile, l.TLS.KeyFile)
			if err != nil {
				errs = append(errs, fmt.Errorf("listen[%d].tls: %w", i, err))
			}
			cert = &c
		}
		e.certs = append(e.certs, cert)
	}
	ciphers := make(map[string]envelope.Settings, len(cfg.Sites))
	doors := make(map[string]door.SiteConfig, len(cfg.Sites))
	for name, s := range cfg.Sites {
		ciphers[name], doors[name] = s.Cipher, s.SiteConfig
	}
	var err error
	e.keys, err = newKeys(keysync.Config{Portal: cfg.Portal, BindingFile: cfg.BindingFile, Sites: ciphers, Log: e.log, Metrics: cfg.Metrics})
	errs = append(errs, err)
	e.sites, err = cfg.newSites()
	errs = append(errs, err)
	e.door, err = door.New(doors, gatedKeys{e.keys, e.sites})
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	e.register = newRegister(cfg.Messages, cfg.AnswerBytes, e.metrics.drops)
	return e, nil
}

// hub is what the edge needs of the broker; *broker.Broker is one.
type hub interface {
	publisher
	Status() string
	Durability() string
	FollowReports(ctx context.Context, sites []string, f func(*broker.Report)) error
}

// Run serves until ctx ends, and returns nil when it was told to stop: it then takes no
// new requests, finishes those in flight within Config.Shutdown, and logs what it left
// behind. The hub and the Portal may be away when it starts; it is not ready then.
func (e *Edge) Run(ctx context.Context) error {
	listeners, err := e.listen(ctx)
	defer func() {
		for _, l := range listeners {
			l.Close() // again, when it was served
		}
	}()
	if err != nil {
		return err
	}
	h, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: e.cfg.Hub, Name: e.cfg.Name, Log: e.log, Metrics: e.cfg.Metrics})
	if err != nil {
		return err
	}
	err = e.run(ctx, h, listeners)
	return errors.Join(err, h.Close())
}

// listen opens the addresses, and returns those that it could open also with an error.
func (e *Edge) listen(ctx context.Context) ([]net.Listener, error) {
	var open []net.Listener
	var addrs []net.Addr
	var errs []error
	for i, l := range e.cfg.Listen {
		var lc net.ListenConfig
		opened, err := lc.Listen(ctx, "tcp", l.Addr)
		if err != nil {
			errs = append(errs, fmt.Errorf("listen[%d].addr: %w", i, err))
			continue
		}
		open = append(open, opened)
		addrs = append(addrs, opened.Addr())
	}
	if err := errors.Join(errs...); err != nil {
		return open, err
	}
	if e.cfg.Listening != nil {
		e.cfg.Listening(addrs)
	}
	return open, nil
}

// run serves listeners until ctx ends or something fails.
func (e *Edge) run(ctx context.Context, h hub, listeners []net.Listener) error {
	sites := slices.Sorted(maps.Keys(e.cfg.Sites))
	c := newCommitter(committerConfig{Edge: e.cfg.Name, Epoch: newEpoch(), Hub: h, Sites: sites, Wait: e.cfg.CommitWait, Log: e.log})
	follow := &reports{edge: e.cfg.Name, epoch: c.epoch, keys: e.keys, register: e.register, metrics: e.metrics, log: e.log,
		warn: rate.Sometimes{First: 3, Interval: 10 * time.Second}}
	in := e.ingest(c, h)
	ops, err := admin.New(admin.Config{Listen: e.cfg.Admin.Listen, Metrics: e.cfg.Metrics, Ready: e.ready(h, in), Log: e.log})
	if err != nil {
		return err
	}
	if err := e.metrics.register(e.cfg.Metrics, e.register.waiting, func() int { return int(c.unknown.Load()) }); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}

	// Everything below ends after the requests in flight have: they need it.
	life, end := context.WithCancelCause(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	failures := make(chan error, 4+len(listeners))
	background := func(what string, run func(context.Context) error) {
		wg.Go(func() {
			err := run(life)
			if err == nil && life.Err() == nil {
				err = errors.New("ended by itself")
			}
			if err != nil {
				failures <- fmt.Errorf("%s: %w", what, err)
			}
		})
	}
	background("keys", e.keys.Run)
	background("reports", func(ctx context.Context) error { return h.FollowReports(ctx, sites, follow.take) })
	background("sweep", e.sweep)
	if e.cfg.Admin.Listen != adminOff {
		background("admin", ops.Run)
	}

	servers := make([]*http.Server, len(listeners))
	for i, l := range listeners {
		servers[i] = e.server(i, in)
		wg.Go(func() {
			serve := servers[i].Serve
			if e.certs[i] != nil {
				serve = func(l net.Listener) error { return servers[i].ServeTLS(l, "", "") }
			}
			if err := serve(l); !errors.Is(err, http.ErrServerClosed) {
				failures <- fmt.Errorf("listen[%d]: %w", i, err)
			}
		})
		e.log.Info("listening", "for", "pos", "addr", l.Addr().String(), "tls", e.certs[i] != nil, "site", e.cfg.Listen[i].Site)
		if e.certs[i] == nil && !door.Loopback(e.cfg.Listen[i].Addr) {
			e.log.Warn("tokens and plain orders can be read on their way to this address: set tls", "addr", l.Addr().String())
		}
	}
	e.log.Info("edge is up", "epoch", c.epoch, "sites", len(sites))

	var failure error
	select {
	case <-ctx.Done():
	case failure = <-failures:
	}
	e.stop(in, c, servers)
	end(errStopped)
	wg.Wait()
	close(failures)
	errs := []error{failure}
	for err := range failures {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// stop ends the service: no new requests, then those in flight, then what the hub has not
// acknowledged.
func (e *Edge) stop(in *ingest, c *committer, servers []*http.Server) {
	limit, cancel := context.WithTimeout(context.Background(), e.cfg.Shutdown)
	defer cancel()
	e.log.Info("stopping", "within", e.cfg.Shutdown)
	close(in.stopping)
	var wg sync.WaitGroup
	for _, s := range servers {
		wg.Go(func() {
			if s.Shutdown(limit) == nil {
				return
			}
			e.log.Warn("stopped with requests in flight: they were cut off", "after", e.cfg.Shutdown)
			c.abandon()
			s.Close()
		})
	}
	wg.Wait()
	in.running.Lock() // for good: all requests have ended, and none begins
	c.stop(limit)
	if n := e.register.waiting(); n > 0 {
		e.log.Warn("stopped with unsettled messages: what the hub has of them is delivered, but this edge will not tell how it ended", "messages", n)
	}
}

// sweep tidies the register until ctx ends.
func (e *Edge) sweep(ctx context.Context) error {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			if ids := e.register.sweep(now); len(ids) > 0 {
				e.metrics.drops.WithLabelValues(dropNoReport).Add(float64(len(ids)))
				e.log.Error("no report came for messages 72 hours after their deadline: they count as failed", "messages", len(ids), "id", ids[0], "reason", reasonNoReport)
			}
		}
	}
}

// ingest builds what answers POS.
func (e *Edge) ingest(c store, h hub) *ingest {
	in := &ingest{
		door: e.door, store: c, register: e.register,
		sites: e.sites, kinds: slices.Sorted(maps.Keys(e.cfg.Kinds)),
		maxBody: e.cfg.MaxBody, wait: e.cfg.Wait, maxWait: e.cfg.MaxWait, commitWait: e.cfg.CommitWait, maxWaiting: int64(e.cfg.MaxWaiting),
		durability: h.Durability, metrics: e.metrics, log: e.log,
		slots: make(chan struct{}, e.cfg.MaxRequests), stopping: make(chan struct{}),
	}
	// What exactly is wrong is for ops: a POS may be anybody.
	seen := make(map[string]func() error)
	for name, works := range e.ready(h, in) {
		seen[name] = func() error {
			if works() != nil {
				return errors.New("does not work; the admin address says why")
			}
			return nil
		}
	}
	in.ready = admin.Readyz(seen)

	return in
}

// ready is what has to work for the edge to be of use.
func (e *Edge) ready(h hub, in *ingest) map[string]func() error {
	return map[string]func() error{
		"hub": func() error {
			if h.Connected() {
				return nil
			}
			return errors.New(h.Status())
		},
		"keys": e.keys.Ready,
		"edge": func() error {
			select {
			case <-in.stopping:
				return errStopped
			default:
				return nil
			}
		},
	}
}

// server builds the server of one address.
func (e *Edge) server(i int, in *ingest) *http.Server {
	l := e.cfg.Listen[i]
	s := &http.Server{
		Handler:           in.handler(listener{site: l.Site, loopback: door.Loopback(l.Addr)}),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      readTimeout + e.cfg.CommitWait + e.cfg.MaxWait + writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(e.log.Handler(), slog.LevelDebug),
		// HTTP/2 would need limits of its own, and no POS gains by it.
		Protocols: new(http.Protocols),
	}
	s.Protocols.SetHTTP1(true)
	if cert := e.certs[i]; cert != nil {
		s.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*cert}}
	}
	return s
}
