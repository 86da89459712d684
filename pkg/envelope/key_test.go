package envelope

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	noon     = time.Date(2025, 5, 1, 12, 0, 0, 0, time.UTC)
	profiles = []Profile{A256GCM, A256CTR}
)

func testSettings(p Profile) Settings { return Settings{Profile: p, Iterations: 1} }

// testKey is a key around noon.
func testKey(tb testing.TB, s Settings, fingerprint string) *Key {
	tb.Helper()
	k, err := NewKey(s, KeyConfig{Fingerprint: fingerprint, Passphrase: "correct horse " + Secret(fingerprint),
		ValidAfter: noon.Add(-time.Hour), ValidUntil: noon.Add(time.Hour)})
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func testRing(tb testing.TB, s Settings, keys ...*Key) *Keyring {
	tb.Helper()
	r, err := NewKeyring(s, keys...)
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// lines returns the text of each error that was joined.
func lines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

func TestSettingsReportAllMistakesAtOnce(t *testing.T) {
	err := Settings{Profile: "des", KDF: "none", Hash: "md5", Iterations: -1, Salt: "\xff", IVEncoding: "b64", MessageEncoding: "HEX"}.Validate()
	if !errors.Is(err, ErrSettings) {
		t.Errorf("not ErrSettings: %v", err)
	}
	got := lines(err)
	for i, field := range []string{"profile", "kdf", "hash", "iterations", "salt", "iv_encoding", "message_encoding"} {
		if i >= len(got) || !strings.HasPrefix(got[i], field+": ") {
			t.Fatalf("line %d is not about %s:\n%v", i, field, err)
		}
	}
	if len(got) != 7 {
		t.Errorf("%d lines, want 7:\n%v", len(got), err)
	}
	if err := (Settings{Profile: A256GCM, KDF: "hkdf", Iterations: 5}).Validate(); len(lines(err)) != 1 || !strings.Contains(err.Error(), "excluded by kdf") {
		t.Errorf("hkdf with iterations: %v", err)
	}
	for _, p := range profiles {
		if err := (Settings{Profile: p}).Validate(); err != nil {
			t.Errorf("defaults of %s: %v", p, err)
		}
	}
}

func TestNewKeyReportsAllMistakesAtOnce(t *testing.T) {
	_, err := NewKey(Settings{}, KeyConfig{ValidAfter: noon, ValidUntil: noon})
	var fields []string
	for _, line := range lines(err) {
		field, _, _ := strings.Cut(line, ":")
		fields = append(fields, field)
	}
	if want := []string{"profile", "fingerprint", "passphrase", "valid_until"}; !slices.Equal(fields, want) || !errors.Is(err, ErrSettings) {
		t.Errorf("mistakes in %v, want %v:\n%v", fields, want, err)
	}
	if _, err := NewKey(testSettings(A256GCM), KeyConfig{Fingerprint: "fp", Passphrase: "\xff", ValidAfter: noon}); len(lines(err)) != 2 {
		t.Errorf("phrase that is no text, and no valid_until:\n%v", err)
	}
	if _, err := NewKey(testSettings(A256GCM), KeyConfig{Fingerprint: "!\"\\~" + strings.Repeat("f", 124), Passphrase: "p", ValidUntil: noon}); err != nil {
		t.Errorf("the longest fingerprint of visible ASCII is refused: %v", err)
	}
}

func TestValidName(t *testing.T) {
	for _, good := range []string{"a", "0", "store-0113", "a_b", "a--", strings.Repeat("x", 63)} {
		if err := ValidName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", "_a", "A", "aB", "a.b", "a*", "a>", "a b", "a\n", "é", "a/b", "a\x00", strings.Repeat("x", 64)} {
		if err := ValidName(bad); !errors.Is(err, ErrSettings) {
			t.Errorf("%q: %v, want ErrSettings", bad, err)
		}
	}
}

func TestKeySealsAndOpens(t *testing.T) {
	for _, p := range profiles {
		for _, e := range []Encoding{"", Base64, Base64URL, Hex} {
			s := Settings{Profile: p, Iterations: 1, IVEncoding: e, MessageEncoding: e}
			k := testKey(t, s, `fp"\`) // a fingerprint that JSON has to escape
			// Around every boundary of base64 groups and of the chunks in which it is written.
			for _, n := range []int{2, 3, 4, 5, 6, 7, 8, 9, 10, 60, 61, 62, 63, 64, 750, 751, 752, 753, 766, 767, 768, 769, 770, 1536, 5000} {
				plaintext := []byte(`"` + strings.Repeat("x", n-2) + `"`)
				text, err := k.AppendSeal([]byte("kept"), plaintext)
				if err != nil {
					t.Fatal(err)
				}
				triple, err := ParseTriple(text[len("kept"):], 0)
				if err != nil {
					t.Fatalf("%s %s %d: %v in %s", p, e, n, err, text)
				}
				if again := triple.AppendJSON([]byte("kept")); !bytes.Equal(again, text) {
					t.Fatalf("AppendSeal wrote\n%s, AppendJSON\n%s", text, again)
				}
				sealed, err := k.Seal(plaintext)
				if err != nil {
					t.Fatal(err)
				}
				if bytes.Equal(sealed.IV, triple.IV) {
					t.Error("two seals share an IV")
				}
				for _, triple := range []Triple{triple, sealed} {
					if string(triple.Fingerprint) != k.Fingerprint() {
						t.Errorf("fingerprint is %s", triple.Fingerprint)
					}
					opened, err := k.Open([]byte("kept"), triple)
					if err != nil || string(opened) != "kept"+string(plaintext) {
						t.Fatalf("%s %s %d: opened %q, %v", p, e, n, opened, err)
					}
				}
			}
		}
	}
}

func TestKeyRaw(t *testing.T) {
	for _, p := range profiles {
		k := testKey(t, testSettings(p), "fp")
		iv, err := k.NewIV([]byte("kept"))
		if err != nil || !bytes.HasPrefix(iv, []byte("kept")) {
			t.Fatalf("NewIV: %q, %v", iv, err)
		}
		iv = iv[len("kept"):]
		if want := map[Profile]int{A256GCM: 12, A256CTR: 16}[p]; len(iv) != want {
			t.Errorf("%s: IV of %d bytes, want %d", p, len(iv), want)
		}
		plaintext := []byte("no JSON needed")
		ciphertext, err := k.SealRaw([]byte("kept"), iv, plaintext)
		if err != nil || !bytes.HasPrefix(ciphertext, []byte("kept")) {
			t.Fatal(err)
		}
		ciphertext = ciphertext[len("kept"):]
		if opened, err := k.OpenRaw([]byte("kept"), iv, ciphertext); err != nil || string(opened) != "kept"+string(plaintext) {
			t.Errorf("%s: opened %q, %v", p, opened, err)
		}

		inPlace := append(make([]byte, 0, 64), plaintext...)
		if inPlace, err = k.SealRaw(inPlace[:0], iv, inPlace); err != nil || !bytes.Equal(inPlace, ciphertext) {
			t.Errorf("%s: in place sealed %x, %v, want %x", p, inPlace, err, ciphertext)
		}
		if inPlace, err = k.OpenRaw(inPlace[:0], iv, inPlace); err != nil || !bytes.Equal(inPlace, plaintext) {
			t.Errorf("%s: in place opened %q, %v", p, inPlace, err)
		}

		for _, n := range []int{0, 11, 13, 15, 17} {
			if _, err := k.SealRaw(nil, make([]byte, n), nil); !errors.Is(err, ErrIV) {
				t.Errorf("%s: sealing with an IV of %d bytes: %v", p, n, err)
			}
			if _, err := k.OpenRaw(nil, make([]byte, n), ciphertext); !errors.Is(err, ErrIV) {
				t.Errorf("%s: opening with an IV of %d bytes: %v", p, n, err)
			}
		}
	}
	k := testKey(t, testSettings(A256GCM), "fp")
	if _, err := k.OpenRaw(nil, make([]byte, 12), make([]byte, 40)); !errors.Is(err, ErrDecrypt) {
		t.Errorf("garbage opened: %v", err)
	}
	if _, err := k.OpenRaw(nil, make([]byte, 12), make([]byte, 5)); !errors.Is(err, ErrDecrypt) {
		t.Errorf("less than a tag opened: %v", err)
	}
}

// TestOpenLeavesNoPlaintextBehind: what an a256ctr message opened to is not left in the caller's buffer when it is refused.
func TestOpenLeavesNoPlaintextBehind(t *testing.T) {
	k := testKey(t, testSettings(A256CTR), "fp")
	triple, err := k.Seal([]byte("not JSON, and not for the caller"))
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 200)
	if _, err := k.Open(buf[:0], triple); !errors.Is(err, ErrDecrypt) {
		t.Fatal(err)
	}
	if bytes.Contains(buf, []byte("JSON")) {
		t.Errorf("buffer holds %q", buf)
	}
}

func TestWithSealFromSharesTheCipher(t *testing.T) {
	k := testKey(t, testSettings(A256GCM), "fp")
	if !k.SealFrom().Equal(k.ValidAfter()) {
		t.Errorf("SealFrom is %s by default, want ValidAfter", k.SealFrom())
	}
	later := k.WithSealFrom(noon)
	if !later.SealFrom().Equal(noon) || k.SealFrom().Equal(noon) {
		t.Errorf("copy seals from %s, original from %s", later.SealFrom(), k.SealFrom())
	}
	if back := later.WithSealFrom(time.Time{}); !back.SealFrom().Equal(k.ValidAfter()) {
		t.Errorf("zero gives %s, want ValidAfter", back.SealFrom())
	}
	if err := later.Derive(); err != nil {
		t.Fatal(err)
	}
	if a, b := k.derived.suite.Load(), later.derived.suite.Load(); a == nil || a != b {
		t.Error("the copy's derivation is not the original's")
	}
}

func TestMatches(t *testing.T) {
	s := Settings{Profile: A256GCM}
	c := KeyConfig{Fingerprint: "fp", Passphrase: "p", ValidAfter: noon, ValidUntil: noon.Add(time.Hour)}
	k, err := NewKey(s, c)
	if err != nil {
		t.Fatal(err)
	}
	spelled := Settings{Profile: A256GCM, KDF: "pbkdf2", Hash: "sha256", Iterations: 600_000, IVEncoding: Base64, MessageEncoding: Base64}
	elsewhere := c
	elsewhere.ValidAfter = c.ValidAfter.In(time.FixedZone("", 3600))
	sealLater := c
	sealLater.SealFrom = noon.Add(time.Minute)
	if !k.Matches(s, c) || !k.Matches(spelled, c) || !k.Matches(s, elsewhere) || !k.Matches(s, sealLater) {
		t.Error("the same key does not match")
	}
	for name, change := range map[string]func(*Settings, *KeyConfig){
		"profile":     func(s *Settings, c *KeyConfig) { s.Profile = A256CTR },
		"iterations":  func(s *Settings, c *KeyConfig) { s.Iterations = 1 },
		"salt":        func(s *Settings, c *KeyConfig) { s.Salt = "x" },
		"encoding":    func(s *Settings, c *KeyConfig) { s.IVEncoding = Hex },
		"fingerprint": func(s *Settings, c *KeyConfig) { c.Fingerprint = "x" },
		"phrase":      func(s *Settings, c *KeyConfig) { c.Passphrase = "x" },
		"valid after": func(s *Settings, c *KeyConfig) { c.ValidAfter = c.ValidAfter.Add(1) },
		"valid until": func(s *Settings, c *KeyConfig) { c.ValidUntil = c.ValidUntil.Add(1) },
	} {
		s, c := s, c
		change(&s, &c)
		if k.Matches(s, c) {
			t.Errorf("matches with another %s", name)
		}
	}
}

func TestConcurrentFirstUseDerivesOnce(t *testing.T) {
	s := Settings{Profile: A256GCM, Iterations: 20_000} // long enough for all to arrive
	k := testKey(t, s, "fp")
	var suites [32]*suite
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range suites {
		k := k.WithSealFrom(noon.Add(time.Duration(i)))
		wg.Go(func() {
			<-start
			sealed, err := k.Seal([]byte("{}"))
			if err == nil {
				_, err = k.Open(nil, sealed)
			}
			if err != nil {
				t.Error(err)
			}
			suites[i], _ = k.suite()
		})
	}
	close(start)
	wg.Wait()
	for _, c := range suites {
		if c == nil || c != suites[0] {
			t.Fatal("two users of one key hold two derivations")
		}
	}
	if n := suites[0].seals.Load(); n != uint64(len(suites)) {
		t.Errorf("%d seals counted, want %d", n, len(suites))
	}
}

func TestKeyExhausted(t *testing.T) {
	s := testSettings(A256GCM)
	k, other := testKey(t, s, "fp"), testKey(t, s, "other")
	c, err := k.suite()
	if err != nil {
		t.Fatal(err)
	}
	iv := make([]byte, 12)
	for name, seal := range map[string]func(*Key) error{
		"SealRaw":    func(k *Key) error { _, err := k.SealRaw(nil, iv, nil); return err },
		"AppendSeal": func(k *Key) error { _, err := k.AppendSeal(nil, nil); return err },
		"Seal":       func(k *Key) error { _, err := k.Seal(nil); return err },
	} {
		c.seals.Store(maxSeals - 1)
		if err := seal(k); err != nil {
			t.Errorf("%s: the last permitted seal: %v", name, err)
		}
		for _, k := range []*Key{k, k.WithSealFrom(noon)} {
			if err := seal(k); !errors.Is(err, ErrKeyExhausted) || !strings.Contains(err.Error(), "rotate") {
				t.Errorf("%s beyond the limit: %v, want ErrKeyExhausted that says what to do", name, err)
			}
		}
	}

	r := testRing(t, s, k, other)
	if got, err := r.Primary(noon); err != nil || got != other {
		t.Errorf("primary is %v, %v; want the key that is not exhausted", got, err)
	}
	if _, err := testRing(t, s, k).Primary(noon); !errors.Is(err, ErrKeyExhausted) || errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), "rotate the key on the Portal") {
		t.Errorf("only an exhausted key: %v, want ErrKeyExhausted that says what to do", err)
	}
	if _, err := testRing(t, s, k).Primary(noon.Add(2 * time.Hour)); !errors.Is(err, ErrNoKey) {
		t.Errorf("an exhausted key that has ended: %v, want ErrNoKey", err)
	}
	// Opening is not limited.
	c.seals.Store(0)
	sealed, err := k.Seal([]byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	c.seals.Store(maxSeals)
	if _, err := k.Open(nil, sealed); err != nil {
		t.Errorf("an exhausted key does not open: %v", err)
	}

	ctr := testKey(t, testSettings(A256CTR), "fp")
	if c, err = ctr.suite(); err != nil {
		t.Fatal(err)
	}
	c.seals.Store(maxSeals)
	if _, err := ctr.Seal([]byte("{}")); err != nil {
		t.Errorf("a256ctr has 128-bit IVs and no limit: %v", err)
	}

	b, err := NewBindingKey("b1", make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	b.sub.reportSeal.seals.Store(maxSeals)
	b.sub.plainSeal.seals.Store(maxSeals)
	if _, err := b.SealReport(nil); !errors.Is(err, ErrKeyExhausted) {
		t.Errorf("SealReport: %v", err)
	}
	if _, err := b.AppendSealPlain(nil, nil); !errors.Is(err, ErrKeyExhausted) {
		t.Errorf("AppendSealPlain: %v", err)
	}
}
