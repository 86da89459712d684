package wsgate

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

func TestNewRefusesWhatCannotWork(t *testing.T) {
	noFeed := func(func(*broker.Delivery), func(string)) (Feed, error) {
		return nil, errors.New("the hub has no stream POS")
	}
	for _, tc := range []struct {
		name   string
		change func(*Config)
		open   OpenFeed
		want   string
	}{
		{"mistakes in the configuration", func(c *Config) { c.Listen = nil; c.Drain = -1 }, noFeed, "listen: required"},
		{"no feed", func(*Config) {}, nil, "are required"},
		{"a feed that does not open", func(*Config) {}, noFeed, "the hub has no stream POS"},
		{"a certificate that is not there", func(c *Config) { c.Listen[0].TLS = TLSConfig{"no.pem", "no.key"} }, noFeed, "listen[0].tls: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig()
			tc.change(&cfg)
			if _, err := New(cfg, newFakeKeys(t), tc.open); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestListenOpensAllOrNone(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cfg := testConfig()
	cfg.Listen = []ListenConfig{{Addr: "127.0.0.1:0"}, {Addr: taken.Addr().String()}}
	s := newStage(t, cfg)
	if err := s.Listen(); err == nil || !strings.Contains(err.Error(), "listen[1]: ") {
		t.Errorf("Listen: %v, want it to name listen[1]", err)
	}
	if s.Addrs() != nil {
		t.Errorf("addresses %v though Listen failed", s.Addrs())
	}
	if err := s.Run(t.Context()); err == nil {
		t.Error("Run went on without its addresses")
	}
}

func TestEachListenerServesItsSite(t *testing.T) {
	cfg := testConfig()
	cfg.Listen = []ListenConfig{{Addr: "127.0.0.1:0"}, {Addr: "127.0.0.1:0", Site: "two"}}
	s := newStage(t, cfg)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	addrs := s.Addrs()
	s.run()
	for i, tc := range []struct {
		token string
		ok    bool
	}{{tokenOne, true}, {tokenOne, false}} {
		conn, _, err := websocket.DefaultDialer.Dial("ws://"+addrs[i].String(), headers(tc.token))
		if (err == nil) != tc.ok {
			t.Errorf("listener %d: %v, want admitted %v", i, err, tc.ok)
		}
		if err == nil {
			conn.Close()
		}
	}
	s.finish()
}

func TestTLS(t *testing.T) {
	cfg := testConfig()
	pool, files := certificate(t)
	cfg.Listen[0].TLS = files
	s := newStage(t, cfg)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	s.run()
	// A client that would rather speak HTTP/2 must not get it: it cannot be upgraded.
	dialer := websocket.Dialer{TLSClientConfig: &tls.Config{RootCAs: pool, NextProtos: []string{"http/1.1"}}}
	conn, _, err := dialer.Dial("wss://"+s.Addrs()[0].String(), headers(tokenOne))
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	both, err := tls.Dial("tcp", s.Addrs()[0].String(), &tls.Config{RootCAs: pool, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := both.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("negotiated %q", got)
	}
	both.Close()
	old, err := tls.Dial("tcp", s.Addrs()[0].String(), &tls.Config{RootCAs: pool, MaxVersion: tls.VersionTLS11})
	if err == nil {
		old.Close()
		t.Error("TLS 1.1 is spoken")
	}
	s.finish()
}

func certificate(t *testing.T) (*x509.CertPool, TLSConfig) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	files := TLSConfig{filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")}
	for name, block := range map[string]*pem.Block{files.CertFile: {Type: "CERTIFICATE", Bytes: der}, files.KeyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return pool, files
}

// Screens come and go while events are fed: whoever is there sees each event from its
// handshake on, once and in order. The queue is too long to fill.
func TestScreensComeAndGoUnderLoad(t *testing.T) {
	const visits, workers = 20, 8
	cfg := testConfig()
	cfg.QueueFrames, cfg.QueueBytes = 1<<30, 1<<30
	s := newStage(t, cfg)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	s.run()
	url := "ws://" + s.Addrs()[0].String()
	site := s.keys.Site("clear")

	ctx, stop := context.WithCancel(t.Context())
	var feeder, screens sync.WaitGroup
	var fed atomic.Int64
	feeder.Go(func() {
		for n := uint64(1); ctx.Err() == nil; n++ {
			s.feed.event(event(t, site, n, fmt.Sprint(n)))
			fed.Store(int64(n))
			runtime.Gosched()
		}
	})
	var seen atomic.Int64
	for w := range workers {
		screens.Go(func() {
			for v := range visits {
				dialer := websocket.Dialer{EnableCompression: w%2 == 0}
				conn, _, err := dialer.Dial(url, bearer(tokenClear))
				if err != nil {
					t.Errorf("visit: %v", err)
					return
				}
				from := fed.Load()
				last := int64(0)
				for range 10 + v%7 {
					_, text, err := conn.ReadMessage()
					if err != nil {
						t.Errorf("read: %v", err)
						break
					}
					if string(text) == heartbeat {
						continue
					}
					var n int64
					if _, err := fmt.Sscan(string(text), &n); err != nil {
						t.Errorf("frame %q", text)
					}
					// What begins to be fed after the dialler has its answer is not missed. The
					// one after from may have begun before.
					if last == 0 && n > from+2 || last != 0 && n != last+1 {
						t.Errorf("event %d came after %d (fed when connected: %d)", n, last, from)
					}
					last = n
					seen.Add(1)
				}
				conn.Close()
			}
		})
	}
	screens.Wait()
	stop()
	feeder.Wait()
	s.finish()
	s.wantCount("kb_wsgate_screens", "", 0)
	if seen.Load() < workers*visits*5 {
		t.Errorf("only %d frames were seen in %d visits", seen.Load(), workers*visits)
	}
	total := 0
	for _, reason := range []string{closeHandshake, closeClient, closeGone, closeProtocol, closeMessage, closeSlow, closeWrite, closeStale, closeGap, closeShutdown} {
		total += s.count("kb_wsgate_closes_total", reason)
	}
	if total != workers*visits {
		t.Errorf("%d closes were counted for %d sessions", total, workers*visits)
	}
	if len(s.open) != 0 {
		t.Errorf("%d sessions are left", len(s.open))
	}
	for name, h := range s.halls {
		if len(h.screens) != 0 {
			t.Errorf("%d screens are left in the hall of %s", len(h.screens), name)
		}
	}
}
