package router

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptrace"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hubLog is a hub's memory: it outlives the routers that are run on it.
type hubLog struct {
	skew time.Duration // by how much its clock is ahead of the routers'

	mu      sync.Mutex
	changed chan struct{} // closed at each change, and replaced
	last    uint64
	events  []*broker.Delivery
	acked   map[uint64]int
	reports []*storedReport
	letters []broker.DeadLetter
	ids     map[string]bool
}

type storedReport struct {
	broker.Report
	at     time.Time // by the routers' clock
	stored time.Time // by the hub's
}

func newHubLog() *hubLog {
	return &hubLog{changed: make(chan struct{}), acked: make(map[uint64]int), ids: make(map[string]bool)}
}

func (l *hubLog) touch() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// store appends an event as an edge published it.
func (l *hubLog) store(e broker.Event) *broker.Delivery {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last++
	d := &broker.Delivery{Event: e, Site: e.Site, Kind: e.Kind, Edge: e.Edge, StreamSeq: l.last, Stored: time.Now().Add(l.skew)}
	l.events = append(l.events, d)
	l.touch()
	return d
}

func (l *hubLog) unacked() []*broker.Delivery {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.events), func(d *broker.Delivery) bool { return l.acked[d.StreamSeq] > 0 })
}

// floor is the stream sequence below which, itself included, everything is acknowledged.
func (l *hubLog) floor() uint64 {
	if open := l.unacked(); len(open) > 0 {
		return open[0].StreamSeq - 1
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// reportOn returns the only report on an event, nil while there is none.
func (l *hubLog) reportOn(t testing.TB, d *broker.Delivery) *storedReport {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	var found *storedReport
	for _, r := range l.reports {
		if r.Site == d.Event.Site && r.Edge == d.Event.Edge && r.Epoch == d.Event.Epoch && r.Seq == d.Event.Seq {
			if found != nil {
				t.Errorf("two reports on seq %d", d.Event.Seq)
			}
			found = r
		}
	}
	return found
}

func (l *hubLog) letterOn(d *broker.Delivery) *broker.DeadLetter {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.letters {
		if l.letters[i].Delivery.StreamSeq == d.StreamSeq {
			return &l.letters[i]
		}
	}
	return nil
}

func (l *hubLog) acks(d *broker.Delivery) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acked[d.StreamSeq]
}

// settled blocks until no event is unacknowledged.
func (l *hubLog) settled(ctx context.Context) error {
	for {
		l.mu.Lock()
		changed, open := l.changed, len(l.events)-len(l.acked)
		l.mu.Unlock()
		if open == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%d of %d events not acknowledged: %w", open, len(l.events), context.Cause(ctx))
		}
	}
}

// fakeHub is one router's connection to a hubLog. When dead, it is cut off: nothing it is
// asked for succeeds, and nothing comes.
type fakeHub struct {
	log        *hubLog
	partitions int
	dead       context.Context
	die        context.CancelFunc

	// Each may refuse what is to be stored, or hold it up; nil takes everything.
	onReport func(ctx context.Context, r *broker.Report) error
	onLetter func(ctx context.Context, d broker.DeadLetter) error
	loseAck  func(d *broker.Delivery) bool

	mu sync.Mutex
	// Guarded by mu.
	orders []order // for the consumers
	takes  int
}

// order makes the consumer do something that hubs do.
type order struct {
	restart bool   // take over anew
	again   uint64 // deliver a copy of this sequence
}

func (l *hubLog) connect() *fakeHub {
	h := &fakeHub{log: l, partitions: 1}
	h.dead, h.die = context.WithCancel(context.Background())
	return h
}

func (h *fakeHub) order(o order) {
	h.mu.Lock()
	h.orders = append(h.orders, o)
	h.mu.Unlock()
	h.log.mu.Lock()
	h.log.touch()
	h.log.mu.Unlock()
}

func (h *fakeHub) nextOrder() (o order, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.orders) == 0 {
		return o, false
	}
	o, h.orders = h.orders[0], h.orders[1:]
	return o, true
}

func (h *fakeHub) Partitions() int { return h.partitions }

func (h *fakeHub) ConsumePartition(ctx context.Context, partition int, takeover func(context.Context, broker.Takeover) error, handle func(*broker.Delivery)) error {
	for ctx.Err() == nil && h.dead.Err() == nil {
		var at broker.Takeover
		h.log.mu.Lock()
		at.Last = h.log.last
		h.log.mu.Unlock()
		if open := h.log.unacked(); len(open) > 0 {
			at.OldestUnacked = open[0].Stored
		}
		if err := takeover(ctx, at); err != nil {
			return err
		}
		h.mu.Lock()
		h.takes++
		h.mu.Unlock()
		h.consume(ctx, handle)
	}
	<-ctx.Done()
	return nil
}

// consume hands out events until the next restart.
func (h *fakeHub) consume(ctx context.Context, handle func(*broker.Delivery)) {
	// A reset consumer begins at its acknowledgement floor: it hands out again what was
	// acknowledged above that.
	next, consumed := h.log.floor()+1, uint64(0)
	give := func(d *broker.Delivery, again bool) {
		consumed++
		c := *d
		c.ConsumerSeq, c.Redelivered = consumed, again
		c.AckFunc = func() error { return h.ack(&c) }
		handle(&c)
	}
	for {
		h.log.mu.Lock()
		changed := h.log.changed
		var fresh []*broker.Delivery
		for _, d := range h.log.events {
			if d.StreamSeq >= next {
				next = d.StreamSeq + 1
				fresh = append(fresh, d)
			}
		}
		h.log.mu.Unlock()
		for _, d := range fresh {
			give(d, false)
		}
		if o, ok := h.nextOrder(); ok {
			if o.restart {
				return
			}
			for _, d := range h.log.unacked() {
				if d.StreamSeq == o.again && d.StreamSeq < next {
					give(d, true)
				}
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		case <-h.dead.Done():
			return
		}
	}
}

func (h *fakeHub) ReportsSince(ctx context.Context, since time.Time, partition int, f func(*broker.Report) error) error {
	h.log.mu.Lock()
	reports := slices.Clone(h.log.reports)
	h.log.mu.Unlock()
	for _, r := range reports {
		if r.stored.Before(since) {
			continue
		}
		if err := f(&r.Report); err != nil {
			return err
		}
	}
	return nil
}

var errCut = fmt.Errorf("%w: cut off", broker.ErrUnknown)

func (h *fakeHub) PublishReport(ctx context.Context, r *broker.Report) error {
	if h.onReport != nil {
		if err := h.onReport(ctx, r); err != nil {
			return err
		}
	}
	if h.dead.Err() != nil {
		<-ctx.Done()
		return errCut
	}
	h.log.mu.Lock()
	defer h.log.mu.Unlock()
	id := fmt.Sprintf("report %s.%s:%s:%d:%s:%d", r.Edge, r.Epoch, r.Site, r.Seq, r.Endpoint, r.N)
	if !h.log.ids[id] {
		h.log.ids[id] = true
		h.log.reports = append(h.log.reports, &storedReport{*r, time.Now(), time.Now().Add(h.log.skew)})
		h.log.touch()
	}
	return nil
}

func (h *fakeHub) PublishDeadLetter(ctx context.Context, d broker.DeadLetter) error {
	if h.onLetter != nil {
		if err := h.onLetter(ctx, d); err != nil {
			return err
		}
	}
	if h.dead.Err() != nil {
		<-ctx.Done()
		return errCut
	}
	h.log.mu.Lock()
	defer h.log.mu.Unlock()
	id := fmt.Sprintf("letter %d:%s", d.Delivery.StreamSeq, d.Endpoint)
	if !h.log.ids[id] {
		h.log.ids[id] = true
		h.log.letters = append(h.log.letters, d)
		h.log.touch()
	}
	return nil
}

func (h *fakeHub) ack(d *broker.Delivery) error {
	if h.dead.Err() != nil || h.loseAck != nil && h.loseAck(d) {
		return errors.New("cut off")
	}
	h.log.mu.Lock()
	defer h.log.mu.Unlock()
	h.log.acked[d.StreamSeq]++
	h.log.touch()
	return nil
}

// fakeKeys holds the sites' keys; what refresh changes is up to the test.
type fakeKeys struct {
	sites     map[string]*atomic.Pointer[keysync.Site]
	refresh   func(site string) error
	refreshes atomic.Int64
	reread    func()
	rereads   atomic.Int64
}

func (k *fakeKeys) Site(name string) *keysync.Site {
	p, ok := k.sites[name]
	if !ok {
		return nil
	}
	return p.Load()
}

func (k *fakeKeys) Refresh(_ context.Context, site string) error {
	k.refreshes.Add(1)
	if k.refresh == nil {
		return nil
	}
	return k.refresh(site)
}

func (k *fakeKeys) RereadBinding() {
	k.rereads.Add(1)
	if k.reread != nil {
		k.reread()
	}
}

// change replaces a site's keys by a changed copy.
func (k *fakeKeys) change(site string, f func(*keysync.Site)) {
	s := *k.sites[site].Load()
	f(&s)
	k.sites[site].Store(&s)
}

// The keys of a test's site are always the same: what is promised does not depend on them.
var testSettings = envelope.Settings{Profile: envelope.A256GCM, KDF: "hkdf"}

func testKey(t testing.TB, fingerprint string, from, until time.Time) *envelope.Key {
	t.Helper()
	k, err := envelope.NewKey(testSettings, envelope.KeyConfig{
		Fingerprint: fingerprint, Passphrase: envelope.Secret("a phrase of sixteen bytes or more for " + fingerprint),
		ValidAfter: from, ValidUntil: until,
	})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func testRing(t testing.TB, keys ...*envelope.Key) *envelope.Keyring {
	t.Helper()
	r, err := envelope.NewKeyring(testSettings, keys...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func testBinding(t testing.TB, site string) *envelope.Binding {
	t.Helper()
	lane, err := envelope.NewLaneKey(bytes.Repeat([]byte{1}, 32))
	if err != nil {
		t.Fatal(err)
	}
	secret := sha256.Sum256([]byte(site))
	key, err := envelope.NewBindingKey("b1", secret[:])
	if err != nil {
		t.Fatal(err)
	}
	b, err := envelope.NewBinding(site, lane, key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testKeys makes keys for the sites: encrypted, with key "k1" valid for a week.
func testKeys(t testing.TB, sites ...string) *fakeKeys {
	k := &fakeKeys{sites: make(map[string]*atomic.Pointer[keysync.Site])}
	for _, site := range sites {
		now := time.Now()
		p := new(atomic.Pointer[keysync.Site])
		p.Store(&keysync.Site{
			Name: site, Settings: testSettings, Fetched: now, Encryption: true,
			Keyring: testRing(t, testKey(t, "k1", now.Add(-time.Hour), now.Add(7*24*time.Hour))),
			Binding: testBinding(t, site),
		})
		k.sites[site] = p
	}
	return k
}

// edge makes events as an edge does.
type edge struct {
	keys *fakeKeys
	name string
	seq  map[string]uint64
}

func newEdge(keys *fakeKeys) *edge {
	return &edge{keys: keys, name: "e1", seq: make(map[string]uint64)}
}

type eventOption func(*broker.Event)

func within(d time.Duration) eventOption {
	return func(e *broker.Event) { e.Deadline = e.Accepted + d.Milliseconds() }
}

func ofKind(kind string) eventOption { return func(e *broker.Event) { e.Kind = kind } }

// plainSealed makes it an event of a site without encryption.
func plainSealed(t testing.TB, k *fakeKeys) eventOption {
	return func(e *broker.Event) {
		b, err := k.Site(e.Site).Binding.Current().AppendSealPlain(nil, payload(e.Seq))
		if err != nil {
			t.Fatal(err)
		}
		if e.Triple, err = envelope.ParseTriple(b, 0); err != nil {
			t.Fatal(err)
		}
	}
}

func payload(seq uint64) []byte { return fmt.Appendf(nil, `{"_id":"o%d"}`, seq) }

// event makes the next event of a site: an order with a deadline in 10 minutes.
func (e *edge) event(t testing.TB, site string, opts ...eventOption) broker.Event {
	t.Helper()
	e.seq[site]++
	seq := e.seq[site]
	now := time.Now()
	s := e.keys.Site(site)
	ev := broker.Event{Event: envelope.Event{
		Site: site, Kind: "order", Edge: e.name, Epoch: "ep1", From: seq, Seq: seq, ID: fmt.Sprintf("id-%s-%d", site, seq),
		Accepted: now.UnixMilli(), Deadline: now.Add(10 * time.Minute).UnixMilli(), Via: "hub",
	}, Bind: "b1", Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
	if key, err := s.Keyring.Primary(now); err == nil {
		var err error
		if ev.Triple, err = key.Seal(payload(seq)); err != nil {
			t.Fatal(err)
		}
	}
	for _, o := range opts {
		o(&ev)
	}
	ev.Tag = s.Binding.Current().TagEvent(&ev.Event)
	return ev
}

// kitchen answers as a function says; it sees each request when it has it whole.
type kitchen func(r *http.Request, body []byte) (*http.Response, error)

func (k kitchen) RoundTrip(r *http.Request) (*http.Response, error) {
	if t := httptrace.ContextClientTrace(r.Context()); t != nil {
		t.GotConn(httptrace.GotConnInfo{})
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	return k(r, body)
}

// unreachable fails before anything is sent.
type unreachable struct{ err error }

func (u unreachable) RoundTrip(*http.Request) (*http.Response, error) { return nil, u.err }

func reply(status int, body string, headers ...string) *http.Response {
	h := make(http.Header)
	for i := 0; i+1 < len(headers); i += 2 {
		h.Set(headers[i], headers[i+1])
	}
	return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(bytes.NewReader([]byte(body))), ContentLength: int64(len(body))}
}

// silent never answers.
func silent(r *http.Request, _ []byte) (*http.Response, error) {
	<-r.Context().Done()
	return nil, context.Cause(r.Context())
}

// running is a router at work.
type running struct {
	*Router
	hub  *fakeHub
	stop context.CancelFunc
	done chan error
	logs *logBook
	reg  *prometheus.Registry
}

// counted reads a counter.
func (r *running) counted(t testing.TB, name, label, value string) float64 {
	t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == label && l.GetValue() == value {
					return m.GetCounter().GetValue()
				}
			}
		}
	}
	t.Fatalf("there is no %s{%s=%q}", name, label, value)
	return 0
}

// start runs a router with a Kitchen for each site of kitchens, in a bubble.
func start(t testing.TB, hub *fakeHub, keys Keys, kitchens map[string]http.RoundTripper, change ...func(*Config)) *running {
	t.Helper()
	cfg := Config{Sites: make(map[string]KitchenConfig)}
	for site := range kitchens {
		cfg.Sites[site] = KitchenConfig{URL: "https://kitchen.example"}
	}
	logs := &logBook{}
	cfg.Log = slog.New(logs)
	reg := prometheus.NewRegistry()
	cfg.Metrics = reg
	for _, f := range change {
		f(&cfg)
	}
	r, err := New(cfg, hub, keys)
	if err != nil {
		t.Fatal(err)
	}
	for site, k := range kitchens {
		if k != nil {
			r.endpoints[site].rt = k
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	run := &running{Router: r, hub: hub, stop: cancel, done: make(chan error, 1), logs: logs, reg: reg}
	go func() { run.done <- r.Run(ctx) }()
	// What is stored from here on is stored after the take-over.
	for r.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
	return run
}

// end stops the router and waits for it.
func (r *running) end(t testing.TB) {
	t.Helper()
	r.stop()
	if err := <-r.done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if n := r.metrics.pending.Load(); n != 0 {
		t.Errorf("%d events pending after the end", n)
	}
}

// logBook keeps the messages of log records.
type logBook struct {
	mu      sync.Mutex
	records []slog.Record
}

func (b *logBook) Enabled(context.Context, slog.Level) bool { return true }
func (b *logBook) WithAttrs([]slog.Attr) slog.Handler       { return b }
func (b *logBook) WithGroup(string) slog.Handler            { return b }
func (b *logBook) Handle(_ context.Context, r slog.Record) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.records = append(b.records, r)
	return nil
}

// alarms returns how often each Error was logged.
func (b *logBook) alarms() map[string]int {
	b.mu.Lock()
	defer b.mu.Unlock()
	m := make(map[string]int)
	for _, r := range b.records {
		if r.Level == slog.LevelError {
			m[r.Message]++
		}
	}
	return m
}

func (b *logBook) has(level slog.Level, message string) bool { return b.count(level, message) > 0 }

func (b *logBook) count(level slog.Level, message string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.records {
		if r.Level == level && r.Message == message {
			n++
		}
	}
	return n
}

// attr returns an attribute of a message that was logged.
func (b *logBook) attr(message, key string) (value string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.records {
		if r.Message == message {
			r.Attrs(func(a slog.Attr) bool {
				if a.Key == key {
					value = a.Value.String()
				}
				return true
			})
		}
	}
	return value
}

// sortedKeys makes failures readable.
func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

var quietLog = slog.New(slog.DiscardHandler)
