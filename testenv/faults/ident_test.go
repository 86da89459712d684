package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// TestIDsAreThoseOfTheSpecification runs the harness's own ids against the vectors.
func TestIDsAreThoseOfTheSpecification(t *testing.T) {
	files, err := filepath.Glob("../../pkg/envelope/testdata/vectors/message-id-*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no vectors (%v)", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var v struct {
				Lane string `json:"lane_hex"`
				Site string `json:"site"`
				POS  string `json:"pos"`
				Kind string `json:"kind_of_event"`
				Key  string `json:"key"`
				Want string `json:"want"`
			}
			if err := json.Unmarshal(raw, &v); err != nil {
				t.Fatal(err)
			}
			lane, err := hex.DecodeString(v.Lane)
			if err != nil {
				t.Fatal(err)
			}
			s := siteSecrets{Lane: base64.StdEncoding.EncodeToString(lane)}
			if got, err := s.messageID(v.Site, v.POS, v.Kind, v.Key); err != nil || got != v.Want {
				t.Errorf("%s (%v), want %s", got, err, v.Want)
			}
		})
	}
}

// TestAForgedEventIsKnownAsOne: whatever is altered, the harness must tell it from what an
// edge stored, or it would judge by it.
func TestAForgedEventIsKnownAsOne(t *testing.T) {
	r := &run{plan: plan{sites: map[string]stack.Site{"s": {}, "other": {}}}}
	rng := rand.New(rand.NewPCG(1, 2))
	truth := func() *nats.Msg {
		m := &nats.Msg{Subject: "live.pos.s.order.edge-1", Header: nats.Header{}, Data: []byte(`{"iv":"aXY=","fingerprint":"fp","message":"c2VhbGVkIHRleHQgdGhhdCBpcyBsb25nIGVub3VnaA=="}`)}
		for name, value := range map[string]string{"Kb-Id": "abc", "Kb-Seq": "7", "Kb-Edge": "edge-1.e", "Kb-Kind": "order", "Kb-Deadline": "1", "Kb-Bind": "b1", "Kb-Tag": strings.Repeat("t", 43), "Nats-Msg-Id": "x"} {
			m.Header.Set(name, value)
		}
		return m
	}
	stored := func(m *nats.Msg) *jetstream.RawStreamMsg {
		return &jetstream.RawStreamMsg{Subject: m.Subject, Header: m.Header, Data: m.Data}
	}
	if what := forgedAs(stored(truth())); what != "" {
		t.Errorf("a true event counts as forged: %s", what)
	}
	for _, f := range forgeries {
		t.Run(f.what, func(t *testing.T) {
			from := truth()
			m := f.forge(r, from, rng)
			if forgedAs(stored(m)) == "" {
				t.Errorf("counts as true: %s %v", m.Subject, m.Header)
			}
			if from.Header.Get("Kb-Id") != "abc" || !strings.HasPrefix(string(from.Data), `{"iv"`) {
				t.Error("the true event was changed")
			}
			if m.Header.Get(trueSeq) != "" || !strings.HasPrefix(m.Subject, "pos.") || strings.Count(m.Subject, ".") != 3 {
				t.Errorf("published as %s with %v", m.Subject, m.Header)
			}
		})
	}
}
