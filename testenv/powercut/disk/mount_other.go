//go:build !linux

package disk

import (
	"errors"
	"runtime"
)

// Mount is a Disk in the tree of files.
type Mount struct{ dir string }

// Mount is possible on Linux only.
func (*Disk) Mount(string) (*Mount, error) {
	return nil, errors.New("disk: the power-cut tests need Linux with FUSE, and root; this is " + runtime.GOOS)
}

// Dir is where the disk is mounted.
func (m *Mount) Dir() string { return m.dir }

// Unmount takes the disk out of the tree of files.
func (*Mount) Unmount() error { return nil }
