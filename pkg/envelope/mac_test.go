package envelope

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"testing"
)

// TestMACIsHMAC compares the MAC with crypto/hmac over its fields, for lengths around the hash's block, with many keys in use at once.
func TestMACIsHMAC(t *testing.T) {
	macs := make([]*mac, 50)
	keys := make([][]byte, len(macs))
	for i := range macs {
		var err error
		if macs[i], err = newMAC(testSecret(byte(i)), labelEventTag); err != nil {
			t.Fatal(err)
		}
		if keys[i], err = subKey(testSecret(byte(i)), labelEventTag); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for n := range 300 {
				i := (n*7 + g) % len(macs)
				name, message := fmt.Sprint("site-", g), bytes.Repeat([]byte{byte(n)}, n)

				h := hmac.New(sha256.New, keys[i])
				h.Write([]byte{0, 0, 0, 1, macVersion})
				for _, field := range [][]byte{[]byte(name), binary.BigEndian.AppendUint64(nil, uint64(n)), message} {
					h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(field))))
					h.Write(field)
				}

				f := macs[i].begin()
				text(f, name)
				number(f, n)
				last := macs[i].finish(f, message)
				f = macs[i].begin()
				text(f, name)
				number(f, n)
				text(f, message)
				if copied := macs[i].sum(f); !hmac.Equal(last[:], h.Sum(nil)) || copied != last {
					t.Errorf("key %d, message of %d bytes: %x and %x, not %x", i, n, last, copied, h.Sum(nil))
					return
				}
			}
		})
	}
	wg.Wait()
}
