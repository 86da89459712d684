package door_test

import (
	"context"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

const (
	tokenOne  = "one-6f0d6c2e9b7a4f0c8d55"
	tokenTwo  = "two-1c9e7a3b5d8f4e2a9b60"
	tokenWeak = "unknown-7d3f5a9c1e4b8d60"
)

// fingerprints of the site "one", by what they are for.
const (
	fpCurrent = "5d41402abc4b2a76b9719d911017c592" // valid now
	fpSkewed  = "7d793037a0760186574b0282f2f435e7" // ended a minute ago
	fpEnded   = "9bf31c7ff062936a96d3c8bd1f8f2ff3" // ended an hour ago
	fpSoon    = "6f4922f45568161a8cdf4ad2299f6d23" // begins in a minute
	fpFuture  = "1f0e3dad99908345f7439f8ffabdffc4" // begins in an hour
	fpNew     = "98f13708210194c475687be6106a3b84" // the Portal has it, the site not yet
	fpUnknown = "3c59dc048e8850243be8079a5c74d079" // nobody has it
)

var (
	ivGood = base64.StdEncoding.EncodeToString(make([]byte, 12))
	ivLong = base64.StdEncoding.EncodeToString(make([]byte, 16))
)

// portal stands for keysync: what it holds now, and what a refresh brings.
type portal struct {
	sites     map[string]*keysync.Site
	refresh   func(p *portal, site, fingerprint string) error
	refreshed []string
}

func (p *portal) Site(name string) *keysync.Site { return p.sites[name] }

func (p *portal) RefreshFor(_ context.Context, site, fingerprint string) error {
	p.refreshed = append(p.refreshed, site+" "+fingerprint)
	return p.refresh(p, site, fingerprint)
}

func stillUnknown(*portal, string, string) error { return keysync.ErrStillUnknown }

func encrypted(t *testing.T, name string, fingerprints ...string) *keysync.Site {
	t.Helper()
	settings := envelope.Settings{Profile: "a256gcm", Iterations: 1}
	now := time.Now()
	var keys []*envelope.Key
	for _, fp := range fingerprints {
		c := envelope.KeyConfig{Fingerprint: fp, Passphrase: "correct horse " + envelope.Secret(fp), ValidAfter: now.Add(-time.Hour), ValidUntil: now.Add(time.Hour)}
		switch fp {
		case fpSkewed:
			c.ValidUntil = now.Add(-time.Minute)
		case fpEnded:
			c.ValidAfter, c.ValidUntil = now.Add(-2*time.Hour), now.Add(-time.Hour)
		case fpSoon:
			c.ValidAfter = now.Add(time.Minute)
		case fpFuture:
			c.ValidAfter, c.ValidUntil = now.Add(time.Hour), now.Add(2*time.Hour)
		}
		key, err := envelope.NewKey(settings, c)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	ring, err := envelope.NewKeyring(settings, keys...)
	if err != nil {
		t.Fatal(err)
	}
	return &keysync.Site{Name: name, Settings: settings, Fetched: now, Encryption: true, Keyring: ring}
}

func sitesUnderTest() map[string]door.SiteConfig {
	yes, no := true, false
	token := func(name, token string) []door.TokenConfig {
		return []door.TokenConfig{{Name: name, SHA256: door.TokenSHA256(token)}}
	}
	return map[string]door.SiteConfig{
		"one":      {Tokens: token("till-1", tokenOne)},
		"two":      {Authorization: "required", Tokens: token("till-2", tokenTwo)},
		"open":     {Authorization: "none", AllowInsecure: true},
		"opened":   {Authorization: "none", AllowInsecure: true, AcceptPlain: &yes},
		"local":    {Authorization: "none"},
		"strict":   {AcceptPlain: &no, Tokens: token("till-3", "strict-0c4f7b2d6a9e5183")},
		"clear":    {Tokens: token("till-4", "clear-4b8d2f6a0c9e7135")},
		"unread":   {Tokens: token("till-5", "unread-a1b2c3d4e5f60718")},
		"unsynced": {Tokens: token("till-6", "unsynced-91827364554637")},
		"shouting": {Tokens: []door.TokenConfig{{Name: "till-7", SHA256: strings.ToUpper(door.TokenSHA256("shouting-5566778899aa"))}}},
	}
}

func portalUnderTest(t *testing.T) *portal {
	return &portal{
		sites: map[string]*keysync.Site{
			"one":      encrypted(t, "one", fpCurrent, fpSkewed, fpEnded, fpSoon, fpFuture),
			"two":      encrypted(t, "two", fpCurrent),
			"open":     encrypted(t, "open", fpCurrent),
			"opened":   encrypted(t, "opened", fpCurrent),
			"local":    encrypted(t, "local", fpCurrent),
			"strict":   encrypted(t, "strict", fpCurrent),
			"clear":    {Name: "clear", Fetched: time.Now()},
			"unread":   {Name: "unread"},
			"shouting": encrypted(t, "shouting", fpCurrent),
		},
		refresh: stillUnknown,
	}
}

func TestAdmit(t *testing.T) {
	both := func(iv, fp string) http.Header { return http.Header{"Sec-Iv": {iv}, "Sec-Fingerprint": {fp}} }
	auth := func(h http.Header, values ...string) http.Header {
		if h == nil {
			h = http.Header{}
		}
		h["Authorization"] = values
		return h
	}
	const bearerOne, bearerTwo = "Bearer " + tokenOne, "Bearer " + tokenTwo
	bringsNew := func(p *portal, site, _ string) error {
		p.sites[site] = encrypted(t, site, fpCurrent, fpNew)
		return nil
	}
	portalAway := func(*portal, string, string) error { return errors.New("portal: connection refused") }

	for _, tc := range []struct {
		name     string
		path     string
		loopback bool
		header   http.Header
		refresh  func(*portal, string, string) error

		want      string // Refusal.Reason(), "" = admitted
		site, who string
		plain     bool
		refreshes int
	}{
		// 1. Authorization.
		{name: "bearer token", path: "one", header: auth(both(ivGood, fpCurrent), bearerOne), site: "one", who: "till-1"},
		{name: "scheme in any case", path: "one", header: auth(both(ivGood, fpCurrent), "bEARER "+tokenOne), site: "one", who: "till-1"},
		{name: "several spaces after the scheme", path: "one", header: auth(both(ivGood, fpCurrent), "Bearer   "+tokenOne), site: "one", who: "till-1"},
		{name: "bare token", path: "one", header: auth(both(ivGood, fpCurrent), tokenOne), site: "one", who: "till-1"},
		{name: "hash configured in capitals", path: "shouting", header: auth(both(ivGood, fpCurrent), "Bearer shouting-5566778899aa"), site: "shouting", who: "till-7"},
		{name: "authorization missing under required", path: "one", header: both(ivGood, fpCurrent), want: "400/1"},
		{name: "authorization empty", path: "one", header: auth(both(ivGood, fpCurrent), ""), want: "400/1"},
		{name: "authorization is the scheme alone", path: "one", header: auth(both(ivGood, fpCurrent), "Bearer "), want: "400/1"},
		{name: "authorization missing where the token names the site", header: both(ivGood, fpCurrent), want: "400/1"},
		{name: "authorization missing where encryption is off", path: "clear", want: "400/1"},
		{name: "several authorization headers, one of them right", path: "one", header: auth(both(ivGood, fpCurrent), bearerOne, "Bearer "+tokenWeak), want: "400/1"},
		{name: "the same authorization header twice", path: "one", header: auth(both(ivGood, fpCurrent), bearerOne, bearerOne), want: "400/1"},
		{name: "wrong token", path: "one", header: auth(both(ivGood, fpCurrent), "Bearer "+tokenWeak), want: "401"},
		{name: "wrong token where the token names the site", header: auth(both(ivGood, fpCurrent), "Bearer "+tokenWeak), want: "401"},
		{name: "another scheme", path: "one", header: auth(both(ivGood, fpCurrent), "Basic "+tokenOne), want: "401"},
		{name: "the hash instead of the token", path: "one", header: auth(both(ivGood, fpCurrent), "Bearer "+door.TokenSHA256(tokenOne)), want: "401"},
		{name: "a fingerprint is no authorization", path: "one", header: auth(both(ivGood, fpCurrent), "Bearer "+fpCurrent), want: "401"},
		{name: "wrong token comes before wrong headers", path: "one", header: auth(both("?", "kb:b1"), "Bearer "+tokenWeak), want: "401"},
		{name: "authorization comes before keys never fetched", path: "unread", header: http.Header{}, want: "400/1"},

		// 2. Site.
		{name: "site from the token alone", header: auth(both(ivGood, fpCurrent), bearerTwo), site: "two", who: "till-2"},
		{name: "another site's token", path: "one", header: auth(both(ivGood, fpCurrent), bearerTwo), want: "403"},
		{name: "another site's token comes before wrong headers", path: "one", header: auth(nil, bearerTwo), want: "403"},
		{name: "another site's token where nothing is asked for", path: "open", header: auth(both(ivGood, fpCurrent), bearerTwo), want: "403"},
		{name: "a token, and a path that names no site", path: "nowhere", header: auth(both(ivGood, fpCurrent), bearerOne), want: "403"},
		{name: "no token, and a path that names no site", path: "nowhere", header: both(ivGood, fpCurrent), want: "404"},
		{name: "wrong token, and a path that names no site", path: "nowhere", header: auth(nil, "Bearer "+tokenWeak), want: "401"},
		{name: "nothing asked for: site from path or listener", path: "open", header: both(ivGood, fpCurrent), site: "open"},
		{name: "nothing asked for: a stranger's credential is not judged", path: "open", header: auth(both(ivGood, fpCurrent), "Basic Zm9vOmJhcg=="), site: "open"},
		{name: "nothing asked for, beyond loopback, not allowed", path: "local", header: both(ivGood, fpCurrent), want: "403"},
		{name: "nothing asked for, on loopback", path: "local", loopback: true, header: both(ivGood, fpCurrent), site: "local"},

		// 3. Security headers, encryption on.
		{name: "neither header, required: plain", path: "one", header: auth(nil, bearerOne), site: "one", who: "till-1", plain: true},
		{name: "neither header, plain not accepted", path: "strict", header: auth(nil, "Bearer strict-0c4f7b2d6a9e5183"), want: "400/1"},
		{name: "neither header, none beyond loopback", path: "open", want: "400/1"},
		{name: "neither header, none on loopback: plain", path: "open", loopback: true, site: "open", plain: true},
		{name: "neither header, none beyond loopback, accept_plain", path: "opened", site: "opened", plain: true},
		{name: "empty headers are missing ones", path: "one", header: auth(both("", " "), bearerOne), site: "one", who: "till-1", plain: true},
		{name: "iv only", path: "one", header: auth(http.Header{"Sec-Iv": {ivGood}}, bearerOne), want: "400/1"},
		{name: "fingerprint only", path: "one", header: auth(http.Header{"Sec-Fingerprint": {fpCurrent}}, bearerOne), want: "400/1"},
		{name: "iv only, none", path: "open", header: http.Header{"Sec-Iv": {ivGood}}, want: "400/1"},
		{name: "two ivs", path: "one", header: auth(http.Header{"Sec-Iv": {ivGood, ivGood}, "Sec-Fingerprint": {fpCurrent}}, bearerOne), want: "400/1"},
		{name: "two fingerprints", path: "one", header: auth(http.Header{"Sec-Iv": {ivGood}, "Sec-Fingerprint": {fpCurrent, fpCurrent}}, bearerOne), want: "400/1"},
		{name: "two ivs and no fingerprint are not plain", path: "one", header: auth(http.Header{"Sec-Iv": {ivGood, ivGood}}, bearerOne), want: "400/1"},
		{name: "iv in another encoding", path: "one", header: auth(both("000000000000000000000000", fpCurrent), bearerOne), want: "400/2"},
		{name: "iv of the other profile's length", path: "one", header: auth(both(ivLong, fpCurrent), bearerOne), want: "400/2"},
		{name: "iv comes before the fingerprint, and costs no refresh", path: "one", header: auth(both("?", fpUnknown), bearerOne), want: "400/2"},
		{name: "reserved fingerprint, and costs no refresh", path: "one", header: auth(both(ivGood, "kb:b1"), bearerOne), want: "400/3"},
		{name: "fingerprint unknown after one refresh", path: "one", header: auth(both(ivGood, fpUnknown), bearerOne), want: "400/3", refreshes: 1},
		{name: "fingerprint known after one refresh", path: "one", header: auth(both(ivGood, fpNew), bearerOne), refresh: bringsNew, site: "one", who: "till-1", refreshes: 1},
		{name: "refresh brings other keys", path: "one", header: auth(both(ivGood, fpUnknown), bearerOne), refresh: bringsNew, want: "400/3", refreshes: 1},
		{name: "refresh switches encryption off", path: "one", header: auth(both(ivGood, fpUnknown), bearerOne), want: "400/3", refreshes: 1,
			refresh: func(p *portal, site, _ string) error {
				p.sites[site] = &keysync.Site{Name: site, Fetched: time.Now()}
				return nil
			}},
		{name: "fingerprint unknown while the Portal is away", path: "one", header: auth(both(ivGood, fpUnknown), bearerOne), refresh: portalAway, want: "503", refreshes: 1},
		{name: "key ended a moment ago: inside the skew", path: "one", header: auth(both(ivGood, fpSkewed), bearerOne), site: "one", who: "till-1"},
		{name: "key begins in a moment: inside the skew", path: "one", header: auth(both(ivGood, fpSoon), bearerOne), site: "one", who: "till-1"},
		{name: "key ended", path: "one", header: auth(both(ivGood, fpEnded), bearerOne), want: "400/3", refreshes: 1},
		{name: "key ended, and the Portal is away", path: "one", header: auth(both(ivGood, fpEnded), bearerOne), refresh: portalAway, want: "400/3", refreshes: 1},
		{name: "key not begun", path: "one", header: auth(both(ivGood, fpFuture), bearerOne), want: "400/3", refreshes: 1},
		{name: "key of another site", path: "two", header: auth(both(ivGood, fpSkewed), bearerTwo), want: "400/3", refreshes: 1},

		// Encryption off.
		{name: "encryption off, neither header", path: "clear", header: auth(nil, "Bearer clear-4b8d2f6a0c9e7135"), site: "clear", who: "till-4", plain: true},
		{name: "encryption off, both headers", path: "clear", header: auth(both(ivGood, fpCurrent), "Bearer clear-4b8d2f6a0c9e7135"), want: "400/3"},
		{name: "encryption off, one header", path: "clear", header: auth(http.Header{"Sec-Iv": {ivGood}}, "Bearer clear-4b8d2f6a0c9e7135"), want: "400/3"},

		// Nothing known of the site.
		{name: "keys never fetched", path: "unread", header: auth(both(ivGood, fpCurrent), "Bearer unread-a1b2c3d4e5f60718"), want: "503"},
		{name: "keys never fetched, plain", path: "unread", header: auth(nil, "Bearer unread-a1b2c3d4e5f60718"), want: "503"},
		{name: "site not known to keysync", path: "unsynced", header: auth(nil, "Bearer unsynced-91827364554637"), want: "503"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			keys := portalUnderTest(t)
			if tc.refresh != nil {
				keys.refresh = tc.refresh
			}
			d, err := door.New(sitesUnderTest(), keys)
			if err != nil {
				t.Fatal(err)
			}
			r := httptest.NewRequest(http.MethodPost, "/order", strings.NewReader("the body"))
			for k, v := range tc.header {
				r.Header[k] = slices.Clone(v)
			}
			v, refusal := d.Admit(r, tc.path, tc.loopback)
			if got := len(keys.refreshed); got != tc.refreshes {
				t.Errorf("%d refreshes, want %d", got, tc.refreshes)
			}
			if body, _ := io.ReadAll(r.Body); string(body) != "the body" {
				t.Errorf("the body was read: %q is left", body)
			}
			if tc.want != "" {
				if refusal == nil {
					t.Fatalf("admitted as %s %q, want %s", v.Site, v.Who, tc.want)
				}
				if refusal.Reason() != tc.want {
					t.Fatalf("refused with %s (%s), want %s", refusal.Reason(), refusal.Detail, tc.want)
				}
				if tc.want == "503" && refusal.RetryAfter <= 0 {
					t.Error("503 without Retry-After")
				}
				return
			}
			if refusal != nil {
				t.Fatalf("refused with %s (%s), want admitted", refusal.Reason(), refusal.Detail)
			}
			want := door.Visitor{Site: tc.site, Who: tc.who, Plain: tc.plain, Keys: keys.sites[tc.site]}
			if !tc.plain {
				want.IV, want.Fingerprint = []byte(tc.header.Get("Sec-Iv")), []byte(tc.header.Get("Sec-Fingerprint"))
			}
			if v.Keys != want.Keys {
				t.Error("the visitor does not hold the keys it was checked against")
			}
			v.Keys, want.Keys = nil, nil
			if diff := cmp.Diff(want, v); diff != "" {
				t.Errorf("visitor (-want +got):\n%s", diff)
			}
		})
	}
}

func TestARefreshIsAskedForTheVisitorsSite(t *testing.T) {
	keys := portalUnderTest(t)
	d, err := door.New(sitesUnderTest(), keys)
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodPost, "/order", nil)
	r.Header = http.Header{"Authorization": {tokenTwo}, "Sec-Iv": {ivGood}, "Sec-Fingerprint": {fpUnknown}}
	d.Admit(r, "", false)
	if want := []string{"two " + fpUnknown}; !slices.Equal(keys.refreshed, want) {
		t.Errorf("refreshed %q, want %q", keys.refreshed, want)
	}
}

func TestRefusalWrite(t *testing.T) {
	for _, tc := range []struct {
		name    string
		refusal *door.Refusal
		status  int
		header  http.Header
		body    string
	}{
		{"seed's first", door.Incorrect, 400, http.Header{"Content-Type": {"application/json"}},
			`{"errorCode":1,"message":"Incorrect security headers"}`},
		{"seed's second", door.Undecryptable, 400, http.Header{"Content-Type": {"application/json"}},
			`{"errorCode":2,"message":"Unable to decrypt payload"}`},
		{"the Kitchen API's third", door.Mismatch, 400, http.Header{"Content-Type": {"application/json"}},
			`{"errorCode":3,"message":"Security credential mismatch"}`},
		{"problem", door.Problem(404, "", "No such site."), 404, http.Header{"Content-Type": {"application/problem+json"}},
			`{"type":"about:blank","title":"Not Found","status":404,"detail":"No such site."}`},
		{"problem with its own title", door.Problem(422, "Key used for another body", ""), 422, http.Header{"Content-Type": {"application/problem+json"}},
			`{"type":"about:blank","title":"Key used for another body","status":422}`},
		{"401 says how to authenticate", door.Problem(401, "", "Unknown."), 401, http.Header{"Www-Authenticate": {"Bearer"}},
			`{"type":"about:blank","title":"Unauthorized","status":401,"detail":"Unknown."}`},
		{"extension members, sorted, and none that replaces a member",
			&door.Refusal{Status: 502, Type: "/docs/spec/ingest.md#kitchen", Ext: map[string]any{"reason": "refused", "kitchen_status": 422, "status": 200, "title": "fine"}},
			502, nil, `{"type":"/docs/spec/ingest.md#kitchen","title":"Bad Gateway","status":502,"kitchen_status":422,"reason":"refused"}`},
		{"an extension member that is no JSON becomes text", &door.Refusal{Status: 500, Ext: map[string]any{"f": complex(1, 2)}},
			500, nil, `{"type":"about:blank","title":"Internal Server Error","status":500,"f":"(1+2i)"}`},
		{"part of a second is a whole one", &door.Refusal{Status: 503, RetryAfter: time.Millisecond}, 503, http.Header{"Retry-After": {"1"}},
			`{"type":"about:blank","title":"Service Unavailable","status":503}`},
		{"seconds are rounded up", &door.Refusal{Status: 503, RetryAfter: 2100 * time.Millisecond}, 503, http.Header{"Retry-After": {"3"}},
			`{"type":"about:blank","title":"Service Unavailable","status":503}`},
		{"the seed's body can ask for patience", &door.Refusal{Status: 400, ErrorCode: 3, Title: "Security credential mismatch", RetryAfter: time.Second}, 400,
			http.Header{"Retry-After": {"1"}}, `{"errorCode":3,"message":"Security credential mismatch"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			tc.refusal.Write(w)
			if w.Code != tc.status {
				t.Errorf("status %d, want %d", w.Code, tc.status)
			}
			if got := w.Body.String(); got != tc.body {
				t.Errorf("body\n%s, want\n%s", got, tc.body)
			}
			for name, want := range tc.header {
				if got := w.Header()[name]; !slices.Equal(got, want) {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if w.Header().Get("Cache-Control") != "no-store" {
				t.Error("a refusal may be cached")
			}
			if tc.status != 401 && w.Header().Get("WWW-Authenticate") != "" {
				t.Error("WWW-Authenticate without 401")
			}
		})
	}
}

func TestNoRefusalRepeatsWhatTheVisitorSent(t *testing.T) {
	keys := portalUnderTest(t)
	d, err := door.New(sitesUnderTest(), keys)
	if err != nil {
		t.Fatal(err)
	}
	refused := 0
	for _, auth := range []string{"", tokenOne, tokenTwo, tokenWeak} {
		for _, path := range []string{"", "one", "nowhere", "unread", "clear"} {
			r := httptest.NewRequest(http.MethodPost, "/order", nil)
			r.Header = http.Header{"Authorization": {auth}, "Sec-Iv": {"visitors-iv"}, "Sec-Fingerprint": {fpUnknown}}
			_, refusal := d.Admit(r, path, false)
			if refusal == nil {
				continue
			}
			refused++
			w := httptest.NewRecorder()
			refusal.Write(w)
			for _, secret := range []string{tokenOne, tokenTwo, tokenWeak, "visitors-iv", fpUnknown} {
				if strings.Contains(w.Body.String(), secret) {
					t.Errorf("path %q: the answer repeats %q: %s", path, secret, w.Body)
				}
			}
		}
	}
	if refused < 10 {
		t.Errorf("only %d refusals were looked at", refused)
	}
}
