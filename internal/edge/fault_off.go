//go:build !faultswitch

package edge

// faultNoDedupe takes a message that comes again for a new one. testenv/faults -selftest does so, to show
// that it is noticed. Outside builds with the tag faultswitch it is a constant: nothing of
// it is in a program.
const faultNoDedupe = false
