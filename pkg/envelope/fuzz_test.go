package envelope

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf8"
)

// seeded fails when the committed seeds of a target are gone: a fuzz test without seeds passes by testing nothing.
func seeded(f *testing.F) {
	f.Helper()
	seeds, err := os.ReadDir(filepath.Join("testdata", "fuzz", f.Name()))
	if err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
}

// FuzzTriple: what is read is written and read again as the same; the canonical form is written as it was; and encoding/json reads
// the same texts.
func FuzzTriple(f *testing.F) {
	seeded(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		triple, err := ParseTriple(b, 0)
		if !bytes.Equal(b, before) {
			t.Fatal("reading changed the input")
		}
		slow := parser{b: b}
		if same, slowErr := slow.triple(); (slowErr == nil) != (err == nil) || !sameTriple(same, triple) {
			t.Fatalf("the canonical reader gives %q, %v; the parser %q, %v", triple, err, same, slowErr)
		}
		if err != nil {
			if !errors.Is(err, ErrTriple) {
				t.Fatalf("%v is not ErrTriple", err)
			}
			return
		}
		text := triple.AppendJSON(nil)
		again, err := ParseTriple(text, len(text))
		if err != nil || !sameTriple(again, triple) {
			t.Fatalf("%q is written as %s and read as %q, %v", triple, text, again, err)
		}
		if canonical := again.AppendJSON(nil); !bytes.Equal(canonical, text) {
			t.Fatalf("canonical %s is written as %s", text, canonical)
		}
		var std map[string]string
		if err := json.Unmarshal(b, &std); err != nil || len(std) != 3 || std["iv"] != string(triple.IV) ||
			std["fingerprint"] != string(triple.Fingerprint) || std["message"] != string(triple.Message) {
			t.Fatalf("encoding/json reads %q, %v; ParseTriple %q", std, err, triple)
		}
	})
}

// FuzzTexts: any three texts survive JSON, and HTTP where it can carry them.
func FuzzTexts(f *testing.F) {
	seeded(f)
	f.Fuzz(func(t *testing.T, iv, fingerprint string, message []byte) {
		triple := Triple{[]byte(iv), []byte(fingerprint), message}
		there := iv != "" && fingerprint != ""

		text := triple.AppendJSON(nil)
		if !json.Valid(text) || !utf8.Valid(text) {
			t.Fatalf("%q is written as %q", triple, text)
		}
		got, err := ParseTriple(text, 0)
		if (err == nil) != there {
			t.Fatalf("%s: %v", text, err)
		}
		if there && utf8.ValidString(iv) && utf8.ValidString(fingerprint) && utf8.Valid(message) && !sameTriple(got, triple) {
			t.Fatalf("%q is read back as %q", triple, got)
		}

		h := http.Header{}
		triple.SetHTTP(h)
		got, err = FromHTTP(h, message)
		if (err == nil) != there || there && !sameTriple(got, triple) || err != nil && !errors.Is(err, ErrHeaders) {
			t.Fatalf("%q comes back from HTTP as %q, %v", triple, got, err)
		}
		h.Add(HeaderIV, iv)
		if _, err := FromHTTP(h, message); !errors.Is(err, ErrHeaders) {
			t.Fatalf("a second IV is read: %v", err)
		}
	})
}

// FuzzOpen: nothing that was not sealed under the key opens under a256gcm, nothing but JSON under a256ctr, and nothing panics.
func FuzzOpen(f *testing.F) {
	seeded(f)
	var rings []*Keyring
	encodings := []Encoding{Base64, Base64URL, Hex}
	for _, p := range profiles {
		for _, iv := range encodings {
			for _, message := range encodings {
				s := Settings{Profile: p, Iterations: 1, IVEncoding: iv, MessageEncoding: message}
				rings = append(rings, testRing(f, s, testKey(f, s, "fp")))
			}
		}
	}
	secret, err := testKey(f, testSettings(A256GCM), "fp").NewIV(make([]byte, 20)) // of this process only
	if err != nil {
		f.Fatal(err)
	}
	bindingKey, err := NewBindingKey("b1", secret)
	if err != nil {
		f.Fatal(err)
	}
	b := testBinding(f, "store-1", bindingKey)
	dst := append(make([]byte, 0, 256), "kept"...)

	f.Fuzz(func(t *testing.T, iv, fingerprint, message []byte, tamper uint16, flip byte) {
		triple := Triple{iv, fingerprint, message}
		for _, r := range rings {
			got, err := r.Open(dst, triple)
			if err == nil && (!bytes.HasPrefix(got, dst) || r.settings.Profile == A256GCM || !json.Valid(got[len(dst):])) {
				t.Fatalf("%s opened %q to %q", r, triple, got)
			}
			if err != nil && !errors.Is(err, ErrUnknownFingerprint) && !errors.Is(err, ErrIV) && !errors.Is(err, ErrDecrypt) {
				t.Fatalf("%v is none of the documented errors", err)
			}
			if string(fingerprint) == "fp" && (r.CheckIV(iv) == nil) == errors.Is(err, ErrIV) {
				t.Fatalf("CheckIV says %v, Open %v", r.CheckIV(iv), err)
			}
		}
		for _, open := range []func([]byte, Triple) ([]byte, error){b.OpenPlain, b.OpenReport} {
			if got, err := open(dst, triple); err == nil {
				t.Fatalf("%q opened to %q", triple, got)
			}
		}

		// Sealed under the key, and then one byte changed.
		for _, r := range rings[:len(rings)/2] {
			sealed, err := r.keys[0].Seal(message)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := r.Open(dst, sealed); err != nil || !bytes.HasPrefix(got, dst) || !bytes.Equal(got[len(dst):], message) {
				t.Fatalf("sealed %q, opened %q, %v", message, got, err)
			}
			texts := []*[]byte{&sealed.IV, &sealed.Message}
			text := texts[int(tamper)%2]
			*text = bytes.Clone(*text)
			at := &(*text)[int(tamper)%len(*text)]
			was := *at
			*at ^= flip
			equal := *at == was || text == &sealed.IV && r.settings.IVEncoding == Hex && *at|0x20 == was|0x20 && was > '9' ||
				text == &sealed.Message && r.settings.MessageEncoding == Hex && *at|0x20 == was|0x20 && was > '9'
			if got, err := r.Open(dst, sealed); (err == nil) != equal {
				t.Fatalf("%s: %q with byte %q for %q opened to %q, %v", r, sealed, *at, was, got, err)
			}
		}
	})
}

// FuzzJSON: the validator agrees with the standard library.
func FuzzJSON(f *testing.F) {
	seeded(f)
	for _, s := range jsonSamples {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, want := validJSON(b), json.Valid(b) && utf8.Valid(b); got != want {
			t.Fatalf("validJSON(%q) = %v, want %v", b, got, want)
		}
	})
}
