// Package disk is a file system over memory that shows what a power cut leaves. A Disk is
// mounted for a program under test, its power is cut, and the next mount has what would
// have survived.
//
// What is modelled:
//   - Content. Each file has the content that programs see and the content that is on the
//     disk. fsync and fdatasync bring a file's changes to the disk, as does every write
//     through a descriptor with O_SYNC or O_DSYNC. What is not there when the cut comes is
//     lost, as Config.Unsynced says: whole, from a random point on, or sector by sector.
//     A fsync that is under way when the cut comes has failed.
//   - Names. A file created, renamed, linked or removed is so on the disk when its name is,
//     which Config.Names rules.
//   - A failed fsync (Faults.SyncErrors) does what it does on Linux: the changes it was to
//     save are dropped from what a later fsync would save, though programs still see them.
//   - Disk full: a write is short up to the room that is left, then fails with ENOSPC; a
//     write into what a file has already succeeds.
//   - A disk that turned read-only: everything that changes something fails with EROFS,
//     fsync too.
//
// What is not modelled: changes that reach the disk by themselves long before the cut
// (Keep and Tear leave them, but a program cannot wait for them), a disk that lies about
// fsync, loss of changed permissions and times (they are durable at once), the zero-length
// protection that ext4 gives to a rename over a file, mmap for writing, and caches: each
// read and write of a program is one of the Disk's.
package disk

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"sync"
	"syscall"
	"time"
)

// Names says when a name is on the disk.
type Names string

const (
	// Journal is what ext4, XFS and btrfs do for the programs here: a fsync of any file or
	// folder brings all name changes made before it to the disk; of those after it, the cut
	// leaves a random number from the front, in order, as a commit of the journal does that
	// comes by itself.
	Journal Names = "journal"
	// Strict is the least that POSIX asks for: only a fsync of the folder brings its names to
	// the disk, and the cut leaves none of the others. A file that was fsynced is lost when
	// its folder was not.
	Strict Names = "strict"
)

// Unsynced says what a cut leaves of changes to files that no fsync saved.
type Unsynced string

const (
	// Drop: nothing.
	Drop Unsynced = "drop"
	// Tear: of each file the changes up to a random one, and of that one, if it is a write,
	// the part up to a random border of a sector.
	Tear Unsynced = "tear"
	// Scatter: each sector that was written is there or not, whatever became of the others; a
	// sector that is not there is as it was, or zero where the file has grown. What was
	// written after a truncation that is lost is lost.
	Scatter Unsynced = "scatter"
)

// sector is what a disk writes whole or not at all, in bytes.
const sector = 512

// Config of a Disk. Zero values are the defaults.
type Config struct {
	// Size in bytes. Default 1 GiB.
	Size int64
	// Names that survive. Default Journal.
	Names Names
	// Unsynced changes that survive. Default Drop.
	Unsynced Unsynced
	// Seed of everything random. With one seed, the same operations and the same cuts leave
	// the same.
	Seed uint64
}

func (c Config) withDefaults() Config {
	c.Size = cmp.Or(c.Size, 1<<30)
	c.Names = cmp.Or(c.Names, Journal)
	c.Unsynced = cmp.Or(c.Unsynced, Drop)
	return c
}

// Validate reports every mistake at once.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if c.Size < sector {
		errs = append(errs, fmt.Errorf("size: %d is less than a sector of %d bytes", c.Size, sector))
	}
	if c.Names != Journal && c.Names != Strict {
		errs = append(errs, fmt.Errorf("names: %q is neither %q nor %q", c.Names, Journal, Strict))
	}
	if c.Unsynced != Drop && c.Unsynced != Tear && c.Unsynced != Scatter {
		errs = append(errs, fmt.Errorf("unsynced: %q is none of %q, %q, %q", c.Unsynced, Drop, Tear, Scatter))
	}
	return errors.Join(errs...)
}

// Faults are what the disk does wrong while it has power. The zero value is a healthy disk.
type Faults struct {
	// Full: files cannot grow. Room, when it is above 0, is how many bytes they still can.
	Full bool
	Room int64
	// ReadOnly: nothing can be changed, EROFS.
	ReadOnly bool
	// WriteErrors and SyncErrors are how many of the next writes and fsyncs fail with EIO;
	// negative: all of them.
	WriteErrors, SyncErrors int
	// SyncDelay is how long a fsync takes, writes through O_SYNC included.
	SyncDelay time.Duration
}

// Stats count what was done since New.
type Stats struct {
	Writes, Bytes, Syncs uint64
	Cuts                 int
}

// Loss is what a cut took.
type Loss struct {
	// Changes are writes and truncations that no fsync had saved, Bytes what they had
	// written, Names the changes of names that were not on the disk.
	Changes int
	Bytes   int64
	Names   int
	// Torn are writes of which a part survived, KeptNames the changes of names that survived
	// though nothing had asked for it.
	Torn      int
	KeptNames int
}

// Disk is a file system that can lose its power. Its methods are safe for concurrent use.
type Disk struct {
	cfg Config

	// Guarded by mu.
	mu     sync.Mutex
	rng    *rand.Rand
	vol    *volume
	faults Faults
	stats  Stats
	dark   chan struct{} // closed when the power of this boot is cut
}

// New makes an empty Disk.
func New(cfg Config) (*Disk, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	cfg = cfg.withDefaults()
	return &Disk{cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 0)), vol: newVolume(cfg.Names), dark: make(chan struct{})}, nil
}

// Set makes the disk do wrong from the next operation on.
func (d *Disk) Set(f Faults) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = f
}

// Stats returns the counters as they stand.
func (d *Disk) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// Cut takes the power away: from now on every operation through the mounts there are fails
// with EIO, and a mount made after it shows what survived. It waits for no one: programs on
// the mount go on until they are killed.
func (d *Disk) Cut() Loss {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.dark)
	d.dark = make(chan struct{})
	d.stats.Cuts++
	var loss Loss
	d.vol, loss = d.vol.cut(d.cfg.Unsynced, d.rng)
	return loss
}

// Files returns the paths of all files that match the pattern of path.Match, as
// "out/*/msgs/*.blk", with their sizes, sorted.
func (d *Disk) Files(pattern string) ([]File, error) {
	if _, err := path.Match(pattern, ""); err != nil {
		return nil, fmt.Errorf("disk: pattern %q: %w", pattern, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []File
	d.vol.walk(func(name string, n *inode) {
		if ok, _ := path.Match(pattern, name); ok && n.isFile() {
			out = append(out, File{Path: name, Size: int64(len(n.data))})
		}
	})
	slices.SortFunc(out, func(a, b File) int { return cmp.Compare(a.Path, b.Path) })
	return out, nil
}

// File is a file's path from the root, without a slash before it, and its size in bytes.
type File struct {
	Path string
	Size int64
}

// Flip inverts one bit of a file, on the disk and for programs: bit 0 is the lowest of the
// first byte.
func (d *Disk) Flip(name string, bit int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.vol.find(name)
	if n == nil || !n.isFile() {
		return fmt.Errorf("disk: flip a bit of %s: no such file", name)
	}
	at := bit / 8
	if bit < 0 || at >= int64(len(n.data)) {
		return fmt.Errorf("disk: flip bit %d of %s: it has %d bytes", bit, name, len(n.data))
	}
	n.data[at] ^= 1 << (bit % 8)
	if at < int64(len(n.durable)) {
		n.durable[at] ^= 1 << (bit % 8)
	}
	return nil
}

// session is one mount's hold on the disk, for as long as the power is on.
type session struct {
	disk *Disk
	dark <-chan struct{}
	root *inode
}

func (d *Disk) session() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &session{disk: d, dark: d.dark, root: d.vol.root}
}

// do runs f on the volume, unless the power is off.
func (s *session) do(f func(v *volume) syscall.Errno) syscall.Errno {
	s.disk.mu.Lock()
	defer s.disk.mu.Unlock()
	if s.off() {
		return syscall.EIO
	}
	return f(s.disk.vol)
}

// change is do for what a read-only disk refuses.
func (s *session) change(f func(v *volume) syscall.Errno) syscall.Errno {
	return s.do(func(v *volume) syscall.Errno {
		if s.disk.faults.ReadOnly {
			return syscall.EROFS
		}
		return f(v)
	})
}

func (s *session) off() bool {
	select {
	case <-s.dark:
		return true
	default:
		return false
	}
}

// free is how many bytes files can still grow by. disk.mu is held.
func (s *session) free(v *volume) int64 {
	free := max(s.disk.cfg.Size-v.used, 0)
	switch f := s.disk.faults; {
	case f.Full:
		return 0
	case f.Room > 0:
		return min(free, f.Room)
	}
	return free
}

// grow takes bytes from the room that is left. disk.mu is held.
func (s *session) grow(by int64) {
	if f := &s.disk.faults; f.Room > 0 && by > 0 {
		if f.Room -= by; f.Room <= 0 {
			f.Room, f.Full = 0, true
		}
	}
}

// strike uses up one of a number of errors to come. disk.mu is held.
func strike(left *int) bool {
	if *left > 0 {
		*left--
		return true
	}
	return *left < 0
}

// write puts b at off, or at the end with atEnd, and says how much of it fitted.
func (s *session) write(n *inode, b []byte, off int64, atEnd, synced bool) (int, syscall.Errno) {
	wrote := 0
	errno := s.change(func(v *volume) syscall.Errno {
		if strike(&s.disk.faults.WriteErrors) {
			return syscall.EIO
		}
		if atEnd {
			off = int64(len(n.data))
		}
		room := int64(len(n.data)) + s.free(v) - off
		if room <= 0 && len(b) > 0 {
			return syscall.ENOSPC
		}
		b = b[:min(int64(len(b)), room)]
		s.grow(v.write(n, off, b))
		wrote = len(b)
		s.disk.stats.Writes++
		s.disk.stats.Bytes += uint64(wrote)
		return 0
	})
	if errno == 0 && synced {
		errno = s.sync(n)
	}
	return wrote, errno
}

// truncate sets a file's size.
func (s *session) truncate(n *inode, size int64) syscall.Errno {
	return s.change(func(v *volume) syscall.Errno {
		if strike(&s.disk.faults.WriteErrors) {
			return syscall.EIO
		}
		if size > int64(len(n.data))+s.free(v) {
			return syscall.ENOSPC
		}
		s.grow(v.truncate(n, size))
		return 0
	})
}

// sync brings a file's content, and the names that go with it, or a folder's names, to the
// disk.
func (s *session) sync(n *inode) syscall.Errno {
	var delay time.Duration
	if errno := s.do(func(*volume) syscall.Errno { delay = s.disk.faults.SyncDelay; return 0 }); errno != 0 {
		return errno
	}
	if delay > 0 {
		t := time.NewTimer(delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-s.dark:
			return syscall.EIO
		}
	}
	return s.change(func(v *volume) syscall.Errno {
		s.disk.stats.Syncs++
		if strike(&s.disk.faults.SyncErrors) {
			n.pending = nil
			return syscall.EIO
		}
		v.sync(n)
		return 0
	})
}
