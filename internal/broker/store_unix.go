//go:build linux || darwin || freebsd

package broker

import (
	"fmt"
	"os"
	"syscall"
)

// diskSpace is how many bytes this user may still write to the disk of a folder, and how
// many it has; -1: not known.
func diskSpace(dir string) (free, total int64) {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return -1, -1
	}
	return int64(fs.Bavail) * int64(fs.Bsize), int64(fs.Blocks) * int64(fs.Bsize)
}

// syncDir makes the entries of a folder be on the disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// checkPrivate refuses a key that others can read.
func checkPrivate(path string, info os.FileInfo) error {
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return fmt.Errorf("key file %s can be read by others (mode %04o): chmod 600 it", path, mode)
	}
	return nil
}
