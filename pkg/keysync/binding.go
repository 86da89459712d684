package keysync

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// maxBindingBytes is far above what 100,000 sites need.
const maxBindingBytes = 64 << 20

// bindingFile is the file's form. It exists to be read and written, never to be printed:
// its texts are secrets.
type bindingFile struct {
	Version int                    `json:"version"`
	Sites   map[string]bindingSite `json:"sites"`
}

type bindingSite struct {
	Lane string       `json:"lane"` // base64 of 32 bytes
	Keys []bindingKey `json:"keys"` // newest first
}

type bindingKey struct {
	ID  string `json:"id"`
	Key string `json:"key"` // base64 of 32 bytes

	// UseFrom is when the key begins to tag and seal; absent: from the start. Retired is
	// when it stopped to; absent: it has not.
	UseFrom time.Time `json:"use_from,omitzero"`
	Retired time.Time `json:"retired,omitzero"`
}

// ReadBindingFile reads the binding and lane keys of the sites in a file:
//
//	{"version": 1, "sites": {"<site>": {"lane": "<base64>", "keys": [
//	  {"id": "b2", "key": "<base64>", "use_from": "2026-03-01T10:02:00Z"},
//	  {"id": "b1", "key": "<base64>", "retired": "2026-03-01T10:02:00Z"}]}}}
//
// Each key is 32 random bytes in standard base64; the newest binding key stands first.
// All keys verify and open. The newest whose use_from (RFC 3339; optional) has come tags
// and seals: programs that read a new file at different moments change keys at one. A
// key's retired is for people and for [RotateBindingFile], which drops it in time.
//
// The file must be a regular one that only its owner can reach (mode 0600 or stricter).
// Unknown, missing and repeated members are errors; all mistakes are reported at once,
// and no error quotes a key.
func ReadBindingFile(path string) (map[string]*envelope.Binding, error) {
	_, bindings, err := readBindings(path)
	return bindings, err
}

func readBindings(path string) (bindingFile, map[string]*envelope.Binding, error) {
	raw, err := readPrivate(path, 0o077, maxBindingBytes)
	if err != nil {
		return bindingFile{}, nil, err
	}
	file, err := parseBindings(raw)
	if err != nil {
		return bindingFile{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	bindings := make(map[string]*envelope.Binding, len(file.Sites))
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(file.Sites)) {
		b, err := newBinding(name, file.Sites[name])
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: sites.%s: %w", path, name, err))
			continue
		}
		bindings[name] = b
	}
	if len(errs) > 0 {
		return bindingFile{}, nil, errors.Join(errs...)
	}
	return file, bindings, nil
}

// parseBindings reads the file's form, strictly: a member that is misspelt or given
// twice would else be a key that is silently not there.
func parseBindings(raw []byte) (bindingFile, error) {
	top, err := exactly(raw, "version", "sites")
	if err != nil {
		return bindingFile{}, err
	}
	file := bindingFile{Version: 1, Sites: map[string]bindingSite{}}
	if v := string(top["version"]); v != "1" {
		return bindingFile{}, errors.New("version: only 1 is known")
	}
	sites, err := members(top["sites"])
	if err != nil {
		return bindingFile{}, fmt.Errorf("sites: %w", err)
	}
	var errs []error
	for _, m := range sites {
		if _, twice := file.Sites[m.name]; twice {
			errs = append(errs, fmt.Errorf("sites.%s: %w", m.name, errRepeated))
			continue
		}
		s, err := parseBindingSite(m.value)
		if err != nil {
			errs = append(errs, fmt.Errorf("sites.%s%w", m.name, err))
		}
		file.Sites[m.name] = s
	}
	return file, errors.Join(errs...)
}

// parseBindingSite reads one site. Its error begins with the member it is about.
func parseBindingSite(raw []byte) (bindingSite, error) {
	in, err := exactly(raw, "lane", "keys")
	if err != nil {
		return bindingSite{}, fmt.Errorf(": %w", err)
	}
	var s bindingSite
	if json.Unmarshal(in["lane"], &s.Lane) != nil {
		return bindingSite{}, errors.New(".lane: a text was expected")
	}
	var keys []json.RawMessage
	if json.Unmarshal(in["keys"], &keys) != nil {
		return bindingSite{}, errors.New(".keys: a list was expected")
	}
	for i, raw := range keys {
		in, err := exactlyOr(raw, []string{"id", "key"}, []string{"use_from", "retired"})
		if err != nil {
			return bindingSite{}, fmt.Errorf(".keys[%d]: %w", i, err)
		}
		var k bindingKey
		if json.Unmarshal(in["id"], &k.ID) != nil || json.Unmarshal(in["key"], &k.Key) != nil {
			return bindingSite{}, fmt.Errorf(".keys[%d]: texts were expected", i)
		}
		for _, m := range []struct {
			name string
			at   *time.Time
		}{{"use_from", &k.UseFrom}, {"retired", &k.Retired}} {
			if text, there := in[m.name]; there && (json.Unmarshal(text, m.at) != nil || m.at.IsZero()) {
				return bindingSite{}, fmt.Errorf(".keys[%d].%s: a time was expected, as in \"2026-03-01T10:02:00Z\"", i, m.name)
			}
		}
		s.Keys = append(s.Keys, k)
	}
	return s, nil
}

// exactly splits an object that must have these members, each once, and no others.
func exactly(raw []byte, names ...string) (map[string]json.RawMessage, error) {
	return exactlyOr(raw, names, nil)
}

// exactlyOr is exactly, with members that may be absent.
func exactlyOr(raw []byte, names, optional []string) (map[string]json.RawMessage, error) {
	o, err := members(raw)
	if err != nil {
		return nil, err
	}
	in := make(map[string]json.RawMessage, len(names)+len(optional))
	for _, name := range slices.Concat(names, optional) {
		there := slices.ContainsFunc(o, func(m member) bool { return m.name == name })
		if !there && slices.Contains(optional, name) {
			continue
		}
		if in[name], err = o.one(name); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, m := range o {
		if _, known := in[m.name]; !known {
			return nil, fmt.Errorf("%q is not known here", m.name)
		}
	}
	return in, nil
}

func newBinding(name string, s bindingSite) (*envelope.Binding, error) {
	secret, err := secret32(s.Lane)
	if err != nil {
		return nil, fmt.Errorf("lane: %w", err)
	}
	lane, err := envelope.NewLaneKey(secret)
	if err != nil {
		return nil, fmt.Errorf("lane: %w", err)
	}
	keys := make([]*envelope.BindingKey, 0, len(s.Keys))
	for i, k := range s.Keys {
		secret, err := secret32(k.Key)
		if err != nil {
			return nil, fmt.Errorf("keys[%d].key: %w", i, err)
		}
		key, err := envelope.NewBindingKey(k.ID, secret)
		if err != nil {
			return nil, fmt.Errorf("keys[%d]: %w", i, err)
		}
		if !k.UseFrom.IsZero() {
			key = key.WithUseFrom(k.UseFrom)
		}
		keys = append(keys, key)
	}
	return envelope.NewBinding(name, lane, keys...)
}

// secret32 decodes a key without ever quoting it.
func secret32(text string) ([]byte, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, errors.New("not standard base64")
	}
	if len(b) != 32 {
		return nil, fmt.Errorf("%d bytes, 32 were expected", len(b))
	}
	return b, nil
}

// MintBindingFile makes new random keys for the sites that the file lacks, and the file
// itself if it does not exist. What is there stays: a lane key that changed would put an
// order's update into another lane than the order. The file is replaced in one step, with
// mode 0600; two runs at once exclude each other. A file that [ReadBindingFile] refuses is
// left alone.
func MintBindingFile(path string, sites []string) error {
	if err := validNames("mint", sites); err != nil {
		return err
	}
	err := rewrite(path, func(file *bindingFile) (changed bool, _ error) {
		changed = len(file.Sites) == 0
		for _, s := range sites {
			if _, has := file.Sites[s]; !has {
				file.Sites[s] = bindingSite{Lane: newSecret32(), Keys: []bindingKey{{ID: newBindingID(), Key: newSecret32()}}}
				changed = true
			}
		}
		return changed, nil
	})
	if err != nil {
		return fmt.Errorf("mint binding keys: %w", err)
	}
	return nil
}

const (
	// UseAfter is how long after a rotation a new binding key begins to tag, unless another
	// time is given: long enough to copy the file, and for each program to see that.
	UseAfter = 2 * time.Minute
	// maxUseAfter is how far ahead it may be: what a retired key has tagged waits no longer.
	maxUseAfter = retiredFor
	// maxBindingKeys bounds what is kept for one site.
	maxBindingKeys = 64
)

// RotateBindingFile gives sites a new random binding key each, all sites of the file when
// none is named. The new one stands first and begins to tag after the given time, 0 to 336h
// (14 days); the ones before it are retired at that moment, and still verify and open. Keys
// that were retired more than 14 days ago are dropped. Lane keys stay. Everything else is as
// for [MintBindingFile]. It returns the sites, sorted, and when their new keys begin.
func RotateBindingFile(path string, sites []string, after time.Duration) (rotated []string, from time.Time, _ error) {
	fail := func(err error) ([]string, time.Time, error) {
		return nil, time.Time{}, fmt.Errorf("rotate binding keys: %w", err)
	}
	if after < 0 || after > maxUseAfter {
		return fail(fmt.Errorf("a new key begins 0s to 336h (14 days) after its rotation, not %v", after))
	}
	if err := validNames("rotate", sites); err != nil {
		return nil, time.Time{}, err
	}
	if _, err := os.Stat(path); err != nil {
		return fail(fmt.Errorf("%w; `bridge binding mint` makes one", err))
	}
	err := rewrite(path, func(file *bindingFile) (bool, error) {
		rotated = slices.Compact(slices.Sorted(slices.Values(sites)))
		if len(rotated) == 0 {
			rotated = slices.Sorted(maps.Keys(file.Sites))
		}
		if len(rotated) == 0 {
			return false, fmt.Errorf("%s holds no site", path)
		}
		now := time.Now()
		from = now.Add(after).UTC().Truncate(time.Second)
		var errs []error
		for _, name := range rotated {
			s, has := file.Sites[name]
			if !has {
				errs = append(errs, fmt.Errorf("%s has no site %s; `bridge binding mint` adds it", path, name))
				continue
			}
			keys := []bindingKey{{ID: newBindingID(), Key: newSecret32(), UseFrom: from}}
			for _, k := range s.Keys {
				if k.Retired.IsZero() {
					k.Retired = from
				}
				if now.Sub(k.Retired) <= retiredFor {
					keys = append(keys, k)
				}
			}
			if len(keys) > maxBindingKeys {
				errs = append(errs, fmt.Errorf("site %s has %d keys that may still be needed, the most that are kept: rotate again when the oldest has been retired for 14 days", name, maxBindingKeys))
				continue
			}
			s.Keys = keys
			file.Sites[name] = s
		}
		return true, errors.Join(errs...)
	})
	if err != nil {
		return fail(err)
	}
	return rotated, from, nil
}

func validNames(verb string, sites []string) error {
	var errs []error
	for _, s := range sites {
		if err := envelope.ValidName(s); err != nil {
			errs = append(errs, fmt.Errorf("%s binding keys: %w", verb, err))
		}
	}
	return errors.Join(errs...)
}

// rewrite replaces the file by what change makes of it, if that says that it changed it. A
// file that does not exist is one without sites.
func rewrite(path string, change func(*bindingFile) (changed bool, _ error)) (err error) {
	// A link is followed, so that the file behind it is replaced and not the link.
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	// The new file under its fixed name is the lock as well.
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%s exists: another run is at work, or one was cut off: in the latter case remove that file and run again", tmp)
	}
	if err != nil {
		return err
	}
	done := false
	defer func() {
		if !done {
			err = errors.Join(err, out.Close(), os.Remove(tmp))
		}
	}()

	file := bindingFile{Version: 1, Sites: map[string]bindingSite{}}
	if _, statErr := os.Lstat(path); !errors.Is(statErr, os.ErrNotExist) {
		if file, _, err = readBindings(path); err != nil {
			return err
		}
	}
	if changed, err := change(&file); err != nil || !changed {
		return err
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	enc.SetIndent("", "  ")
	if err := enc.Encode(file); err != nil {
		return err
	}
	if _, err := out.Write(text.Bytes()); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	done = true
	if err := errors.Join(out.Close(), os.Rename(tmp, path)); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the rename itself durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// newBindingID is random, so that two files minted apart cannot pass for one another: an
// event names its key, and a bridge without it says so.
func newBindingID() string { return "b-" + strings.ToLower(rand.Text()[:8]) }

func newSecret32() string {
	var b [32]byte
	rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:])
}
