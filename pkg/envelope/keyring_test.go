package envelope

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestNewKeyringRefuses(t *testing.T) {
	s := testSettings(A256GCM)
	k := testKey(t, s, "fp")
	for _, c := range []struct {
		name, says string
		settings   Settings
		keys       []*Key
	}{
		{"bad settings", "profile: required", Settings{}, nil},
		{"duplicate fingerprint", "keys[1]: fingerprint fp is there already", s, []*Key{k, testKey(t, s, "fp")}},
		{"other settings", "keys[0]: key fp was made under other settings", s, []*Key{testKey(t, testSettings(A256CTR), "fp")}},
		{"nil", "keys[1]: nil", s, []*Key{k, nil}},
	} {
		_, err := NewKeyring(c.settings, c.keys...)
		if !errors.Is(err, ErrSettings) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// The defaults spelled out are the same settings.
	if _, err := NewKeyring(Settings{Profile: A256GCM, KDF: "pbkdf2", Hash: "sha256", Iterations: 1, IVEncoding: Base64, MessageEncoding: Base64}, k); err != nil {
		t.Error(err)
	}
}

func TestKeyring(t *testing.T) {
	s := testSettings(A256GCM)
	old, err := NewKey(s, KeyConfig{Fingerprint: "old", Passphrase: "p", ValidAfter: noon.Add(-2 * time.Hour), ValidUntil: noon.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	next := testKey(t, s, "next")
	given := []*Key{old, next}
	r := testRing(t, s, given...)
	if r.Settings() != s {
		t.Errorf("settings are %v, want those given", r.Settings())
	}
	keys := r.Keys()
	if len(keys) != 2 || keys[0] != next || keys[1] != old {
		t.Errorf("keys are %v, want the newest first", keys)
	}
	keys[0], given[0] = nil, nil
	if k, ok := r.Key([]byte("next")); !ok || k != next {
		t.Error("changing the slice of the caller changed the ring")
	}
	if _, ok := r.Key([]byte("nex")); ok {
		t.Error("a part of a fingerprint finds its key")
	}

	empty := testRing(t, s)
	if _, err := empty.Primary(noon); !errors.Is(err, ErrNoKey) {
		t.Errorf("empty ring: %v", err)
	}
	if err := empty.CheckIV([]byte("AAAAAAAAAAAAAAAA")); err != nil {
		t.Errorf("the form of an IV needs no key: %v", err)
	}
	if _, err := empty.Accept(nil, Triple{}, noon, 0); !errors.Is(err, ErrUnknownFingerprint) {
		t.Errorf("empty ring: %v", err)
	}
	if _, err := empty.Open(nil, Triple{Fingerprint: []byte(strings.Repeat("x", 10_000))}); !errors.Is(err, ErrUnknownFingerprint) || len(err.Error()) > 300 {
		t.Errorf("an absurd fingerprint floods the error: %d bytes", len(err.Error()))
	}
}

// TestPrimaryIsTheSameForEqualKeys: two keys of one moment are told apart the same way by every process.
func TestPrimaryIsTheSameForEqualKeys(t *testing.T) {
	s := testSettings(A256GCM)
	a, b := testKey(t, s, "a"), testKey(t, s, "b")
	for _, r := range []*Keyring{testRing(t, s, a, b), testRing(t, s, b, a)} {
		if k, err := r.Primary(noon); err != nil || k != a {
			t.Errorf("primary is %v, %v", k, err)
		}
	}
}

func TestCheckIV(t *testing.T) {
	for _, c := range []struct {
		profile  Profile
		encoding Encoding
		text     string
		ok       bool
	}{
		{A256GCM, Base64, "AAAAAAAAAAAAAAAA", true},
		{A256GCM, Base64, "", false},
		{A256GCM, Base64, "AAAAAAAAAAAAAAA=", false},
		{A256GCM, Base64, "AAAAAAAA\nAAAAAAA", false},
		{A256GCM, Base64, "AAAAAAAAAAAAAAAA\n", false},
		{A256GCM, Base64, "AAAAAAAAAAAA\n\n\n\n", false},
		{A256GCM, Base64, "AAAAAAAA-_AAAAAA", false},
		{A256GCM, Base64URL, "AAAAAAAA-_AAAAAA", true},
		{A256GCM, Base64URL, "AAAAAAAA+/AAAAAA", false},
		{A256GCM, Base64URL, "AAAAAAAA\nAAAAAAAA", false}, // decodes to 12 bytes, were line breaks passed over
		{A256GCM, Hex, "00112233445566778899aAbB", true},
		{A256GCM, Hex, "00112233445566778899aAb", false},
		{A256GCM, Hex, "00112233445566778899aAbg", false},
		{A256CTR, Base64, "AAAAAAAAAAAAAAAAAAAAAA==", true},
		{A256CTR, Base64, "AAAAAAAAAAAAAAAAAAAAAA", false},
		{A256CTR, Base64, "AAAAAAAAAAAAAAAAAAAAAB==", false}, // unused bits
		{A256CTR, Base64URL, "AAAAAAAAAAAAAAAAAAAAAA", true},
		{A256CTR, Base64URL, "AAAAAAAAAAAAAAAAAAAAAA==", true},
		{A256CTR, Base64URL, "AAAAAAAAAAAAAAAAAAAAAA=", false},
		{A256CTR, Base64URL, "AAAAAAAAAAAAAAAAAAAAAB", false}, // unused bits
		{A256CTR, Base64URL, "AAAAAAAAAAAAAAAAAAAAA\nA", false},
		{A256CTR, Hex, strings.Repeat("0", 32), true},
		{A256CTR, Hex, strings.Repeat("0", 64), false},
		{A256CTR, Hex, strings.Repeat("0", 65), false},
	} {
		r := testRing(t, Settings{Profile: c.profile, IVEncoding: c.encoding})
		if err := r.CheckIV([]byte(c.text)); (err == nil) != c.ok || !c.ok && !errors.Is(err, ErrIV) {
			t.Errorf("%s %s %q: %v", c.profile, c.encoding, c.text, err)
		}
	}
}
