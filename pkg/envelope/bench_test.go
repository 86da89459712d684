package envelope

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"
)

// Each benchmark has its floor beside it: the least that any implementation has to do, written without this package. The budgets of
// the project are ratios of the two in one run; believe those and the allocations before the nanoseconds.

var benchSizes = []int{256, 1024, 8192}

func benchKey(tb testing.TB, p Profile) *Key {
	tb.Helper()
	k, err := NewKey(Settings{Profile: p, Iterations: 1}, KeyConfig{
		Fingerprint: "d41d8cd98f00b204e9800998ecf8427e", Passphrase: "correct horse", ValidUntil: time.Now().Add(time.Hour),
	})
	if err != nil {
		tb.Fatal(err)
	}
	if err := k.Derive(); err != nil {
		tb.Fatal(err)
	}
	return k
}

// benchPlaintext is JSON of n bytes.
func benchPlaintext(n int) []byte {
	head := []byte(`{"_id":"65f1c0ffee","order_number":"A-113","business_date":"2025-05-01","items":[{"name":"Burger","qty":2},{"name":"Fries","qty":1}],"comment":"`)
	tail := []byte(`"}`)
	return append(append(head, bytes.Repeat([]byte("no onions. "), n)[:n-len(head)-len(tail)]...), tail...)
}

func floorAEAD(tb testing.TB) cipher.AEAD {
	tb.Helper()
	block, err := aes.NewCipher(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		tb.Fatal(err)
	}
	return aead
}

func eachSize(b *testing.B, f func(b *testing.B, plaintext []byte)) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprintf("%dB", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			f(b, benchPlaintext(n))
		})
	}
}

func BenchmarkSealRaw(b *testing.B) {
	k := benchKey(b, A256GCM)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		iv, dst := make([]byte, 0, 12), make([]byte, 0, len(plaintext)+16)
		for b.Loop() {
			iv, _ := k.NewIV(iv)
			if _, err := k.SealRaw(dst, iv, plaintext); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSealRawFloor(b *testing.B) {
	aead := floorAEAD(b)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		iv, dst := make([]byte, 12), make([]byte, 0, len(plaintext)+16)
		for b.Loop() {
			rand.Read(iv)
			aead.Seal(dst, iv, plaintext, nil)
		}
	})
}

func BenchmarkOpenRaw(b *testing.B) {
	k := benchKey(b, A256GCM)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		iv, _ := k.NewIV(nil)
		ciphertext, _ := k.SealRaw(nil, iv, plaintext)
		dst := make([]byte, 0, len(plaintext))
		for b.Loop() {
			if _, err := k.OpenRaw(dst, iv, ciphertext); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkOpenRawFloor(b *testing.B) {
	aead := floorAEAD(b)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		iv := make([]byte, 12)
		ciphertext := aead.Seal(nil, iv, plaintext, nil)
		dst := make([]byte, 0, len(plaintext))
		for b.Loop() {
			if _, err := aead.Open(dst, iv, ciphertext, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkTripleSeal(b *testing.B) {
	k := benchKey(b, A256GCM)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		dst := make([]byte, 0, 2*len(plaintext)+256)
		for b.Loop() {
			if _, err := k.AppendSeal(dst, plaintext); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkTripleSealFloor: cipher, base64 of both, one copy of the text. The random IV, about 70 ns, is not in it.
func BenchmarkTripleSealFloor(b *testing.B) {
	aead := floorAEAD(b)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		iv, ciphertext := make([]byte, 12), make([]byte, 0, len(plaintext)+16)
		ivText := make([]byte, base64.StdEncoding.EncodedLen(12))
		text := make([]byte, base64.StdEncoding.EncodedLen(len(plaintext)+16))
		dst := make([]byte, len(text))
		for b.Loop() {
			base64.StdEncoding.Encode(ivText, iv)
			base64.StdEncoding.Encode(text, aead.Seal(ciphertext, iv, plaintext, nil))
			copy(dst, text)
		}
	})
}

func BenchmarkTripleOpen(b *testing.B) {
	k := benchKey(b, A256GCM)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		text, _ := k.AppendSeal(nil, plaintext)
		dst := make([]byte, 0, 2*len(plaintext)+256)
		for b.Loop() {
			t, err := ParseTriple(text, 1<<20)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := k.Open(dst, t); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkTripleOpenFloor: one copy of the text, base64 of both, cipher.
func BenchmarkTripleOpenFloor(b *testing.B) {
	aead := floorAEAD(b)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		iv := make([]byte, 12)
		ciphertext := aead.Seal(nil, iv, plaintext, nil)
		ivText := []byte(base64.StdEncoding.EncodeToString(iv))
		text := []byte(base64.StdEncoding.EncodeToString(ciphertext))
		received, dst := make([]byte, len(text)), make([]byte, 0, len(plaintext))
		for b.Loop() {
			copy(received, text)
			if _, err := base64.StdEncoding.Decode(iv, ivText); err != nil {
				b.Fatal(err)
			}
			n, err := base64.StdEncoding.Decode(ciphertext[:cap(ciphertext)], received)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := aead.Open(dst, iv, ciphertext[:n], nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkTripleOpenCTR(b *testing.B) {
	k := benchKey(b, A256CTR)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		text, _ := k.AppendSeal(nil, plaintext)
		dst := make([]byte, 0, 2*len(plaintext)+256)
		for b.Loop() {
			t, err := ParseTriple(text, 1<<20)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := k.Open(dst, t); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkTripleSealCTR(b *testing.B) {
	k := benchKey(b, A256CTR)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		dst := make([]byte, 0, 2*len(plaintext)+256)
		for b.Loop() {
			if _, err := k.AppendSeal(dst, plaintext); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkParseTriple(b *testing.B) {
	k := benchKey(b, A256GCM)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		text, _ := k.AppendSeal(nil, plaintext)
		for b.Loop() {
			if _, err := ParseTriple(text, 1<<20); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkAppendJSON(b *testing.B) {
	k := benchKey(b, A256GCM)
	eachSize(b, func(b *testing.B, plaintext []byte) {
		t, _ := k.Seal(plaintext)
		dst := make([]byte, 0, 2*len(plaintext)+256)
		for b.Loop() {
			dst = t.AppendJSON(dst[:0])
		}
	})
}

func benchEvent(tb testing.TB, plaintext []byte) (*BindingKey, *Event) {
	tb.Helper()
	k, err := NewBindingKey("b1", bytes.Repeat([]byte{1}, 32))
	if err != nil {
		tb.Fatal(err)
	}
	t, err := benchKey(tb, A256GCM).Seal(plaintext)
	if err != nil {
		tb.Fatal(err)
	}
	return k, &Event{Site: "store-0113", Kind: "order", Edge: "edge-1", Epoch: "01jt3z", From: 7, Seq: 7, ID: "01JT3Z8K3N4M5P6Q7R8S9TAVBW",
		Accepted: 1746100000000, Deadline: 1746100600000, Order: "abcdefghijklmnopqrstuvwxyz234567", Via: "hub", Triple: t}
}

func BenchmarkTagEvent(b *testing.B) {
	eachSize(b, func(b *testing.B, plaintext []byte) {
		k, e := benchEvent(b, plaintext)
		for b.Loop() {
			k.TagEvent(e)
		}
	})
}

// BenchmarkTagEventManySites takes each key once in a while, and lets the collector empty every pool now and then.
func BenchmarkTagEventManySites(b *testing.B) {
	_, e := benchEvent(b, benchPlaintext(1024))
	keys := make([]*BindingKey, 1000)
	for i := range keys {
		keys[i] = testBindingKey(b, fmt.Sprint("b", i), byte(i))
	}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if n%500 == 0 {
			b.StopTimer()
			runtime.GC()
			b.StartTimer()
		}
		keys[n%len(keys)].TagEvent(e)
	}
}

func BenchmarkVerifyEvent(b *testing.B) {
	eachSize(b, func(b *testing.B, plaintext []byte) {
		k, e := benchEvent(b, plaintext)
		tag := k.TagEvent(e)
		for b.Loop() {
			if err := k.VerifyEvent(e, tag); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkTagEventFloor: one HMAC over the message and what else the tag covers, with a state that is kept.
func BenchmarkTagEventFloor(b *testing.B) {
	eachSize(b, func(b *testing.B, plaintext []byte) {
		_, e := benchEvent(b, plaintext)
		h := hmac.New(sha256.New, make([]byte, 32))
		rest, sum := make([]byte, 256), make([]byte, 0, 32)
		for b.Loop() {
			h.Reset()
			h.Write(rest)
			h.Write(e.Triple.Message)
			sum = h.Sum(sum[:0])
		}
	})
}

// BenchmarkBudget measures each piece of work and its floor in turns, a few microseconds each, so that whatever else the machine does
// hits both alike. x-floor is the median of the ratios; the budgets are 1.15 for raw, over cipher and random IV, and 1.25 for triples,
// over cipher, base64 and one copy.
func BenchmarkBudget(b *testing.B) {
	const size, turns = 1024, 8
	plaintext := benchPlaintext(size)
	k, aead := benchKey(b, A256GCM), floorAEAD(b)
	iv := make([]byte, 12)
	sealed := make([]byte, 0, size+16)
	opened := make([]byte, 0, size+16)
	floorIV := make([]byte, 12)
	raw := aead.Seal(nil, floorIV, plaintext, nil)
	rawText := []byte(base64.StdEncoding.EncodeToString(raw))
	decoded, ivText, text := make([]byte, len(raw)+8), make([]byte, 16), make([]byte, len(rawText))
	copied := make([]byte, len(rawText))
	rawIV, _ := k.NewIV(nil)
	ours, _ := k.SealRaw(nil, rawIV, plaintext)
	triple, _ := k.AppendSeal(nil, plaintext)
	dst, out := make([]byte, 0, 2*size+256), make([]byte, 0, 2*size+256)
	zeroText := []byte(base64.StdEncoding.EncodeToString(floorIV))
	ratios := make([]float64, 0, 1<<20)

	for _, c := range []struct {
		name        string
		work, floor func()
	}{
		{"raw-seal", func() {
			iv, _ := k.NewIV(iv[:0])
			k.SealRaw(sealed, iv, plaintext)
		}, func() {
			rand.Read(iv)
			aead.Seal(sealed, iv, plaintext, nil)
		}},
		{"raw-open", func() { k.OpenRaw(opened, rawIV, ours) }, func() { aead.Open(opened, floorIV, raw, nil) }},
		{"triple-seal", func() { k.AppendSeal(dst, plaintext) }, func() {
			base64.StdEncoding.Encode(ivText, iv)
			base64.StdEncoding.Encode(text, aead.Seal(sealed, iv, plaintext, nil))
			copy(copied, text)
		}},
		{"triple-open", func() {
			t, _ := ParseTriple(triple, 1<<20)
			k.Open(out, t)
		}, func() {
			copy(copied, rawText)
			base64.StdEncoding.Decode(iv, zeroText)
			n, _ := base64.StdEncoding.Decode(decoded, copied)
			aead.Open(opened, iv, decoded[:n], nil)
		}},
		{"triple-write-and-read", func() {
			b, _ := k.AppendSeal(dst, plaintext)
			t, _ := ParseTriple(b, 1<<20)
			k.Open(out, t)
		}, func() {
			base64.StdEncoding.Encode(ivText, iv)
			base64.StdEncoding.Encode(text, aead.Seal(sealed, iv, plaintext, nil))
			copy(copied, text)
			base64.StdEncoding.Decode(iv, ivText)
			n, _ := base64.StdEncoding.Decode(decoded, copied)
			aead.Open(opened, iv, decoded[:n], nil)
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			ratios = ratios[:0]
			for b.Loop() {
				start := time.Now()
				for range turns {
					c.work()
				}
				between := time.Now()
				for range turns {
					c.floor()
				}
				ratios = append(ratios, float64(between.Sub(start))/float64(time.Since(between)))
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "x-floor")
		})
	}
}
