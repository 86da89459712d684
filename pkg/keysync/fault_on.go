//go:build faultswitch

package keysync

import "os"

// faultForgetKeys: see fault_off.go.
var faultForgetKeys = os.Getenv("FAULTSWITCH_OFF") == "keys"
