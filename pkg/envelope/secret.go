package envelope

import (
	"fmt"
	"io"
	"log/slog"
)

const redacted = "[redacted]"

// Secret is a text that must not be printed: a pass phrase, a token. Printing, logging and marshalling it give "[redacted]"; only
// Reveal gives the text.
//
// Being a string it has three limits, which its users keep in mind: fmt calls no methods on what it reaches through an unexported
// field, nor through a pointer under a verb that fits no pointer (%s of a *Config whose field is a Secret), nor for %p; and
// encoding/json writes the keys of a map as they are. A type that holds a Secret therefore has a Format method, as those of this
// package have.
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
