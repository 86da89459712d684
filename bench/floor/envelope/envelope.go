// Package envelope is the floor under pkg/envelope: what any implementation has to do.
//
// Unavoidable for raw sealing: a fresh random IV for each message, and AES-256-GCM over
// it. For raw opening: the cipher. For a triple: the cipher both ways, base64 of IV and
// message both ways, and one copy of the text, as it has to stand in a buffer between its
// neighbours.
//
// How: crypto/aes, crypto/cipher and encoding/base64 into buffers that are there, and
// nothing else: no check of a length, a fingerprint or a count, no JSON, no errors.
//
// Could it be 10 % faster? The cipher is two thirds of raw sealing and the standard
// library has it in assembly. The IV is a system call in user space (getrandom in the
// vDSO); drawing IVs in advance would save most of its 60 ns, and leave them lying in
// memory before they are used, which nobody should ship. base64 has no assembly in the
// standard library; a vectored one would cut a triple by half, and is a dependency that
// an hour does not vet.
package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
)

// Floor holds the cipher and the buffers. It is not safe for concurrent use.
type Floor struct {
	aead                        cipher.AEAD
	iv, sealed, opened          []byte
	ivText, text, sent, decoded []byte
}

// New makes a floor for plaintexts of up to size bytes under a key of 32 bytes.
func New(key []byte, size int) (*Floor, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	raw := size + aead.Overhead()
	text := base64.StdEncoding.EncodedLen(raw)
	return &Floor{
		aead: aead, iv: make([]byte, aead.NonceSize()), sealed: make([]byte, 0, raw), opened: make([]byte, 0, size),
		ivText: make([]byte, base64.StdEncoding.EncodedLen(aead.NonceSize())),
		text:   make([]byte, text), sent: make([]byte, text),
		decoded: make([]byte, base64.StdEncoding.DecodedLen(text)),
	}, nil
}

// Seal draws an IV and seals; the results are valid until the next call.
func (f *Floor) Seal(plaintext []byte) (iv, sealed []byte) {
	rand.Read(f.iv)
	return f.iv, f.aead.Seal(f.sealed, f.iv, plaintext, nil)
}

// Open opens; the result is valid until the next call.
func (f *Floor) Open(iv, sealed []byte) ([]byte, error) {
	return f.aead.Open(f.opened, iv, sealed, nil)
}

// Triple takes a plaintext to text and back; the result is valid until the next call.
func (f *Floor) Triple(plaintext []byte) ([]byte, error) {
	iv, sealed := f.Seal(plaintext)
	base64.StdEncoding.Encode(f.ivText, iv)
	text := f.text[:base64.StdEncoding.EncodedLen(len(sealed))]
	base64.StdEncoding.Encode(text, sealed)
	sent := f.sent[:copy(f.sent, text)]

	if _, err := base64.StdEncoding.Decode(f.iv, f.ivText); err != nil {
		return nil, err
	}
	n, err := base64.StdEncoding.Decode(f.decoded, sent)
	if err != nil {
		return nil, err
	}
	return f.Open(f.iv, f.decoded[:n])
}
