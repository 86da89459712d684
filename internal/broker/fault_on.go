//go:build faultswitch

package broker

import "os"

// faultNoReset: see fault_off.go.
var faultNoReset = os.Getenv("FAULTSWITCH_OFF") == "reset"
