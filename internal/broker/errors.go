package broker

import (
	"errors"
	"fmt"
)

// What callers branch on, with errors.Is.
var (
	// ErrRejected: the message is certainly not stored. Either the hub refused it and
	// said why (full, too large, not permitted), or it was never reached (ErrAway).
	ErrRejected = errors.New("not stored by the hub")
	// ErrAway: the message is certainly not stored, because no attempt reached a hub
	// that could take it. Every such error is ErrRejected as well.
	ErrAway = errors.New("hub away")
	// ErrDenied: the hub does not let this user publish there, and has not taken it. Every
	// such error is ErrRejected as well.
	ErrDenied = errors.New("this user of the hub may not publish there")
	// ErrUnknown: nobody knows whether the message is stored. Publishing it again,
	// unchanged, within the stream's duplicate window stores it once at most.
	ErrUnknown = errors.New("not known whether the hub has stored it")
	// ErrInvalid: the message cannot be put on the wire as it is; nothing was sent.
	ErrInvalid = errors.New("not fit for the wire")
	// ErrMalformed: a message from the hub is not what the wire format says.
	ErrMalformed = errors.New("malformed message")
	// ErrNone: there is no such message.
	ErrNone = errors.New("no message")
	// ErrStale: the delivery's partition has been taken over since, so that its
	// acknowledgement could meet another message. The event is delivered again.
	ErrStale = errors.New("delivery from before a take-over")
)

// awayError is certain that nothing is stored: it is both ErrAway and ErrRejected.
type awayError struct{ why error }

func (e *awayError) Error() string { return fmt.Sprintf("%v: %v", ErrAway, e.why) }

func (e *awayError) Is(target error) bool { return target == ErrAway || target == ErrRejected }

func (e *awayError) Unwrap() error { return e.why }
