package router

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// *broker.Broker is a Hub.
var _ Hub = (*broker.Broker)(nil)

// realHub starts a hub in this process and connects to it as a bridge does.
func realHub(t *testing.T) *broker.Broker {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	cfg := broker.HubConfig{MaxBytes: 64 << 20}
	embedded, err := broker.StartEmbedded(broker.EmbeddedConfig{HubConfig: cfg, DataDir: t.TempDir(), Log: quietLog})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(embedded.Shutdown)
	hub, err := broker.Connect(ctx, broker.ConnectConfig{HubConfig: cfg, Name: "bridge", Embedded: embedded, Log: quietLog})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hub.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := hub.ApplyAssets(ctx); err != nil {
		t.Fatal(err)
	}
	return hub
}

// runOn runs a router on a hub until the returned function is called.
func runOn(t *testing.T, hub Hub, keys Keys, kitchen http.HandlerFunc, sites ...string) (stop func()) {
	t.Helper()
	s := server(t, kitchen)
	cfg := Config{Log: quietLog, AttemptTimeout: 20 * time.Second, Settle: time.Millisecond, Sites: make(map[string]KitchenConfig)}
	for _, site := range sites {
		cfg.Sites[site] = KitchenConfig{URL: s.URL + "/" + site}
	}
	r, err := New(cfg, hub, keys)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// ledger is what the Kitchens of a test got, by site.
type ledger struct {
	mu   sync.Mutex
	seqs map[string][]string
}

func (l *ledger) got(site string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.seqs[site])
}

// take notes a request; the paths are /<site>/<kind>.
func (l *ledger) take(r *http.Request) (site, seq string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	site, seq = r.PathValue("site"), r.Header.Get("Kb-Seq")
	if l.seqs == nil {
		l.seqs = make(map[string][]string)
	}
	l.seqs[site] = append(l.seqs[site], seq)
	return site, seq
}

// reports reads until the log has n of them.
func reports(t *testing.T, hub *broker.Broker, n int) []*broker.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		var all []*broker.Report
		err := hub.ReportsSince(ctx, time.Unix(0, 0), broker.AllPartitions, func(r *broker.Report) error {
			all = append(all, r)
			return nil
		})
		if err != nil {
			t.Fatalf("%d of %d reports: %v", len(all), n, err)
		}
		if len(all) >= n {
			return all
		}
	}
}

func TestOnARealHub(t *testing.T) {
	hub := realHub(t)
	sites := []string{"s1", "s2", "s3"}
	keys := testKeys(t, sites...)
	e := newEdge(keys)
	publish := func(site string, opts ...eventOption) {
		ev := e.event(t, site, opts...)
		if _, _, err := hub.PublishEvent(t.Context(), &ev); err != nil {
			t.Fatal(err)
		}
	}
	var l ledger
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{site}/{kind}", func(w http.ResponseWriter, r *http.Request) {
		if _, seq := l.take(r); seq == "5" {
			w.WriteHeader(http.StatusUnprocessableEntity)
		}
	})
	for range 5 { // before the start
		for _, site := range sites {
			publish(site)
		}
	}
	stop := runOn(t, hub, keys, mux.ServeHTTP, sites...)
	for range 5 { // while it runs
		for _, site := range sites {
			publish(site)
		}
	}
	publish("s2", within(-time.Second)) // 11: expired before it was stored
	forged := e.event(t, "s3")          // 11
	forged.ID = "another"
	if _, _, err := hub.PublishEvent(t.Context(), &forged); err != nil {
		t.Fatal(err)
	}
	publish("s3") // 12
	all := reports(t, hub, 32)
	stop()

	want := []string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}
	for site, want := range map[string][]string{"s1": want, "s2": want, "s3": append(slices.Clone(want), "12")} {
		if got := l.got(site); !slices.Equal(got, want) {
			t.Errorf("%s got %v", site, got)
		}
	}
	if len(all) != 32 {
		t.Errorf("%d reports on 32 events that verify", len(all))
	}
	for _, r := range all {
		if err := keys.Site(r.Site).Binding.VerifyReport(&r.Report, r.Bind, r.Tag); err != nil {
			t.Error(err)
		}
		st, reason := "delivered", "accepted"
		if r.Seq == 5 {
			st, reason = "failed", "refused"
		}
		if r.Site == "s2" && r.Seq == 11 {
			st, reason = "failed", "expired"
		}
		if r.State != st || r.Reason != reason {
			t.Errorf("%s %d: %s, %s", r.Site, r.Seq, r.State, r.Reason)
		}
	}

	// The next owner finds everything acknowledged.
	publish("s1")
	stop = runOn(t, hub, keys, mux.ServeHTTP, sites...)
	reports(t, hub, 33)
	stop()
	if got := l.got("s1"); !slices.Equal(got, append(want, "11")) {
		t.Errorf("after a restart s1 got %v", got)
	}
}

// forgetful loses every acknowledgement, as a kill before it does.
type forgetful struct{ *broker.Broker }

func (f forgetful) ConsumePartition(ctx context.Context, p int, takeover func(context.Context, broker.Takeover) error, h func(*broker.Delivery)) error {
	return f.Broker.ConsumePartition(ctx, p, takeover, func(d *broker.Delivery) {
		d.AckFunc = nil
		h(d)
	})
}

func TestReportLogOnARealHub(t *testing.T) {
	hub := realHub(t)
	keys := testKeys(t, "s1")
	e := newEdge(keys)
	var l ledger
	mux := http.NewServeMux()
	mux.HandleFunc("POST /{site}/{kind}", func(w http.ResponseWriter, r *http.Request) { l.take(r) })
	publish := func() {
		ev := e.event(t, "s1")
		if _, _, err := hub.PublishEvent(t.Context(), &ev); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		publish()
	}
	stop := runOn(t, forgetful{hub}, keys, mux.ServeHTTP, "s1")
	reports(t, hub, 10)
	stop()
	publish()
	stop = runOn(t, hub, keys, mux.ServeHTTP, "s1")
	reports(t, hub, 11)
	stop()
	var want []string
	for i := range 11 {
		want = append(want, fmt.Sprint(i+1))
	}
	if got := l.got("s1"); !slices.Equal(got, want) {
		t.Errorf("the Kitchen got %v: what the report log has was posted again", got)
	}
}
