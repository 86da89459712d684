package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"slices"
	"sync/atomic"
)

const (
	keySize     = 32
	gcmIVSize   = 12
	gcmOverhead = 16
	ctrIVSize   = 16

	// Random 96-bit IVs: among 2^28 messages two share one with probability 2^-41. Each process counts its own seals, so sixteen of
	// them at their limits are together within the 2^32 that NIST SP 800-38D, section 8.3, allows a key.
	maxSeals = 1 << 28
)

// suite is a cipher under one key, with its count of seals. It deals in bytes; form deals in texts.
type suite struct {
	aead  cipher.AEAD  // a256gcm, else nil
	block cipher.Block // a256ctr, else nil
	seals atomic.Uint64
}

func newSuite(p Profile, key []byte) (*suite, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	if p == A256CTR {
		return &suite{block: block}, nil
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p, err)
	}
	return &suite{aead: aead}, nil
}

func (c *suite) exhausted() bool { return c.aead != nil && c.seals.Load() >= maxSeals }

// seal appends the ciphertext to dst. The IV has the profile's length.
func (c *suite) seal(dst, iv, plaintext []byte) ([]byte, error) {
	if c.aead == nil {
		return c.xor(dst, iv, plaintext), nil
	}
	if c.seals.Add(1) > maxSeals {
		return nil, fmt.Errorf("%w: %d messages sealed by this process; rotate the key", ErrKeyExhausted, maxSeals)
	}
	return c.aead.Seal(dst, iv, plaintext, nil), nil
}

// open appends the plaintext to dst. The IV has the profile's length.
func (c *suite) open(dst, iv, ciphertext []byte) ([]byte, error) {
	if c.aead == nil {
		return c.xor(dst, iv, ciphertext), nil
	}
	dst, err := c.aead.Open(dst, iv, ciphertext, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: wrong key or IV, or altered message", ErrDecrypt)
	}
	return dst, nil
}

// xor allocates once: the standard library makes a new CTR stream for each IV.
func (c *suite) xor(dst, iv, src []byte) []byte {
	start := len(dst)
	dst = slices.Grow(dst, len(src))[:start+len(src)]
	cipher.NewCTR(c.block, iv).XORKeyStream(dst[start:], src)
	return dst
}

// form is how a triple's texts look under one key.
type form struct {
	ivSize   int
	overhead int
	json     bool // the plaintext must be JSON, for want of an integrity check
	iv       Encoding
	message  Encoding
	middle   string // of the JSON: from behind the IV to before the message, the fingerprint within
}

func newForm(s Settings, fingerprint string) form {
	f := form{ivSize: gcmIVSize, overhead: gcmOverhead, iv: s.IVEncoding, message: s.MessageEncoding}
	if s.Profile == A256CTR {
		f = form{ivSize: ctrIVSize, json: true, iv: s.IVEncoding, message: s.MessageEncoding}
	}
	f.middle = string(appendEscaped([]byte(jsonFingerprint), []byte(fingerprint))) + jsonMessage
	return f
}

// checkIV decodes the text of an IV into raw and returns its part that holds it.
func (f *form) checkIV(raw *[ctrIVSize]byte, text []byte) ([]byte, error) {
	var buf [48]byte
	if len(text) > 64 {
		return nil, fmt.Errorf("%w: %d characters; the profile's IV has %d bytes, as %s", ErrIV, len(text), f.ivSize, f.iv)
	}
	n, err := f.iv.decode(buf[:], text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIV, err)
	}
	if n != f.ivSize {
		return nil, fmt.Errorf("%w: %d bytes; the profile's IV has %d, as %s", ErrIV, n, f.ivSize, f.iv)
	}
	copy(raw[:], buf[:n])
	return raw[:n], nil
}

// appendSeal seals straight into the JSON of a triple. Everything happens inside dst: the raw IV stands where its text will, the
// ciphertext at the end of where the message will, and both are then encoded forward. What is handed to the cipher's interface
// escapes, and dst is on the heap already.
func (f *form) appendSeal(dst []byte, c *suite, plaintext []byte) ([]byte, error) {
	ivText := f.iv.encodedLen(f.ivSize)
	raw := len(plaintext) + f.overhead
	messageText := f.message.encodedLen(raw)
	size := len(jsonHead) + ivText + len(f.middle) + messageText + len(jsonTail)

	start := len(dst)
	dst = slices.Grow(dst, size)[:start+size]
	out := dst[start:]
	out = out[copy(out, jsonHead):]
	iv := out[:ivText]
	out = out[ivText:]
	out = out[copy(out, f.middle):]
	message := out[:messageText]
	copy(out[messageText:], jsonTail)

	rand.Read(iv[:f.ivSize])
	ciphertext := message[messageText-raw:]
	if _, err := c.seal(ciphertext[:0], iv[:f.ivSize], plaintext); err != nil {
		return nil, err
	}
	encodeForward(f.iv, iv, iv[:f.ivSize])
	encodeForward(f.message, message, ciphertext)
	return dst, nil
}

// encodeForward writes the text of raw over text. raw may lie in text: at its end, or, when it fits one chunk, anywhere. From the end
// the text never overtakes what is still to be read: k bytes read make at most k/3 (base64) or k (hex) characters more than k, and
// the whole of raw stands as far behind the beginning of text as all of its bytes need.
func encodeForward(e Encoding, text, raw []byte) {
	var chunk [768]byte // a multiple of 3: padding at the end only
	for len(raw) > 0 {
		n := copy(chunk[:], raw)
		raw = raw[n:]
		e.encode(text, chunk[:n])
		text = text[e.encodedLen(n):]
	}
}

func (f *form) seal(c *suite, fingerprint string, plaintext []byte) (Triple, error) {
	b, err := f.appendSeal(nil, c, plaintext)
	if err != nil {
		return Triple{}, err
	}
	iv := b[len(jsonHead):]
	iv = iv[:f.iv.encodedLen(f.ivSize):f.iv.encodedLen(f.ivSize)]
	message := b[len(jsonHead)+len(iv)+len(f.middle) : len(b)-len(jsonTail)]
	return Triple{IV: iv, Fingerprint: []byte(fingerprint), Message: message[:len(message):len(message)]}, nil
}

// open decodes into dst's spare capacity and opens in place; the IV stands behind the ciphertext meanwhile.
func (f *form) open(dst []byte, c *suite, t Triple) ([]byte, error) {
	var raw [ctrIVSize]byte
	iv, err := f.checkIV(&raw, t.IV)
	if err != nil {
		return nil, err
	}
	text := t.Message
	for len(text) > 0 && isSpace(text[len(text)-1]) {
		text = text[:len(text)-1]
	}
	start := len(dst)
	dst = slices.Grow(dst, f.message.maxDecoded(len(text))+f.ivSize)
	space := dst[start:cap(dst)]
	n, err := f.message.decode(space, text)
	if err != nil {
		return nil, fmt.Errorf("%w: message: %w", ErrDecrypt, err)
	}
	ivSpace := space[n : n+f.ivSize]
	copy(ivSpace, iv)
	if dst, err = c.open(dst, ivSpace, space[:n]); err != nil {
		return nil, err
	}
	if plaintext := dst[start:]; f.json && !validJSON(plaintext) {
		clear(plaintext)
		return nil, fmt.Errorf("%w: wrong key or IV, or altered message: the result is not JSON", ErrDecrypt)
	}
	return dst, nil
}
