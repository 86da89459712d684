package envelope

import (
	"bytes"
	"encoding/binary"
	"errors"
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

// What stands around the three texts in the canonical form.
const (
	jsonHead        = `{"iv":"`
	jsonFingerprint = `","fingerprint":"`
	jsonMessage     = `","message":"`
	jsonTail        = `"}`
)

// AppendJSON appends {"iv":…,"fingerprint":…,"message":…} to dst, without white space. Text that is valid UTF-8 is kept exactly
// (control characters, such as a POS's trailing line break, are escaped) and [ParseTriple] gives it back. JSON cannot carry other
// bytes: each becomes U+FFFD; such a text opens under no encoding.
func (t Triple) AppendJSON(dst []byte) []byte {
	dst = slices.Grow(dst, len(jsonHead+jsonFingerprint+jsonMessage+jsonTail)+len(t.IV)+len(t.Fingerprint)+len(t.Message))
	dst = append(dst, jsonHead...)
	dst = appendEscaped(dst, t.IV)
	dst = append(dst, jsonFingerprint...)
	dst = appendEscaped(dst, t.Fingerprint)
	dst = append(dst, jsonMessage...)
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
	if t, ok := parseCanonical(b); ok {
		return t, nil
	}
	p := parser{b: b}
	t, err := p.triple()
	if err != nil {
		return Triple{}, fmt.Errorf("%w: byte %d: %w", ErrTriple, p.at, err)
	}
	return t, nil
}

// parseCanonical reads what AppendJSON writes when nothing had to be escaped, which is nearly all there is. It accepts nothing that
// the parser would read in another way.
func parseCanonical(b []byte) (Triple, bool) {
	iv, b := cutText(b, jsonHead)
	fingerprint, b := cutText(b, jsonFingerprint[1:]) // the quote before it is cut already
	message, b := cutText(b, jsonMessage[1:])
	return Triple{iv, fingerprint, message}, len(iv) > 0 && len(fingerprint) > 0 && string(b) == jsonTail[1:]
}

// cutText returns the text between before, with which b begins, and the next quote, and what follows the quote. It returns nothing
// when b begins otherwise, or when the text is not to be taken as it stands: it has an escape, is malformed or goes beyond ASCII.
func cutText(b []byte, before string) (text, after []byte) {
	if len(b) < len(before) || string(b[:len(before)]) != before {
		return nil, nil
	}
	b = b[len(before):]
	n := bytes.IndexByte(b, '"')
	if n < 0 || bytes.IndexByte(b[:n], '\\') >= 0 || !printable(b[:n]) {
		return nil, nil
	}
	return b[:n:n], b[n+1:]
}

type parser struct {
	b  []byte
	at int
}

var fieldNames = [...]string{"iv", "fingerprint", "message"}

func (p *parser) triple() (Triple, error) {
	var fields [len(fieldNames)]struct {
		there bool
		text  []byte
	}
	if p.peek() != '{' {
		return Triple{}, p.unexpected("the object's opening brace")
	}
	p.at++
	for more := p.peek() != '}'; more; {
		i, err := p.fieldName()
		if err != nil {
			return Triple{}, err
		}
		f := &fields[i]
		if f.there {
			return Triple{}, fmt.Errorf("duplicate field %s", fieldNames[i])
		}
		f.there = true
		if p.peek() != ':' {
			return Triple{}, p.unexpected("a colon")
		}
		p.at++
		if p.peek() != '"' {
			return Triple{}, fmt.Errorf("field %s: %w", fieldNames[i], p.unexpected("a string"))
		}
		if f.text, err = p.text(); err != nil {
			return Triple{}, fmt.Errorf("field %s: %w", fieldNames[i], err)
		}
		switch p.peek() {
		case ',':
			p.at++
		case '}':
			more = false
		default:
			return Triple{}, p.unexpected("a comma or the object's closing brace")
		}
	}
	p.at++
	if p.peek(); p.at < len(p.b) {
		return Triple{}, p.unexpected("the end")
	}
	var missing []string
	for i, name := range fieldNames {
		if !fields[i].there {
			missing = append(missing, name)
		}
	}
	if missing != nil {
		return Triple{}, fmt.Errorf("missing field: %s", strings.Join(missing, ", "))
	}
	t := Triple{IV: fields[0].text, Fingerprint: fields[1].text, Message: fields[2].text}
	if len(t.IV) == 0 {
		return Triple{}, errors.New("field iv is empty")
	}
	if len(t.Fingerprint) == 0 {
		return Triple{}, errors.New("field fingerprint is empty")
	}
	return t, nil
}

// fieldName reads the name of a field and returns its place in fieldNames.
func (p *parser) fieldName() (int, error) {
	if p.peek() != '"' {
		return 0, p.unexpected("a field name in quotes")
	}
	at := p.at
	name, err := p.text()
	if err != nil {
		return 0, fmt.Errorf("field name: %w", err)
	}
	for i, n := range fieldNames {
		if n == string(name) {
			return i, nil
		}
	}
	p.at = at
	return 0, fmt.Errorf("unknown field %s; only iv, fingerprint and message are allowed", quote(name))
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

func (p *parser) unexpected(want string) error {
	if p.at == len(p.b) {
		return fmt.Errorf("end of input where %s is expected", want)
	}
	_, n := utf8.DecodeRune(p.b[p.at:])
	return fmt.Errorf("%s where %s is expected", quote(p.b[p.at:p.at+n]), want)
}

// text reads a JSON string, at its opening quote.
func (p *parser) text() ([]byte, error) {
	if text, after := cutText(p.b[p.at:], `"`); after != nil {
		p.at = len(p.b) - len(after)
		return text, nil
	}
	p.at++
	return p.textSlow()
}

// printable reports whether b is ASCII without control characters. It looks at 32 bytes at once; see odd.
func printable(b []byte) bool {
	const (
		spaces = ' ' * 0x0101010101010101
		highs  = 0x8080808080808080
	)
	for len(b) >= 32 {
		w0, w1 := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
		w2, w3 := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
		if (w0|(w0-spaces)|w1|(w1-spaces)|w2|(w2-spaces)|w3|(w3-spaces))&highs != 0 {
			return false
		}
		b = b[32:]
	}
	for len(b) >= 8 {
		if w := binary.LittleEndian.Uint64(b); (w|(w-spaces))&highs != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c < ' ' || c >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// textSlow reads a JSON string, behind its opening quote, that cutText leaves alone.
func (p *parser) textSlow() ([]byte, error) {
	var out []byte // the text before from, once there was an escape
	from := p.at
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
	return nil, errors.New("end of input inside a string")
}

// escape reads one escape, at its backslash; a surrogate pair is one.
func (p *parser) escape() (rune, error) {
	rest := p.b[p.at:]
	if len(rest) < 2 {
		p.at = len(p.b)
		return 0, errors.New("end of input inside an escape")
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
			c = (c | 0x20) - 'a' + 10
		default:
			return 0, fmt.Errorf("escape %s: \\u needs four hex digits", quote(b[:6]))
		}
		r = r<<4 | rune(c)
	}
	return r, nil
}

// plain returns how many bytes from the start of b stand in a JSON string as they are: ASCII, no control character, quote or
// backslash. It looks at 32 bytes at once.
func plain(b []byte) int {
	i := 0
	for ; i+32 <= len(b); i += 32 {
		w := b[i : i+32 : i+32]
		if odd(binary.LittleEndian.Uint64(w))|odd(binary.LittleEndian.Uint64(w[8:]))|
			odd(binary.LittleEndian.Uint64(w[16:]))|odd(binary.LittleEndian.Uint64(w[24:])) != 0 {
			break
		}
	}
	for ; i+8 <= len(b); i += 8 {
		if odd := odd(binary.LittleEndian.Uint64(b[i:])); odd != 0 {
			return i + bits.TrailingZeros64(odd)/8
		}
	}
	for ; i < len(b); i++ {
		if c := b[i]; c < ' ' || c >= utf8.RuneSelf || c == '"' || c == '\\' {
			break
		}
	}
	return i
}

// odd flags, by its highest bit, the lowest byte of w that does not stand in a JSON string as it is, and perhaps some above it: a
// subtraction borrows only from a byte that is flagged itself, and only for those above it.
func odd(w uint64) uint64 {
	const (
		ones  = 0x0101010101010101
		highs = 0x8080808080808080
	)
	return (w | (w - ones*' ') | ((w ^ ones*'"') - ones) | ((w ^ ones*'\\') - ones)) & highs
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
