package broker

import (
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// Event is one message on pos.<site>.<kind>.<edge>.
type Event struct {
	envelope.Event
	Bind string // id of the binding key that made Tag (Kb-Bind)
	Tag  string // Kb-Tag
	// Traceparent is the W3C trace context, "" when there is none. It is outside the
	// tag; one that is not well-formed is left out rather than costing an order.
	Traceparent string
}

// Report is one message on kitchen.<site>.report: the fate of one delivery.
type Report struct {
	envelope.Report
	Kind      string // of the event
	StreamSeq uint64 // of the event in POS; information only, a recreated hub reuses sequences
	Bind      string // id of the binding key that made Tag (Kb-Bind)
	Tag       string // Kb-Tag
}

// Delivery is one message of the POS stream as it came from the hub. It belongs to
// the function it was handed to; nothing in it is reused.
type Delivery struct {
	Event Event
	// Site, Kind and Edge are from the stored subject, and set even when Err is.
	// Without Err they equal those of Event and are names (envelope.ValidName).
	Site, Kind, Edge string
	StreamSeq        uint64
	ConsumerSeq      uint64    // counts deliveries of the consumer, from 1 after each take-over
	Stored           time.Time // when the hub stored it, by the hub's clock
	Redelivered      bool      // delivered before since the last take-over, and not acknowledged
	// Err, when not nil, says what is malformed (ErrMalformed). Event then holds no
	// more than what could be read: for the log, not for use. Such a message is for
	// quarantine.
	Err error

	// Subject, Header and Body are the message as it stands on the hub.
	Subject string
	Header  map[string][]string
	Body    []byte

	// AckFunc is what Ack does; the broker sets it. nil: nothing.
	AckFunc func() error
}

// Ack tells the hub that the event is settled. It does not wait: an acknowledgement
// that is lost costs a redelivery. A delivery of a Feed needs none; Ack then does
// nothing. Error: ErrStale, or that the hub is away. Safe for concurrent use.
func (d *Delivery) Ack() error {
	if d.AckFunc == nil {
		return nil
	}
	return d.AckFunc()
}

// DeadLetter is one message on dlq.<site>.<kind>: a delivery that was given up. The
// event goes there as it stood, with what is said here beside it.
type DeadLetter struct {
	Delivery *Delivery // required
	Endpoint string    // the endpoint that refused it; "" or "-": none
	Reason   string    // required; of the closed vocabulary of internal/router
	Attempts int       // POSTs begun
	Status   int       // HTTP status of the last answer, 0 when there was none
}
