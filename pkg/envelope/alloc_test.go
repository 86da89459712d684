package envelope

import (
	"testing"
)

// TestAllocations holds what the hot path may allocate, into buffers of the caller that are large enough.
func TestAllocations(t *testing.T) {
	plaintext := benchPlaintext(1024)
	buf, iv := make([]byte, 0, 4096), make([]byte, 0, 16)
	must := func(_ []byte, err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(name string, want float64, f func()) {
		t.Helper()
		if got := testing.AllocsPerRun(200, f); got != want {
			t.Errorf("%s allocates %v times, want %v", name, got, want)
		}
	}

	for _, p := range profiles {
		want := map[Profile]float64{A256GCM: 0, A256CTR: 1}[p] // cipher.NewCTR
		for _, e := range []Encoding{Base64, Base64URL, Hex} {
			s := Settings{Profile: p, Iterations: 1, IVEncoding: e, MessageEncoding: e}
			k := testKey(t, s, "d41d8cd98f00b204e9800998ecf8427e")
			r := testRing(t, s, k)
			name := string(p) + " " + string(e) + ": "
			rawIV, err := k.NewIV(nil)
			if err != nil {
				t.Fatal(err)
			}
			ciphertext, err := k.SealRaw(nil, rawIV, plaintext)
			if err != nil {
				t.Fatal(err)
			}
			text, err := k.AppendSeal(nil, plaintext)
			if err != nil {
				t.Fatal(err)
			}
			triple, err := ParseTriple(text, 0)
			if err != nil {
				t.Fatal(err)
			}
			exact := make([]byte, 0, len(triple.Message)+16) // as documented
			check(name+"NewIV and SealRaw", want, func() {
				iv, err := k.NewIV(iv)
				must(iv, err)
				must(k.SealRaw(buf, iv, plaintext))
			})
			check(name+"OpenRaw", want, func() { must(k.OpenRaw(buf, rawIV, ciphertext)) })
			check(name+"AppendSeal", want, func() { must(k.AppendSeal(buf, plaintext)) })
			check(name+"AppendJSON", 0, func() { triple.AppendJSON(buf) })
			check(name+"ParseTriple", 0, func() {
				if _, err := ParseTriple(text, 1<<20); err != nil {
					t.Fatal(err)
				}
			})
			check(name+"ParseTriple and Open", want, func() {
				triple, err := ParseTriple(text, 1<<20)
				if err != nil {
					t.Fatal(err)
				}
				must(k.Open(exact, triple))
			})
			check(name+"Primary, CheckIV and Accept", want, func() {
				if _, err := r.Primary(noon); err != nil {
					t.Fatal(err)
				}
				must(nil, r.CheckIV(triple.IV))
				must(r.Accept(exact, triple, noon, 0))
			})
		}
	}

	spaced := []byte(` { "message" : "QUJD" , "fingerprint" : "fp" , "iv" : "AA==" } `)
	check("ParseTriple, fields in another order", 0, func() {
		if _, err := ParseTriple(spaced, 1<<20); err != nil {
			t.Fatal(err)
		}
	})
	check("ValidName", 0, func() { must(nil, ValidName("store-0113")) })

	b := testBinding(t, "store-1", testBindingKey(t, "b1", 1))
	text, err := b.Current().AppendSealPlain(nil, plaintext)
	if err != nil {
		t.Fatal(err)
	}
	triple, err := ParseTriple(text, 0)
	if err != nil {
		t.Fatal(err)
	}
	check("AppendSealPlain", 0, func() { must(b.Current().AppendSealPlain(buf, plaintext)) })
	check("OpenPlain", 0, func() { must(b.OpenPlain(buf, triple)) })

	if raceDetector { // what follows draws on a sync.Pool
		return
	}
	e, r := testEvent(), testReport()
	e.Triple.Message, r.Triple.Message = text, text
	tag, reportTag := b.Current().TagEvent(e), b.Current().TagReport(r)
	check("TagEvent", 1, func() { b.Current().TagEvent(e) }) // the tag
	check("VerifyEvent", 0, func() { must(nil, b.VerifyEvent(e, "b1", tag)) })
	check("TagReport", 1, func() { b.Current().TagReport(r) })
	check("VerifyReport", 0, func() { must(nil, b.VerifyReport(r, "b1", reportTag)) })
	check("Order", 1, func() { b.Lane().Order("65f1c0ffee") })
	check("MessageID", 1, func() { b.Lane().MessageID("store-1", "till-1", "order", "7f3c") })
	check("EnvelopeID", 1, func() { b.Lane().EnvelopeID("store-1", "till-1", "order", triple) })
	check("PayloadHash", 0, func() { b.Lane().PayloadHash("order", plaintext) })
}
