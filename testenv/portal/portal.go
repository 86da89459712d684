// Package portal is a stub of the Portal over real HTTPS: it keeps the key set of each
// site, rotates it, hands out integrator tokens, answers conditional requests, and can
// be told to answer each site as badly as real services do.
//
// Its certificate comes from an authority that is made at every start; clients trust it
// through [Portal.WriteCAFile]. Nothing is stored: a new Portal has new keys.
package portal

import (
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// TokenEndpoint stands for POST /integrator/token where a site's name is asked for:
	// SetFault(TokenEndpoint, …) spoils the token requests.
	TokenEndpoint = "/integrator/token"

	// TokenLife is how long an issued token is accepted.
	TokenLife = 21 * 24 * time.Hour
)

// Config says what the stub serves. Sites is required, everything else has a default.
type Config struct {
	// Sites are the sites known at start, by name. Required.
	Sites map[string]SiteConfig

	// Token is accepted on every site request, beside the issued ones. Default: a random
	// one, see [Portal.Token].
	Token string

	// KeyID and SecretKey are what POST /integrator/token asks for. Both or neither.
	// Default: random ones, see [Portal.Credentials].
	KeyID, SecretKey string

	// RotateEvery is the time between two rotations of every site. Default 0: a key
	// changes only by [Portal.Rotate].
	RotateEvery time.Duration

	// Validity is how long a key is valid from its birth. Default: RotateEvery + Overlap,
	// or 24 h when RotateEvery is 0. Excludes Overlap.
	Validity time.Duration

	// Overlap is how long a key stays valid after its successor appeared. Default: half of
	// RotateEvery. Excludes Validity; needs RotateEvery.
	Overlap time.Duration

	// Listen is the address, host:port. Default 127.0.0.1:0, a free port.
	Listen string

	// Path is where the encryption block stands in the site object, names separated by
	// dots. Default security.enterprise_kitchen.
	Path string
}

// SiteConfig says how a site starts.
type SiteConfig struct {
	// Encryption is the site's switch on the Portal. A site has keys either way; it shows
	// them only while encryption is on.
	Encryption bool
}

// Key is one secret key of a site as the Portal shows it.
type Key struct {
	Fingerprint string // 32 hexadecimal digits
	Value       string // the pass phrase
	ValidAfter  time.Time
	ValidUntil  time.Time
}

// Stats counts what the stub was asked since its start.
type Stats struct {
	Fetches     int // site requests of any outcome
	NotModified int // those of them answered 304
	Tokens      int // tokens issued
	Denied      int // requests refused for their token or credentials
	Trapped     int // requests that followed a redirect they should not have followed
}

// Portal is a running stub. All methods are safe for concurrent use.
type Portal struct {
	// Fixed at birth.
	cfg   Config
	path  []string
	caPEM []byte
	tls   *tls.Config
	addr  string
	trap  *httpServer
	stop  chan struct{}
	wg    sync.WaitGroup

	mu sync.Mutex
	// Guarded by mu.
	server    *httpServer // nil while down
	sites     map[string]*site
	faults    map[string]Fault
	tokens    map[string]time.Time // issued token: end of its life
	fetches   map[string]int
	rotations int
	stats     Stats
	closed    bool
}

type site struct {
	encryption bool
	keys       []Key // oldest first, at most two
}

// Start listens, mints the first key of each site and serves until [Portal.Close].
func Start(cfg Config) (*Portal, error) {
	if len(cfg.Sites) == 0 {
		return nil, errors.New("portal: Sites: at least one site is needed")
	}
	if (cfg.KeyID == "") != (cfg.SecretKey == "") {
		return nil, errors.New("portal: KeyID and SecretKey go together")
	}
	if cfg.Overlap != 0 && (cfg.Validity != 0 || cfg.RotateEvery == 0) {
		return nil, errors.New("portal: Overlap needs RotateEvery and excludes Validity")
	}
	if cfg.RotateEvery < 0 || cfg.Validity < 0 || cfg.Overlap < 0 {
		return nil, errors.New("portal: RotateEvery, Validity and Overlap cannot be negative")
	}
	if cfg.KeyID == "" {
		cfg.KeyID, cfg.SecretKey = "integrator-"+rand.Text()[:8], rand.Text()
	}
	cfg.Token = cmp.Or(cfg.Token, rand.Text())
	cfg.Listen = cmp.Or(cfg.Listen, "127.0.0.1:0")
	cfg.Path = cmp.Or(cfg.Path, "security.enterprise_kitchen")
	if cfg.Validity == 0 {
		cfg.Validity = 24 * time.Hour
		if cfg.RotateEvery > 0 {
			cfg.Validity = cfg.RotateEvery + cmp.Or(cfg.Overlap, cfg.RotateEvery/2)
		}
	}

	p := &Portal{
		cfg: cfg, path: strings.Split(cfg.Path, "."), stop: make(chan struct{}),
		sites: map[string]*site{}, faults: map[string]Fault{}, tokens: map[string]time.Time{}, fetches: map[string]int{},
	}
	for name, c := range cfg.Sites {
		p.sites[name] = &site{encryption: c.Encryption, keys: []Key{newKey(time.Now().Add(-time.Minute), cfg.Validity+time.Minute)}}
	}
	var err error
	if p.caPEM, p.tls, err = newAuthority(cfg.Listen); err != nil {
		return nil, fmt.Errorf("portal: certificate: %w", err)
	}
	if p.trap, err = serve("127.0.0.1:0", nil, http.HandlerFunc(p.serveTrap)); err != nil {
		return nil, fmt.Errorf("portal: %w", err)
	}
	if p.server, err = serve(cfg.Listen, p.tls, p.handler()); err != nil {
		p.trap.close()
		return nil, fmt.Errorf("portal: %w", err)
	}
	p.addr = p.server.addr
	if cfg.RotateEvery > 0 {
		p.wg.Go(p.rotateAll)
	}
	return p, nil
}

// Close stops serving, cuts open requests and waits for everything the stub started. A
// second call does nothing.
func (p *Portal) Close() {
	p.mu.Lock()
	server, closed := p.server, p.closed
	p.server, p.closed = nil, true
	p.mu.Unlock()
	if closed {
		return
	}
	close(p.stop)
	if server != nil {
		server.close()
	}
	p.trap.close()
	p.wg.Wait()
}

// Down closes the listener and cuts every connection: clients meet "connection refused"
// until [Portal.Up].
func (p *Portal) Down() {
	p.mu.Lock()
	server := p.server
	p.server = nil
	p.mu.Unlock()
	if server != nil {
		server.close()
	}
}

// Up listens again on the same address after [Portal.Down].
func (p *Portal) Up() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil || p.closed {
		return nil
	}
	server, err := serve(p.addr, p.tls, p.handler())
	if err != nil {
		return fmt.Errorf("portal: %w", err)
	}
	p.server = server
	return nil
}

// URL is the base address, https://host:port; sites are at /sites/{site} under it and
// tokens at /integrator/token.
func (p *Portal) URL() string { return "https://" + p.addr }

// Token is the token accepted beside the issued ones.
func (p *Portal) Token() string { return p.cfg.Token }

// Credentials are what POST /integrator/token asks for.
func (p *Portal) Credentials() (keyID, secretKey string) { return p.cfg.KeyID, p.cfg.SecretKey }

// CAPEM is the certificate of the stub's authority, PEM.
func (p *Portal) CAPEM() []byte { return slices.Clone(p.caPEM) }

// WriteCAFile writes [Portal.CAPEM] to a file.
func (p *Portal) WriteCAFile(path string) error { return os.WriteFile(path, p.caPEM, 0o644) }

// WriteCredentials writes what a client needs into dir: ca.pem, token, and secret_key.
// The secrets are readable by the owner only.
func (p *Portal) WriteCredentials(dir string) (caFile, tokenFile, secretKeyFile string, err error) {
	caFile, tokenFile, secretKeyFile = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "token"), filepath.Join(dir, "secret_key")
	err = errors.Join(
		p.WriteCAFile(caFile),
		os.WriteFile(tokenFile, []byte(p.cfg.Token+"\n"), 0o600),
		os.WriteFile(secretKeyFile, []byte(p.cfg.SecretKey+"\n"), 0o600))
	return caFile, tokenFile, secretKeyFile, err
}

// Rotate gives a site a new current key; the current one becomes the previous one, and
// what was previous leaves the document. An unknown site is an error.
func (p *Portal) Rotate(name string) (Key, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.sites[name]
	if !ok {
		return Key{}, fmt.Errorf("portal: no site %q", name)
	}
	return p.rotateLocked(s), nil
}

func (p *Portal) rotateLocked(s *site) Key {
	k := newKey(time.Now(), p.cfg.Validity)
	s.keys = append(slices.Clone(s.keys[max(0, len(s.keys)-1):]), k)
	p.rotations++
	return k
}

// Rotations counts the rotations of all sites since the start.
func (p *Portal) Rotations() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rotations
}

// Keys returns the site's keys, previous first, whether encryption is on or off. An unknown
// site has none.
func (p *Portal) Keys(name string) []Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s, ok := p.sites[name]; ok {
		return slices.Clone(s.keys)
	}
	return nil
}

// SetKeys replaces what the site shows. The caller answers for the number and form of the
// keys: this is how a test writes a document of its own.
func (p *Portal) SetKeys(name string, keys ...Key) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.sites[name]
	if !ok {
		return fmt.Errorf("portal: no site %q", name)
	}
	s.keys = slices.Clone(keys)
	return nil
}

// SetEncryption turns the site's switch.
func (p *Portal) SetEncryption(name string, on bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, ok := p.sites[name]
	if !ok {
		return fmt.Errorf("portal: no site %q", name)
	}
	s.encryption = on
	return nil
}

// SetFault spoils every answer about the site, or of [TokenEndpoint], until it is set to
// the zero Fault.
func (p *Portal) SetFault(name string, f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if f.Kind == None {
		delete(p.faults, name)
		return
	}
	p.faults[name] = f
}

// RevokeTokens makes every issued token worthless. The static one stays.
func (p *Portal) RevokeTokens() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.tokens)
}

// Stats returns the counts so far.
func (p *Portal) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

// Fetches counts the requests for one site, of any outcome.
func (p *Portal) Fetches(name string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.fetches[name]
}

func (p *Portal) rotateAll() {
	tick := time.NewTicker(p.cfg.RotateEvery)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-tick.C:
			p.mu.Lock()
			for _, s := range p.sites {
				p.rotateLocked(s)
			}
			p.mu.Unlock()
		}
	}
}

func (p *Portal) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /sites/{site}", p.serveSite)
	mux.HandleFunc("GET /sites/{site}/{$}", p.serveSite) // where SameHostRedirect leads
	mux.HandleFunc("POST "+TokenEndpoint, p.serveToken)
	mux.HandleFunc("/trap", p.serveTrap)
	return mux
}

// serveTrap is where the redirects lead that a careful client does not follow.
func (p *Portal) serveTrap(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	p.stats.Trapped++
	p.mu.Unlock()
	http.Error(w, "this request should not have come here", http.StatusTeapot)
}

func (p *Portal) serveSite(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("site")
	p.mu.Lock()
	p.stats.Fetches++
	p.fetches[name]++
	s, known := p.sites[name]
	var now site
	if known {
		now = site{encryption: s.encryption, keys: slices.Clone(s.keys)}
	}
	fault := p.faults[name]
	p.mu.Unlock()

	if p.disturb(w, r, fault) {
		return
	}
	if !p.tokenValid(r.Header.Get("Authorization")) {
		p.deny(w)
		return
	}
	if !known {
		writeJSON(w, http.StatusNotFound, map[string]any{"message": "no such site"})
		return
	}
	body, err := json.Marshal(p.siteObject(name, now, fault))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	sum := sha256.Sum256(body)
	etag := `"` + hex.EncodeToString(sum[:8]) + `"`
	w.Header().Set("ETag", etag)
	if r.Header.Get("If-None-Match") == etag {
		p.mu.Lock()
		p.stats.NotModified++
		p.mu.Unlock()
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if fault.Kind == TruncatedJSON {
		body = body[:len(body)/2]
	}
	if fault.Kind == CutOff {
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		w.Write(body[:len(body)/2])
		panic(http.ErrAbortHandler) // cuts the connection
	}
	w.Write(body)
}

// siteObject looks like what a real Portal keeps about a site: the block we come for
// stands among much that does not concern us.
func (p *Portal) siteObject(name string, s site, f Fault) map[string]any {
	block := map[string]any{"encryption": s.encryption}
	if s.encryption {
		block["keys"] = shown(s.keys)
	}
	spoil(block, s, f)
	object := map[string]any{
		"_id": "site-" + name, "name": "Store " + name, "time_zone": "America/Chicago",
		"address": map[string]any{"city": "Springfield", "country": "US"},
		"tags":    []string{"drive-thru", "24h"},
		"security": map[string]any{
			"order_taking": map[string]any{"encryption": false},
		},
	}
	if f.Kind == NoBlock {
		return object
	}
	at := object
	for _, n := range p.path[:len(p.path)-1] {
		next, ok := at[n].(map[string]any)
		if !ok {
			next = map[string]any{}
			at[n] = next
		}
		at = next
	}
	at[p.path[len(p.path)-1]] = block
	return object
}

// wireKey is a key as it stands in the document.
type wireKey struct {
	Fingerprint string `json:"fingerprint"`
	Value       string `json:"value"`
	ValidAfter  string `json:"valid_after"`
	ValidUntil  string `json:"valid_until"`
}

func shown(keys []Key) []wireKey {
	out := make([]wireKey, 0, len(keys))
	for _, k := range keys {
		out = append(out, wireKey{k.Fingerprint, k.Value, isoTime(k.ValidAfter), isoTime(k.ValidUntil)})
	}
	return out
}

func isoTime(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

func (p *Portal) serveToken(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	fault := p.faults[TokenEndpoint]
	p.mu.Unlock()
	if p.disturb(w, r, fault) {
		return
	}
	var in struct {
		KeyID     string `json:"key_id"`
		SecretKey string `json:"secret_key"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&in); err != nil {
		writeJSON(w, http.StatusBadRequest, map[string]any{"message": "not the expected JSON"})
		return
	}
	if !equal(in.KeyID, p.cfg.KeyID) || !equal(in.SecretKey, p.cfg.SecretKey) {
		p.deny(w)
		return
	}
	token := rand.Text()
	p.mu.Lock()
	p.tokens[token] = time.Now().Add(TokenLife)
	p.stats.Tokens++
	n := p.stats.Tokens
	p.mu.Unlock()
	// The real one answers a bare or a quoted string; every client must take both.
	if n%2 == 0 {
		writeJSON(w, http.StatusOK, token)
		return
	}
	io.WriteString(w, token)
}

func (p *Portal) deny(w http.ResponseWriter) {
	p.mu.Lock()
	p.stats.Denied++
	p.mu.Unlock()
	writeJSON(w, http.StatusUnauthorized, map[string]any{"message": "unauthorized"})
}

// tokenValid accepts `Bearer <token>` and the bare token.
func (p *Portal) tokenValid(header string) bool {
	token := strings.TrimPrefix(header, "Bearer ")
	if token == "" {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(p.tokens, func(_ string, end time.Time) bool { return !now.Before(end) })
	_, issued := p.tokens[token]
	return issued || equal(token, p.cfg.Token)
}

func equal(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

func newKey(born time.Time, validity time.Duration) Key {
	var fp [16]byte
	rand.Read(fp[:])
	return Key{
		Fingerprint: hex.EncodeToString(fp[:]),
		Value:       newPhrase(),
		ValidAfter:  born.UTC().Truncate(time.Millisecond),
		ValidUntil:  born.Add(validity).UTC().Truncate(time.Millisecond),
	}
}

var words = strings.Fields("amber basil cedar dill ember fennel ginger hazel indigo juniper kelp lemon maple nutmeg olive pepper " +
	"quince rye saffron thyme umber vanilla walnut xylem yarrow zest apron brisk copper dough eager flour")

// newPhrase makes a phrase a person could have typed, with more than 128 random bits.
func newPhrase() string {
	var r [8]byte
	rand.Read(r[:])
	parts := make([]string, 0, len(r)+1)
	for _, b := range r {
		parts = append(parts, words[int(b)%len(words)])
	}
	return strings.Join(append(parts, rand.Text()), " ")
}

// httpServer is one listener with its server, the goroutine that serves it and its
// requests.
type httpServer struct {
	addr string
	srv  *http.Server
	wg   sync.WaitGroup

	mu     sync.Mutex
	closed bool // guarded by mu
}

func serve(addr string, t *tls.Config, h http.Handler) (*httpServer, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	s := &httpServer{addr: ln.Addr().String()}
	s.srv = &http.Server{
		Handler: s.counted(h), TLSConfig: t.Clone(), ReadHeaderTimeout: 10 * time.Second,
		// Clients that distrust the certificate, and connections cut on purpose.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	s.wg.Go(func() {
		if t == nil {
			s.srv.Serve(ln)
			return
		}
		s.srv.ServeTLS(ln, "", "")
	})
	return s, nil
}

// counted lets close wait for the requests, which http.Server.Close does not.
func (s *httpServer) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		closed := s.closed
		if !closed {
			s.wg.Add(1)
		}
		s.mu.Unlock()
		if closed {
			panic(http.ErrAbortHandler)
		}
		defer s.wg.Done()
		h.ServeHTTP(w, r)
	})
}

// close cuts every connection; handlers see their request's context end.
func (s *httpServer) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.srv.Close()
	s.wg.Wait()
}
