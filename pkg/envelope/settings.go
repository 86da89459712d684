package envelope

import (
	"crypto"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Profile names the cipher of a site.
type Profile string

const (
	// A256GCM is AES-256-GCM: 12-byte IV, 16-byte tag appended to the ciphertext. For fleets whose two ends are ours.
	A256GCM Profile = "a256gcm"
	// A256CTR is AES-256-CTR: 16-byte IV, no integrity check of its own. For Kitchens that speak the vendor's protocol.
	A256CTR Profile = "a256ctr"
)

// Encoding names how bytes are written as text.
type Encoding string

const (
	// Base64 is the standard alphabet with padding.
	Base64 Encoding = "base64"
	// Base64URL is the URL-safe alphabet, written without padding, read with or without.
	Base64URL Encoding = "base64url"
	// Hex is written in lower case, read in either.
	Hex Encoding = "hex"
)

const (
	kdfPBKDF2 = "pbkdf2"
	kdfHKDF   = "hkdf"

	defaultIterations = 600_000
	maxIterations     = 10_000_000 // about 2 s a key: beyond it, a typing error
	minHKDFPhrase     = 16         // bytes: what a phrase stated to hold 128 random bits needs at least
)

// Settings is the cipher profile of one site: what the two ends of a site must agree on. It is comparable.
type Settings struct {
	// Profile is the cipher: "a256gcm" or "a256ctr". Required; a message never chooses it.
	Profile Profile `koanf:"profile"`
	// KDF makes the 32-byte key from the pass phrase: "pbkdf2" (default), or "hkdf" for pass phrases that are stated to be random
	// with at least 128 bits. "hkdf" excludes iterations.
	KDF string `koanf:"kdf"`
	// Hash is the hash of the KDF: "sha256" (default), "sha1" or "sha512".
	Hash string `koanf:"hash"`
	// Iterations is the count of PBKDF2, 1 to 10,000,000. 0 means 600,000, which takes about 0.12 s a key. Excluded by kdf "hkdf".
	Iterations int `koanf:"iterations"`
	// Salt is the salt of the KDF, as UTF-8 text. Default: empty.
	Salt string `koanf:"salt"`
	// IVEncoding is the text form of the IV: "base64" (default), "base64url" or "hex".
	IVEncoding Encoding `koanf:"iv_encoding"`
	// MessageEncoding is the text form of the message: "base64" (default), "base64url" or "hex".
	MessageEncoding Encoding `koanf:"message_encoding"`
}

// Validate reports every mistake at once, one line each, beginning with the name of the field. The errors are ErrSettings.
func (s Settings) Validate() error {
	var errs []error
	wrong := func(field, format string, args ...any) {
		errs = append(errs, &fieldError{field, fmt.Sprintf(format, args...)})
	}
	switch s.Profile {
	case A256GCM, A256CTR:
	case "":
		wrong("profile", `required: "a256gcm" when both ends are kitchenbridge, "a256ctr" for a Kitchen that speaks the vendor's protocol`)
	default:
		wrong("profile", `%s is unknown; use "a256gcm" or "a256ctr"`, quote(string(s.Profile)))
	}
	switch s.KDF {
	case "", kdfPBKDF2, kdfHKDF:
	default:
		wrong("kdf", `%s is unknown; use "pbkdf2" or "hkdf"`, quote(s.KDF))
	}
	switch s.Hash {
	case "", "sha256", "sha1", "sha512":
	default:
		wrong("hash", `%s is unknown; use "sha256", "sha1" or "sha512"`, quote(s.Hash))
	}
	switch {
	case s.KDF == kdfHKDF && s.Iterations != 0:
		wrong("iterations", `excluded by kdf "hkdf", which has none; leave it out`)
	case s.Iterations < 0 || s.Iterations > maxIterations:
		wrong("iterations", "%d is out of range; use 1 to %d, or leave it out for %d", s.Iterations, maxIterations, defaultIterations)
	}
	if !utf8.ValidString(s.Salt) {
		wrong("salt", "not valid UTF-8; the salt is a text")
	}
	for _, e := range []struct {
		field string
		value Encoding
	}{{"iv_encoding", s.IVEncoding}, {"message_encoding", s.MessageEncoding}} {
		switch e.value {
		case "", Base64, Base64URL, Hex:
		default:
			wrong(e.field, `%s is unknown; use "base64", "base64url" or "hex"`, quote(string(e.value)))
		}
	}
	return errors.Join(errs...)
}

// normal returns valid settings with every default filled in, so that equal meanings compare equal.
func (s Settings) normal() Settings {
	if s.KDF == "" {
		s.KDF = kdfPBKDF2
	}
	if s.Hash == "" {
		s.Hash = "sha256"
	}
	if s.KDF == kdfPBKDF2 && s.Iterations == 0 {
		s.Iterations = defaultIterations
	}
	if s.IVEncoding == "" {
		s.IVEncoding = Base64
	}
	if s.MessageEncoding == "" {
		s.MessageEncoding = Base64
	}
	return s
}

func (s Settings) hash() crypto.Hash {
	switch s.Hash {
	case "sha1":
		return crypto.SHA1
	case "sha512":
		return crypto.SHA512
	default:
		return crypto.SHA256
	}
}

// ValidName reports why s is not the name of a site, edge, kind or binding key: ^[a-z0-9][a-z0-9_-]{0,62}$. Names become tokens of
// broker subjects, where a dot, star or space would reach beyond what the name stands for.
func ValidName(s string) error {
	if s == "" {
		return &fieldError{"name", "empty; use 1 to 63 of a-z, 0-9, _ and -, beginning with a letter or digit"}
	}
	if len(s) > 63 {
		return &fieldError{"name", fmt.Sprintf("%s has %d bytes; at most 63 are allowed", quote(s), len(s))}
	}
	for i := range len(s) {
		c := s[i]
		letter := 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
		if !letter && (i == 0 || c != '_' && c != '-') {
			return &fieldError{"name", fmt.Sprintf("%s has %s at position %d; use a-z, 0-9, _ and -, beginning with a letter or digit", quote(s), quote(s[i:i+1]), i+1)}
		}
	}
	return nil
}
