//go:build faultswitch

package wsgate

import "os"

// faultNoTag: see fault_off.go.
var faultNoTag = os.Getenv("FAULTSWITCH_OFF") == "screen-tag"
