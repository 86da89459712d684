package broker

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// The hub compares ids over all subjects, whoever sent them: what it calls a duplicate is
// stored only if the hub has this very event.
func TestADuplicateCountsAsStoredOnlyWhenTheHubHasTheEvent(t *testing.T) {
	t.Parallel()
	password := write(t, "pw", "secret\n")
	hub, _ := embedded(t, HubConfig{MaxBytes: 8 << 20, Listen: "127.0.0.1:0", Users: []UserConfig{
		{Name: "edge-1", PasswordFile: password, Role: RoleEdge}, {Name: "edge-2", PasswordFile: password, Role: RoleEdge}}})
	edge := connect(t, ConnectConfig{HubConfig: HubConfig{URLs: []string{hub.ClientURL()}, User: "edge-1", PasswordFile: password,
		Partitions: 4, ReconnectMax: 20 * time.Millisecond}, Name: "edge-1"})
	other, err := nats.Connect(hub.ClientURL(), nats.UserInfo("edge-2", "secret"), nats.CustomInboxPrefix("_INBOX_edge-2"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(other.Close)
	burn := func(id string) {
		t.Helper()
		m := nats.NewMsg("pos.store-1.order.edge-2")
		m.Header["Nats-Msg-Id"] = []string{id}
		if reply, err := other.RequestMsg(m, 2*time.Second); err != nil || strings.Contains(string(reply.Data), "error") {
			t.Fatalf("%v %s", err, reply.Data)
		}
	}

	// What can be known beforehand, from the reports, is not enough for an id.
	next := event("store-1", 1)
	burn(position(next.Edge, next.Epoch, next.Site, next.Seq))
	if _, duplicate, err := edge.PublishEvent(deadline(t), next); err != nil || duplicate {
		t.Fatalf("duplicate %v, %v", duplicate, err)
	}
	// The same event again is a duplicate, and stored.
	if _, duplicate, err := edge.PublishEvent(deadline(t), next); err != nil || !duplicate {
		t.Fatalf("duplicate %v, %v", duplicate, err)
	}
	// And if somebody knew the whole id: not a word of "stored".
	next = event("store-1", 2)
	burn(eventMsgID(next))
	if _, _, err := edge.PublishEvent(deadline(t), next); !errors.Is(err, ErrUnknown) {
		t.Fatalf("%v, want %v", err, ErrUnknown)
	}
	last, _, err := edge.LastEvent(deadline(t), "store-1", "edge-1")
	if err != nil || last.Seq != 1 {
		t.Fatalf("the hub's last event is %v, %v", last, err)
	}
}
