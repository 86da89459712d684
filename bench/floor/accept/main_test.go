package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

const order = `{"_id":"1","site":"store-1"}`

func newServer(t *testing.T, publish func(*nats.Msg) (*nats.Msg, error)) *server {
	t.Helper()
	s, err := newSite(siteFile{Name: "store-1", Fingerprint: "fp", Phrase: "phrase"})
	if err != nil {
		t.Fatal(err)
	}
	return &server{publish: publish, sites: map[string]*site{"Bearer token": s}, run: "r"}
}

func post(s *server, authorization string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/order", strings.NewReader(order))
	r.Header.Set("Authorization", authorization)
	w := httptest.NewRecorder()
	s.order(w, r)
	return w
}

func TestAnOrderIsSealedAndStoredBeforeItIsAccepted(t *testing.T) {
	var stored []*nats.Msg
	s := newServer(t, func(m *nats.Msg) (*nats.Msg, error) {
		stored = append(stored, m)
		return &nats.Msg{Data: []byte(`{"stream":"POS","seq":7}`)}, nil
	})
	for range 2 {
		if w := post(s, "Bearer token"); w.Code != http.StatusAccepted {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	if len(stored) != 2 || stored[0].Header.Get("Nats-Msg-Id") == stored[1].Header.Get("Nats-Msg-Id") || stored[0].Subject != "pos.store-1.order.floor" {
		t.Fatalf("stored %+v", stored)
	}
	rest, ok := strings.CutPrefix(string(stored[0].Data), `{"iv":"`)
	iv, rest, ok1 := strings.Cut(rest, `","fingerprint":"fp","message":"`)
	message, ok2 := strings.CutSuffix(rest, `"}`)
	if !ok || !ok1 || !ok2 {
		t.Fatalf("not a triple: %s", stored[0].Data)
	}
	c, err := vendorcrypto.Derive(vendorcrypto.Profile{Cipher: "a256gcm", Iterations: 1}, "phrase")
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := c.Open(iv, message); err != nil || string(plain) != order {
		t.Errorf("opens to %q, %v", plain, err)
	}
}

func TestWhatIsNotStoredIsNotAccepted(t *testing.T) {
	for _, c := range []struct {
		name, authorization, ack string
		err                      error
		want                     int
	}{
		{"unknown token", "Bearer other", "", nil, http.StatusBadRequest},
		{"hub away", "Bearer token", "", errors.New("away"), http.StatusServiceUnavailable},
		{"hub refuses", "Bearer token", `{"error":{"code":503}}`, nil, http.StatusServiceUnavailable},
		{"no acknowledgement", "Bearer token", `+OK`, nil, http.StatusServiceUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(t, func(*nats.Msg) (*nats.Msg, error) { return &nats.Msg{Data: []byte(c.ack)}, c.err })
			if w := post(s, c.authorization); w.Code != c.want {
				t.Errorf("%d, want %d", w.Code, c.want)
			}
		})
	}
}
