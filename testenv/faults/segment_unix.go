//go:build unix

package main

import (
	"errors"
	"syscall"
)

// smallSegments makes the other side send in small segments. It is net.Dialer.Control.
func smallSegments(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, segment)
	}), err)
}
