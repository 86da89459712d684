package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// isAlive is the seed's heartbeat.
const isAlive = "isAlive?"

// screen is a Kitchen screen in the seed's dialect, by the harness's own means. It comes
// again whenever it was closed, and writes down each of its sessions.
type screen struct {
	// Fixed at birth.
	screenPlan
	url     string
	token   string
	keys    vendorcrypto.KeysFunc
	known   func(fingerprint string) (portal.Key, bool) // any key the Portal ever gave out
	profile vendorcrypto.Profile
	ciphers vendorcrypto.Cache
	log     *timeline

	stalled atomic.Pointer[chan struct{}] // not nil: it reads nothing until that is closed

	mu sync.Mutex // Guards what follows.
	// conn is the present connection, nil without.
	conn     net.Conn
	slow     bool      // the present session was slowed down
	heard    time.Time // when the last frame came
	sessions []Session
}

// reconnectEvery is how long a screen that was turned away waits.
const reconnectEvery = 100 * time.Millisecond

// run connects, and connects again, until ctx ends.
func (s *screen) run(ctx context.Context) {
	for ctx.Err() == nil {
		if !s.session(ctx) {
			sleep(ctx, reconnectEvery)
		}
	}
}

// session is one connection from its beginning to its end; false: it was turned away.
func (s *screen) session(ctx context.Context) bool {
	header := http.Header{"Origin": {"ionic"}}
	if s.token != "" {
		header.Set("Authorization", "Bearer "+s.token)
	}
	if on, keys := s.keys(s.site); on {
		key, ok := vendorcrypto.Newest(keys, time.Now())
		c, err := s.ciphers.Cipher(s.profile, key)
		if !ok || err != nil {
			return false
		}
		iv, _ := c.Seal(nil)
		header.Set("Sec-Iv", iv)
		header.Set("Sec-Fingerprint", key.Fingerprint)
	}
	dialer := websocket.Dialer{HandshakeTimeout: 2 * time.Second, EnableCompression: s.deflate, NetDialContext: s.dial}
	conn, _, err := dialer.DialContext(ctx, s.url, header)
	if err != nil {
		return false
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer conn.Close()
	now := Session{Site: s.site, Name: s.name, Opened: time.Now()}
	s.mu.Lock()
	s.slow = s.stalled.Load() != nil
	s.mu.Unlock()
	for {
		kind, text, err := conn.ReadMessage()
		at := time.Now()
		if err != nil {
			if ctx.Err() == nil {
				now.Closed = at
			}
			if closed, ok := errors.AsType[*websocket.CloseError](err); ok {
				now.Code = closed.Code
			}
			break
		}
		switch {
		case string(text) == isAlive:
			now.Beats = append(now.Beats, at)
		case kind == websocket.TextMessage:
			now.Frames = append(now.Frames, s.open(at, text))
			s.mu.Lock()
			s.heard = at
			s.mu.Unlock()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now.Slow = s.slow
	s.conn = nil
	s.sessions = append(s.sessions, now)
	return true
}

// open reads a frame by the screen's own means.
func (s *screen) open(at time.Time, text []byte) Frame {
	f := Frame{At: at}
	var t triple
	if json.Unmarshal(text, &t) != nil || t.IV == "" {
		f.PayloadHash = vendorcrypto.PayloadHash(text)
		return f
	}
	f.IV, f.Fingerprint = t.IV, t.Fingerprint
	key, ok := s.known(t.Fingerprint)
	if !ok {
		return f
	}
	c, err := s.ciphers.Cipher(s.profile, vendorcrypto.Key{Fingerprint: key.Fingerprint, Passphrase: vendorcrypto.Secret(key.Value)})
	if err != nil {
		return f
	}
	if plain, err := c.Open(t.IV, t.Message); err == nil && json.Valid(plain) {
		f.PayloadHash = vendorcrypto.PayloadHash(plain)
	}
	return f
}

// receiveBuffer and segment, in bytes, are small, so that one that does not read is felt
// within a run: loopback's own segments of 64 KiB make buffers that hold all of it. With
// smaller ones TCP itself takes seconds to get going again.
const (
	receiveBuffer = 40 << 10
	segment       = 1000
)

func (s *screen) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Control: smallSegments}
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetReadBuffer(receiveBuffer)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	return &stallable{conn, s}, nil
}

// stallable is a connection that reads nothing while its screen is stalled.
type stallable struct {
	net.Conn
	s *screen
}

func (c *stallable) Read(b []byte) (int, error) {
	if until := c.s.stalled.Load(); until != nil {
		<-*until
	}
	return c.Conn.Read(b)
}

// cut resets the connection; false: there was none.
func (s *screen) cut() bool {
	s.mu.Lock()
	conn := s.conn
	s.mu.Unlock()
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return false
	}
	_ = tcp.SetLinger(0)
	return tcp.Close() == nil
}

// stall lets the screen read nothing for a while. It does not wait; what it returns is
// closed when that is over.
func (s *screen) stall(long time.Duration) (over <-chan struct{}) {
	until := make(chan struct{})
	s.mu.Lock()
	s.slow = true
	s.mu.Unlock()
	if !s.stalled.CompareAndSwap(nil, &until) {
		close(until) // another one is under way
		return until
	}
	time.AfterFunc(long, func() {
		s.stalled.Store(nil)
		close(until)
	})
	return until
}

// startScreens starts the plan's screens. They end with the function returned, which
// waits for them and keeps their sessions.
func (r *run) startScreens(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, p := range r.plan.screens {
		e := r.stack.Endpoints[p.site]
		s := &screen{screenPlan: p, url: e.Screen, token: e.ScreenToken, keys: r.stack.Keys, known: r.key,
			profile: vendorcrypto.Profile{Cipher: e.Profile, Iterations: e.Iterations}, log: r.log}
		r.screens = append(r.screens, s)
		wg.Go(func() { s.run(ctx) })
	}
	return sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		codes := map[string]int{}
		for _, s := range r.screens {
			r.found.Screens = append(r.found.Screens, s.sessions...)
			for _, session := range s.sessions {
				switch {
				case session.Closed.IsZero():
					codes["open"]++
				default:
					codes[fmt.Sprint(session.Code)]++
				}
			}
		}
		if len(r.screens) > 0 {
			r.log.add("screens' sessions by how they ended: %v", codes)
		}
	})
}

const (
	quietFor  = 300 * time.Millisecond
	quietSlow = time.Second // TCP pauses before it goes on with one that had stopped reading
	quietMost = 4 * time.Second
)

// awaitScreens waits until no screen has got anything for a while: one that was slow may
// have much to catch up with.
func (r *run) awaitScreens(ctx context.Context) {
	for end := time.Now().Add(quietMost); time.Now().Before(end); {
		quiet := true
		for _, s := range r.screens {
			s.mu.Lock()
			long := quietFor
			if s.slow {
				long = quietSlow
			}
			quiet = quiet && time.Since(s.heard) > long
			s.mu.Unlock()
		}
		if quiet || !sleep(ctx, quietFor/10) {
			return
		}
	}
}

// key is one that the Portal gave out at some time.
func (r *run) key(fingerprint string) (portal.Key, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k, ok := r.keys[fingerprint]
	return k, ok
}
