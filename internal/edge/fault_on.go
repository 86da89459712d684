//go:build faultswitch

package edge

import "os"

// faultNoDedupe: see fault_off.go.
var faultNoDedupe = os.Getenv("FAULTSWITCH_OFF") == "dedupe"
