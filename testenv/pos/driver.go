// Package pos drives an edge as POS do: it sends plausible orders, updates and alerts,
// plain or encrypted by its own means, tries again as a POS would, asks what became of
// what was accepted, and keeps a ledger of what it was told, outside the programs under
// test.
package pos

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// Mode says who encrypts.
type Mode string

const (
	Plain     Mode = "plain"     // the edge; the default
	Encrypted Mode = "encrypted" // the POS, as long as the Portal says so
)

// Config of a Driver: one POS, or several alike, at one site. Zero values are the defaults.
type Config struct {
	// BaseURL of the edge; required.
	BaseURL string
	// Site sent to; required. The path names it (/sites/<site>/order) with SitePath; without,
	// it is the token's or the listener's (/order).
	Site     string
	SitePath bool
	// Token sent as "Bearer <token>". Default "": no authorization header.
	Token vendorcrypto.Secret
	// Roots that the edge's certificate is checked against. Default: the system's.
	Roots *x509.CertPool
	// Transport in place of the driver's own. Excludes Roots.
	Transport http.RoundTripper

	Mode Mode
	// Profile and Keys of the site; required when Mode is Encrypted.
	Profile vendorcrypto.Profile
	Keys    vendorcrypto.KeysFunc

	// Seed of everything random. Two drivers with one seed at one site send the same orders
	// under the same keys.
	Seed uint64
	// Canary in every payload. Default Canary(Seed, Site).
	Canary string
	// Count of messages to send, updates included. Default 0: until the context ends.
	Count int
	// Rate in messages a second. Default 0: as fast as answers come.
	Rate float64
	// Concurrency bounds the messages under way at once. Default 4.
	Concurrency int

	// IdempotencyKeys sends a key with each message, the same for every attempt; an encrypted
	// attempt then gets a fresh IV. Without it a plain message whose outcome is in doubt is
	// not sent again, and an encrypted one is sent again byte for byte.
	IdempotencyKeys bool
	// Wait is sent as "Prefer: wait=N", in seconds rounded up; negative: wait=0. Default 0:
	// not sent.
	Wait time.Duration
	// Within is sent as Kb-Within, in seconds rounded up. Default 0: not sent.
	Within time.Duration

	// Timeout of one attempt. Default 10 s and Wait.
	Timeout time.Duration
	// Attempts at one message, at most. Default 5.
	Attempts int
	// Backoff and MaxBackoff bound the pause between attempts: a random part of Backoff
	// doubled for each attempt, or Retry-After, at most MaxBackoff. Defaults 100 ms and 5 s.
	Backoff, MaxBackoff time.Duration
	// Grace for what is under way when Run's context ends; then it is cut off. Default 10 s.
	Grace time.Duration
	// Poll is the pause between two rounds of asking about what is pending. Default 250 ms.
	Poll time.Duration
	// PollLimit is how long a message is asked about after its answer. Default 15 min.
	PollLimit time.Duration

	// MaxEntries bounds the ledger. Default 262,144; beyond it the oldest entry goes
	// (Tally.Dropped). The tally counts it all the same.
	MaxEntries int
	// OnChange is called whenever an entry has changed: begun, answered, settled. It must
	// not block. For one entry the calls come in order.
	OnChange func(Entry)
}

func (c Config) withDefaults() Config {
	c.Mode = cmp.Or(c.Mode, Plain)
	c.Canary = cmp.Or(c.Canary, Canary(c.Seed, c.Site))
	c.Concurrency = cmp.Or(c.Concurrency, 4)
	c.Timeout = cmp.Or(c.Timeout, 10*time.Second+max(c.Wait, 0))
	c.Attempts = cmp.Or(c.Attempts, 5)
	c.Backoff = cmp.Or(c.Backoff, 100*time.Millisecond)
	c.MaxBackoff = cmp.Or(c.MaxBackoff, 5*time.Second)
	c.Grace = cmp.Or(c.Grace, 10*time.Second)
	c.Poll = cmp.Or(c.Poll, 250*time.Millisecond)
	c.PollLimit = cmp.Or(c.PollLimit, 15*time.Minute)
	c.MaxEntries = cmp.Or(c.MaxEntries, 1<<18)
	return c
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if u, err := url.Parse(c.BaseURL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		bad("base_url: %q is no http or https URL", c.BaseURL)
	}
	if c.Site == "" {
		bad("site: required")
	}
	if c.Transport != nil && c.Roots != nil {
		bad("transport: excludes roots")
	}
	switch c.Mode {
	case Plain:
	case Encrypted:
		if c.Keys == nil {
			bad("keys: required when mode is %q", Encrypted)
		}
		if err := c.Profile.Validate(); err != nil {
			bad("profile: %w", err)
		}
	default:
		bad("mode: %q is neither %q nor %q", c.Mode, Plain, Encrypted)
	}
	for _, n := range []struct {
		name string
		v    float64
	}{
		{"count", float64(c.Count)}, {"rate", c.Rate}, {"concurrency", float64(c.Concurrency)}, {"within", float64(c.Within)},
		{"timeout", float64(c.Timeout)}, {"attempts", float64(c.Attempts)}, {"backoff", float64(c.Backoff)}, {"max_backoff", float64(c.MaxBackoff)},
		{"grace", float64(c.Grace)}, {"poll", float64(c.Poll)}, {"poll_limit", float64(c.PollLimit)}, {"max_entries", float64(c.MaxEntries)},
	} {
		if !(n.v >= 0) {
			bad("%s: %v is negative", n.name, n.v)
		}
	}
	return errors.Join(errs...)
}

// Driver sends for one site. Its methods are safe for concurrent use, except where they
// say otherwise.
type Driver struct {
	// Fixed at birth.
	cfg     Config
	base    *url.URL
	client  *http.Client
	gen     Generator
	ciphers vendorcrypto.Cache

	// Guarded by mu.
	mu      sync.Mutex
	ran     bool
	rng     *rand.Rand
	begun   int
	index   uint64    // of the next new message
	updates []job     // whose version before has been answered
	slot    time.Time // of the next send
	ledger  []*Entry  // a ring once it is full; its entries too are guarded by mu
	oldest  int
	open    []*Entry // to ask about
	tally   Tally
	answer  histogram
	settle  histogram
}

// job is one message to send.
type job struct {
	index   uint64
	version int
}

// New checks cfg and makes a Driver. It sends nothing yet.
func New(cfg Config) (*Driver, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("pos: %w", err)
	}
	cfg = cfg.withDefaults()
	d := &Driver{cfg: cfg, gen: NewGenerator(cfg.Seed, cfg.Site, cfg.Canary)}
	d.base, _ = url.Parse(cfg.BaseURL) // checked above
	d.rng = rand.New(rand.NewPCG(cfg.Seed, d.gen.seed))
	transport := cfg.Transport
	if transport == nil {
		transport = &http.Transport{
			MaxIdleConnsPerHost: cfg.Concurrency + pollers,
			IdleConnTimeout:     30 * time.Second,
			TLSClientConfig:     &tls.Config{RootCAs: cfg.Roots},
		}
	}
	d.client = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return d, nil
}

// Canary is the text in every payload of this driver.
func (d *Driver) Canary() string { return d.cfg.Canary }

// Run sends until Count messages are answered or ctx ends, and meanwhile asks about what
// was accepted. What is under way when ctx ends goes on for at most Grace. It returns nil
// when told to stop, and may be called once.
func (d *Driver) Run(ctx context.Context) error {
	d.mu.Lock()
	again := d.ran
	d.ran = true
	d.mu.Unlock()
	if again {
		return errors.New("pos: Run may be called once")
	}
	defer d.client.CloseIdleConnections()

	sending, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	working, finish := context.WithCancel(context.WithoutCancel(ctx))
	var helpers, workers sync.WaitGroup
	helpers.Go(func() {
		select {
		case <-working.Done():
		case <-ctx.Done():
			wait(working, d.cfg.Grace)
			cut()
		}
	})
	helpers.Go(func() {
		for wait(working, d.cfg.Poll) {
			d.ask(working)
		}
	})
	for range d.cfg.Concurrency {
		workers.Go(func() {
			for {
				j, ok := d.next(ctx)
				if !ok {
					return
				}
				d.deliver(sending, j)
			}
		})
	}
	workers.Wait()
	finish()
	helpers.Wait()
	return nil
}

// Drain asks about what is pending until everything is settled, ctx ends, or each pending
// message has reached PollLimit. It is an error when something is still pending. Call it
// after Run.
func (d *Driver) Drain(ctx context.Context) error {
	defer d.client.CloseIdleConnections()
	for d.ask(ctx) > 0 && wait(ctx, d.cfg.Poll) {
	}
	t := d.Tally()
	if t.Pending == 0 {
		return nil
	}
	err := fmt.Errorf("pos: %d of %d accepted messages of site %s are still pending", t.Pending, t.Accepted, d.cfg.Site)
	if ctx.Err() != nil {
		return fmt.Errorf("%w: %w", err, context.Cause(ctx))
	}
	return err
}

// next waits for the turn of the next message. ok is false when there is none.
func (d *Driver) next(ctx context.Context) (j job, ok bool) {
	d.mu.Lock()
	if ctx.Err() != nil || d.cfg.Count > 0 && d.begun >= d.cfg.Count {
		d.mu.Unlock()
		return job{}, false
	}
	d.begun++
	var pause time.Duration
	if d.cfg.Rate > 0 {
		now := time.Now()
		if d.slot.Before(now) {
			d.slot = now
		}
		pause = d.slot.Sub(now)
		d.slot = d.slot.Add(time.Duration(float64(time.Second) / d.cfg.Rate))
	}
	d.mu.Unlock()
	if !wait(ctx, pause) {
		return job{}, false
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.updates) > 0 && d.rng.IntN(2) == 0 {
		j = d.updates[0]
		d.updates = d.updates[1:]
		return j, true
	}
	j = job{index: d.index, version: 1}
	d.index++
	return j, true
}

// wait returns true when d has passed, false when ctx ended before.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
