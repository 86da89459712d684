package kitchen

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quick = vendorcrypto.Profile{Cipher: "a256gcm", Iterations: 2}

var testKey = vendorcrypto.Key{Fingerprint: "fp-1", Passphrase: "phrase"}

func oneKey(string) (bool, []vendorcrypto.Key) { return true, []vendorcrypto.Key{testKey} }

// event is what a test sends; empty fields are left out.
type event struct {
	site, kind, key, edge string
	seq                   int
	body                  string // plain
	sealed                *triple
	header                http.Header // over everything else; an empty value removes
}

type triple struct{ iv, fingerprint, message string }

func seal(t *testing.T, p vendorcrypto.Profile, k vendorcrypto.Key, plain string) *triple {
	t.Helper()
	c, err := vendorcrypto.Derive(p, k.Passphrase)
	if err != nil {
		t.Fatal(err)
	}
	iv, message := c.Seal([]byte(plain))
	return &triple{iv, k.Fingerprint, message}
}

// sealUnder seals for the profile quick under an IV of the test's choice.
func sealUnder(t *testing.T, iv, plain string) *triple {
	t.Helper()
	key, err := pbkdf2.Key(sha256.New, string(testKey.Passphrase), nil, quick.Iterations, 32)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	return &triple{b64([]byte(iv)), testKey.Fingerprint, b64(gcm.Seal(nil, []byte(iv), []byte(plain), nil))}
}

func (e event) request(ctx context.Context, t *testing.T, url string) *http.Request {
	t.Helper()
	body := e.body
	h := http.Header{"Content-Type": {"application/json"}}
	if e.sealed != nil {
		body = e.sealed.message
		h.Set("Sec-Iv", e.sealed.iv)
		h.Set("Sec-Fingerprint", e.sealed.fingerprint)
	}
	if e.key != "" {
		h.Set("Idempotency-Key", e.key)
	}
	if e.edge != "" {
		h.Set("Kb-Edge", e.edge)
		h.Set("Kb-Seq", strconv.Itoa(e.seq))
	}
	for name, values := range e.header {
		if len(values) == 0 {
			h.Del(name)
		} else {
			h[name] = values
		}
	}
	kind := e.kind
	if kind == "" {
		kind = "order"
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/"+kind, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header = h
	return r
}

// still is a Kitchen without sockets: its handler is called directly, so that synctest can
// hold its clock.
func still(t *testing.T, cfg Config) *Kitchen {
	t.Helper()
	if cfg.Sites == nil {
		cfg.Sites = []string{"s1"}
	}
	k, err := newKitchen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (k *Kitchen) direct(ctx context.Context, t *testing.T, e event) *httptest.ResponseRecorder {
	t.Helper()
	site := e.site
	if site == "" {
		site = "s1"
	}
	w := httptest.NewRecorder()
	r := e.request(ctx, t, "/sites/"+site)
	k.handler(k.sites[site].door).ServeHTTP(w, r)
	return w
}

func (k *Kitchen) last() Record {
	l := k.Ledger()
	return l[len(l)-1]
}

func start(t *testing.T, cfg Config) *Kitchen {
	t.Helper()
	if cfg.Sites == nil {
		cfg.Sites = []string{"s1"}
	}
	k, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	})
	return k
}

func client(t *testing.T) *http.Client {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true} // a pooled connection would say "cut" where a new one says "refused"
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 5 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(5 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}

func TestDecryptsWhatNodeSealed(t *testing.T) {
	b, err := os.ReadFile("../vendorcrypto/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Name, Passphrase, IV, Message, Plain, Open string
		Profile                                    vendorcrypto.Profile
	}
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) < 15 {
		t.Fatalf("only %d vectors", len(vectors))
	}
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			k := still(t, Config{Profile: v.Profile, Keys: func(string) (bool, []vendorcrypto.Key) {
				return true, []vendorcrypto.Key{{Fingerprint: "node", Passphrase: vendorcrypto.Secret(v.Passphrase)}}
			}})
			w := k.direct(t.Context(), t, event{sealed: &triple{v.IV, "node", v.Message}})
			r := k.last()
			if v.Open == "ok" {
				if w.Code != 200 || r.OrderID != "o-1" || r.Version != 2 || r.PayloadHash != vendorcrypto.PayloadHash([]byte(v.Plain)) {
					t.Fatalf("%d %s; %+v", w.Code, w.Body, r)
				}
				return
			}
			if w.Code != 400 || w.Body.String() != `{"errorCode":2,"message":"Unable to decrypt payload"}` || r.Code != 2 || r.Delivered() {
				t.Fatalf("%d %s; %+v", w.Code, w.Body, r)
			}
			if n := k.Stats().DecryptErrors; n != 1 {
				t.Fatalf("%d decrypt errors counted", n)
			}
		})
	}
}

func TestAnswersErrorsExactlyAsTheProtocolSays(t *testing.T) {
	const (
		one   = `{"errorCode":1,"message":"Incorrect security headers"}`
		two   = `{"errorCode":2,"message":"Unable to decrypt payload"}`
		three = `{"errorCode":3,"message":"Security credential mismatch"}`
	)
	now := time.Now()
	keys := func(site string) (bool, []vendorcrypto.Key) {
		return site != "plain", []vendorcrypto.Key{
			testKey,
			{Fingerprint: "ended", Passphrase: "phrase", ValidUntil: now.Add(-time.Minute)},
			{Fingerprint: "future", Passphrase: "phrase", ValidAfter: now.Add(time.Hour)},
		}
	}
	good := seal(t, quick, testKey, `{"_id":"1"}`)
	with := func(fp string) *triple { return &triple{good.iv, fp, good.message} }
	auth := http.Header{"Authorization": {"Bearer right"}}
	set := func(name string, values ...string) http.Header {
		h := auth.Clone()
		h[name] = values
		return h
	}
	for _, row := range []struct {
		name   string
		old    bool
		event  event
		status int
		body   string // "" = not compared
	}{
		{"all is well", false, event{sealed: good, header: auth}, 200, ""},
		{"content-type with a charset", false, event{sealed: good, header: set("Content-Type", "application/json; charset=utf-8")}, 200, ""},
		{"no authorization", false, event{sealed: good}, 400, one},
		{"two authorizations", false, event{sealed: good, header: set("Authorization", "Bearer right", "Bearer right")}, 400, one},
		{"wrong token", false, event{sealed: good, header: set("Authorization", "Bearer wrong")}, 401, ""},
		{"bare token", false, event{sealed: good, header: set("Authorization", "right")}, 401, ""},
		{"no iv", false, event{sealed: good, header: set("Sec-Iv")}, 400, one},
		{"empty iv", false, event{sealed: good, header: set("Sec-Iv", "")}, 400, one},
		{"two ivs", false, event{sealed: good, header: set("Sec-Iv", good.iv, good.iv)}, 400, one},
		{"no fingerprint", false, event{sealed: good, header: set("Sec-Fingerprint")}, 400, one},
		{"plain at an encrypted site", false, event{body: `{}`, header: auth}, 400, one},
		{"iv too short", false, event{sealed: good, header: set("Sec-Iv", "AAAA")}, 400, two},
		{"plaintext is no JSON", false, event{sealed: seal(t, quick, testKey, `{"_id":`), header: auth}, 400, two},
		{"another message's iv", false, event{sealed: &triple{seal(t, quick, testKey, "x").iv, "fp-1", good.message}, header: auth}, 400, two},
		{"unknown fingerprint", false, event{sealed: with("nobody"), header: auth}, 400, three},
		{"ended key", false, event{sealed: with("ended"), header: auth}, 400, three},
		{"future key", false, event{sealed: with("future"), header: auth}, 400, three},
		{"unknown fingerprint, old Kitchen", true, event{sealed: with("nobody"), header: auth}, 400, two},
		{"no content-type", false, event{sealed: good, header: set("Content-Type")}, 415, ""},
		{"text/plain", false, event{sealed: good, header: set("Content-Type", "text/plain")}, 415, ""},
		{"plain site, plain", false, event{site: "plain", body: `{"_id":"1"}`, header: auth}, 200, ""},
		{"plain site, sealed", false, event{site: "plain", sealed: good, header: auth}, 400, three},
		{"plain site, no JSON", false, event{site: "plain", body: `{"_id"`, header: auth}, 400, ""},
		{"plain site, no authorization", false, event{site: "plain", body: `{}`}, 400, one},
	} {
		t.Run(row.name, func(t *testing.T) {
			k := still(t, Config{Sites: []string{"s1", "plain"}, Keys: keys, Profile: quick, NoMismatch: row.old,
				Token: func(string) vendorcrypto.Secret { return "right" }})
			w := k.direct(t.Context(), t, row.event)
			if w.Code != row.status || row.body != "" && w.Body.String() != row.body {
				t.Fatalf("%d %s; want %d %s", w.Code, w.Body, row.status, row.body)
			}
			if ct := w.Header().Get("Content-Type"); ct != "application/json" {
				t.Errorf("content-type %q", ct)
			}
			r, st := k.last(), k.Stats()
			if r.Status != row.status || r.Delivered() != (row.status == 200) || (st.Refused == 1) != (row.status != 200) || (r.Refusal == "") != (row.status == 200) {
				t.Errorf("ledger says %+v, stats %+v", r, st)
			}
		})
	}
}

func TestSkewWidensValidity(t *testing.T) {
	ended := vendorcrypto.Key{Fingerprint: "e", Passphrase: "p", ValidUntil: time.Now().Add(-time.Minute)}
	k := still(t, Config{Profile: quick, Skew: time.Hour, Keys: func(string) (bool, []vendorcrypto.Key) { return true, []vendorcrypto.Key{ended} }})
	if w := k.direct(t.Context(), t, event{sealed: seal(t, quick, ended, `{}`)}); w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	if k.LastFingerprint("s1") != "e" || k.LastFingerprint("s2") != "" {
		t.Error("last fingerprint is wrong")
	}
}

func TestARepeatIsAnsweredButNotCookedAgain(t *testing.T) {
	for _, row := range []struct {
		name   string
		repeat int
		status int
	}{{"by default with the first answer", 0, 200}, {"with 409", 409, 409}} {
		t.Run(row.name, func(t *testing.T) {
			k := still(t, Config{Sites: []string{"s1", "s2"}, Behaviour: Behaviour{Repeat: row.repeat}})
			first := k.direct(t.Context(), t, event{key: "a", body: `{"_id":"1","version":1}`})
			again := k.direct(t.Context(), t, event{key: "a", body: `{"_id":"1","version":1}`})
			if first.Code != 200 || again.Code != row.status || row.status == 200 && first.Body.String() != again.Body.String() {
				t.Fatalf("%d %s, then %d %s", first.Code, first.Body, again.Code, again.Body)
			}
			if r := k.last(); !r.Repeat || r.Delivered() || r.Attempt != 2 {
				t.Errorf("%+v", r)
			}
			// The same key at another site is another event.
			k.direct(t.Context(), t, event{site: "s2", key: "a", body: `{"_id":"1","version":1}`})
			st := k.Stats()
			if st.Delivered != 2 || st.Repeats != 1 || st.Requests != 3 || st.Sites["s1"].Repeats != 1 || st.Sites["s2"].Repeats != 0 || len(st.Problems) != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// Each row drives the Kitchen wrongly on purpose, or rightly where no problem is named:
// a checker that cannot fail proves nothing.
func TestFindsWhatASenderDoesWrong(t *testing.T) {
	order := func(id string, version int) string { return fmt.Sprintf(`{"_id":%q,"version":%d}`, id, version) }
	encrypted := func(cfg *Config) { cfg.Keys, cfg.Profile = oneKey, quick }
	for _, row := range []struct {
		name     string
		cfg      func(*Config)
		events   []event
		want     []Problem // of the last event
		inverted uint64
	}{
		{name: "in order", events: []event{
			{key: "a", edge: "e.1", seq: 1, body: order("x", 1)}, {key: "b", edge: "e.1", seq: 2, body: order("x", 2)}}},
		{name: "a hole is no inversion", events: []event{
			{key: "a", edge: "e.1", seq: 1, body: `{}`}, {key: "b", edge: "e.1", seq: 7, body: `{}`}}},
		{name: "lower Kb-Seq after a higher one", events: []event{
			{key: "b", edge: "e.1", seq: 2, body: `{}`}, {key: "a", edge: "e.1", seq: 1, body: `{}`}},
			want: []Problem{SeqInverted}, inverted: 1},
		{name: "lower Kb-Seq of another kind", events: []event{
			{key: "b", edge: "e.1", seq: 2, body: `{}`}, {kind: "alert", key: "a", edge: "e.1", seq: 1, body: `{}`}},
			want: []Problem{SeqInverted}, inverted: 1},
		{name: "lower Kb-Seq again is a repeat, not an inversion", events: []event{
			{key: "a", edge: "e.1", seq: 1, body: `{}`}, {key: "b", edge: "e.1", seq: 2, body: `{}`}, {key: "a", edge: "e.1", seq: 1, body: `{}`}}},
		{name: "lower Kb-Seq of another edge", events: []event{
			{key: "b", edge: "e.1", seq: 2, body: `{}`}, {key: "a", edge: "f.1", seq: 1, body: `{}`}}},
		{name: "lower Kb-Seq of another epoch", events: []event{
			{key: "b", edge: "e.1", seq: 2, body: `{}`}, {key: "a", edge: "e.2", seq: 1, body: `{}`}}},
		{name: "lower Kb-Seq of another site", events: []event{
			{key: "b", edge: "e.1", seq: 2, body: `{}`}, {site: "s2", key: "a", edge: "e.1", seq: 1, body: `{}`}}},
		{name: "lower Kb-Seq of another order, lanes by order", cfg: func(c *Config) { c.PerOrder = true }, events: []event{
			{key: "b", edge: "e.1", seq: 2, body: order("x", 1)}, {key: "a", edge: "e.1", seq: 1, body: order("y", 1)}}},
		{name: "lower Kb-Seq of the same order, lanes by order", cfg: func(c *Config) { c.PerOrder = true }, events: []event{
			{key: "b", edge: "e.1", seq: 2, body: `{"_id":"x"}`}, {key: "a", edge: "e.1", seq: 1, body: `{"_id":"x"}`}},
			want: []Problem{SeqInverted}, inverted: 1},
		{name: "older version after a newer one", events: []event{
			{key: "b", body: order("x", 2)}, {key: "a", body: order("x", 1)}},
			want: []Problem{VersionInverted}, inverted: 1},
		{name: "older version through another edge", events: []event{
			{key: "b", edge: "e.1", seq: 1, body: order("x", 2)}, {key: "a", edge: "f.1", seq: 1, body: order("x", 1)}},
			want: []Problem{VersionInverted}, inverted: 1},
		{name: "both inversions count one event", events: []event{
			{key: "b", edge: "e.1", seq: 2, body: order("x", 2)}, {key: "a", edge: "e.1", seq: 1, body: order("x", 1)}},
			want: []Problem{SeqInverted, VersionInverted}, inverted: 1},
		{name: "older version of another order", events: []event{
			{key: "b", body: order("x", 2)}, {key: "a", body: order("y", 1)}}},
		{name: "one version cooked under two keys", events: []event{
			{key: "a", body: order("x", 1)}, {key: "b", body: order("x", 1)}},
			want: []Problem{VersionRepeated}},
		{name: "one version cooked twice without a key", events: []event{
			{body: order("x", 1)}, {body: order("x", 1)}},
			want: []Problem{VersionRepeated}},
		{name: "one Kb-Seq under two keys", events: []event{
			{key: "a", edge: "e.1", seq: 1, body: `{}`}, {key: "b", edge: "e.1", seq: 1, body: `{}`}},
			want: []Problem{SeqReused}},
		{name: "one key for two payloads", events: []event{
			{key: "a", body: order("x", 1)}, {key: "a", body: order("x", 2)}},
			want: []Problem{KeyMoved}},
		{name: "one key for two kinds", events: []event{
			{key: "a", body: `{}`}, {kind: "alert", key: "a", body: `{}`}},
			want: []Problem{KeyMoved}},
		{name: "one IV for two messages", cfg: encrypted, events: []event{
			{key: "a", sealed: sealUnder(t, "twelve bytes", order("x", 1))}, {key: "b", sealed: sealUnder(t, "twelve bytes", order("x", 2))}},
			want: []Problem{IVReused}},
		{name: "the same message again keeps its IV", cfg: encrypted, events: []event{
			{key: "a", sealed: sealUnder(t, "twelve bytes", order("x", 1))}, {key: "a", sealed: sealUnder(t, "twelve bytes", order("x", 1))}}},
		{name: "Kb-Seq is no number", events: []event{
			{key: "a", edge: "e.1", header: http.Header{"Kb-Seq": {"one"}}, body: `{}`}},
			want: []Problem{BadHeaders}},
		{name: "Kb-Seq is 0", events: []event{{key: "a", edge: "e.1", body: `{}`}}, want: []Problem{BadHeaders}},
		{name: "Kb-Edge without epoch", events: []event{{key: "a", edge: "e", seq: 1, body: `{}`}}, want: []Problem{BadHeaders}},
		{name: "Kb-Seq without Kb-Edge", events: []event{
			{key: "a", header: http.Header{"Kb-Seq": {"1"}}, body: `{}`}}, want: []Problem{BadHeaders}},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg := Config{Sites: []string{"s1", "s2"}}
			if row.cfg != nil {
				row.cfg(&cfg)
			}
			k := still(t, cfg)
			for _, e := range row.events {
				if w := k.direct(t.Context(), t, e); w.Code != 200 {
					t.Fatalf("%d %s", w.Code, w.Body)
				}
			}
			if got := k.last().Problems; !slices.Equal(got, row.want) {
				t.Errorf("problems %q, want %q", got, row.want)
			}
			st := k.Stats()
			if st.Inversions != row.inverted {
				t.Errorf("%d inversions, want %d", st.Inversions, row.inverted)
			}
			for _, p := range row.want {
				if st.Problems[p] != 1 {
					t.Errorf("%s is not counted: %v", p, st.Problems)
				}
			}
			if len(st.Problems) != len(row.want) {
				t.Errorf("counted %v, want %q", st.Problems, row.want)
			}
		})
	}
}
