package keysync

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

// What every bad answer of the Portal ends in: an error with that reason, counted under
// it, and the keys that were there are still there (I9).
func TestBadAnswersKeepTheKeys(t *testing.T) {
	want := map[portal.Kind]reason{
		portal.Unauthorized:         unauthorized,
		portal.Forbidden:            forbidden,
		portal.NotFound:             notFound,
		portal.TooManyRequests:      rateLimited,
		portal.ServerError:          serverError,
		portal.Unavailable:          serverError,
		portal.SlowDrip:             timedOut,
		portal.Hang:                 timedOut,
		portal.HangUp:               cutOff,
		portal.CutOff:               cutOff,
		portal.Oversize:             tooLarge,
		portal.HTML:                 notJSON,
		portal.HTTPRedirect:         redirect,
		portal.HostRedirect:         redirect,
		portal.SameHostRedirect:     "", // followed: a good answer
		portal.TruncatedJSON:        notJSON,
		portal.NoBlock:              noBlock,
		portal.NoEncryption:         badBlock,
		portal.EncryptionText:       badBlock,
		portal.ThreeKeys:            tooManyKeys,
		portal.NoKeys:               noKeys,
		portal.EmptyKeys:            noKeys,
		portal.DuplicateFingerprint: duplicateFingerprint,
		portal.ReversedValidity:     badValidity,
		portal.NoZone:               badTime,
		portal.BadTime:              badTime,
		portal.BindingFingerprint:   badFingerprint,
		portal.EmptyPhrase:          badPhrase,
		portal.ShortPhrase:          badPhrase, // under hkdf, which this test uses
	}
	for _, kind := range portal.Kinds() {
		if _, ok := want[kind]; !ok {
			t.Errorf("no row for %s", kind)
		}
	}
	p := startPortal(t, "s1")
	for _, kind := range slices.Sorted(maps.Keys(want)) {
		t.Run(string(kind), func(t *testing.T) {
			cfg := against(t, p, "s1")
			cfg.Portal.MaxBytes = 64 << 10
			cfg.Sites["s1"] = envelope.Settings{Profile: envelope.A256GCM, KDF: "hkdf"}
			r := newRig(t, cfg)
			if err := r.Refresh(t.Context(), "s1"); err != nil {
				t.Fatal(err)
			}
			before := r.Site("s1")
			// A new key waits at the Portal, so that taking half of a bad answer would show.
			if _, err := p.Rotate("s1"); err != nil {
				t.Fatal(err)
			}
			if kind == portal.Hang || kind == portal.SlowDrip {
				cfg.Portal.Timeout = 200 * time.Millisecond
				hasty, err := newClient(cfg.Portal.withDefaults())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(hasty.http.CloseIdleConnections)
				r.get = hasty.get
			}
			p.SetFault("s1", portal.Fault{Kind: kind})
			defer p.SetFault("s1", portal.Fault{})
			forget(r, "s1")
			err := r.Refresh(t.Context(), "s1")
			if want[kind] == "" {
				if err != nil {
					t.Fatalf("%v, want a good answer", err)
				}
				return
			}
			if got := reasonOf(err); got != string(want[kind]) {
				t.Errorf("reason %s, want %s: %v", got, want[kind], err)
			}
			if after := r.Site("s1"); after != before || len(after.Keyring.Keys()) == 0 {
				t.Errorf("the site changed: %+v", after)
			}
			if got := r.fetches(t); got[string(changed)] != 1 || got[string(want[kind])] != 1 || len(got) != 2 {
				t.Errorf("counted %v, want one %s beside the first fetch", got, want[kind])
			}
			if p.Stats().Trapped != 0 {
				t.Error("a redirect was followed to where it must not lead")
			}
			p.SetFault("s1", portal.Fault{})
			forget(r, "s1")
			if err := r.Refresh(t.Context(), "s1"); err != nil {
				t.Errorf("after the fault: %v", err)
			}
			if got, want := len(r.Site("s1").Keyring.Keys()), 2; got != want {
				t.Errorf("after the fault: %d keys, want %d", got, want)
			}
		})
	}
}

// forget lets the next Refresh ask again at once.
func forget(r rig, site string) {
	st := r.sites[site]
	st.mu.Lock()
	defer st.mu.Unlock()
	st.demanded = time.Time{}
}

func TestConnectionRefusedAndUpAgain(t *testing.T) {
	p := startPortal(t, "s1")
	r := newRig(t, against(t, p, "s1"))
	if err := r.Refresh(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	before := r.Site("s1")
	p.Down()
	await(t, "connection refused", func() bool {
		forget(r, "s1")
		err := r.Refresh(t.Context(), "s1")
		// The first try may still meet the end of the old connection.
		if got := reasonOf(err); got != string(noConnection) && got != string(cutOff) {
			t.Fatalf("%v, want connection refused", err)
		}
		return strings.Contains(err.Error(), "connection refused")
	})
	if r.Site("s1") != before {
		t.Error("the site changed")
	}
	if err := p.Up(); err != nil {
		t.Fatal(err)
	}
	forget(r, "s1")
	if err := r.Refresh(t.Context(), "s1"); err != nil {
		t.Error(err)
	}
}

func TestCertificatesAreVerified(t *testing.T) {
	p, other := startPortal(t, "s1"), startPortal(t, "s1")
	for _, row := range []struct{ name, ca string }{{"no authority given", ""}, {"another authority", "other"}} {
		t.Run(row.name, func(t *testing.T) {
			cfg := against(t, p, "s1")
			cfg.Portal.CAFile = ""
			if row.ca != "" {
				cfg.Portal.CAFile = filepath.Join(t.TempDir(), "ca.pem")
				if err := other.WriteCAFile(cfg.Portal.CAFile); err != nil {
					t.Fatal(err)
				}
			}
			r := newRig(t, cfg)
			if err := r.Refresh(t.Context(), "s1"); reasonOf(err) != string(badTLS) || !strings.Contains(err.Error(), "ca_file") {
				t.Errorf("%v, want a refused certificate and what to do", err)
			}
			if p.Stats().Fetches != 0 {
				t.Error("the request, with its token, was sent all the same")
			}
		})
	}
}

func TestPlainHTTPBehindAnHTTPSAddress(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	cfg := against(t, startPortal(t, "s1"), "s1")
	cfg.Portal.URL = strings.Replace(srv.URL, "http://", "https://", 1)
	r := newRig(t, cfg)
	if err := r.Refresh(t.Context(), "s1"); reasonOf(err) != string(badTLS) {
		t.Errorf("%v, want the reason tls", err)
	}
}

func TestFetchRotationAndWithdrawal(t *testing.T) {
	p := startPortal(t, "s1")
	r := newRig(t, against(t, p, "s1"))
	never := r.Site("s1")
	if !never.Fetched.IsZero() || never.Encryption || never.Keyring == nil || len(never.Keyring.Keys()) != 0 || never.Settings != cheap {
		t.Errorf("before the first fetch: %+v", never)
	}
	if r.Site("nowhere") != nil {
		t.Error("a site that is not configured has a value")
	}

	fetch := func() *Site {
		t.Helper()
		forget(r, "s1")
		if err := r.Refresh(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		return r.Site("s1")
	}
	first := fetch()
	k1 := p.Keys("s1")[0]
	if !first.Encryption || !slices.Equal(fingerprints(first), []string{k1.Fingerprint}) {
		t.Fatalf("first fetch: encryption %v, keys %v", first.Encryption, fingerprints(first))
	}
	key1, _ := first.Keyring.Key([]byte(k1.Fingerprint))
	sealed, err := key1.Seal([]byte(`{"order":1}`))
	if err != nil {
		t.Fatal(err)
	}

	second := fetch()
	if second.Keyring != first.Keyring || !second.Fetched.After(first.Fetched) || second.Encryption != first.Encryption {
		t.Error("an unchanged document gave other keys")
	}
	if p.Stats().NotModified != 1 {
		t.Error("the second request was not conditional")
	}

	k2, err := p.Rotate("s1")
	if err != nil {
		t.Fatal(err)
	}
	third := fetch()
	same, _ := third.Keyring.Key([]byte(k1.Fingerprint))
	if same != key1 {
		t.Error("a key that stayed was made, and derived, again")
	}
	fresh, ok := third.Keyring.Key([]byte(k2.Fingerprint))
	if !ok {
		t.Fatal("the new key is missing")
	}
	if want := fresh.ValidAfter().Add(2 * r.poll); !fresh.SealFrom().Equal(want) {
		t.Errorf("the new key is sealed with from %v, want %v", fresh.SealFrom(), want)
	}
	if primary, err := third.Keyring.Primary(time.Now()); err != nil || primary != key1 {
		t.Errorf("primary is %v, want the older key: %v", primary, err)
	}
	if len(first.Keyring.Keys()) != 1 {
		t.Error("a value handed out before was changed")
	}

	if _, err := p.Rotate("s1"); err != nil {
		t.Fatal(err)
	}
	fourth := fetch()
	if _, has := fourth.Keyring.Key([]byte(k1.Fingerprint)); has {
		t.Error("a key that left the Portal is still accepted")
	}
	if plain, err := fourth.Recover(nil, sealed); err != nil || string(plain) != `{"order":1}` {
		t.Errorf("what was sealed with it is not recovered: %q %v", plain, err)
	}
	if _, err := first.Recover(nil, sealed); err != nil {
		t.Errorf("Recover with a current key: %v", err)
	}
	if _, err := never.Recover(nil, sealed); !errors.Is(err, envelope.ErrUnknownFingerprint) {
		t.Errorf("Recover without keys: %v, want ErrUnknownFingerprint", err)
	}
	if _, err := (&Site{Keyring: never.Keyring}).Recover(nil, sealed); !errors.Is(err, envelope.ErrUnknownFingerprint) {
		t.Errorf("Recover of a Site made by hand: %v", err)
	}
}

func TestEncryptionSwitched(t *testing.T) {
	p := startPortal(t, "s1")
	r := newRig(t, against(t, p, "s1"))
	fetch := func() *Site {
		t.Helper()
		forget(r, "s1")
		if err := r.Refresh(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		return r.Site("s1")
	}
	on := fetch()
	key := on.Keyring.Keys()[0]
	sealed, err := key.Seal([]byte(`{}`))
	if err != nil {
		t.Fatal(err)
	}
	r.log.clear()
	if err := p.SetEncryption("s1", false); err != nil {
		t.Fatal(err)
	}
	off := fetch()
	if off.Encryption || len(off.Keyring.Keys()) != 0 || off.Fetched.IsZero() {
		t.Errorf("switched off: %+v", off)
	}
	if got := r.log.lines(t); !slices.Contains(got, "WARN encryption of the site was switched off on the portal") {
		t.Errorf("logged %v, want a loud warning", got)
	}
	if _, err := off.Recover(nil, sealed); err != nil {
		t.Errorf("what was sealed before is not recovered: %v", err)
	}
	if err := p.SetEncryption("s1", true); err != nil {
		t.Fatal(err)
	}
	again := fetch()
	if back, ok := again.Keyring.Key([]byte(key.Fingerprint())); !again.Encryption || !ok || back != key {
		t.Error("switched on again: the same key is not the same, derived, one")
	}
	if len(again.retired.Keys()) != 0 {
		t.Error("a key that came back is still counted as retired")
	}
}

// No message pays for a derivation: it is done when the key is put in place.
func TestNewKeyIsDerivedBeforeItIsInPlace(t *testing.T) {
	f := newFakePortal()
	r := fakeRig(t, f, 0, "s1")
	slow := envelope.Settings{Profile: envelope.A256GCM, Iterations: 300_000}
	empty, err := envelope.NewKeyring(slow)
	if err != nil {
		t.Fatal(err)
	}
	r.sites["s1"].settings = slow
	r.sites["s1"].now.Store(&Site{Name: "s1", Settings: slow, Keyring: empty, retired: empty})
	f.set("s1", siteObject(true, lasting("f1"), lasting("f2")))
	begin := time.Now()
	if err := r.Refresh(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	refresh := time.Since(begin)
	begin = time.Now()
	for _, k := range r.Site("s1").Keyring.Keys() {
		if _, err := k.Seal([]byte(`{}`)); err != nil {
			t.Fatal(err)
		}
	}
	if seals := time.Since(begin); seals > refresh/4 {
		t.Errorf("the first seals took %v, the refresh %v: the keys were derived late", seals, refresh)
	}
}

// The Portal need not know ETags; and something else in the object may change.
func TestUnchangedWithoutETag(t *testing.T) {
	f := newFakePortal()
	r := fakeRig(t, f, 0, "s1")
	doc := siteObject(true, lasting("f1"))
	f.set("s1", doc)
	for range 2 {
		forget(r, "s1")
		if err := r.Refresh(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
	}
	ring := r.Site("s1").Keyring
	f.set("s1", []byte(strings.Replace(string(doc), "a store", "a shop", 1)))
	forget(r, "s1")
	if err := r.Refresh(t.Context(), "s1"); err != nil {
		t.Fatal(err)
	}
	if r.Site("s1").Keyring != ring {
		t.Error("a change elsewhere in the object gave a new keyring")
	}
	if got := r.fetches(t); got["changed"] != 1 || got["unchanged"] != 2 {
		t.Errorf("counted %v", got)
	}
}

// A phrase that changes under the same fingerprint is a new key.
func TestSameFingerprintOtherPhrase(t *testing.T) {
	f := newFakePortal()
	r := fakeRig(t, f, 0, "s1")
	doc := string(siteObject(true, lasting("f1")))
	for _, phrase := range []string{"phrase of f1", "another phrase"} {
		f.set("s1", []byte(strings.Replace(doc, "phrase of f1", phrase, 1)))
		forget(r, "s1")
		if err := r.Refresh(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
		k, err := envelope.NewKey(cheap, envelope.KeyConfig{Fingerprint: "f1", Passphrase: envelope.Secret(phrase), ValidUntil: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := k.Seal([]byte(`{}`))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Site("s1").Keyring.Open(nil, sealed); err != nil {
			t.Errorf("%s: %v", phrase, err)
		}
	}
}

func TestRetiredKeysAreBounded(t *testing.T) {
	f := newFakePortal()
	r := fakeRig(t, f, 0, "s1")
	for i := range 2*maxRetired + 2 {
		f.set("s1", siteObject(true, lasting("f"+string(rune('a'+i%26))+string(rune('a'+i/26)))))
		forget(r, "s1")
		if err := r.Refresh(t.Context(), "s1"); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(r.Site("s1").retired.Keys()); got != maxRetired {
		t.Errorf("%d retired keys, want the newest %d", got, maxRetired)
	}
}

func issuedBy(t *testing.T, p *portal.Portal, sites ...string) Config {
	t.Helper()
	ca, _, secret, err := p.WriteCredentials(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	id, _ := p.Credentials()
	return Config{Portal: PortalConfig{URL: p.URL(), TokenURL: p.URL(), KeyID: id, SecretKeyFile: secret, CAFile: ca}, Sites: settingsOf(sites...)}
}

func TestIssuedTokenIsKeptAndReplacedOnceAfter401(t *testing.T) {
	p := startPortal(t, "s1", "s2")
	r := newRig(t, issuedBy(t, p, "s1", "s2"))
	refresh := func(site string) error {
		t.Helper()
		forget(r, site)
		return r.Refresh(t.Context(), site)
	}
	var wg sync.WaitGroup
	for _, site := range []string{"s1", "s2"} {
		wg.Go(func() {
			if err := r.Refresh(t.Context(), site); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for range 3 {
		if err := refresh("s1"); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.Stats().Tokens; got != 1 {
		t.Errorf("%d tokens issued, want one for all requests", got)
	}

	p.RevokeTokens()
	if err := refresh("s1"); err != nil {
		t.Errorf("after the token ended early: %v", err)
	}
	if got := p.Stats(); got.Tokens != 2 || got.Denied != 1 {
		t.Errorf("%+v, want one 401 and one more token (a quoted one)", got)
	}

	// A site that gets 401 with every token does not have a token issued at each poll.
	p.SetFault("s2", portal.Fault{Kind: portal.Unauthorized})
	for range 5 {
		if err := refresh("s2"); reasonOf(err) != string(unauthorized) {
			t.Errorf("%v, want unauthorized", err)
		}
	}
	if got := p.Stats().Tokens; got != 2 {
		t.Errorf("%d tokens issued, want still 2", got)
	}
	if err := refresh("s1"); err != nil {
		t.Errorf("the other site suffers: %v", err)
	}
}

func TestTokenEndpointFails(t *testing.T) {
	for _, row := range []struct {
		kind portal.Kind
		text string
	}{
		{portal.Unauthorized, "401"}, {portal.ServerError, "500"}, {portal.HTML, "not a bare or quoted token"},
		{portal.Oversize, "longer than"}, {portal.HTTPRedirect, "not followed"}, {portal.HostRedirect, "not followed"},
		{portal.SameHostRedirect, "not followed"}, {portal.HangUp, "connection ended"},
	} {
		t.Run(string(row.kind), func(t *testing.T) {
			p := startPortal(t, "s1")
			p.SetFault(portal.TokenEndpoint, portal.Fault{Kind: row.kind})
			r := newRig(t, issuedBy(t, p, "s1"))
			for range 3 {
				forget(r, "s1")
				if err := r.Refresh(t.Context(), "s1"); reasonOf(err) != string(tokenFailed) || !strings.Contains(err.Error(), row.text) {
					t.Errorf("%v, want reason token and %q", err, row.text)
				}
			}
			if got := p.Stats(); got.Trapped != 0 || got.Fetches != 0 {
				t.Errorf("%+v: credentials went astray, or a site was asked for without a token", got)
			}
		})
	}
}

// Credentials that are refused are not tried again for each site and poll.
func TestTokenEndpointIsAskedWithBackoff(t *testing.T) {
	p := startPortal(t, "s1")
	cfg := issuedBy(t, p, "s1")
	cfg.Portal.KeyID = "somebody else"
	r := newRig(t, cfg)
	for range 20 {
		forget(r, "s1")
		if err := r.Refresh(t.Context(), "s1"); reasonOf(err) != string(tokenFailed) {
			t.Errorf("%v, want reason token", err)
		}
	}
	if got := p.Stats().Denied; got >= 10 {
		t.Errorf("the token endpoint was asked %d times for 20 requests", got)
	}
}

func TestTokenFileIsReadAgainAfter401(t *testing.T) {
	p := startPortal(t, "s1")
	cfg := against(t, p, "s1")
	if err := os.WriteFile(cfg.Portal.TokenFile, []byte("yesterday's\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, cfg)
	if err := r.Refresh(t.Context(), "s1"); reasonOf(err) != string(unauthorized) {
		t.Errorf("%v, want unauthorized", err)
	}
	if got := p.Stats().Denied; got != 1 {
		t.Errorf("asked %d times with the same token, want once", got)
	}
	if err := os.WriteFile(cfg.Portal.TokenFile, []byte(p.Token()), 0o600); err != nil {
		t.Fatal(err)
	}
	forget(r, "s1")
	if err := r.Refresh(t.Context(), "s1"); err != nil {
		t.Errorf("with the new token in the file: %v", err)
	}
}

func TestAuthorizationHeader(t *testing.T) {
	for scheme, want := range map[string]string{"": "Bearer tok", "Token": "Token tok", "none": "tok"} {
		t.Run("scheme "+scheme, func(t *testing.T) {
			var got http.Header
			var path string
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got, path = r.Header.Clone(), r.URL.Path
				w.Write(siteObject(false))
			}))
			defer srv.Close()
			token := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(token, []byte(" tok\n"), 0o400); err != nil {
				t.Fatal(err)
			}
			r := newRig(t, Config{Portal: PortalConfig{URL: srv.URL + "/api/", TokenFile: token, AuthScheme: scheme}, Sites: settingsOf("s1")})
			if err := r.Refresh(t.Context(), "s1"); err != nil {
				t.Fatal(err)
			}
			if got.Get("Authorization") != want || path != "/api/sites/s1" {
				t.Errorf("Authorization %q at %s, want %q at /api/sites/s1", got.Get("Authorization"), path, want)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	for _, row := range []struct {
		name, text, date string
		want             time.Duration
	}{
		{name: "absent"},
		{name: "seconds", text: "7", want: 7 * time.Second},
		{name: "zero", text: "0"},
		{name: "negative", text: "-7"},
		{name: "no number", text: "soon"},
		{name: "too long", text: "999999", want: time.Hour},
		{name: "far too long", text: "99999999999999999999"},
		{name: "date", text: "Thu, 01 Jan 2026 12:00:30 GMT", want: 30 * time.Second},
		{name: "date, by the Portal's own clock", text: "Thu, 01 Jan 2026 11:00:30 GMT", date: "Thu, 01 Jan 2026 11:00:00 GMT", want: 30 * time.Second},
		{name: "past date", text: "Thu, 01 Jan 2026 11:00:30 GMT"},
		{name: "date too far", text: "Fri, 02 Jan 2026 12:00:00 GMT", want: time.Hour},
	} {
		t.Run(row.name, func(t *testing.T) {
			h := http.Header{}
			h.Set("Retry-After", row.text)
			h.Set("Date", row.date)
			if got := retryAfter(h, now); got != row.want {
				t.Errorf("%v, want %v", got, row.want)
			}
		})
	}
}

func TestRetryAfterReachesTheCaller(t *testing.T) {
	p := startPortal(t, "s1", "s2")
	for _, row := range []struct {
		kind portal.Kind
		held bool // the whole Portal is left alone
	}{{portal.TooManyRequests, true}, {portal.Unavailable, false}} {
		t.Run(string(row.kind), func(t *testing.T) {
			r := newRig(t, against(t, p, "s1", "s2"))
			p.SetFault("s1", portal.Fault{Kind: row.kind, RetryAfter: "30"})
			defer p.SetFault("s1", portal.Fault{})
			err := r.Refresh(t.Context(), "s1")
			if bad, ok := errors.AsType[*fetchError](err); !ok || bad.retryAfter != 30*time.Second {
				t.Errorf("%v carries no Retry-After", err)
			}
			asked := p.Stats().Fetches
			err = r.Refresh(t.Context(), "s2")
			if row.held != (err != nil && p.Stats().Fetches == asked) {
				t.Errorf("the other site: %v, asked %d times", err, p.Stats().Fetches-asked)
			}
		})
	}
}

func TestCallersLeavingDoesNotEndTheFetch(t *testing.T) {
	p := startPortal(t, "s1")
	p.SetFault("s1", portal.Fault{Kind: portal.Hang})
	cfg := against(t, p, "s1")
	cfg.Portal.Timeout = 500 * time.Millisecond
	r := newRig(t, cfg)
	why := errors.New("the POS hung up")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error, 1)
	go func() { result <- r.Refresh(ctx, "s1") }()
	await(t, "the request", func() bool { return p.Fetches("s1") == 1 })
	cancel(why)
	if err := <-result; !errors.Is(err, why) {
		t.Errorf("%v, want the cause", err)
	}
	if err := r.Refresh(t.Context(), "s1"); reasonOf(err) != string(timedOut) {
		t.Errorf("the next caller: %v, want the outcome of the fetch under way", err)
	}
	if got := p.Fetches("s1"); got != 1 {
		t.Errorf("%d requests, want one", got)
	}
}
