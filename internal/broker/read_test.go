package broker

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func TestLastEventIsTheEdgesOwnAtTheSite(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	if _, _, err := b.LastEvent(deadline(t), "store-1", "edge-1"); !errors.Is(err, ErrNone) {
		t.Errorf("nothing published: %v, want ErrNone", err)
	}
	publish(t, b, "store-1", 1, 3)
	publish(t, b, "store-2", 1, 9)
	other := event("store-1", 7)
	other.Edge = "edge-2"
	if _, _, err := b.PublishEvent(deadline(t), other); err != nil {
		t.Fatal(err)
	}
	alert := event("store-1", 4)
	alert.Kind = "alert" // the last over all kinds
	want, _, err := b.PublishEvent(deadline(t), alert)
	if err != nil {
		t.Fatal(err)
	}
	e, seq, err := b.LastEvent(deadline(t), "store-1", "edge-1")
	if err != nil || e.Seq != 4 || e.Kind != "alert" || seq != want {
		t.Errorf("last event is %+v at %d, %v, want 4 at %d", e, seq, err, want)
	}
	if _, _, err := b.LastEvent(deadline(t), "store-1", "edge-3"); !errors.Is(err, ErrNone) {
		t.Errorf("an edge that published nothing: %v", err)
	}
	if _, _, err := b.LastEvent(deadline(t), "*", ">"); !errors.Is(err, ErrInvalid) {
		t.Errorf("everybody's last event: %v", err)
	}
	if _, err := b.js.Publish(deadline(t), "pos.store-1.order.edge-1", nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.LastEvent(deadline(t), "store-1", "edge-1"); !errors.Is(err, ErrMalformed) {
		t.Errorf("a malformed last event: %v", err)
	}
}

func TestAMessageCannotPretendToBeElsewhere(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	m, err := encodeEvent(event("store-1", 1))
	if err != nil {
		t.Fatal(err)
	}
	m.Header.Set("Nats-Sequence", "99")
	m.Header.Set("Nats-Subject", "pos.0.other.order.edge-1")
	m.Header.Set("Status", "404")
	if _, err := b.js.PublishMsg(deadline(t), m); err != nil {
		t.Fatal(err)
	}
	if e, seq, err := b.LastEvent(deadline(t), "store-1", "edge-1"); err != nil || seq != 1 || e.Site != "store-1" {
		t.Errorf("last event is %+v at %d, %v", e, seq, err)
	}
}

// publishReport publishes many quickly: their acknowledgements are waited for together.
func publishReport(t testing.TB, b *Broker, r *Report) {
	t.Helper()
	m, err := encodeReport(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.js.PublishMsgAsync(m, jetstream.WithStallWait(patience)); err != nil {
		t.Fatal(err)
	}
}

func reportsSince(t testing.TB, b *Broker, since time.Time, p int) []uint64 {
	t.Helper()
	var seqs []uint64
	if err := b.ReportsSince(deadline(t), since, p, func(r *Report) error {
		seqs = append(seqs, r.Seq)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return seqs
}

func TestReportsAreReadOnceInOrderUpToTheLast(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	if got := reportsSince(t, b, time.Time{}, AllPartitions); len(got) != 0 {
		t.Fatalf("reports %v before there are any", got)
	}
	here, elsewhere := siteOf(t, b, 1), siteOf(t, b, 2)
	const n = 2*readBatch + 10 // more than two batches
	var want, all []uint64
	for seq := uint64(1); seq <= n; seq++ {
		site := here
		if seq%3 == 0 {
			site = elsewhere
		} else {
			want = append(want, seq)
		}
		all = append(all, seq)
		publishReport(t, b, report(site, seq))
		if seq%100 == 0 { // what is between is passed over, and counted when it is malformed
			for _, subject := range []string{"kitchen." + here + ".bump", "kitchen." + here + ".report"} {
				if _, err := b.js.PublishAsync(subject, []byte("{}"), jetstream.WithStallWait(patience)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	<-b.js.PublishAsyncComplete()
	if got := reportsSince(t, b, time.Time{}, 1); !slices.Equal(got, want) {
		t.Errorf("%d reports of the partition, want %d", len(got), len(want))
	}
	if got := reportsSince(t, b, time.Now().Add(-time.Hour), AllPartitions); !slices.Equal(got, all) {
		t.Errorf("%d reports of all partitions, want %d", len(got), len(all))
	}
	if got := reportsSince(t, b, time.Now().Add(time.Hour), AllPartitions); len(got) != 0 {
		t.Errorf("%d reports of the future", len(got))
	}
	stream, err := b.js.Stream(deadline(t), streamKitchen)
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Consumers; n != 0 {
		t.Errorf("%d consumers are left behind", n)
	}
}

func TestReportsEndWithTheCallersError(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	for seq := uint64(1); seq <= 3; seq++ {
		if err := b.PublishReport(deadline(t), report("store-1", seq)); err != nil {
			t.Fatal(err)
		}
	}
	enough := errors.New("enough")
	calls := 0
	err := b.ReportsSince(deadline(t), time.Time{}, AllPartitions, func(*Report) error {
		calls++
		return enough
	})
	if !errors.Is(err, enough) || calls != 1 {
		t.Errorf("%d calls, error %v", calls, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.ReportsSince(ctx, time.Time{}, AllPartitions, func(*Report) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("told to stop: %v", err)
	}
}

func TestReportsSurviveThatTheOldestAreRemoved(t *testing.T) {
	t.Parallel()
	_, b := embedded(t, small)
	for seq := uint64(1); seq <= readBatch+100; seq++ {
		publishReport(t, b, report("store-1", seq))
	}
	<-b.js.PublishAsyncComplete()
	stream, err := b.js.Stream(deadline(t), streamKitchen)
	if err != nil {
		t.Fatal(err)
	}
	read := 0
	err = b.ReportsSince(deadline(t), time.Time{}, AllPartitions, func(r *Report) error {
		if read++; read == 1 { // all that is not in the batch under way is removed
			return stream.Purge(deadline(t))
		}
		return nil
	})
	if err != nil || read < 1 || read > readBatch {
		t.Errorf("%d read, %v", read, err)
	}
}

func TestReportsAreFollowedForTheSitesAsked(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	b := remote(t, "edge-1", p.hub.ClientURL())
	apply(t, b)
	reports := followed(t, b, "store-1", "store-2", "store-1")
	for _, site := range []string{"store-3", "store-1", "store-2"} {
		if err := b.PublishReport(deadline(t), report(site, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := b.js.Publish(deadline(t), "kitchen.store-1.report", []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if r := <-reports; r.Site != "store-1" || r.State != StateDelivered {
		t.Errorf("first report is %+v", r)
	}
	if r := <-reports; r.Site != "store-2" {
		t.Errorf("second report is %+v", r)
	}

	p.stop()
	p.start()
	eventually(t, "connected again", b.Connected)
	if err := b.PublishReport(deadline(t), report("store-2", 2)); err != nil {
		t.Fatal(err)
	}
	if r := <-reports; r.Site != "store-2" || r.Seq != 2 {
		t.Errorf("report after a restart of the hub is %+v", r)
	}
	if err := b.FollowReports(t.Context(), []string{">"}, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("everybody's reports: %v", err)
	}
}
