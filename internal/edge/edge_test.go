package edge

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// safeLog is a log that may be read while it is written.
type safeLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *safeLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *safeLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// freeAddr is an address that nobody listened on a moment ago.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// running is an edge under Run, with a fake hub and the test's keys.
type running struct {
	*rig
	addrs []net.Addr
	log   *safeLog
	stop  func() error // tells it to stop, and returns what Run returned
}

func runEdge(t *testing.T, hub hub, change func(*Config)) *running {
	t.Helper()
	out := &running{log: new(safeLog)}
	out.rig = newRig(t, func(c *Config) {
		c.Log = textLog(out.log)
		c.Listen = []ListenConfig{{Addr: "127.0.0.1:0"}}
		c.Admin.Listen = freeAddr(t)
		if change != nil {
			change(c)
		}
	})
	e := out.edge
	listeners, err := e.listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range listeners {
		out.addrs = append(out.addrs, l.Addr())
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- e.run(ctx, hub, listeners) }()
	out.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return errors.New("did not stop in 20 s")
		}
	})
	t.Cleanup(func() { out.stop() })
	return out
}

func (r *running) url(i int) string { return "http://" + r.addrs[i].String() }

// fullHub is a hub that stores, or does what publish says.
type fullHub struct {
	*scriptedHub
	fakeHub
}

func newFullHub() *fullHub { return &fullHub{scriptedHub: &scriptedHub{}} }

func (h *fullHub) Connected() bool { return h.scriptedHub.Connected() }

func send(t *testing.T, client *http.Client, base string, c call) (int, string) {
	t.Helper()
	resp, err := client.Do(c.request(base))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func testClient(t *testing.T) *http.Client {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestRunServesAndStops(t *testing.T) {
	h := newFullHub()
	h.durability = "fsync"
	r := runEdge(t, h, nil)
	client := testClient(t)
	if status, body := send(t, client, r.url(0), call{token: tokenTill1, body: order, header: with("Prefer", "wait=0")}); status != 202 || !strings.Contains(body, `"durability":"fsync"`) {
		t.Fatalf("%d %s", status, body)
	}
	admin := "http://" + r.edge.cfg.Admin.Listen
	get := func(path string) (int, string) {
		return send(t, client, admin, call{method: http.MethodGet, path: path})
	}
	if status, body := get("/readyz"); status != 200 {
		t.Errorf("readyz: %d %s", status, body)
	}
	if status, body := get("/metrics"); status != 200 {
		t.Errorf("metrics: %d", status)
	} else {
		for _, want := range []string{`kb_edge_requests_total{kind="order",outcome="accepted"} 1`, "kb_edge_unsettled 1", "kb_edge_unknown 0", "kb_edge_accept_seconds_count 1", "go_goroutines"} {
			if !strings.Contains(body, want) {
				t.Errorf("metrics lack %q", want)
			}
		}
	}
	h.mu.Lock()
	h.scriptedHub.away = true
	h.mu.Unlock()
	r.portal.ready = errors.New("keysync: no keys of site unread: refused")
	status, body := get("/readyz")
	if status != 503 || !strings.Contains(body, "no connection for 3s") || !strings.Contains(body, "no keys of site unread") {
		t.Errorf("readyz for ops: %d %s", status, body)
	}
	status, body = send(t, client, r.url(0), call{method: http.MethodGet, path: "/readyz"})
	if status != 503 || strings.Contains(body, "unread") || !strings.Contains(body, `"hub"`) || !strings.Contains(body, `"keys"`) {
		t.Errorf("readyz for POS: %d %s", status, body)
	}
	client.CloseIdleConnections()
	if err := r.stop(); err != nil {
		t.Errorf("told to stop: %v", err)
	}
	if log := r.log.String(); !strings.Contains(log, "stopped with unsettled messages") || !strings.Contains(log, "messages=1") {
		t.Errorf("the log does not say what was left behind:\n%s", log)
	}
	if _, err := net.DialTimeout("tcp", r.addrs[0].String(), time.Second); err == nil {
		t.Error("still listening")
	}
}

// A stop lets what is being stored be stored, and answers what waits for a Kitchen.
func TestStopFinishesRequestsInFlight(t *testing.T) {
	h := newFullHub()
	storing, goOn := make(chan struct{}), make(chan struct{})
	h.publish = func(_ context.Context, e *broker.Event, _ int) fate {
		if e.Site == "gcm" {
			close(storing)
			<-goOn
		}
		return fate{store: true}
	}
	r := runEdge(t, h, nil)
	client := testClient(t)
	var wg sync.WaitGroup
	for _, token := range []string{tokenTill1, tokenOK} {
		wg.Go(func() {
			want := 202
			if token == tokenOK {
				want = 200
			}
			resp, err := client.Do(call{token: token, body: order, header: with("Prefer", "wait=20")}.request(r.url(0)))
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			if resp.StatusCode != want {
				t.Errorf("status %d, want %d", resp.StatusCode, want)
			}
		})
	}
	<-storing
	eventually(t, "the other one waits for its Kitchen", func() bool { return r.edge.register.waiting() == 2 && h.published() == 2 })
	stopped := make(chan error, 1)
	go func() { stopped <- r.stop() }()
	eventually(t, "the edge is stopping", func() bool { return strings.Contains(r.log.String(), "stopping") })
	close(goOn)
	wg.Wait()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// What does not finish within the limit is cut off, and the log says so.
func TestStopCutsOffWhatTakesTooLong(t *testing.T) {
	h := newFullHub()
	storing := make(chan struct{})
	h.publish = func(ctx context.Context, _ *broker.Event, _ int) fate {
		close(storing)
		<-ctx.Done()
		return lost
	}
	r := runEdge(t, h, func(c *Config) { c.Shutdown, c.CommitWait = 50*time.Millisecond, time.Minute })
	var wg sync.WaitGroup
	wg.Go(func() {
		resp, err := testClient(t).Do(call{token: tokenTill1, body: order}.request(r.url(0)))
		if err == nil {
			resp.Body.Close()
		}
	})
	<-storing
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	for _, want := range []string{"they were cut off", "stopped before the outcome of an event was known"} {
		if !strings.Contains(r.log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, r.log)
		}
	}
}

func TestRunNamesWhatItCannotDo(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	addr := taken.Addr().String()

	r := newRig(t, func(c *Config) { c.Listen = []ListenConfig{{Addr: "127.0.0.1:0"}, {Addr: addr, Site: "gcm"}} })
	if err := r.edge.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "listen[1].addr: ") || !strings.Contains(err.Error(), addr) {
		t.Errorf("taken address: %v", err)
	}

	h := newFullHub()
	failing := newRig(t, func(c *Config) { c.Listen, c.Admin.Listen = []ListenConfig{{Addr: "127.0.0.1:0"}}, addr })
	listeners, err := failing.edge.listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := failing.edge.run(t.Context(), h, listeners); err == nil || !strings.Contains(err.Error(), "admin.listen: ") {
		t.Errorf("taken admin address: %v", err)
	}
	for _, l := range listeners {
		l.Close()
	}
}

func TestRunEndsWhenAPartOfItFails(t *testing.T) {
	h := &brokenHub{newFullHub()}
	failing := newRig(t, func(c *Config) { c.Listen, c.Admin.Listen = []ListenConfig{{Addr: "127.0.0.1:0"}}, freeAddr(t) })
	listeners, err := failing.edge.listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := failing.edge.run(t.Context(), h, listeners); err == nil || err.Error() != "reports: not permitted" {
		t.Errorf("%v", err)
	}
}

type brokenHub struct{ *fullHub }

func (brokenHub) FollowReports(context.Context, []string, func(*broker.Report)) error {
	return errors.New("not permitted")
}

func TestNewReportsMissingFilesAllAtOnce(t *testing.T) {
	dir := t.TempDir()
	c := testConfig()
	c.Portal.TokenFile = filepath.Join(dir, "token")
	c.BindingFile = filepath.Join(dir, "binding.json")
	c.Listen = []ListenConfig{{Addr: "127.0.0.1:0", TLS: TLSConfig{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}}}
	_, err := New(c)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"listen[0].tls: ", "cert.pem", "portal.token_file: ", "binding_file: "} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing from:\n%v", want, err)
		}
	}
	if _, err := New(Config{}); err == nil || !strings.Contains(err.Error(), "name: ") {
		t.Errorf("an empty configuration: %v", err)
	}
}

// certificate writes a key pair for 127.0.0.1 and returns who to trust.
func certificate(t *testing.T) (TLSConfig, *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "edge"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := TLSConfig{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if err := errors.Join(os.WriteFile(c.CertFile, certPEM, 0o600),
		os.WriteFile(c.KeyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return c, pool
}

func TestListenerWithTLSSpeaksNothingElse(t *testing.T) {
	c, trusted := certificate(t)
	r := runEdge(t, newFullHub(), func(cfg *Config) {
		cfg.Listen = []ListenConfig{{Addr: "127.0.0.1:0", TLS: c}, {Addr: "127.0.0.1:0", Site: "ctr"}}
	})
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: trusted}, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr}).Do(call{token: tokenTill1, body: order, header: with("Prefer", "wait=0")}.request("https://" + r.addrs[0].String()))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 202 || resp.TLS.Version < tls.VersionTLS12 || resp.ProtoMajor != 1 {
		t.Errorf("status %d, TLS %x, %s", resp.StatusCode, resp.TLS.Version, resp.Proto)
	}
	if _, err := tls.Dial("tcp", r.addrs[0].String(), &tls.Config{RootCAs: trusted, MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 was spoken")
	}
	client := testClient(t)
	if status, _ := send(t, client, r.url(0), call{token: tokenTill1, body: order}); status != 400 {
		t.Errorf("without TLS: %d", status)
	}
	if status, body := send(t, client, r.url(1), call{body: order, header: with("Prefer", "wait=0")}); status != 202 {
		t.Errorf("the other address, of a site without authorization: %d %s", status, body)
	}
}

func TestServerHasLimits(t *testing.T) {
	r := runEdge(t, newFullHub(), nil)
	s := r.edge.server(0, r.ingest)
	if s.ReadHeaderTimeout <= 0 || s.ReadTimeout <= 0 || s.WriteTimeout <= s.ReadTimeout+r.edge.cfg.CommitWait+r.edge.cfg.MaxWait || s.IdleTimeout <= 0 || s.MaxHeaderBytes <= 0 {
		t.Errorf("%+v", s)
	}
	conn, err := net.Dial("tcp", r.addrs[0].String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /order HTTP/1.1\r\nHost: edge\r\nX: %s\r\n\r\n", strings.Repeat("x", 64<<10))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("64 KiB of headers: %d", resp.StatusCode)
	}
}

// A body that does not come holds nobody up but its own request.
func TestABodyThatDoesNotComeWhole(t *testing.T) {
	r := runEdge(t, newFullHub(), nil)
	conn, err := net.Dial("tcp", r.addrs[0].String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /order HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"_id\"", tokenTill1)
	eventually(t, "it is read", func() bool { return len(r.edge.sites["gcm"].gate) == 1 })
	conn.Close()
	eventually(t, "its place is free again", func() bool { return len(r.edge.sites["gcm"].gate) == 0 })
	if got := r.edge.register.waiting(); got != 0 {
		t.Errorf("%d registered", got)
	}
	if got := counted(t, r.edge.metrics.requests.WithLabelValues("order", string(outcomeDisappeared))); got != 1 {
		t.Errorf("%d counted", got)
	}
}

func TestRunWarnsOfTokensInClear(t *testing.T) {
	r := runEdge(t, newFullHub(), func(c *Config) {
		delete(c.Sites, "ctr")
		c.Listen = []ListenConfig{{Addr: "0.0.0.0:0"}}
	})
	eventually(t, "it is up", func() bool { return strings.Contains(r.log.String(), "edge is up") })
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(r.log.String(), "tokens and plain orders can be read") {
		t.Errorf("no warning:\n%s", r.log)
	}
	for _, secret := range []string{tokenTill1, phrase} {
		if strings.Contains(r.log.String(), secret) {
			t.Error("the log holds a secret")
		}
	}
}

var _ keys = (*keysync.Keys)(nil)
