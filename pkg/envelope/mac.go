package envelope

import (
	"crypto/hkdf"
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"sync"
)

// macVersion is the first field of everything that is authenticated. Another layout gets another version.
const macVersion = 1

// mac is HMAC-SHA-256 (RFC 2104) under one sub-key. It holds what SHA-256 has become behind the key's first block, inside and
// outside, as the hash writes its state down. With many sites each key is used rarely, so that a pool of ready hashes for each of
// them would mostly be empty; one pool serves all keys, and taking up a state costs less than hashing a block. The states are as
// secret as the key. It is immutable.
type mac struct{ inner, outer []byte }

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
	var errs [2]error
	m.inner, errs[0] = keyedState(key, 0x36)
	m.outer, errs[1] = keyedState(key, 0x5c)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("HMAC under %s: %w", label, err)
	}
	return m, nil
}

// keyedState returns the state of SHA-256 behind the key, which is shorter than a block, padded with zeros and combined with pad. A
// digest has taken it up once: it will each time.
func keyedState(key []byte, pad byte) ([]byte, error) {
	var block [sha256.BlockSize]byte
	copy(block[:], key)
	for i := range block {
		block[i] ^= pad
	}
	h := newDigest()
	h.Write(block[:])
	state, err := h.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return state, newDigest().UnmarshalBinary(state)
}

// digest is what crypto/sha256 says of its hashes.
type digest interface {
	hash.Hash
	encoding.BinaryMarshaler
	encoding.BinaryUnmarshaler
}

func newDigest() digest { return sha256.New().(digest) }

var fieldsPool = sync.Pool{New: func() any { return &fields{h: newDigest()} }}

// fields collects what one HMAC covers: each field preceded by its length, four bytes, big endian. It owns its buffers because
// what is handed to the hash's interface escapes.
type fields struct {
	h   digest
	buf []byte
	out [sha256.Size]byte
}

func (m *mac) begin() *fields {
	f := fieldsPool.Get().(*fields)
	_ = f.h.UnmarshalBinary(m.inner) // see keyedState
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
	_ = f.h.UnmarshalBinary(m.outer) // see keyedState
	f.h.Write(f.out[:])
	f.h.Sum(f.out[:0])
	sum := f.out
	if cap(f.buf) <= 16<<10 { // one absurd message does not hold its memory for ever
		fieldsPool.Put(f)
	}
	return sum
}
