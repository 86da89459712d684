package main

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// siteSecrets are a site's secrets as the binding file holds them. What is made of them
// here follows docs/spec/envelope.md and shares no line with pkg/envelope.
type siteSecrets struct {
	Lane string `json:"lane"`
	Keys []struct {
		ID  string `json:"id"`
		Key string `json:"key"`
	} `json:"keys"`
}

func readBinding(path string) (map[string]siteSecrets, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var f struct {
		Sites map[string]siteSecrets `json:"sites"`
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f.Sites, nil
}

// messageID is the Kb-Id of a message with an Idempotency-Key.
func (s siteSecrets) messageID(site, pos, kind, key string) (string, error) {
	sum, err := mac(s.Lane, "kb-message-id", []string{"\x01", site, pos, kind, key})
	if err != nil {
		return "", err
	}
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:20])), nil
}

func mac(secret, label string, fields []string) ([]byte, error) {
	raw, err := base64.StdEncoding.DecodeString(secret)
	if err != nil {
		return nil, err
	}
	sub, err := hkdf.Key(sha256.New, raw, nil, label, 32)
	if err != nil {
		return nil, err
	}
	m := hmac.New(sha256.New, sub)
	for _, f := range fields {
		m.Write(binary.BigEndian.AppendUint32(nil, uint32(len(f))))
		m.Write([]byte(f))
	}
	return m.Sum(nil), nil
}

type triple struct {
	IV          string `json:"iv"`
	Fingerprint string `json:"fingerprint"`
	Message     string `json:"message"`
}

func parseTriple(b []byte) (triple, error) {
	var t triple
	err := json.Unmarshal(b, &t)
	return t, err
}

// subKeys are the labels of docs/spec/envelope.md, section 3.
var (
	bindingLabels = []string{"kb-event-tag", "kb-report-tag", "kb-report-seal", "kb-plain-seal"}
	laneLabels    = []string{"kb-order", "kb-message-id", "kb-envelope-id", "kb-payload-hash"}
)

// all returns the site's secrets and what is derived from them, as bytes.
func (s siteSecrets) all() (map[string]string, error) {
	out := map[string]string{}
	add := func(what, encoded string, labels []string) error {
		raw, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return err
		}
		out[what] = string(raw)
		for _, label := range labels {
			sub, err := hkdf.Key(sha256.New, raw, nil, label, 32)
			if err != nil {
				return err
			}
			out[what+" for "+label] = string(sub)
		}
		return nil
	}
	err := add("a lane key", s.Lane, laneLabels)
	for i, k := range s.Keys {
		err = errors.Join(err, add(fmt.Sprintf("binding key %d", i), k.Key, bindingLabels))
	}
	return out, err
}

// derive makes the cipher's key of a pass phrase, with the settings of every site here.
func derive(phrase string) (string, error) {
	key, err := pbkdf2.Key(sha256.New, phrase, nil, iterations, 32)
	return string(key), err
}
