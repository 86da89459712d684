package vendorcrypto

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// Made by testdata/vectors.mjs with Node's crypto.
type vector struct {
	Name       string  `json:"name"`
	Profile    Profile `json:"profile"`
	Passphrase string  `json:"passphrase"`
	IV         string  `json:"iv"`
	Message    string  `json:"message"`
	Plain      string  `json:"plain"`
	Open       string  `json:"open"`
}

func TestVectorsOfNodeOpenAsTheySay(t *testing.T) {
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) < 15 {
		t.Fatalf("only %d vectors: the file is not what it was", len(vectors))
	}
	var cache Cache
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			c, err := cache.Cipher(v.Profile, Key{Fingerprint: "f", Passphrase: Secret(v.Passphrase)})
			if err != nil {
				t.Fatal(err)
			}
			plain, err := c.Open(v.IV, v.Message)
			switch v.Open {
			case "ok":
				if err != nil || string(plain) != v.Plain {
					t.Fatalf("got %q, %v; want %q", plain, err, v.Plain)
				}
			case "error":
				if err == nil {
					t.Fatalf("opened to %q", plain)
				}
			case "garbage":
				if err != nil || json.Valid(plain) {
					t.Fatalf("got %q, %v; want something that is no JSON", plain, err)
				}
			default:
				t.Fatalf("unknown outcome %q", v.Open)
			}
		})
	}
}

func TestSealedOpensAgainUnderEveryProfile(t *testing.T) {
	for _, cipher := range []string{"a256gcm", "a256ctr"} {
		for _, encoding := range []string{"", "base64", "base64url", "hex"} {
			for _, hash := range []string{"", "sha1", "sha256", "sha512"} {
				p := Profile{Cipher: cipher, Hash: hash, Iterations: 2, IVEncoding: encoding, MessageEncoding: encoding}
				c, err := Derive(p, "phrase")
				if err != nil {
					t.Fatal(err)
				}
				iv, message := c.Seal([]byte(`{"a":1}`))
				if again, _ := c.Seal([]byte(`{"a":1}`)); again == iv {
					t.Errorf("%+v: the same IV twice", p)
				}
				if plain, err := c.Open(iv, message); err != nil || string(plain) != `{"a":1}` {
					t.Errorf("%+v: %q, %v", p, plain, err)
				}
				if err := c.CheckIV(iv[1:]); err == nil {
					t.Errorf("%+v: a short IV passes", p)
				}
			}
		}
	}
}

func TestProfileReportsEveryMistakeAtOnce(t *testing.T) {
	err := Profile{Cipher: "rot13", KDF: "md5", Hash: "crc", Iterations: -1, IVEncoding: "morse", MessageEncoding: "smoke"}.Validate()
	for _, word := range []string{"profile", "kdf", "hash", "iterations", "iv_encoding", "message_encoding"} {
		if err == nil || !strings.Contains(err.Error(), word+":") {
			t.Errorf("%s is not reported: %v", word, err)
		}
	}
	if _, err := Derive(Profile{}, "p"); err == nil {
		t.Error("a profile without cipher derives a key")
	}
}

func TestKeysAreValidFromAfterToUntil(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	k := Key{ValidAfter: now, ValidUntil: now.Add(time.Hour)}
	for _, row := range []struct {
		name string
		at   time.Duration
		skew time.Duration
		want bool
	}{
		{"before", -1, 0, false},
		{"first moment", 0, 0, true},
		{"last moment", time.Hour - 1, 0, true},
		{"end", time.Hour, 0, false},
		{"before, within skew", -time.Minute, time.Minute, true},
		{"after, within skew", time.Hour, time.Minute, true},
		{"after, beyond skew", time.Hour + time.Minute, time.Minute, false},
	} {
		if got := k.ValidAt(now.Add(row.at), row.skew); got != row.want {
			t.Errorf("%s: %v", row.name, got)
		}
	}
	if !(Key{}).ValidAt(now, 0) {
		t.Error("a key without bounds is not valid")
	}
}

func TestNewestPrefersTheLatestValidKey(t *testing.T) {
	now := time.Now()
	old := Key{Fingerprint: "old", ValidAfter: now.Add(-2 * time.Hour), ValidUntil: now.Add(time.Hour)}
	cur := Key{Fingerprint: "cur", ValidAfter: now.Add(-time.Hour), ValidUntil: now.Add(time.Hour)}
	next := Key{Fingerprint: "next", ValidAfter: now.Add(time.Hour)}
	if k, ok := Newest([]Key{next, cur, old}, now); !ok || k.Fingerprint != "cur" {
		t.Errorf("got %v, %v", k.Fingerprint, ok)
	}
	if _, ok := Newest([]Key{next}, now); ok {
		t.Error("a key of the future was taken")
	}
}

func TestCacheDerivesAKeyOnceForEachProfile(t *testing.T) {
	var cache Cache
	var wg sync.WaitGroup
	p := Profile{Cipher: "a256gcm", Iterations: 1000}
	got := make([]*Cipher, 8)
	for i := range got {
		wg.Go(func() { got[i], _ = cache.Cipher(p, Key{Passphrase: "x"}) })
	}
	wg.Wait()
	for _, c := range got {
		if c == nil || c != got[0] {
			t.Fatal("one key was derived twice")
		}
	}
	p.Salt = "other"
	if c, err := cache.Cipher(p, Key{Passphrase: "x"}); err != nil || c == got[0] {
		t.Fatalf("another salt gives the same cipher: %v", err)
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	const secret = "hunter2-hunter2"
	k := Key{Fingerprint: "f", Passphrase: secret}
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+"\n", k)
		fmt.Fprintf(&out, verb+"\n", k.Passphrase)
	}
	if err := json.NewEncoder(&out).Encode(k); err != nil {
		t.Fatal(err)
	}
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "key", k, "phrase", k.Passphrase)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "key", k, "phrase", k.Passphrase)
	if s := out.String(); strings.Contains(s, secret) || strings.Contains(s, fmt.Sprintf("%x", secret)) {
		t.Fatalf("the secret is in\n%s", s)
	}
}

func TestTripleHashSeesEveryByteInItsPlace(t *testing.T) {
	base := TripleHash("iv", "fp", []byte("body"))
	for _, other := range []string{
		TripleHash("iv", "fp", []byte("body\n")), TripleHash("ivf", "p", []byte("body")),
		TripleHash("fp", "iv", []byte("body")), TripleHash("iv", "fpb", []byte("ody")),
	} {
		if other == base {
			t.Error("two different messages have one hash")
		}
	}
	if TripleHash("iv", "fp", []byte("body")) != base {
		t.Error("one message has two hashes")
	}
}
