package envelope

import (
	"errors"
	"strconv"
)

// What callers branch on, with errors.Is. The errors returned wrap one of these and add what was wrong, where, and what to do.
var (
	// ErrSettings: a cipher profile, key or binding is configured wrongly.
	ErrSettings = errors.New("wrong settings")
	// ErrTriple: the JSON of a triple is malformed.
	ErrTriple = errors.New("malformed triple")
	// ErrTooLarge: the JSON of a triple is larger than the caller allows.
	ErrTooLarge = errors.New("triple too large")
	// ErrHeaders: sec-iv or sec-fingerprint is missing, empty or repeated.
	ErrHeaders = errors.New("incorrect security headers")
	// ErrIV: the IV has the wrong encoding or length for the profile.
	ErrIV = errors.New("malformed IV")
	// ErrDecrypt: the message does not open under the key.
	ErrDecrypt = errors.New("unable to decrypt")
	// ErrUnknownFingerprint: no key of the ring, or of the binding, has the fingerprint.
	ErrUnknownFingerprint = errors.New("unknown fingerprint")
	// ErrKeyNotValid: the key is known, and now is outside its validity.
	ErrKeyNotValid = errors.New("key outside its validity")
	// ErrNoKey: the ring holds no key that may seal now.
	ErrNoKey = errors.New("no key to seal with")
	// ErrKeyExhausted: this process has sealed as often as it may under the key; the key must be rotated.
	ErrKeyExhausted = errors.New("key exhausted")
	// ErrTag: the tag does not belong to the event or report.
	ErrTag = errors.New("tag does not verify")
)

// fieldError is one mistake in settings: "path: what is wrong". It is ErrSettings without repeating its text in every line.
type fieldError struct{ field, text string }

func (e *fieldError) Error() string        { return e.field + ": " + e.text }
func (e *fieldError) Is(target error) bool { return target == ErrSettings }

// quote renders text that came from outside for an error message: escaped, and cut so that it cannot flood a log.
func quote[T string | []byte](text T) string {
	const most = 64
	if len(text) > most {
		return strconv.QuoteToASCII(string(text[:most])) + "..."
	}
	return strconv.QuoteToASCII(string(text))
}
