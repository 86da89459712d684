//go:build !faultswitch

package broker

// faultNoReset leaves the consumer as it is at a take-over. testenv/faults -selftest does so, to show
// that it is noticed. Outside builds with the tag faultswitch it is a constant: nothing of
// it is in a program.
const faultNoReset = false
