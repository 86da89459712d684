package edge

import (
	"context"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// position is a place in the outbox's log.
type position struct {
	record uint64 // sequence of the record; the first is 1 or later
	index  int    // of the entry in the record
}

func (p position) before(q position) bool {
	return p.record < q.record || p.record == q.record && p.index < q.index
}

// queued is an event of the outbox that the hub has to be told of.
type queued struct {
	pos     position
	event   *broker.Event // as committed: numbered, tagged; Triple included
	expired bool          // it is settled as failed, expired (fsynced): goes into a run, never out as itself
	settled bool          // it has a final state from elsewhere (a report): only its number is of interest
	unsent  bool          // it certainly was never sent
}

// backlog is what the forwarder needs of the outbox. All methods are safe for concurrent
// use.
type backlog interface {
	epoch() string
	// cursor: everything up to it is settled with the hub.
	cursor() position
	// next returns what comes after a position, in log order, without waiting; empty:
	// nothing is there. At most max events and about maxBytes bytes, but at least one.
	next(ctx context.Context, after position, max, maxBytes int) ([]queued, error)
	// wait returns when there is something after the position.
	wait(ctx context.Context, after position) error
	// sending is called before anything up to there is sent; it fsyncs a mark unless one
	// covers it.
	sending(ctx context.Context, upTo position) error
	// forwarded: the hub has, or was told of, everything up to there. It moves the cursor
	// (logged soon) and the states.
	forwarded(upTo position)
	// expire ends events as failed, reason expired: fsynced, then their POS are told.
	expire(ctx context.Context, site, epoch string, seqs []uint64) error
	// resend returns the events of the current epoch up to the cursor above number after
	// that are unsettled, in order: the hub lost them.
	resend(ctx context.Context, site string, after uint64) ([]queued, error)
	// last returns the last number given in the current epoch.
	last(site string) uint64
	// renew starts a new epoch: everything above the cursor is numbered and tagged anew;
	// positions change.
	renew(ctx context.Context, why string) error
	// open returns the sites that have unsettled events.
	open() []string
}
