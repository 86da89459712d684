//go:build faultswitch

package edge

import (
	"os"
	"time"
)

// See fault_off.go.
var (
	faultNoDedupe = os.Getenv("FAULTSWITCH_OFF") == "dedupe"
	faultNoMark   = os.Getenv("FAULTSWITCH_OFF") == "mark"
)

func faultClock() (offset time.Duration, reboot bool) {
	offset, err := time.ParseDuration(os.Getenv("FAULTSWITCH_CLOCK"))
	return offset, err == nil
}
