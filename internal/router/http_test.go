package router

import (
	"bufio"
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// Everything here goes over real connections.

// connectTo makes the endpoint of a real Kitchen.
func connectTo(t *testing.T, cfg KitchenConfig, change ...func(*Config)) *endpoint {
	t.Helper()
	c := Config{AttemptTimeout: 10 * time.Second, Sites: map[string]KitchenConfig{"s1": cfg}}
	for _, f := range change {
		f(&c)
	}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	c = c.withDefaults()
	closing, done := context.WithCancel(context.Background())
	e, err := newEndpoint("s1", cfg, &c, closing)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { done(); e.close() })
	return e
}

// server runs a Kitchen.
func server(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

// secure runs a Kitchen with TLS and returns the settings that trust it.
func secure(t *testing.T, http2 bool, h http.HandlerFunc) (*httptest.Server, KitchenConfig) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = http2
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return s, KitchenConfig{URL: s.URL, CAFile: file}
}

// posted is an event to post; what matters to HTTP is filled in.
func posted() *broker.Delivery {
	return &broker.Delivery{Event: broker.Event{
		Event:       envelope.Event{Site: "s1", Kind: "order", Edge: "e1", Epoch: "ep1", Seq: 7, ID: "id7"},
		Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}}
}

var sealedForm = form{body: []byte("bWVzc2FnZQ==\n"), iv: "aXY=", fingerprint: "k1"}

func (e *endpoint) try(t *testing.T, f form) answer {
	return e.post(t.Context(), posted(), f, 3, time.Now().Add(time.Minute))
}

func TestWhatTheKitchenGets(t *testing.T) {
	credential := filepath.Join(t.TempDir(), "credential")
	if err := os.WriteFile(credential, []byte("Bearer secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	always := map[string]string{
		"Content-Type":    "application/json",
		"Accept":          "application/json",
		"User-Agent":      "kitchenbridge",
		"Idempotency-Key": "id7",
		"Kb-Seq":          "7",
		"Kb-Edge":         "e1.ep1",
		"Kb-Attempt":      "3",
		"Kb-Deadline":     strconv.FormatInt(deadline.UnixMilli(), 10),
		"Traceparent":     "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
	tests := []struct {
		name   string
		base   string
		change func(*KitchenConfig, *broker.Delivery)
		form   form
		path   string
		more   map[string]string
		less   []string
	}{
		{name: "sealed", form: sealedForm, path: "/order", more: map[string]string{"Sec-Iv": "aXY=", "Sec-Fingerprint": "k1", "Content-Length": "13"}},
		{name: "plain", form: form{body: []byte(`{"_id":1}`)}, path: "/order", more: map[string]string{"Content-Length": "9"}},
		{name: "of another kind", form: sealedForm, path: "/alert",
			change: func(_ *KitchenConfig, d *broker.Delivery) { d.Event.Kind = "alert" },
			more:   map[string]string{"Sec-Iv": "aXY=", "Sec-Fingerprint": "k1", "Content-Length": "13"}},
		{name: "below a path", base: "/api/v2/", form: sealedForm, path: "/api/v2/order",
			more: map[string]string{"Sec-Iv": "aXY=", "Sec-Fingerprint": "k1", "Content-Length": "13"}},
		{name: "below an escaped path", base: "/a%2Fb", form: sealedForm, path: "/a%2Fb/order",
			more: map[string]string{"Sec-Iv": "aXY=", "Sec-Fingerprint": "k1", "Content-Length": "13"}},
		{name: "with a credential and headers", form: sealedForm, path: "/order",
			change: func(c *KitchenConfig, _ *broker.Delivery) {
				c.AuthorizationFile, c.Headers = credential, map[string]string{"x-store": "12"}
			},
			more: map[string]string{"Sec-Iv": "aXY=", "Sec-Fingerprint": "k1", "Content-Length": "13", "Authorization": "Bearer secret", "X-Store": "12"}},
		{name: "without a trace", form: sealedForm, path: "/order",
			change: func(_ *KitchenConfig, d *broker.Delivery) { d.Event.Traceparent = "" },
			more:   map[string]string{"Sec-Iv": "aXY=", "Sec-Fingerprint": "k1", "Content-Length": "13"}, less: []string{"Traceparent"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got *http.Request
			var body []byte
			s := server(t, func(w http.ResponseWriter, r *http.Request) {
				got = r
				body, _ = io.ReadAll(r.Body)
			})
			cfg, d := KitchenConfig{URL: s.URL + tt.base}, posted()
			if tt.change != nil {
				tt.change(&cfg, d)
			}
			a := connectTo(t, cfg).post(t.Context(), d, tt.form, 3, deadline)
			if a.status != 200 || a.unanswered() {
				t.Fatalf("answer: %+v", a)
			}
			want := make(http.Header)
			for _, m := range []map[string]string{always, tt.more} {
				for name, value := range m {
					want.Set(name, value)
				}
			}
			for _, name := range tt.less {
				want.Del(name)
			}
			if diff := cmp.Diff(want, got.Header); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
			if got.Method != "POST" || got.URL.EscapedPath() != tt.path || got.URL.RawQuery != "" || got.Host != strings.TrimPrefix(s.URL, "http://") {
				t.Errorf("%s %s on %s", got.Method, got.URL, got.Host)
			}
			if !bytes.Equal(body, tt.form.body) {
				t.Errorf("body %q, want %q", body, tt.form.body)
			}
		})
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			var elsewhere atomic.Int64
			other := server(t, func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) })
			s := server(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL+"/order", status) })
			a := connectTo(t, KitchenConfig{URL: s.URL}).try(t, sealedForm)
			if a.status != status || elsewhere.Load() != 0 {
				t.Errorf("status %d, %d requests elsewhere", a.status, elsewhere.Load())
			}
		})
	}
}

// The connection of an unanswered attempt is closed, and the next one has its own.
func TestUnansweredAttemptClosesItsConnection(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("HTTP/2 %t", http2), func(t *testing.T) {
			var silent atomic.Bool
			cut := make(chan struct{}, 1)
			addresses := make(chan string, 10)
			_, cfg := secure(t, http2, func(w http.ResponseWriter, r *http.Request) {
				if (r.ProtoMajor == 2) != http2 {
					t.Errorf("spoke %s", r.Proto)
				}
				_, _ = io.Copy(io.Discard, r.Body)
				addresses <- r.RemoteAddr
				if silent.Load() {
					<-r.Context().Done()
					cut <- struct{}{}
					panic(http.ErrAbortHandler) // or the answer overtakes the end of the attempt
				}
			})
			e := connectTo(t, cfg)
			for range 2 {
				if a := e.try(t, sealedForm); a.status != 200 {
					t.Fatalf("answer: %+v", a)
				}
			}
			first, second := <-addresses, <-addresses
			if first != second {
				t.Errorf("answered attempts came over %s and %s: the connection is not used again", first, second)
			}
			silent.Store(true)
			e.timeout = 500 * time.Millisecond
			a := e.try(t, sealedForm)
			if !a.unanswered() || a.failure != ReasonTimeout {
				t.Fatalf("answer: %+v", a)
			}
			receive(t, cut)
			third := <-addresses
			silent.Store(false)
			e.timeout = 10 * time.Second
			// The transport may not have noticed yet that the connection is closed; a lane gives
			// it settle for that.
			a = e.try(t, sealedForm)
			for tries := 0; a.failure == ReasonCut && tries < 100; tries++ {
				a = e.try(t, sealedForm)
			}
			if a.status != 200 {
				t.Fatalf("answer: %+v (%v)", a, a.err)
			}
			if fourth := <-addresses; fourth == third {
				t.Error("the next attempt used the connection of the unanswered one")
			}
		})
	}
}

func receive[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came")
	}
	return v
}

// raw runs a Kitchen that speaks HTTP by hand: serve gets each connection.
func raw(t *testing.T, serve func(n int, c net.Conn, r *bufio.Reader)) KitchenConfig {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(n, c, bufio.NewReader(c))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return KitchenConfig{URL: "http://" + l.Addr().String()}
}

// read takes one request whole.
func read(r *bufio.Reader) error {
	req, err := http.ReadRequest(r)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// I4: the transport may not send a request twice by itself, as it does with one that
// carries an Idempotency-Key when a connection that was used before breaks.
func TestTransportNeverRepeats(t *testing.T) {
	var requests atomic.Int64
	cfg := raw(t, func(n int, c net.Conn, r *bufio.Reader) {
		for i := 0; read(r) == nil; i++ {
			requests.Add(1)
			if i == 1 {
				return // it was read, and is not answered
			}
			_, _ = io.WriteString(c, ok)
		}
	})
	e := connectTo(t, cfg)
	if a := e.try(t, sealedForm); a.status != 200 {
		t.Fatalf("answer: %+v", a)
	}
	a := e.try(t, sealedForm)
	if a.failure != ReasonCut || !a.unanswered() {
		t.Errorf("answer: %+v", a)
	}
	if n := requests.Load(); n != 2 {
		t.Errorf("the Kitchen got %d requests from two attempts", n)
	}
}

// Why there is no answer, and whether the Kitchen may have the event all the same.
func TestNoAnswer(t *testing.T) {
	closedPort := func(t *testing.T) KitchenConfig {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		return KitchenConfig{URL: "http://" + l.Addr().String()}
	}
	tests := []struct {
		name    string
		kitchen func(t *testing.T) KitchenConfig
		want    Reason
		sent    bool
	}{
		{"nobody listens", closedPort, ReasonRefusedConn, false},
		{"a certificate that nobody vouches for", func(t *testing.T) KitchenConfig {
			_, cfg := secure(t, false, func(http.ResponseWriter, *http.Request) {})
			cfg.CAFile = ""
			return cfg
		}, ReasonTLS, false},
		{"no TLS where it was expected", func(t *testing.T) KitchenConfig {
			s := server(t, func(http.ResponseWriter, *http.Request) {})
			return KitchenConfig{URL: strings.Replace(s.URL, "http:", "https:", 1)}
		}, ReasonTLS, false},
		{"a handshake that is not answered", func(t *testing.T) KitchenConfig {
			cfg := raw(t, func(_ int, _ net.Conn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) })
			return KitchenConfig{URL: strings.Replace(cfg.URL, "http:", "https:", 1)}
		}, ReasonTimeout, false},
		{"closed after the request", func(t *testing.T) KitchenConfig {
			return raw(t, func(_ int, _ net.Conn, r *bufio.Reader) { _ = read(r) })
		}, ReasonCut, true},
		{"not HTTP", func(t *testing.T) KitchenConfig {
			return raw(t, func(_ int, c net.Conn, r *bufio.Reader) { _ = read(r); _, _ = io.WriteString(c, "220 mail ready\r\n") })
		}, ReasonCut, true},
		{"silent", func(t *testing.T) KitchenConfig {
			return raw(t, func(_ int, _ net.Conn, r *bufio.Reader) { _ = read(r); _, _ = r.ReadByte() })
		}, ReasonTimeout, true},
		{"endless headers", func(t *testing.T) KitchenConfig {
			return raw(t, func(_ int, c net.Conn, r *bufio.Reader) {
				_ = read(r)
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
				for i := 0; ; i++ {
					if _, err := fmt.Fprintf(c, "X-%d: %s\r\n", i, strings.Repeat("x", 1000)); err != nil {
						return
					}
				}
			})
		}, ReasonCut, true},
		{"a 400 whose body is cut off", func(t *testing.T) KitchenConfig {
			return raw(t, func(_ int, c net.Conn, r *bufio.Reader) {
				_ = read(r)
				_, _ = io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 50\r\n\r\n{\"errorCode\"")
			})
		}, ReasonCut, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := connectTo(t, tt.kitchen(t), func(c *Config) {
				if tt.want == ReasonTimeout {
					c.AttemptTimeout = 300 * time.Millisecond
				}
			})
			a := e.try(t, sealedForm)
			if a.status != 0 || a.failure != tt.want || a.sent != tt.sent || a.err == nil {
				t.Errorf("status %d, %s, sent %t (%v); want %s, sent %t", a.status, a.failure, a.sent, a.err, tt.want, tt.sent)
			}
		})
	}
}

func TestAnswersAreBounded(t *testing.T) {
	const most = 16 << 10
	tests := []struct {
		name   string
		answer http.HandlerFunc
		length int
		reused bool
	}{
		{"short", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "{}") }, 2, true},
		{"none", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, 0, true},
		{"as long as is kept", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, most)) }, most, true},
		{"a bit longer", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, most+100<<10)) }, most, true},
		{"much longer", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 8<<20)) }, most, false},
		{"in chunks", func(w http.ResponseWriter, _ *http.Request) {
			for range 10 {
				_, _ = io.WriteString(w, "0123456789")
				_ = http.NewResponseController(w).Flush()
			}
		}, 100, true},
		{"compressed stays as it came", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = io.WriteString(w, "not gzip at all")
		}, 15, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			addresses := make(chan string, 2)
			s := server(t, func(w http.ResponseWriter, r *http.Request) {
				addresses <- r.RemoteAddr
				tt.answer(w, r)
			})
			e := connectTo(t, KitchenConfig{URL: s.URL})
			for range 2 {
				if a := e.try(t, sealedForm); a.status/100 != 2 || len(a.body) != tt.length {
					t.Errorf("status %d, %d bytes, %v; want %d bytes", a.status, len(a.body), a.err, tt.length)
				}
			}
			before, after := <-addresses, <-addresses
			if reused := before == after; reused != tt.reused {
				t.Errorf("connection used again: %t, want %t", reused, tt.reused)
			}
		})
	}
	t.Run("a 200 whose body is cut off is a 200", func(t *testing.T) {
		cfg := raw(t, func(_ int, c net.Conn, r *bufio.Reader) {
			_ = read(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{\"ok\"")
		})
		if a := connectTo(t, cfg).try(t, sealedForm); a.status != 200 || string(a.body) != `{"ok"` {
			t.Errorf("answer: %+v", a)
		}
	})
}

// The whole way over a real connection, and no goroutine left behind.
func TestRunOverHTTP(t *testing.T) {
	keys := testKeys(t, "s1")
	hub := newHubLog()
	got := make(chan string, 3)
	_, cfg := secure(t, true, func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("Idempotency-Key")
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
	})
	r, err := New(Config{Sites: map[string]KitchenConfig{"s1": cfg}, AttemptTimeout: 10 * time.Second, Log: quietLog, Settle: time.Millisecond}, hub.connect(), keys)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	e := newEdge(keys)
	for range 3 {
		hub.store(e.event(t, "s1"))
	}
	for i := range 3 {
		if id := receive(t, got); id != fmt.Sprintf("id-s1-%d", i+1) {
			t.Errorf("request %d has id %s", i, id)
		}
	}
	if err := hub.settled(t.Context()); err != nil {
		t.Error(err)
	}
	if err := r.Ready(); err != nil {
		t.Error(err)
	}
	stop()
	if err := receive(t, done); err != nil {
		t.Error(err)
	}
}

// No secret shows in what is logged of an endpoint's failures.
func TestErrorsShowNoURL(t *testing.T) {
	e := connectTo(t, KitchenConfig{URL: "https://127.0.0.1:1/hunter2/x"})
	if a := e.try(t, sealedForm); a.err == nil || strings.Contains(a.err.Error(), "hunter2") {
		t.Errorf("error: %v", a.err)
	}
}
