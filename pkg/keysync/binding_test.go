package keysync

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

func mintedFile(t *testing.T, sites ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "binding.json")
	if err := MintBindingFile(path, sites); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMintAndRead(t *testing.T) {
	path := mintedFile(t, "s1", "s2")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode())
	}
	bindings, err := ReadBindingFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(bindings) != 2 || bindings["s1"] == nil || bindings["s1"].Site() != "s1" || !strings.HasPrefix(bindings["s1"].Current().ID(), "b-") || bindings["s1"].Current().ID() == bindings["s2"].Current().ID() {
		t.Fatalf("read %v", bindings)
	}
	again, err := ReadBindingFile(path)
	if err != nil {
		t.Fatal(err)
	}
	e := &envelope.Event{Site: "s1", Kind: "order", Edge: "e1", Epoch: "x", Seq: 1, From: 1}
	if err := again["s1"].VerifyEvent(e, bindings["s1"].Current().ID(), bindings["s1"].Current().TagEvent(e)); err != nil {
		t.Errorf("a second reader does not verify what the first one tagged: %v", err)
	}
	if bindings["s1"].Lane().Order("7") == bindings["s2"].Lane().Order("7") {
		t.Error("two sites have the same lane key")
	}
}

func TestMintAddsOnlyWhatIsMissing(t *testing.T) {
	path := mintedFile(t, "s1")
	var before, after bindingFile
	read := func(into *bindingFile) []byte {
		t.Helper()
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(raw, into); err != nil {
			t.Fatal(err)
		}
		return raw
	}
	raw := read(&before)
	if err := MintBindingFile(path, []string{"s1"}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(read(&after), raw) {
		t.Error("nothing was missing, and the file changed")
	}
	// A second binding key, as a rotation leaves it, stays too.
	rotated := before.Sites["s1"]
	rotated.Keys = append([]bindingKey{{ID: "b2", Key: newSecret32()}}, rotated.Keys...)
	before.Sites["s1"] = rotated
	raw, err := json.Marshal(before)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := MintBindingFile(path, []string{"s2", "s1", "s2"}); err != nil {
		t.Fatal(err)
	}
	read(&after)
	got := after.Sites["s1"]
	if len(after.Sites) != 2 || got.Lane != rotated.Lane || len(got.Keys) != 2 || got.Keys[0] != rotated.Keys[0] || got.Keys[1] != rotated.Keys[1] {
		t.Error("what was there changed")
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestMintFollowsALink(t *testing.T) {
	path := mintedFile(t, "s1")
	link := filepath.Join(t.TempDir(), "link.json")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if err := MintBindingFile(link, []string{"s2"}); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v", err)
	}
	if b, err := ReadBindingFile(path); err != nil || len(b) != 2 {
		t.Errorf("%d sites, %v", len(b), err)
	}
}

func TestMintRunsExcludeEachOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "binding.json")
	var wg sync.WaitGroup
	var mu sync.Mutex
	var minted []string
	for i := range 20 {
		wg.Go(func() {
			site := fmt.Sprintf("s%d", i)
			err := MintBindingFile(path, []string{site})
			switch {
			case err == nil:
				mu.Lock()
				minted = append(minted, site)
				mu.Unlock()
			case !strings.Contains(err.Error(), "another run"):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	bindings, err := ReadBindingFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(minted) == 0 || len(bindings) != len(minted) {
		t.Errorf("%d runs said they had minted, the file holds %d sites", len(minted), len(bindings))
	}
}

func TestMintLeavesABadFileAlone(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open.json")
	if err := os.WriteFile(open, []byte(`{"version":1,"sites":{}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(dir, "broken.json")
	if err := os.WriteFile(broken, []byte(`{"version":1,"sites":{"s1":`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{open, broken} {
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := MintBindingFile(path, []string{"s1"}); err == nil {
			t.Errorf("%s: minted into it", path)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, before) {
			t.Errorf("%s changed: %v", path, err)
		}
	}
	if err := MintBindingFile(filepath.Join(dir, "new.json"), []string{"ok", "No.Name", "*"}); err == nil || strings.Count(err.Error(), "mint binding keys") != 2 {
		t.Errorf("%v, want both bad names", err)
	}
	if err := MintBindingFile(filepath.Join(dir, "no", "such", "folder.json"), []string{"s1"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want that the folder does not exist", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestReadBindingFileRefuses(t *testing.T) {
	const secret = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	good := `{"version":1,"sites":{"s1":{"lane":"` + secret + `","keys":[{"id":"b1","key":"` + secret + `"}]}}}`
	replace := func(old, with string) string { return strings.Replace(good, old, with, 1) }
	for _, row := range []struct {
		name, text string
		mode       os.FileMode
		want       []string // parts of the error; none: accepted
	}{
		{name: "as it should be", text: good},
		{name: "stricter mode", text: good, mode: 0o400},
		{name: "no site yet", text: `{"version":1,"sites":{}}`},
		{name: "group may read", text: good, mode: 0o640, want: []string{"0640", "chmod 0600"}},
		{name: "others may read", text: good, mode: 0o604, want: []string{"0604", "chmod 0600"}},
		{name: "group may write", text: good, mode: 0o620, want: []string{"0620"}},
		{name: "empty", text: "", want: []string{"ends too early"}},
		{name: "truncated", text: good[:100], want: []string{"ends too early"}},
		{name: "more behind it", text: good + "x", want: []string{"more follows"}},
		{name: "another version", text: replace(`1,`, `2,`), want: []string{"version"}},
		{name: "version missing", text: replace(`"version":1,`, ``), want: []string{"version: missing"}},
		{name: "unknown member", text: replace(`{"version"`, `{"comment":"","version"`), want: []string{`"comment"`}},
		{name: "unknown member of a site", text: replace(`{"lane"`, `{"lanes":1,"lane"`), want: []string{"sites.s1", `"lanes"`}},
		{name: "member in other letters", text: replace(`"lane"`, `"Lane"`), want: []string{"sites.s1", "lane: missing"}},
		{name: "member twice", text: replace(`"lane"`, `"keys":[],"lane"`), want: []string{"sites.s1", "keys: given more than once"}},
		{name: "site twice", text: replace(`"sites":{`, `"sites":{"s1":{"lane":"`+secret+`","keys":[]},`), want: []string{"sites.s1: given more than once"}},
		{name: "sites is a list", text: `{"version":1,"sites":[]}`, want: []string{"sites: not an object"}},
		{name: "lane is a number", text: replace(`"lane":"`+secret+`"`, `"lane":1`), want: []string{"sites.s1.lane"}},
		{name: "lane too short", text: replace(secret, "AAEC"), want: []string{"sites.s1", "lane", "3 bytes"}},
		{name: "lane null", text: replace(`"`+secret+`"`, `null`), want: []string{"sites.s1", "lane", "0 bytes"}},
		{name: "key not base64", text: replace(`"key":"A`, `"key":"*`), want: []string{"keys[0].key", "base64"}},
		{name: "key with loose bits", text: replace(`"key":"`+secret, `"key":"`+secret[:42]+"9="), want: []string{"keys[0].key", "base64"}},
		{name: "no keys", text: replace(`{"id":"b1","key":"`+secret+`"}`, ``), want: []string{"s1"}},
		{name: "id bad", text: replace(`"b1"`, `"B 1"`), want: []string{"keys[0]"}},
		{name: "id missing", text: replace(`"id":"b1",`, ``), want: []string{"keys[0]: id: missing"}},
		{name: "id twice", text: replace(`"keys":[`, `"keys":[{"id":"b1","key":"`+secret+`"},`), want: []string{"s1", "b1"}},
		{name: "site name bad", text: replace(`"s1"`, `"S.1"`), want: []string{"S.1"}},
		{name: "everything at once", text: `{"version":1,"sites":{"s1":{},"s2":{"lane":1,"keys":[]}}}`, want: []string{"sites.s1", "sites.s2"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "binding.json")
			if err := os.WriteFile(path, []byte(row.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if row.mode != 0 {
				if err := os.Chmod(path, row.mode); err != nil {
					t.Fatal(err)
				}
			}
			_, err := ReadBindingFile(path)
			if len(row.want) == 0 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range append(row.want, path) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
			if strings.Contains(err.Error(), secret[:20]) {
				t.Errorf("the error quotes a key: %v", err)
			}
		})
	}
	t.Run("absent", func(t *testing.T) {
		if _, err := ReadBindingFile(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v, want ErrNotExist", err)
		}
	})
	t.Run("a folder", func(t *testing.T) {
		if _, err := ReadBindingFile(t.TempDir()); err == nil {
			t.Error("accepted")
		}
	})
}
