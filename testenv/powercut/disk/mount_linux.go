package disk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Mount is a Disk in the tree of files. Its methods are safe for concurrent use.
type Mount struct {
	dir    string
	server *fuse.Server
	once   sync.Once
	err    error
}

// Mount shows the disk at dir, an empty folder that exists, until Unmount. It needs root
// and /dev/fuse, and no further program. Programs of other processes may use the mount;
// this process may as well, but must not start a program while it has a file of it open.
func (d *Disk) Mount(dir string) (*Mount, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	// A program started later must not inherit the descriptor, or the mount would outlive
	// this process; fuse.NewServer by itself would let it.
	fd, err := syscall.Open("/dev/fuse", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("disk: open /dev/fuse: %w: the power-cut tests need a Linux kernel with FUSE, and root", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=%d,group_id=%d,allow_other,default_permissions", fd, os.Geteuid(), os.Getegid())
	if err := syscall.Mount("powercut", dir, "fuse.powercut", syscall.MS_NOSUID|syscall.MS_NODEV, options); err != nil {
		syscall.Close(fd)
		return nil, fmt.Errorf("disk: mount on %s: %w: the power-cut tests need root (CAP_SYS_ADMIN) and mount(2) without a helper", dir, err)
	}
	s := d.session()
	none := time.Duration(0) // nothing is cached, so that a cut is felt at once
	raw := fs.NewNodeFS(&node{s: s, n: s.root}, &fs.Options{
		EntryTimeout: &none, AttrTimeout: &none, NegativeTimeout: &none, NullPermissions: true,
		RootStableAttr: &fs.StableAttr{Ino: s.root.ino},
	})
	server, err := fuse.NewServer(raw, "/dev/fd/"+strconv.Itoa(fd), &fuse.MountOptions{DisableXAttrs: true, DisableSplice: true})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk: serve %s: %w", dir, err), syscall.Unmount(dir, syscall.MNT_DETACH))
	}
	m := &Mount{dir: dir, server: server}
	go server.Serve()
	// The first poll(2) on a file is answered "no such call" for all that follow: the Go
	// runtime polls files that it opens, from where it cannot be waited for in one process.
	if err := noPoll(filepath.Join(dir, ".go-fuse-epoll-hack")); err != nil {
		return nil, errors.Join(fmt.Errorf("disk: mount on %s: %w", dir, err), m.Unmount())
	}
	return m, nil
}

func noPoll(name string) error {
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer syscall.Close(fd)
	var fds syscall.FdSet
	fds.Bits[fd/64] |= 1 << (fd % 64)
	_, _ = syscall.Select(fd+1, &fds, nil, nil, &syscall.Timeval{})
	return nil
}

// Dir is where the disk is mounted.
func (m *Mount) Dir() string { return m.dir }

// busyLimit is how long Unmount waits for files to be closed by programs that were killed.
const busyLimit = 5 * time.Second

// Unmount takes the disk out of the tree of files and waits until nothing is served any
// more. It is an error when programs still use it after 5 s; they then keep what they have
// open, and nobody else sees it. A second call returns what the first one did.
func (m *Mount) Unmount() error {
	m.once.Do(func() { m.err = m.unmount() })
	return m.err
}

func (m *Mount) unmount() error {
	limit := time.NewTimer(busyLimit)
	defer limit.Stop()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		err := syscall.Unmount(m.dir, 0)
		if err == nil {
			m.server.Wait()
			return nil
		}
		if err != syscall.EBUSY {
			return fmt.Errorf("disk: unmount %s: %w", m.dir, err)
		}
		select {
		case <-again.C:
		case <-limit.C:
			return errors.Join(fmt.Errorf("disk: unmount %s: programs still use it", m.dir), syscall.Unmount(m.dir, syscall.MNT_DETACH))
		}
	}
}

// node is a file or folder of one mount.
type node struct {
	fs.Inode

	// Fixed at birth.
	s *session
	n *inode
}

var (
	_ fs.NodeStatfser  = (*node)(nil)
	_ fs.NodeGetattrer = (*node)(nil)
	_ fs.NodeSetattrer = (*node)(nil)
	_ fs.NodeLookuper  = (*node)(nil)
	_ fs.NodeReaddirer = (*node)(nil)
	_ fs.NodeOpendirer = (*node)(nil)
	_ fs.NodeMkdirer   = (*node)(nil)
	_ fs.NodeMknoder   = (*node)(nil)
	_ fs.NodeLinker    = (*node)(nil)
	_ fs.NodeCreater   = (*node)(nil)
	_ fs.NodeUnlinker  = (*node)(nil)
	_ fs.NodeRmdirer   = (*node)(nil)
	_ fs.NodeRenamer   = (*node)(nil)
	_ fs.NodeOpener    = (*node)(nil)
	_ fs.NodeReader    = (*node)(nil)
	_ fs.NodeWriter    = (*node)(nil)
	_ fs.NodeFlusher   = (*node)(nil)
	_ fs.NodeFsyncer   = (*node)(nil)
)

// handle is an open file.
type handle struct{ synced, atEnd bool }

func newHandle(flags uint32) *handle {
	// O_SYNC has the bit of O_DSYNC in it.
	return &handle{synced: flags&syscall.O_DSYNC != 0, atEnd: flags&syscall.O_APPEND != 0}
}

// blockSize is what stat(2) and statfs(2) tell, in bytes.
const blockSize = 4096

func (n *inode) attr(out *fuse.Attr) {
	out.Ino, out.Mode, out.Nlink = n.ino, n.mode, uint32(n.links)
	out.Size = uint64(len(n.data))
	out.Blksize, out.Blocks = blockSize, (out.Size+511)/512
	out.Uid, out.Gid = uint32(os.Geteuid()), uint32(os.Getegid())
	out.SetTimes(&n.mtime, &n.mtime, &n.mtime)
}

// child answers for a node below this one. disk.mu is held.
func (p *node) child(ctx context.Context, n *inode, out *fuse.EntryOut) *fs.Inode {
	n.attr(&out.Attr)
	return p.NewInode(ctx, &node{s: p.s, n: n}, fs.StableAttr{Mode: n.mode & syscall.S_IFMT, Ino: n.ino})
}

func (p *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	return p.s.do(func(v *volume) syscall.Errno {
		out.Bsize, out.Frsize, out.NameLen = blockSize, blockSize, 255
		out.Blocks = uint64(p.s.disk.cfg.Size / blockSize)
		out.Bfree = uint64(p.s.free(v) / blockSize)
		out.Bavail = out.Bfree
		out.Files, out.Ffree = 1<<20, 1<<20
		return 0
	})
}

func (p *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return p.s.do(func(*volume) syscall.Errno { p.n.attr(&out.Attr); return 0 })
}

func (p *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok {
		if !p.n.isFile() {
			return syscall.EINVAL
		}
		if errno := p.s.truncate(p.n, int64(size)); errno != 0 {
			return errno
		}
	}
	return p.s.change(func(*volume) syscall.Errno {
		if mode, ok := in.GetMode(); ok {
			p.n.mode = p.n.mode&syscall.S_IFMT | mode&0o7777
		}
		if t, ok := in.GetMTime(); ok {
			p.n.mtime = t
		}
		p.n.attr(&out.Attr)
		return 0
	})
}

func (p *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (child *fs.Inode, errno syscall.Errno) {
	errno = p.s.do(func(*volume) syscall.Errno {
		n := p.n.names[name]
		if n == nil {
			return syscall.ENOENT
		}
		child = p.child(ctx, n, out)
		return 0
	})
	return child, errno
}

func (p *node) Opendir(context.Context) syscall.Errno {
	return p.s.do(func(*volume) syscall.Errno { return 0 })
}

func (p *node) Readdir(context.Context) (stream fs.DirStream, errno syscall.Errno) {
	errno = p.s.do(func(*volume) syscall.Errno {
		var list []fuse.DirEntry
		for _, name := range slices.Sorted(maps.Keys(p.n.names)) {
			n := p.n.names[name]
			list = append(list, fuse.DirEntry{Name: name, Mode: n.mode, Ino: n.ino})
		}
		stream = fs.NewListDirStream(list)
		return 0
	})
	return stream, errno
}

// make gives a new inode a name in this folder.
func (p *node) make(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (child *fs.Inode, errno syscall.Errno) {
	errno = p.s.change(func(v *volume) syscall.Errno {
		if p.n.names[name] != nil {
			return syscall.EEXIST
		}
		if p.n.links == 0 {
			return syscall.ENOENT
		}
		n := v.newInode(mode)
		v.rename(naming{dir: p.n, name: name, to: n})
		child = p.child(ctx, n, out)
		return 0
	})
	return child, errno
}

func (p *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return p.make(ctx, name, syscall.S_IFDIR|mode&0o7777, out)
}

func (p *node) Mknod(ctx context.Context, name string, mode, _ uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return p.make(ctx, name, mode, out)
}

func (p *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child, errno := p.make(ctx, name, syscall.S_IFREG|mode&0o7777, out)
	if errno != 0 {
		return nil, nil, 0, errno
	}
	return child, newHandle(flags), fuse.FOPEN_DIRECT_IO, 0
}

func (p *node) Link(ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut) (child *fs.Inode, errno syscall.Errno) {
	errno = p.s.change(func(v *volume) syscall.Errno {
		n := target.(*node).n
		switch {
		case p.n.names[name] != nil:
			return syscall.EEXIST
		case n.isDir():
			return syscall.EPERM
		}
		v.rename(naming{dir: p.n, name: name, to: n})
		child = p.child(ctx, n, out)
		return 0
	})
	return child, errno
}

func (p *node) Unlink(_ context.Context, name string) syscall.Errno {
	return p.s.change(func(v *volume) syscall.Errno {
		switch n := p.n.names[name]; {
		case n == nil:
			return syscall.ENOENT
		case n.isDir():
			return syscall.EISDIR
		}
		v.rename(naming{dir: p.n, name: name})
		return 0
	})
}

func (p *node) Rmdir(_ context.Context, name string) syscall.Errno {
	return p.s.change(func(v *volume) syscall.Errno {
		switch n := p.n.names[name]; {
		case n == nil:
			return syscall.ENOENT
		case !n.isDir():
			return syscall.ENOTDIR
		case len(n.names) > 0:
			return syscall.ENOTEMPTY
		}
		v.rename(naming{dir: p.n, name: name})
		return 0
	})
}

// noReplace is RENAME_NOREPLACE of renameat2(2).
const noReplace = 1

func (p *node) Rename(_ context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	to := parent.(*node).n
	return p.s.change(func(v *volume) syscall.Errno {
		n, there := p.n.names[name], to.names[newName]
		switch {
		case n == nil:
			return syscall.ENOENT
		case flags&^noReplace != 0:
			return syscall.EINVAL
		case there == nil:
		case flags == noReplace:
			return syscall.EEXIST
		case there == n:
			return 0
		case there.isDir() && !n.isDir():
			return syscall.EISDIR
		case n.isDir() && !there.isDir():
			return syscall.ENOTDIR
		case len(there.names) > 0:
			return syscall.ENOTEMPTY
		}
		v.rename(naming{dir: p.n, name: name}, naming{dir: to, name: newName, to: n})
		return 0
	})
}

func (p *node) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	errno := p.s.do(func(*volume) syscall.Errno {
		if flags&syscall.O_ACCMODE != syscall.O_RDONLY && p.s.disk.faults.ReadOnly {
			return syscall.EROFS
		}
		return 0
	})
	if errno == 0 && flags&syscall.O_TRUNC != 0 {
		errno = p.s.truncate(p.n, 0)
	}
	return newHandle(flags), fuse.FOPEN_DIRECT_IO, errno
}

func (p *node) Read(_ context.Context, _ fs.FileHandle, dest []byte, off int64) (result fuse.ReadResult, errno syscall.Errno) {
	errno = p.s.do(func(*volume) syscall.Errno {
		n := 0
		if off < int64(len(p.n.data)) {
			n = copy(dest, p.n.data[off:])
		}
		result = fuse.ReadResultData(dest[:n])
		return 0
	})
	return result, errno
}

func (p *node) Write(_ context.Context, f fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	h, ok := f.(*handle)
	if !ok {
		return 0, syscall.EBADF
	}
	n, errno := p.s.write(p.n, data, off, h.atEnd, h.synced)
	return uint32(n), errno
}

func (p *node) Flush(context.Context, fs.FileHandle) syscall.Errno {
	return p.s.do(func(*volume) syscall.Errno { return 0 })
}

// Fsync serves fsync and fdatasync, of files and folders.
func (p *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return p.s.sync(p.n) }
