package broker

import (
	"context"
	"errors"
	"time"
)

// Broker is a connection to a hub. It is safe for concurrent use.
type Broker struct{}

// Embedded is a hub in this process.
type Embedded struct{}

// Feed is one ordered push consumer over POS.
type Feed struct{}

// Reasons given to FeedConfig.Gap.
const (
	GapReset = "reset" // the stream was made anew or lost its end: positions in it mean nothing any more
	GapLost  = "lost"  // the hub removed events before they were fed
)

func StartEmbedded(cfg EmbeddedConfig) (*Embedded, error) { return nil, errors.ErrUnsupported }
func (e *Embedded) ClientURL() string                     { return "" }
func (e *Embedded) Shutdown()                             {}

// Validate reports all mistakes.
func (c HubConfig) Validate() error { return nil }

// Connect connects to the hub.
func Connect(ctx context.Context, cfg ConnectConfig) (*Broker, error) {
	return nil, errors.ErrUnsupported
}
func (b *Broker) Close() error                          { return nil }
func (b *Broker) Connected() bool                       { return false }
func (b *Broker) Status() string                        { return "" }
func (b *Broker) Durability() string                    { return "" }
func (b *Broker) Partitions() int                       { return 0 }
func (b *Broker) PartitionOf(site string) int           { return 0 }
func (b *Broker) ApplyAssets(ctx context.Context) error { return errors.ErrUnsupported }
func (b *Broker) CheckAssets(ctx context.Context) error { return errors.ErrUnsupported }
func (b *Broker) PublishEvent(ctx context.Context, e *Event) (seq uint64, duplicate bool, err error) {
	return 0, false, errors.ErrUnsupported
}
func (b *Broker) PublishReport(ctx context.Context, r *Report) error { return errors.ErrUnsupported }
func (b *Broker) PublishDeadLetter(ctx context.Context, d DeadLetter) error {
	return errors.ErrUnsupported
}
func (b *Broker) LastEvent(ctx context.Context, site, edge string) (*Event, uint64, error) {
	return nil, 0, errors.ErrUnsupported
}
func (b *Broker) ConsumePartition(ctx context.Context, p int, takeover func(ctx context.Context, oldestUnacked time.Time) error, h func(*Delivery)) error {
	return errors.ErrUnsupported
}
func (b *Broker) ReportsSince(ctx context.Context, t time.Time, p int, f func(*Report) error) error {
	return errors.ErrUnsupported
}
func (b *Broker) FollowReports(ctx context.Context, sites []string, f func(*Report)) error {
	return errors.ErrUnsupported
}
func (b *Broker) NewFeed(cfg FeedConfig) (*Feed, error) { return nil, errors.ErrUnsupported }
func (f *Feed) Run(ctx context.Context) error           { return errors.ErrUnsupported }
func (f *Feed) LastContact() time.Time                  { return time.Time{} }
func (f *Feed) Head() uint64                            { return 0 }
