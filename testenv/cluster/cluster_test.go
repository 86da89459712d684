package cluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/testenv/cluster"
)

func TestClusterKeepsAcknowledgedMessagesWhenItsLeaderStopsAndReturns(t *testing.T) {
	c := cluster.Start(t, cluster.Config{SyncAlways: true})
	if got := len(slices.Compact(slices.Sorted(slices.Values(c.URLs())))); got != 3 {
		t.Fatalf("%d different URLs, want 3", got)
	}
	nc, err := nats.Connect(strings.Join(c.URLs(), ","), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Replicas: 3}); err != nil {
		t.Fatal(err)
	}
	publish := func(n int) {
		t.Helper()
		for i := range n {
			id := fmt.Sprintf("%d-%d", n, i)
			for {
				one, cancel := context.WithTimeout(ctx, time.Second)
				_, err := js.Publish(one, "s", nil, jetstream.WithMsgID(id))
				cancel()
				if err == nil {
					break
				}
				if ctx.Err() != nil {
					t.Fatal(err)
				}
			}
		}
	}
	publish(10)
	first := c.Leader("S")
	c.Stop(first)
	if second := c.Leader("S"); second == first {
		t.Fatalf("node %d leads and is stopped", first)
	}
	publish(20)
	c.Restart(first)
	c.StepDown("S")
	publish(30)

	stream, err := js.Stream(ctx, "S")
	if err != nil {
		t.Fatal(err)
	}
	info, err := stream.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if info.State.Msgs != 60 {
		t.Errorf("%d messages, want 60", info.State.Msgs)
	}
	if len(info.Cluster.Replicas) != 2 {
		t.Errorf("%d replicas beside the leader, want 2", len(info.Cluster.Replicas))
	}
}
