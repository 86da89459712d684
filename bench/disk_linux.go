package main

import (
	"fmt"
	"syscall"
)

// onDisk refuses a folder that is kept in memory: there a sync costs nothing, and what is
// compared with it means nothing.
func onDisk(dir string) error {
	const tmpfs, ramfs = 0x01021994, 0x858458f6
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		return fmt.Errorf("file system of %s: %w", dir, err)
	}
	if kind := uint32(s.Type); kind == tmpfs || kind == ramfs {
		return fmt.Errorf("%s is in memory, where a sync costs nothing; choose a folder on a disk with -dir, or TMPDIR", dir)
	}
	return nil
}
