package envelope

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
)

// Strict: trailing bits that are not zero are refused, so that one value has one text.
var (
	base64Std    = base64.StdEncoding.Strict()
	base64URL    = base64.RawURLEncoding.Strict()
	base64URLPad = base64.URLEncoding.Strict()
)

var errEncoding = errors.New("wrong text encoding")

func (e Encoding) encodedLen(n int) int {
	switch e {
	case Hex:
		return 2 * n
	case Base64URL:
		return base64URL.EncodedLen(n)
	default:
		return base64Std.EncodedLen(n)
	}
}

// encode writes the text of src over dst, which must not overlap it and has room for encodedLen(len(src)).
func (e Encoding) encode(dst, src []byte) {
	switch e {
	case Hex:
		hex.Encode(dst, src)
	case Base64URL:
		base64URL.Encode(dst, src)
	default:
		base64Std.Encode(dst, src)
	}
}

// maxDecoded returns how many bytes a text of n characters decodes to at most.
func (e Encoding) maxDecoded(n int) int {
	if e == Hex {
		return n / 2
	}
	return base64URL.DecodedLen(n)
}

// decode reads the whole of src, which has no white space, into dst, which has room for maxDecoded(len(src)).
func (e Encoding) decode(dst, src []byte) (int, error) {
	if e == Hex {
		n, err := hex.Decode(dst, src)
		if err != nil {
			return 0, fmt.Errorf("%w: not hex: %w", errEncoding, err)
		}
		return n, nil
	}

	enc, want := base64Std, len(src)/4*3
	padded := e == Base64
	if e == Base64URL {
		enc, want = base64URL, base64URL.DecodedLen(len(src))
		if len(src) > 0 && src[len(src)-1] == '=' {
			enc, want, padded = base64URLPad, len(src)/4*3, true
		}
	}
	if padded && len(src)%4 != 0 || len(src)%4 == 1 {
		return 0, fmt.Errorf("%w: %d characters is no length of %s", errEncoding, len(src), e)
	}
	if padded && len(src) > 0 && src[len(src)-1] == '=' {
		want--
		if src[len(src)-2] == '=' {
			want--
		}
	}
	n, err := enc.Decode(dst, src)
	if err != nil {
		return 0, fmt.Errorf("%w: not %s: %w", errEncoding, e, err)
	}
	// The decoder passes over line breaks. A text that held one yields fewer bytes than its length stands for.
	if n != want {
		return 0, fmt.Errorf("%w: line break inside %s", errEncoding, e)
	}
	return n, nil
}
