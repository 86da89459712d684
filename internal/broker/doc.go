// Package broker is everything NATS: the embedded hub, the connection to a hub,
// the streams and consumers on it, and what is published to and read from them.
// It is the only importer of nats.go and nats-server.
//
// It promises:
//
//   - PublishEvent, PublishReport and PublishDeadLetter return nil only when the
//     hub has stored the message, and otherwise say whether it certainly has not
//     (ErrRejected) or whether nobody knows (ErrUnknown).
//   - ConsumePartition delivers a partition's events in stream order from the
//     oldest unacknowledged one, and begins again there, after telling its caller,
//     whenever that order could have been broken.
//   - Feed delivers every event of the stream once, in stream order, from when it
//     began, or says that it could not.
//   - What comes from the hub is data, not truth: a message whose headers or body
//     are malformed arrives with Delivery.Err set. It is never dropped unseen and
//     never panics. Whether its tag verifies is the caller's to check.
//   - Assets are created when missing, and never changed in silence.
//
// docs/architecture.md holds the subjects and the invariants cited here.
package broker
