package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// acknowledged is a stream and a consumer of which the hub has confirmed a certain state.
type acknowledged struct {
	stream  string
	root    string
	created time.Time
	msgs    uint64
	floor   uint64 // of the consumer
}

// confirmed stores 30 events, and acknowledges 11 of the first 20, all of the first 4.
func confirmed(t *testing.T, h *hub, stream string) acknowledged {
	t.Helper()
	r := root()
	s := h.create(t, jetstream.StreamConfig{
		Name: stream, Subjects: []string{r + ".*.*.*"}, Replicas: h.replicas, AllowDirect: true, Discard: jetstream.DiscardNew,
	})
	for seq := range uint64(30) {
		id := fmt.Sprint(seq + 1)
		if got := store(t, h.nc, r+".s1.order.e1", header(hdrMsgID, id), "body "+id); got != seq+1 {
			t.Fatalf("stored at %d, want %d", got, seq+1)
		}
	}
	c := h.consumer(t, s, pinned(time.Minute))
	for i, m := range inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 20, Expires: time.Minute, Group: group}), 20, 1, 1) {
		if i < 12 && i != 4 {
			acknowledge(t, h.nc, m.Reply)
		}
	}
	eventually(t, "eleven are acknowledged", func() bool {
		info := consumerInfo(t, c)
		return info.AckFloor.Stream == 4 && info.NumAckPending == 9
	})
	return acknowledged{stream: stream, root: r, created: s.CachedInfo().Created, msgs: 30, floor: 4}
}

// check that a hub that was away has all of it.
func (a acknowledged) check(t *testing.T, h *hub) {
	t.Helper()
	if h.nodes != nil { // nobody answers for what has no leader
		h.nodes.Leader(a.stream)
		h.nodes.ConsumerLeader(a.stream, "d")
	}
	var s jetstream.Stream
	must(t, func(ctx context.Context) (err error) {
		s, err = h.js.Stream(ctx, a.stream)
		return err
	})
	if created := s.CachedInfo().Created; !created.Equal(a.created) {
		t.Errorf("the stream was created %v, and now says %v", a.created, created)
	}
	holds(t, s, a.msgs, a.msgs)
	for seq := range a.msgs {
		id := fmt.Sprint(seq + 1)
		m := message(t, h.nc, s, seq+1)
		if header, err := nats.DecodeHeadersMsg(m.Header); err != nil || header.Get(hdrMsgID) != id || string(m.Data) != "body "+id {
			t.Errorf("message %s: %s %q", id, m.Header, m.Data)
		}
	}
	if d := publish(t, h.nc, a.root+".s1.order.e1", header(hdrMsgID, "7"), ""); !d.Duplicate || d.Seq != 7 {
		t.Errorf("an id from before: %v, want a duplicate at 7", d)
	}
	next := store(t, h.nc, a.root+".s1.order.e1", after(a.msgs, a.root+".s1.*.e1"), "")
	if next != a.msgs+1 {
		t.Errorf("the next is stored at %d, want %d", next, a.msgs+1)
	}

	var c jetstream.Consumer
	must(t, func(ctx context.Context) (err error) {
		c, err = s.Consumer(ctx, "d")
		return err
	})
	info := consumerInfo(t, c)
	if info.AckFloor.Stream > a.floor {
		t.Fatalf("acknowledgement floor at %d, acknowledged is up to %d", info.AckFloor.Stream, a.floor)
	}
	t.Logf("floor %d of %d", info.AckFloor.Stream, a.floor)
	unpin(t, h.nc, c)
	reset(t, h, c)
	n := int(next - info.AckFloor.Stream)
	inOrder(t, pull(t, h.nc, c, pullRequest{Batch: n, Expires: time.Minute, Group: group}), n, info.AckFloor.Stream+1, 1)
}

func TestEveryAcknowledgedMessageOutlivesTheServer(t *testing.T) {
	t.Run("single_stopped", func(t *testing.T) {
		dir := t.TempDir()
		srv := startServer(t, dir, nil)
		a := confirmed(t, singleHub(t, srv), "S")
		stopServer(srv)
		a.check(t, singleHub(t, startServer(t, dir, nil)))
	})
	// What is in the folder while the server runs is what a kill leaves there.
	t.Run("single_killed", func(t *testing.T) {
		dir := t.TempDir()
		a := confirmed(t, singleHub(t, startServer(t, dir, nil)), "S")
		var left string
		eventually(t, "a copy of the folder", func() bool { // a file may go while it is copied
			left = filepath.Join(t.TempDir(), "left")
			return os.CopyFS(left, os.DirFS(dir)) == nil
		})
		a.check(t, singleHub(t, startServer(t, left, nil)))
	})
	t.Run("three_nodes_stopped", func(t *testing.T) {
		h := clusterHub(t)
		a := confirmed(t, h, fmt.Sprintf("S%d", serial.Add(1)))
		for node := range 3 {
			h.nodes.Stop(node)
		}
		var wg sync.WaitGroup
		for node := range 3 { // one alone would wait for the others
			wg.Go(func() { h.nodes.Restart(node) })
		}
		wg.Wait()
		a.check(t, h)
		h.remove(t, a.stream)
	})
}

func TestReplicatedConsumerInMemoryOutlivesItsLeader(t *testing.T) {
	h := clusterHub(t)
	a := confirmed(t, h, fmt.Sprintf("S%d", serial.Add(1)))
	leader := h.nodes.ConsumerLeader(a.stream, "d")
	h.nodes.Stop(leader)
	if now := h.nodes.ConsumerLeader(a.stream, "d"); now == leader {
		t.Fatalf("node %d leads and is stopped", leader)
	}
	a.check(t, h)
	h.nodes.Restart(leader)
	h.remove(t, a.stream)
}

func TestCreationTimeIsTheSameFromEveryLeader(t *testing.T) {
	h := clusterHub(t)
	s := h.stream(t, jetstream.StreamConfig{Subjects: []string{root()}})
	created := s.CachedInfo().Created
	for range 3 {
		h.nodes.StepDown(name(s))
		if info := streamInfo(t, s); !info.Created.Equal(created) {
			t.Errorf("created %v, and by another leader %v", created, info.Created)
		}
	}
}

func TestStreamCreatedAnewHasAnotherCreationTimeAndReusesSequences(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		s := h.events(t, 3)
		cfg := s.CachedInfo().Config
		c := h.consumer(t, s, nil)
		before := inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 1, Expires: time.Minute}), 1, 1, 1)
		h.remove(t, cfg.Name)

		anew := h.create(t, cfg)
		if was, is := s.CachedInfo().Created, anew.CachedInfo().Created; !is.After(was) {
			t.Errorf("created %v, and anew %v", was, is)
		}
		holds(t, anew, 0, 0)
		if err := ask(t, func(ctx context.Context) error { _, err := anew.Consumer(ctx, "d"); return err }); !errors.Is(err, jetstream.ErrConsumerNotFound) {
			t.Errorf("the consumer of the stream before: %v", err)
		}
		if seq := store(t, h.nc, cfg.Subjects[0], nil, ""); seq != 1 {
			t.Errorf("the first is stored at %d, want 1 again", seq)
		}

		// Stream and consumer are known by their names: what was delivered before settles
		// what is at its place now.
		c = h.consumer(t, anew, nil)
		inOrder(t, pull(t, h.nc, c, pullRequest{Batch: 1, Expires: time.Minute}), 1, 1, 1)
		acknowledge(t, h.nc, before[0].Reply)
		reaches(t, c, 1)
	})
}
