package wan

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// rig is a link to a server that hands over each connection.
type rig struct {
	t     *testing.T
	link  *Link
	conns chan *net.TCPConn
}

func newRig(t *testing.T, cfg Config) *rig {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, conns: make(chan *net.TCPConn, 64)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(r.conns)
				return
			}
			r.conns <- c.(*net.TCPConn)
		}
	})
	cfg.Target = l.Addr().String()
	if r.link, err = Start(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.link.Close()
		l.Close()
		wg.Wait()
		for c := range r.conns {
			c.Close()
		}
	})
	return r
}

// connect returns both ends of a new connection through the link.
func (r *rig) connect() (client, server *net.TCPConn) {
	r.t.Helper()
	c, err := net.Dial("tcp", r.link.Addr())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	select {
	case s := <-r.conns:
		r.t.Cleanup(func() { s.Close() })
		return c.(*net.TCPConn), s
	case <-time.After(5 * time.Second):
		r.t.Fatal("the server got no connection")
	}
	return nil, nil
}

func (r *rig) set(w Weather) {
	r.t.Helper()
	if err := r.link.Set(w); err != nil {
		r.t.Fatal(err)
	}
}

func send(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, c net.Conn, want string) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got[:n], err, want)
	}
}

// silent fails the test when anything comes within a while, an end included.
func silent(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(80 * time.Millisecond))
	var b [16]byte
	if n, err := c.Read(b[:]); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("got %q, %v from a way that is blocked", b[:n], err)
	}
}

// ended waits for the end of a connection.
func ended(t *testing.T, c net.Conn, want error) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	var b [16]byte
	if n, err := c.Read(b[:]); !errors.Is(err, want) {
		t.Fatalf("got %q, %v; want %v", b[:n], err, want)
	}
}

func TestFineWeatherPassesEverythingBothWays(t *testing.T) {
	r := newRig(t, Config{})
	client, server := r.connect()
	big := bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // more than all queues hold
	var wg sync.WaitGroup
	for _, ends := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		wg.Go(func() {
			if _, err := ends[0].Write(big); err != nil {
				t.Error(err)
			}
			_ = ends[0].CloseWrite()
		})
		wg.Go(func() {
			got, err := io.ReadAll(ends[1])
			if err != nil || !bytes.Equal(got, big) {
				t.Errorf("%d bytes of %d arrived as they were sent, %v", len(got), len(big), err)
			}
		})
	}
	wg.Wait()
	if s := r.link.Stats(); s.Up != uint64(len(big)) || s.Down != uint64(len(big)) || s.Conns != 1 {
		t.Errorf("counted %+v", s)
	}
}

func TestACutReachesBothSidesAsItsKindSays(t *testing.T) {
	for name, c := range map[string]struct {
		how  End
		want error
	}{"reset": {Reset, syscall.ECONNRESET}, "finish": {Finish, io.EOF}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, Config{})
			client, server := r.connect()
			if n := r.link.Cut(c.how); n != 1 {
				t.Errorf("%d connections were cut, want 1", n)
			}
			ended(t, client, c.want)
			ended(t, server, c.want)
			r.connect() // the link itself is whole
		})
	}
}

func TestABlockedWayPassesNothingAndTellsNobody(t *testing.T) {
	for _, c := range []struct {
		name           string
		weather        Weather
		upOpen, dnOpen bool
	}{
		{"up", Weather{Up: Way{Blocked: true}}, false, true},
		{"down", Weather{Down: Way{Blocked: true}}, true, false},
		{"both", Weather{Up: Way{Blocked: true}, Down: Way{Blocked: true}}, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, Config{})
			client, server := r.connect()
			r.set(c.weather)
			send(t, client, "up")
			send(t, server, "down")
			for _, way := range []struct {
				open bool
				to   *net.TCPConn
				text string
			}{{c.upOpen, server, "up"}, {c.dnOpen, client, "down"}} {
				if way.open {
					receive(t, way.to, way.text)
				} else {
					silent(t, way.to)
				}
			}
			r.set(Weather{})
			if !c.upOpen {
				receive(t, server, "up")
			}
			if !c.dnOpen {
				receive(t, client, "down")
			}
		})
	}
	t.Run("not that the other side is gone", func(t *testing.T) {
		r := newRig(t, Config{})
		client, server := r.connect()
		r.set(Weather{Up: Way{Blocked: true}})
		send(t, client, "last words")
		client.Close()
		silent(t, server)
		r.set(Weather{})
		receive(t, server, "last words")
		ended(t, server, io.EOF)
	})
	t.Run("a new connection is accepted and dead", func(t *testing.T) {
		r := newRig(t, Config{})
		r.set(Weather{Up: Way{Blocked: true}, Down: Way{Blocked: true}})
		client, server := r.connect()
		send(t, server, "hello")
		silent(t, client)
	})
}

func TestHeldConnectionsArriveAfterNewerOnes(t *testing.T) {
	r := newRig(t, Config{})
	_, old := r.connect()
	oldClient, oldServer := r.connect()
	if n := r.link.Hold(); n != 2 {
		t.Fatalf("%d connections are held, want 2", n)
	}
	send(t, oldClient, "old")
	client, server := r.connect()
	send(t, client, "new")
	receive(t, server, "new")
	silent(t, oldServer)
	if n := r.link.Release(); n != 2 {
		t.Fatalf("%d connections were released, want 2", n)
	}
	receive(t, oldServer, "old")
	silent(t, old)
}

func TestDelayDelaysEveryByteAndSwapsNone(t *testing.T) {
	r := newRig(t, Config{Seed: 7})
	client, server := r.connect()
	r.set(Weather{Up: Way{Delay: 60 * time.Millisecond, Jitter: 40 * time.Millisecond}})
	began := time.Now()
	for _, text := range []string{"one ", "two ", "three ", "four"} {
		send(t, client, text)
	}
	receive(t, server, "one two three four")
	if took := time.Since(began); took < 60*time.Millisecond {
		t.Errorf("arrived after %v, want at least 60ms", took)
	}
	began = time.Now()
	send(t, server, "back")
	receive(t, client, "back")
	if took := time.Since(began); took > 55*time.Millisecond {
		t.Errorf("the other way took %v", took)
	}
}

func TestANarrowLinkTakesItsTime(t *testing.T) {
	r := newRig(t, Config{})
	client, server := r.connect()
	r.set(Weather{Up: Way{Rate: 100_000}})
	began := time.Now()
	send(t, client, string(make([]byte, 20_000)))
	receive(t, server, string(make([]byte, 20_000)))
	if took := time.Since(began); took < 195*time.Millisecond {
		t.Errorf("20 kB at 100 kB/s took %v", took)
	}
}

func TestANarrowLinkHoldsItsSenderBack(t *testing.T) {
	r := newRig(t, Config{})
	client, _ := r.connect()
	r.set(Weather{Up: Way{Blocked: true}})
	_ = client.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	sent := 0
	for sent < 64<<20 {
		n, err := client.Write(make([]byte, 64<<10))
		sent += n
		if err != nil {
			break
		}
	}
	if sent >= 64<<20 {
		t.Error("64 MiB went into a link that passes nothing")
	}
}

func TestRefusingRefusesNewConnectionsOnly(t *testing.T) {
	r := newRig(t, Config{})
	client, server := r.connect()
	r.set(Weather{Refuse: true})
	if c, err := net.Dial("tcp", r.link.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		if err == nil {
			c.Close()
		}
		t.Errorf("a new connection got %v, want connection refused", err)
	}
	send(t, client, "still")
	receive(t, server, "still")
	r.set(Weather{})
	r.connect()
}

func TestFlappingCutsEachTimeAndEndsWhole(t *testing.T) {
	r := newRig(t, Config{})
	client, _ := r.connect()
	cut, err := r.link.Flap(t.Context(), 3, 5*time.Millisecond, 5*time.Millisecond)
	if err != nil || cut != 1 {
		t.Errorf("cut %d, %v; want 1", cut, err)
	}
	ended(t, client, syscall.ECONNRESET)
	r.connect()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.link.Flap(ctx, 3, time.Hour, time.Hour); err != nil {
		t.Error(err)
	}
	r.connect() // told to stop in the middle, it is whole too
}

func TestAServerThatIsAwayResets(t *testing.T) {
	l, err := Start(Config{Target: "127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ended(t, c, syscall.ECONNRESET)
	if s := l.Stats(); s.Failed != 1 {
		t.Errorf("counted %+v, want one that failed", s)
	}
}

func TestTooManyConnectionsAreResetAndCounted(t *testing.T) {
	r := newRig(t, Config{MaxConns: 1})
	r.connect()
	c, err := net.Dial("tcp", r.link.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ended(t, c, syscall.ECONNRESET)
	if s := r.link.Stats(); s.Crowded != 1 || r.link.Open() != 1 {
		t.Errorf("counted %+v with %d open", s, r.link.Open())
	}
}

func TestBadSettingsAreRefused(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no target": {}, "a target without port": {Target: "127.0.0.1"}, "fewer than no connections": {Target: "127.0.0.1:1", MaxConns: -1},
		"an address of somebody else": {Target: "127.0.0.1:1", Listen: "192.0.2.1:1"},
	} {
		t.Run(name, func(t *testing.T) {
			if l, err := Start(cfg); err == nil {
				l.Close()
				t.Error("taken")
			}
		})
	}
}
