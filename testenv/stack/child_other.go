//go:build !linux

package stack

import "syscall"

// childAttr gives a child its own process group, so that Ctrl-C reaches the parent alone.
func childAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
