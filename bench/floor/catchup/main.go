// Command catchup is the floor under an edge that comes back: so many events to the hub, as
// fast as it takes them, in order.
//
// Unavoidable: to send each event with its headers to the stream, and to hear that all of
// them are stored.
//
// How: one fast batch for everything (JetStream fast-ingest, gap: fail) on one connection.
// The bodies and the headers of an event stand ready in memory before the hub is there;
// between two events of a site only its number changes.
//
// Left out, as the product's own: to read the events from the disk and decrypt them, ids and
// tags of each, where the hub stands and the condition that nobody else has published, the
// mark before sending and the cursor behind it, states for POS, purging, batches that end
// and begin again.
//
// Could it be 10 % faster? Flows of 100 to 4000 messages and 2 to 16 of them outstanding
// were tried; the best are used. The hub, which has a message copied to whoever listens and
// remembers its id, is the slower end. A second connection with a batch of its own would
// lose the order between the two. Headers written once and copied as bytes would save a
// tenth of a microsecond for each message, and there is no client that takes them so.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
)

func main() { os.Exit(rig.Main("catchup", run)) }

const (
	flow     = 1000
	ahead    = 16
	patience = 30 * time.Second // with the hub
	redial   = 20 * time.Millisecond
)

func run(ctx context.Context) error {
	hub := flag.String("hub", "", "nats://host:port; it may be away")
	admin := flag.String("admin", "", "host:port of /readyz: it waits for the hub")
	sites := flag.Int("sites", 1, "how many sites send")
	events := flag.Int("events", 0, "how many in all, in turn over the sites")
	size := flag.Int("size", 0, "length of a body in bytes")
	flag.Parse()

	b := newBacklog(*sites, *size)
	up := make(chan struct{}, 1)
	nc, err := nats.Connect(*hub, nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(redial), nats.ReconnectJitter(0, 0),
		nats.ConnectHandler(func(*nats.Conn) { up <- struct{}{} }))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	g, done := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-up:
			if err := b.send(g, js, *events); err != nil {
				done(err)
			}
		case <-g.Done():
		}
	})
	err = rig.Serve(g, *admin, nil, func() error { return nil })
	done(err)
	wg.Wait()
	if cause := context.Cause(g); ctx.Err() == nil && cause != nil {
		return cause
	}
	return err
}

// backlog makes the events: one message for each site, written anew for each of its events.
type backlog struct {
	messages []*nats.Msg
	seqs     []uint64
}

// newBacklog makes messages that look like the product's.
func newBacklog(sites, size int) *backlog {
	b := &backlog{seqs: make([]uint64, sites)}
	body := bytes.Repeat([]byte{'x'}, size)
	now := strconv.FormatInt(time.Now().UnixMilli(), 10)
	for i := range sites {
		b.messages = append(b.messages, &nats.Msg{Subject: fmt.Sprintf("pos.store-%04d.order.floor", i), Data: body, Header: nats.Header{
			"Nats-Msg-Id":    {""},
			"Kb-Id":          {"01k9z3b4c5d6e7f8g9h0j1k2m3"},
			"Kb-Edge":        {"floor.1k2m3n4p5q"},
			"Kb-Seq":         {""},
			"Kb-Kind":        {"order"},
			"Kb-Fingerprint": {"0123456789abcdef0123456789abcdef"},
			"Kb-Order":       {"0123456789abcdef0123456789abcdef"},
			"Kb-Accepted":    {now},
			"Kb-Deadline":    {now},
			"Kb-Via":         {"hub"},
			"Kb-Bind":        {"0123456789abcdef"},
			"Kb-Tag":         {"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},
		}})
	}
	return b
}

// next is the i-th event, valid until the next one of its site.
func (b *backlog) next(i int) *nats.Msg {
	site := i % len(b.messages)
	b.seqs[site]++
	m, seq := b.messages[site], strconv.FormatUint(b.seqs[site], 10)
	m.Header["Kb-Seq"][0] = seq
	m.Header["Nats-Msg-Id"][0] = "floor.1k2m3n4p5q:" + strconv.Itoa(site) + ":" + seq + ":0123456789abcdef"
	return m
}

// send stores n events and returns when all are.
func (b *backlog) send(ctx context.Context, js jetstream.JetStream, n int) error {
	fp, err := jetstreamext.NewFastPublisher(js, jetstreamext.FastPublishFlowControl{Flow: flow, MaxOutstandingAcks: ahead, AckTimeout: patience})
	if err != nil {
		return err
	}
	for i := range n {
		if _, err := fp.AddMsg(b.next(i)); err != nil {
			return err
		}
	}
	ack, err := fp.Close(ctx)
	if err != nil {
		return err
	}
	if int(ack.BatchSize) != n {
		return fmt.Errorf("the hub took %d of %d", ack.BatchSize, n)
	}
	return nil
}
