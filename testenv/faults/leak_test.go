package main

import (
	"encoding/base64"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestASecretIsFoundInEachForm(t *testing.T) {
	const secret = "a pass phrase / with ÿ+? in it"
	s := newSearch()
	if err := s.add("the phrase", secret); err != nil {
		t.Fatal(err)
	}
	if err := s.add("another", "never there at all"); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"as it is":           "x" + secret + "y",
		"at the end":         strings.Repeat("x", 17) + secret,
		"in hex":             "id=" + hex.EncodeToString([]byte(secret)),
		"base64":             base64.StdEncoding.EncodeToString([]byte(secret)),
		"base64, 1 before":   base64.StdEncoding.EncodeToString([]byte("1" + secret + "x")),
		"base64, 2 before":   base64.StdEncoding.EncodeToString([]byte("12" + secret + "xyz")),
		"base64, 100 before": base64.StdEncoding.EncodeToString([]byte(strings.Repeat("z", 100) + secret)),
		"base64url":          base64.RawURLEncoding.EncodeToString([]byte(secret)),
	} {
		t.Run(name, func(t *testing.T) {
			found := s.in([]byte(text))
			if len(found) != 1 || !strings.HasPrefix(found[0], "the phrase") {
				t.Errorf("found %q", found)
			}
		})
	}
	if found := s.in([]byte(strings.Repeat(secret[:len(secret)-1]+" ", 50))); len(found) > 0 {
		t.Errorf("found %q where only a part of it is", found)
	}
	if err := s.add("short", "elevenbytes"); err == nil {
		t.Error("a secret that may occur by chance was taken")
	}
}

func TestFilesAreSearched(t *testing.T) {
	dir := t.TempDir()
	s := newSearch()
	if err := s.add("the token", "token-0123456789"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.leaksUnder(dir, nil); err == nil {
		t.Error("an empty folder counts as searched")
	}
	if err := os.MkdirAll(filepath.Join(dir, "hub", "blk"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"keys": "token-0123456789", "log": "fine", "hub/blk/1": "\x00\x01token-0123456789\xff"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	leaks, err := s.leaksUnder(dir, map[string]bool{"keys": true})
	if err != nil || len(leaks) != 1 || leaks[0].Where != "file hub/blk/1" {
		t.Errorf("leaks %v, %v", leaks, err)
	}
}
