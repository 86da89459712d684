package envelope

import (
	"crypto/hkdf"
	"crypto/pbkdf2"
	"crypto/rand"
	_ "crypto/sha1"   // registered for Settings.Hash
	_ "crypto/sha256" // registered for Settings.Hash
	_ "crypto/sha512" // registered for Settings.Hash
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// KeyConfig is one key of a site as the Portal gives it.
type KeyConfig struct {
	// Fingerprint names the key on the wire: 1 to 128 visible ASCII characters, not beginning with "kb:". Required.
	Fingerprint string
	// Passphrase is the text the cipher key is derived from, taken as its UTF-8 bytes without any normalisation. Required.
	Passphrase Secret
	// ValidAfter and ValidUntil bound the validity: ValidAfter <= now < ValidUntil. ValidUntil is required.
	ValidAfter, ValidUntil time.Time
	// SealFrom is when sealing with this key begins; zero means ValidAfter. See [Keyring.Primary].
	SealFrom time.Time
}

// String gives everything but the pass phrase.
func (c KeyConfig) String() string {
	return fmt.Sprintf("{fingerprint %s, pass phrase %s, valid %s to %s, seal from %s}", quote(c.Fingerprint), redacted,
		c.ValidAfter.Format(time.RFC3339), c.ValidUntil.Format(time.RFC3339), c.sealFrom().Format(time.RFC3339))
}

// Format prints String under every verb.
func (c KeyConfig) Format(f fmt.State, _ rune) { io.WriteString(f, c.String()) }

// LogValue is String.
func (c KeyConfig) LogValue() slog.Value { return slog.StringValue(c.String()) }

// Key is one Portal key of a site. It is immutable and safe for concurrent use. Its cipher is derived on first use, once, and
// shared by all copies made with WithSealFrom; so is its count of seals.
type Key struct {
	fingerprint                      string
	validAfter, validUntil, sealFrom time.Time
	settings                         Settings // normal
	form                             form
	derived                          *derived
}

// derived is what copies of a Key share. The pass phrase is in a closure because fmt, which asks nobody about unexported fields, also
// follows a pointer in one when the verb does not fit; no way of printing looks into a function.
type derived struct {
	phrase func() Secret
	once   sync.Once
	suite  atomic.Pointer[suite] // nil until derived, and when that failed
	err    error
}

// NewKey checks the settings and the key; it derives nothing yet. Every mistake is reported; the errors are ErrSettings.
func NewKey(s Settings, c KeyConfig) (*Key, error) {
	err := s.Validate()
	s = s.normal()
	if err := errors.Join(err, checkFingerprint(c.Fingerprint), checkPhrase(s, c.Passphrase), checkValidity(c)); err != nil {
		return nil, err
	}
	phrase := c.Passphrase
	return &Key{
		fingerprint: c.Fingerprint,
		validAfter:  c.ValidAfter,
		validUntil:  c.ValidUntil,
		sealFrom:    c.sealFrom(),
		settings:    s,
		form:        newForm(s, c.Fingerprint),
		derived:     &derived{phrase: func() Secret { return phrase }},
	}, nil
}

func (c KeyConfig) sealFrom() time.Time {
	if c.SealFrom.IsZero() {
		return c.ValidAfter
	}
	return c.SealFrom
}

func checkFingerprint(fp string) error {
	switch {
	case fp == "":
		return &fieldError{"fingerprint", "required: it names the key on the wire"}
	case len(fp) > 128:
		return &fieldError{"fingerprint", fmt.Sprintf("%s has %d bytes; at most 128 are allowed", quote(fp), len(fp))}
	case strings.HasPrefix(fp, bindingPrefix):
		return &fieldError{"fingerprint", fmt.Sprintf("%s begins with %q, which is reserved for binding keys", quote(fp), bindingPrefix)}
	}
	for i := range len(fp) {
		if fp[i] <= ' ' || fp[i] > '~' {
			return &fieldError{"fingerprint", fmt.Sprintf("%s cannot stand in an HTTP header; only visible ASCII characters can", quote(fp))}
		}
	}
	return nil
}

func checkPhrase(s Settings, phrase Secret) error {
	switch {
	case phrase == "":
		return &fieldError{"passphrase", "required"}
	case !utf8.ValidString(string(phrase)):
		return &fieldError{"passphrase", "not valid UTF-8; a pass phrase is a text"}
	case s.KDF == kdfHKDF && len(phrase) < minHKDFPhrase:
		return &fieldError{"passphrase", fmt.Sprintf(`%d bytes; kdf "hkdf" is for random secrets of at least %d bytes, use "pbkdf2" for this one`, len(phrase), minHKDFPhrase)}
	}
	return nil
}

func checkValidity(c KeyConfig) error {
	switch {
	case c.ValidUntil.IsZero():
		return &fieldError{"valid_until", "required"}
	case !c.ValidUntil.After(c.ValidAfter):
		return &fieldError{"valid_until", fmt.Sprintf("%s is not after valid_after %s",
			c.ValidUntil.UTC().Format(time.RFC3339), c.ValidAfter.UTC().Format(time.RFC3339))}
	}
	return nil
}

// Fingerprint returns the name of the key on the wire.
func (k *Key) Fingerprint() string { return k.fingerprint }

// ValidAfter returns when the validity begins.
func (k *Key) ValidAfter() time.Time { return k.validAfter }

// ValidUntil returns when the validity has ended.
func (k *Key) ValidUntil() time.Time { return k.validUntil }

// SealFrom returns when sealing with the key begins.
func (k *Key) SealFrom() time.Time { return k.sealFrom }

// WithSealFrom returns a copy with another SealFrom; zero means ValidAfter. Copies share the derived cipher and the count of seals.
func (k *Key) WithSealFrom(t time.Time) *Key {
	c := *k
	c.sealFrom = KeyConfig{ValidAfter: k.validAfter, SealFrom: t}.sealFrom()
	return &c
}

// Matches reports whether NewKey(s, c) would make this key again, SealFrom aside: then keep this one and its derivation, and set
// SealFrom with WithSealFrom.
func (k *Key) Matches(s Settings, c KeyConfig) bool {
	return k.settings == s.normal() && k.fingerprint == c.Fingerprint && k.derived.phrase() == c.Passphrase &&
		k.validAfter.Equal(c.ValidAfter) && k.validUntil.Equal(c.ValidUntil)
}

// Derive derives the cipher now, when it has not been: with the default settings about 0.12 s of CPU. Concurrent calls derive once
// and all wait for it. Every other method derives by itself when needed; call Derive to keep that off the hot path.
func (k *Key) Derive() error {
	_, err := k.suite()
	return err
}

func (k *Key) suite() (*suite, error) {
	d := k.derived
	if c := d.suite.Load(); c != nil {
		return c, nil
	}
	d.once.Do(func() {
		var c *suite
		c, d.err = derive(k.settings, d.phrase())
		d.suite.Store(c)
	})
	return d.suite.Load(), d.err
}

func derive(s Settings, phrase Secret) (*suite, error) {
	key, err := deriveKey(s, phrase)
	if err != nil {
		return nil, fmt.Errorf("derive key with %s and %s: %w", s.KDF, s.Hash, err)
	}
	return newSuite(s.Profile, key)
}

func deriveKey(s Settings, phrase Secret) ([]byte, error) {
	if s.KDF == kdfHKDF {
		return hkdf.Key(s.hash().New, []byte(phrase), []byte(s.Salt), "kb-"+string(s.Profile), keySize)
	}
	return pbkdf2.Key(s.hash().New, string(phrase), []byte(s.Salt), s.Iterations, keySize)
}

// NewIV appends a fresh random IV of the profile's length to dst. The error is nil: crypto/rand ends the program rather than fail.
func (k *Key) NewIV(dst []byte) ([]byte, error) {
	start := len(dst)
	dst = slices.Grow(dst, k.form.ivSize)[:start+k.form.ivSize]
	rand.Read(dst[start:])
	return dst, nil
}

// SealRaw appends the ciphertext of plaintext to dst. The IV must come fresh from [Key.NewIV]: the same IV twice gives the key's
// traffic away. The ciphertext is as long as the plaintext, and 16 bytes longer under a256gcm. With that much spare capacity in dst,
// a256gcm allocates nothing and a256ctr once. plaintext[:0] may be dst; other overlaps of plaintext and dst's spare capacity panic.
// Errors: ErrIV for a wrong length, ErrKeyExhausted.
func (k *Key) SealRaw(dst, iv, plaintext []byte) ([]byte, error) {
	if err := k.checkRawIV(iv); err != nil {
		return nil, err
	}
	c, err := k.suite()
	if err != nil {
		return nil, err
	}
	if dst, err = c.seal(dst, iv, plaintext); err != nil {
		return nil, fmt.Errorf("key %s: %w", k.fingerprint, err)
	}
	return dst, nil
}

// OpenRaw appends the plaintext of ciphertext to dst. Allocations and overlaps are as for [Key.SealRaw]. Under a256ctr it cannot
// fail: whoever calls it must judge the plaintext. Errors: ErrIV for a wrong length, ErrDecrypt.
func (k *Key) OpenRaw(dst, iv, ciphertext []byte) ([]byte, error) {
	if err := k.checkRawIV(iv); err != nil {
		return nil, err
	}
	c, err := k.suite()
	if err != nil {
		return nil, err
	}
	if dst, err = c.open(dst, iv, ciphertext); err != nil {
		return nil, fmt.Errorf("key %s: %w", k.fingerprint, err)
	}
	return dst, nil
}

func (k *Key) checkRawIV(iv []byte) error {
	if len(iv) != k.form.ivSize {
		return fmt.Errorf("%w: %d bytes; the IV of %s has %d", ErrIV, len(iv), k.settings.Profile, k.form.ivSize)
	}
	return nil
}

// AppendSeal seals plaintext under a fresh random IV and appends the triple to dst as JSON, in the form of [Triple.AppendJSON]. With
// enough spare capacity in dst, a256gcm allocates nothing and a256ctr once. plaintext must not overlap dst's spare capacity. Under
// a256ctr the plaintext must be JSON, or it will not open. Error: ErrKeyExhausted.
func (k *Key) AppendSeal(dst, plaintext []byte) ([]byte, error) {
	c, err := k.suite()
	if err != nil {
		return nil, err
	}
	if dst, err = k.form.appendSeal(dst, c, plaintext); err != nil {
		return nil, fmt.Errorf("key %s: %w", k.fingerprint, err)
	}
	return dst, nil
}

// Seal seals plaintext under a fresh random IV into a new triple. Error: ErrKeyExhausted.
func (k *Key) Seal(plaintext []byte) (Triple, error) {
	c, err := k.suite()
	if err != nil {
		return Triple{}, err
	}
	t, err := k.form.seal(c, k.fingerprint, plaintext)
	if err != nil {
		return Triple{}, fmt.Errorf("key %s: %w", k.fingerprint, err)
	}
	return t, nil
}

// Open decodes and opens t with this key, whatever its fingerprint says, and appends the plaintext to dst. White space after the
// message is tolerated. Under a256ctr a plaintext that is not JSON is refused. With len(t.Message)+16 bytes of spare capacity in dst,
// a256gcm allocates nothing and a256ctr once; that capacity must not overlap t. Errors: ErrIV, ErrDecrypt.
func (k *Key) Open(dst []byte, t Triple) ([]byte, error) {
	c, err := k.suite()
	if err != nil {
		return nil, err
	}
	if dst, err = k.form.open(dst, c, t); err != nil {
		return nil, fmt.Errorf("key %s: %w", k.fingerprint, err)
	}
	return dst, nil
}

func (k *Key) validAt(now time.Time, skew time.Duration) bool {
	return !now.Before(k.validAfter.Add(-skew)) && now.Before(k.validUntil.Add(skew))
}

func (k *Key) exhausted() bool {
	// A key that was never derived has sealed nothing, and asking must not derive it.
	c := k.derived.suite.Load()
	return c != nil && c.exhausted()
}

// String names the key by its fingerprint.
func (k *Key) String() string {
	if k == nil {
		return "key <nil>"
	}
	return "key " + k.fingerprint
}

// Format prints String under every verb.
func (k *Key) Format(f fmt.State, _ rune) { io.WriteString(f, k.String()) }

// LogValue is String.
func (k *Key) LogValue() slog.Value { return slog.StringValue(k.String()) }
