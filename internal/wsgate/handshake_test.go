package wsgate

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

func TestHandshake(t *testing.T) {
	const (
		code1 = `{"errorCode":1,"message":"Incorrect security headers"}`
		code2 = `{"errorCode":2,"message":"Unable to decrypt payload"}`
		code3 = `{"errorCode":3,"message":"Security credential mismatch"}`
	)
	without := func(h http.Header, name string) http.Header {
		h = h.Clone()
		h.Del(name)
		return h
	}
	with := func(h http.Header, name string, values ...string) http.Header {
		if h = h.Clone(); h == nil {
			h = http.Header{}
		}
		h[name] = values
		return h
	}
	one, none := headers(tokenOne), without(headers(""), "Authorization")
	seed := http.Header{
		"Accept": {"*/*"}, "Accept-Encoding": {"gzip, deflate"}, "Accept-Language": {"en-GB,en;q=0.9"}, "Cache-Control": {"no-cache"}, "Pragma": {"no-cache"},
		"Sec-Fingerprint": {fingerprint}, "Sec-Iv": {goodIV}, "Origin": {"ionic"},
		"User-Agent": {"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148"},
	}

	for _, tc := range []struct {
		name     string
		path     string // "" = /
		listener string // its site
		header   http.Header
		change   func(*stage)
		want     int // status; 101 = a session
		body     string
		reason   string // extension member of the problem
		answer   http.Header
	}{
		{name: "the seed's example", listener: "open", header: seed, want: 101},
		{name: "the seed's example with authorization", header: with(seed, "Authorization", tokenOne), want: 101},
		{name: "site from the token", header: one, want: 101},
		{name: "site from the path", path: "/sites/one", header: one, want: 101},
		{name: "site from the path alone", path: "/sites/open", header: none, want: 101},
		{name: "site from the listener", listener: "one", header: one, want: 101},
		{name: "site from listener and path", path: "/sites/one", listener: "one", header: one, want: 101},
		{name: "encryption off: authorization only", header: bearer(tokenClear), want: 101},

		{name: "without authorization", header: without(one, "Authorization"), want: 400, body: code1},
		{name: "without iv", header: without(one, "Sec-Iv"), want: 400, body: code1},
		{name: "without fingerprint", header: without(one, "Sec-Fingerprint"), want: 400, body: code1},
		{name: "without any, where nothing asks for authorization", path: "/sites/open", want: 400, body: code1},
		{name: "malformed iv", header: with(one, "Sec-Iv", "*"), want: 400, body: code2},
		{name: "iv of the other profile", header: with(one, "Sec-Iv", base64.StdEncoding.EncodeToString(make([]byte, 16))), want: 400, body: code2},
		{name: "unknown fingerprint", header: with(one, "Sec-Fingerprint", "ffffffffffffffffffffffffffffffff"), want: 400, body: code3},
		{name: "reserved fingerprint", header: with(one, "Sec-Fingerprint", "kb:b1"), want: 400, body: code3},
		{name: "encryption off: security headers", header: headers(tokenClear), want: 400, body: code3},
		{name: "wrong token", header: headers("wrong-0000000000"), want: 401, answer: http.Header{"Www-Authenticate": {"Bearer"}}},
		{name: "another site's token at the path", path: "/sites/two", header: one, want: 403},
		{name: "another site's token at the listener", listener: "two", header: one, want: 403},
		{name: "another site's path at the listener", path: "/sites/one", listener: "two", header: one, want: 404},
		{name: "unknown site", path: "/sites/three", header: none, want: 404},
		{name: "unknown path", path: "/socket", header: one, want: 404},
		{name: "keys never fetched", header: headers(tokenUnread), want: 503, reason: "keys-not-fetched", answer: http.Header{"Retry-After": {"5"}}},

		{name: "bare word that is listed", header: with(one, "Origin", "ionic"), want: 101},
		{name: "bare word that is not", header: with(one, "Origin", "capacitor"), want: 403},
		{name: "page that is listed", header: with(one, "Origin", "https://screens.example"), want: 101},
		{name: "page that is listed, in capitals", header: with(one, "Origin", "HTTPS://Screens.Example"), want: 101},
		{name: "page with another port", header: with(one, "Origin", "https://screens.example:8443"), want: 403},
		{name: "page with another scheme", header: with(one, "Origin", "http://screens.example"), want: 403},
		{name: "page below a listed one", header: with(one, "Origin", "https://screens.example.evil.example"), want: 403},
		{name: "page of the gateway's own host", header: with(one, "Origin", "http://gate.example"), want: 101},
		{name: "page without an origin of its own", header: with(one, "Origin", "null"), want: 403},
		{name: "empty origin", header: with(one, "Origin", ""), want: 403},
		{name: "two origins", header: with(one, "Origin", "ionic", "ionic"), want: 403},
		{name: "page listed for the site", header: with(headers(tokenTwo), "Origin", "https://two.example"), want: 101},
		{name: "page listed for another site", header: with(one, "Origin", "https://two.example"), want: 403},
		{name: "the seed's errors come before the origin's", header: with(without(one, "Sec-Iv"), "Origin", "https://evil.example"), want: 400, body: code1},

		{name: "hub silent", header: one, want: 503, reason: "feed-stale", answer: http.Header{"Retry-After": {"5"}},
			change: func(s *stage) { s.feed.silent.Store(new(time.Now().Add(-3 * time.Second))) }},
		{name: "hub never heard of", header: one, want: 503, reason: "feed-stale",
			change: func(s *stage) { s.feed.silent.Store(new(time.Time)) }},
		{name: "full", header: one, want: 503, reason: "full", answer: http.Header{"Retry-After": {"5"}},
			change: func(s *stage) { s.cfg.MaxConnections = 0 }},
		{name: "stopping", header: one, want: 503, reason: "stopping", change: func(s *stage) { s.closing = true }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig()
			cfg.Origins = []string{"ionic", "https://screens.example"}
			s := newStage(t, cfg)
			if tc.change != nil {
				tc.change(s)
			}
			// Not loopback: what a stranger meets.
			server := httptest.NewServer(s.handler(ListenConfig{Addr: "192.0.2.1:80", Site: tc.listener}))
			defer server.Close()
			conn, response, err := websocket.DefaultDialer.Dial("ws"+strings.TrimPrefix(server.URL, "http")+tc.path, with(tc.header, "Host", "gate.example"))
			if tc.want == http.StatusSwitchingProtocols {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				conn.Close()
				s.sessions.Wait()
				s.wantCount("kb_wsgate_closes_total", closeGone, 1)
				return
			}
			if err == nil {
				conn.Close()
				t.Fatalf("admitted, want %d", tc.want)
			}
			if response == nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(response.Body)
			if response.StatusCode != tc.want {
				t.Fatalf("%s %s, want %d", response.Status, body, tc.want)
			}
			if tc.body != "" && string(body) != tc.body {
				t.Errorf("body %s, want %s", body, tc.body)
			}
			if tc.body == "" {
				wantProblem(t, response, body, tc.reason)
			}
			for name, want := range tc.answer {
				if got := response.Header[name]; !slices.Equal(got, want) {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if len(s.open) != 0 {
				t.Errorf("%d sessions are open after a refusal", len(s.open))
			}
		})
	}
}

func wantProblem(t *testing.T, response *http.Response, body []byte, reason string) {
	t.Helper()
	var problem struct {
		Type, Title, Detail, Reason string
		Status                      int
	}
	if err := json.Unmarshal(body, &problem); err != nil {
		t.Fatalf("body %s: %v", body, err)
	}
	if response.Header.Get("Content-Type") != "application/problem+json" || problem.Status != response.StatusCode || problem.Title == "" || problem.Detail == "" {
		t.Errorf("%s %s is not a problem document that says what is wrong", response.Header.Get("Content-Type"), body)
	}
	if problem.Reason != reason {
		t.Errorf("reason %q, want %q", problem.Reason, reason)
	}
}

func TestWhatIsNoHandshake(t *testing.T) {
	upgrade := func(change func(http.Header)) http.Header {
		h := headers(tokenOne)
		for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-Websocket-Version": "13", "Sec-Websocket-Key": "psnNRnMFTV8RwjV86xGa5Q=="} {
			h.Set(name, value)
		}
		change(h)
		return h
	}
	for _, tc := range []struct {
		name   string
		method string
		header http.Header
		want   int
		answer http.Header
	}{
		{"a post", "POST", upgrade(func(http.Header) {}), 405, http.Header{"Allow": {"GET"}}},
		{"a page's request", "GET", headers(tokenOne), 426, http.Header{"Upgrade": {"websocket"}}},
		{"another upgrade", "GET", upgrade(func(h http.Header) { h.Set("Upgrade", "h2c") }), 426, http.Header{"Upgrade": {"websocket"}}},
		{"an old version", "GET", upgrade(func(h http.Header) { h.Set("Sec-Websocket-Version", "8") }), 426, http.Header{"Sec-Websocket-Version": {"13"}}},
		{"a key that is none", "GET", upgrade(func(h http.Header) { h.Set("Sec-Websocket-Key", "short") }), 400, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStage(t, testConfig())
			r := httptest.NewRequest(tc.method, "/", nil)
			r.Header = tc.header
			w := httptest.NewRecorder()
			s.handler(ListenConfig{Addr: "192.0.2.1:80"}).ServeHTTP(w, r)
			s.sessions.Wait()
			if w.Code != tc.want {
				t.Fatalf("%d %s, want %d", w.Code, w.Body, tc.want)
			}
			wantProblem(t, w.Result(), w.Body.Bytes(), "")
			for name, want := range tc.answer {
				if got := w.Header()[name]; !slices.Equal(got, want) {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestDeflateOffered(t *testing.T) {
	for _, tc := range []struct {
		offers []string
		want   bool
	}{
		{nil, false},
		{[]string{"permessage-deflate"}, true},
		{[]string{"Permessage-Deflate"}, true},
		{[]string{"permessage-deflate; client_max_window_bits"}, true}, // Chromium
		{[]string{"permessage-deflate; client_max_window_bits=12; server_no_context_takeover"}, true},
		{[]string{`permessage-deflate; server_max_window_bits="15"`}, true},
		{[]string{"permessage-deflate; server_max_window_bits=10"}, false},
		{[]string{"permessage-deflate; server_max_window_bits=10, permessage-deflate"}, true},
		{[]string{"x-webkit-deflate-frame"}, false},
		{[]string{"x-webkit-deflate-frame", "permessage-deflate"}, true},
		{[]string{"permessage-deflate; colour=red"}, false},
		{[]string{"permessage-deflated"}, false},
	} {
		if got := deflateOffered(http.Header{"Sec-Websocket-Extensions": tc.offers}); got != tc.want {
			t.Errorf("%q: %v, want %v", tc.offers, got, tc.want)
		}
	}
}
