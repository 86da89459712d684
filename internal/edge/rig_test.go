package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	tokenTill1  = "till-1-2f0a9c4e6b8d1357"
	tokenTill2  = "till-2-8e5b1d7c3a9f0246"
	tokenStrict = "strict-94d1c7f0a3b6e852"
	tokenClear  = "clear-5a7e9c1b3d2f4680"
	tokenQuoted = "quoted-c3e8a1f5b7092d46"
	tokenOK     = "ok-1b9d3f7a5c0e2864"
	tokenUnread = "unread-7c2e9a4f1d6b8053"

	fpCurrent = "5d41402abc4b2a76b9719d911017c592"
	fpEnded   = "9bf31c7ff062936a96d3c8bd1f8f2ff3"
	phrase    = "correct horse battery staple"
)

// What other implementations sealed under phrase: PBKDF2-HMAC-SHA-256, 600,000
// iterations, no salt.
const (
	otherPlain = `{"_id":"o-1001","order_number":"17","items":[{"name":"Crème brûlée","quantity":2}]}`

	// openssl enc -aes-256-ctr -pbkdf2 -iter 600000 -md sha256 -nosalt -pass env:PHRASE -iv 000102030405060708090a0b0c0d0e0f -base64 -A
	opensslIV      = "AAECAwQFBgcICQoLDA0ODw=="
	opensslMessage = "nWNAD3QmYX76AOMy/fSpK7eS6xFqYQDtd1ebm4CwEcA870NqGc9VVgVFzEW6ms2ruIKq/TN8xsgi104DzdGbBRlBY8xUkyUzZUI+QoUIXZhf5A739t0="

	// Node: createCipheriv("aes-256-gcm", pbkdf2Sync(PHRASE, "", 600000, 32, "sha256"), iv), tag appended.
	nodeIV      = "EBESExQVFhcYGRob"
	nodeMessage = "rDMEK+Ht0o+5J22/5/GsVRSgyBA6WTbF+bqUV79sooZtfcHvWUZC8t00H2DUaJdVsjbFRZQJOm2MLMrNJdiBeoNhmrLH95SpcrhKjMqfPxDLxQd18/855zyJJfA2NUtii8msIyev"
)

func profile(p envelope.Profile) envelope.Settings { return envelope.Settings{Profile: p} }

// key makes a key of the profile once: derivation takes its time.
var key = func() func(tb testing.TB, p envelope.Profile, fp string) *envelope.Key {
	var mu sync.Mutex
	made := make(map[string]*envelope.Key)
	return func(tb testing.TB, p envelope.Profile, fp string) *envelope.Key {
		tb.Helper()
		mu.Lock()
		defer mu.Unlock()
		id := string(p) + fp
		if made[id] == nil {
			// Valid in a synctest bubble too, where it is the year 2000.
			year := func(y int) time.Time { return time.Date(y, 1, 1, 0, 0, 0, 0, time.UTC) }
			c := envelope.KeyConfig{Fingerprint: fp, Passphrase: phrase, ValidAfter: year(1991), ValidUntil: year(2999)}
			if fp == fpEnded {
				c.ValidAfter, c.ValidUntil = year(1990), year(1992)
			}
			k, err := envelope.NewKey(profile(p), c)
			if err != nil {
				tb.Fatal(err)
			}
			if err := k.Derive(); err != nil {
				tb.Fatal(err)
			}
			made[id] = k
		}
		return made[id]
	}
}()

// fakeKeys stand for keysync.
type fakeKeys struct {
	mu      sync.Mutex
	sites   map[string]*keysync.Site
	refresh func() error
	ready   error
	reread  func() // of the binding file
}

func (p *fakeKeys) Site(name string) *keysync.Site {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sites[name]
}

func (p *fakeKeys) RefreshFor(context.Context, string, string) error {
	if p.refresh != nil {
		return p.refresh()
	}
	return keysync.ErrStillUnknown
}
func (p *fakeKeys) RereadBinding() {
	if p.reread != nil {
		p.reread()
	}
}
func (p *fakeKeys) Ready() error                  { return p.ready }
func (p *fakeKeys) Run(ctx context.Context) error { <-ctx.Done(); return nil }

func binding(tb testing.TB, site string) *envelope.Binding {
	tb.Helper()
	lane, err := envelope.NewLaneKey(bytes.Repeat([]byte{'l'}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	k, err := envelope.NewBindingKey("b1", bytes.Repeat([]byte{'b'}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	b, err := envelope.NewBinding(site, lane, k)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func keysOf(tb testing.TB, name string, p envelope.Profile, encryption bool) *keysync.Site {
	tb.Helper()
	var held []*envelope.Key
	if encryption {
		held = append(held, key(tb, p, fpCurrent), key(tb, p, fpEnded))
	}
	ring, err := envelope.NewKeyring(profile(p), held...)
	if err != nil {
		tb.Fatal(err)
	}
	return &keysync.Site{Name: name, Settings: profile(p), Fetched: time.Now(), Encryption: encryption, Keyring: ring, Binding: binding(tb, name)}
}

func tokens(name, token string) []door.TokenConfig {
	return []door.TokenConfig{{Name: name, SHA256: door.TokenSHA256(token)}}
}

// testConfig is a valid configuration with a site for each rule.
func testConfig() Config {
	no, item := false, "/items/0/name"
	return Config{
		Name:        "store-7",
		Hub:         broker.HubConfig{URLs: []string{"nats://127.0.0.1:4222"}},
		Portal:      keysync.PortalConfig{URL: "https://portal.example", TokenFile: "token"},
		BindingFile: "binding.json",
		Cipher:      profile(envelope.A256GCM),
		Sites: map[string]SiteConfig{
			"gcm":    {SiteConfig: door.SiteConfig{Tokens: append(tokens("till-1", tokenTill1), tokens("till-2", tokenTill2)...)}},
			"ctr":    {Cipher: profile(envelope.A256CTR), SiteConfig: door.SiteConfig{Authorization: door.AuthorizationNone}},
			"strict": {SiteConfig: door.SiteConfig{AcceptPlain: &no, Tokens: tokens("till-3", tokenStrict)}},
			"clear":  {SiteConfig: door.SiteConfig{Tokens: tokens("till-4", tokenClear)}, OrderID: &item},
			"quoted": {Body: "json-string", SiteConfig: door.SiteConfig{Tokens: tokens("till-5", tokenQuoted)}},
			"ok":     {AcceptStatus: 200, SiteConfig: door.SiteConfig{Tokens: tokens("till-6", tokenOK)}},
			"unread": {SiteConfig: door.SiteConfig{Tokens: tokens("till-7", tokenUnread)}},
		},
		Kinds:   map[string]KindConfig{"receipt": {Deadline: time.Hour}},
		MaxBody: 4096,
		Log:     slog.New(slog.DiscardHandler),
	}
}

// fakeStore stands for the committer: what it is told to do, it does at once.
type fakeStore struct {
	mu     sync.Mutex
	seq    map[string]uint64
	drafts []*draft
	// commit decides; nil stores.
	commit func(d *draft) error
	// kitchen answers what is stored; nil: no report comes.
	kitchen func(d *draft) *reply
	report  func(*broker.Report)
	bind    func(site string) *envelope.Binding
}

// reply is what a bridge reports.
type reply struct {
	state, reason string
	status        int
	contentType   string
	body          string
}

func (s *fakeStore) Commit(_ context.Context, d *draft) error {
	s.mu.Lock()
	s.drafts = append(s.drafts, d)
	s.seq[d.site]++
	seq, commit, kitchen := s.seq[d.site], s.commit, s.kitchen
	s.mu.Unlock()
	now := time.Now()
	d.progress.numbered(seq, now, now.Add(d.within))
	if commit != nil {
		if err := commit(d); err != nil {
			if errors.Is(err, errUnknown) {
				d.progress.unknown()
			}
			return err
		}
	}
	d.progress.stored()
	if kitchen != nil {
		if r := kitchen(d); r != nil {
			s.report(s.reportOf(d, seq, r))
		}
	}
	return nil
}

func (s *fakeStore) stored() []*draft {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*draft(nil), s.drafts...)
}

func (s *fakeStore) reportOf(d *draft, seq uint64, r *reply) *broker.Report {
	key := s.bind(d.site).Current()
	text, err := json.Marshal(map[string]any{"status": r.status, "headers": map[string]string{"content-type": r.contentType}, "body": []byte(r.body)})
	if err != nil {
		panic(err)
	}
	sealed, err := key.SealReport(text)
	if err != nil {
		panic(err)
	}
	out := &broker.Report{Kind: d.kind, Bind: key.ID(), Report: envelope.Report{
		Site: d.site, Edge: "store-7", Epoch: testEpoch, Seq: seq, ID: d.id, Endpoint: "kitchen",
		State: r.state, Reason: r.reason, Status: r.status, Attempts: 1, Started: 1, Settled: 2, Triple: sealed,
	}}
	out.Tag = key.TagReport(&out.Report)
	return out
}

const testEpoch = "epochoftest"

// fakeHub is the rest of the broker.
type fakeHub struct {
	publisher
	away       bool
	durability string
}

func (h *fakeHub) Connected() bool    { return !h.away }
func (h *fakeHub) Status() string     { return "no connection for 3s" }
func (h *fakeHub) Durability() string { return h.durability }
func (h *fakeHub) FollowReports(ctx context.Context, _ []string, _ func(*broker.Report)) error {
	<-ctx.Done()
	return nil
}

// rig is an edge with everything around it faked, and a real HTTP server.
type rig struct {
	edge    *Edge
	ingest  *ingest
	store   *fakeStore
	hub     *fakeHub
	portal  *fakeKeys
	follow  *reports
	handler http.Handler
}

func newRig(tb testing.TB, change func(*Config)) *rig {
	tb.Helper()
	cfg := testConfig()
	if change != nil {
		change(&cfg)
	}
	p := &fakeKeys{sites: map[string]*keysync.Site{}}
	for name := range cfg.Sites {
		prof := envelope.A256GCM
		if name == "ctr" {
			prof = envelope.A256CTR
		}
		p.sites[name] = keysOf(tb, name, prof, name != "clear")
	}
	if s := p.sites["unread"]; s != nil {
		s.Fetched = time.Time{}
	}
	e, err := newEdge(cfg, func(keysync.Config) (keys, error) { return p, nil })
	if err != nil {
		tb.Fatal(err)
	}
	r := &rig{edge: e, portal: p, hub: &fakeHub{durability: "fsync"}}
	r.follow = &reports{edge: cfg.Name, epoch: testEpoch, keys: p, register: e.register, metrics: e.metrics, log: e.log, warn: rate.Sometimes{First: 1}}
	r.store = &fakeStore{seq: map[string]uint64{}, report: r.follow.take, bind: func(site string) *envelope.Binding { return p.Site(site).Binding }}
	r.ingest = e.ingest(r.store, r.hub)
	r.handler = r.ingest.handler(listener{loopback: true})
	return r
}

func (r *rig) serve(t *testing.T) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(r.handler)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s
}

// call is one request to a rig.
type call struct {
	method string // default POST
	path   string // default /order
	token  string
	header http.Header
	body   string
	// chunked sends no Content-Length.
	chunked bool
}

func (c call) request(base string) *http.Request {
	method, path := c.method, c.path
	if method == "" {
		method = http.MethodPost
	}
	if path == "" {
		path = "/order"
	}
	var body *strings.Reader
	if body = strings.NewReader(c.body); method == http.MethodGet {
		body = strings.NewReader("")
	}
	req, err := http.NewRequest(method, base+path, body)
	if err != nil {
		panic(err)
	}
	if c.chunked {
		req.ContentLength = -1
		req.Body = http.NoBody
		req.Body = struct {
			*strings.Reader
			nopCloser
		}{body, nopCloser{}}
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	for name, values := range c.header {
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	return req
}

func textLog(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

type nopCloser struct{}

func (nopCloser) Close() error { return nil }

// do answers c without a network, for tests in a bubble.
func (r *rig) do(ctx context.Context, c call) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	req := c.request("http://edge.example").WithContext(ctx)
	r.handler.ServeHTTP(w, req)
	return w
}

func with(pairs ...string) http.Header {
	h := make(http.Header)
	for i := 0; i < len(pairs); i += 2 {
		h.Add(pairs[i], pairs[i+1])
	}
	return h
}

// sealed makes an encrypted call by the product's own code.
func sealed(tb testing.TB, p envelope.Profile, payload string) (iv, message string) {
	tb.Helper()
	t, err := key(tb, p, fpCurrent).Seal([]byte(payload))
	if err != nil {
		tb.Fatal(err)
	}
	return string(t.IV), string(t.Message)
}

func problemOf(tb testing.TB, body []byte) map[string]any {
	tb.Helper()
	var m map[string]any
	if err := json.Unmarshal(body, &m); err != nil {
		tb.Fatalf("no JSON: %v: %s", err, body)
	}
	return m
}

// eventually waits for something that another goroutine does.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("did not happen in 10 s: %s", what)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(fmt.Errorf("%s: %w", what, context.Cause(t.Context())))
		case <-time.After(2 * time.Millisecond):
		}
	}
}
