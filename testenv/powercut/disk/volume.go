package disk

import (
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"
)

// inode is a file, a folder, or a special file that has a name only. All of it is guarded
// by Disk.mu, except ino and mode&S_IFMT, which are fixed at birth.
type inode struct {
	ino    uint64
	mode   uint32 // type and permissions
	links  int    // names, as programs see it
	mtime  time.Time
	parent *inode // of a folder

	// Of a file: what programs see, what is on the disk, and the changes between them.
	data, durable []byte
	pending       []content

	// Of a folder: what programs see, and what is on the disk.
	names, kept map[string]*inode
}

func (n *inode) isDir() bool  { return n.mode&syscall.S_IFMT == syscall.S_IFDIR }
func (n *inode) isFile() bool { return n.mode&syscall.S_IFMT == syscall.S_IFREG }

// content is a change to a file that no fsync has saved: a write of data at off, or a
// truncation to off.
type content struct {
	truncation bool
	off        int64
	data       []byte
}

func (c content) apply(b []byte) []byte {
	if c.truncation {
		return resize(b, c.off)
	}
	if end := c.off + int64(len(c.data)); end > int64(len(b)) {
		b = resize(b, end)
	}
	copy(b[c.off:], c.data)
	return b
}

// resize cuts b, or lets it grow by zeros.
func resize(b []byte, size int64) []byte {
	if size <= int64(len(b)) {
		return b[:size]
	}
	was := len(b)
	b = slices.Grow(b, int(size)-was)[:size]
	clear(b[was:]) // what was cut off earlier may still be there
	return b
}

// naming is one name in one folder that came, went, or is another's now.
type naming struct {
	dir  *inode
	name string
	to   *inode // nil: the name is gone
}

// volume is the state of a Disk between two cuts. Guarded by Disk.mu.
type volume struct {
	strict  bool
	root    *inode
	lastIno uint64
	used    int64      // bytes in files that programs see
	journal [][]naming // operations whose names are not on the disk, in order
}

func newVolume(names Names) *volume {
	v := &volume{strict: names == Strict}
	v.root = v.newInode(syscall.S_IFDIR | 0o755)
	v.root.links, v.root.parent = 1, v.root
	return v
}

func (v *volume) newInode(mode uint32) *inode {
	v.lastIno++
	n := &inode{ino: v.lastIno, mode: mode, mtime: time.Now()}
	if n.isDir() {
		n.names, n.kept = map[string]*inode{}, map[string]*inode{}
	}
	return n
}

func (v *volume) find(name string) *inode {
	n := v.root
	for part := range strings.SplitSeq(path.Clean(name), "/") {
		if n == nil || !n.isDir() {
			return nil
		}
		n = n.names[part]
	}
	return n
}

// walk calls f for everything below the root, folders before what is in them.
func (v *volume) walk(f func(name string, n *inode)) {
	var into func(prefix string, dir *inode)
	into = func(prefix string, dir *inode) {
		for _, name := range slices.Sorted(maps.Keys(dir.names)) {
			n := dir.names[name]
			f(prefix+name, n)
			if n.isDir() {
				into(prefix+name+"/", n)
			}
		}
	}
	into("", v.root)
}

// write returns by how much the file grew.
func (v *volume) write(n *inode, off int64, b []byte) int64 {
	return v.alter(n, content{off: off, data: slices.Clone(b)})
}

func (v *volume) truncate(n *inode, size int64) int64 {
	return v.alter(n, content{truncation: true, off: size})
}

func (v *volume) alter(n *inode, c content) (grown int64) {
	before := int64(len(n.data))
	n.data = c.apply(n.data)
	n.pending = append(n.pending, c)
	n.mtime = time.Now()
	grown = int64(len(n.data)) - before
	if n.links > 0 {
		v.used += grown
	}
	return grown
}

// sync saves a file's content and the names that a fsync of it saves.
func (v *volume) sync(n *inode) {
	for _, c := range n.pending {
		n.durable = c.apply(n.durable)
	}
	n.pending = nil
	if !v.strict {
		for _, op := range v.journal {
			keep(op)
		}
		v.journal = nil
		return
	}
	var left [][]naming
	for _, op := range v.journal {
		var mine, others []naming
		for _, c := range op {
			if c.dir == n {
				mine = append(mine, c)
			} else {
				others = append(others, c)
			}
		}
		keep(mine)
		if len(others) > 0 {
			left = append(left, others)
		}
	}
	v.journal = left
}

func keep(op []naming) {
	for _, c := range op {
		if c.to == nil {
			delete(c.dir.kept, c.name)
		} else {
			c.dir.kept[c.name] = c.to
		}
	}
}

// rename carries out one operation on names, at once for programs.
func (v *volume) rename(op ...naming) {
	for _, c := range op {
		if was := c.dir.names[c.name]; was != nil {
			if was.links--; was.links == 0 {
				v.used -= int64(len(was.data))
			}
		}
		if c.to == nil {
			delete(c.dir.names, c.name)
		} else {
			if c.to.links++; c.to.links == 1 {
				v.used += int64(len(c.to.data))
			}
			c.dir.names[c.name] = c.to
			if c.to.isDir() {
				c.to.parent = c.dir
			}
		}
		c.dir.mtime = time.Now()
	}
	v.journal = append(v.journal, op)
}

// cut returns the volume as it is found after a cut.
func (v *volume) cut(unsynced Unsynced, rng *rand.Rand) (*volume, Loss) {
	var loss Loss
	if !v.strict && len(v.journal) > 0 {
		n := rng.IntN(len(v.journal) + 1)
		for _, op := range v.journal[:n] {
			keep(op)
		}
		v.journal, loss.KeptNames = v.journal[n:], n
	}
	loss.Names = len(v.journal)

	next := &volume{strict: v.strict, lastIno: v.lastIno}
	copies := map[*inode]*inode{} // a file may have several names
	var from func(n *inode) *inode
	from = func(n *inode) *inode {
		c := copies[n]
		if c == nil {
			c = &inode{ino: n.ino, mode: n.mode, mtime: n.mtime}
			copies[n] = c
			if n.isFile() {
				c.durable = survivor(n, unsynced, rng, &loss)
				c.data = slices.Clone(c.durable)
				next.used += int64(len(c.data))
			}
			if n.isDir() {
				c.names, c.kept = map[string]*inode{}, map[string]*inode{}
				for _, name := range slices.Sorted(maps.Keys(n.kept)) {
					// A folder has one name, also where a move of it survived by half.
					if to := n.kept[name]; !to.isDir() || copies[to] == nil {
						child := from(to)
						c.names[name], c.kept[name] = child, child
						if child.isDir() {
							child.parent = c
						}
					}
				}
			}
		}
		c.links++
		return c
	}
	next.root = from(v.root)
	next.root.parent = next.root
	return next, loss
}

// survivor is what a cut leaves of a file.
func survivor(n *inode, unsynced Unsynced, rng *rand.Rand, loss *Loss) []byte {
	out := slices.Clone(n.durable)
	loss.Changes += len(n.pending)
	for _, c := range n.pending {
		loss.Bytes += int64(len(c.data))
	}
	if len(n.pending) == 0 {
		return out
	}
	switch unsynced {
	case Tear:
		last := rng.IntN(len(n.pending))
		for _, c := range n.pending[:last] {
			out = c.apply(out)
		}
		if c := n.pending[last]; c.truncation {
			if rng.IntN(2) == 0 {
				out = c.apply(out)
			}
		} else {
			parts := sectors(c)
			kept := rng.IntN(len(parts) + 1)
			for _, p := range parts[:kept] {
				out = p.apply(out)
			}
			if 0 < kept && kept < len(parts) {
				loss.Torn++
			}
		}
	case Scatter:
		var truncations []int
		for i, c := range n.pending {
			if c.truncation {
				truncations = append(truncations, i)
			}
		}
		end := len(n.pending)
		if kept := rng.IntN(len(truncations) + 1); kept < len(truncations) {
			end = truncations[kept]
		}
		for _, c := range n.pending[:end] {
			if c.truncation {
				out = c.apply(out)
				continue
			}
			parts := sectors(c)
			kept := 0
			for _, p := range parts {
				if rng.IntN(2) == 0 {
					out = p.apply(out)
					kept++
				}
			}
			if 0 < kept && kept < len(parts) {
				loss.Torn++
			}
		}
		// The size may be on the disk though the sectors are not.
		if end == len(n.pending) && rng.IntN(4) == 0 {
			out = resize(out, int64(len(n.data)))
		}
	}
	return out
}

// sectors divides a write at the borders of sectors.
func sectors(c content) []content {
	var out []content
	for off, b := c.off, c.data; len(b) > 0; {
		n := min(int64(len(b)), sector-off%sector)
		out = append(out, content{off: off, data: b[:n]})
		off, b = off+n, b[n:]
	}
	return out
}
