package broker

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// Beacon is how an edge is, in its own words, on ops.<edge>.beacon. Nobody stores it.
type Beacon struct {
	Edge       string    `json:"edge"`
	Epoch      string    `json:"epoch"`
	At         time.Time `json:"at"`                  // hub time, as the edge knows it
	OffsetMS   *int64    `json:"offset_ms,omitempty"` // how far its own clock is ahead; absent: it does not know
	Sites      int       `json:"sites"`
	Backlog    int       `json:"backlog"` // messages that the hub was not told of
	OldestMS   int64     `json:"oldest_ms"`
	Unsettled  int       `json:"unsettled"`
	Overdue    int       `json:"overdue"`
	StoreBytes int64     `json:"store_bytes"`
	StoreMax   int64     `json:"store_max"`
	DiskFree   int64     `json:"disk_free"`
	Trouble    []string  `json:"trouble,omitempty"`
}

const maxBeacon = 16 << 10

// PublishBeacon sends a beacon. One may be lost.
func (b *Broker) PublishBeacon(s Beacon) error {
	body, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return b.nc.Publish("ops."+b.name+".beacon", body)
}

// FollowBeacons hands f the beacons of all edges until ctx ends, from one goroutine. One
// that says it is of another edge than its subject, which the hub vouches for, is counted as
// malformed.
func (b *Broker) FollowBeacons(ctx context.Context, f func(Beacon)) error {
	in := make(chan *nats.Msg, liveQueue)
	sub, err := b.nc.ChanSubscribe("ops.*.beacon", in)
	if err != nil {
		return fmt.Errorf("follow beacons: %w", err)
	}
	defer sub.Unsubscribe()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-b.closed:
			return fmt.Errorf("follow beacons: %w", errClosed)
		case m := <-in:
			edge := strings.TrimSuffix(strings.TrimPrefix(m.Subject, "ops."), ".beacon")
			var s Beacon
			if len(m.Data) > maxBeacon || json.Unmarshal(m.Data, &s) != nil || s.Edge != edge || envelope.ValidName(edge) != nil {
				b.metrics.malformed.WithLabelValues("beacon").Inc()
				continue
			}
			f(s)
		}
	}
}
