package broker

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go/jetstream"
)

// names of the assets that DESIGN's table demands.
var wantStreams = []string{"POS", "KITCHEN", "DLQ", "KV_keys", "KV_leases", "KV_parked", "KV_acks", "KV_commands"}

func TestAssetsAreCreatedAndThenPassTheCheck(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	if err := b.CheckAssets(deadline(t)); err != nil {
		t.Errorf("just made: %v", err)
	}
	for _, name := range wantStreams {
		if _, err := b.js.Stream(deadline(t), name); err != nil {
			t.Errorf("stream %s: %v", name, err)
		}
	}
	for _, name := range []string{"keys", "leases", "parked", "acks", "commands"} {
		kv, err := b.js.KeyValue(deadline(t), name)
		if err != nil {
			t.Errorf("bucket %s: %v", name, err)
			continue
		}
		if _, err := kv.Put(deadline(t), "store-1", []byte("x")); err != nil {
			t.Errorf("bucket %s: %v", name, err)
		}
	}
	for p := range b.Partitions() {
		if _, err := b.js.Consumer(deadline(t), streamPOS, consumerName(p)); err != nil {
			t.Errorf("consumer of partition %d: %v", p, err)
		}
	}
}

func TestAStreamsPartitionIsWhatTheBrokerComputes(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	for i, site := range []string{"a", "store-1", "store-2", "0", "paris-nord", strings.Repeat("z", 63)} {
		for _, kind := range []string{"order", "alert", KindExpired, "any-other"} {
			e := event(site, uint64(i+1))
			e.Kind, e.Epoch = kind, kind
			if _, _, err := b.PublishEvent(deadline(t), e); err != nil {
				t.Fatal(err)
			}
			got, _, err := b.LastEvent(deadline(t), site, "edge-1")
			if err != nil || got.Kind != kind {
				t.Fatalf("%s %s: %+v, %v", site, kind, got, err)
			}
			m, err := b.request(deadline(t), directGet+streamPOS+".pos.*."+site+"."+kind+".edge-1", nil)
			if err != nil {
				t.Fatal(err)
			}
			at, err := parseStored(m)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := decodeEvent(at.subject, m.Header, m.Data, b.Partitions()); err != nil {
				t.Errorf("stored as %s: %v", at.subject, err)
			}
		}
	}
}

func TestEventsAndReportsAreRepublishedLive(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	sub, err := b.nc.SubscribeSync("live.>")
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	publish(t, b, "store-1", 1, 1)
	if err := b.PublishReport(deadline(t), report("store-1", 1)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"live.pos.store-1.order.edge-1", "live.kitchen.store-1.report"} {
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if m.Subject != want {
			t.Errorf("republished as %s, want %s", m.Subject, want)
		}
	}
}

func TestAssetsThatAreThereAreNotChanged(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	b := remote(t, "bridge", p.hub.ClientURL())
	own := jetstream.StreamConfig{
		Name: streamDLQ, Subjects: []string{"dlq.*.*"}, Description: "an operator's own", Storage: jetstream.FileStorage,
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew, Replicas: 1, MaxAge: time.Hour, MaxBytes: 1 << 20, AllowDirect: true,
	}
	stream, err := b.js.CreateStream(deadline(t), own)
	if err != nil {
		t.Fatal(err)
	}
	before := stream.CachedInfo().Config
	apply(t, b)
	apply(t, b) // twice is once
	info, err := stream.Info(deadline(t))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, info.Config, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("changed: %s", d)
	}
	err = b.CheckAssets(deadline(t))
	if err == nil || !strings.Contains(err.Error(), "stream DLQ: max age is 1h0m0s, wants at least 336h0m0s: change it with `nats stream edit DLQ`") {
		t.Errorf("check says %v", err)
	}
}

func TestAnEmbeddedHubFollowsItsConfiguredSize(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, cfg := range []HubConfig{{}, {MaxBytes: 1 << 20}, {MaxBytes: 64 << 30}} {
		hub := startHub(t, cfg, dir)
		b := connect(t, ConnectConfig{HubConfig: cfg, Name: "bridge", Embedded: hub})
		apply(t, b)
		if err := b.CheckAssets(deadline(t)); err != nil {
			t.Error(err)
		}
		stream, err := b.js.Stream(deadline(t), streamPOS)
		if err != nil {
			t.Fatal(err)
		}
		if got := stream.CachedInfo().Config.MaxBytes; got != cfg.maxBytes() {
			t.Errorf("POS may hold %d, configured is %d", got, cfg.maxBytes())
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		hub.Shutdown()
	}
}

func TestCheckNamesEveryDifference(t *testing.T) {
	t.Parallel()
	has := func(change func(*jetstream.StreamConfig)) jetstream.StreamConfig {
		cfg := streams(16, 3, defaultMaxBytes)[0]
		change(&cfg)
		return cfg
	}
	for _, row := range []struct {
		name   string
		hub    HubConfig
		change func(*jetstream.StreamConfig)
		want   []string // parts of the one difference; none: there is none
	}{
		{"nothing", HubConfig{}, func(*jetstream.StreamConfig) {}, nil},
		{"longer, larger, more is no harm", HubConfig{}, func(c *jetstream.StreamConfig) {
			c.MaxAge, c.MaxMsgSize, c.Duplicates, c.Replicas, c.MaxBytes, c.Metadata = 0, -1, time.Hour, 5, 1, nil
		}, nil},
		{"other subjects", HubConfig{}, func(c *jetstream.StreamConfig) { c.Subjects = []string{"pos.*.order.*"} }, []string{"subjects", "pos.*.order.*", "pos.*.*.*", "nats stream edit POS"}},
		{"no partition", HubConfig{}, func(c *jetstream.StreamConfig) { c.SubjectTransform = nil }, []string{"transform is none", "nats stream edit POS"}},
		{"other partitions", HubConfig{}, func(c *jetstream.StreamConfig) { c.SubjectTransform = streams(4, 3, 1)[0].SubjectTransform }, []string{"transform is", "partition(4,1)", "partition(16,1)", "set hub.partitions: 4"}},
		{"not republished", HubConfig{}, func(c *jetstream.StreamConfig) { c.RePublish = nil }, []string{"republish is none"}},
		{"republished without bodies", HubConfig{}, func(c *jetstream.StreamConfig) {
			r := *c.RePublish
			r.HeadersOnly = true
			c.RePublish = &r
		}, []string{"republish is", "(headers only)"}},
		{"a work queue", HubConfig{}, func(c *jetstream.StreamConfig) { c.Retention = jetstream.WorkQueuePolicy }, []string{"retention is WorkQueue", "cannot be changed"}},
		{"in memory", HubConfig{}, func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage }, []string{"storage is Memory", "cannot be changed"}},
		{"forgets the old", HubConfig{}, func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld }, []string{"discard is DiscardOld"}},
		{"too few replicas", HubConfig{}, func(c *jetstream.StreamConfig) { c.Replicas = 1 }, []string{"replicas is 1, wants 3", "hub.replicas"}},
		{"not the replicas configured", HubConfig{Replicas: 3}, func(c *jetstream.StreamConfig) { c.Replicas = 5 }, []string{"replicas is 5, wants 3"}},
		{"not the size configured", HubConfig{MaxBytes: defaultMaxBytes}, func(c *jetstream.StreamConfig) { c.MaxBytes = 1 << 20 }, []string{"max bytes is 1048576", "hub.max_bytes"}},
		{"shorter", HubConfig{}, func(c *jetstream.StreamConfig) { c.MaxAge = time.Hour }, []string{"max age is 1h0m0s, wants at least 72h0m0s"}},
		{"messages limited", HubConfig{}, func(c *jetstream.StreamConfig) { c.MaxMsgs = 100 }, []string{"max messages is 100"}},
		{"smaller messages", HubConfig{}, func(c *jetstream.StreamConfig) { c.MaxMsgSize = 1024 }, []string{"max message size is 1024"}},
		{"no direct get", HubConfig{}, func(c *jetstream.StreamConfig) { c.AllowDirect = false }, []string{"allow direct is false"}},
		{"no batches", HubConfig{}, func(c *jetstream.StreamConfig) { c.AllowBatchPublish = false }, []string{"allow batch publish is false"}},
		{"sealed", HubConfig{}, func(c *jetstream.StreamConfig) { c.Sealed = true }, []string{"sealed is true"}},
		{"acknowledges nothing", HubConfig{}, func(c *jetstream.StreamConfig) { c.NoAck = true }, []string{"no ack is true"}},
		{"acknowledges before it writes", HubConfig{}, func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode }, []string{"persist mode"}},
		{"a mirror", HubConfig{}, func(c *jetstream.StreamConfig) { c.Mirror = &jetstream.StreamSource{Name: "X"} }, []string{"mirror is true"}},
		{"sources", HubConfig{}, func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: "X"}} }, []string{"sources is 1"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			found := diffStream(has(row.change), streams(16, 3, defaultMaxBytes)[0], row.hub)
			if len(row.want) == 0 {
				if len(found) > 0 {
					t.Errorf("found %v", found)
				}
				return
			}
			if len(found) != 1 {
				t.Fatalf("found %d differences, want 1: %v", len(found), found)
			}
			for _, part := range append(row.want, "stream POS: ") {
				if !strings.Contains(found[0].Error(), part) {
					t.Errorf("%q is not in %q", part, found[0])
				}
			}
		})
	}
	kitchen := streams(16, 3, defaultMaxBytes)[1]
	refusing := kitchen
	refusing.Discard = jetstream.DiscardNew
	if found := diffStream(refusing, kitchen, HubConfig{}); len(found) != 1 || !strings.HasPrefix(found[0].Error(), "stream KITCHEN: discard is DiscardNew, wants DiscardOld: ") {
		t.Errorf("a KITCHEN that refuses reports: found %v", found)
	}
	for name, change := range map[string]func(*jetstream.ConsumerConfig){
		"filter":          func(c *jetstream.ConsumerConfig) { c.FilterSubject = "pos.>" },
		"deliver policy":  func(c *jetstream.ConsumerConfig) { c.DeliverPolicy = jetstream.DeliverNewPolicy },
		"ack policy":      func(c *jetstream.ConsumerConfig) { c.AckPolicy = jetstream.AckAllPolicy },
		"max deliver":     func(c *jetstream.ConsumerConfig) { c.MaxDeliver = 5 },
		"back-off":        func(c *jetstream.ConsumerConfig) { c.BackOff = []time.Duration{time.Second} },
		"ack wait":        func(c *jetstream.ConsumerConfig) { c.AckWait = time.Second },
		"max ack pending": func(c *jetstream.ConsumerConfig) { c.MaxAckPending = 1 },
		"priority policy": func(c *jetstream.ConsumerConfig) { c.PriorityPolicy = jetstream.PriorityPolicyNone },
		"priority groups": func(c *jetstream.ConsumerConfig) { c.PriorityGroups = nil },
		"memory storage":  func(c *jetstream.ConsumerConfig) { c.MemoryStorage = true },
		"headers only":    func(c *jetstream.ConsumerConfig) { c.HeadersOnly = true },
		"replay":          func(c *jetstream.ConsumerConfig) { c.ReplayPolicy = jetstream.ReplayOriginalPolicy },
	} {
		cfg := partitionConsumer(3, 1)
		change(&cfg)
		found := diffConsumer(cfg, partitionConsumer(3, 1))
		if len(found) != 1 || !strings.HasPrefix(found[0].Error(), "consumer kitchen-3: "+name+" is ") {
			t.Errorf("%s: found %v", name, found)
		}
	}
}

// Full, POS and DLQ refuse what comes; KITCHEN forgets the oldest, as no order may wait for
// room for its report.
func TestWhatAFullStreamDoes(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, HubConfig{MaxBytes: 1 << 20})
	body := bytes.Repeat([]byte("A"), 100<<10)
	big := func(seq uint64) *Event {
		e := event("store-1", seq)
		e.Triple.Message = body
		return e
	}
	for _, row := range []struct {
		stream  string
		refuses bool
		publish func(seq uint64) error
	}{
		{streamPOS, true, func(seq uint64) error { _, _, err := b.PublishEvent(deadline(t), big(seq)); return err }},
		{streamDLQ, true, func(seq uint64) error {
			e := big(seq)
			d := &Delivery{Event: *e, Site: e.Site, Kind: e.Kind, Edge: e.Edge, StreamSeq: seq, Subject: "pos.0.store-1.order.edge-1", Body: body}
			return b.PublishDeadLetter(deadline(t), DeadLetter{Delivery: d, Reason: "refused"})
		}},
		{streamKitchen, false, func(seq uint64) error {
			r := report("store-1", seq)
			r.Triple.Message = body
			return b.PublishReport(deadline(t), r)
		}},
	} {
		var err error
		for seq := uint64(1); seq <= 30 && err == nil; seq++ { // 3 MB
			err = row.publish(seq)
		}
		stream, streamErr := b.js.Stream(deadline(t), row.stream)
		if streamErr != nil {
			t.Fatal(streamErr)
		}
		state := stream.CachedInfo().State
		switch {
		case row.refuses && (!errors.Is(err, ErrRejected) || errors.Is(err, ErrAway) || state.FirstSeq != 1):
			t.Errorf("%s: %v, begins at %d; want a certain refusal, and everything kept", row.stream, err, state.FirstSeq)
		case !row.refuses && (err != nil || state.LastSeq != 30 || state.FirstSeq == 1):
			t.Errorf("%s: %v, has %d to %d; want the newest kept", row.stream, err, state.FirstSeq, state.LastSeq)
		}
	}
}

func TestOneSiteCannotFillAStreamThatRefuses(t *testing.T) {
	t.Parallel()
	for _, cfg := range streams(16, 3, defaultMaxBytes) {
		if cfg.Discard == jetstream.DiscardNew && !strings.HasPrefix(cfg.Name, "KV_") && (cfg.MaxMsgsPerSubject <= 0 || !cfg.DiscardNewPerSubject) {
			t.Errorf("%s: %d messages for each subject, new ones refused: %t", cfg.Name, cfg.MaxMsgsPerSubject, cfg.DiscardNewPerSubject)
		}
	}
}

func TestCheckSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	hub := startHub(t, small, t.TempDir())
	b := connect(t, ConnectConfig{HubConfig: small, Name: "bridge", Embedded: hub})
	err := b.CheckAssets(deadline(t))
	if err == nil {
		t.Fatal("an empty hub passes")
	}
	for _, name := range wantStreams {
		if want := "stream " + name + ": missing: run `bridge assets apply`"; !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %q", want, err)
		}
	}
	apply(t, b)
	if err := b.js.DeleteConsumer(deadline(t), streamPOS, consumerName(2)); err != nil {
		t.Fatal(err)
	}
	if err := b.CheckAssets(deadline(t)); err == nil || err.Error() != "consumer kitchen-2: missing: run `bridge assets apply`" {
		t.Errorf("check says %v", err)
	}
	apply(t, b)
	if err := b.CheckAssets(deadline(t)); err != nil {
		t.Error(err)
	}
}
