package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// hubReader is the harness's own connection to the hub. It listens to what is published to
// whoever subscribes, and reads every stream at the end. It parses what it
// reads from the protocol's document, not by the product's code.
type hubReader struct {
	nc *nats.Conn
	js jetstream.JetStream

	mu     sync.Mutex  // Guards what follows.
	heard  []byte      // everything that crossed the hub, for the search for leaks
	cut    int         // bytes that found no room in it
	recent []*nats.Msg // the last events that came, for the forger
	// onReport, when not nil, is called as a report is stored.
	onReport func()
}

const mostRecent = 64

// heardSubjects are those that nobody answers: a subscription to requests, or to somebody's
// inbox, would make the hub believe that there is somebody where there is nobody.
var heardSubjects = []string{"live.>", "keyupd.>", "ops.>"}

// mostHeard bounds what is kept of the hub's traffic, in bytes.
const mostHeard = 128 << 20

func connectHub(url string) (*hubReader, error) {
	h := &hubReader{}
	nc, err := nats.Connect(url, nats.Name("faults"), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0),
		nats.ReconnectBufSize(-1))
	if err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	h.nc = nc
	if h.js, err = jetstream.New(nc); err != nil {
		nc.Close()
		return nil, err
	}
	for _, subject := range heardSubjects {
		if _, err := nc.Subscribe(subject, h.hear); err != nil {
			nc.Close()
			return nil, err
		}
	}
	return h, nil
}

func (h *hubReader) hear(m *nats.Msg) {
	h.mu.Lock()
	if len(h.heard) < mostHeard {
		h.heard = appendMsg(h.heard, m.Subject, m.Header, m.Data)
	} else {
		h.cut += len(m.Data)
	}
	onReport := h.onReport
	if strings.HasPrefix(m.Subject, "live.pos.") {
		if len(h.recent) == mostRecent {
			h.recent = h.recent[1:]
		}
		h.recent = append(h.recent, m)
	}
	h.mu.Unlock()
	if onReport != nil && strings.HasPrefix(m.Subject, "live.kitchen.") {
		onReport()
	}
}

func (h *hubReader) whenReport(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onReport = f
}

// lately returns the last events that came.
func (h *hubReader) lately() []*nats.Msg {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.recent)
}

// traffic returns what was heard so far, and how much more there was.
func (h *hubReader) traffic() ([]byte, int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.heard, h.cut
}

func appendMsg(dst []byte, subject string, header map[string][]string, data []byte) []byte {
	dst = append(append(dst, subject...), '\n')
	for name, values := range header {
		for _, v := range values {
			dst = append(append(append(append(dst, name...), ": "...), v...), '\n')
		}
	}
	return append(append(dst, data...), '\n')
}

// readAll adds what every stream on the hub holds, key-value buckets among them, to what
// was heard.
func (h *hubReader) readAll(ctx context.Context) error {
	names := h.js.StreamNames(ctx)
	for name := range names.Name() {
		t, err := h.tail(ctx, name)
		if err != nil {
			return err
		}
		err = t.read(ctx, func(m *jetstream.RawStreamMsg) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.heard = appendMsg(h.heard, m.Subject, m.Header, m.Data)
		})
		if err != nil {
			return fmt.Errorf("stream %s: %w", name, err)
		}
	}
	return names.Err()
}

// await waits until there is a connection: a program that was the hub may just be back.
func (h *hubReader) await(ctx context.Context) error {
	for !h.nc.IsConnected() {
		if !sleep(ctx, 10*time.Millisecond) {
			return fmt.Errorf("no connection to the hub: %w", context.Cause(ctx))
		}
	}
	return nil
}

// tail reads a stream, from its beginning to its end and on.
type tail struct {
	stream jetstream.Stream
	next   uint64
}

func (h *hubReader) tail(ctx context.Context, stream string) (*tail, error) {
	s, err := h.js.Stream(ctx, stream)
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", stream, err)
	}
	return &tail{s, 1}, nil
}

// read hands f each message stored since the last read.
func (t *tail) read(ctx context.Context, f func(*jetstream.RawStreamMsg)) error {
	info, err := t.stream.Info(ctx)
	if err != nil {
		return err
	}
	last := info.State.LastSeq
	if last < t.next {
		return nil
	}
	c, err := t.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: t.next, InactiveThreshold: 5 * time.Second})
	if err != nil {
		return err
	}
	for t.next <= last {
		batch, err := c.FetchNoWait(500)
		if err != nil {
			return err
		}
		for m := range batch.Messages() {
			meta, err := m.Metadata()
			if err != nil {
				return err
			}
			t.next = meta.Sequence.Stream + 1
			f(&jetstream.RawStreamMsg{Subject: m.Subject(), Sequence: meta.Sequence.Stream, Header: m.Headers(), Data: m.Data(), Time: meta.Timestamp})
		}
		if err := batch.Error(); err != nil && !errors.Is(err, nats.ErrTimeout) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

// parseStored reads an event as it stands on the hub. With an error, what could be read.
func parseStored(m *jetstream.RawStreamMsg) (Stored, error) {
	// pos.<partition>.<site>.<kind>.<edge>
	s := Stored{ID: m.Header.Get("Kb-Id"), StreamSeq: m.Sequence, At: m.Time, Fingerprint: m.Header.Get("Kb-Fingerprint"),
		Forged: forgedAs(m)}
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 5 {
		return s, fmt.Errorf("subject %q", m.Subject)
	}
	s.Site, s.Kind = parts[2], parts[3]
	t, err := parseTriple(m.Data)
	s.IV = t.IV
	id, idErr := parseEventID(s.Site, m.Header)
	s.eventID = id
	var acceptedErr, deadlineErr error
	s.Accepted, acceptedErr = parseMillis(m.Header.Get("Kb-Accepted"))
	s.Deadline, deadlineErr = parseMillis(m.Header.Get("Kb-Deadline"))
	return s, errors.Join(err, idErr, acceptedErr, deadlineErr)
}

func parseEventID(site string, h nats.Header) (eventID, error) {
	edge, epoch, ok := strings.Cut(h.Get("Kb-Edge"), ".")
	seq, err := strconv.ParseUint(h.Get("Kb-Seq"), 10, 64)
	if !ok || err != nil {
		return eventID{Site: site}, fmt.Errorf("Kb-Edge %q, Kb-Seq %q", h.Get("Kb-Edge"), h.Get("Kb-Seq"))
	}
	return eventID{site, edge, epoch, seq}, nil
}

func parseMillis(s string) (time.Time, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	return time.UnixMilli(n), err
}

// parseSettled reads a report; ok is false for other messages of KITCHEN.
func parseSettled(m *jetstream.RawStreamMsg) (r Settled, ok bool, err error) {
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 3 || parts[2] != "report" {
		return r, false, nil
	}
	id, err := parseEventID(parts[1], m.Header)
	if err != nil {
		return r, false, err
	}
	h := m.Header
	r = Settled{eventID: id, ID: h.Get("Kb-Id"), Kind: h.Get("Kb-Kind"), Endpoint: h.Get("Kb-Endpoint"), State: h.Get("Kb-State"), Reason: h.Get("Kb-Reason"), At: m.Time}
	for _, n := range []struct {
		name string
		to   *int
	}{{"Kb-N", &r.N}, {"Kb-Status", &r.Status}, {"Kb-Attempts", &r.Attempts}} {
		if *n.to, err = strconv.Atoi(h.Get(n.name)); err != nil {
			return r, false, fmt.Errorf("%s: %w", n.name, err)
		}
	}
	return r, true, nil
}

func parseDead(m *jetstream.RawStreamMsg) (Dead, error) {
	// dlq.<site>.<kind>; a forged one may hold nothing that can be read.
	parts := strings.Split(m.Subject, ".")
	if len(parts) != 3 {
		return Dead{}, fmt.Errorf("subject %q", m.Subject)
	}
	id, err := parseEventID(parts[1], m.Header)
	d := Dead{eventID: id, ID: m.Header.Get("Kb-Id"), Reason: m.Header.Get("Kb-Dead-Reason"), At: m.Time}
	if d.Reason == quarantine {
		err = nil
	}
	var seqErr error
	d.StreamSeq, seqErr = strconv.ParseUint(m.Header.Get("Kb-Dead-Stream-Seq"), 10, 64)
	return d, errors.Join(err, seqErr)
}

func (h *hubReader) close() { h.nc.Close() }
