package keysync

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func readForm(t *testing.T, path string) (file bindingFile) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if file, err = parseBindings(raw); err != nil {
		t.Fatal(err)
	}
	return file
}

func writeForm(t *testing.T, path string, file bindingFile) {
	t.Helper()
	raw, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	// As people replace it: in one step.
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func TestRotatePutsANewKeyFirst(t *testing.T) {
	path := mintedFile(t, "s1", "s2")
	before := readForm(t, path)
	began := time.Now()
	rotated, from, err := RotateBindingFile(path, []string{"s1", "s1"}, UseAfter)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(rotated) != "[s1]" || from.Before(began.Add(UseAfter-2*time.Second)) || from.After(time.Now().Add(UseAfter)) {
		t.Errorf("rotated %v from %v", rotated, from)
	}
	after := readForm(t, path)
	keys := after.Sites["s1"].Keys
	if len(keys) != 2 || !keys[0].UseFrom.Equal(from) || !keys[0].Retired.IsZero() || keys[0].Key == keys[1].Key || keys[0].ID == keys[1].ID {
		t.Fatalf("the new key is not as it should be: %d keys", len(keys))
	}
	old := before.Sites["s1"].Keys[0]
	if keys[1].ID != old.ID || keys[1].Key != old.Key || !keys[1].Retired.Equal(from) {
		t.Error("the old key is not kept as retired")
	}
	if after.Sites["s1"].Lane != before.Sites["s1"].Lane {
		t.Error("the lane key changed")
	}
	if fmt.Sprint(after.Sites["s2"]) != fmt.Sprint(before.Sites["s2"]) {
		t.Error("another site changed")
	}
	bindings, err := ReadBindingFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := bindings["s1"].Current().ID(); got != old.ID {
		t.Errorf("%s tags already", got)
	}
	// Minting another site keeps the times.
	if err := MintBindingFile(path, []string{"s3"}); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(readForm(t, path).Sites["s1"]) != fmt.Sprint(after.Sites["s1"]) {
		t.Error("minting another site changed the keys")
	}
	// All sites, at once.
	rotated, _, err = RotateBindingFile(path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	bindings, err = ReadBindingFile(path)
	if err != nil {
		t.Fatal(err)
	}
	form := readForm(t, path)
	for _, site := range []string{"s1", "s2", "s3"} {
		if form.Sites[site].Keys[0].ID != bindings[site].Current().ID() {
			t.Errorf("%s: the new key does not tag at once", site)
		}
	}
	if len(rotated) != 3 {
		t.Errorf("rotated %v", rotated)
	}
}

func TestRotateDropsKeysInTime(t *testing.T) {
	path := mintedFile(t, "s1")
	file := readForm(t, path)
	s := file.Sites["s1"]
	now := time.Now()
	for _, age := range []time.Duration{time.Hour, retiredFor - time.Minute, retiredFor + time.Minute, 2 * retiredFor} {
		s.Keys = append(s.Keys, bindingKey{ID: "b" + fmt.Sprint(int(age.Hours())) + "-" + fmt.Sprint(len(s.Keys)), Key: newSecret32(), Retired: now.Add(-age)})
	}
	file.Sites["s1"] = s
	writeForm(t, path, file)
	if _, _, err := RotateBindingFile(path, nil, UseAfter); err != nil {
		t.Fatal(err)
	}
	kept := readForm(t, path).Sites["s1"].Keys
	if len(kept) != 4 || kept[1].ID != s.Keys[0].ID || kept[2].ID != s.Keys[1].ID || kept[3].ID != s.Keys[2].ID {
		t.Errorf("%d keys are kept", len(kept))
	}
	if !kept[2].Retired.Equal(s.Keys[1].Retired.Truncate(0)) {
		t.Error("a retired key was given another time")
	}
}

func TestRotateRefuses(t *testing.T) {
	path := mintedFile(t, "s1")
	file := readForm(t, path)
	full := bindingSite{Lane: newSecret32()}
	for i := range maxBindingKeys {
		full.Keys = append(full.Keys, bindingKey{ID: fmt.Sprintf("b%d", i), Key: newSecret32()})
	}
	file.Sites["full"] = full
	file.Sites["s2"] = bindingSite{Lane: newSecret32(), Keys: full.Keys[:1]}
	writeForm(t, path, file)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		name  string
		path  string
		sites []string
		after time.Duration
		want  string
	}{
		{"a site that is not there", path, []string{"s1", "s9"}, 0, "no site s9"},
		{"a bad name", path, []string{"*"}, 0, "rotate binding keys"},
		{"no file", filepath.Join(t.TempDir(), "none"), nil, 0, "no such file"},
		{"a time before", path, nil, -1, "0s to 336h"},
		{"a time too far ahead", path, nil, maxUseAfter + 1, "0s to 336h"},
		{"too many keys", path, []string{"full"}, 0, "site full has 64 keys"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if _, _, err := RotateBindingFile(row.path, row.sites, row.after); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("%v, want %q", err, row.want)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
				t.Errorf("the file changed: %v", err)
			}
			if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestTimesInTheBindingFile(t *testing.T) {
	path := mintedFile(t, "s1")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct{ name, member, want string }{
		{"use_from", `"use_from":"2026-03-01T10:02:00Z"`, ""},
		{"both, in another zone", `"use_from":"2026-03-01T10:02:00+02:00","retired":"2026-03-02T10:02:00Z"`, ""},
		{"no time", `"use_from":"soon"`, "keys[0].use_from"},
		{"without a zone", `"retired":"2026-03-01T10:02:00"`, "keys[0].retired"},
		{"a number", `"use_from":1`, "keys[0].use_from"},
		{"null", `"retired":null`, "keys[0].retired"},
		{"twice", `"use_from":"2026-03-01T10:02:00Z","use_from":"2026-03-01T10:02:00Z"`, "given more than once"},
		{"misspelt", `"usefrom":"2026-03-01T10:02:00Z"`, `"usefrom" is not known`},
	} {
		t.Run(row.name, func(t *testing.T) {
			text := strings.Replace(string(good), `"id":`, row.member+`,"id":`, 1)
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := ReadBindingFile(path)
			if row.want == "" && err != nil || row.want != "" && (err == nil || !strings.Contains(err.Error(), row.want)) {
				t.Errorf("%v, want %q", err, row.want)
			}
		})
	}
}

// boundRig is a rig on a fake Portal with a binding file.
func boundRig(t *testing.T, path string, sites ...string) rig {
	t.Helper()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, Config{Portal: PortalConfig{URL: "https://portal.example", TokenFile: token}, BindingFile: path, Sites: settingsOf(sites...)})
	f := newFakePortal()
	for _, s := range sites {
		f.set(s, siteObject(true, lasting("k1")))
	}
	r.get = f.get
	return r
}

// I9: what cannot be right changes nothing, and is said once; what is right is there within
// seconds, and the keys that stay are the same ones.
func TestBindingFileIsReadWhenItChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := mintedFile(t, "s1", "s2")
		r := boundRig(t, path, "s1", "s2")
		stop := r.run(t)
		defer stop()
		const wait = 2 * bindingPoll
		time.Sleep(wait)
		first := r.Site("s1")
		ring, key := first.Keyring, first.Binding.Current()
		if first.Fetched.IsZero() {
			t.Fatal("not fetched")
		}
		reads := func(result string) float64 { return r.metrics(t)["kb_keysync_binding_reads_total "+result] }

		if _, _, err := RotateBindingFile(path, nil, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(wait)
		second := r.Site("s1")
		if kept, ok := second.Binding.Key(key.ID()); !ok || kept != key || len(readForm(t, path).Sites["s1"].Keys) != 2 {
			t.Fatal("the file was not taken over, or the old key is another object")
		}
		if second.Keyring != ring || second.Fetched.IsZero() || r.Site("s2").Binding == nil {
			t.Error("the Portal's keys changed with the binding")
		}
		if reads("taken") != 1 || reads("refused") != 0 {
			t.Errorf("%v taken, %v refused", reads("taken"), reads("refused"))
		}

		good := readForm(t, path)
		bad := func(name string, want string, spoil func()) {
			t.Helper()
			before := reads("refused")
			r.log.clear()
			spoil()
			time.Sleep(20 * wait)
			if r.Site("s1").Binding != second.Binding {
				t.Errorf("%s: taken over", name)
			}
			if n := reads("refused") - before; n != 1 {
				t.Errorf("%s: refused %v times, once for each change was expected", name, n)
			}
			text := r.log.String()
			if strings.Count(text, "binding file not taken over") != 1 || !strings.Contains(text, want) {
				t.Errorf("%s: the log says %s", name, text)
			}
			if strings.Contains(text, good.Sites["s1"].Lane[:16]) {
				t.Errorf("%s: the log quotes a key", name)
			}
		}
		bad("no JSON", "ends too early", func() { os.WriteFile(path, []byte(`{"version":1,`), 0o600) })
		bad("removed", "does not exist", func() { os.Remove(path) })
		bad("a site is missing", "s2", func() {
			f := bindingFile{Version: 1, Sites: map[string]bindingSite{"s1": good.Sites["s1"]}}
			writeForm(t, path, f)
		})
		bad("another lane key", "sites.s1.lane", func() {
			s := good.Sites["s1"]
			s.Lane = newSecret32()
			writeForm(t, path, bindingFile{Version: 1, Sites: map[string]bindingSite{"s1": s, "s2": good.Sites["s2"]}})
		})
		bad("others may read it", "chmod", func() {
			writeForm(t, path, good)
			os.Chmod(path, 0o644)
		})
		os.Chmod(path, 0o600)
		time.Sleep(wait)
		if reads("taken") != 2 {
			t.Errorf("%v taken: the file is right again", reads("taken"))
		}
	})
}

// A fetch of the Portal that ends after the file was read does not bring the old binding back.
func TestFetchKeepsTheNewBinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := mintedFile(t, "s1")
		r := boundRig(t, path, "s1")
		stop := r.run(t)
		defer stop()
		time.Sleep(time.Second)
		if _, _, err := RotateBindingFile(path, nil, 0); err != nil {
			t.Fatal(err)
		}
		r.RereadBinding()
		taken := r.Site("s1").Binding
		for range 10 {
			time.Sleep(time.Minute)
			if r.Site("s1").Binding != taken {
				t.Fatal("the old binding is back")
			}
		}
	})
}

// Anybody may name a key that does not exist: looking for it costs no reading.
func TestRereadIsCheap(t *testing.T) {
	path := mintedFile(t, "s1")
	r := boundRig(t, path, "s1")
	for range 1000 {
		r.RereadBinding()
	}
	if m := r.metrics(t); m["kb_keysync_binding_reads_total taken"]+m["kb_keysync_binding_reads_total refused"] != 0 {
		t.Error("a file that did not change was read")
	}
	synctest.Test(t, func(t *testing.T) {
		r := boundRig(t, path, "s1")
		defer r.close()
		for i := range 5 {
			if _, _, err := RotateBindingFile(path, nil, 0); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(r.RereadBinding)
			}
			wg.Wait()
			if n := r.metrics(t)["kb_keysync_binding_reads_total taken"]; n != float64(i/2+1) {
				t.Errorf("rotation %d, half a second after the one before: read %v times", i, n)
			}
			time.Sleep(bindingEvery / 2)
		}
	})
	t.Run("without a file there is nothing to read", func(t *testing.T) {
		k := &Keys{}
		k.RereadBinding()
	})
}
