package edge

import (
	"log/slog"
	"sync"
	"time"
)

// clock is the hub's time, as far as this edge knows it: what events are stamped with and
// what their deadlines are judged by. It goes on by the machine's time since boot, which
// nobody sets and which does not stand still while the machine sleeps; so a wall clock that
// jumps moves no deadline. It starts from the wall clock, or, on the same boot of the
// machine, from what the outbox's last record says, and it is put right by the bridges,
// who stand at the hub. Safe for concurrent use.
type clock struct {
	// Fixed at birth.
	uptime func() time.Duration // since boot
	wall   func() time.Time
	bootID [8]byte
	log    *slog.Logger

	mu sync.Mutex
	// Guarded by mu.
	base    time.Time
	at      time.Duration // uptime at base
	known   bool          // a bridge has told
	jumped  bool          // it was said that the wall clock differs
	ownBase time.Time     // the wall clock at base
}

// clockTolerance is how far clocks may differ without a word.
const clockTolerance = 2 * time.Minute

func newClock(log *slog.Logger) *clock {
	offset, reboot := faultClock()
	c := &clock{uptime: uptime, wall: func() time.Time { return time.Now().Add(offset) }, bootID: bootID(), log: log}
	if reboot {
		c.bootID[0] ^= 0xff
	}
	c.set(c.wall())
	return c
}

func (c *clock) set(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.base, c.at, c.ownBase = now.Round(0), c.uptime(), c.wall().Round(0)
}

// now is the hub's time.
func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.base.Add(c.uptime() - c.at)
}

// moment is now, for a record.
func (c *clock) moment() moment {
	c.mu.Lock()
	defer c.mu.Unlock()
	up := c.uptime()
	return moment{hub: c.base.Add(up - c.at).UnixMilli(), boot: c.bootID, uptime: up.Milliseconds()}
}

// restore goes on from the last record. On another boot the wall clock is believed, unless
// it lies before the record: time does not go back.
func (c *clock) restore(m moment) {
	if m.hub == 0 {
		return
	}
	then := time.UnixMilli(m.hub)
	if m.boot == c.bootID {
		c.set(then.Add(c.uptime() - time.Duration(m.uptime)*time.Millisecond))
		return
	}
	if wall := c.wall(); wall.Before(then) {
		if then.Sub(wall) > clockTolerance {
			c.log.Error("clock is behind the outbox: it was set back, or lost its battery; the outbox's last time is used until a bridge tells the hub's",
				"clock", wall.UTC(), "outbox", then.UTC())
		}
		c.set(then)
	}
}

// measured takes the hub's time from a bridge's answer that took rtt. One that took long
// says too little, unless nothing is known yet.
func (c *clock) measured(hub time.Time, rtt time.Duration) {
	c.mu.Lock()
	known, mine := c.known, c.base.Add(c.uptime()-c.at)
	c.mu.Unlock()
	if known && rtt > 2*time.Second {
		return
	}
	now := hub.Add(rtt / 2)
	if d := now.Sub(mine); d.Abs() > clockTolerance {
		c.log.Warn("clock was wrong: the hub's time is used; deadlines of what was accepted before were given by the wrong one", "ahead", (-d).Round(time.Millisecond))
	}
	c.set(now)
	c.mu.Lock()
	c.known = true
	c.mu.Unlock()
}

// offset is how far the machine's own clock is ahead of the hub's; false: nobody told yet.
func (c *clock) offset() (ahead time.Duration, known bool) {
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wall().Sub(now), c.known
}

// watch says once when the machine's own clock goes another way than the time since boot.
func (c *clock) watch() {
	c.mu.Lock()
	defer c.mu.Unlock()
	drift := c.wall().Round(0).Sub(c.ownBase) - (c.uptime() - c.at)
	off := drift.Abs() > clockTolerance
	if off && !c.jumped {
		c.log.Error("clock jumped: deadlines go on by the time since boot", "by", drift.Round(time.Second))
	}
	c.jumped = off
}
