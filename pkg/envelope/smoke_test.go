package envelope

import (
	"bytes"
	"testing"
	"time"
)

func TestSmoke(t *testing.T) {
	for _, p := range []Profile{A256GCM, A256CTR} {
		for _, e := range []Encoding{Base64, Base64URL, Hex} {
			s := Settings{Profile: p, Iterations: 10, IVEncoding: e, MessageEncoding: e}
			now := time.Now()
			k, err := NewKey(s, KeyConfig{Fingerprint: "fp", Passphrase: "secret", ValidAfter: now.Add(-time.Hour), ValidUntil: now.Add(time.Hour)})
			if err != nil {
				t.Fatal(err)
			}
			r, err := NewKeyring(s, k)
			if err != nil {
				t.Fatal(err)
			}
			for n := range 2000 {
				pt := append([]byte{'"'}, bytes.Repeat([]byte("a"), n)...)
				pt = append(pt, '"')
				b, err := k.AppendSeal([]byte("x"), pt)
				if err != nil {
					t.Fatal(err)
				}
				tr, err := ParseTriple(b[1:], 0)
				if err != nil {
					t.Fatal(err)
				}
				if got := tr.AppendJSON(nil); !bytes.Equal(got, b[1:]) {
					t.Fatalf("%s\n%s", got, b)
				}
				got, err := r.Accept([]byte("y"), tr, now, 0)
				if err != nil || string(got) != "y"+string(pt) {
					t.Fatal(n, err)
				}
			}
		}
	}
}
