package edge

import (
	"hash/fnv"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// uptime is the time since boot, with the time that the machine slept.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Since(started)
	}
	return time.Duration(ts.Nano())
}

var started = time.Now()

// bootID tells one boot of the machine from another. All zero: it cannot be told.
func bootID() (id [8]byte) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id
	}
	h := fnv.New64a()
	h.Write(raw)
	copy(id[:], h.Sum(nil))
	return id
}
