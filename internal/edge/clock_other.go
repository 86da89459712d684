//go:build !linux

package edge

import (
	"crypto/rand"
	"time"
)

var started = time.Now()

// uptime is the time since this process started: here it may stand still while the
// machine sleeps.
func uptime() time.Duration { return time.Since(started) }

// bootID is another one for each process.
func bootID() (id [8]byte) {
	rand.Read(id[:])
	return id
}
