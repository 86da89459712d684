package keysync

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cheap settings: what is tested here is when a key is derived, not how long it takes.
var cheap = envelope.Settings{Profile: envelope.A256GCM, Iterations: 1}

// logBook collects log lines as JSON.
type logBook struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBook) logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// lines returns "LEVEL message" of every line.
func (b *logBook) lines(t *testing.T) []string {
	t.Helper()
	var out []string
	for line := range strings.Lines(b.String()) {
		var l struct{ Level, Msg string }
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		out = append(out, l.Level+" "+l.Msg)
	}
	return out
}

func (b *logBook) clear() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf.Reset()
}

// rig is a Keys under test with what it writes.
type rig struct {
	*Keys
	log *logBook
	reg *prometheus.Registry
}

// fetches returns the counter's values that are not zero, by result.
func (r rig) fetches(t *testing.T) map[string]int {
	t.Helper()
	out := map[string]int{}
	for name, v := range r.metrics(t) {
		if result, ok := strings.CutPrefix(name, "kb_keysync_fetch_total "); ok && v != 0 {
			out[result] = int(v)
		}
	}
	return out
}

func (r rig) metrics(t *testing.T) map[string]float64 {
	t.Helper()
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := []string{f.GetName()}
			for _, l := range m.GetLabel() {
				name = append(name, l.GetValue())
			}
			out[strings.Join(name, " ")] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return out
}

func newRig(t *testing.T, cfg Config) rig {
	t.Helper()
	r := rig{log: &logBook{}, reg: prometheus.NewRegistry()}
	cfg.Log, cfg.Metrics = r.log.logger(), r.reg
	if cfg.BindingFile == "" {
		cfg.NoBinding = true
	}
	var err error
	if r.Keys, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}

// startPortal starts the stub with encrypting sites of these names.
func startPortal(t *testing.T, sites ...string) *portal.Portal {
	t.Helper()
	cfg := portal.Config{Sites: map[string]portal.SiteConfig{}}
	for _, s := range sites {
		cfg.Sites[s] = portal.SiteConfig{Encryption: true}
	}
	p, err := portal.Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// against configures the client of that stub, by its static token.
func against(t *testing.T, p *portal.Portal, sites ...string) Config {
	t.Helper()
	ca, token, _, err := p.WriteCredentials(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return Config{Portal: PortalConfig{URL: p.URL(), TokenFile: token, CAFile: ca}, Sites: settingsOf(sites...)}
}

func settingsOf(sites ...string) map[string]envelope.Settings {
	m := map[string]envelope.Settings{}
	for _, s := range sites {
		m[s] = cheap
	}
	return m
}

// fakePortal answers in place of the client: no network, so that synctest's time can run.
type fakePortal struct {
	delay time.Duration // of each answer

	mu       sync.Mutex
	docs     map[string][]byte
	errs     map[string]error
	asked    []time.Time
	bySite   map[string][]time.Time
	underWay int
	most     int
}

func newFakePortal() *fakePortal {
	return &fakePortal{docs: map[string][]byte{}, errs: map[string]error{}, bySite: map[string][]time.Time{}}
}

func (f *fakePortal) get(ctx context.Context, site, _ string) (answer, error) {
	f.mu.Lock()
	f.asked = append(f.asked, time.Now())
	f.bySite[site] = append(f.bySite[site], time.Now())
	f.underWay++
	f.most = max(f.most, f.underWay)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.underWay--
		f.mu.Unlock()
	}()
	if f.delay > 0 {
		select {
		case <-time.After(f.delay):
		case <-ctx.Done():
			return answer{}, context.Cause(ctx)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.errs[site]; err != nil {
		return answer{}, err
	}
	if f.docs[site] == nil {
		return answer{}, refusal("the Portal", 404, nil)
	}
	return answer{body: f.docs[site]}, nil
}

func (f *fakePortal) set(site string, doc []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.docs[site] = doc
}

// fail makes the site's answers fail; nil mends them.
func (f *fakePortal) fail(site string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errs[site] = err
}

// all returns when anything was asked, and the most requests under way at once.
func (f *fakePortal) all() (_ []time.Time, most int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.asked), f.most
}

func (f *fakePortal) count(site string) int { return len(f.times(site)) }

func (f *fakePortal) times(site string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.bySite[site])
}

// fakeRig is a rig on a fakePortal; poll 0 is the default of a minute.
func fakeRig(t *testing.T, f *fakePortal, poll time.Duration, sites ...string) rig {
	t.Helper()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, Config{Portal: PortalConfig{URL: "https://portal.example", TokenFile: token, Poll: poll}, Sites: settingsOf(sites...)})
	r.get = f.get
	return r
}

// run runs the rig until the returned func is called, which fails the test unless Run
// then ends well.
func (r rig) run(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v, want nil when told to stop", err)
		}
	})
}

// testKey is a key of a document made in a test.
type testKey struct {
	fp           string
	after, until time.Time
}

// siteObject writes a document as the Portal does.
func siteObject(encryption bool, keys ...testKey) []byte {
	type wire struct {
		Fingerprint string    `json:"fingerprint"`
		Value       string    `json:"value"`
		ValidAfter  time.Time `json:"valid_after"`
		ValidUntil  time.Time `json:"valid_until"`
	}
	block := map[string]any{"encryption": encryption}
	if encryption {
		list := []wire{}
		for _, k := range keys {
			list = append(list, wire{k.fp, "phrase of " + k.fp, k.after.UTC(), k.until.UTC()})
		}
		block["keys"] = list
	}
	b, err := json.Marshal(map[string]any{"name": "a store", "security": map[string]any{"enterprise_kitchen": block}})
	if err != nil {
		panic(err)
	}
	return b
}

// lasting is a key valid from an hour ago for a year.
func lasting(fp string) testKey {
	now := time.Now()
	return testKey{fp, now.Add(-time.Hour), now.AddDate(1, 0, 0)}
}

// fingerprints of a site's ring, sorted.
func fingerprints(s *Site) []string {
	out := []string{}
	for _, k := range s.Keyring.Keys() {
		out = append(out, k.Fingerprint())
	}
	slices.Sort(out)
	return out
}

// await polls until ok, for at most ten seconds of real time.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("gave up waiting for %s", what)
		}
	}
}

// reasonOf takes the reason out of an error.
func reasonOf(err error) string {
	if bad, ok := errors.AsType[*fetchError](err); ok {
		return string(bad.reason)
	}
	return fmt.Sprintf("%T", err)
}
