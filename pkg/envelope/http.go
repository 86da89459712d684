package envelope

import (
	"fmt"
	"net/http"
)

// The headers of an encrypted request, in canonical form. Its body is the message's text.
const (
	HeaderIV          = "Sec-Iv"
	HeaderFingerprint = "Sec-Fingerprint"
)

// FromHTTP returns the triple of a request: its two headers, copied, and its body, not copied. Each header must be there once and
// not be empty, else the error is ErrHeaders. What the texts say is not looked at: see [Keyring.CheckIV] and [Keyring.Accept].
func FromHTTP(h http.Header, body []byte) (Triple, error) {
	iv, err := one(h, HeaderIV)
	if err != nil {
		return Triple{}, err
	}
	fingerprint, err := one(h, HeaderFingerprint)
	if err != nil {
		return Triple{}, err
	}
	return Triple{IV: iv, Fingerprint: fingerprint, Message: body}, nil
}

func one(h http.Header, name string) ([]byte, error) {
	switch values := h.Values(name); {
	case len(values) == 0:
		return nil, fmt.Errorf("%w: %s is missing", ErrHeaders, name)
	case len(values) > 1:
		return nil, fmt.Errorf("%w: %s is there %d times; once is allowed", ErrHeaders, name, len(values))
	case values[0] == "":
		return nil, fmt.Errorf("%w: %s is empty", ErrHeaders, name)
	default:
		return []byte(values[0]), nil
	}
}

// SetHTTP sets the two headers. The body of the request is t.Message, untouched. Whatever a key sealed or opened stands in a header
// as it is.
func (t Triple) SetHTTP(h http.Header) {
	h.Set(HeaderIV, string(t.IV))
	h.Set(HeaderFingerprint, string(t.Fingerprint))
}
