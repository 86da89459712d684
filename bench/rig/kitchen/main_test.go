package main

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

func newKitchen(t *testing.T) (*kitchen, *vendorcrypto.Cipher) {
	t.Helper()
	c, err := vendorcrypto.Derive(vendorcrypto.Profile{Cipher: "a256gcm", Iterations: 1}, "phrase")
	if err != nil {
		t.Fatal(err)
	}
	return &kitchen{byPort: map[int]*site{
		1: {name: "store-1", fingerprint: "fp", cipher: c, arrivals: make(map[string]int64)},
		2: {name: "store-2", fingerprint: "fp", cipher: c, arrivals: make(map[string]int64), dead: true},
	}}, c
}

func (k *kitchen) send(t *testing.T, ctx context.Context, port int, c *vendorcrypto.Cipher, id string, seq int, fingerprint, plain string) *httptest.ResponseRecorder {
	t.Helper()
	iv, message := c.Seal([]byte(plain))
	r := httptest.NewRequest(http.MethodPost, "/order", strings.NewReader(message))
	r = r.WithContext(context.WithValue(ctx, http.LocalAddrContextKey, &net.TCPAddr{Port: port}))
	r.Header.Set("Sec-Iv", iv)
	r.Header.Set("Sec-Fingerprint", fingerprint)
	if id != "" {
		r.Header.Set("Idempotency-Key", id)
	}
	if seq > 0 {
		r.Header.Set("Kb-Seq", strconv.Itoa(seq))
	}
	w := httptest.NewRecorder()
	k.ServeHTTP(w, r)
	return w
}

func TestTheStubCountsAndJudges(t *testing.T) {
	const mine, other = `{"site":"store-1"}`, `{"site":"store-9"}`
	type request struct {
		id        string
		seq       int
		fp, plain string
	}
	for _, c := range []struct {
		name string
		sent []request
		want stats
	}{
		{"in order", []request{{"a", 1, "fp", mine}, {"b", 2, "fp", mine}}, stats{Unique: 2, Opened: 1}},
		{"without numbers", []request{{"a", 0, "fp", mine}, {"b", 0, "fp", mine}}, stats{Unique: 2, Opened: 1}},
		{"twice", []request{{"a", 1, "fp", mine}, {"a", 1, "fp", mine}}, stats{Unique: 1, Repeats: 1, Opened: 1}},
		{"inverted", []request{{"a", 2, "fp", mine}, {"b", 1, "fp", mine}}, stats{Unique: 2, Inversions: 1, Opened: 1}},
		{"another site's", []request{{"a", 1, "fp", other}}, stats{Unique: 1, Opened: 1, Wrong: 1, Why: "an order of store-9 came to store-1"}},
		{"another key", []request{{"a", 1, "no", mine}}, stats{Unique: 1, Opened: 1, Wrong: 1, Why: `an order of store-1 came under the fingerprint "no"`}},
		{"without id", []request{{"", 1, "fp", mine}}, stats{Wrong: 1, Why: "an order of store-1 without Idempotency-Key"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			k, cipher := newKitchen(t)
			for _, r := range c.sent {
				if w := k.send(t, t.Context(), 1, cipher, r.id, r.seq, r.fp, r.plain); w.Code != http.StatusOK || w.Body.String() != string(answer) {
					t.Errorf("answered %d %s", w.Code, w.Body)
				}
			}
			if got := k.stats(); got != c.want {
				t.Errorf("%+v, want %+v", got, c.want)
			}
			if got := len(k.arrivals()); c.want.Unique > 0 && got != int(c.want.Unique) {
				t.Errorf("%d arrivals, want %d", got, c.want.Unique)
			}
		})
	}
}

func TestADeadSiteHoldsTheRequestUntilItsSenderGoes(t *testing.T) {
	k, cipher := newKitchen(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	k.send(t, ctx, 2, cipher, "a", 1, "fp", `{}`)
	if got := k.stats(); got != (stats{Dead: 1}) {
		t.Errorf("%+v", got)
	}
}
