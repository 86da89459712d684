package envelope

import (
	"bytes"
	"testing"
)

func TestWhatGoesInComesOut(t *testing.T) {
	f, err := New(bytes.Repeat([]byte{1}, 32), 100)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{0, 1, 100} {
		plaintext := bytes.Repeat([]byte("x"), size)
		iv, sealed := f.Seal(plaintext)
		if size > 0 && bytes.Contains(sealed, plaintext) && size > 1 {
			t.Errorf("%d bytes are not sealed", size)
		}
		if got, err := f.Open(iv, sealed); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes open to %q, %v", size, got, err)
		}
		if got, err := f.Triple(plaintext); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%d bytes come back as %q, %v", size, got, err)
		}
	}
	first, _ := f.Seal([]byte("a"))
	again := bytes.Clone(first)
	if second, _ := f.Seal([]byte("a")); bytes.Equal(again, second) {
		t.Error("an IV came twice")
	}
}

func TestNothingIsAllocated(t *testing.T) {
	f, err := New(bytes.Repeat([]byte{1}, 32), 1024)
	if err != nil {
		t.Fatal(err)
	}
	plaintext := make([]byte, 1024)
	if n := testing.AllocsPerRun(100, func() { _, _ = f.Triple(plaintext) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
