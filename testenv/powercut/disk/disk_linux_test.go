package disk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// mount mounts d on a new folder. It fails the test where that is not possible: a run that
// skips would prove nothing.
func mount(t *testing.T, d *Disk) (dir string, unmount func()) {
	t.Helper()
	m, err := d.Mount(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	unmount = func() {
		t.Helper()
		if err := m.Unmount(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(unmount)
	return m.Dir(), unmount
}

func newDisk(t *testing.T, cfg Config) *Disk {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// must ends the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, name string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR|flags, 0o600)
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func TestCutLeavesWhatWasSynced(t *testing.T) {
	d := newDisk(t, Config{})
	dir, unmount := mount(t, d)
	f := create(t, filepath.Join(dir, "log"), 0)
	_, err := f.WriteString("saved")
	must(t, err)
	must(t, f.Sync())
	_, err = f.WriteString(" lost")
	must(t, err)
	s := create(t, filepath.Join(dir, "osync"), os.O_SYNC)
	_, err = s.WriteString("saved without a call")
	must(t, err)
	if loss := d.Cut(); loss.Changes != 1 || loss.Bytes != 5 {
		t.Errorf("the cut took %+v, want 1 change of 5 bytes", loss)
	}
	if _, err := f.WriteString("x"); !errors.Is(err, syscall.EIO) {
		t.Errorf("write after the cut: %v, want EIO", err)
	}
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("fsync after the cut: %v, want EIO", err)
	}
	f.Close()
	s.Close()
	unmount()

	dir, _ = mount(t, d)
	for name, want := range map[string]string{"log": "saved", "osync": "saved without a call"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
}

func TestSyncUnderWayAtTheCutFails(t *testing.T) {
	d := newDisk(t, Config{})
	dir, _ := mount(t, d)
	f := create(t, filepath.Join(dir, "log"), 0)
	_, err := f.WriteString("in doubt")
	must(t, err)
	d.Set(Faults{SyncDelay: time.Minute})
	said := make(chan error)
	go func() { said <- f.Sync() }()
	d.Cut()
	if err := <-said; !errors.Is(err, syscall.EIO) {
		t.Errorf("fsync across the cut: %v, want EIO", err)
	}
	f.Close()
}

func TestNames(t *testing.T) {
	for _, test := range []struct {
		name  string
		rule  Names
		sync  string // what is fsynced
		there bool
	}{
		{"journal: the file's fsync saves its name", Journal, "new", true},
		{"journal: another file's fsync saves it too", Journal, "other", true},
		{"strict: the file's fsync does not save its name", Strict, "new", false},
		{"strict: the folder's does", Strict, ".", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := newDisk(t, Config{Names: test.rule})
			dir, unmount := mount(t, d)
			create(t, filepath.Join(dir, "other"), 0).Close()
			create(t, filepath.Join(dir, "new"), 0).Close()
			f, err := os.Open(filepath.Join(dir, test.sync))
			must(t, err)
			must(t, f.Sync())
			f.Close()
			d.Cut()
			unmount()
			dir, _ = mount(t, d)
			if _, err := os.Stat(filepath.Join(dir, "new")); (err == nil) != test.there {
				t.Errorf("after the cut: %v", err)
			}
		})
	}
}

func TestTornWriteEndsAtASector(t *testing.T) {
	torn := 0
	for seed := range uint64(20) {
		d := newDisk(t, Config{Unsynced: Tear, Seed: seed})
		n := d.vol.newInode(syscall.S_IFREG)
		d.vol.rename(naming{dir: d.vol.root, name: "f", to: n})
		d.vol.write(n, 0, bytes.Repeat([]byte{1}, 100))
		d.vol.sync(n)
		d.vol.write(n, 100, bytes.Repeat([]byte{2}, 5000))
		torn += d.Cut().Torn
		size := len(d.vol.root.names["f"].data)
		if size != 100 && size != 5100 && size%sector != 0 {
			t.Errorf("seed %d: %d bytes are left, which is no border of a sector", seed, size)
		}
	}
	if torn == 0 {
		t.Error("no write was torn in 20 cuts")
	}
}

func TestFaults(t *testing.T) {
	d := newDisk(t, Config{})
	dir, _ := mount(t, d)
	f := create(t, filepath.Join(dir, "f"), 0)
	d.Set(Faults{Room: 3})
	if n, err := f.WriteString("12345"); n != 3 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write on a disk with 3 bytes: %d, %v; want 3, ENOSPC", n, err)
	}
	d.Set(Faults{ReadOnly: true})
	if _, err := f.WriteString("1"); !errors.Is(err, syscall.EROFS) {
		t.Errorf("write on a read-only disk: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o700); !errors.Is(err, syscall.EROFS) {
		t.Errorf("mkdir on a read-only disk: %v", err)
	}
	d.Set(Faults{SyncErrors: 1})
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Errorf("fsync that fails: %v", err)
	}
	must(t, f.Sync())
	must(t, d.Flip("f", 0))
	f.Close()
	if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(b) != "023" {
		t.Errorf("after a flip: %q, %v; want 023", b, err)
	}
	d.Cut()
	if files, _ := d.Files("*"); len(files) != 1 || files[0].Size != 0 {
		t.Errorf("a fsync after one that failed saved what that one dropped: %+v", files)
	}
}
