package broker

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math/rand/v2"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	pingEvery    = 20 * time.Second // a dead link is noticed after two
	dialTimeout  = 5 * time.Second
	drainTimeout = 10 * time.Second
	// apiTimeout bounds one request to JetStream. A lost one is asked again.
	apiTimeout = 3 * time.Second
)

var (
	errLinkDown = errors.New("connection to the hub lost")
	errClosed   = errors.New("connection to the hub closed")
)

// Broker is a connection to a hub. It reconnects by itself, for ever, until Close. It
// is safe for concurrent use.
type Broker struct {
	// Fixed at birth.
	name       string
	hub        HubConfig
	embedded   bool
	partitions int
	log        *slog.Logger
	metrics    *metrics
	nc         *nats.Conn
	js         jetstream.JetStream
	closed     chan struct{} // closed when nats.go has given the connection up
	closing    atomic.Bool   // Close was called

	mu sync.Mutex // Guards what follows.
	// The link is one connection's life; linked is closed while there is one.
	link    context.Context
	endLink context.CancelCauseFunc
	linked  chan struct{}
	trouble error               // why there is no link
	asking  map[*asked]struct{} // requests on their way
	owners  map[int]*ownership  // by partition: the last take-over
}

// Connect connects to the hub in this process, or to the one at cfg.URLs. It tries each
// URL once, for up to 5 s, and returns without a connection when the hub is away: it
// then goes on trying (see Connected). It fails when the settings are wrong or name
// files it cannot read.
func Connect(ctx context.Context, cfg ConnectConfig) (*Broker, error) {
	if err := cfg.HubConfig.Validate(); err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	if err := envelope.ValidName(cfg.Name); err != nil {
		return nil, fmt.Errorf("hub: name at the hub: %w", err)
	}
	if (cfg.Embedded == nil) == (len(cfg.URLs) == 0) {
		return nil, errors.New("hub: urls: none, and no embedded hub (or both)")
	}
	b := &Broker{
		name:       cfg.Name,
		hub:        cfg.HubConfig,
		embedded:   cfg.Embedded != nil,
		partitions: cfg.partitions(),
		log:        cmp.Or(cfg.Log, slog.Default()),
		closed:     make(chan struct{}),
		linked:     make(chan struct{}),
		trouble:    errors.New("not connected yet"),
		asking:     make(map[*asked]struct{}),
		owners:     make(map[int]*ownership),
	}
	var err error
	if b.metrics, err = newMetrics(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("hub: metrics: %w", err)
	}
	opts, err := b.options(cfg)
	if err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	if b.nc, err = nats.Connect(strings.Join(cfg.URLs, ","), opts...); err != nil {
		return nil, fmt.Errorf("hub: connect: %w", err)
	}
	if b.js, err = jetstream.New(b.nc, jetstream.WithDefaultTimeout(apiTimeout)); err != nil {
		b.nc.Close()
		return nil, fmt.Errorf("hub: %w", err)
	}
	if b.embedded {
		if _, err := b.await(ctx); err != nil {
			b.nc.Close()
			return nil, fmt.Errorf("hub: connect to the embedded hub: %w", err)
		}
	}
	return b, nil
}

func (b *Broker) options(cfg ConnectConfig) ([]nats.Option, error) {
	maxPause := cmp.Or(cfg.ReconnectMax, 60*time.Second)
	if b.embedded {
		maxPause = cmp.Or(cfg.ReconnectMax, time.Second)
	}
	opts := []nats.Option{
		nats.Name(cfg.Name),
		nats.CustomInboxPrefix(inboxPrefix(cfg.Name)),
		nats.Timeout(dialTimeout),
		nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(-1),      // the default gives up after two minutes
		nats.IgnoreAuthErrorAbort(), // the default gives up after two refused logins: a rotation would end us
		nats.ReconnectBufSize(-1),   // no sending later what its caller has given up
		nats.PingInterval(pingEvery),
		nats.MaxPingsOutstanding(2),
		nats.DrainTimeout(drainTimeout),
		nats.CustomReconnectDelay(func(attempt int) time.Duration { return jitter(attempt, time.Second, maxPause) }),
		nats.ConnectHandler(b.linkUp),
		nats.ReconnectHandler(b.linkUp),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { b.linkDown(err) }),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { b.stillDown(err) }),
		nats.ClosedHandler(func(nc *nats.Conn) {
			if !b.closing.Load() {
				b.log.Error("hub: connection closed for good", "err", nc.LastError())
			}
			b.linkDown(errClosed)
			close(b.closed)
		}),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) { b.asyncError(sub, err) }),
	}
	if e := cfg.Embedded; e != nil {
		opts = append(opts, nats.InProcessServer(e.srv))
		if e.user != "" {
			opts = append(opts, nats.UserInfo(e.user, e.password))
		}
		return opts, nil
	}

	if cfg.PasswordFile != "" {
		if _, err := readSecretLine(cfg.PasswordFile); err != nil {
			return nil, fmt.Errorf("password_file: %w", err)
		}
		opts = append(opts, nats.UserInfoHandler(func() (string, string) {
			password, err := readSecretLine(cfg.PasswordFile)
			if err != nil {
				b.log.Error("hub: password unreadable", "file", cfg.PasswordFile, "err", err)
			}
			return cfg.User, password
		}))
	}
	if cfg.CredsFile != "" {
		if _, err := os.ReadFile(cfg.CredsFile); err != nil {
			return nil, fmt.Errorf("creds_file: %w", err)
		}
		opts = append(opts, nats.UserCredentials(cfg.CredsFile))
	}
	if cfg.CAFile != "" || cfg.CertFile != "" {
		t := &tls.Config{MinVersion: tls.VersionTLS12}
		if cfg.CAFile != "" {
			pool, err := readCertPool(cfg.CAFile)
			if err != nil {
				return nil, fmt.Errorf("ca_file: %w", err)
			}
			t.RootCAs = pool
		}
		if cfg.CertFile != "" {
			load, err := certificateFiles(cfg.CertFile, cfg.KeyFile)
			if err != nil {
				return nil, err
			}
			t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
		}
		opts = append(opts, nats.Secure(t))
	}
	return opts, nil
}

// certificateFiles returns what reads a certificate for each new connection, so that a
// renewed one needs no restart.
func certificateFiles(certFile, keyFile string) (func() (*tls.Certificate, error), error) {
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, fmt.Errorf("cert_file, key_file: %w", err)
		}
		return &cert, nil
	}
	_, err := load()
	return load, err
}

func readCertPool(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no PEM certificate in it", path)
	}
	return pool, nil
}

// inboxPrefix of a program, so that its replies are its own: a user's permissions name it.
func inboxPrefix(name string) string { return "_INBOX_" + name }

// linkUp, linkDown and stillDown are called by nats.go one at a time, in order.
func (b *Broker) linkUp(nc *nats.Conn) { // b.nc may not be set yet
	b.mu.Lock()
	if b.link == nil {
		close(b.linked)
	} else {
		b.dropLink()
	}
	b.link, b.endLink = context.WithCancelCause(context.Background())
	b.trouble = nil
	b.mu.Unlock()
	b.log.Info("hub: connected", "server", nc.ConnectedServerName())
}

func (b *Broker) linkDown(err error) {
	b.mu.Lock()
	was := b.link != nil
	b.trouble = cmp.Or(err, errLinkDown)
	if was {
		b.dropLink()
		b.link, b.endLink = nil, nil
		b.linked = make(chan struct{})
	}
	b.mu.Unlock()
	if was && !errors.Is(err, errClosed) && !b.closing.Load() {
		b.metrics.disconnects.Inc()
		b.log.Warn("hub: disconnected", "err", cmp.Or(err, errLinkDown))
	}
}

// dropLink ends the link and the requests on their way over it: all there are, since a
// request that comes with an older link has been ended by asks. b.mu is held.
func (b *Broker) dropLink() {
	b.endLink(errLinkDown)
	for a := range b.asking {
		a.end(errLinkDown)
	}
}

func (b *Broker) stillDown(err error) {
	b.mu.Lock()
	news := b.trouble == nil || b.trouble.Error() != err.Error()
	b.trouble = err
	b.mu.Unlock()
	if news {
		b.log.Warn("hub: cannot connect, will go on trying", "err", err)
	}
}

var deniedPublish = regexp.MustCompile(`Publish to "([^"]+)"`)

func (b *Broker) asyncError(sub *nats.Subscription, err error) {
	kind := "other"
	switch {
	case errors.Is(err, nats.ErrSlowConsumer):
		kind = "slow-consumer"
	case errors.Is(err, nats.ErrPermissionViolation):
		kind = "permission"
		if m := deniedPublish.FindStringSubmatch(err.Error()); m != nil {
			b.deny(m[1])
		}
	}
	b.metrics.asyncErrors.WithLabelValues(kind).Inc()
	subject := ""
	if sub != nil {
		subject = sub.Subject
	}
	b.log.Warn("hub: error reported", "reason", kind, "subject", subject, "err", err)
}

// asked is a request on its way.
type asked struct {
	subject string
	end     context.CancelCauseFunc
}

// deny ends the requests to a subject: the hub's refusal comes outside of them, and
// their reply never.
func (b *Broker) deny(subject string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for a := range b.asking {
		if a.subject == subject {
			a.end(ErrDenied)
		}
	}
}

// asks returns the context of one request: it ends with ctx, with the link, when the
// hub denies the subject, and after limit; its cause says which.
func (b *Broker) asks(ctx, link context.Context, subject string, limit time.Duration) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	a := &asked{subject, end}
	clock := time.AfterFunc(limit, func() { end(noAnswer(limit)) })
	b.mu.Lock()
	b.asking[a] = struct{}{}
	gone := b.link != link // who ended it did not find a
	b.mu.Unlock()
	if gone {
		end(errLinkDown)
	}
	return ctx, func() {
		b.mu.Lock()
		delete(b.asking, a)
		b.mu.Unlock()
		clock.Stop()
		end(nil)
	}
}

// noAnswer is the cause of a request that nobody answered for so long.
type noAnswer time.Duration

func (d noAnswer) Error() string { return "no answer within " + time.Duration(d).String() }

// await returns the link: a context that ends with this connection. It waits until
// there is one, or until ctx ends.
func (b *Broker) await(ctx context.Context) (context.Context, error) {
	for {
		b.mu.Lock()
		link, linked, trouble := b.link, b.linked, b.trouble
		b.mu.Unlock()
		if link != nil {
			return link, nil
		}
		select {
		case <-linked:
		case <-b.closed:
			return nil, errClosed
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", context.Cause(ctx), trouble)
		}
	}
}

// session waits for a link and returns a context that ends with it or with ctx.
func (b *Broker) session(ctx context.Context) (context.Context, context.CancelFunc, error) {
	link, err := b.await(ctx)
	if err != nil {
		return nil, nil, err
	}
	s, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(link, func() { cancel(context.Cause(link)) })
	return s, func() { stop(); cancel(nil) }, nil
}

// Close ends the connection after what has been published and acknowledged so far is
// on its way, within 10 s. Subscriptions end. It may be called more than once.
func (b *Broker) Close() error {
	b.closing.Store(true)
	if err := b.nc.Drain(); err != nil {
		// Not connected, or closed already: there is nothing to drain.
		b.nc.Close()
	}
	select {
	case <-b.closed:
		return nil
	case <-time.After(drainTimeout + 5*time.Second):
		b.nc.Close()
		return fmt.Errorf("hub: connection did not drain within %v", drainTimeout)
	}
}

// Connected reports whether there is a connection now.
func (b *Broker) Connected() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.link != nil
}

// Status is "connected", or why not, in words for a person.
func (b *Broker) Status() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.link != nil {
		return "connected"
	}
	return fmt.Sprintf("not connected: %v", b.trouble)
}

// Durability says what an acknowledged message has survived: "fsync", it is on the
// disk; "interval", it will be within a second; "hub", as the hub elsewhere is set. An
// embedded hub says so in its name, to whoever connects.
func (b *Broker) Durability() string {
	switch b.nc.ConnectedServerName() {
	case serverFsync:
		return "fsync"
	case serverInterval:
		return syncInterval
	}
	return "hub"
}

// Partitions is how many partitions the settings say POS has.
func (b *Broker) Partitions() int { return b.partitions }

// PartitionOf returns the partition of a site's events, as the stream computes it:
// FNV-1a-32 of the name, modulo Partitions.
func (b *Broker) PartitionOf(site string) int { return partitionOf(site, b.partitions) }

func partitionOf(site string, partitions int) int {
	h := fnv.New32a()
	h.Write([]byte(site))
	return int(h.Sum32() % uint32(partitions))
}

// jitter is a random pause before attempt n (from 1): up to a ceiling that doubles
// from base to limit.
func jitter(attempt int, base, limit time.Duration) time.Duration {
	ceiling := limit
	if shift := max(attempt-1, 0); shift < 32 && base<<shift < limit {
		ceiling = base << shift
	}
	return time.Duration(rand.Int64N(int64(max(ceiling, 1)))) + 1
}

// pause waits, or returns false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
