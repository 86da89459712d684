package keysync

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// maxKeys: the Portal holds the previous and the current key of a site.
	maxKeys = 2

	// minHKDFPhrase is the fewest bytes that can hold the 128 random bits which `kdf: hkdf`
	// asks of a phrase. More may be needed, which nobody can see from here.
	minHKDFPhrase = 16

	// sealMargin is how long before its end a key is no longer sealed with: an order lives
	// for ten minutes by default, so what was sealed last is still inside its key's
	// validity when it is delivered. When two keys overlap for less than four times that,
	// a quarter of the overlap is left instead.
	sealMargin = 10 * time.Minute
)

// document is what a site object says about the site's keys.
type document struct {
	encryption bool
	keys       []envelope.KeyConfig // oldest first, SealFrom set
}

// parseSite reads the block at path out of a site object. It is strict about what
// decides over keys and blind to everything else in the object. Its errors are
// *fetchError, name the place, and never quote the document.
func parseSite(body []byte, path []string, s envelope.Settings, poll time.Duration) (document, error) {
	if c := bytes.TrimLeft(body, " \t\r\n"); len(c) > 0 && c[0] == '<' {
		return document{}, refused(notJSON, "the answer is HTML or XML: a log-in page or a proxy's error in place of the Portal?")
	}
	if !utf8.Valid(body) {
		return document{}, refused(notJSON, "the site object is not UTF-8")
	}
	block := json.RawMessage(body)
	for i, name := range path {
		in, err := members(block)
		if err != nil {
			if i > 0 {
				return document{}, refused(noBlock, "%s: an object was expected", strings.Join(path[:i], "."))
			}
			return document{}, refused(notJSON, "the site object is not one JSON object: %w", err)
		}
		found, err := in.one(name)
		if err != nil {
			return document{}, refused(noBlock, "%s: %w: does `path` name the encryption block?", strings.Join(path[:i+1], "."), err)
		}
		block = found
	}
	at := strings.Join(path, ".")
	in, err := members(block)
	if err != nil {
		return document{}, refused(noBlock, "%s: an object was expected", at)
	}

	var d document
	raw, err := in.one("encryption")
	if err != nil {
		return document{}, refused(badBlock, "%s.encryption: %w", at, err)
	}
	switch string(raw) {
	case "true":
		d.encryption = true
	case "false":
		// Keys are present only when encryption is on; should some be left, they are not in use.
		return d, nil
	default:
		return document{}, refused(badBlock, "%s.encryption: true or false was expected", at)
	}

	raw, err = in.one("keys")
	if errors.Is(err, errMissing) || string(raw) == "null" {
		return document{}, refused(noKeys, "%s.keys: missing though encryption is on", at)
	}
	if err != nil {
		return document{}, refused(badBlock, "%s.keys: %w", at, err)
	}
	var keys []json.RawMessage
	if json.Unmarshal(raw, &keys) != nil {
		return document{}, refused(badBlock, "%s.keys: a list was expected", at)
	}
	switch n := len(keys); {
	case n == 0:
		return document{}, refused(noKeys, "%s.keys: empty though encryption is on", at)
	case n > maxKeys:
		return document{}, refused(tooManyKeys, "%s.keys: %d keys, at most %d (previous and current) were expected", at, n, maxKeys)
	}
	for i, raw := range keys {
		k, err := parseKey(raw, s)
		if err != nil {
			err.text = fmt.Sprintf("%s.keys[%d]%s", at, i, err.text)
			return document{}, err
		}
		if slices.ContainsFunc(d.keys, func(o envelope.KeyConfig) bool { return o.Fingerprint == k.Fingerprint }) {
			return document{}, refused(duplicateFingerprint, "%s.keys[%d].fingerprint: the same as that of the key before it", at, i)
		}
		d.keys = append(d.keys, k)
	}
	slices.SortStableFunc(d.keys, func(a, b envelope.KeyConfig) int {
		if c := a.ValidAfter.Compare(b.ValidAfter); c != 0 {
			return c
		}
		return a.ValidUntil.Compare(b.ValidUntil)
	})
	for i := range d.keys {
		d.keys[i].SealFrom = d.keys[i].ValidAfter
		if i > 0 {
			d.keys[i].SealFrom = sealFrom(d.keys[i-1], d.keys[i], poll)
		}
	}
	return d, nil
}

// parseKey reads one key. The error's text begins with the member it is about.
func parseKey(raw json.RawMessage, s envelope.Settings) (envelope.KeyConfig, *fetchError) {
	in, err := members(raw)
	if err != nil {
		return envelope.KeyConfig{}, refused(badBlock, ": an object was expected")
	}
	var k envelope.KeyConfig
	var value, after, until string
	for _, f := range []struct {
		name string
		to   *string
	}{{"fingerprint", &k.Fingerprint}, {"value", &value}, {"valid_after", &after}, {"valid_until", &until}} {
		if *f.to, err = in.text(f.name); err != nil {
			return envelope.KeyConfig{}, refused(badBlock, ".%s: %w", f.name, err)
		}
	}
	k.Passphrase = envelope.Secret(value)
	switch {
	case envelope.IsBindingFingerprint([]byte(k.Fingerprint)):
		return envelope.KeyConfig{}, refused(badFingerprint, ".fingerprint: begins with \"kb:\", which is reserved for binding keys")
	case value == "":
		return envelope.KeyConfig{}, refused(badPhrase, ".value: empty")
	case strings.ContainsRune(value, utf8.RuneError):
		return envelope.KeyConfig{}, refused(badPhrase, ".value: holds a broken character (U+FFFD), so it would not give the key that the other side has")
	case s.KDF == "hkdf" && len(value) < minHKDFPhrase:
		return envelope.KeyConfig{}, refused(badPhrase, ".value: %d bytes cannot hold the 128 random bits that `kdf: hkdf` needs: use `kdf: pbkdf2` or a longer secret", len(value))
	}
	var bad *fetchError
	if k.ValidAfter, bad = parseTime("valid_after", after); bad != nil {
		return envelope.KeyConfig{}, bad
	}
	if k.ValidUntil, bad = parseTime("valid_until", until); bad != nil {
		return envelope.KeyConfig{}, bad
	}
	if !k.ValidUntil.After(k.ValidAfter) {
		return envelope.KeyConfig{}, refused(badValidity, ".valid_until: not after valid_after")
	}
	if _, err := envelope.NewKey(s, k); err != nil {
		// Its text would quote the fingerprint, which in a muddled document may be the phrase.
		return envelope.KeyConfig{}, &fetchError{reason: badFingerprint, cause: err,
			text: ".fingerprint: 1 to 128 visible ASCII characters were expected"}
	}
	return k, nil
}

// timeForms are the forms of ISO-8601 that name one moment. A numeric zone is as good
// as Z; without any, the moment would be a guess.
var timeForms = []string{time.RFC3339, "2006-01-02T15:04:05Z0700"}

// parseTime reads a time. Fractions of a second are allowed.
func parseTime(name, text string) (time.Time, *fetchError) {
	for _, form := range timeForms {
		if t, err := time.Parse(form, text); err == nil {
			return t.UTC(), nil
		}
	}
	for _, form := range []string{"2006-01-02T15:04:05", "2006-01-02 15:04:05"} {
		if _, err := time.Parse(form, text); err == nil {
			return time.Time{}, refused(badTime, ".%s: has no time zone: ISO-8601 in UTC was expected, as in 2026-01-31T08:00:00Z", name)
		}
	}
	return time.Time{}, refused(badTime, ".%s: not a time: ISO-8601 in UTC was expected, as in 2026-01-31T08:00:00Z", name)
}

// sealFrom tells from when on newer is sealed with. Nobody acknowledges keys yet, so
// everybody is given two polls to fetch it; but the older key's end is not waited for
// to the last moment, and no key is used before its time.
func sealFrom(older, newer envelope.KeyConfig, poll time.Duration) time.Time {
	from := newer.ValidAfter.Add(2 * poll)
	margin := min(sealMargin, older.ValidUntil.Sub(newer.ValidAfter)/4)
	if last := older.ValidUntil.Add(-margin); last.Before(from) {
		from = last
	}
	if from.Before(newer.ValidAfter) {
		return newer.ValidAfter
	}
	return from
}

var (
	errMissing  = errors.New("missing")
	errRepeated = errors.New("given more than once")
)

// object is one JSON object with its members' names as they were written:
// encoding/json would take "Encryption" for "encryption", and the last of two.
type object []member

type member struct {
	name  string
	value json.RawMessage
}

// members splits one JSON object. Its errors name a position and never quote.
func members(raw []byte) (object, error) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	fail := func(err error) (object, error) {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, errors.New("it ends too early")
		}
		return nil, fmt.Errorf("no JSON at byte %d", dec.InputOffset())
	}
	if t, err := dec.Token(); err != nil {
		return fail(err)
	} else if t != json.Delim('{') {
		return nil, errors.New("not an object")
	}
	var o object
	for dec.More() {
		name, err := dec.Token()
		if err != nil {
			return fail(err)
		}
		var m member
		m.name, _ = name.(string) // the decoder lets no other name pass
		if err := dec.Decode(&m.value); err != nil {
			return fail(err)
		}
		o = append(o, m)
	}
	if _, err := dec.Token(); err != nil {
		return fail(err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("more follows at byte %d", dec.InputOffset())
	}
	return o, nil
}

// one returns the member of that name: errMissing, errRepeated.
func (o object) one(name string) (json.RawMessage, error) {
	var found json.RawMessage
	for _, m := range o {
		if m.name != name {
			continue
		}
		if found != nil {
			return nil, errRepeated
		}
		found = m.value
	}
	if found == nil {
		return nil, errMissing
	}
	return found, nil
}

// text returns the member of that name, a JSON string.
func (o object) text(name string) (string, error) {
	raw, err := o.one(name)
	if err != nil {
		return "", err
	}
	var s string
	if raw[0] != '"' || json.Unmarshal(raw, &s) != nil {
		return "", errors.New("a text was expected")
	}
	return s, nil
}
