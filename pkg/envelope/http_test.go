package envelope

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestHTTPHeadersAreCanonical(t *testing.T) {
	same(t, http.CanonicalHeaderKey("sec-iv"), HeaderIV)
	same(t, http.CanonicalHeaderKey("sec-fingerprint"), HeaderFingerprint)
}

func TestFromHTTPSaysWhatIsWrong(t *testing.T) {
	for _, c := range []struct {
		name, says string
		headers    http.Header
	}{
		{"neither", "Sec-Iv is missing", http.Header{}},
		{"no headers at all", "Sec-Iv is missing", nil},
		{"no fingerprint", "Sec-Fingerprint is missing", http.Header{HeaderIV: {"iv"}}},
		{"empty", "Sec-Iv is empty", http.Header{HeaderIV: {""}, HeaderFingerprint: {"fp"}}},
		{"twice", "Sec-Fingerprint is there 2 times; once is allowed", http.Header{HeaderIV: {"iv"}, HeaderFingerprint: {"fp", "fp"}}},
	} {
		if _, err := FromHTTP(c.headers, nil); !errors.Is(err, ErrHeaders) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want ErrHeaders that says %s", c.name, err, c.says)
		}
	}
}

// TestHTTPOverTheWire sends what keys seal through a real client and server: header and body arrive as they were.
func TestHTTPOverTheWire(t *testing.T) {
	var got Triple
	var gotErr error
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got, gotErr = FromHTTP(r.Header, body)
	}))
	defer server.Close()

	// Every character that a fingerprint may have.
	var visible []byte
	for c := byte('!'); c <= '~'; c++ {
		visible = append(visible, c)
	}
	for _, p := range profiles {
		for _, e := range []Encoding{Base64, Base64URL, Hex} {
			k := testKey(t, Settings{Profile: p, Iterations: 1, IVEncoding: e, MessageEncoding: e}, string(visible))
			sent, err := k.Seal([]byte(`{"a":1}`))
			if err != nil {
				t.Fatal(err)
			}
			sent.Message = append(sent.Message, '\n')
			r, err := http.NewRequestWithContext(t.Context(), "POST", server.URL, bytes.NewReader(sent.Message))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set(HeaderIV, "what was there before")
			sent.SetHTTP(r.Header)
			resp, err := server.Client().Do(r)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if gotErr != nil || !sameTriple(got, sent) {
				t.Errorf("%s %s: received %q, %v, want %q", p, e, got, gotErr, sent)
			}
			if opened, err := k.Open(nil, got); err != nil || string(opened) != `{"a":1}` {
				t.Errorf("%s %s: opened %q, %v", p, e, opened, err)
			}
		}
	}
}
