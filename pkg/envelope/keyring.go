package envelope

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// Keyring is the set of a site's keys under one Settings. It is immutable and safe for concurrent use; build a new one to change it.
// It may be empty.
type Keyring struct {
	settings Settings // as given
	form     form
	keys     []*Key // newest first
}

// NewKeyring checks that the keys were made under s and have different fingerprints. The errors are ErrSettings.
func NewKeyring(s Settings, keys ...*Key) (*Keyring, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	seen := make(map[string]bool, len(keys))
	var errs []error
	for i, k := range keys {
		switch {
		case k == nil:
			errs = append(errs, &fieldError{fmt.Sprintf("keys[%d]", i), "nil"})
			continue
		case k.settings != s.normal():
			errs = append(errs, &fieldError{fmt.Sprintf("keys[%d]", i), fmt.Sprintf("%s was made under other settings than the ring's", k)})
		case seen[k.fingerprint]:
			errs = append(errs, &fieldError{fmt.Sprintf("keys[%d]", i), fmt.Sprintf("fingerprint %s is there already; each key of a site needs its own", k.fingerprint)})
		}
		seen[k.fingerprint] = true
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	keys = slices.Clone(keys)
	slices.SortFunc(keys, func(a, b *Key) int {
		return cmp.Or(b.validAfter.Compare(a.validAfter), b.validUntil.Compare(a.validUntil), cmp.Compare(a.fingerprint, b.fingerprint))
	})
	return &Keyring{settings: s, form: newForm(s.normal(), ""), keys: keys}, nil
}

// Settings returns the settings as given to NewKeyring.
func (r *Keyring) Settings() Settings { return r.settings }

// Keys returns a copy of the keys, newest ValidAfter first.
func (r *Keyring) Keys() []*Key { return slices.Clone(r.keys) }

// Key returns the key with the fingerprint.
func (r *Keyring) Key(fingerprint []byte) (*Key, bool) {
	for _, k := range r.keys { // a handful: the Portal gives two
		if k.fingerprint == string(fingerprint) {
			return k, true
		}
	}
	return nil, false
}

// Primary returns the key to seal with at now: of the keys inside their validity, the newest whose SealFrom has come, else the newest.
// A key that this process has used up ([ErrKeyExhausted]) is passed over. Errors: ErrNoKey when no key is inside its validity,
// ErrKeyExhausted when those that are have been used up.
func (r *Keyring) Primary(now time.Time) (*Key, error) {
	var newest, used *Key
	for _, k := range r.keys {
		switch {
		case !k.validAt(now, 0):
		case k.exhausted():
			used = cmp.Or(used, k)
		case !now.Before(k.sealFrom):
			return k, nil
		case newest == nil:
			newest = k
		}
	}
	switch {
	case newest != nil:
		return newest, nil
	case used != nil:
		return nil, fmt.Errorf("%w: %s has sealed %d messages in this process and no other key is valid; rotate the key on the Portal", ErrKeyExhausted, used, maxSeals)
	}
	return nil, fmt.Errorf("%w: none of %d keys is valid at %s; check the site's keys on the Portal and this machine's clock", ErrNoKey, len(r.keys), now.UTC().Format(time.RFC3339))
}

// CheckIV checks the form of an IV's text: encoding and length. Error: ErrIV.
func (r *Keyring) CheckIV(iv []byte) error {
	var raw [ctrIVSize]byte
	_, err := r.form.checkIV(&raw, iv)
	return err
}

// Accept opens t at a door: with the key its fingerprint names, which must be inside its validity, give or take skew. The plaintext
// is appended to dst, as by [Key.Open]. Errors: ErrUnknownFingerprint, ErrKeyNotValid, ErrIV, ErrDecrypt.
func (r *Keyring) Accept(dst []byte, t Triple, now time.Time, skew time.Duration) ([]byte, error) {
	k, err := r.find(t)
	if err != nil {
		return nil, err
	}
	if !k.validAt(now, skew) {
		return nil, fmt.Errorf("%w: %s is valid from %s until %s, and it is %s", ErrKeyNotValid, k,
			k.validAfter.UTC().Format(time.RFC3339), k.validUntil.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return k.Open(dst, t)
}

// Open opens t with the key its fingerprint names, valid or not: to recover what was sealed before a key ended. The plaintext is
// appended to dst, as by [Key.Open]. Errors: ErrUnknownFingerprint, ErrIV, ErrDecrypt.
func (r *Keyring) Open(dst []byte, t Triple) ([]byte, error) {
	k, err := r.find(t)
	if err != nil {
		return nil, err
	}
	return k.Open(dst, t)
}

func (r *Keyring) find(t Triple) (*Key, error) {
	k, ok := r.Key(t.Fingerprint)
	if !ok {
		return nil, fmt.Errorf("%w %s: not among the site's %d keys", ErrUnknownFingerprint, quote(t.Fingerprint), len(r.keys))
	}
	return k, nil
}

// String names the profile and the fingerprints.
func (r *Keyring) String() string {
	if r == nil {
		return "keyring <nil>"
	}
	var b strings.Builder
	b.WriteString("keyring " + string(r.settings.Profile) + " [")
	for i, k := range r.keys {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(k.fingerprint)
	}
	b.WriteByte(']')
	return b.String()
}

// Format prints String under every verb.
func (r *Keyring) Format(f fmt.State, _ rune) { io.WriteString(f, r.String()) }

// LogValue is String.
func (r *Keyring) LogValue() slog.Value { return slog.StringValue(r.String()) }
