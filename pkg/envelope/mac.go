package envelope

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"sync"
)

// macVersion is the first field of everything that is authenticated. Another layout gets another version.
const macVersion = 1

// mac is HMAC-SHA-256 under one sub-key. Its states are pooled: a state costs more than a tag.
type mac struct{ pool sync.Pool }

// subKey derives the 32-byte sub-key of a label: HKDF-SHA-256, empty salt, the label as info.
func subKey(secret []byte, label string) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, label, keySize)
	if err != nil {
		return nil, fmt.Errorf("derive sub-key %s: %w", label, err)
	}
	return key, nil
}

func newMAC(secret []byte, label string) (*mac, error) {
	key, err := subKey(secret, label)
	if err != nil {
		return nil, err
	}
	m := &mac{}
	m.pool.New = func() any { return &fields{h: hmac.New(sha256.New, key)} }
	return m, nil
}

// fields collects what one HMAC covers: each field preceded by its length, four bytes, big endian. It owns its buffers because
// what is handed to the hash's interface escapes.
type fields struct {
	h   hash.Hash
	buf []byte
	out [sha256.Size]byte
}

func (m *mac) begin() *fields {
	f := m.pool.Get().(*fields)
	f.h.Reset()
	f.buf = append(f.buf[:0], 0, 0, 0, 1, macVersion)
	return f
}

// text adds a text or a few bytes.
func text[T string | []byte](f *fields, t T) {
	f.buf = binary.BigEndian.AppendUint32(f.buf, uint32(len(t)))
	f.buf = append(f.buf, t...)
}

// number adds an integer: eight bytes, big endian, two's complement.
func number[T int | int64 | uint64](f *fields, n T) {
	f.buf = binary.BigEndian.AppendUint32(f.buf, 8)
	f.buf = binary.BigEndian.AppendUint64(f.buf, uint64(n))
}

// finish adds the last field, which may be large and is not copied, and returns the HMAC. f goes back to the pool.
func (m *mac) finish(f *fields, last []byte) [sha256.Size]byte {
	f.buf = binary.BigEndian.AppendUint32(f.buf, uint32(len(last)))
	f.h.Write(f.buf)
	f.h.Write(last)
	f.buf = f.buf[:0]
	return m.sum(f)
}

// sum returns the HMAC of the fields added. f goes back to the pool.
func (m *mac) sum(f *fields) [sha256.Size]byte {
	f.h.Write(f.buf)
	f.h.Sum(f.out[:0])
	sum := f.out
	if cap(f.buf) <= 16<<10 { // one absurd message does not hold its memory for ever
		m.pool.Put(f)
	}
	return sum
}
