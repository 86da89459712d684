package envelope

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Triple is a sealed message as it stands on the wire: three texts, encoded as the site's [Settings] say.
type Triple struct {
	IV          []byte
	Fingerprint []byte // names the key
	Message     []byte // the encrypted data
}

// AppendJSON appends {"iv":…,"fingerprint":…,"message":…} to dst, without white space. Text that is valid UTF-8 is kept exactly
// (control characters, such as a POS's trailing line break, are escaped) and [ParseTriple] gives it back. JSON cannot carry other
// bytes: each becomes U+FFFD; such a text opens under no encoding.
func (t Triple) AppendJSON(dst []byte) []byte {
	dst = slices.Grow(dst, len(`{"iv":"","fingerprint":"","message":""}`)+len(t.IV)+len(t.Fingerprint)+len(t.Message))
	dst = append(dst, jsonHead...)
	dst = appendEscaped(dst, t.IV)
	dst = append(dst, `","fingerprint":"`...)
	dst = appendEscaped(dst, t.Fingerprint)
	dst = append(dst, `","message":"`...)
	dst = appendEscaped(dst, t.Message)
	return append(dst, jsonTail...)
}

// ParseTriple reads the JSON of a triple: one object with exactly the string fields iv, fingerprint and message, in any order, each
// once; iv and fingerprint not empty. The texts are views into b, except where a JSON escape forces a copy. max bounds len(b) in
// bytes; 0 means no limit. Errors: ErrTooLarge, ErrTriple.
func ParseTriple(b []byte, max int) (Triple, error) {
	if max > 0 && len(b) > max {
		return Triple{}, fmt.Errorf("%w: %d bytes; at most %d are allowed", ErrTooLarge, len(b), max)
	}
	p := parser{b: b}
	t, err := p.triple()
	if err != nil {
		return Triple{}, fmt.Errorf("%w: byte %d: %w", ErrTriple, p.at, err)
	}
	return t, nil
}

type parser struct {
	b  []byte
	at int
}

func (p *parser) triple() (t Triple, err error) {
	const hasIV, hasFingerprint, hasMessage = 1, 2, 4
	has := 0
	if err := p.expect('{', "the object's opening brace"); err != nil {
		return t, err
	}
	if p.peek() == '}' {
		p.at++
	} else {
		for {
			if c := p.peek(); c != '"' {
				return t, fmt.Errorf("%s where a field name in quotes is expected", p.found())
			}
			nameAt := p.at
			name, err := p.text()
			if err != nil {
				return t, fmt.Errorf("field name: %w", err)
			}
			var field *[]byte
			var bit int
			switch string(name) {
			case "iv":
				field, bit = &t.IV, hasIV
			case "fingerprint":
				field, bit = &t.Fingerprint, hasFingerprint
			case "message":
				field, bit = &t.Message, hasMessage
			default:
				p.at = nameAt
				return t, fmt.Errorf("unknown field %s; only iv, fingerprint and message are allowed", quote(name))
			}
			if has&bit != 0 {
				p.at = nameAt
				return t, fmt.Errorf("duplicate field %s", name)
			}
			has |= bit
			if err := p.expect(':', "a colon after field "+string(name)); err != nil {
				return t, err
			}
			if c := p.peek(); c != '"' {
				return t, fmt.Errorf("field %s: %s where a string is expected", name, p.found())
			}
			if *field, err = p.text(); err != nil {
				return t, fmt.Errorf("field %s: %w", name, err)
			}
			if c := p.peek(); c == '}' {
				p.at++
				break
			} else if c != ',' {
				return t, fmt.Errorf("%s where a comma or the object's closing brace is expected", p.found())
			}
			p.at++
		}
	}
	if p.peek(); p.at < len(p.b) {
		return t, fmt.Errorf("%s after the object; nothing may follow it", p.found())
	}
	if has != hasIV|hasFingerprint|hasMessage {
		var missing []string
		for _, f := range []struct {
			bit  int
			name string
		}{{hasIV, "iv"}, {hasFingerprint, "fingerprint"}, {hasMessage, "message"}} {
			if has&f.bit == 0 {
				missing = append(missing, f.name)
			}
		}
		return t, fmt.Errorf("missing field: %s", strings.Join(missing, ", "))
	}
	if len(t.IV) == 0 {
		return t, fmt.Errorf("field iv is empty")
	}
	if len(t.Fingerprint) == 0 {
		return t, fmt.Errorf("field fingerprint is empty")
	}
	return t, nil
}

// peek passes over white space and returns the byte there, 0 at the end.
func (p *parser) peek() byte {
	for ; p.at < len(p.b); p.at++ {
		switch c := p.b[p.at]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

func (p *parser) expect(c byte, what string) error {
	if p.peek() != c || p.at == len(p.b) {
		return fmt.Errorf("%s where %s is expected", p.found(), what)
	}
	p.at++
	return nil
}

func (p *parser) found() string {
	if p.at == len(p.b) {
		return "end of input"
	}
	r, n := utf8.DecodeRune(p.b[p.at:])
	if r == utf8.RuneError {
		n = 1
	}
	return quote(p.b[p.at : p.at+n])
}

// text reads a JSON string, at its opening quote.
func (p *parser) text() ([]byte, error) {
	p.at++
	rest := p.b[p.at:]
	n := plain(rest)
	if n < len(rest) && rest[n] == '"' {
		p.at += n + 1
		return rest[:n:n], nil
	}
	return p.textSlow(n)
}

// textSlow reads on where the first n bytes are plain: text with escapes or beyond ASCII, or malformed text.
func (p *parser) textSlow(n int) ([]byte, error) {
	start := p.at
	var out []byte // once there was an escape: what precedes p.at
	p.at += n
	from := start // what is not yet in out
	for p.at < len(p.b) {
		switch c := p.b[p.at]; {
		case c == '"':
			text := p.b[from:p.at:p.at]
			if out != nil {
				text = append(out, text...)
			}
			p.at++
			return text, nil
		case c == '\\':
			out = append(out, p.b[from:p.at]...)
			r, err := p.escape()
			if err != nil {
				return nil, err
			}
			out = utf8.AppendRune(out, r)
			from = p.at
		case c < ' ':
			return nil, fmt.Errorf("control character 0x%02x; it must be escaped", c)
		case c < utf8.RuneSelf:
			p.at++
			p.at += plain(p.b[p.at:])
		default:
			r, size := utf8.DecodeRune(p.b[p.at:])
			if r == utf8.RuneError && size == 1 {
				return nil, fmt.Errorf("byte 0x%02x is not valid UTF-8", c)
			}
			p.at += size
		}
	}
	return nil, fmt.Errorf("end of input inside a string")
}

// escape reads one escape, at its backslash; a surrogate pair is one.
func (p *parser) escape() (rune, error) {
	rest := p.b[p.at:]
	if len(rest) < 2 {
		p.at = len(p.b)
		return 0, fmt.Errorf("end of input inside an escape")
	}
	if rest[1] != 'u' {
		i := bytes.IndexByte([]byte(`"\/bfnrt`), rest[1])
		if i < 0 {
			return 0, fmt.Errorf("unknown escape %s", quote(rest[:2]))
		}
		p.at += 2
		return rune("\"\\/\b\f\n\r\t"[i]), nil
	}
	r, err := hex4(rest)
	if err != nil {
		return 0, err
	}
	if !utf16.IsSurrogate(r) {
		p.at += 6
		return r, nil
	}
	if len(rest) >= 8 && rest[6] == '\\' && rest[7] == 'u' {
		low, err := hex4(rest[6:])
		if err != nil {
			p.at += 6
			return 0, err
		}
		if pair := utf16.DecodeRune(r, low); pair != utf8.RuneError {
			p.at += 12
			return pair, nil
		}
	}
	return 0, fmt.Errorf("escape %s is half of a surrogate pair without the other half", rest[:6])
}

// hex4 reads the four digits of \uXXXX.
func hex4(b []byte) (rune, error) {
	if len(b) < 6 {
		return 0, fmt.Errorf("escape %s is cut short; \\u needs four hex digits", quote(b))
	}
	var r rune
	for _, c := range b[2:6] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			c = c | 0x20 - 'a' + 10
		default:
			return 0, fmt.Errorf("escape %s: \\u needs four hex digits", quote(b[:6]))
		}
		r = r<<4 | rune(c)
	}
	return r, nil
}

// plain returns how many bytes from the start of b stand in a JSON string as they are: ASCII, no control character, quote or
// backslash. It looks at eight bytes at once.
func plain(b []byte) int {
	const (
		ones  = 0x0101010101010101
		highs = 0x8080808080808080
	)
	i := 0
	for ; i+8 <= len(b); i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		quotes, slashes := w^(ones*'"'), w^(ones*'\\')
		// Borrows only ever run from a byte that is itself flagged to the bytes above it, so the lowest flag is right.
		if odd := (w | (w - ones*' ') | (quotes - ones) | (slashes - ones)) & highs; odd != 0 {
			if odd &= w | (w-ones*' ')&^w | (quotes-ones)&^quotes | (slashes-ones)&^slashes; odd != 0 {
				return i + bits.TrailingZeros64(odd)/8
			}
		}
	}
	for ; i < len(b); i++ {
		if c := b[i]; c < ' ' || c >= utf8.RuneSelf || c == '"' || c == '\\' {
			break
		}
	}
	return i
}

func appendEscaped(dst, text []byte) []byte {
	for {
		n := plain(text)
		dst = append(dst, text[:n]...)
		if n == len(text) {
			return dst
		}
		text = text[n:]
		c := text[0]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRune(text)
			dst = utf8.AppendRune(dst, r)
			text = text[size:]
			continue
		}
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\b':
			dst = append(dst, `\b`...)
		case '\f':
			dst = append(dst, `\f`...)
		case '\n':
			dst = append(dst, `\n`...)
		case '\r':
			dst = append(dst, `\r`...)
		case '\t':
			dst = append(dst, `\t`...)
		default:
			const digits = "0123456789abcdef"
			dst = append(dst, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		}
		text = text[1:]
	}
}
