package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// search looks for many secrets at once, each in the forms it could leak in: as it is, in
// hex, and in base64 wherever in a text it may stand.
type search struct {
	needles []needle
	// maybe has a bit for the hash of each needle's first eight bytes.
	maybe   [1 << 10]uint64
	byStart map[uint64][]int // needles by their first eight bytes
}

type needle struct {
	what  string
	bytes []byte
}

// shortest is the shortest secret that is looked for: what is shorter may occur by chance.
const shortest = 12

func newSearch() *search { return &search{byStart: map[uint64][]int{}} }

// add takes a secret. what names it without telling it. A secret that is too short is an
// error: it would make the search say nothing, or too much.
func (s *search) add(what, secret string) error {
	if len(secret) < shortest {
		return fmt.Errorf("%s: %d bytes are too few to be looked for", what, len(secret))
	}
	s.put(what, []byte(secret))
	s.put(what+" in hex", []byte(hex.EncodeToString([]byte(secret))))
	// In base64 a text looks different depending on how many bytes stand before it.
	for before := range 3 {
		encoded := base64.StdEncoding.EncodeToString(append(make([]byte, before), secret...))
		from := (before*8 + 5) / 6 // characters that hold bits of what stands before
		to := (before + len(secret)) * 8 / 6
		s.put(what+" in base64", []byte(encoded[from:to]))
		if url := strings.NewReplacer("+", "-", "/", "_").Replace(encoded); url != encoded {
			s.put(what+" in base64url", []byte(url[from:to]))
		}
	}
	return nil
}

func (s *search) put(what string, b []byte) {
	start := binary.LittleEndian.Uint64(b)
	s.byStart[start] = append(s.byStart[start], len(s.needles))
	s.needles = append(s.needles, needle{what, b})
	h := hashStart(start)
	s.maybe[h/64] |= 1 << (h % 64)
}

func hashStart(start uint64) uint64 { return start * 0x9e3779b97f4a7c15 >> 48 }

// in returns what of the secrets is in b, each once.
func (s *search) in(b []byte) (found []string) {
	seen := map[string]bool{}
	for i := 0; i+8 <= len(b); i++ {
		start := binary.LittleEndian.Uint64(b[i:])
		if h := hashStart(start); s.maybe[h/64]&(1<<(h%64)) == 0 {
			continue
		}
		for _, n := range s.byStart[start] {
			if what := s.needles[n].what; bytes.HasPrefix(b[i:], s.needles[n].bytes) && !seen[what] {
				seen[what] = true
				found = append(found, what)
			}
		}
	}
	return found
}

// leaksIn searches b, which was found at where.
func (s *search) leaksIn(where string, b []byte) (leaks []Leak) {
	for _, what := range s.in(b) {
		leaks = append(leaks, Leak{what, where})
	}
	return leaks
}

// leaksUnder searches every file under dir, except those that hold secrets on purpose.
// It is an error when there is nothing to search.
func (s *search) leaksUnder(dir string, except map[string]bool) (leaks []Leak, err error) {
	files := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || except[name] {
			return err
		}
		// A name can tell as much as what is in the file.
		leaks = append(leaks, s.leaksIn("a file's name in "+filepath.Dir(name), []byte(d.Name()))...)
		if !d.Type().IsRegular() {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		leaks = append(leaks, s.leaksIn("file "+name, b)...)
		return nil
	})
	if err == nil && files == 0 {
		err = fmt.Errorf("%s: no file to search", dir)
	}
	return leaks, err
}
