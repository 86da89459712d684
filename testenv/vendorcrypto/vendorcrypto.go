// Package vendorcrypto is the protocol's cryptography as the vendor of a POS or a Kitchen
// would write it: from the document and the standard library, sharing no line with
// pkg/envelope. The stub Kitchen and the POS drivers stand on it, so that they can
// disagree with the product. It seals and opens one message at a time and is made for
// tests, not for speed.
package vendorcrypto

import (
	"bytes"
	"cmp"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// Secret is a pass phrase or a token. However it is printed, logged or marshalled, it
// reads "[redacted]"; string(s) gives it away on purpose.
type Secret string

const redacted = "[redacted]"

// String redacts.
func (Secret) String() string { return redacted }

// Format redacts under every verb, %x included.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue redacts.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText redacts, in JSON too.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Key is one key of a site as the Portal hands it out.
type Key struct {
	Fingerprint string
	Passphrase  Secret
	// ValidAfter and ValidUntil bound the key's use: from ValidAfter on, before
	// ValidUntil. A zero time is no bound.
	ValidAfter, ValidUntil time.Time
}

// ValidAt reports whether the key may be used at t, give or take skew.
func (k Key) ValidAt(t time.Time, skew time.Duration) bool {
	return !t.Before(k.ValidAfter.Add(-skew)) && (k.ValidUntil.IsZero() || t.Before(k.ValidUntil.Add(skew)))
}

// KeysFunc tells what the Portal says about a site now: whether its traffic is encrypted,
// and its keys. It is called for every message, possibly at the same time.
type KeysFunc func(site string) (encryption bool, keys []Key)

// Newest returns the key that became valid last among those valid at t.
func Newest(keys []Key, t time.Time) (Key, bool) {
	valid := slices.DeleteFunc(slices.Clone(keys), func(k Key) bool { return !k.ValidAt(t, 0) })
	if len(valid) == 0 {
		return Key{}, false
	}
	return slices.MaxFunc(valid, func(a, b Key) int { return a.ValidAfter.Compare(b.ValidAfter) }), true
}

// Profile is everything both ends must agree on besides the key. Comparable.
type Profile struct {
	Cipher          string `json:"profile"`          // "a256gcm" or "a256ctr"; required
	KDF             string `json:"kdf"`              // "pbkdf2" (default) or "hkdf"
	Hash            string `json:"hash"`             // "sha256" (default), "sha1" or "sha512"
	Iterations      int    `json:"iterations"`       // of pbkdf2; default 600,000
	Salt            string `json:"salt"`             // UTF-8 text; default empty
	Info            string `json:"info"`             // of hkdf; default "kb-" and the profile
	IVEncoding      string `json:"iv_encoding"`      // "base64" (default), "base64url" (without padding) or "hex"
	MessageEncoding string `json:"message_encoding"` // as IVEncoding
}

func (p Profile) withDefaults() Profile {
	p.KDF = cmp.Or(p.KDF, "pbkdf2")
	p.Hash = cmp.Or(p.Hash, "sha256")
	p.Iterations = cmp.Or(p.Iterations, 600_000)
	p.Info = cmp.Or(p.Info, "kb-"+p.Cipher)
	p.IVEncoding = cmp.Or(p.IVEncoding, "base64")
	p.MessageEncoding = cmp.Or(p.MessageEncoding, "base64")
	return p
}

// Validate reports every mistake in the profile at once.
func (p Profile) Validate() error {
	p = p.withDefaults()
	var errs []error
	for _, c := range []struct {
		field, value string
		of           []string
	}{
		{"profile", p.Cipher, []string{"a256gcm", "a256ctr"}},
		{"kdf", p.KDF, []string{"pbkdf2", "hkdf"}},
		{"hash", p.Hash, []string{"sha256", "sha1", "sha512"}},
		{"iv_encoding", p.IVEncoding, []string{"base64", "base64url", "hex"}},
		{"message_encoding", p.MessageEncoding, []string{"base64", "base64url", "hex"}},
	} {
		if !slices.Contains(c.of, c.value) {
			errs = append(errs, fmt.Errorf("%s: %q is none of %s", c.field, c.value, strings.Join(c.of, ", ")))
		}
	}
	if p.Iterations < 0 {
		errs = append(errs, fmt.Errorf("iterations: %d is negative", p.Iterations))
	}
	return errors.Join(errs...)
}

// Cipher seals and opens under one derived key. Immutable; safe for concurrent use.
type Cipher struct {
	profile Profile
	block   cipher.Block
	gcm     cipher.AEAD // nil for a256ctr
}

// Derive makes the cipher of a pass phrase. With pbkdf2's default it takes about 0.1 s;
// Cache does it once for each key.
func Derive(p Profile, phrase Secret) (*Cipher, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	p = p.withDefaults()
	newHash := map[string]func() hash.Hash{"sha256": sha256.New, "sha1": sha1.New, "sha512": sha512.New}[p.Hash]
	var key []byte
	var err error
	if p.KDF == "hkdf" {
		key, err = hkdf.Key(newHash, []byte(phrase), []byte(p.Salt), p.Info, 32)
	} else {
		key, err = pbkdf2.Key(newHash, string(phrase), []byte(p.Salt), p.Iterations, 32)
	}
	if err != nil {
		return nil, fmt.Errorf("derive the key: %w", err)
	}
	c := &Cipher{profile: p}
	if c.block, err = aes.NewCipher(key); err != nil {
		return nil, err
	}
	if p.Cipher == "a256gcm" {
		if c.gcm, err = cipher.NewGCM(c.block); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// IVSize is the length of the profile's IV in bytes.
func (c *Cipher) IVSize() int {
	if c.gcm != nil {
		return 12
	}
	return aes.BlockSize
}

// Seal encrypts plain under a fresh random IV and returns both texts as they stand on the
// wire.
func (c *Cipher) Seal(plain []byte) (iv, message string) {
	raw := make([]byte, c.IVSize())
	_, _ = rand.Read(raw) // never fails; see crypto/rand
	return encode(c.profile.IVEncoding, raw), encode(c.profile.MessageEncoding, c.apply(raw, plain))
}

func (c *Cipher) apply(iv, plain []byte) []byte {
	if c.gcm != nil {
		return c.gcm.Seal(nil, iv, plain, nil)
	}
	out := make([]byte, len(plain))
	cipher.NewCTR(c.block, iv).XORKeyStream(out, plain)
	return out
}

// CheckIV reports whether the text of an IV has the profile's form.
func (c *Cipher) CheckIV(iv string) error {
	_, err := c.iv(iv)
	return err
}

func (c *Cipher) iv(text string) ([]byte, error) {
	raw, err := decode(c.profile.IVEncoding, text)
	if err != nil {
		return nil, fmt.Errorf("iv: %w", err)
	}
	if len(raw) != c.IVSize() {
		return nil, fmt.Errorf("iv: %d bytes instead of %d", len(raw), c.IVSize())
	}
	return raw, nil
}

// Open decrypts the texts of a message. White space after the message is ignored. Under
// a256ctr a wrong key is no error here: it gives garbage, and only the caller knows what
// the plaintext should look like.
func (c *Cipher) Open(iv, message string) ([]byte, error) {
	raw, err := c.iv(iv)
	if err != nil {
		return nil, err
	}
	sealed, err := decode(c.profile.MessageEncoding, strings.TrimRight(message, " \t\r\n"))
	if err != nil {
		return nil, fmt.Errorf("message: %w", err)
	}
	if c.gcm == nil {
		return c.apply(raw, sealed), nil
	}
	plain, err := c.gcm.Open(nil, raw, sealed, nil)
	if err != nil {
		return nil, fmt.Errorf("message: %w", err)
	}
	return plain, nil
}

func encode(encoding string, b []byte) string {
	switch encoding {
	case "hex":
		return hex.EncodeToString(b)
	case "base64url":
		return base64.RawURLEncoding.EncodeToString(b)
	}
	return base64.StdEncoding.EncodeToString(b)
}

func decode(encoding, s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") { // encoding/base64 would skip them
		return nil, errors.New("line break inside")
	}
	switch encoding {
	case "hex":
		return hex.DecodeString(s)
	case "base64url":
		return base64.RawURLEncoding.Strict().DecodeString(strings.TrimRight(s, "="))
	}
	return base64.StdEncoding.Strict().DecodeString(s)
}

// maxCached bounds the Cache; beyond it an arbitrary cipher is derived again when needed.
const maxCached = 1 << 16

// Cache derives each key once, however many ask at the same time. The zero value is
// ready; safe for concurrent use.
type Cache struct {
	mu sync.Mutex
	of map[cacheKey]func() (*Cipher, error)
}

type cacheKey struct {
	profile Profile
	phrase  Secret
}

// Cipher returns the cipher of a key, deriving it when it is new.
func (c *Cache) Cipher(p Profile, k Key) (*Cipher, error) {
	key := cacheKey{p, k.Passphrase}
	c.mu.Lock()
	derive, ok := c.of[key]
	if !ok {
		if c.of == nil {
			c.of = map[cacheKey]func() (*Cipher, error){}
		}
		if len(c.of) >= maxCached {
			for old := range c.of {
				delete(c.of, old)
				break
			}
		}
		derive = sync.OnceValues(func() (*Cipher, error) { return Derive(p, k.Passphrase) })
		c.of[key] = derive
	}
	c.mu.Unlock()
	return derive()
}

// TripleHash is a digest of what a POS puts on the wire: IV, fingerprint and body, byte
// for byte. Sender and receiver compute it alike, so equal digests mean that the message
// was passed on untouched.
func TripleHash(iv, fingerprint string, body []byte) string {
	var b bytes.Buffer
	for _, part := range [][]byte{[]byte(iv), []byte(fingerprint), body} {
		_ = binary.Write(&b, binary.BigEndian, uint64(len(part)))
		b.Write(part)
	}
	return PayloadHash(b.Bytes())
}

// PayloadHash is the SHA-256 of a payload in hex.
func PayloadHash(payload []byte) string {
	sum := sha256.Sum256(payload)
	return hex.EncodeToString(sum[:])
}
