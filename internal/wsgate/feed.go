package wsgate

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Feed is the hub's stream of events, from one consumer for all screens; *broker.Feed is
// one.
type Feed interface {
	// Run feeds until ctx ends, then returns nil.
	Run(ctx context.Context) error
	// LastContact returns when the hub was last heard of, by a message or a heartbeat;
	// zero: never. It is called by many goroutines.
	LastContact() time.Time
}

// OpenFeed makes the feed, not yet running. It is to call event for every message from
// the start of its Run on, one call at a time and in stream order, and gap, between two
// such calls, when messages may have been missed. Neither call waits for a screen.
type OpenFeed func(event func(*broker.Delivery), gap func(reason string)) (Feed, error)

// Keys is what the gate asks of the sites' keys. *keysync.Keys is one.
type Keys interface {
	door.Keys
	// RereadBinding looks whether there are new binding keys, which Site then has.
	RereadBinding()
}

// show brings one message to the screens of its site. It never waits for a screen.
func (g *Gate) show(d *broker.Delivery) {
	hall := g.halls[d.Site]
	if hall == nil {
		return
	}
	now := time.Now()
	site, reason, err := g.judge(d, now)
	if reason != "" {
		g.drop(d, reason, err)
		return
	}
	if d.Kind == broker.KindExpired {
		return // it says of events that they do not come
	}
	g.shown = hall.appendTo(g.shown[:0])
	// The room is used again; the screens must not be kept by it.
	defer clear(g.shown)
	if len(g.shown) == 0 {
		return
	}
	text, err := frameText(site, d.Event.Triple, now)
	if err != nil {
		g.drop(d, dropRewrap, err)
		return
	}
	f, err := newFrame(text)
	if err != nil {
		g.drop(d, dropMalformed, err)
		return
	}
	for _, s := range g.shown {
		s.offer(f)
	}
}

// judge returns the site as its keys are now, or why d is not to be shown. It judges
// events that no screen waits for too: what passed once must not come again later.
func (g *Gate) judge(d *broker.Delivery, now time.Time) (site *keysync.Site, reason string, err error) {
	if d.Err != nil {
		return nil, dropMalformed, d.Err
	}
	e := &d.Event
	site = g.keys.Site(d.Site)
	if site == nil || site.Fetched.IsZero() || site.Binding == nil {
		return nil, dropKeys, nil
	}
	if _, known := site.Binding.Key(e.Bind); !known {
		// Perhaps its edge has read a new binding file before this bridge.
		g.keys.RereadBinding()
		site = g.keys.Site(d.Site)
	}
	// I7: first the tag, before anything the message says is believed.
	if err := site.Binding.VerifyEvent(&e.Event, e.Bind, e.Tag); err != nil && !faultNoTag {
		return nil, dropTag, err
	}
	if e.Site != d.Site || e.Kind != d.Kind || e.Edge != d.Edge {
		return nil, dropTag, fmt.Errorf("the event is site %s, kind %s, edge %s, and lies under another subject", e.Site, e.Kind, e.Edge)
	}
	if e.Kind == broker.KindExpired {
		g.passed.run(lane{e.Site, e.Edge, e.Epoch}, e.From, e.Seq, e.Deadline, now.UnixMilli())
		return site, "", nil
	}
	// In the hub's time: an edge whose clock is ahead gives its events no longer life.
	if now.UnixMilli() >= min(e.Deadline, d.Stored.UnixMilli()+(e.Deadline-e.Accepted)) {
		return nil, dropExpired, nil
	}
	if !g.passed.first(lane{e.Site, e.Edge, e.Epoch}, e.Seq, e.Deadline, now.UnixMilli()) {
		return nil, dropRepeated, nil
	}
	return site, "", nil
}

// drop counts and logs an event that is not shown. The log is sampled, since whoever
// holds the broker could fill it; the count is exact.
func (g *Gate) drop(d *broker.Delivery, reason string, err error) {
	g.metrics.drop(reason, 1)
	log := func(level slog.Level) {
		g.log.Log(context.Background(), level, "event not shown",
			"site", d.Site, "edge", d.Edge, "kind", d.Kind, "id", d.Event.ID, "seq", d.Event.Seq, "reason", reason, "err", err)
	}
	if reason == dropExpired || reason == dropRepeated {
		log(slog.LevelDebug)
		return
	}
	g.sampled.Do(func() { log(slog.LevelWarn) })
}

// frameText returns what the site's screens get to see: the triple as the event carries
// it, or, while the Portal has encryption switched off for the site, the plaintext. An
// event sealed before the switch was turned is brought into the form of now.
func frameText(site *keysync.Site, t envelope.Triple, now time.Time) ([]byte, error) {
	plainSealed := envelope.IsBindingFingerprint(t.Fingerprint)
	if site.Encryption && !plainSealed {
		return t.AppendJSON(nil), nil
	}
	var plaintext []byte
	var err error
	if plainSealed {
		plaintext, err = site.Binding.OpenPlain(nil, t)
	} else {
		plaintext, err = site.Recover(nil, t)
	}
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	if !site.Encryption {
		// A text frame is UTF-8, else every client closes the connection. JSON lets other
		// bytes through inside a string; they show as U+FFFD.
		return bytes.ToValidUTF8(plaintext, []byte("\uFFFD")), nil
	}
	key, err := site.Keyring.Primary(now)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return key.AppendSeal(nil, plaintext)
}
