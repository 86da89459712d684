package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/cli"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

// cipherSettings of every site. One iteration: the pass phrases are random, and deriving
// a thousand keys is not what is measured.
var cipherSettings = envelope.Settings{Profile: envelope.A256GCM, Iterations: 1}

// eventBytes is the plaintext of every event.
const eventBytes = 1024

// orderOf makes an order of size bytes that says whose it is.
func orderOf(site string, n uint64, size int) []byte {
	head := fmt.Appendf(nil, `{"_id":"%s-%d","site":"%s","order_number":"A-113","items":[{"name":"Burger","qty":2},{"name":"Fries","qty":1}],"comment":"`, site, n, site)
	const tail = `"}`
	return append(append(head, bytes.Repeat([]byte("no onions. "), size)[:max(size-len(head)-len(tail), 0)]...), tail...)
}

// fleet are sites with their keys: a stub Portal that has them, the binding file, and
// what a sender needs to make events of them.
type fleet struct {
	sites    []string
	portal   *portal.Portal
	keys     []*envelope.Key     // by site
	bindings []*envelope.Binding // by site
	secrets  map[string]siteKey  // by name: for the Kitchen's stub

	portalSettings map[string]any
	bindingFile    string
	epoch          string
}

// siteKey is how the stub Kitchen is told a key.
type siteKey struct {
	Fingerprint string `json:"fingerprint"`
	Phrase      string `json:"phrase"`
}

func newFleet(ctx context.Context, c *crew, sites []string) (*fleet, error) {
	config := make(map[string]portal.SiteConfig, len(sites))
	for _, s := range sites {
		config[s] = portal.SiteConfig{Encryption: true}
	}
	p, err := portal.Start(portal.Config{Sites: config})
	if err != nil {
		return nil, err
	}
	c.later(func() error { p.Close(); return nil })
	f := &fleet{sites: sites, portal: p, secrets: make(map[string]siteKey, len(sites)), bindingFile: c.file("binding.json"),
		epoch: fmt.Sprintf("e%d", time.Now().UnixNano())}
	caFile, tokenFile := c.file("portal-ca.pem"), c.file("portal-token")
	if err := p.WriteCAFile(caFile); err != nil {
		return nil, err
	}
	if err := os.WriteFile(tokenFile, []byte(p.Token()), 0o600); err != nil {
		return nil, err
	}
	// No poll falls into a turn.
	f.portalSettings = map[string]any{"url": p.URL(), "token_file": tokenFile, "ca_file": caFile, "poll": "24h"}
	if err := keysync.MintBindingFile(f.bindingFile, sites); err != nil {
		return nil, err
	}
	bindings, err := keysync.ReadBindingFile(f.bindingFile)
	if err != nil {
		return nil, err
	}
	for _, s := range sites {
		k := p.Keys(s)[0]
		key, err := envelope.NewKey(cipherSettings, envelope.KeyConfig{Fingerprint: k.Fingerprint, Passphrase: envelope.Secret(k.Value),
			ValidAfter: k.ValidAfter, ValidUntil: k.ValidUntil})
		if err != nil {
			return nil, err
		}
		if err := key.Derive(); err != nil {
			return nil, err
		}
		f.keys = append(f.keys, key)
		f.bindings = append(f.bindings, bindings[s])
		f.secrets[s] = siteKey{k.Fingerprint, k.Value}
	}
	return f, nil
}

// siteNames are n names that all differ.
func siteNames(n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("store-%04d", i)
	}
	return names
}

const benchEdge = "bench"

// event makes the event with the number seq, from 1, of the site with the index i, as an
// edge would have published it.
func (f *fleet) event(i int, seq uint64) (*broker.Event, error) {
	t, err := f.keys[i].Seal(orderOf(f.sites[i], seq, eventBytes))
	if err != nil {
		return nil, err
	}
	return f.tagged(i, seq, t), nil
}

// tagged makes an event of a triple.
func (f *fleet) tagged(i int, seq uint64, t envelope.Triple) *broker.Event {
	now := time.Now()
	key := f.bindings[i].Current()
	e := &broker.Event{
		Event: envelope.Event{
			Site: f.sites[i], Kind: "order", Edge: benchEdge, Epoch: f.epoch, From: seq, Seq: seq,
			ID:       fmt.Sprintf("%s-%s-%d", f.epoch, f.sites[i], seq),
			Accepted: now.UnixMilli(), Deadline: now.Add(10 * time.Minute).UnixMilli(), Via: "hub", Triple: t,
		},
		Bind: key.ID(),
	}
	e.Tag = key.TagEvent(&e.Event)
	return e
}

// cipherMap is cipherSettings in a program's file.
func cipherMap() map[string]any {
	return map[string]any{"profile": string(cipherSettings.Profile), "iterations": cipherSettings.Iterations}
}

// token makes a credential and its hash for a program's file.
func token() (secret string, door []map[string]any) {
	secret, sum := cli.NewToken()
	return secret, []map[string]any{{"name": "bench", "sha256": sum}}
}

// writeSettings writes a program's file: JSON, which is YAML.
func (c *crew) writeSettings(name string, v any) (string, error) {
	raw, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return "", err
	}
	return c.file(name), os.WriteFile(c.file(name), append(raw, '\n'), 0o600)
}
