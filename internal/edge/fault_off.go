//go:build !faultswitch

package edge

import "time"

// What testenv/faults -selftest takes away, to show that it is noticed. Outside builds
// with the tag faultswitch these are constants: nothing of them is in a program.
const (
	// faultNoDedupe takes a message that comes again for a new one.
	faultNoDedupe = false
	// faultNoMark expires by itself what may have reached the hub.
	faultNoMark = false
)

// faultClock moves the machine's clock in a test, as another boot of the machine may.
func faultClock() (offset time.Duration, reboot bool) { return 0, false }
