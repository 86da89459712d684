package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// instant is a store that takes everything at once, and keeps nothing.
type instant struct{ seq atomic.Uint64 }

func (s *instant) Commit(_ context.Context, d *draft) error {
	now := time.Now()
	d.progress.numbered(s.seq.Add(1), now, now.Add(d.within))
	d.progress.stored()
	return nil
}

// sink takes an answer and keeps its status.
type sink struct {
	header http.Header
	status int
}

func (w *sink) Header() http.Header         { return w.header }
func (w *sink) WriteHeader(status int)      { w.status = status }
func (w *sink) Write(b []byte) (int, error) { return len(b), nil }

// payload is a plausible order of about 1 KiB.
var payload = `{"_id":"o-1001","order_number":"17","destination":{"id":"1","name":"Expo"},"items":[` +
	strings.TrimSuffix(strings.Repeat(`{"name":"Crème brûlée","quantity":2,"modifiers":["no sugar","extra spoon"]},`, 12), ",") + `]}`

// BenchmarkAccept is the way of one order from the parsed request to the answer, without
// network and hub. Floor is what no edge can do without: read, check, seal, answer.
func BenchmarkAccept(b *testing.B) {
	iv, message := sealed(b, "a256gcm", payload)
	for _, bc := range []struct {
		name string
		call call
	}{
		{"plain", call{token: tokenTill1, body: payload, header: with("Prefer", "wait=0")}},
		{"encrypted", call{token: tokenTill1, body: message, header: with("Sec-Iv", iv, "Sec-Fingerprint", fpCurrent, "Prefer", "wait=0")}},
		{"encryption-off", call{token: tokenClear, body: payload, header: with("Prefer", "wait=0")}},
	} {
		b.Run(bc.name, func(b *testing.B) {
			r := newRig(b, nil)
			store := &instant{}
			r.ingest.store = store
			request := bc.call.request("http://edge.example")
			request.Header.Set("Idempotency-Key", "7f3a9c51")
			w := &sink{header: make(http.Header)}
			b.ReportAllocs()
			b.SetBytes(int64(len(bc.call.body)))
			for b.Loop() {
				request.Body = io.NopCloser(strings.NewReader(bc.call.body))
				clear(w.header)
				w.status = 0
				r.handler.ServeHTTP(w, request)
				if w.status != 202 {
					b.Fatalf("status %d", w.status)
				}
				r.forgetAll()
			}
		})
	}
	b.Run("floor", func(b *testing.B) {
		k := key(b, "a256gcm", fpCurrent)
		handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil || !json.Valid(body) {
				w.WriteHeader(400)
				return
			}
			if _, err := k.Seal(body); err != nil {
				w.WriteHeader(500)
				return
			}
			w.WriteHeader(202)
			io.WriteString(w, `{"state":"accepted"}`)
		})
		request := call{token: tokenTill1, body: payload}.request("http://edge.example")
		w := &sink{header: make(http.Header)}
		b.ReportAllocs()
		b.SetBytes(int64(len(payload)))
		for b.Loop() {
			request.Body = io.NopCloser(strings.NewReader(payload))
			handler.ServeHTTP(w, request)
			if w.status != 202 {
				b.Fatalf("status %d", w.status)
			}
		}
	})
}

// forgetAll empties the register, so that a benchmark measures neither its growth nor
// what is sent again.
func (r *rig) forgetAll() {
	reg := r.edge.register
	reg.mu.Lock()
	defer reg.mu.Unlock()
	for m := reg.unsettled.first; m != nil; m = reg.unsettled.first {
		reg.unsettled.remove(m)
		reg.erase(m)
	}
}

func BenchmarkPointer(b *testing.B) {
	p, err := parsePointer("/destination/name")
	if err != nil {
		b.Fatal(err)
	}
	doc := []byte(payload)
	b.ReportAllocs()
	b.SetBytes(int64(len(doc)))
	for b.Loop() {
		if p.text(doc) != "Expo" {
			b.Fatal("not found")
		}
	}
}

// The register's cost while it is full and busy: claim, store, settle, forget.
func BenchmarkRegister(b *testing.B) {
	r := newRegister(10_000, 1<<30, newMetrics().drops)
	body := bytes.Repeat([]byte{'x'}, 200)
	id := make([]byte, 32)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		for i := range 8 {
			id[i] = 'a' + byte(n>>(4*i)&15)
		}
		m, _, err := r.claim(claim{id: string(id), site: "one"})
		if err != nil {
			b.Fatal(err)
		}
		m.numbered(1, time.Time{}, time.Time{})
		m.stored()
		r.settle(verdict{site: "one", id: m.id, seq: 1, state: stateDelivered, answer: answer{body: body}}, time.Time{})
	}
}
