package broker

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

func TestEmbeddedHubRefuses(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	inUse := t.TempDir()
	startHub(t, small, inUse)
	file := write(t, "file", "")
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "jetstream"), nil, 0o600); err != nil {
		t.Fatal(err)
	}

	for _, row := range []struct {
		name string
		cfg  HubConfig
		dir  string
		want string
	}{
		{"a folder that another hub uses", small, inUse, fmt.Sprintf("in use by the hub of process %d", os.Getpid())},
		{"an address that is taken", HubConfig{Listen: taken.Addr().String()}, t.TempDir(), "listen on " + taken.Addr().String()},
		{"a folder that is a file", small, file, "data folder"},
		{"a folder it cannot make", small, filepath.Join(file, "below"), "data folder"},
		{"a folder it cannot write to", small, broken, "JetStream"},
		{"no folder", small, "", "no data folder"},
		{"a hub elsewhere", HubConfig{URLs: []string{"nats://hub:1"}}, t.TempDir(), "none is embedded"},
		{"wrong settings", HubConfig{Sync: "never"}, t.TempDir(), "sync"},
		{"a password file that is not there", HubConfig{Listen: "127.0.0.1:0", Users: []UserConfig{{Name: "a", PasswordFile: file + "-", Role: RoleOps}}}, t.TempDir(), "users[0].password_file"},
		{"an empty password", HubConfig{Listen: "127.0.0.1:0", Users: []UserConfig{{Name: "a", PasswordFile: file, Role: RoleOps}}}, t.TempDir(), "the first line is empty"},
		{"a certificate that is none", HubConfig{Listen: "127.0.0.1:0", CertFile: file, KeyFile: file}, t.TempDir(), "cert_file, key_file"},
	} {
		t.Run(row.name, func(t *testing.T) {
			hub, err := StartEmbedded(EmbeddedConfig{HubConfig: row.cfg, DataDir: row.dir, Log: quiet})
			if err == nil {
				hub.Shutdown()
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), row.want) {
				t.Errorf("error is %q, want %q in it", err, row.want)
			}
			if row.dir == "" || row.dir == inUse || row.dir == file {
				return
			}
			// What was refused leaves the folder free.
			if unlock, err := lockFile(filepath.Join(row.dir, "hub.lock")); err == nil {
				unlock()
			} else if !strings.HasPrefix(row.dir, file) {
				t.Errorf("the folder is still locked: %v", err)
			}
		})
	}
}

const holdLockEnv = "KB_TEST_HOLD_LOCK"

// holdLock makes this process one that holds the lock of a data folder until it is killed.
func holdLock() {
	if _, err := lockFile(os.Getenv(holdLockEnv)); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("locked")
	select {}
}

func TestDataFolderIsFreeOnceItsProcessIsKilled(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	other := exec.Command(os.Args[0])
	other.Env = append(os.Environ(), holdLockEnv+"="+filepath.Join(dir, "hub.lock"))
	out, err := other.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "locked\n" {
		t.Fatalf("the other process says %q", line)
	}
	_, err = StartEmbedded(EmbeddedConfig{HubConfig: small, DataDir: dir, Log: quiet})
	if want := fmt.Sprintf("process %d", other.Process.Pid); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error is %v, want %q in it", err, want)
	}
	if err := other.Process.Kill(); err != nil { // SIGKILL: nothing is cleaned up
		t.Fatal(err)
	}
	_ = other.Wait()
	startHub(t, small, dir)
}

func TestEmbeddedHubKeepsItsDataOverARestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	hub := startHub(t, small, dir)
	b := connect(t, ConnectConfig{HubConfig: small, Name: "bridge", Embedded: hub})
	apply(t, b)
	publish(t, b, "store-1", 1, 3)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	hub.Shutdown()
	hub.Shutdown() // twice is once

	b = connect(t, ConnectConfig{HubConfig: small, Name: "bridge", Embedded: startHub(t, small, dir)})
	apply(t, b)
	if err := b.CheckAssets(deadline(t)); err != nil {
		t.Error(err)
	}
	e, seq, err := b.LastEvent(deadline(t), "store-1", "edge-1")
	if err != nil || e.Seq != 3 || seq != 3 {
		t.Errorf("last event is %+v at %d, %v", e, seq, err)
	}
}

func TestDurabilityIsWhatTheHubDoes(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ sync, want string }{{"", "fsync"}, {"always", "fsync"}, {"interval", "interval"}} {
		var log strings.Builder
		cfg := HubConfig{Sync: row.sync, MaxBytes: 1 << 20}
		hub, err := StartEmbedded(EmbeddedConfig{HubConfig: cfg, DataDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(hub.Shutdown)
		b := connect(t, ConnectConfig{HubConfig: cfg, Name: "bridge", Embedded: hub})
		if got := b.Durability(); got != row.want {
			t.Errorf("sync %q: durability %q, want %q", row.sync, got, row.want)
		}
		if hub.srv.JetStreamConfig().SyncAlways != (row.want == "fsync") {
			t.Errorf("sync %q is not what the server does", row.sync)
		}
		if said := strings.Contains(log.String(), "sync=interval"); said != (row.want == "interval") {
			t.Errorf("sync %q: the log says %q", row.sync, log.String())
		}
	}
	// Whoever connects to an embedded hub is told as well; of another hub nothing is known.
	p := startProcess(t)
	if got := remote(t, "edge-1", p.hub.ClientURL()).Durability(); got != "fsync" {
		t.Errorf("an embedded hub elsewhere: durability %q", got)
	}
}

func TestHubInProcessIsOpenToNobodyElse(t *testing.T) {
	t.Parallel()
	hub, b := embedded(t, small)
	if url := hub.ClientURL(); url != "" {
		t.Errorf("it listens on %s", url)
	}
	if !b.Connected() || b.Status() != "connected" {
		t.Errorf("status %q", b.Status())
	}
}

func TestEmbeddedHubGrantsEachRoleItsOwn(t *testing.T) {
	t.Parallel()
	password := write(t, "password", "secret-of-edge-1\n")
	cfg := HubConfig{MaxBytes: 64 << 20, Listen: "127.0.0.1:0", Users: []UserConfig{
		{Name: "edge-1", PasswordFile: password, Role: RoleEdge},
		{Name: "edge-2", PasswordFile: password, Role: RoleEdge},
		{Name: "ops", PasswordBcrypt: someBcrypt, Role: RoleOps}, // of s3cr3t
	}}
	hub, bridge := embedded(t, cfg)
	for _, name := range []string{"edge-2", "bridge", "_bridge"} {
		if _, err := nats.Connect(hub.ClientURL(), nats.UserInfo(name, "wrong")); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%s with a wrong password: %v", name, err)
		}
	}
	if _, err := nats.Connect(hub.ClientURL()); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("nobody: %v", err)
	}
	if _, err := nats.Connect(hub.ClientURL(), nats.UserInfo(hub.user, hub.password)); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("the bridge's own user over the network: %v", err)
	}

	edge := connect(t, ConnectConfig{Name: "edge-1", HubConfig: HubConfig{URLs: []string{hub.ClientURL()}, User: "edge-1", PasswordFile: password}})
	publish(t, edge, "store-1", 1, 2)
	if e, seq, err := edge.LastEvent(deadline(t), "store-1", "edge-1"); err != nil || e.Seq != 2 || seq != 2 {
		t.Errorf("its own last event: %+v, %d, %v", e, seq, err)
	}
	follow := followed(t, edge, "store-1")
	if err := bridge.PublishReport(deadline(t), report("store-1", 1)); err != nil {
		t.Fatal(err)
	}
	if r := <-follow; r.Seq != 1 {
		t.Errorf("report of %d", r.Seq)
	}

	other := event("store-1", 1)
	other.Edge = "edge-2"
	if _, _, err := edge.PublishEvent(deadline(t), other); !errors.Is(err, ErrRejected) || errors.Is(err, ErrAway) || !strings.Contains(err.Error(), "may not publish") {
		t.Errorf("publish as another edge: %v", err)
	}
	if _, _, err := edge.LastEvent(deadline(t), "store-1", "edge-2"); !errors.Is(err, ErrRejected) {
		t.Errorf("another edge's last event: %v", err)
	}
	asOps, err := nats.Connect(hub.ClientURL(), nats.UserInfo("ops", "s3cr3t"), nats.CustomInboxPrefix(inboxPrefix("ops")))
	if err != nil {
		t.Fatal(err)
	}
	defer asOps.Close()
	for _, row := range []struct {
		name               string
		nc                 *nats.Conn
		subscribe, request string
		allowed            bool
	}{
		{name: "an edge and other edges' events", nc: edge.nc, subscribe: "pos.>"},
		{name: "an edge and events live", nc: edge.nc, subscribe: "live.pos.>"},
		{name: "an edge and everything", nc: edge.nc, subscribe: ">"},
		{name: "an edge and others' replies", nc: edge.nc, subscribe: "_INBOX_edge-2.>"},
		{name: "an edge and a stream's state", nc: edge.nc, request: "$JS.API.STREAM.INFO.POS"},
		{name: "an edge and a stream's end", nc: edge.nc, request: "$JS.API.STREAM.DELETE.POS"},
		{name: "an edge and any message by its sequence", nc: edge.nc, request: "$JS.API.DIRECT.GET.POS"},
		{name: "an edge and reports", nc: edge.nc, request: "kitchen.store-1.report"},
		{name: "an edge and its beacon", nc: edge.nc, request: "ops.edge-1.beacon", allowed: true},
		{name: "ops and events", nc: asOps, subscribe: "pos.>", allowed: true},
		{name: "ops and what is live", nc: asOps, subscribe: "live.>", allowed: true},
		{name: "ops and dead letters", nc: asOps, subscribe: "dlq.>", allowed: true},
		{name: "ops and everything", nc: asOps, subscribe: ">"},
		{name: "ops and a stream's state", nc: asOps, request: "$JS.API.STREAM.INFO.POS", allowed: true},
		{name: "ops and publishing", nc: asOps, request: "pos.store-1.order.edge-1"},
		{name: "ops and a stream's end", nc: asOps, request: "$JS.API.STREAM.DELETE.POS"},
		{name: "ops and a consumer's end", nc: asOps, request: "$JS.API.CONSUMER.DELETE.POS.kitchen-0"},
	} {
		t.Run(row.name, func(t *testing.T) {
			denied := make(chan error, 10)
			row.nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err })
			if row.subscribe != "" {
				sub, err := row.nc.SubscribeSync(row.subscribe)
				if err != nil {
					t.Fatal(err)
				}
				defer sub.Unsubscribe()
			} else if err := row.nc.Publish(row.request, nil); err != nil {
				t.Fatal(err)
			}
			// Refusals come in order: what comes before this one's is about the above.
			if err := row.nc.Publish("nobody.may", nil); err != nil {
				t.Fatal(err)
			}
			allowed := true
			for {
				err := <-denied
				if !errors.Is(err, nats.ErrPermissionViolation) {
					t.Fatal(err)
				}
				if strings.Contains(err.Error(), "nobody.may") {
					break
				}
				allowed = false
			}
			if allowed != row.allowed {
				t.Errorf("allowed: %v, want %v", allowed, row.allowed)
			}
		})
	}
}

func TestHubConfGrantsWhatAnEmbeddedHubGrants(t *testing.T) {
	for _, name := range []string{"BRIDGE", "OPS", "EDGE_1"} {
		t.Setenv("HUB_"+name+"_PASSWORD", "x")
	}
	opts, err := server.ProcessConfigFile("../../deploy/nats/hub.conf")
	if err != nil {
		t.Fatal(err)
	}
	compared := 0
	for _, u := range opts.Users {
		role, ok := map[string]string{"edge-1": RoleEdge, "ops": RoleOps}[u.Username]
		if !ok {
			continue
		}
		compared++
		want := permissions(role, u.Username)
		for what, got := range map[string][2][]string{
			"publish":   {u.Permissions.Publish.Allow, want.Publish.Allow},
			"subscribe": {u.Permissions.Subscribe.Allow, want.Subscribe.Allow},
		} {
			if d := cmp.Diff(slices.Sorted(slices.Values(got[0])), slices.Sorted(slices.Values(got[1]))); d != "" {
				t.Errorf("%s may %s (-hub.conf, +embedded): %s", u.Username, what, d)
			}
		}
	}
	if compared != 2 {
		t.Errorf("%d users of hub.conf compared, want 2", compared)
	}
}

func TestEmbeddedHubDoesNotPrintItsPassword(t *testing.T) {
	t.Parallel()
	hub := startHub(t, HubConfig{MaxBytes: 1 << 20, Listen: "127.0.0.1:0", Users: []UserConfig{{Name: "ops", PasswordBcrypt: someBcrypt, Role: RoleOps}}}, t.TempDir())
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, hub); strings.Contains(s, hub.password) || strings.Contains(s, someBcrypt) {
			t.Errorf("%s prints %s", verb, s)
		}
		if s := fmt.Sprintf(verb, hub.cfg); strings.Contains(s, someBcrypt) {
			t.Errorf("%s of its settings prints %s", verb, s)
		}
	}
}

func TestEmbeddedHubListensWithTLS(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	password := write(t, "password", "secret")
	cfg := HubConfig{MaxBytes: 64 << 20, Listen: "127.0.0.1:0", CertFile: cert, KeyFile: key, Users: []UserConfig{{Name: "edge-1", PasswordFile: password, Role: RoleEdge}}}
	hub, _ := embedded(t, cfg)
	url := "nats://" + strings.TrimPrefix(strings.TrimPrefix(hub.ClientURL(), "tls://"), "nats://")
	edge := HubConfig{URLs: []string{url}, User: "edge-1", PasswordFile: password, CAFile: cert, ReconnectMax: 10 * time.Millisecond}
	publish(t, connect(t, ConnectConfig{Name: "edge-1", HubConfig: edge}), "store-1", 1, 1)

	edge.CAFile = "" // the system's roots do not know it
	b := connect(t, ConnectConfig{Name: "edge-1", HubConfig: edge})
	eventually(t, "the certificate is refused", func() bool { return strings.Contains(b.Status(), "certificate") })
	if b.Connected() {
		t.Error("connected to a hub it cannot trust")
	}
}

func TestConnectRefusesWrongSettings(t *testing.T) {
	t.Parallel()
	hub := startHub(t, small, t.TempDir())
	away := HubConfig{URLs: []string{"nats://127.0.0.1:1"}}
	with := func(change func(*HubConfig)) HubConfig {
		cfg := away
		change(&cfg)
		return cfg
	}
	for _, row := range []struct {
		name string
		cfg  ConnectConfig
		want string
	}{
		{"a name that is none", ConnectConfig{HubConfig: away, Name: "*"}, "name"},
		{"neither urls nor a hub", ConnectConfig{Name: "edge-1"}, "urls"},
		{"urls and a hub", ConnectConfig{HubConfig: away, Name: "edge-1", Embedded: hub}, "urls"},
		{"wrong settings", ConnectConfig{HubConfig: HubConfig{URLs: []string{"x"}}, Name: "edge-1"}, "urls[0]"},
		{"no password file", ConnectConfig{HubConfig: with(func(c *HubConfig) { c.User, c.PasswordFile = "u", "/no/file" }), Name: "edge-1"}, "password_file"},
		{"no creds file", ConnectConfig{HubConfig: with(func(c *HubConfig) { c.CredsFile = "/no/file" }), Name: "edge-1"}, "creds_file"},
		{"no CA file", ConnectConfig{HubConfig: with(func(c *HubConfig) { c.CAFile = "/no/file" }), Name: "edge-1"}, "ca_file"},
		{"an empty CA file", ConnectConfig{HubConfig: with(func(c *HubConfig) { c.CAFile = write(t, "ca", "") }), Name: "edge-1"}, "ca_file"},
		{"no certificate", ConnectConfig{HubConfig: with(func(c *HubConfig) { c.CertFile, c.KeyFile = "/no/file", "/no/file" }), Name: "edge-1"}, "cert_file"},
	} {
		t.Run(row.name, func(t *testing.T) {
			b, err := Connect(t.Context(), row.cfg)
			if err == nil {
				b.Close()
				t.Fatal("it connected")
			}
			if !strings.Contains(err.Error(), row.want) {
				t.Errorf("error is %q, want %q in it", err, row.want)
			}
		})
	}
}

func TestConnectDoesNotNeedTheHub(t *testing.T) {
	t.Parallel()
	p := startProcess(t)
	url := p.hub.ClientURL()
	p.stop()
	b := remote(t, "edge-1", url)
	if b.Connected() || !strings.HasPrefix(b.Status(), "not connected: ") {
		t.Errorf("hub away: status %q", b.Status())
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, _, err := b.PublishEvent(ctx, event("store-1", 1)); !errors.Is(err, ErrAway) || !errors.Is(err, ErrRejected) || errors.Is(err, ErrUnknown) {
		t.Errorf("publish while the hub is away: %v", err)
	}
	p.start()
	apply(t, b)
	publish(t, b, "store-1", 1, 1)
	if !b.Connected() {
		t.Error("published without a connection")
	}
}

func TestLoginIsTriedAgainUntilThePasswordIsRight(t *testing.T) {
	t.Parallel()
	password := write(t, "password", "old")
	cfg := HubConfig{MaxBytes: 64 << 20, Listen: "127.0.0.1:0", Users: []UserConfig{{Name: "edge-1", PasswordBcrypt: someBcrypt, Role: RoleEdge}}}
	hub, _ := embedded(t, cfg)
	edge := connect(t, ConnectConfig{Name: "edge-1", HubConfig: HubConfig{
		URLs: []string{hub.ClientURL()}, User: "edge-1", PasswordFile: password, ReconnectMax: 5 * time.Millisecond}})
	eventually(t, "the login is refused", func() bool { return strings.Contains(strings.ToLower(edge.Status()), "authorization") })
	if err := os.WriteFile(password, []byte("s3cr3t"), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new password is used", edge.Connected)
}

func write(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// certificate makes a self-signed one for 127.0.0.1.
func certificate(t *testing.T) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hub"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))),
		write(t, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})))
}
