// Package kitchen is a stub Enterprise Kitchen: an HTTP server for one or many sites that
// decrypts by its own means, checks what it is sent, cooks each order once, keeps a ledger
// outside the programs under test, and misbehaves on demand.
//
// It models what makes a Kitchen hard to deliver to: a request whose client gave up may
// still be processed later (Late), an answer may be lost after the order was cooked
// (Fault.Processed), a key may end. It judges its sender by what it cooked: repeats,
// inversions, reused numbers and IVs.
package kitchen

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// Config of a Kitchen. Zero values are the defaults.
type Config struct {
	// Sites served; required. Names are ^[a-z0-9][a-z0-9_-]{0,62}$.
	Sites []string
	// Addr listened on. Default 127.0.0.1 and a free port below the range that outgoing
	// connections use, so that nothing takes it while the Kitchen refuses. Excludes Separate
	// unless its port is 0.
	Addr string
	// Separate gives each site a listener of its own, so that one site can refuse alone.
	Separate bool
	// TLS of the listeners. Default nil: plain HTTP.
	TLS *tls.Config

	// Keys of the sites, asked for each request. Default nil: no site is encrypted.
	Keys vendorcrypto.KeysFunc
	// Profile is the sites' cipher profile; Profiles overrides it for single sites. Every
	// site needs one when Keys is set.
	Profile  vendorcrypto.Profile
	Profiles map[string]vendorcrypto.Profile
	// Skew widens the keys' validity on both ends. Default 0.
	Skew time.Duration
	// Token that a site's requests must carry as "Bearer <token>". Default nil; "" asks for
	// none.
	Token func(site string) vendorcrypto.Secret
	// NoMismatch is an old Kitchen: it answers errorCode 2 where newer ones answer 3.
	NoMismatch bool

	// OrderPointer and VersionPointer are JSON pointers (RFC 6901) to an order's id and
	// version in the payload. Defaults "/_id" and "/version". The version is an integer above 0.
	OrderPointer, VersionPointer string
	// PerOrder compares Kb-Seq among events of one order only, for senders that run several
	// lanes for a site. Default: among all events of a site.
	PerOrder bool

	// MaxBody bounds a request's body in bytes. Default 1 MiB.
	MaxBody int64
	// MaxRecords bounds the ledger and each part of the memory behind repeats and problems.
	// Default 262,144. Beyond it the oldest goes (Stats.Dropped, Stats.Forgotten).
	MaxRecords int
	// Seed of everything random.
	Seed uint64
	// Behaviour that every site starts with. Default: healthy.
	Behaviour Behaviour
	// OnProcessed is called after each processing, repeats included, before the answer.
	// It must not block, nor call Set, SetAll, Restart or Close.
	OnProcessed func(Record)
	// Log for what the HTTP server says. Default slog.Default().
	Log *slog.Logger
}

var name = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

func (c Config) withDefaults() Config {
	c.Addr = cmp.Or(c.Addr, "127.0.0.1:0")
	c.OrderPointer = cmp.Or(c.OrderPointer, "/_id")
	c.VersionPointer = cmp.Or(c.VersionPointer, "/version")
	c.MaxBody = cmp.Or(c.MaxBody, 1<<20)
	c.MaxRecords = cmp.Or(c.MaxRecords, 1<<18)
	c.Log = cmp.Or(c.Log, slog.Default())
	return c
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if len(c.Sites) == 0 {
		bad("sites: required, at least one")
	}
	seen := map[string]bool{}
	for _, site := range c.Sites {
		switch {
		case !name.MatchString(site):
			bad("sites: %q does not match %s", site, name)
		case seen[site]:
			bad("sites: %q is listed twice", site)
		}
		seen[site] = true
		if c.Keys != nil {
			if err := c.profile(site).Validate(); err != nil {
				bad("profile of site %q: %w", site, err)
			}
		}
	}
	for site := range maps.Keys(c.Profiles) {
		if !seen[site] {
			bad("profiles: %q is no site of this Kitchen", site)
		}
	}
	if _, port, err := net.SplitHostPort(c.Addr); err != nil {
		bad("addr: %w", err)
	} else if c.Separate && len(c.Sites) > 1 && port != "0" {
		bad("addr: %q has one port, and separate asks for one for each site", c.Addr)
	}
	for field, pointer := range map[string]string{"order_pointer": c.OrderPointer, "version_pointer": c.VersionPointer} {
		if !strings.HasPrefix(pointer, "/") {
			bad("%s: %q does not begin with /", field, pointer)
		}
	}
	if c.Skew < 0 || c.MaxBody < 0 || c.MaxRecords < 0 {
		bad("skew, max_body and max_records must not be negative")
	}
	if err := c.Behaviour.Validate(); err != nil {
		bad("behaviour: %w", err)
	}
	return errors.Join(errs...)
}

func (c Config) profile(site string) vendorcrypto.Profile {
	if p, ok := c.Profiles[site]; ok {
		return p
	}
	return c.Profile
}

// Kitchen is a running stub. Its methods are safe for concurrent use.
type Kitchen struct {
	// Fixed at birth.
	cfg     Config
	doors   []*door
	ciphers vendorcrypto.Cache
	wg      sync.WaitGroup // connections and the requests on them

	// Serialises everything that opens or closes doors. Taken before mu.
	doorMu sync.Mutex

	// Guarded by mu.
	mu       sync.Mutex
	closed   bool
	sites    map[string]*site
	ledger   []*Record // a ring once it is full; its records too are guarded by mu
	oldest   int
	arrived  uint64
	place    uint64
	total    Counts
	strays   uint64
	followed uint64
	inFlight int
	idle     chan struct{} // closed while inFlight is 0

	keys    memory[keyOf, known]
	lanes   memory[laneOf, uint64]
	numbers memory[numberOf, struct{}]
	orders  memory[orderOf, int64]
	ivs     memory[ivOf, string]

	dropped, forgotten uint64
}

// site is one site's state. Guarded by Kitchen.mu, except name and door.
type site struct {
	name string
	door *door

	conduct
	sets        uint64             // how often the behaviour was set
	life        context.Context    // ends when the site refuses or the Kitchen restarts
	crash       context.CancelFunc // ends life
	counts      Counts
	fingerprint string
}

func (s *site) live() { s.life, s.crash = context.WithCancel(context.Background()) }

// Start checks cfg and starts a Kitchen. Close ends it.
func Start(cfg Config) (*Kitchen, error) {
	k, err := newKitchen(cfg)
	if err != nil {
		return nil, err
	}
	for _, d := range k.doors {
		if err := k.adjust(d); err != nil {
			return nil, errors.Join(err, k.Close())
		}
	}
	return k, nil
}

// newKitchen builds a Kitchen whose doors are closed.
func newKitchen(cfg Config) (*Kitchen, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("kitchen: %w", err)
	}
	cfg = cfg.withDefaults()
	cfg.Sites = slices.Clone(cfg.Sites)
	k := &Kitchen{cfg: cfg, sites: map[string]*site{}, idle: make(chan struct{})}
	close(k.idle)
	k.keys = newMemory[keyOf, known](cfg.MaxRecords, &k.forgotten)
	k.lanes = newMemory[laneOf, uint64](cfg.MaxRecords, &k.forgotten)
	k.numbers = newMemory[numberOf, struct{}](cfg.MaxRecords, &k.forgotten)
	k.orders = newMemory[orderOf, int64](cfg.MaxRecords, &k.forgotten)
	k.ivs = newMemory[ivOf, string](cfg.MaxRecords, &k.forgotten)
	for _, n := range cfg.Sites {
		s := &site{name: n, conduct: newConduct(cfg.Behaviour, cfg.Seed, n, 0)}
		s.live()
		if cfg.Separate || len(k.doors) == 0 {
			k.doors = append(k.doors, &door{addr: cfg.Addr, conns: map[net.Conn]struct{}{}})
		}
		s.door = k.doors[len(k.doors)-1]
		s.door.sites = append(s.door.sites, s)
		k.sites[n] = s
	}
	return k, nil
}

// URL is the base of a site's endpoints: URL(site)+"/order", URL(site)+"/alert". It is ""
// for a site this Kitchen does not serve, and stays the same while it refuses.
func (k *Kitchen) URL(site string) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.sites[site]
	if s == nil {
		return ""
	}
	base := "http://"
	if k.cfg.TLS != nil {
		base = "https://"
	}
	base += s.door.addr
	if len(s.door.sites) > 1 {
		base += "/sites/" + site
	}
	return base
}

// Set gives a site another behaviour, from the next request on; requests already being
// worked on keep the old one, unless the new one refuses. It returns when the listener is
// in the state asked for.
func (k *Kitchen) Set(site string, b Behaviour) error { return k.set([]string{site}, b) }

// SetAll gives every site the same behaviour.
func (k *Kitchen) SetAll(b Behaviour) error { return k.set(k.cfg.Sites, b) }

func (k *Kitchen) set(names []string, b Behaviour) error {
	if err := b.Validate(); err != nil {
		return fmt.Errorf("kitchen: %w", err)
	}
	k.doorMu.Lock()
	defer k.doorMu.Unlock()
	var touched []*door
	k.mu.Lock()
	for _, n := range names {
		s := k.sites[n]
		if s == nil {
			k.mu.Unlock()
			return fmt.Errorf("kitchen: no site %q", n)
		}
		s.sets++
		s.conduct = newConduct(b, k.cfg.Seed, n, s.sets)
		if b.Refuse {
			s.crash()
		} else if s.life.Err() != nil && !k.closed {
			s.live()
		}
		if !slices.Contains(touched, s.door) {
			touched = append(touched, s.door)
		}
	}
	k.mu.Unlock()
	var errs []error
	for _, d := range touched {
		errs = append(errs, k.adjust(d))
	}
	return errors.Join(errs...)
}

// Restart is a crash and a new start: requests being worked on are lost, connections are
// cut, then the listeners open again. Ledger, counters and behaviours stay.
func (k *Kitchen) Restart() error {
	k.doorMu.Lock()
	defer k.doorMu.Unlock()
	k.crashAll()
	var errs []error
	for _, d := range k.doors {
		errs = append(errs, d.close())
	}
	k.wg.Wait()
	k.mu.Lock()
	for _, s := range k.sites {
		if !s.Refuse && !k.closed {
			s.live()
		}
	}
	k.mu.Unlock()
	for _, d := range k.doors {
		errs = append(errs, k.adjust(d))
	}
	return errors.Join(errs...)
}

func (k *Kitchen) crashAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.sites {
		s.crash()
	}
}

// Idle waits until no request is being worked on or waits for late processing.
func (k *Kitchen) Idle(ctx context.Context) error {
	for {
		k.mu.Lock()
		idle, n := k.idle, k.inFlight
		k.mu.Unlock()
		if n == 0 {
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return fmt.Errorf("kitchen: %d requests in flight: %w", n, context.Cause(ctx))
		}
	}
}

// Close ends the Kitchen and waits for everything it started. Requests being worked on are
// lost; the ledger can still be read. A second call does nothing.
func (k *Kitchen) Close() error {
	k.doorMu.Lock()
	defer k.doorMu.Unlock()
	k.mu.Lock()
	k.closed = true
	k.mu.Unlock()
	k.crashAll()
	var errs []error
	for _, d := range k.doors {
		errs = append(errs, d.close())
	}
	k.wg.Wait()
	return errors.Join(errs...)
}

// door is a listener for some sites. It keeps its address from its first opening on.
type door struct {
	sites []*site // fixed at birth

	// Guarded by Kitchen.doorMu; addr by Kitchen.mu too.
	addr string
	srv  *http.Server // nil while it is closed

	accepting sync.WaitGroup
	serveErr  error // owned by the accept loop

	connMu sync.Mutex
	conns  map[net.Conn]struct{}
}

// adjust opens or closes a door as its sites' behaviours ask. k.doorMu is held, or d is
// not shared yet.
func (k *Kitchen) adjust(d *door) error {
	k.mu.Lock()
	open := !k.closed && slices.ContainsFunc(d.sites, func(s *site) bool { return !s.Refuse })
	addr := d.addr
	k.mu.Unlock()
	switch {
	case !open:
		return d.close()
	case d.srv != nil:
		return nil
	}
	l, err := listen(addr)
	if err != nil {
		return fmt.Errorf("kitchen: %w", err)
	}
	k.mu.Lock()
	d.addr = l.Addr().String()
	k.mu.Unlock()
	if k.cfg.TLS != nil {
		l = tls.NewListener(l, k.cfg.TLS)
	}
	d.srv = &http.Server{
		Handler:           k.handler(d),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(k.cfg.Log.Handler(), slog.LevelDebug),
		ConnState:         func(c net.Conn, state http.ConnState) { k.track(d, c, state) },
	}
	srv := d.srv
	d.accepting.Go(func() { d.serveErr = srv.Serve(l) })
	return nil
}

// track keeps the set of a door's connections and counts them in k.wg.
func (k *Kitchen) track(d *door, c net.Conn, state http.ConnState) {
	d.connMu.Lock()
	defer d.connMu.Unlock()
	switch state {
	case http.StateNew:
		k.wg.Add(1)
		d.conns[c] = struct{}{}
	case http.StateClosed, http.StateHijacked:
		delete(d.conns, c)
		k.wg.Done()
	}
}

// close shuts the listener, cuts its connections and waits for the accept loop. The
// requests are waited for by Kitchen.wg.
func (d *door) close() error {
	if d.srv == nil {
		return nil
	}
	err := d.srv.Close()
	d.accepting.Wait()
	if !errors.Is(d.serveErr, http.ErrServerClosed) {
		err = errors.Join(err, d.serveErr)
	}
	d.srv = nil
	// The server forgets a connection accepted while it was being closed.
	d.connMu.Lock()
	left := slices.Collect(maps.Keys(d.conns))
	d.connMu.Unlock()
	for _, c := range left {
		_ = c.Close()
	}
	return err
}

const (
	firstPort, ports = 12_000, 20_000  // below the ephemeral ranges of Linux, macOS and Windows
	reopenFor        = 5 * time.Second // how long a known port may still be busy
	reopenEvery      = 5 * time.Millisecond
)

// listen opens addr. Port 0 is chosen below the range of outgoing connections; another
// port is tried for a while, because connections just cut may still hold it.
func listen(addr string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if port == "0" {
		for range 100 {
			if l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(firstPort+rand.IntN(ports)))); err == nil {
				return l, nil
			}
		}
		return net.Listen("tcp", addr)
	}
	end := time.NewTimer(reopenFor)
	defer end.Stop()
	again := time.NewTicker(reopenEvery)
	defer again.Stop()
	for {
		l, err := net.Listen("tcp", addr)
		if err == nil {
			return l, nil
		}
		select {
		case <-again.C:
		case <-end.C:
			return nil, err
		}
	}
}
