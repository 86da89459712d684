package edge

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

const order = `{"_id":"o-1001","order_number":"17"}`

// cooks is a Kitchen that takes every message.
func cooks(*draft) *reply {
	return &reply{state: "delivered", reason: "accepted", status: 201, contentType: "application/vnd.kitchen+json", body: `{"ticket":17}`}
}

// ingestRow is one row of docs/spec/ingest.md: what is sent, perhaps after something
// else, and the answer.
type ingestRow struct {
	name   string
	change func(*Config)
	setup  func(t *testing.T, r *rig)
	before []call
	call   call
	status int
	// want is the answer's whole body, its id written as ID.
	want string
	// problem holds members of a problem document.
	problem map[string]any
	header  map[string]string
	// stored is how many messages were stored in the end.
	stored int
	check  func(t *testing.T, r *rig, id string)
}

const (
	code1   = `{"errorCode":1,"message":"Incorrect security headers"}`
	code2   = `{"errorCode":2,"message":"Unable to decrypt payload"}`
	code3   = `{"errorCode":3,"message":"Security credential mismatch"}`
	ticket  = `{"ticket":17}`
	pending = `{"id":"ID","state":"accepted","durability":"fsync"}`
)

func ingestRows(t *testing.T) []ingestRow {
	kitchen := func(k func(*draft) *reply) func(*testing.T, *rig) {
		return func(_ *testing.T, r *rig) { r.store.kitchen = k }
	}
	answers := kitchen(cooks)
	commits := func(err error) func(*testing.T, *rig) {
		return func(_ *testing.T, r *rig) { r.store.commit = func(*draft) error { return err } }
	}
	plain := call{token: tokenTill1, body: order}
	now := func(c call) call { // does not wait for a Kitchen
		c.header = maps.Clone(c.header)
		if c.header == nil {
			c.header = http.Header{}
		}
		c.header.Set("Prefer", "wait=0")
		return c
	}
	keyed := func(c call, key string) call {
		c.header = maps.Clone(c.header)
		if c.header == nil {
			c.header = http.Header{}
		}
		c.header.Set("Idempotency-Key", key)
		return c
	}
	enc := func(token, fp, iv, message string) call {
		return call{token: token, header: with("Sec-Iv", iv, "Sec-Fingerprint", fp), body: message}
	}
	iv, message := sealed(t, envelope.A256GCM, order)
	iv2, message2 := sealed(t, envelope.A256GCM, order)
	brokenIV, broken := sealed(t, envelope.A256GCM, `{"_id":`)
	ctrIV, ctrMessage := sealed(t, envelope.A256CTR, order)
	alter := func(message string) string {
		raw, err := base64.StdEncoding.DecodeString(message)
		if err != nil {
			t.Fatal(err)
		}
		raw[0] ^= 1
		return base64.StdEncoding.EncodeToString(raw)
	}
	passed := func(want string) func(*testing.T, *rig, string) {
		return func(t *testing.T, r *rig, _ string) {
			if got := string(r.store.stored()[0].triple.Message); got != want {
				t.Errorf("the Kitchen would get\n%q, the POS sent\n%q", got, want)
			}
		}
	}
	foreign := func(message string) func(*testing.T, *rig, string) {
		return func(t *testing.T, r *rig, id string) {
			passed(message)(t, r, id)
			d := r.store.stored()[0]
			if plain, err := r.portal.Site(d.site).Keyring.Open(nil, d.triple); err != nil || string(plain) != otherPlain {
				t.Errorf("it opens as %q, %v", plain, err)
			}
			if d.order != r.portal.Site(d.site).Binding.Lane().Order("o-1001") {
				t.Errorf("order %q", d.order)
			}
		}
	}
	opens := func(t *testing.T, r *rig, _ string) {
		d := r.store.stored()[0]
		s := r.portal.Site(d.site)
		payload, err := s.Keyring.Open(nil, d.triple)
		if envelope.IsBindingFingerprint(d.triple.Fingerprint) {
			payload, err = s.Binding.OpenPlain(nil, d.triple)
		}
		if err != nil || string(payload) != order {
			t.Errorf("what is stored opens as %q, %v", payload, err)
		}
	}
	first := func(t *testing.T, r *rig, id string) {
		if got := r.store.stored()[0].id; got != id {
			t.Errorf("Kb-Id %s, that of the first attempt is %s", id, got)
		}
	}
	atMessage := func(path, token string, state state) ingestRow {
		return ingestRow{
			setup: func(t *testing.T, r *rig) {
				m, _, err := r.edge.register.claim(claim{id: "the-id", site: "gcm", who: "till-1", kind: "order"})
				if err != nil {
					t.Fatal(err)
				}
				at := time.Date(2026, 1, 31, 12, 0, 0, 123456789, time.UTC)
				m.numbered(1, at, at.AddDate(100, 0, 0))
				m.stored()
				if state.final() {
					v := verdict{site: "gcm", id: "the-id", seq: 1, state: state, reason: "accepted", kitchenStatus: 201, attempts: 2}
					if state == stateFailed {
						v.reason, v.kitchenStatus = "refused", 422
					}
					r.edge.register.settle(v, at.Add(time.Second))
				}
			},
			call: call{method: http.MethodGet, path: path, token: token},
		}
	}
	get := func(name string, row ingestRow, status int, want string, problem map[string]any) ingestRow {
		row.name, row.status, row.want, row.problem = name, status, want, problem
		return row
	}
	const times = `"accepted":"2026-01-31T12:00:00.123Z","deadline":"2126-01-31T12:00:00.123Z"`

	rows := []ingestRow{
		{name: "plain order, the Kitchen answers in time", setup: answers, call: plain, status: 201, want: ticket,
			header: map[string]string{"Content-Type": "application/vnd.kitchen+json", "Cache-Control": "no-store"}, stored: 1, check: opens},
		{name: "plain order, the Kitchen is slower than the wait", call: plain, status: 202, want: pending,
			header: map[string]string{"Location": "/messages/ID", "Content-Type": "application/json"}, stored: 1},
		{name: "plain order, Prefer: wait=0", call: now(plain), status: 202, want: pending, header: map[string]string{"Location": "/messages/ID"}, stored: 1},
		{name: "plain order, accept_status 200", call: now(call{token: tokenOK, body: order}), status: 200, want: pending,
			header: map[string]string{"Location": "/messages/ID"}, stored: 1},
		{name: "plain order to a site without authorization", call: now(call{path: "/sites/ctr/order", body: order}), status: 202, want: pending,
			header: map[string]string{"Location": "/sites/ctr/messages/ID"}, stored: 1, check: opens},
		{name: "plain order, hub of unknown durability", setup: func(_ *testing.T, r *rig) { r.hub.durability = "hub" }, call: now(plain), status: 202,
			want: `{"id":"ID","state":"accepted"}`, stored: 1},
		{name: "plain order, encryption off on the Portal", setup: answers, call: call{token: tokenClear, body: order}, status: 201, want: ticket, stored: 1,
			check: func(t *testing.T, r *rig, id string) {
				opens(t, r, id)
				if fp := r.store.stored()[0].triple.Fingerprint; string(fp) != "kb:b1" {
					t.Errorf("fingerprint %s", fp)
				}
			}},
		{name: "plain order with charset", call: call{token: tokenTill1, body: order, header: with("Content-Type", `application/json; charset="UTF-8"`)}, status: 202, want: pending, stored: 1},
		{name: "order sealed by openssl, a256ctr", setup: answers, call: call{path: "/sites/ctr/order", header: with("Sec-Iv", opensslIV, "Sec-Fingerprint", fpCurrent), body: opensslMessage},
			status: 201, want: ticket, stored: 1, check: foreign(opensslMessage)},
		{name: "order sealed by Node, a256gcm", setup: answers, call: enc(tokenTill1, fpCurrent, nodeIV, nodeMessage), status: 201, want: ticket, stored: 1, check: foreign(nodeMessage)},
		{name: "encrypted order with a line break after it", setup: answers, call: enc(tokenTill1, fpCurrent, iv, message+"\r\n"), status: 201, want: ticket, stored: 1, check: passed(message + "\r\n")},
		{name: "encrypted order as a JSON string, body: json-string", setup: answers, call: enc(tokenQuoted, fpCurrent, iv, `"`+message+`"`+"\n"), status: 201, want: ticket, stored: 1, check: passed(message)},
		{name: "encrypted order as text, body: json-string", setup: answers, call: enc(tokenQuoted, fpCurrent, iv, message), status: 201, want: ticket, stored: 1, check: passed(message)},
		{name: "alert", call: now(call{path: "/alert", token: tokenTill1, body: `{"text":"printer"}`}), status: 202, want: pending, stored: 1,
			check: func(t *testing.T, r *rig, _ string) {
				if d := r.store.stored()[0]; d.kind != "alert" || d.within != 2*time.Minute || d.order != "" {
					t.Errorf("kind %s, within %v, order %q", d.kind, d.within, d.order)
				}
			}},
		{name: "configured kind", call: now(call{path: "/receipt", token: tokenTill1, body: order}), status: 202, want: pending, stored: 1,
			check: func(t *testing.T, r *rig, _ string) {
				if d := r.store.stored()[0]; d.kind != "receipt" || d.within != time.Hour {
					t.Errorf("kind %s, within %v", d.kind, d.within)
				}
			}},
		{name: "the Kitchen had it already", setup: kitchen(func(*draft) *reply {
			return &reply{state: "delivered", reason: "repeated", status: 409, body: "again?"}
		}),
			call: plain, status: 200, want: `{"id":"ID","state":"delivered","kitchen_status":409}`, header: map[string]string{"Content-Type": "application/json"}, stored: 1},
		{name: "the Kitchen answers without a body", setup: kitchen(func(*draft) *reply { return &reply{state: "delivered", reason: "accepted", status: 204} }),
			call: plain, status: 204, stored: 1},
		{name: "the Kitchen refuses it", setup: kitchen(func(*draft) *reply { return &reply{state: "failed", reason: "refused", status: 422, body: "no"} }),
			call: plain, status: 502, problem: map[string]any{"reason": "refused", "kitchen_status": 422.0, "state": "failed", "attempts": 1.0, "id": "ID"}, stored: 1},
		{name: "the deadline passes during the wait", setup: kitchen(func(*draft) *reply { return &reply{state: "failed", reason: "expired"} }),
			call: plain, status: 502, problem: map[string]any{"reason": "expired", "kitchen_status": nil, "state": "failed"}, stored: 1},

		{name: "no authorization", call: call{body: order}, status: 400, want: code1},
		{name: "IV without fingerprint", call: call{token: tokenTill1, body: order, header: with("Sec-Iv", iv)}, status: 400, want: code1},
		{name: "fingerprint without IV", call: call{token: tokenTill1, body: order, header: with("Sec-Fingerprint", fpCurrent)}, status: 400, want: code1},
		{name: "plain order, plain not accepted", call: call{token: tokenStrict, body: order}, status: 400, want: code1},
		{name: "IV of the wrong length", call: enc(tokenTill1, fpCurrent, opensslIV, message), status: 400, want: code2},
		{name: "IV in the wrong encoding", call: enc(tokenTill1, fpCurrent, "303132333435363738396162", message), status: 400, want: code2},
		{name: "encrypted order, altered (a256gcm)", call: enc(tokenTill1, fpCurrent, iv, alter(message)), status: 400, want: code2},
		{name: "encrypted order, altered (a256ctr)", call: call{path: "/sites/ctr/order", header: with("Sec-Iv", ctrIV, "Sec-Fingerprint", fpCurrent), body: alter(ctrMessage)}, status: 400, want: code2},
		{name: "encrypted order, empty", call: enc(tokenTill1, fpCurrent, iv, ""), status: 400, want: code2},
		{name: "encrypted order as a JSON string, without the setting", call: enc(tokenTill1, fpCurrent, iv, `"`+message+`"`), status: 400, want: code2},
		{name: "unknown fingerprint", call: enc(tokenTill1, "3c59dc048e8850243be8079a5c74d079", iv, message), status: 400, want: code3},
		{name: "fingerprint of a key that has ended", call: enc(tokenTill1, fpEnded, iv, message), status: 400, want: code3},
		{name: "fingerprint that begins with kb:", call: enc(tokenTill1, "kb:b1", iv, message), status: 400, want: code3},
		{name: "security headers, encryption off on the Portal", call: enc(tokenClear, fpCurrent, iv, message), status: 400, want: code3},

		{name: "wrong token", call: call{token: "wrong", body: order}, status: 401, problem: map[string]any{"title": "Unauthorized"}, header: map[string]string{"Www-Authenticate": "Bearer"}},
		{name: "token of another site", call: call{path: "/sites/strict/order", token: tokenTill1, body: order}, status: 403, problem: map[string]any{"title": "Forbidden"}},
		{name: "unknown site in the path", call: call{path: "/sites/nowhere/order", body: order}, status: 404, problem: map[string]any{"title": "Not Found"}},
		{name: "unknown kind", call: call{path: "/recall", token: tokenTill1, body: order}, status: 404, problem: map[string]any{"reason": "no-route"}},
		{name: "GET on a kind", call: call{method: http.MethodGet, token: tokenTill1}, status: 405, problem: map[string]any{"reason": "method"}, header: map[string]string{"Allow": "POST"}},
		{name: "no Content-Length", call: call{token: tokenTill1, body: order, chunked: true}, status: 411, problem: map[string]any{"reason": "length"}},
		{name: "oversize body", call: call{token: tokenTill1, body: `"` + strings.Repeat("x", 4095) + `"`}, status: 413, problem: map[string]any{"reason": "too-large", "max_body": 4096.0}},
		{name: "wrong Content-Type", call: call{token: tokenTill1, body: order, header: with("Content-Type", "text/plain")}, status: 415, problem: map[string]any{"reason": "content-type"}},
		{name: "charset other than UTF-8", call: call{token: tokenTill1, body: order, header: with("Content-Type", "application/json; charset=latin1")}, status: 415, problem: map[string]any{"reason": "content-type"}},
		{name: "compressed body", call: call{token: tokenTill1, body: order, header: with("Content-Encoding", "gzip")}, status: 415, problem: map[string]any{"reason": "content-encoding"}},
		{name: "broken JSON", call: call{token: tokenTill1, body: `{"_id":`}, status: 400, problem: map[string]any{"reason": "json",
			"detail": "The payload is not valid JSON: byte 7 of 7 is not what may stand there, or more had to follow."}},
		{name: "not UTF-8", call: call{token: tokenTill1, body: "{\"name\":\"caf\xe9\"}"}, status: 400, problem: map[string]any{"reason": "json"}},
		{name: "empty body", call: call{token: tokenTill1}, status: 400, problem: map[string]any{"reason": "json"}},
		{name: "encrypted order, broken JSON (a256gcm)", call: enc(tokenTill1, fpCurrent, brokenIV, broken), status: 400, problem: map[string]any{"reason": "json"}},
		{name: "Idempotency-Key with a blank", call: keyed(plain, "a b"), status: 400, problem: map[string]any{"reason": "idempotency-key"}},
		{name: "Idempotency-Key of 256 characters", call: keyed(plain, strings.Repeat("k", 256)), status: 400, problem: map[string]any{"reason": "idempotency-key"}},
		{name: "Idempotency-Key twice", call: call{token: tokenTill1, body: order, header: with("Idempotency-Key", "a", "Idempotency-Key", "a")}, status: 400, problem: map[string]any{"reason": "idempotency-key"}},
		{name: "Kb-Within of nothing", call: call{token: tokenTill1, body: order, header: with("Kb-Within", "0")}, status: 400, problem: map[string]any{"reason": "within"}},

		{name: "Idempotency-Key again, same body", setup: answers, before: []call{keyed(plain, strings.Repeat("k", 255))}, call: keyed(plain, strings.Repeat("k", 255)), status: 201, want: ticket, stored: 1, check: first},
		{name: "Idempotency-Key again, same payload under a fresh IV", setup: answers, before: []call{keyed(enc(tokenTill1, fpCurrent, iv, message), "k")},
			call: keyed(enc(tokenTill1, fpCurrent, iv2, message2), "k"), status: 201, want: ticket, stored: 1, check: first},
		{name: "Idempotency-Key again, after it failed", setup: kitchen(func(*draft) *reply { return &reply{state: "failed", reason: "refused", status: 400} }),
			before: []call{keyed(plain, "k")}, call: keyed(plain, "k"), status: 502, problem: map[string]any{"reason": "refused"}, stored: 1, check: first},
		{name: "Idempotency-Key again, another body", setup: answers, before: []call{keyed(plain, "k")}, call: keyed(call{token: tokenTill1, body: `{"_id":"o-2"}`}, "k"),
			status: 422, problem: map[string]any{"reason": "other-payload"}, stored: 1, check: first},
		{name: "Idempotency-Key of another POS", setup: answers, before: []call{keyed(plain, "k")}, call: keyed(call{token: tokenTill2, body: order}, "k"), status: 201, want: ticket, stored: 2},
		{name: "Idempotency-Key of another kind", setup: answers, before: []call{keyed(plain, "k")}, call: keyed(call{path: "/receipt", token: tokenTill1, body: order}, "k"), status: 201, want: ticket, stored: 2},
		{name: "encrypted order again, no key", setup: answers, before: []call{enc(tokenTill1, fpCurrent, iv, message)}, call: enc(tokenTill1, fpCurrent, iv, message), status: 201, want: ticket, stored: 1, check: first},
		{name: "IV again, another message", setup: answers, before: []call{{path: "/sites/ctr/order", header: with("Sec-Iv", opensslIV, "Sec-Fingerprint", fpCurrent), body: opensslMessage}},
			call:   call{path: "/sites/ctr/order", header: with("Sec-Iv", opensslIV, "Sec-Fingerprint", fpCurrent), body: underIV(t, opensslIV, `{"_id":"o-2"}`)},
			status: 422, problem: map[string]any{"reason": "other-payload"}, stored: 1},
		{name: "encrypted order again, under another Idempotency-Key", setup: answers, before: []call{keyed(enc(tokenTill1, fpCurrent, iv, message), "k")},
			call: keyed(enc(tokenTill1, fpCurrent, iv, message), "l"), status: 422, problem: map[string]any{"reason": "envelope-seen"}, stored: 1},
		{name: "encrypted order again, as another kind", setup: answers, before: []call{enc(tokenTill1, fpCurrent, iv, message)},
			call: call{path: "/alert", token: tokenTill1, header: with("Sec-Iv", iv, "Sec-Fingerprint", fpCurrent), body: message}, status: 422, problem: map[string]any{"reason": "envelope-seen"}, stored: 1},
		{name: "encrypted order again, by another POS", setup: answers, before: []call{enc(tokenTill1, fpCurrent, iv, message)},
			call: enc(tokenTill2, fpCurrent, iv, message), status: 422, problem: map[string]any{"reason": "envelope-seen"}, stored: 1},
		{name: "plain order again, no key", setup: answers, before: []call{plain}, call: plain, status: 201, want: ticket, stored: 2},

		{name: "the hub cannot be reached", setup: commits(notStored(errAway)), call: plain, status: 503,
			problem: map[string]any{"reason": "hub-away", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "5"}, stored: 1},
		{name: "the hub is full", setup: commits(notStored(fmt.Errorf("publish: %w: maximum bytes exceeded", broker.ErrRejected))), call: plain, status: 503,
			problem: map[string]any{"reason": "hub-refused", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "5"}, stored: 1},
		{name: "the hub does not let this edge publish", setup: commits(notStored(fmt.Errorf("publish: %w: %w", broker.ErrRejected, broker.ErrDenied))), call: plain, status: 503,
			problem: map[string]any{"reason": "hub-forbidden", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "5"}, stored: 1},
		{name: "messages before it take too long", setup: commits(notStored(errTurn)), call: plain, status: 503,
			problem: map[string]any{"reason": "hub-slow", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "1"}, stored: 1},
		{name: "the first attempt was given up before it was stored", setup: commits(notStored(context.Canceled)), call: plain, status: 503,
			problem: map[string]any{"reason": "gone", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "5"}, stored: 1},
		{name: "the hub does not say", setup: commits(fmt.Errorf("%w: timeout", errUnknown)), call: plain, status: 503,
			problem: map[string]any{"reason": "hub-silent", "outcome": "unknown", "id": "ID", "detail": "The hub did not say whether it has stored the message. " +
				"The edge goes on asking; look at the Location. Sent again without an Idempotency-Key it could reach the Kitchen twice."}, header: map[string]string{"Retry-After": "5", "Location": "/messages/ID"}, stored: 1},
		{name: "too many requests at once", change: func(c *Config) { c.MaxRequests = 1 }, setup: func(_ *testing.T, r *rig) { take(r.ingest.slots) }, call: plain, status: 503,
			problem: map[string]any{"reason": "busy", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "1"}},
		{name: "too many requests of the site", change: func(c *Config) { c.MaxSiteRequests = 1 }, setup: func(_ *testing.T, r *rig) { take(r.edge.sites["gcm"].gate) }, call: plain, status: 503,
			problem: map[string]any{"reason": "busy", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "1"}},
		{name: "the site's keys were never fetched", call: call{token: tokenUnread, body: order}, status: 503,
			problem: map[string]any{"reason": "keys-not-fetched"}, header: map[string]string{"Retry-After": "5"}},
		{name: "the Portal cannot be asked about a fingerprint", setup: func(_ *testing.T, r *rig) {
			r.portal.refresh = func() error { return errors.New("connection refused") }
		},
			call: enc(tokenTill1, "3c59dc048e8850243be8079a5c74d079", iv, message), status: 503,
			problem: map[string]any{"reason": "keys-refresh-failed"}, header: map[string]string{"Retry-After": "5"}},
		{name: "no key may seal now", setup: func(t *testing.T, r *rig) {
			ended, err := envelope.NewKeyring(profile(envelope.A256GCM), key(t, envelope.A256GCM, fpEnded))
			if err != nil {
				t.Fatal(err)
			}
			s := *r.portal.sites["gcm"]
			s.Keyring = ended
			r.portal.sites["gcm"] = &s
		}, call: plain, status: 503, problem: map[string]any{"reason": "keys-none", "outcome": "not-stored"}, header: map[string]string{"Retry-After": "5"}},
		{name: "the edge is stopping", setup: func(_ *testing.T, r *rig) { r.ingest.running.Lock() }, call: plain, status: 503,
			problem: map[string]any{"reason": "stopping", "outcome": "not-stored"}},

		get("message, accepted", atMessage("/messages/the-id", tokenTill1, stateAccepted), 200, `{"id":"ID","kind":"order","state":"accepted",`+times+`}`, nil),
		get("message, delivered", atMessage("/messages/the-id", tokenTill1, stateDelivered), 200,
			`{"id":"ID","kind":"order","state":"delivered",`+times+`,"settled":"2026-01-31T12:00:01.123Z","reason":"accepted","kitchen_status":201,"attempts":2}`, nil),
		get("message, failed", atMessage("/messages/the-id", tokenTill1, stateFailed), 200,
			`{"id":"ID","kind":"order","state":"failed",`+times+`,"settled":"2026-01-31T12:00:01.123Z","reason":"refused","kitchen_status":422,"attempts":2}`, nil),
		get("message of another POS", atMessage("/messages/the-id", tokenTill2, stateAccepted), 404, "", map[string]any{"reason": "no-message"}),
		get("message that is not known", atMessage("/messages/another-id", tokenTill1, stateAccepted), 404, "", map[string]any{"reason": "no-message"}),
		get("message, no authorization", atMessage("/messages/the-id", "", stateAccepted), 400, code1, nil),
		{name: "message of a site without authorization", setup: func(t *testing.T, r *rig) {
			if _, _, err := r.edge.register.claim(claim{id: "the-id", site: "ctr", kind: "order"}); err != nil {
				t.Fatal(err)
			}
		}, call: call{method: http.MethodGet, path: "/sites/ctr/messages/the-id"}, status: 200, want: `{"id":"ID","kind":"order","state":"pending"}`},

		{name: "healthz", call: call{method: http.MethodGet, path: "/healthz"}, status: 200, want: `{"status":"ok"}` + "\n"},
		{name: "readyz", call: call{method: http.MethodGet, path: "/readyz"}, status: 200, want: `{"status":"ready"}` + "\n"},
		{name: "readyz, hub away", setup: func(_ *testing.T, r *rig) { r.hub.away = true }, call: call{method: http.MethodGet, path: "/readyz"}, status: 503,
			want: `{"failing":{"hub":"does not work; the admin address says why"},"status":"not ready"}` + "\n"},
	}
	return rows
}

func TestIngestAnswers(t *testing.T) {
	for _, row := range ingestRows(t) {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, func(c *Config) {
				c.Wait = 10 * time.Millisecond
				if row.change != nil {
					row.change(c)
				}
			})
			if row.setup != nil {
				row.setup(t, r)
			}
			s := r.serve(t)
			for _, c := range row.before {
				resp, err := s.Client().Do(c.request(s.URL))
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			resp, err := s.Client().Do(row.call.request(s.URL))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			id := resp.Header.Get("Kb-Id")
			if resp.StatusCode != row.status {
				t.Fatalf("status %d, want %d: %s", resp.StatusCode, row.status, body)
			}
			if row.problem == nil {
				if want := strings.ReplaceAll(row.want, `"ID"`, `"`+id+`"`); string(body) != want {
					t.Errorf("body\n%s, want\n%s", body, want)
				}
			} else {
				if got := resp.Header.Get("Content-Type"); got != "application/problem+json" {
					t.Errorf("Content-Type %s", got)
				}
				document := problemOf(t, body)
				if document["status"] != float64(row.status) || document["type"] != "about:blank" || document["title"] == "" {
					t.Errorf("no problem document: %s", body)
				}
				for name, want := range row.problem {
					if want == "ID" {
						want = id
					}
					if diff := cmp.Diff(want, document[name]); diff != "" {
						t.Errorf("member %s (-want +got):\n%s", name, diff)
					}
				}
			}
			for name, want := range row.header {
				if got := resp.Header.Get(name); got != strings.ReplaceAll(want, "ID", id) {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
			if len(resp.Header["Content-Type"]) > 0 && resp.Header.Get("Cache-Control") != "no-store" && !strings.HasSuffix(row.call.path, "z") {
				t.Error("the answer may be cached")
			}
			if got := len(r.store.stored()); got != row.stored {
				t.Errorf("%d messages handed over to be stored, want %d", got, row.stored)
			}
			if row.stored > 0 && row.status != 422 && id == "" {
				t.Error("no Kb-Id")
			}
			if row.check != nil {
				row.check(t, r, id)
			}
		})
	}
}

// underIV encrypts with a256ctr under an IV that was used before, as a POS must not.
func underIV(t *testing.T, iv, payload string) string {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(iv)
	if err != nil {
		t.Fatal(err)
	}
	c, err := key(t, envelope.A256CTR, fpCurrent).SealRaw(nil, raw, []byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(c)
}

// The table of docs/spec/ingest.md and the rows above are the same cases with the same
// status.
func TestIngestAnswersAreTheDocumentedOnes(t *testing.T) {
	f, err := os.Open("../../docs/spec/ingest.md")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	line := regexp.MustCompile(`^\| (.+?) \| (\d{3}) \| .+ \|$`)
	var documented []string
	inside := false
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if strings.HasPrefix(sc.Text(), "## ") {
			inside = sc.Text() == "## Answers"
		}
		if m := line.FindStringSubmatch(sc.Text()); inside && m != nil {
			documented = append(documented, m[2]+" "+m[1])
		}
	}
	var tested []string
	for _, row := range ingestRows(t) {
		tested = append(tested, fmt.Sprintf("%d %s", row.status, row.name))
	}
	if len(documented) == 0 {
		t.Fatal("the document has no table of answers")
	}
	slices.Sort(documented)
	slices.Sort(tested)
	if diff := cmp.Diff(documented, tested); diff != "" {
		t.Errorf("documented (-) and tested (+) cases differ:\n%s", diff)
	}
}

// One IV has several texts; using it twice under two of them is using it twice.
func TestEnvelopeIsNamedByItsIVNotByTheIVsText(t *testing.T) {
	lane := binding(t, "one").Lane()
	name := func(e envelope.Encoding, iv, fp string) string {
		return envelopeOf(door.Visitor{IV: []byte(iv), Fingerprint: []byte(fp), Keys: &keysync.Site{Settings: envelope.Settings{IVEncoding: e}}, Site: "one"}, lane)
	}
	for _, tc := range []struct {
		encoding envelope.Encoding
		a, b     string
		same     bool
	}{
		{envelope.Hex, "00ff", "00FF", true},
		{envelope.Base64URL, "AAECAwQFBgcICQoLDA0ODw", "AAECAwQFBgcICQoLDA0ODw==", true},
		{envelope.Base64URL, "AAEC", "aaec", false},
		{envelope.Base64, "AAEC", "aaec", false},
		{"", "AAEC", "aaec", false},
	} {
		if got := name(tc.encoding, tc.a, "fp") == name(tc.encoding, tc.b, "fp"); got != tc.same {
			t.Errorf("%s: %s and %s name one envelope: %v", tc.encoding, tc.a, tc.b, got)
		}
	}
	if name("", "AAEC", "fp") == name("", "AAEC", "fq") {
		t.Error("the fingerprint does not count")
	}
}
