//go:build !faultswitch

package wsgate

// faultNoTag shows events without verifying them. testenv/faults -selftest does so, to show
// that it is noticed. Outside builds with the tag faultswitch it is a constant: nothing of
// it is in a program.
const faultNoTag = false
