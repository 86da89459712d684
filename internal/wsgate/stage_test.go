package wsgate

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gorilla/websocket"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	tokenOne    = "one-6f0d6c2e9b7a4f0c8d55"
	tokenTwo    = "two-1c9e7a3b5d8f4e2a9b60"
	tokenClear  = "clear-4b8d2f6a0c9e7135aa"
	tokenUnread = "unread-a1b2c3d4e5f60718"
	fingerprint = "5d41402abc4b2a76b9719d911017c592"
	goodIV      = "AAAAAAAAAAAAAAAA"
)

func token(name, token string) []door.TokenConfig {
	return []door.TokenConfig{{Name: name, SHA256: door.TokenSHA256(token)}}
}

// testConfig has a site of each sort; screens come in without Origin.
func testConfig() Config {
	return Config{
		Listen: []ListenConfig{{Addr: "127.0.0.1:0"}},
		Sites: map[string]SiteConfig{
			"one":    {SiteConfig: door.SiteConfig{Tokens: token("grill", tokenOne)}},
			"two":    {SiteConfig: door.SiteConfig{Tokens: token("bar", tokenTwo)}, Origins: []string{"https://two.example"}},
			"clear":  {SiteConfig: door.SiteConfig{Tokens: token("expo", tokenClear)}},
			"open":   {SiteConfig: door.SiteConfig{Authorization: "none", AllowInsecure: true}},
			"unread": {SiteConfig: door.SiteConfig{Tokens: token("fry", tokenUnread)}},
		},
	}
}

// fakeKeys stands for keysync.
type fakeKeys struct {
	sites  sync.Map
	reread func()
}

func (k *fakeKeys) Site(name string) *keysync.Site {
	s, _ := k.sites.Load(name)
	site, _ := s.(*keysync.Site)
	return site
}

func (k *fakeKeys) RefreshFor(context.Context, string, string) error { return keysync.ErrStillUnknown }

func (k *fakeKeys) RereadBinding() {
	if k.reread != nil {
		k.reread()
	}
}

func (k *fakeKeys) set(s *keysync.Site) { k.sites.Store(s.Name, s) }

func newFakeKeys(t testing.TB) *fakeKeys {
	k := &fakeKeys{}
	k.set(newSite(t, "one", true))
	k.set(newSite(t, "two", true))
	k.set(newSite(t, "open", true))
	k.set(newSite(t, "clear", false))
	unread := newSite(t, "unread", true)
	unread.Fetched = time.Time{}
	k.set(unread)
	return k
}

var gcm = envelope.Settings{Profile: envelope.A256GCM, Iterations: 1}

func newSite(t testing.TB, name string, encryption bool) *keysync.Site {
	t.Helper()
	var keys []*envelope.Key
	if encryption {
		keys = append(keys, newKey(t, gcm))
	}
	ring, err := envelope.NewKeyring(gcm, keys...)
	if err != nil {
		t.Fatal(err)
	}
	return &keysync.Site{Name: name, Settings: gcm, Fetched: time.Now(), Encryption: encryption, Keyring: ring, Binding: newBinding(t, name, 'b')}
}

func newKey(t testing.TB, s envelope.Settings) *envelope.Key {
	t.Helper()
	key, err := envelope.NewKey(s, envelope.KeyConfig{Fingerprint: fingerprint, Passphrase: "correct horse battery staple",
		ValidAfter: time.Now().Add(-time.Hour), ValidUntil: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newBinding(t testing.TB, site string, fill byte) *envelope.Binding {
	t.Helper()
	secret := bytes.Repeat([]byte{fill}, 32)
	laneKey, err := envelope.NewLaneKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	key, err := envelope.NewBindingKey("b1", secret)
	if err != nil {
		t.Fatal(err)
	}
	b, err := envelope.NewBinding(site, laneKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// seal makes an event's triple as an edge would for s.
func seal(t testing.TB, s *keysync.Site, payload string) envelope.Triple {
	t.Helper()
	var text []byte
	var err error
	if s.Encryption {
		var key *envelope.Key
		if key, err = s.Keyring.Primary(time.Now()); err == nil {
			text, err = key.AppendSeal(nil, []byte(payload))
		}
	} else {
		text, err = s.Binding.Current().AppendSealPlain(nil, []byte(payload))
	}
	if err != nil {
		t.Fatal(err)
	}
	triple, err := envelope.ParseTriple(text, 0)
	if err != nil {
		t.Fatal(err)
	}
	return triple
}

// event makes a delivery of an event of s, with whatever change makes to it before it is
// tagged.
func event(t testing.TB, s *keysync.Site, seq uint64, payload string, change ...func(*envelope.Event)) *broker.Delivery {
	t.Helper()
	now := time.Now()
	e := broker.Event{Event: envelope.Event{
		Site: s.Name, Kind: "order", Edge: "front", Epoch: "k3f9a2", From: seq, Seq: seq, ID: "01jz", Via: "hub",
		Accepted: now.UnixMilli(), Deadline: now.Add(10 * time.Minute).UnixMilli(), Triple: seal(t, s, payload)}}
	for _, c := range change {
		c(&e.Event)
	}
	e.Bind, e.Tag = s.Binding.Current().ID(), s.Binding.Current().TagEvent(&e.Event)
	return &broker.Delivery{Event: e, Site: e.Site, Kind: e.Kind, Edge: e.Edge, StreamSeq: seq, Stored: now}
}

// fakeFeed is heard of all the time until it is told to be silent.
type fakeFeed struct {
	event  func(*broker.Delivery)
	gap    func(string)
	silent atomic.Pointer[time.Time] // when it was last heard of; nil = now
	fail   chan error
}

func (f *fakeFeed) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-f.fail:
		return err
	}
}

func (f *fakeFeed) LastContact() time.Time {
	if t := f.silent.Load(); t != nil {
		return *t
	}
	return time.Now()
}

func (f *fakeFeed) silence() { f.silent.Store(new(time.Now())) }
func (f *fakeFeed) back()    { f.silent.Store(nil) }

// stage is a gate with all that it needs around it.
type stage struct {
	*Gate
	t        testing.TB
	keys     *fakeKeys
	feed     *fakeFeed
	registry *prometheus.Registry
	log      *bytes.Buffer // read it when the gate has stopped
	pipe     *pipeListener // nil = real sockets
	stopped  chan error
	stop     context.CancelFunc
}

func newStage(t testing.TB, cfg Config) *stage {
	t.Helper()
	s := &stage{t: t, keys: newFakeKeys(t), feed: &fakeFeed{fail: make(chan error, 1)}, registry: prometheus.NewRegistry(), log: new(bytes.Buffer)}
	cfg.Metrics = s.registry
	cfg.Log = slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	s.Gate, err = New(cfg, s.keys, func(event func(*broker.Delivery), gap func(string)) (Feed, error) {
		s.feed.event, s.feed.gap = event, gap
		return s.feed, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs the gate behind net.Pipe, for a bubble.
func (s *stage) start() {
	s.pipe = &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	s.listeners = []net.Listener{s.pipe}
	s.run()
}

func (s *stage) run() {
	ctx, cancel := context.WithCancel(context.Background())
	s.stop, s.stopped = cancel, make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.stopped <- s.Run(ctx)
	}()
	// For tests that end early.
	s.t.Cleanup(func() { cancel(); <-done })
}

// finish stops the gate and waits for it. In a bubble, what the screens did last is seen
// before.
func (s *stage) finish() {
	s.t.Helper()
	if s.pipe != nil {
		synctest.Wait()
	}
	s.stop()
	if err := <-s.stopped; err != nil {
		s.t.Errorf("Run: %v", err)
	}
}

// count is the value of a metric; label is its only label's value.
func (s *stage) count(name, label string) int {
	s.t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() != name || label != "" && (len(m.GetLabel()) != 1 || m.GetLabel()[0].GetValue() != label) {
				continue
			}
			return int(m.GetCounter().GetValue() + m.GetGauge().GetValue())
		}
	}
	s.t.Fatalf("no metric %s %s", name, label)
	return 0
}

func (s *stage) wantCount(name, label string, want int) {
	s.t.Helper()
	if got := s.count(name, label); got != want {
		s.t.Errorf("%s{%s} = %d, want %d", name, label, got, want)
	}
}

// pipeListener accepts the other ends of net.Pipe.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
	wrap   func(net.Conn) net.Conn // of the dialling end; nil = not wrapped
}

// wire counts what arrives at a dialling end.
type wire struct {
	net.Conn
	n atomic.Int64
}

func (w *wire) wrap(c net.Conn) net.Conn {
	w.Conn = c
	return w
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	w.n.Add(int64(n))
	return n, err
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return pipeAddr{} }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		if l.wrap != nil {
			return l.wrap(here), nil
		}
		return here, nil
	case <-l.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// client is a screen's end of a session.
type client struct {
	t    testing.TB
	conn *websocket.Conn

	done sync.WaitGroup
	mu   sync.Mutex
	got  []received
	err  error // why reading ended
}

type received struct {
	at   time.Time
	text string
}

// headers of a handshake at an encrypted site.
func headers(token string) http.Header {
	return http.Header{"Authorization": {"Bearer " + token}, "Sec-Iv": {goodIV}, "Sec-Fingerprint": {fingerprint}}
}

// bearer is the handshake's only header at a site with encryption off.
func bearer(token string) http.Header { return http.Header{"Authorization": {"Bearer " + token}} }

// connect connects a screen that reads nothing yet.
func (s *stage) connect(h http.Header, deflate bool) *client {
	s.t.Helper()
	c, response, err := s.tryConnect(h, deflate)
	if err != nil {
		if response != nil {
			body, _ := io.ReadAll(response.Body)
			s.t.Fatalf("handshake: %v: %s %s", err, response.Status, body)
		}
		s.t.Fatalf("handshake: %v", err)
	}
	return c
}

func (s *stage) tryConnect(h http.Header, deflate bool) (*client, *http.Response, error) {
	dialer := websocket.Dialer{EnableCompression: deflate, HandshakeTimeout: 5 * time.Second}
	url := "ws://gate.example/"
	if s.pipe != nil {
		dialer.NetDialContext = s.pipe.dial
	} else {
		url = "ws://" + s.Addrs()[0].String() + "/"
	}
	conn, response, err := dialer.Dial(url, h)
	if err != nil {
		return nil, response, err
	}
	c := &client{t: s.t, conn: conn}
	s.t.Cleanup(func() { conn.Close(); c.done.Wait() }) // for tests that end early
	return c, response, nil
}

// listen reads everything from now on.
func (c *client) listen() *client {
	c.done.Go(func() {
		for {
			_, text, err := c.conn.ReadMessage()
			c.mu.Lock()
			if err != nil {
				c.err = err
				c.mu.Unlock()
				return
			}
			c.got = append(c.got, received{time.Now(), string(text)})
			c.mu.Unlock()
		}
	})
	return c
}

// close leaves as a browser does: a close frame, the answer to it, the end.
func (c *client) close() {
	c.t.Helper()
	_ = c.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""), time.Now().Add(time.Second))
	c.done.Wait()
	c.conn.Close()
}

func (c *client) frames() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, r := range c.got {
		if r.text != heartbeat {
			out = append(out, r.text)
		}
	}
	return out
}

func (c *client) beats() []time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []time.Time
	for _, r := range c.got {
		if r.text == heartbeat {
			out = append(out, r.at)
		}
	}
	return out
}

func (c *client) wantFrames(want ...string) {
	c.t.Helper()
	if got := c.frames(); !slices.Equal(got, want) {
		c.t.Errorf("frames\n%q, want\n%q", got, want)
	}
}

// wantClosed expects that the server closed with the code.
func (c *client) wantClosed(code int, text string) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	closed, ok := errors.AsType[*websocket.CloseError](c.err)
	if !ok || closed.Code != code || closed.Text != text {
		c.t.Errorf("reading ended with %v, want close %d %q", c.err, code, text)
	}
}

func (c *client) wantOpen() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		c.t.Errorf("the session ended: %v", c.err)
	}
}
