package envelope

import (
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted]"

// Secret is a text that must not be printed: a pass phrase, a token. Every way of printing, logging or marshalling it gives
// "[redacted]"; only Reveal gives the text.
//
// fmt calls no methods on what it reaches through an unexported struct field. A type that keeps a Secret in one must redact itself,
// as the types of this package do.
type Secret string

// Reveal returns the text.
func (s Secret) Reveal() string { return string(s) }

// String redacts.
func (Secret) String() string { return redacted }

// GoString redacts.
func (Secret) GoString() string { return redacted }

// Format redacts under every verb.
func (Secret) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue redacts.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText redacts. A marshalled Secret is lost on purpose.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON redacts. A marshalled Secret is lost on purpose.
func (Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
