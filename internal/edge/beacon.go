package edge

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// beacon tells the hub from time to time that the edge is there, and how it is.
func (e *Edge) beacon(ctx context.Context, h hub, o *outbox) error {
	tick := time.NewTicker(e.cfg.Forward.Beacon)
	defer tick.Stop()
	for {
		if h.Connected() {
			// One that is lost is followed by another.
			_ = h.PublishBeacon(e.signal(o))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func (e *Edge) signal(o *outbox) broker.Beacon {
	g, s := o.gauge(), o.disk.State()
	b := broker.Beacon{
		Edge: e.cfg.Name, Epoch: o.epoch(), At: e.clock.now(), Sites: len(e.cfg.Sites),
		Backlog: g.backlog, Unsettled: g.unsettled, Overdue: g.overdue, OldestMS: g.age.Milliseconds(),
		StoreBytes: s.Bytes, StoreMax: o.max, DiskFree: s.DiskFree,
	}
	if ahead, known := e.clock.offset(); known {
		b.OffsetMS = new(ahead.Milliseconds())
	}
	for what, works := range map[string]func() error{"outbox": o.ready, "keys": e.keys.Ready} {
		if err := works(); err != nil {
			b.Trouble = append(b.Trouble, what+": "+err.Error())
		}
	}
	return b
}

// ready says what is wrong with the outbox.
func (o *outbox) ready() error {
	o.mu.Lock()
	stopped, draining := o.stopped, o.draining
	o.mu.Unlock()
	s := o.disk.State()
	switch {
	case stopped:
		return errStopped
	case draining:
		return errDraining
	case s.Err != nil:
		return s.Err
	case o.gauge().unknown:
		return errors.New("the disk does not say whether it has a record")
	case o.used.Load() >= o.max:
		return fmt.Errorf("%w: %d of %d bytes", errOutboxFull, o.used.Load(), o.max)
	}
	return nil
}
