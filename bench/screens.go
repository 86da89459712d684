package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// audience are screens connected to one side, reading all they get. It speaks as much
// WebSocket as a screen needs that only listens.
type audience struct {
	fleet *fleet
	run   [4]byte // begins the IVs of this audience's events

	wg      sync.WaitGroup
	screens []*viewer
	now     atomic.Pointer[broadcast]

	frames, beats atomic.Int64
	failed        atomic.Pointer[error] // the first failure of a screen
	closing       atomic.Bool
}

// broadcast are the events of one turn: when each was published, since begun.
type broadcast struct {
	begun time.Time
	first int64 // index of the first
	sent  []atomic.Int64
}

// viewer is one screen.
type viewer struct {
	site int
	conn net.Conn

	// Owned by the reading goroutine while events are on their way.
	waits []time.Duration
	last  int64  // index of the last event
	text  []byte // of the last frame
}

func newAudience(f *fleet) *audience {
	a := &audience{fleet: f}
	rand.Read(a.run[:])
	return a
}

// join connects n screens to the sites in turn, from several loopback addresses when
// there are more than one could have ports for.
func (a *audience) join(ctx context.Context, address string, tokens []string, n int) error {
	const dialers, perSource = 32, 5000
	errs := make([]error, dialers)
	first := len(a.screens)
	a.screens = append(a.screens, make([]*viewer, n)...)
	var wg sync.WaitGroup
	for d := range dialers {
		wg.Go(func() {
			for i := first + d; i < first+n; i += dialers {
				site := i % len(a.fleet.sites)
				var source net.Addr
				if n > perSource {
					source = &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i/perSource))}
				}
				conn, in, err := upgrade(ctx, address, source, a.fleet, site, tokens[site])
				if err != nil {
					errs[d] = fmt.Errorf("screen %d of %d: %w", i, n, err)
					return
				}
				v := &viewer{site: site, conn: conn, last: -1}
				a.screens[i] = v
				a.wg.Go(func() { a.watch(v, in) })
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// upgrade makes one handshake as the seed's clients do.
func upgrade(ctx context.Context, address string, source net.Addr, f *fleet, site int, token string) (conn net.Conn, in *bufio.Reader, err error) {
	d := net.Dialer{LocalAddr: source}
	conn, err = d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	opened := conn
	defer func() {
		if err != nil {
			opened.Close()
		}
	}()
	iv, err := f.keys[site].NewIV(nil)
	if err != nil {
		return nil, nil, err
	}
	_, err = fmt.Fprintf(conn, "GET /sites/%s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: %s\r\nAuthorization: Bearer %s\r\nSec-Iv: %s\r\nSec-Fingerprint: %s\r\n\r\n",
		f.sites[site], address, base64.StdEncoding.EncodeToString(make([]byte, 16)), token, base64.StdEncoding.EncodeToString(iv), f.keys[site].Fingerprint())
	if err != nil {
		return nil, nil, err
	}
	in = bufio.NewReaderSize(conn, 512)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		return nil, nil, fmt.Errorf("handshake: %s: %s", resp.Status, body)
	}
	return conn, in, nil
}

var alive = []byte("isAlive?")

// watch reads frames until the connection ends.
func (a *audience) watch(v *viewer, in *bufio.Reader) {
	var room []byte
	err := func() error {
		for {
			text, err := readFrame(in, room)
			if err != nil {
				return err
			}
			room = text
			if bytes.Equal(text, alive) {
				a.beats.Add(1)
				continue
			}
			// A heartbeat that comes now must not be written over the event.
			v.text, room = text, v.text
			if err := a.note(v, text); err != nil {
				return err
			}
		}
	}()
	if !a.closing.Load() {
		err = fmt.Errorf("a screen of %s: %w", a.fleet.sites[v.site], err)
		a.failed.CompareAndSwap(nil, &err)
	}
}

// note takes the time of an event's frame. Events of a site come in order, each once.
func (a *audience) note(v *viewer, text []byte) error {
	rest, ok := bytes.CutPrefix(text, []byte(`{"iv":"`))
	var iv [12]byte
	if !ok || len(rest) < 16 {
		return fmt.Errorf("not an event: %.60q", text)
	}
	if n, err := base64.StdEncoding.Decode(iv[:], rest[:16]); err != nil || n != 12 || [4]byte(iv[:4]) != a.run {
		return fmt.Errorf("an event that nobody published: %.60q", text)
	}
	i := int64(binary.BigEndian.Uint64(iv[4:]))
	b := a.now.Load()
	if i <= v.last || i < b.first || i-b.first >= int64(len(b.sent)) {
		return fmt.Errorf("event %d after %d; the turn's begin at %d", i, v.last, b.first)
	}
	v.last = i
	v.waits = append(v.waits, time.Since(b.begun)-time.Duration(b.sent[i-b.first].Load()))
	a.frames.Add(1)
	return nil
}

// readFrame reads a text frame as a server sends it, whole and not masked, into room.
func readFrame(in *bufio.Reader, room []byte) ([]byte, error) {
	var head [2]byte
	if _, err := io.ReadFull(in, head[:]); err != nil {
		return nil, err
	}
	if head[0] != 0x81 {
		rest, _ := io.ReadAll(io.LimitReader(in, int64(head[1]&0x7f)))
		return nil, fmt.Errorf("not a whole text frame: %#x %q", head[0], rest)
	}
	n := int(head[1])
	switch {
	case n == 126:
		var length [2]byte
		if _, err := io.ReadFull(in, length[:]); err != nil {
			return nil, err
		}
		n = int(binary.BigEndian.Uint16(length[:]))
	case n > 126:
		return nil, fmt.Errorf("a frame of length code %d: masked, or longer than any here", n)
	}
	room = slices.Grow(room[:0], n)[:n]
	_, err := io.ReadFull(in, room)
	return room, err
}

// events makes the n events of a turn, for the sites in turn, numbered from first.
func (a *audience) events(n int, first int) ([]planned, error) {
	events := make([]planned, n)
	for i := range events {
		site := (first + i) % len(a.fleet.sites)
		seq := uint64((first+i)/len(a.fleet.sites)) + 1
		iv := binary.BigEndian.AppendUint64(slices.Clone(a.run[:]), uint64(first+i))
		sealed, err := a.fleet.keys[site].SealRaw(nil, iv, orderOf(a.fleet.sites[site], seq, eventBytes))
		if err != nil {
			return nil, err
		}
		events[i] = planned{a.fleet.tagged(site, seq, envelope.Triple{
			IV:          []byte(base64.StdEncoding.EncodeToString(iv)),
			Fingerprint: []byte(a.fleet.keys[site].Fingerprint()),
			Message:     []byte(base64.StdEncoding.EncodeToString(sealed)),
		}), site}
	}
	return events, nil
}

// check opens what the first and the last screen got last.
func (a *audience) check() error {
	for _, v := range []*viewer{a.screens[0], a.screens[len(a.screens)-1]} {
		t, err := envelope.ParseTriple(v.text, 0)
		if err != nil {
			return err
		}
		plain, err := a.fleet.keys[v.site].Open(nil, t)
		if err != nil {
			return err
		}
		seq := uint64(v.last)/uint64(len(a.fleet.sites)) + 1
		if err := same(plain, orderOf(a.fleet.sites[v.site], seq, eventBytes)); err != nil {
			return err
		}
	}
	return nil
}

func (a *audience) failure() error {
	if err := a.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// leave cuts all connections: closed in the orderly way each would keep its port for a
// minute, and the next turns would find none free.
func (a *audience) leave() error {
	a.closing.Store(true)
	for _, v := range a.screens {
		if v == nil {
			continue // the handshake did not get so far
		}
		if tcp, ok := v.conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		v.conn.Close()
	}
	a.wg.Wait()
	return a.failure()
}
