package portal_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, cfg portal.Config) *portal.Portal {
	t.Helper()
	if cfg.Sites == nil {
		cfg.Sites = map[string]portal.SiteConfig{"s1": {Encryption: true}, "plain": {}}
	}
	p, err := portal.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// client trusts the stub's authority only, and follows nothing.
func client(t *testing.T, p *portal.Portal) *http.Client {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(p.CAPEM()) {
		t.Fatal("CAPEM holds no certificate")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 300 * time.Millisecond, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
}

// answer is what a client sees: either err or the rest.
type answer struct {
	status int
	header http.Header
	body   string
	err    error
}

func get(t *testing.T, p *portal.Portal, site, authorization, etag string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, p.URL()+"/sites/"+site, nil)
	if err != nil {
		t.Fatal(err)
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	if etag != "" {
		req.Header.Set("If-None-Match", etag)
	}
	resp, err := client(t, p).Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	return answer{resp.StatusCode, resp.Header, string(body), err}
}

func token(t *testing.T, p *portal.Portal, body string) answer {
	t.Helper()
	resp, err := client(t, p).Post(p.URL()+"/integrator/token", "application/json", strings.NewReader(body))
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(b), err}
}

type block struct {
	Encryption bool `json:"encryption"`
	Keys       []struct {
		Fingerprint string    `json:"fingerprint"`
		Value       string    `json:"value"`
		ValidAfter  time.Time `json:"valid_after"`
		ValidUntil  time.Time `json:"valid_until"`
	} `json:"keys"`
}

func kitchenBlock(t *testing.T, a answer) block {
	t.Helper()
	if a.err != nil || a.status != http.StatusOK {
		t.Fatalf("status %d, %v", a.status, a.err)
	}
	var o struct {
		Security struct {
			Kitchen block `json:"enterprise_kitchen"`
		} `json:"security"`
	}
	if err := json.Unmarshal([]byte(a.body), &o); err != nil {
		t.Fatal(err)
	}
	return o.Security.Kitchen
}

func TestSiteObjectShowsTheKeysOfAnEncryptedSite(t *testing.T) {
	p := start(t, portal.Config{})
	b := kitchenBlock(t, get(t, p, "s1", "Bearer "+p.Token(), ""))
	want := p.Keys("s1")
	if !b.Encryption || len(b.Keys) != 1 || len(want) != 1 {
		t.Fatalf("encryption %v with %d keys, want on with the site's one key", b.Encryption, len(b.Keys))
	}
	k := b.Keys[0]
	if k.Fingerprint != want[0].Fingerprint || k.Value != want[0].Value || !k.ValidAfter.Equal(want[0].ValidAfter) || !k.ValidUntil.Equal(want[0].ValidUntil) {
		t.Errorf("document %+v, Keys %+v", k, want[0])
	}
	if len(k.Fingerprint) != 32 || strings.Trim(k.Fingerprint, "0123456789abcdef") != "" {
		t.Errorf("fingerprint %q is not 32 hexadecimal digits", k.Fingerprint)
	}
	if now := time.Now(); now.Before(k.ValidAfter) || !now.Before(k.ValidUntil) {
		t.Errorf("the first key is not valid at once: %v to %v", k.ValidAfter, k.ValidUntil)
	}
	if b := kitchenBlock(t, get(t, p, "plain", "Bearer "+p.Token(), "")); b.Encryption || b.Keys != nil {
		t.Errorf("a site with encryption off shows %+v", b)
	}
}

func TestRotationKeepsThePreviousKey(t *testing.T) {
	p := start(t, portal.Config{})
	first := p.Keys("s1")[0]
	second, err := p.Rotate("s1")
	if err != nil {
		t.Fatal(err)
	}
	third, err := p.Rotate("s1")
	if err != nil {
		t.Fatal(err)
	}
	got := p.Keys("s1")
	if len(got) != 2 || got[0] != second || got[1] != third || first == second {
		t.Errorf("keys %+v, want the previous and the current one", got)
	}
	if p.Rotations() != 2 {
		t.Errorf("%d rotations counted, want 2", p.Rotations())
	}
	if _, err := p.Rotate("nowhere"); err == nil {
		t.Error("an unknown site was rotated")
	}
}

func TestRotateEveryOverlaps(t *testing.T) {
	p := start(t, portal.Config{RotateEvery: 20 * time.Millisecond, Overlap: time.Minute})
	wait(t, "three rotations of two sites", func() bool { return p.Rotations() >= 6 })
	keys := p.Keys("s1")
	if len(keys) != 2 || !keys[0].ValidUntil.After(keys[1].ValidAfter.Add(50*time.Second)) {
		t.Errorf("the previous key does not stay valid for the overlap: %v", keys)
	}
}

func TestConditionalRequest(t *testing.T) {
	p := start(t, portal.Config{})
	auth := "Bearer " + p.Token()
	first := get(t, p, "s1", auth, "")
	etag := first.header.Get("ETag")
	if etag == "" {
		t.Fatal("no ETag")
	}
	if a := get(t, p, "s1", auth, etag); a.status != http.StatusNotModified || a.body != "" {
		t.Errorf("unchanged: status %d with %d bytes, want 304 without body", a.status, len(a.body))
	}
	if _, err := p.Rotate("s1"); err != nil {
		t.Fatal(err)
	}
	if a := get(t, p, "s1", auth, etag); a.status != http.StatusOK {
		t.Errorf("after a rotation: status %d, want 200", a.status)
	}
	if s := p.Stats(); s.Fetches != 3 || s.NotModified != 1 || p.Fetches("s1") != 3 {
		t.Errorf("counted %+v", s)
	}
}

func TestTokens(t *testing.T) {
	p := start(t, portal.Config{Token: "static", KeyID: "id", SecretKey: "secret"})
	const good = `{"key_id":"id","secret_key":"secret"}`
	bare, quoted := token(t, p, good), token(t, p, good)
	if bare.status != 200 || strings.Contains(bare.body, `"`) {
		t.Errorf("first token: %d %q, want a bare string", bare.status, bare.body)
	}
	var second string
	if err := json.Unmarshal([]byte(quoted.body), &second); err != nil {
		t.Errorf("second token: %q, want a quoted string", quoted.body)
	}
	if a := token(t, p, `{"key_id":"id","secret_key":"wrong"}`); a.status != http.StatusUnauthorized {
		t.Errorf("wrong secret: %d, want 401", a.status)
	}
	if a := token(t, p, `{`); a.status != http.StatusBadRequest {
		t.Errorf("no JSON: %d, want 400", a.status)
	}
	for _, row := range []struct {
		name, authorization string
		status              int
	}{
		{"static", "Bearer static", 200},
		{"static, bare", "static", 200},
		{"issued", "Bearer " + bare.body, 200},
		{"issued, quoted in transit", "Bearer " + second, 200},
		{"none", "", 401},
		{"scheme only", "Bearer ", 401},
		{"wrong", "Bearer statik", 401},
	} {
		if a := get(t, p, "s1", row.authorization, ""); a.status != row.status {
			t.Errorf("%s: %d, want %d", row.name, a.status, row.status)
		}
	}
	p.RevokeTokens()
	if a := get(t, p, "s1", "Bearer "+bare.body, ""); a.status != 401 {
		t.Errorf("revoked token: %d, want 401", a.status)
	}
	if a := get(t, p, "s1", "Bearer static", ""); a.status != 200 {
		t.Errorf("static token after revocation: %d, want 200", a.status)
	}
	if s := p.Stats(); s.Tokens != 2 || s.Denied != 5 {
		t.Errorf("counted %+v, want 2 tokens and 5 denials", s)
	}
}

// Every fault must show: a kind that nobody implemented would let a client's test pass by
// testing nothing.
func TestEveryFaultShows(t *testing.T) {
	p := start(t, portal.Config{})
	auth := "Bearer " + p.Token()
	good := get(t, p, "s1", auth, "")
	if len(portal.Kinds()) < 20 {
		t.Fatalf("only %d kinds", len(portal.Kinds()))
	}
	for _, kind := range portal.Kinds() {
		t.Run(string(kind), func(t *testing.T) {
			p.SetFault("s1", portal.Fault{Kind: kind, RetryAfter: "7"})
			defer p.SetFault("s1", portal.Fault{})
			a := get(t, p, "s1", auth, "")
			if a.err == nil && a.status == good.status && a.body == good.body {
				t.Error("the answer is a good one")
			}
			if (kind == portal.TooManyRequests || kind == portal.Unavailable) && a.header.Get("Retry-After") != "7" {
				t.Error("no Retry-After")
			}
			if other := get(t, p, "plain", auth, ""); other.err != nil || other.status != 200 {
				t.Errorf("the other site suffers: %d %v", other.status, other.err)
			}
		})
	}
	if a := get(t, p, "s1", auth, ""); a.body != good.body {
		t.Error("the faults left something behind")
	}
	p.SetFault(portal.TokenEndpoint, portal.Fault{Kind: portal.ServerError})
	if a := token(t, p, `{}`); a.status != 500 {
		t.Errorf("fault of the token endpoint: %d, want 500", a.status)
	}
}

func TestDownRefusesConnectionsUntilUp(t *testing.T) {
	p := start(t, portal.Config{})
	auth := "Bearer " + p.Token()
	p.Down()
	if a := get(t, p, "s1", auth, ""); !errors.Is(a.err, syscall.ECONNREFUSED) {
		t.Errorf("down: %d %v, want connection refused", a.status, a.err)
	}
	if err := p.Up(); err != nil {
		t.Fatal(err)
	}
	if a := get(t, p, "s1", auth, ""); a.status != 200 {
		t.Errorf("up again: %d %v, want 200", a.status, a.err)
	}
}

func TestSetEncryptionAndSetKeys(t *testing.T) {
	p := start(t, portal.Config{})
	auth := "Bearer " + p.Token()
	if err := p.SetEncryption("plain", true); err != nil {
		t.Fatal(err)
	}
	if b := kitchenBlock(t, get(t, p, "plain", auth, "")); !b.Encryption || len(b.Keys) != 1 {
		t.Errorf("switched on: %+v", b)
	}
	mine := portal.Key{Fingerprint: "mine", Value: "v", ValidAfter: time.Now(), ValidUntil: time.Now().Add(time.Hour)}
	if err := p.SetKeys("s1", mine); err != nil {
		t.Fatal(err)
	}
	if b := kitchenBlock(t, get(t, p, "s1", auth, "")); len(b.Keys) != 1 || b.Keys[0].Fingerprint != "mine" {
		t.Errorf("keys set: %+v", b)
	}
	if p.SetEncryption("nowhere", true) == nil || p.SetKeys("nowhere") == nil {
		t.Error("an unknown site was changed")
	}
	if a := get(t, p, "nowhere", auth, ""); a.status != 404 {
		t.Errorf("unknown site: %d, want 404", a.status)
	}
}

func TestPathOfTheBlockIsConfigurable(t *testing.T) {
	p := start(t, portal.Config{Path: "services.kitchen.security"})
	a := get(t, p, "s1", "Bearer "+p.Token(), "")
	if !strings.Contains(a.body, `"services":{"kitchen":{"security":{"encryption":true`) {
		t.Errorf("block is not at the path")
	}
}

func TestCredentialsOnDiskAreForTheOwnerOnly(t *testing.T) {
	p := start(t, portal.Config{})
	ca, tok, secret, err := p.WriteCredentials(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{tok, secret} {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v, want 0600", f, info.Mode())
		}
	}
	if b, err := os.ReadFile(ca); err != nil || string(b) != string(p.CAPEM()) {
		t.Errorf("CA file differs from CAPEM: %v", err)
	}
}

func TestStartRefusesContradictions(t *testing.T) {
	sites := map[string]portal.SiteConfig{"s": {}}
	for name, cfg := range map[string]portal.Config{
		"no sites":                 {},
		"key id without secret":    {Sites: sites, KeyID: "id"},
		"overlap without rotation": {Sites: sites, Overlap: time.Second},
		"overlap with validity":    {Sites: sites, Overlap: time.Second, RotateEvery: time.Second, Validity: time.Second},
		"negative":                 {Sites: sites, RotateEvery: -1},
		"no such address":          {Sites: sites, Listen: "256.0.0.1:0"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := portal.Start(cfg)
			if err == nil {
				p.Close()
				t.Fatal("started")
			}
		})
	}
}

func TestCloseTwiceIsOnce(t *testing.T) {
	p := start(t, portal.Config{})
	p.Close()
	p.Close()
	if err := p.Up(); err != nil || len(p.Keys("s1")) == 0 {
		t.Errorf("after Close: Up %v", err)
	}
}

// wait polls until ok holds, for at most five seconds.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(5 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("gave up waiting for %s", what)
		}
	}
}
