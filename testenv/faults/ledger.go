package main

import (
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
)

// Evidence is everything that was written down about one run outside the programs under
// test: what POS were told, what the Kitchens saw, what the hub holds, what screens got.
// Reconcile judges by it alone.
type Evidence struct {
	Told   []Told
	Stored []Stored // POS, in stream order
	// Settled and Dead are KITCHEN's reports and DLQ, in stream order.
	Settled []Settled
	Dead    []Dead
	Asked   []kitchen.Record // what reached the Kitchens, in order of arrival
	Screens []Session
	Leaks   []Leak

	// Deadlines by kind, as the edge was configured.
	Deadlines map[string]time.Duration
	// Settle is how long after it was cut off a Kitchen may still work on a request.
	Settle time.Duration
	// Calm: nothing came between edge, hub and bridge, so that each POS must hear of the end
	// of what it was told yes for, and each report must say what the Kitchen answered.
	Calm bool
	// Lag is the longest time in which the machine did not let the harness run when it should
	// have. What the harness measures may be late by as much.
	Lag time.Duration
	// Outages are the times in which the hub did not run. In them screens must be told. One ends
	// when the program is started again, not when it says that it is ready: a screen may be
	// served before somebody has asked. A frozen bridge with the hub in it is none: its gate is
	// frozen too, and can neither beat nor close.
	Outages []Span
	// Screen says how the gate is set.
	Screen ScreenTimes
	// Trouble is what went wrong in another way: a program that ended by itself, say.
	Trouble []string
}

// Told is what one POS was told of one message.
type Told struct {
	pos.Entry
	// WantID is the id that the message has by the protocol, "" when it has no key.
	WantID string
	// Within shortens the deadline of the kind; 0: it does not.
	Within time.Duration
}

// id is the message's id, whether or not the POS was told it.
func (t Told) id() string {
	if t.WantID != "" {
		return t.WantID
	}
	return t.ID
}

// eventID names an event of an edge.
type eventID struct {
	Site, Edge, Epoch string
	Seq               uint64
}

// Stored is one event on the hub.
type Stored struct {
	eventID
	Kind, ID           string
	StreamSeq          uint64
	At                 time.Time // when the hub stored it
	Accepted, Deadline time.Time // as the edge says
	IV, Fingerprint    string
	// Forged says what is wrong with an event that the harness put there; "" for all that
	// an edge stored. Its other fields may be those of a true one.
	Forged string
}

// Settled is one report on the hub.
type Settled struct {
	eventID
	ID, Kind, Endpoint string
	N                  int
	State, Reason      string
	Status, Attempts   int
	At                 time.Time // when the hub stored it
}

// Dead is one dead letter on the hub.
type Dead struct {
	eventID
	ID, Reason string
	StreamSeq  uint64 // of the event
	At         time.Time
}

// quarantine is the reason of a dead letter that nobody reports.
const quarantine = "quarantine"

// Leak is a secret where ciphertext only should be.
type Leak struct {
	What  string // which secret, without the secret
	Where string
}

// Session is one screen's connection to the gate, as the screen saw it.
type Session struct {
	Site, Name string
	Opened     time.Time // when the handshake was answered
	Closed     time.Time // when the screen learned that it is over; zero: open at the end of the run
	Code       int       // close code; 0: none came
	Slow       bool      // the way to it was slowed down: times are not its own
	Frames     []Frame
	Beats      []time.Time // when isAlive? came
}

// Frame is one event as a screen got it.
type Frame struct {
	At              time.Time
	IV, Fingerprint string // of the frame; empty for plain JSON
	PayloadHash     string // of what is in it, opened by the screen's own means; "" when it did not open
}

// Span is a time with a beginning and an end.
type Span struct{ From, To time.Time }

// ScreenTimes are the gate's settings that a screen's judgement needs.
type ScreenTimes struct{ Heartbeat, Stale, StaleClose, WriteTimeout time.Duration }
