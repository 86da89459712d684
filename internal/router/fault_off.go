//go:build !faultswitch

package router

// Safeguards that testenv/faults -selftest takes away, one at a time, to show that it is
// noticed. Outside builds with the tag faultswitch they are constants: nothing of them is
// in a program.
const (
	faultAckFirst  = false // the source is acknowledged before the POST
	faultNoTag     = false // events are not verified
	faultNoReports = false // the report log is not read at a take-over
)
