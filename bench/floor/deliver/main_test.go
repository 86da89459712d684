package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
)

func TestCutTakesATripleApart(t *testing.T) {
	iv, fp, message, err := cut([]byte(`{"iv":"aXY=","fingerprint":"fp","message":"bWVz"}`))
	if err != nil || iv != "aXY=" || fp != "fp" || string(message) != "bWVz" {
		t.Errorf("%q %q %q %v", iv, fp, message, err)
	}
	for _, bad := range []string{"", "{}", `{"iv":"a"}`, `{"iv":"a","fingerprint":"b","message":"c"`, ` {"iv":"a","fingerprint":"b","message":"c"}`} {
		if _, _, _, err := cut([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a triple", bad)
		}
	}
}

func TestPostSendsWhatAKitchenNeeds(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Method != http.MethodPost || r.URL.Path != "/order" || r.Header.Get("Sec-Iv") != "i" || r.Header.Get("Sec-Fingerprint") != "f" ||
			r.Header.Get("Idempotency-Key") != "id" || r.Header.Get("Content-Type") != "application/json" || string(body) != "m" {
			t.Errorf("%s %s %v %q", r.Method, r.URL, r.Header, body)
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "yes")
	}))
	defer server.Close()
	u, err := url.Parse(server.URL + "/order")
	if err != nil {
		t.Fatal(err)
	}
	d := &deliverer{rt: http.DefaultTransport}
	status, answer, err := d.post(t.Context(), u, "id", []byte(`{"iv":"i","fingerprint":"f","message":"m"}`))
	if err != nil || status != http.StatusCreated || string(answer) != "yes" {
		t.Errorf("%d %q %v", status, answer, err)
	}
}
