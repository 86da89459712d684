package edge

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// maxPointerTokens bounds a configured pointer, and with it how deep a lookup recurses.
const maxPointerTokens = 32

// pointer is a JSON pointer of RFC 6901, taken apart. nil is none at all: looking it up
// finds nothing. (The RFC's empty pointer, the whole document, is of no use here.)
type pointer []string

// parsePointer reads a pointer's text; "" is none.
func parsePointer(text string) (pointer, error) {
	if text == "" {
		return nil, nil
	}
	if text[0] != '/' {
		return nil, fmt.Errorf("%q is no JSON pointer: it begins with a slash, as /_id or /order/id does", text)
	}
	tokens := strings.Split(text[1:], "/")
	if len(tokens) > maxPointerTokens {
		return nil, fmt.Errorf("%d levels; at most %d are followed", len(tokens), maxPointerTokens)
	}
	for i, t := range tokens {
		if rest := strings.NewReplacer("~0", "", "~1", "").Replace(t); strings.Contains(rest, "~") {
			return nil, fmt.Errorf("%q: a ~ stands only in ~0 (for ~) and ~1 (for /)", text)
		}
		tokens[i] = strings.NewReplacer("~1", "/", "~0", "~").Replace(t)
	}
	return tokens, nil
}

// text returns the string or number that the pointer names in doc, "" when there is none
// or something else stands there. A number is returned as it is written. Of members with
// the same name the last counts, as for most readers of JSON.
//
// doc must be valid JSON; in anything else what is found has no meaning, but nothing
// breaks.
func (p pointer) text(doc []byte) string {
	if len(p) == 0 {
		return ""
	}
	s := scanner{b: doc}
	v, ok := s.find(p)
	if !ok || len(v) == 0 {
		return ""
	}
	switch c := v[0]; {
	case c == '"':
		name, err := unquote(v)
		if err != nil {
			return ""
		}
		return string(name)
	case c == '-' || '0' <= c && c <= '9':
		return string(v)
	}
	return ""
}

// scanner walks over valid JSON without building anything from it. It never looks
// outside b, whatever b holds.
type scanner struct {
	b  []byte
	at int
}

// find returns the value at path, seen from the value that begins at s.at, and leaves s.at
// behind that value.
func (s *scanner) find(path []string) (value []byte, ok bool) {
	c := s.peek()
	if len(path) == 0 {
		from := s.at
		s.skip()
		return s.b[from:s.at], true
	}
	switch c {
	case '{':
		s.at++
		for c := s.peek(); c != '}' && c != 0; c = s.peek() {
			from := s.at
			s.skip()
			same := names(s.b[from:s.at], path[0])
			if s.peek() == ':' {
				s.at++
			}
			if same {
				value, ok = s.find(path[1:])
			} else {
				s.skip()
			}
			if s.peek() == ',' {
				s.at++
			}
		}
		s.at++
	case '[':
		s.at++
		index, isIndex := arrayIndex(path[0])
		for i, c := 0, s.peek(); c != ']' && c != 0; i, c = i+1, s.peek() {
			if isIndex && i == index {
				value, ok = s.find(path[1:])
			} else {
				s.skip()
			}
			if s.peek() == ',' {
				s.at++
			}
		}
		s.at++
	default:
		s.skip()
	}
	s.at = min(s.at, len(s.b))
	return value, ok
}

// peek passes over white space and returns the byte there, 0 at the end.
func (s *scanner) peek() byte {
	for ; s.at < len(s.b); s.at++ {
		switch c := s.b[s.at]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// skip passes over one value. It always moves on unless it is at the end.
func (s *scanner) skip() {
	for depth := 0; ; {
		switch s.peek() {
		case 0:
			// The end, or a NUL, which stands in no valid JSON.
			s.at = len(s.b)
			return
		case '"':
			s.skipString()
		case '{', '[':
			depth++
			s.at++
			continue
		case '}', ']':
			depth--
			s.at++
		case ',', ':':
			s.at++
			if depth > 0 {
				continue
			}
		default:
			if n := bytes.IndexAny(s.b[s.at:], " \t\r\n,:{}[]\"\x00"); n >= 0 {
				s.at += n
			} else {
				s.at = len(s.b)
			}
		}
		if depth <= 0 {
			return
		}
	}
}

func (s *scanner) skipString() {
	for s.at++; s.at < len(s.b); s.at++ {
		switch s.b[s.at] {
		case '\\':
			s.at++
		case '"':
			s.at++
			return
		}
	}
	s.at = len(s.b)
}

// names tells whether quoted, a JSON string with its quotes, is the name.
func names(quoted []byte, name string) bool {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return len(quoted) == len(name)+2 && quoted[0] == '"' && string(quoted[1:len(quoted)-1]) == name
	}
	text, err := unquote(quoted)
	return err == nil && string(text) == name
}

var errNoString = errors.New("no JSON string")

// unquote returns what a JSON string says; a view into it where it has no escapes.
func unquote(quoted []byte) ([]byte, error) {
	n := len(quoted)
	if n < 2 || quoted[0] != '"' || quoted[n-1] != '"' {
		return nil, errNoString
	}
	if bytes.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : n-1], nil
	}
	var text string
	if err := json.Unmarshal(quoted, &text); err != nil {
		return nil, err
	}
	return []byte(text), nil
}

// arrayIndex reads a token as the index of an array: digits without leading zeros.
func arrayIndex(token string) (int, bool) {
	if token == "" || len(token) > 9 || token[0] == '0' && token != "0" {
		return 0, false
	}
	n := 0
	for _, c := range []byte(token) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}
