package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	reportFilter = "kitchen.*." + KindReport
	readBatch    = 512     // messages of one direct get
	readBytes    = 4 << 20 // or so many bytes
	readSilence  = 3 * time.Second
	readAgain    = 50 * time.Millisecond
	// clockSlack is how far the clocks of two servers of a cluster may be apart: POS and
	// KITCHEN can have different leaders, and each stamps with its own.
	clockSlack = 2 * time.Minute
	liveQueue  = 8192
)

// AllPartitions, given to ReportsSince, reads the reports of every site.
const AllPartitions = -1

// ReportsSince hands f each report of partition p's sites that KITCHEN has stored
// since t, in stream order, up to the last one stored when it was called; it then
// returns nil. It begins somewhat before t, and leaves nothing on the hub. A malformed
// report is counted, logged and passed over. When f fails it ends with f's error.
func (b *Broker) ReportsSince(ctx context.Context, t time.Time, p int, f func(*Report) error) error {
	last, err := b.askLeader(ctx, streamKitchen, reportFilter, 0)
	if errors.Is(err, ErrNone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reports since %v: %w", t, err)
	}
	start := t.Add(-clockSlack)
	if start.Before(time.Unix(0, 0)) {
		start = time.Unix(0, 0)
	}
	if last.Stored.Before(start) {
		return nil
	}
	next := uint64(0) // the sequence to go on from; 0: from the time
	for next <= last.Seq {
		read, err := b.readReports(ctx, start, next, last.Seq, p, f)
		if err != nil {
			return fmt.Errorf("reports since %v: %w", t, err)
		}
		if read > 0 {
			next = read + 1
			continue
		}
		// "No more" below the last sequence: either a replica that lags answered, or what
		// was between has been removed since. The leader knows.
		from := next
		if from == 0 {
			from = 1
		}
		ahead, err := b.askLeader(ctx, streamKitchen, reportFilter, from)
		if errors.Is(err, ErrNone) || err == nil && (ahead.Seq > last.Seq || ahead.Stored.After(last.Stored)) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reports since %v: %w", t, err)
		}
		if !pause(ctx, readAgain) {
			return fmt.Errorf("reports since %v: %w", t, context.Cause(ctx))
		}
	}
	return nil
}

// readReports reads one batch, from sequence next, or from the time start when that is
// 0, and not beyond last. It returns the sequence of the last message that has come
// without a hole before it; 0 when none has.
func (b *Broker) readReports(ctx context.Context, start time.Time, next, last uint64, p int, f func(*Report) error) (uint64, error) {
	life, end, err := b.session(ctx)
	if err != nil {
		return 0, err
	}
	defer end()
	query := struct {
		Seq      uint64     `json:"seq,omitempty"`
		Start    *time.Time `json:"start_time,omitempty"`
		NextFor  string     `json:"next_by_subj"`
		Batch    int        `json:"batch"`
		MaxBytes int        `json:"max_bytes"`
	}{Seq: next, NextFor: reportFilter, Batch: readBatch, MaxBytes: readBytes}
	if next == 0 {
		query.Start = &start
	}
	body, err := json.Marshal(query)
	if err != nil {
		return 0, err
	}
	in := make(chan *nats.Msg, readBatch+8)
	inbox := b.nc.NewInbox()
	sub, err := b.nc.ChanSubscribe(inbox, in)
	if err != nil {
		return 0, err
	}
	defer sub.Unsubscribe()
	if err := b.nc.PublishRequest(directGet+streamKitchen, inbox, body); err != nil {
		return 0, nil // not connected just now
	}

	var read uint64
	silence := time.NewTimer(readSilence)
	defer silence.Stop()
	for {
		var m *nats.Msg
		select {
		case m = <-in:
		case <-silence.C:
			return read, nil
		case <-life.Done():
			if ctx.Err() != nil {
				return read, context.Cause(ctx)
			}
			return read, nil
		}
		at, err := parseStored(m)
		if err != nil { // the end of the batch, nothing found, nobody there: go on from what has come
			return read, nil
		}
		if at.previous != read || at.seq <= read {
			return read, nil // a message of the batch was lost on its way
		}
		if at.seq > last {
			return last, nil
		}
		read = at.seq
		silence.Reset(readSilence)
		r, err := decodeReport(at.subject, m.Header, m.Data)
		if err != nil {
			b.malformedReport(at.subject, at.seq, err)
			continue
		}
		if p != AllPartitions && b.PartitionOf(r.Site) != p {
			continue
		}
		if err := f(r); err != nil {
			return read, err
		}
	}
}

func (b *Broker) malformedReport(subject string, seq uint64, err error) {
	b.metrics.malformed.WithLabelValues("report").Inc()
	b.log.Error("hub: malformed report passed over", "subject", subject, "stream_seq", seq, "err", err)
}

// FollowReports hands f each report of the sites as the hub stores it, from the moment
// the hub knows of the subscriptions, until ctx ends; it then returns nil. There is one
// subscription for each site, so that an edge receives its own sites' reports and no
// more. Reports are missed while there is no connection, and when more than 8,192 wait
// for f (counted as a slow consumer); a malformed one is counted, logged and passed over.
func (b *Broker) FollowReports(ctx context.Context, sites []string, f func(*Report)) error {
	in := make(chan *nats.Msg, liveQueue)
	for _, site := range slices.Compact(slices.Sorted(slices.Values(sites))) {
		if err := envelope.ValidName(site); err != nil {
			return fmt.Errorf("follow reports: %w: site: %w", ErrInvalid, err)
		}
		sub, err := b.nc.ChanSubscribe("live.kitchen."+site+"."+KindReport, in)
		if err != nil {
			return fmt.Errorf("follow reports of %s: %w", site, err)
		}
		defer sub.Unsubscribe()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-b.closed:
			return fmt.Errorf("follow reports: %w", errClosed)
		case m := <-in:
			r, err := decodeReport(m.Subject, m.Header, m.Data)
			if err != nil {
				b.malformedReport(m.Subject, 0, err)
				continue
			}
			f(r)
		}
	}
}
