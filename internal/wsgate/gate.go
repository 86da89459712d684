// Package wsgate serves Kitchen screens over WebSocket, in the seed's dialect.
//
// A screen's handshake carries the security headers of an HTTP request and meets the
// same rule ([door.Door]). From then on it gets every event of its site that comes, as a
// text frame {"iv","fingerprint","message"}, and the literal text "isAlive?" every
// second for as long as the hub is heard of. When the hub is silent, "isAlive?" stops,
// then the sockets are closed: a screen can tell "no tickets" from "cut off" (I10). While
// the Portal has encryption switched off for the site, the frames are the plain JSON.
//
// What a screen missed while it was away is not sent later in this dialect. Whoever
// falls behind, and everybody after a gap in the feed, is therefore closed, with a code
// that asks to reconnect:
//
//	1003  the screen sent a message; none are taken yet
//	1012  the gateway stops, or events may have been missed
//	1013  the screen's queue was full, or the hub is out of reach
//
// One ordered consumer feeds all screens (I12); the tag of each event is verified before
// it is shown (I7); a slow screen delays no other; an idle one costs one goroutine.
package wsgate

import (
	"cmp"
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

	"github.com/gorilla/websocket"
	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

// heartbeat is the seed's literal text.
const heartbeat = "isAlive?"

var errUnasked = errors.New("nobody told it to")

// Gate is the WebSocket server. Make it with New, then Run it once.
type Gate struct {
	// Fixed at birth.
	cfg              Config // with defaults
	log              *slog.Logger
	keys             Keys
	door             *door.Door
	feed             Feed
	halls            map[string]*hall // one for each configured site
	metrics          *metrics
	alive            *frame
	certificates     []*tls.Certificate // by listener, nil = plain HTTP
	plain, deflating *websocket.Upgrader
	buffers          sync.Pool // of the upgraders

	// Owned by the feed's handler.
	passed  *passed
	shown   []*screen // room for the screens of one site
	sampled rate.Sometimes

	sessions sync.WaitGroup // added to under mu while not closing

	// Guarded by mu.
	mu        sync.Mutex
	listeners []net.Listener
	closing   bool
	open      map[*screen]struct{} // sessions whose goroutines are not all gone
}

// New checks the configuration, reads the listeners' certificates, opens the feed and
// starts nothing: Run runs the feed.
func New(cfg Config, keys Keys, open OpenFeed) (*Gate, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if keys == nil || open == nil {
		return nil, errors.New("wsgate: keys and feed are required")
	}
	cfg = cfg.withDefaults()
	d, err := door.New(cfg.doors(), keys)
	if err != nil {
		return nil, err
	}
	g := &Gate{
		cfg:     cfg,
		log:     cfg.Log,
		keys:    keys,
		door:    d,
		halls:   make(map[string]*hall, len(cfg.Sites)),
		passed:  newPassed(),
		open:    make(map[*screen]struct{}),
		sampled: rate.Sometimes{First: 10, Interval: time.Second},
	}
	for name, s := range cfg.Sites {
		g.halls[name] = &hall{site: name, origins: s.Origins}
	}
	if g.certificates, err = readCertificates(cfg.Listen); err != nil {
		return nil, err
	}
	if g.alive, err = newFrame([]byte(heartbeat)); err != nil {
		return nil, fmt.Errorf("heartbeat: %w", err)
	}
	g.plain, g.deflating = g.upgrader(false), g.upgrader(true)
	if g.metrics, err = newMetrics(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	if g.feed, err = open(g.show, g.gap); err != nil {
		return nil, fmt.Errorf("screens' feed: %w", err)
	}
	return g, nil
}

func readCertificates(listen []ListenConfig) ([]*tls.Certificate, error) {
	certificates := make([]*tls.Certificate, len(listen))
	var errs []error
	for i, l := range listen {
		if l.TLS.CertFile == "" {
			continue
		}
		c, err := tls.LoadX509KeyPair(l.TLS.CertFile, l.TLS.KeyFile)
		if err != nil {
			errs = append(errs, fmt.Errorf("listen[%d].tls: %w", i, err))
			continue
		}
		certificates[i] = &c
	}
	return certificates, errors.Join(errs...)
}

// Listen opens the addresses, all or none, so that a program can say that they are taken
// before it goes on, and Addrs tells the ports. Run does it when it was not done. What
// is opened is closed by Run.
func (g *Gate) Listen() error {
	g.mu.Lock()
	open := g.listeners != nil
	g.mu.Unlock()
	if open {
		return nil
	}
	var listeners []net.Listener
	var errs []error
	for i, l := range g.cfg.Listen {
		listener, err := net.Listen("tcp", l.Addr)
		if err != nil {
			errs = append(errs, fmt.Errorf("listen[%d]: %w", i, err))
			continue
		}
		listeners = append(listeners, listener)
	}
	if err := errors.Join(errs...); err != nil {
		for _, l := range listeners {
			l.Close()
		}
		return err
	}
	g.mu.Lock()
	g.listeners = listeners
	g.mu.Unlock()
	return nil
}

// Addrs returns the addresses listened on, in the order of Config.Listen; nil before Listen.
func (g *Gate) Addrs() []net.Addr {
	g.mu.Lock()
	defer g.mu.Unlock()
	var addrs []net.Addr
	for _, l := range g.listeners {
		addrs = append(addrs, l.Addr())
	}
	return addrs
}

// Ready returns nil while screens are served, else what is wrong.
func (g *Gate) Ready() error {
	if contact := g.feed.LastContact(); contact.IsZero() {
		return errors.New("screens: the hub has not been heard of yet")
	} else if silent := time.Since(contact); silent > g.cfg.Stale {
		return fmt.Errorf("screens: the hub has been silent for %v", silent.Round(100*time.Millisecond))
	}
	return nil
}

// fresh tells whether the hub was heard of a moment ago.
func (g *Gate) fresh() bool {
	contact := g.feed.LastContact()
	return !contact.IsZero() && time.Since(contact) <= g.cfg.Stale
}

// Run serves screens until ctx ends, then closes them, waits for them no longer than
// Drain, and returns nil. It returns an error when a listener or the feed fails.
func (g *Gate) Run(ctx context.Context) error {
	if err := g.Listen(); err != nil {
		return err
	}
	inner, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var wg sync.WaitGroup
	defer wg.Wait()

	servers := g.serve(&wg, stop)
	wg.Go(func() { g.beat(inner) })
	wg.Go(func() {
		err := g.feed.Run(inner)
		if inner.Err() == nil {
			stop(fmt.Errorf("screens: the feed ended: %w", cmp.Or(err, errUnasked)))
		}
	})
	<-inner.Done()
	g.shutdown(servers)
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// serve starts a server on each listener.
func (g *Gate) serve(wg *sync.WaitGroup, stop context.CancelCauseFunc) []*http.Server {
	g.mu.Lock()
	listeners := g.listeners
	g.mu.Unlock()
	servers := make([]*http.Server, len(listeners))
	for i, l := range listeners {
		cfg := g.cfg.Listen[i]
		// A screen's connection is taken over once it is upgraded; these limits are for
		// what comes before.
		s := &http.Server{
			Handler:           g.handler(cfg),
			ReadHeaderTimeout: g.cfg.HandshakeTimeout,
			ReadTimeout:       g.cfg.HandshakeTimeout,
			WriteTimeout:      2 * g.cfg.HandshakeTimeout,
			IdleTimeout:       g.cfg.HandshakeTimeout,
			MaxHeaderBytes:    maxHeaderBytes,
			ErrorLog:          slog.NewLogLogger(g.log.Handler(), slog.LevelDebug),
			Protocols:         new(http.Protocols),
		}
		s.Protocols.SetHTTP1(true) // a connection of HTTP/2 cannot be upgraded
		servers[i] = s
		certificate := g.certificates[i]
		if certificate != nil {
			s.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*certificate}}
		} else if !door.Loopback(cfg.Addr) {
			g.log.Warn("screens' tokens cross this listener in clear: configure tls", "endpoint", cfg.Addr)
		}
		wg.Go(func() {
			var err error
			if certificate != nil {
				err = s.ServeTLS(l, "", "")
			} else {
				err = s.Serve(l)
			}
			if !errors.Is(err, http.ErrServerClosed) {
				stop(fmt.Errorf("screens: listen[%d] (%s): %w", i, cfg.Addr, err))
			}
		})
		g.log.Info("screens may connect", "endpoint", l.Addr().String(), "site", cfg.Site)
	}
	return servers
}

// beat is the one ticker of all screens.
func (g *Gate) beat(ctx context.Context) {
	ticker := time.NewTicker(g.cfg.Heartbeat)
	defer ticker.Stop()
	var screens []*screen
	wasFresh := true
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		fresh := g.fresh()
		if fresh != wasFresh {
			wasFresh = fresh
			if fresh {
				g.log.Info("the hub is heard of again: screens are served")
			} else {
				g.log.Warn("the hub is silent: screens get no heartbeat, new ones are turned away", "err", g.Ready())
			}
		}
		if !fresh {
			if contact := g.feed.LastContact(); time.Since(contact) >= g.cfg.StaleClose {
				g.endAll(byeStale)
			}
			continue
		}
		for _, h := range g.halls {
			screens = h.appendTo(screens[:0])
			for _, s := range screens {
				s.heartbeat()
			}
		}
		clear(screens)
	}
}

// gap is called by the feed when events may have been missed: in this dialect nobody can
// be told which.
func (g *Gate) gap(reason string) {
	n := g.endAll(byeGap)
	g.log.Warn("events may have been missed: screens were closed", "reason", reason, "screens", n)
}

// endAll ends every session and returns how many there were.
func (g *Gate) endAll(why *farewell) int {
	n := 0
	for _, s := range g.all() {
		if s.end(why) {
			n++
		}
	}
	return n
}

// all returns the open sessions, those that are being closed included.
func (g *Gate) all() []*screen {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Collect(maps.Keys(g.open))
}

// begin starts the session of s, or says why there is no place for it.
func (g *Gate) begin(s *screen) *door.Refusal {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.closing:
		return busy("The gateway is stopping. Try again.", "stopping")
	case len(g.open) >= g.cfg.MaxConnections:
		return busy("There are as many screens as this gateway takes. Try again.", "full")
	}
	// Under the lock, so that whoever ends all sessions finds each in its hall.
	s.hall.enter(s)
	g.open[s] = struct{}{}
	g.sessions.Go(func() {
		s.serve()
		g.mu.Lock()
		delete(g.open, s)
		g.mu.Unlock()
	})
	return nil
}

// shutdown turns newcomers away, closes all screens and waits for them, at most Drain.
// What is left then is cut and reported.
func (g *Gate) shutdown(servers []*http.Server) {
	g.mu.Lock()
	g.closing = true
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), g.cfg.Drain)
	defer cancel()

	var wg sync.WaitGroup
	defer wg.Wait()
	for _, s := range servers {
		wg.Go(func() {
			if s.Shutdown(ctx) != nil {
				s.Close()
			}
		})
	}
	closed := g.endAll(byeShutdown)
	gone := make(chan struct{})
	wg.Go(func() {
		g.sessions.Wait()
		close(gone)
	})
	select {
	case <-gone:
		g.log.Info("screens closed", "screens", closed)
	case <-ctx.Done():
		screens, frames := 0, 0
		for _, s := range g.all() {
			screens++
			frames += s.cut()
		}
		g.log.Warn("screens were cut: they did not close in time", "screens", screens, "frames", frames, "closed", closed-screens)
	}
}
