// Package wan is a wide area network of one link, in user space: a TCP proxy on loopback
// between a program and its server that can be cut, stalled without a word, slow, narrow,
// flapping or refusing, and whole again. Nothing of it needs a right, and what it does to
// bytes that pass is in the order of a TCP stream: late or never, but not lost or swapped
// while the connection lives.
package wan

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Config of a Link. Zero values are the defaults.
type Config struct {
	// Target is the server's host:port. Required. Nobody need listen there yet.
	Target string
	// Listen is the link's own host:port. Default 127.0.0.1 and a port that is free; one
	// that shall refuse for a while is better below the ports of outgoing connections.
	Listen string
	// Seed of the jitter.
	Seed uint64
	// MaxConns is how many connections there are at once; more are reset (Stats.Crowded).
	// Default 256.
	MaxConns int
}

// Way is how bytes travel in one direction.
type Way struct {
	// Delay of every byte, and up to Jitter more. Bytes do not overtake each other.
	Delay, Jitter time.Duration
	// Rate in bytes a second. Default 0: as fast as they come.
	Rate int
	// Blocked: nothing arrives, and nobody is told, not even that the other side is gone.
	// What is on the way arrives once it is blocked no more.
	Blocked bool
}

// Weather is how a link is. The zero value is a link without any trouble.
type Weather struct {
	// Up is from the program to the server, Down from the server to the program.
	Up, Down Way
	// Refuse: new connections are refused. Those there are stay; see Cut.
	Refuse bool
}

// Stats of a Link since its start.
type Stats struct {
	Conns    uint64 // connections taken
	Failed   uint64 // of these: the server could not be reached
	Crowded  uint64 // connections beyond MaxConns
	Up, Down uint64 // bytes that arrived
}

// End is how a connection is cut.
type End int

const (
	Reset  End = iota // both sides get a RST, as from a router that has forgotten them
	Finish            // both sides get a FIN, as from one that shuts down
)

const (
	chunkBytes = 4 << 10
	// queueChunks of a direction may be on the way; then the sender has to wait, as it has
	// to when the window of a TCP connection is full.
	queueChunks = 64
	dialLimit   = 2 * time.Second
)

// Link is a running proxy. Its methods are safe for concurrent use.
type Link struct {
	// Fixed at birth.
	cfg  Config
	addr string
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	conns, failed, crowded, up, down atomic.Uint64

	mu       sync.Mutex // Guards what follows.
	listener net.Listener
	weather  Weather
	changed  chan struct{} // closed at the next change of the weather, or of a pair's hold
	pairs    map[*pair]struct{}
	rng      *rand.Rand
}

// pair is one connection and what it is connected to.
type pair struct {
	link    *Link
	client  *net.TCPConn
	server  *net.TCPConn // Guarded by link.mu; nil while dialling
	held    bool         // Guarded by link.mu
	ctx     context.Context
	stop    context.CancelFunc
	endOnce sync.Once
}

// Start opens a link in fine weather.
func Start(cfg Config) (*Link, error) {
	if _, _, err := net.SplitHostPort(cfg.Target); err != nil {
		return nil, fmt.Errorf("wan: target: %w", err)
	}
	cfg.Listen = cmp.Or(cfg.Listen, "127.0.0.1:0")
	cfg.MaxConns = cmp.Or(cfg.MaxConns, 256)
	if cfg.MaxConns < 0 {
		return nil, fmt.Errorf("wan: max conns %d is negative", cfg.MaxConns)
	}
	l := &Link{cfg: cfg, changed: make(chan struct{}), pairs: map[*pair]struct{}{}, rng: rand.New(rand.NewPCG(cfg.Seed, 0))}
	l.ctx, l.stop = context.WithCancel(context.Background())
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		l.stop()
		return nil, fmt.Errorf("wan: %w", err)
	}
	l.addr = listener.Addr().String()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.serve(listener)
	return l, nil
}

// Addr is where programs connect to: host:port.
func (l *Link) Addr() string { return l.addr }

// Stats returns the counts as they stand.
func (l *Link) Stats() Stats {
	return Stats{Conns: l.conns.Load(), Failed: l.failed.Load(), Crowded: l.crowded.Load(), Up: l.up.Load(), Down: l.down.Load()}
}

// Open is how many connections there are.
func (l *Link) Open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.pairs)
}

// Set changes the weather, for the connections there are, held ones excepted, and those
// that come. An error says that the link cannot listen again at its address.
func (l *Link) Set(w Weather) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return errors.New("wan: the link is closed")
	}
	switch {
	case w.Refuse && l.listener != nil:
		l.listener.Close()
		l.listener = nil
	case !w.Refuse && l.listener == nil:
		listener, err := net.Listen("tcp", l.addr)
		if err != nil {
			return fmt.Errorf("wan: %w", err)
		}
		l.serve(listener)
	}
	l.weather = w
	l.tell()
	return nil
}

// Weather returns the weather as it is.
func (l *Link) Weather() Weather {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.weather
}

// tell wakes whoever waits for a change. l.mu is held.
func (l *Link) tell() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// Cut ends the connections there are and returns how many there were. What is on the way
// is lost, held or not.
func (l *Link) Cut(how End) int {
	l.mu.Lock()
	var all []*pair
	for p := range l.pairs {
		all = append(all, p)
	}
	l.mu.Unlock()
	for _, p := range all {
		p.end(how)
	}
	return len(all)
}

// Hold keeps the connections there are from passing anything, as Way.Blocked does in both
// directions, whatever the weather, until Release; those that come are free. It returns how
// many there were. Once released, old bytes arrive after newer ones of other connections.
func (l *Link) Hold() int { return l.hold(true) }

// Release lets held connections go on, and returns how many there were.
func (l *Link) Release() int { return l.hold(false) }

func (l *Link) hold(on bool) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for p := range l.pairs {
		if p.held != on {
			p.held = on
			n++
		}
	}
	l.tell()
	return n
}

// Flap takes the link away and back again, times over: each time connections are reset and
// new ones refused for down, and it works for up. It ends in fine weather, also when ctx
// does. It returns how many connections it cut.
func (l *Link) Flap(ctx context.Context, times int, down, up time.Duration) (cut int, err error) {
	for range times {
		if err := l.Set(Weather{Refuse: true}); err != nil {
			return cut, err
		}
		cut += l.Cut(Reset)
		gone := !wait(ctx, down)
		if err := l.Set(Weather{}); err != nil {
			return cut, err
		}
		if gone || !wait(ctx, up) {
			break
		}
	}
	return cut, nil
}

// Close resets everything and waits until nothing of the link runs any more.
func (l *Link) Close() {
	l.stop()
	l.mu.Lock()
	if l.listener != nil {
		l.listener.Close()
		l.listener = nil
	}
	l.mu.Unlock()
	l.Cut(Reset)
	l.wg.Wait()
}

// serve takes connections. l.mu is held.
func (l *Link) serve(listener net.Listener) {
	l.listener = listener
	l.wg.Go(func() {
		for {
			conn, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) || l.ctx.Err() != nil {
				if err == nil {
					conn.Close()
				}
				return
			}
			if err != nil {
				// No descriptor is free, say: the next one may be.
				wait(l.ctx, 10*time.Millisecond)
				continue
			}
			l.take(conn.(*net.TCPConn))
		}
	})
}

func (l *Link) take(conn *net.TCPConn) {
	p := &pair{link: l, client: conn}
	p.ctx, p.stop = context.WithCancel(l.ctx)
	l.mu.Lock()
	crowded := len(l.pairs) >= l.cfg.MaxConns
	if !crowded {
		l.pairs[p] = struct{}{}
	}
	l.mu.Unlock()
	if crowded {
		l.crowded.Add(1)
		p.end(Reset)
		return
	}
	l.conns.Add(1)
	l.wg.Go(p.run)
}

// run connects the two sides until both have ended.
func (p *pair) run() {
	l := p.link
	defer func() {
		p.end(Reset)
		l.mu.Lock()
		delete(l.pairs, p)
		l.mu.Unlock()
	}()
	d := net.Dialer{Timeout: dialLimit}
	conn, err := d.DialContext(p.ctx, "tcp", l.cfg.Target)
	if err != nil {
		l.failed.Add(1)
		return
	}
	l.mu.Lock()
	p.server = conn.(*net.TCPConn)
	l.mu.Unlock()
	if p.ctx.Err() != nil { // it was cut meanwhile, without this side
		conn.Close()
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.pass(p.client, p.server, func(w *Weather) Way { return w.Up }, &l.up) })
	wg.Go(func() { p.pass(p.server, p.client, func(w *Weather) Way { return w.Down }, &l.down) })
	wg.Wait()
}

// end cuts both sides, once.
func (p *pair) end(how End) {
	p.endOnce.Do(func() {
		p.stop()
		p.link.mu.Lock()
		server := p.server
		p.link.mu.Unlock()
		for _, c := range []*net.TCPConn{p.client, server} {
			if c == nil {
				continue
			}
			if how == Reset {
				_ = c.SetLinger(0)
			}
			_ = c.Close()
		}
	})
}

// chunk is what was read at once. err is how a side ended: io.EOF, or it was reset.
type chunk struct {
	b   []byte
	due time.Time
	err error
}

// pass carries one direction until its sender has ended and the receiver knows.
func (p *pair) pass(from, to *net.TCPConn, way func(*Weather) Way, count *atomic.Uint64) {
	queue := make(chan chunk, queueChunks)
	var wg sync.WaitGroup
	wg.Go(func() { p.read(from, queue, way) })
	defer wg.Wait()
	for {
		var c chunk
		select {
		case c = <-queue:
		case <-p.ctx.Done():
			return
		}
		if !p.travel(c, way) {
			return
		}
		switch {
		case errors.Is(c.err, io.EOF):
			_ = to.CloseWrite()
			return
		case c.err != nil:
			p.end(Reset)
			return
		}
		if _, err := to.Write(c.b); err != nil {
			p.end(Reset)
			return
		}
		count.Add(uint64(len(c.b)))
	}
}

func (p *pair) read(from *net.TCPConn, queue chan<- chunk, way func(*Weather) Way) {
	l := p.link
	var last time.Time
	for {
		c := chunk{b: make([]byte, chunkBytes)}
		n, err := from.Read(c.b)
		c.b, c.err = c.b[:n], nil
		l.mu.Lock()
		w := way(&l.weather)
		c.due = time.Now().Add(w.Delay)
		if w.Jitter > 0 {
			c.due = c.due.Add(time.Duration(l.rng.Int64N(int64(w.Jitter))))
		}
		l.mu.Unlock()
		if c.due.Before(last) {
			c.due = last
		}
		last = c.due
		for _, c := range []chunk{c, {due: c.due, err: err}} {
			if len(c.b) == 0 && c.err == nil {
				continue
			}
			select {
			case queue <- c:
			case <-p.ctx.Done():
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// travel waits until a chunk may arrive; false: the connection is over.
func (p *pair) travel(c chunk, way func(*Weather) Way) bool {
	if !wait(p.ctx, time.Until(c.due)) {
		return false
	}
	paced := false
	for {
		p.link.mu.Lock()
		w, changed := way(&p.link.weather), p.link.changed
		blocked := w.Blocked || p.held
		p.link.mu.Unlock()
		switch {
		case blocked:
			select {
			case <-changed:
			case <-p.ctx.Done():
				return false
			}
		case w.Rate > 0 && len(c.b) > 0 && !paced:
			paced = true
			if !wait(p.ctx, time.Duration(len(c.b))*time.Second/time.Duration(w.Rate)) {
				return false
			}
		default:
			return p.ctx.Err() == nil
		}
	}
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
