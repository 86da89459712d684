package stack

import "syscall"

// childAttr gives a child its own process group, so that Ctrl-C reaches the parent alone,
// and lets the kernel end the child when the parent dies without a word.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
