package main

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// link is the way to a hub that can be cut and opened: a relay that copies bytes. While it
// is cut, a connection is closed as soon as it is there.
type link struct {
	address string // host:port, for whoever is to be cut off

	// Fixed at birth.
	listener net.Listener
	running  sync.WaitGroup

	mu    sync.Mutex
	hub   string                // Guarded by mu: host:port
	isUp  bool                  // Guarded by mu
	conns map[net.Conn]struct{} // Guarded by mu: both ends of what is relayed
	first chan time.Time        // Guarded by mu: gets the time of the first connection after open
}

// newLink starts a link, cut and to nowhere.
func (c *crew) newLink() (*link, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &link{address: listener.Addr().String(), listener: listener, conns: make(map[net.Conn]struct{})}
	l.running.Go(l.run)
	c.later(l.close)
	return l, nil
}

func (l *link) run() {
	for {
		near, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.running.Go(func() { l.relay(near) })
	}
}

// relay copies until either end is closed. The kernel does it: neither end is looked into.
func (l *link) relay(near net.Conn) {
	defer near.Close()
	at := time.Now()
	if !l.enter(near) {
		return
	}
	defer l.leave(near)
	l.mu.Lock()
	hub := l.hub
	l.mu.Unlock()
	far, err := net.Dial("tcp", hub)
	if err != nil {
		return
	}
	defer far.Close()
	if !l.enter(far) {
		return
	}
	defer l.leave(far)
	l.mu.Lock()
	if l.first != nil {
		l.first <- at
		l.first = nil
	}
	l.mu.Unlock()
	var back sync.WaitGroup
	back.Go(func() {
		_, _ = io.Copy(near, far)
		near.Close()
	})
	_, _ = io.Copy(far, near)
	far.Close()
	back.Wait()
}

func (l *link) enter(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isUp {
		l.conns[conn] = struct{}{}
	}
	return l.isUp
}

func (l *link) leave(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, conn)
}

// to says where it leads from now on.
func (l *link) to(hub string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hub = hub
}

// open lets connections through. The channel gets the time when the first of them came.
func (l *link) open() <-chan time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := make(chan time.Time, 1)
	l.isUp, l.first = true, first
	return first
}

// cut ends what is connected, and lets nothing through.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.isUp, l.first = false, nil
	for conn := range l.conns {
		conn.Close()
	}
}

func (l *link) close() error {
	err := l.listener.Close()
	l.cut()
	l.running.Wait()
	return err
}

// connected waits for the first connection after open.
func connected(ctx context.Context, first <-chan time.Time) (time.Time, error) {
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	select {
	case at := <-first:
		return at, nil
	case <-limit.C:
		return time.Time{}, errors.New("nobody connected to the hub when it was there again")
	case <-ctx.Done():
		return time.Time{}, context.Cause(ctx)
	}
}
