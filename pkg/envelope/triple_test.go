package envelope

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestParseTripleSaysWhatIsWrong(t *testing.T) {
	for _, c := range []struct{ name, input, says string }{
		{"nothing", ``, "byte 0: end of input where the object's opening brace is expected"},
		{"another value", `[1]`, `byte 0: "[" where the object's opening brace is expected`},
		{"all missing", `{}`, "missing field: iv, fingerprint, message"},
		{"two missing", `{"fingerprint":"fp"}`, "missing field: iv, message"},
		{"duplicate", `{"iv":"a","fingerprint":"fp","message":"m","iv":"a"}`, "duplicate field iv"},
		{"unknown", `{"iv":"a","fingerprint":"fp","message":"m","tag":"t"}`, `byte 43: unknown field "tag"; only iv, fingerprint and message are allowed`},
		{"unknown, absurd", `{"` + strings.Repeat("x", 1000) + `":1}`, `unknown field "` + strings.Repeat("x", 64) + `"...;`},
		{"not a string", `{"iv":7}`, `byte 6: field iv: "7" where a string is expected`},
		{"null", `{"message":null}`, `field message: "n" where a string is expected`},
		{"empty iv", `{"iv":"","fingerprint":"fp","message":"m"}`, "field iv is empty"},
		{"empty fingerprint", `{"iv":"a","fingerprint":"","message":"m"}`, "field fingerprint is empty"},
		{"something behind", `{"iv":"a","fingerprint":"fp","message":"m"} x`, `byte 44: "x" where the end is expected`},
		{"NUL behind", "{\"iv\":\"a\",\"fingerprint\":\"fp\",\"message\":\"m\"}\x00", `"\x00" where the end is expected`},
		{"no colon", `{"iv" "a"}`, `byte 6: "\"" where a colon is expected`},
		{"no comma", `{"iv":"a" "fingerprint":"fp"}`, `where a comma or the object's closing brace is expected`},
		{"comma at the end", `{"iv":"a",}`, `"}" where a field name in quotes is expected`},
		{"cut in a string", `{"iv":"a`, "byte 8: field iv: end of input inside a string"},
		{"cut in an escape", `{"iv":"a\`, "end of input inside an escape"},
		{"cut behind a field", `{"iv":"a"`, "end of input where a comma or the object's closing brace is expected"},
		{"not UTF-8", "{\"iv\":\"a\xff\"}", "byte 8: field iv: byte 0xff is not valid UTF-8"},
		{"not UTF-8, not in a string", "\xff", `byte 0: "\xff" where the object's opening brace`},
		{"control character", "{\"iv\":\"a\nb\"}", "control character 0x0a; it must be escaped"},
		{"unknown escape", `{"iv":"\q"}`, `unknown escape "\\q"`},
		{"short escape", `{"iv":"\u12"}`, `\u needs four hex digits`},
		{"half a pair", `{"iv":"\ud83c"}`, `escape \ud83c is half of a surrogate pair without the other half`},
		{"half a pair, bad other half", `{"iv":"\ud83c\uzzzz"}`, `\u needs four hex digits`},
		{"bad field name", `{"i` + "\x01" + `v":"a"}`, "field name: control character 0x01"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseTriple([]byte(c.input), 0)
			if !errors.Is(err, ErrTriple) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v\nwant ErrTriple that says %s", err, c.says)
			}
		})
	}

	_, err := ParseTriple(make([]byte, 11), 10)
	if !errors.Is(err, ErrTooLarge) || errors.Is(err, ErrTriple) || !strings.Contains(err.Error(), "11 bytes; at most 10 are allowed") {
		t.Errorf("too large: %v", err)
	}
}

func TestParseTripleViewsItsInput(t *testing.T) {
	for _, input := range []string{
		`{"iv":"abcd","fingerprint":"fp","message":"mmmm"}`,
		` {"message":"mmmm", "fingerprint":"fp", "iv":"abcd"} `,
	} {
		b := []byte(input)
		triple, err := ParseTriple(b, 0)
		if err != nil {
			t.Fatal(err)
		}
		copy(b[bytes.Index(b, []byte("mmmm")):], "MMMM")
		if string(triple.Message) != "MMMM" {
			t.Errorf("message is a copy: %s", triple.Message)
		}
		if n := cap(triple.IV) - len(triple.IV) + cap(triple.Fingerprint) - len(triple.Fingerprint) + cap(triple.Message) - len(triple.Message); n != 0 {
			t.Errorf("appending to a view would overwrite %d bytes of the input", n)
		}
	}

	b := []byte(`{"iv":"a\u002bc","fingerprint":"fp","message":"\n\n"}`)
	want := bytes.Clone(b)
	triple, err := ParseTriple(b, 0)
	if err != nil {
		t.Fatal(err)
	}
	if string(triple.IV) != "a+c" || string(triple.Message) != "\n\n" {
		t.Errorf("read %q", triple)
	}
	if !bytes.Equal(b, want) {
		t.Error("reading escapes changed the input")
	}
}

func TestAppendJSONEscapes(t *testing.T) {
	var all []byte
	for c := range 0x80 {
		all = append(all, byte(c))
	}
	all = append(all, "é€\U0001F35F\u2028\ufffd\uffff"...)
	triple := Triple{IV: all, Fingerprint: all, Message: all}
	text := triple.AppendJSON([]byte("kept"))
	if !bytes.HasPrefix(text, []byte("kept{")) {
		t.Fatalf("dst was not kept: %s", text)
	}
	text = text[len("kept"):]
	if got, err := ParseTriple(text, 0); err != nil || !sameTriple(got, triple) {
		t.Errorf("read back %q, %v", got, err)
	}
	var std struct{ IV, Fingerprint, Message string }
	if err := json.Unmarshal(text, &std); err != nil || std.Message != string(all) || std.IV != string(all) {
		t.Errorf("encoding/json reads %q, %v", std, err)
	}

	// What JSON cannot carry is replaced, never written as it is.
	text = Triple{IV: []byte("a"), Fingerprint: []byte("b"), Message: []byte("x\xff\xc0\xafy")}.AppendJSON(nil)
	if got, err := ParseTriple(text, 0); err != nil || string(got.Message) != "x\ufffd\ufffd\ufffdy" {
		t.Errorf("invalid UTF-8 reads back as %q, %v", got.Message, err)
	}
}

// TestScans looks at every byte value at every place around the 8- and 32-byte steps.
func TestScans(t *testing.T) {
	for _, length := range []int{1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 39, 40, 41, 63, 64, 65, 73} {
		for at := range length {
			for c := range 256 {
				b := bytes.Repeat([]byte("a"), length)
				b[at] = byte(c)
				if length > 1 && at+1 < length {
					b[at+1] = byte(c + 1) // a borrow from at must not hide or move the first flag
				}
				want := length
				for i, c := range b {
					if c < ' ' || c >= utf8.RuneSelf || c == '"' || c == '\\' {
						want = i
						break
					}
				}
				if got := plain(b); got != want {
					t.Fatalf("plain(%q) = %d, want %d", b, got, want)
				}
				wantPrintable := bytes.IndexFunc(b, func(r rune) bool { return r < ' ' || r >= utf8.RuneSelf }) < 0
				if got := printable(b); got != wantPrintable {
					t.Fatalf("printable(%q) = %v", b, got)
				}
			}
		}
	}
}
