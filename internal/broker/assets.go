package broker

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	streamPOS     = "POS"
	streamKitchen = "KITCHEN"
	streamDLQ     = "DLQ"

	// The oldest server that can reset a consumer, which the order of events rests on.
	minServerMajor, minServerMinor = 2, 14

	maxEventSize = 256 << 10 // headers and body of a message in POS and KITCHEN
)

func consumerName(p int) string { return "kitchen-" + strconv.Itoa(p) }

// streams is the table of what stands on a hub, key-value buckets as the streams they
// are. Apply creates from it, Check compares with it.
func streams(partitions, replicas int, maxBytes int64) []jetstream.StreamConfig {
	monitor := map[string]string{
		"io.nats.monitor.enabled":           "true",
		"io.nats.monitor.peer-expect":       strconv.Itoa(replicas),
		"io.nats.monitor.peer-lag-critical": "1000",
	}
	event := jetstream.StreamConfig{
		Retention:    jetstream.LimitsPolicy, // a log: replay and parking read it again
		Storage:      jetstream.FileStorage,
		Replicas:     replicas,
		Discard:      jetstream.DiscardNew, // full means refused, never forgotten; but KITCHEN
		MaxMsgs:      -1,
		MaxConsumers: 500,
		MaxMsgSize:   maxEventSize,
		Duplicates:   2 * time.Minute, // 140 B of memory for each id in it
		AllowDirect:  true,
		DenyDelete:   true,
		Compression:  jetstream.NoCompression, // ciphertext does not compress
		Metadata:     monitor,
	}

	pos := event
	pos.Name = streamPOS
	pos.Description = "what POS sent, encrypted: pos.<partition>.<site>.<kind>.<edge>"
	pos.Subjects = []string{"pos.*.*.*"}
	pos.SubjectTransform = &jetstream.SubjectTransformConfig{
		Source:      "pos.*.*.*",
		Destination: fmt.Sprintf("pos.{{partition(%d,1)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}", partitions),
	}
	pos.RePublish = &jetstream.RePublish{
		Source:      "pos.*.*.*.*",
		Destination: "live.pos.{{wildcard(2)}}.{{wildcard(3)}}.{{wildcard(4)}}",
	}
	pos.MaxAge = 72 * time.Hour
	pos.MaxBytes = maxBytes
	pos.MaxMsgsPerSubject = 1_000_000 // a site that runs away is stopped before it fills the stream: four a second for 72 h
	pos.DiscardNewPerSubject = true
	pos.AllowBatchPublish = true

	kitchen := event
	kitchen.Name = streamKitchen
	kitchen.Description = "what became of it, and what screens did: kitchen.<site>.<kind>"
	kitchen.Subjects = []string{"kitchen.*.*"}
	kitchen.RePublish = &jetstream.RePublish{
		Source:      "kitchen.*.*",
		Destination: "live.kitchen.{{wildcard(1)}}.{{wildcard(2)}}",
	}
	kitchen.MaxAge = 7 * 24 * time.Hour
	kitchen.MaxBytes = maxBytes
	// Reports live longer than events and may be larger, so this stream fills first, and no
	// order is acknowledged before its report is stored. A refused report would stop all
	// Kitchens. An old one that is gone costs at most a repeat under the same
	// Idempotency-Key, or a POS that missed it asks in vain (docs/adr/0005).
	kitchen.Discard = jetstream.DiscardOld
	kitchen.MaxMsgsPerSubject = -1

	dlq := event
	dlq.Name = streamDLQ
	dlq.Description = "deliveries given up: dlq.<site>.<kind>"
	dlq.Subjects = []string{"dlq.*.*"}
	dlq.MaxAge = 14 * 24 * time.Hour
	dlq.MaxBytes = maxBytes / 4
	dlq.MaxMsgsPerSubject = 50_000 // so that one Kitchen that refuses everything leaves room for the others'
	dlq.DiscardNewPerSubject = true
	dlq.MaxMsgSize = 2 * maxEventSize // a dead letter is an event and the reasons
	dlq.Duplicates = 24 * time.Hour

	keys := bucket("keys", "key documents, each sealed to its recipient: <site>.<recipient>", replicas)
	keys.MaxMsgsPerSubject = 2
	keys.MaxMsgSize = 16 << 10
	keys.RePublish = &jetstream.RePublish{Source: "$KV.keys.>", Destination: "keyupd.>"}

	leases := bucket("leases", "who owns which partition", replicas)
	leases.MaxAge = 8 * time.Second
	leases.Duplicates = leases.MaxAge
	leases.AllowMsgTTL = true
	leases.SubjectDeleteMarkerTTL = 10 * time.Second

	parked := bucket("parked", "from where a parked endpoint goes on", replicas)

	acks := bucket("acks", "key revision each recipient holds: <site>.<recipient>", replicas)

	commands := bucket("commands", "operators' commands for the owner of a site's partition: <site>", replicas)
	commands.MaxMsgsPerSubject = 8

	return []jetstream.StreamConfig{pos, kitchen, dlq, keys, leases, parked, acks, commands}
}

// bucket is a key-value bucket with one value for each key, as nats.go lays it out.
func bucket(name, description string, replicas int) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name:              "KV_" + name,
		Description:       description,
		Subjects:          []string{"$KV." + name + ".>"},
		Retention:         jetstream.LimitsPolicy,
		Storage:           jetstream.FileStorage,
		Replicas:          replicas,
		Discard:           jetstream.DiscardNew,
		MaxMsgs:           -1,
		MaxBytes:          -1,
		MaxConsumers:      -1,
		MaxMsgSize:        64 << 10,
		MaxMsgsPerSubject: 1,
		Duplicates:        2 * time.Minute,
		AllowRollup:       true,
		AllowDirect:       true,
		DenyDelete:        true,
	}
}

// partitionConsumer is the consumer of one partition's events: every kind of every site
// in it, the expired ones too.
func partitionConsumer(p, replicas int) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable:       consumerName(p),
		Description:   "Kitchen deliveries of partition " + strconv.Itoa(p),
		FilterSubject: "pos." + strconv.Itoa(p) + ".>",
		DeliverPolicy: jetstream.DeliverAllPolicy,
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       2 * time.Minute,
		MaxDeliver:    -1, // a message given up by the hub would be skipped, which breaks the order
		MaxAckPending: 4096,
		MaxWaiting:    64,
		// Replicated consumers in memory survive all but the loss of all servers at once, at
		// several times the rate; a single server's would not survive its restart.
		MemoryStorage:  replicas > 1,
		PriorityPolicy: jetstream.PriorityPolicyPinned,
		PriorityGroups: []string{pullGroup},
		PinnedTTL:      pinnedTTL,
		Metadata: map[string]string{
			"io.nats.monitor.enabled":                  "true",
			"io.nats.monitor.pinned":                   "true",
			"io.nats.monitor.outstanding-ack-critical": "3500",
			"io.nats.monitor.unprocessed-critical":     "5000",
		},
	}
}

// replicas is how many the settings or, without, the hub itself ask for.
func (b *Broker) replicas(ctx context.Context) (int, error) {
	if b.hub.Replicas > 0 {
		return b.hub.Replicas, nil
	}
	if b.embedded {
		return 1, nil
	}
	if _, err := b.await(ctx); err != nil {
		return 0, err
	}
	if b.nc.ConnectedClusterName() == "" {
		return 1, nil
	}
	return 3, nil
}

// retry repeats a call to JetStream over elections, lost connections and time-outs
// until it has an answer or ctx ends.
func (b *Broker) retry(ctx context.Context, call func(context.Context) error) error {
	for n := 1; ; n++ {
		if _, err := b.await(ctx); err != nil {
			return err
		}
		one, cancel := context.WithTimeout(ctx, apiTimeout)
		err := call(one)
		cancel()
		if !transient(err) {
			return err
		}
		if !pause(ctx, retryMin/2+jitter(n, retryMin, retryMax)) {
			return fmt.Errorf("%w (%w)", context.Cause(ctx), err)
		}
	}
}

func transient(err error) bool {
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		return api.ErrorCode == errClusterNotAvail || api.Code == codeTooManyRequests
	}
	return errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrTimeout) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrReconnectBufExceeded) ||
		errors.Is(err, nats.ErrDisconnected)
}

// ApplyAssets creates the streams, buckets and consumers that the hub lacks, and
// changes none that it has: CheckAssets says how those differ. On an embedded hub,
// which nobody else looks after, it also sets the streams' sizes to max_bytes, and
// logs that. It waits for an election or a lost connection until ctx ends.
func (b *Broker) ApplyAssets(ctx context.Context) error {
	replicas, err := b.replicas(ctx)
	if err != nil {
		return fmt.Errorf("assets: %w", err)
	}
	var errs []error
	for _, cfg := range streams(b.partitions, replicas, b.hub.maxBytes()) {
		if err := b.applyStream(ctx, cfg); err != nil {
			errs = append(errs, fmt.Errorf("assets: stream %s: %w", cfg.Name, err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...) // consumers without their stream would only repeat it
	}
	for p := range b.partitions {
		cfg := partitionConsumer(p, replicas)
		err := b.retry(ctx, func(ctx context.Context) error {
			_, err := b.js.Consumer(ctx, streamPOS, cfg.Durable)
			if !errors.Is(err, jetstream.ErrConsumerNotFound) {
				return err
			}
			if _, err = b.js.CreateConsumer(ctx, streamPOS, cfg); err == nil {
				b.log.Info("hub: asset created", "consumer", cfg.Durable)
			}
			return err
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("assets: consumer %s: %w", cfg.Durable, err))
		}
	}
	return errors.Join(errs...)
}

func (b *Broker) applyStream(ctx context.Context, cfg jetstream.StreamConfig) error {
	return b.retry(ctx, func(ctx context.Context) error {
		stream, err := b.js.Stream(ctx, cfg.Name)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			if _, err = b.js.CreateStream(ctx, cfg); err == nil {
				b.log.Info("hub: asset created", "stream", cfg.Name)
			}
			return err
		case err != nil:
			return err
		}
		has := stream.CachedInfo().Config
		if !b.embedded || has.MaxBytes == cfg.MaxBytes {
			return nil
		}
		b.log.Info("hub: stream resized", "stream", cfg.Name, "has", has.MaxBytes, "wants", cfg.MaxBytes)
		has.MaxBytes = cfg.MaxBytes
		_, err = b.js.UpdateStream(ctx, has)
		return err
	})
}

// difference is one setting of an asset that is not as it should be.
type difference struct {
	asset, field string
	has, wants   any
	do           string
}

func (d difference) Error() string {
	return fmt.Sprintf("%s: %s is %v, wants %v: %s", d.asset, d.field, d.has, d.wants, d.do)
}

// CheckAssets compares what the hub has with what it should have, and returns all
// differences, each with the asset, the field, what it has, what it wants and what to
// do; nil when there are none. More than wanted is none where more does no harm: a
// longer retention, a larger message. It changes nothing, and waits for an election or
// a lost connection until ctx ends.
func (b *Broker) CheckAssets(ctx context.Context) error {
	replicas, err := b.replicas(ctx)
	if err != nil {
		return fmt.Errorf("assets: %w", err)
	}
	if err := b.checkServer(); err != nil {
		return err
	}
	var errs []error
	missing := func(asset string) {
		errs = append(errs, fmt.Errorf("%s: missing: run `bridge assets apply`", asset))
	}
	posMissing := false
	for _, cfg := range streams(b.partitions, replicas, b.hub.maxBytes()) {
		var has jetstream.StreamConfig
		err := b.retry(ctx, func(ctx context.Context) error {
			stream, err := b.js.Stream(ctx, cfg.Name)
			if err == nil {
				has = stream.CachedInfo().Config
			}
			return err
		})
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			missing("stream " + cfg.Name)
			posMissing = posMissing || cfg.Name == streamPOS
		case err != nil:
			return fmt.Errorf("assets: stream %s: %w", cfg.Name, err)
		default:
			errs = append(errs, diffStream(has, cfg, b.hub)...)
		}
	}
	for p := 0; p < b.partitions && !posMissing; p++ {
		cfg := partitionConsumer(p, replicas)
		var has jetstream.ConsumerConfig
		err := b.retry(ctx, func(ctx context.Context) error {
			c, err := b.js.Consumer(ctx, streamPOS, cfg.Durable)
			if err == nil {
				has = c.CachedInfo().Config
			}
			return err
		})
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound) && cfg.MemoryStorage:
			// All servers went down together. ConsumePartition makes it anew.
		case errors.Is(err, jetstream.ErrConsumerNotFound):
			missing("consumer " + cfg.Durable)
		case err != nil:
			return fmt.Errorf("assets: consumer %s: %w", cfg.Durable, err)
		default:
			errs = append(errs, diffConsumer(has, cfg)...)
		}
	}
	return errors.Join(errs...)
}

func (b *Broker) checkServer() error {
	version := b.nc.ConnectedServerVersion()
	parts := strings.SplitN(version, ".", 3)
	if len(parts) == 3 {
		major, err1 := strconv.Atoi(parts[0])
		minor, err2 := strconv.Atoi(parts[1])
		if err1 == nil && err2 == nil && (major > minServerMajor || major == minServerMajor && minor >= minServerMinor) {
			return nil
		}
	}
	return fmt.Errorf("hub: server %q, wants %d.%d or later: upgrade it (resetting a consumer, which the order of events needs, is new there)",
		version, minServerMajor, minServerMinor)
}

var partitionOfTransform = regexp.MustCompile(`\{\{\s*[Pp]artition\(\s*(\d+)\s*,\s*1\s*\)\s*\}\}`)

// diff collects the differences of one asset.
type diff struct {
	asset, edit, anew string // what to do about what can be changed, and about what cannot
	found             []error
}

func (d *diff) equal(field string, has, wants any, do string) {
	if has != wants {
		d.found = append(d.found, difference{d.asset, field, has, wants, do})
	}
}

// least accepts more than wanted; unlimited is more.
func (d *diff) least(field string, has, wants int64, show func(int64) any) {
	if has < wants && has > 0 {
		d.found = append(d.found, difference{d.asset, field, show(has), fmt.Sprintf("at least %v", show(wants)), d.edit})
	}
}

func number(n int64) any   { return n }
func duration(n int64) any { return time.Duration(n) }

func diffStream(has, wants jetstream.StreamConfig, hub HubConfig) []error {
	d := &diff{
		asset: "stream " + wants.Name,
		edit:  "change it with `nats stream edit " + wants.Name + "`",
		anew:  "it cannot be changed: let the stream run empty, delete it, and run `bridge assets apply`",
	}
	d.equal("subjects", list(has.Subjects), list(wants.Subjects), d.edit)
	if has, wants := transform(has.SubjectTransform), transform(wants.SubjectTransform); has != wants {
		do := d.edit
		if m := partitionOfTransform.FindStringSubmatch(has); m != nil {
			do = "set hub.partitions: " + m[1] + ", which the stream was made with, or begin with a new stream"
		}
		d.equal("transform", has, wants, do)
	}
	d.equal("republish", republish(has.RePublish), republish(wants.RePublish), d.edit)
	d.equal("retention", has.Retention.String(), wants.Retention.String(), d.anew)
	d.equal("storage", has.Storage.String(), wants.Storage.String(), d.anew)
	d.equal("discard", has.Discard.String(), wants.Discard.String(), d.edit)
	d.equal("discard new per subject", has.DiscardNewPerSubject, wants.DiscardNewPerSubject, d.edit)
	switch {
	case hub.Replicas > 0:
		d.equal("replicas", has.Replicas, wants.Replicas, d.edit+", or hub.replicas")
	case has.Replicas < wants.Replicas:
		d.equal("replicas", has.Replicas, wants.Replicas, d.edit+", or set hub.replicas")
	}
	if hub.MaxBytes > 0 && wants.MaxBytes > 0 {
		d.equal("max bytes", has.MaxBytes, wants.MaxBytes, d.edit+", or hub.max_bytes")
	}
	if strings.HasPrefix(wants.Name, "KV_") { // how long, and how many: more is another bucket
		d.equal("max age", has.MaxAge, wants.MaxAge, d.edit)
		d.equal("messages for each subject", has.MaxMsgsPerSubject, wants.MaxMsgsPerSubject, d.edit)
	} else {
		d.least("max age", int64(has.MaxAge), int64(wants.MaxAge), duration)
		d.least("messages for each subject", has.MaxMsgsPerSubject, wants.MaxMsgsPerSubject, number)
		d.least("max consumers", int64(has.MaxConsumers), int64(wants.MaxConsumers), number)
	}
	d.equal("max messages", max(has.MaxMsgs, -1), int64(-1), d.edit)
	d.least("max message size", int64(has.MaxMsgSize), int64(wants.MaxMsgSize), number)
	d.least("duplicate window", int64(has.Duplicates), int64(wants.Duplicates), duration)
	d.equal("allow direct", has.AllowDirect, wants.AllowDirect, d.edit)
	d.equal("allow batch publish", has.AllowBatchPublish || !wants.AllowBatchPublish, true, d.edit)
	d.equal("allow rollup", has.AllowRollup, wants.AllowRollup, d.edit)
	d.equal("deny delete", has.DenyDelete, wants.DenyDelete, d.anew)
	d.equal("allow message TTL", has.AllowMsgTTL || !wants.AllowMsgTTL, true, d.edit)
	d.equal("delete marker TTL", has.SubjectDeleteMarkerTTL, wants.SubjectDeleteMarkerTTL, d.edit)
	d.equal("sealed", has.Sealed, false, d.anew)
	d.equal("no ack", has.NoAck, false, d.edit)
	d.equal("persist mode", has.PersistMode.String(), wants.PersistMode.String(), d.anew)
	d.equal("mirror", has.Mirror != nil, false, d.anew)
	d.equal("sources", len(has.Sources), 0, d.edit)
	return d.found
}

func diffConsumer(has, wants jetstream.ConsumerConfig) []error {
	d := &diff{
		asset: "consumer " + wants.Durable,
		edit:  "change it with `nats consumer edit POS " + wants.Durable + "`",
		anew:  "it cannot be changed: stop the bridge, delete it, and run `bridge assets apply` (the bridge then reads the stream from its start and skips what is reported)",
	}
	d.equal("filter", list(append(slices.Clone(has.FilterSubjects), has.FilterSubject)), list([]string{wants.FilterSubject}), d.edit)
	d.equal("deliver policy", has.DeliverPolicy.String(), wants.DeliverPolicy.String(), d.anew)
	d.equal("deliver subject", has.DeliverSubject, "", d.anew)
	d.equal("ack policy", has.AckPolicy.String(), wants.AckPolicy.String(), d.anew)
	d.equal("max deliver", has.MaxDeliver, wants.MaxDeliver, d.edit)
	d.equal("back-off", len(has.BackOff), 0, d.edit)
	d.least("ack wait", int64(has.AckWait), int64(wants.AckWait), duration)
	d.least("max ack pending", int64(has.MaxAckPending), int64(wants.MaxAckPending), number)
	d.equal("priority policy", has.PriorityPolicy, wants.PriorityPolicy, d.anew)
	d.equal("priority groups", list(has.PriorityGroups), list(wants.PriorityGroups), d.anew)
	if !wants.MemoryStorage {
		d.equal("memory storage", has.MemoryStorage, false, d.anew)
	}
	d.equal("headers only", has.HeadersOnly, false, d.edit)
	d.equal("replay", has.ReplayPolicy.String(), wants.ReplayPolicy.String(), d.anew)
	return d.found
}

func list(s []string) string {
	s = slices.DeleteFunc(slices.Clone(s), func(e string) bool { return e == "" })
	slices.Sort(s)
	return strings.Join(s, " ")
}

func transform(t *jetstream.SubjectTransformConfig) string {
	if t == nil {
		return "none"
	}
	return t.Source + " to " + t.Destination
}

func republish(r *jetstream.RePublish) string {
	if r == nil {
		return "none"
	}
	s := r.Source + " to " + r.Destination
	if r.HeadersOnly {
		s += " (headers only)"
	}
	return s
}
