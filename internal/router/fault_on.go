//go:build faultswitch

package router

import "os"

// What FAULTSWITCH_OFF names is taken away; see fault_off.go.
var (
	faultAckFirst  = os.Getenv("FAULTSWITCH_OFF") == "ack-last"
	faultNoTag     = os.Getenv("FAULTSWITCH_OFF") == "tag"
	faultNoReports = os.Getenv("FAULTSWITCH_OFF") == "reports"
)
