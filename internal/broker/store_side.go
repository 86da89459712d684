package broker

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// sideState is what is known of a store without looking into it.
type sideState struct {
	last  uint64 // this record was stored; never ahead of that, maybe behind after a power cut
	floor uint64 // up to this one records may have been purged; never behind that
	lost  bool   // records are lost, and the owner may not have been told
}

// storeSide is the small file "known" beside the store, and the list "lost". It is
// what tells a log that has lost its end, or all of it, from a shorter one.
type storeSide struct {
	// Fixed at birth.
	dir string
	f   *os.File

	mu  sync.Mutex
	now sideState // Guarded by mu.
}

const sideSize = 4 + 4 + 8 + 8 + 4

var sideMagic = [4]byte{'k', 'b', 's', '1'}

// openSide opens the file, or makes it. One that is damaged counts as one that is missing:
// then nothing is known.
func openSide(dir string) (*storeSide, error) {
	path := filepath.Join(dir, "known")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	s := &storeSide{dir: dir, f: f}
	var b [sideSize]byte
	if n, _ := f.ReadAt(b[:], 0); n == len(b) && [4]byte(b[:4]) == sideMagic &&
		crc32.ChecksumIEEE(b[:24]) == binary.LittleEndian.Uint32(b[24:]) {
		s.now = sideState{
			last: binary.LittleEndian.Uint64(b[8:]), floor: binary.LittleEndian.Uint64(b[16:]),
			lost: b[4] != 0,
		}
	} else {
		s.now.floor = 1<<64 - 2
	}
	return s, nil
}

func (s *storeSide) get() sideState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

func (s *storeSide) put(k sideState, sync bool) error {
	return s.update(func(now *sideState) { *now = k }, sync)
}

// update changes the file; with sync it is on the disk after.
func (s *storeSide) update(change func(*sideState), sync bool) error {
	s.mu.Lock()
	change(&s.now)
	var b [sideSize]byte
	copy(b[:], sideMagic[:])
	if s.now.lost {
		b[4] = 1
	}
	binary.LittleEndian.PutUint64(b[8:], s.now.last)
	binary.LittleEndian.PutUint64(b[16:], s.now.floor)
	binary.LittleEndian.PutUint32(b[24:], crc32.ChecksumIEEE(b[:24]))
	_, err := s.f.WriteAt(b[:], 0)
	s.mu.Unlock()
	if err != nil || !sync {
		return err
	}
	return s.f.Sync()
}

func (s *storeSide) close() error {
	return errors.Join(s.f.Sync(), s.f.Close())
}

// gapList is sorted.
type gapList []gap

func (l gapList) has(g gap) bool {
	return slices.ContainsFunc(l, func(k gap) bool { return k.From <= g.From && g.To <= k.To })
}

// told returns the gaps that the owner has been told of.
func (s *storeSide) told() (gapList, error) {
	raw, err := os.ReadFile(filepath.Join(s.dir, "lost"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var l gapList
	return l, json.Unmarshal(raw, &l)
}

// tell notes that the owner knows of these gaps, and of any other loss until now.
func (s *storeSide) tell(gaps gapList) error {
	raw, err := json.Marshal(gaps)
	if err != nil {
		return err
	}
	if err := replaceFile(filepath.Join(s.dir, "lost"), raw); err != nil {
		return err
	}
	return s.update(func(k *sideState) { k.lost = false }, true)
}

// replaceFile writes a file that is there as a whole, old or new, whatever happens; others
// cannot read it.
func replaceFile(path string, content []byte) error {
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// storeKey reads the key, or makes one for a store without data.
func storeKey(path string, data bool) (string, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist) && data:
		return "", fmt.Errorf("key file %s is missing, and the records there cannot be read without it. "+
			"Put it back; or, to give up the orders in them, move the folder away", path)
	case errors.Is(err, os.ErrNotExist):
		raw := make([]byte, 32)
		rand.Read(raw)
		key := base64.StdEncoding.EncodeToString(raw)
		if err := replaceFile(path, []byte(key+"\n")); err != nil {
			return "", fmt.Errorf("key file: %w", err)
		}
		return key, nil
	case err != nil:
		return "", fmt.Errorf("key file: %w", err)
	}
	if err := checkPrivate(path, info); err != nil {
		return "", err
	}
	key, err := readSecretLine(path)
	if err != nil {
		return "", fmt.Errorf("key file: %w", err)
	}
	if raw, err := base64.StdEncoding.DecodeString(key); err != nil || len(raw) != 32 {
		return "", fmt.Errorf("key file %s: the first line is not 32 bytes in base64", path)
	}
	return key, nil
}

// checkKey compares the key with the one the store was made with, of which it keeps a
// fingerprint. A server with the wrong key would take the store for an empty one.
func checkKey(dir, keyFile, key string, data bool) error {
	path := filepath.Join(dir, "key.print")
	h := hmac.New(sha256.New, []byte(key))
	h.Write([]byte("kitchenbridge outbox key"))
	want := hex.EncodeToString(h.Sum(nil)[:8])
	raw, err := os.ReadFile(path)
	switch {
	case err == nil && data && strings.TrimSpace(string(raw)) != want:
		return fmt.Errorf("key file %s is not the one that the records there were written with. "+
			"Put that one back; or, to give up the orders in them, move the folder away", keyFile)
	case err == nil && strings.TrimSpace(string(raw)) == want:
		return nil
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("fingerprint of the key: %w", err)
	}
	// A store without data has no use for what an earlier key describes.
	if !data {
		if err := moveAside(filepath.Join(dir, "jetstream"), filepath.Join(dir, "jetstream")); err != nil {
			return err
		}
	}
	return replaceFile(path, []byte(want+"\n"))
}

// moveAside renames a folder, if there is one, to a name that begins with to and is free.
func moveAside(path, to string) error {
	for n := 1; ; n++ {
		free := fmt.Sprintf("%s.old-%d", to, n)
		if _, err := os.Lstat(free); !errors.Is(err, os.ErrNotExist) {
			if err != nil {
				return err
			}
			continue
		}
		if err := os.Rename(path, free); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
}

// escapeGlob makes a path stand for itself in a pattern.
func escapeGlob(path string) string {
	return strings.NewReplacer(`*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}
