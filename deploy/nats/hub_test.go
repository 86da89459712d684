// Package nats_test boots the configurations in this folder with the real server.
package nats_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const patience = 20 * time.Second

// Each user's password, and its bcrypt hash as the environment carries it.
var users = []struct{ name, variable, password, hash string }{
	{"bridge", "HUB_BRIDGE_PASSWORD", "s3cr3t", `"$2a$04$ovatxLhm4wfWDDyZ/yfhVOHEkqOg4VxcCdap26Cz06ei5M4O/BjBy"`},
	{"ops", "HUB_OPS_PASSWORD", "s3cr3t", `"$2a$04$ovatxLhm4wfWDDyZ/yfhVOHEkqOg4VxcCdap26Cz06ei5M4O/BjBy"`},
	{"edge-1", "HUB_EDGE_1_PASSWORD", "s3cr3t", `"$2a$04$ovatxLhm4wfWDDyZ/yfhVOHEkqOg4VxcCdap26Cz06ei5M4O/BjBy"`},
}

// boot starts the hub as an operator would, in a folder of its own and on a free port.
func boot(t *testing.T) string {
	t.Helper()
	for _, u := range users {
		t.Setenv(u.variable, u.hash)
	}
	opts, err := server.ProcessConfigFile("hub.conf")
	if err != nil {
		t.Fatal(err)
	}
	if !opts.SyncAlways {
		t.Error("acknowledges before the disk has it")
	}
	opts.Host, opts.Port = "127.0.0.1", server.RANDOM_PORT
	opts.HTTPPort, opts.StoreDir = 0, t.TempDir()
	opts.NoLog, opts.NoSigs = true, true
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(patience) {
		t.Fatal("not ready for connections")
	}
	return srv.ClientURL()
}

func connect(t *testing.T, url, user string) *broker.Broker {
	t.Helper()
	password := filepath.Join(t.TempDir(), "password")
	for _, u := range users {
		if u.name == user {
			if err := os.WriteFile(password, []byte(u.password), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	b, err := broker.Connect(t.Context(), broker.ConnectConfig{
		Name: user, Log: slog.New(slog.DiscardHandler),
		HubConfig: broker.HubConfig{URLs: []string{url}, User: user, PasswordFile: password, ReconnectMax: 10 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func event(site, edge string, seq uint64) *broker.Event {
	return &broker.Event{
		Event: envelope.Event{
			Site: site, Kind: "order", Edge: edge, Epoch: "e1", From: seq, Seq: seq, ID: fmt.Sprintf("id-%d", seq),
			Accepted: 1_700_000_000_000, Deadline: 1_700_000_600_000, Via: "hub",
			Triple: envelope.Triple{IV: []byte("AAEC"), Fingerprint: []byte("f1"), Message: []byte("YQ==")},
		},
		Bind: "b1", Tag: "tag",
	}
}

func TestAHubFromHubConfServesBridgeAndEdge(t *testing.T) {
	url := boot(t)
	bridge, edge := connect(t, url, "bridge"), connect(t, url, "edge-1")
	if err := bridge.ApplyAssets(within(t)); err != nil { // with the default sizes: they fit what the file reserves
		t.Fatal(err)
	}
	if err := bridge.CheckAssets(within(t)); err != nil {
		t.Error(err)
	}

	for seq := uint64(1); seq <= 3; seq++ {
		if _, _, err := edge.PublishEvent(within(t), event("store-1", "edge-1", seq)); err != nil {
			t.Fatal(err)
		}
	}
	if e, _, err := edge.LastEvent(within(t), "store-1", "edge-1"); err != nil || e.Seq != 3 {
		t.Errorf("the edge's last event is %+v, %v", e, err)
	}

	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	feed, err := bridge.NewFeed(broker.FeedConfig{Handle: func(*broker.Delivery) {}})
	if err != nil {
		t.Fatal(err)
	}
	feeding := make(chan error, 1)
	go func() { feeding <- feed.Run(ctx) }()

	reports := make(chan *broker.Report, 1)
	following := make(chan error, 1)
	go func() {
		following <- edge.FollowReports(ctx, []string{"store-1"}, func(r *broker.Report) {
			select {
			case reports <- r:
			default:
			}
		})
	}()

	seen := 0
	err = bridge.ConsumePartition(ctx, bridge.PartitionOf("store-1"), func(context.Context, broker.Takeover) error { return nil }, func(d *broker.Delivery) {
		if d.Err != nil || d.Event.Seq != uint64(seen+1) {
			t.Errorf("delivery %+v where event %d was due", d, seen+1)
		}
		if err := d.Ack(); err != nil {
			t.Error(err)
		}
		if seen++; seen == 3 {
			cancel()
		}
	})
	if err != nil || seen != 3 {
		t.Errorf("%d events came, %v", seen, err)
	}
	if err := <-feeding; err != nil {
		t.Error(err)
	}
	if err := <-following; err != nil {
		t.Error(err)
	}
}

func TestReportsReachTheEdge(t *testing.T) {
	url := boot(t)
	bridge, edge := connect(t, url, "bridge"), connect(t, url, "edge-1")
	if err := bridge.ApplyAssets(within(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(within(t))
	reports := make(chan *broker.Report, 1)
	done := make(chan error, 1)
	go func() {
		done <- edge.FollowReports(ctx, []string{"store-1"}, func(r *broker.Report) {
			select {
			case reports <- r:
			default:
			}
		})
	}()
	for n := 0; ; n++ { // until the hub knows of the subscription
		r := &broker.Report{Kind: "order", StreamSeq: 1, Bind: "b1", Tag: "tag", Report: envelope.Report{
			Site: "store-1", Edge: "edge-1", Epoch: "e1", Seq: 1, ID: "id", Endpoint: "main", N: n, State: broker.StateDelivered,
			Triple: envelope.Triple{IV: []byte("AAEC"), Fingerprint: []byte("kb:b1"), Message: []byte("YQ==")},
		}}
		if err := bridge.PublishReport(within(t), r); err != nil {
			t.Fatal(err)
		}
		select {
		case got := <-reports:
			if got.Site != "store-1" || got.Edge != "edge-1" {
				t.Errorf("report %+v", got)
			}
		case <-time.After(10 * time.Millisecond):
			continue
		}
		break
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestHubConfGrantsEachRoleItsOwn(t *testing.T) {
	url := boot(t)
	bridge, edge := connect(t, url, "bridge"), connect(t, url, "edge-1")
	if err := bridge.ApplyAssets(within(t)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := edge.PublishEvent(within(t), event("store-1", "edge-2", 1)); !errors.Is(err, broker.ErrRejected) || errors.Is(err, broker.ErrAway) {
		t.Errorf("an edge publishes as another: %v", err)
	}
	if _, _, err := edge.LastEvent(within(t), "store-1", "edge-2"); !errors.Is(err, broker.ErrRejected) {
		t.Errorf("an edge reads another's last event: %v", err)
	}
	for _, anybody := range [][]nats.Option{
		nil,
		{nats.UserInfo("bridge", "wrong")},
		{nats.UserInfo("bridge", "")},
		{nats.UserInfo("", "")},
	} {
		if nc, err := nats.Connect(url, anybody...); !errors.Is(err, nats.ErrAuthorization) {
			nc.Close()
			t.Errorf("anybody comes in: %v", err)
		}
	}

	for _, row := range []struct {
		user               string
		publish, subscribe string
		allowed            bool
	}{
		{user: "edge-1", publish: "pos.store-1.order.edge-1", allowed: true},
		{user: "edge-1", publish: "ops.edge-1.beacon", allowed: true},
		{user: "edge-1", publish: "replay.kitchen.store-1", allowed: true},
		{user: "edge-1", subscribe: "live.kitchen.store-1.report", allowed: true},
		{user: "edge-1", publish: "pos.store-1.order.edge-2"},
		{user: "edge-1", publish: "live.pos.store-1.order.edge-1"},
		{user: "edge-1", publish: "kitchen.store-1.report"},
		{user: "edge-1", publish: "$JS.API.STREAM.INFO.POS"},
		{user: "edge-1", publish: "$JS.API.STREAM.PURGE.POS"},
		{user: "edge-1", publish: "$JS.API.STREAM.MSG.GET.POS"},
		{user: "edge-1", publish: "$JS.API.DIRECT.GET.POS"},
		{user: "edge-1", publish: "$JS.API.CONSUMER.CREATE.POS"},
		{user: "edge-1", publish: "$JS.API.CONSUMER.MSG.NEXT.POS.kitchen-0"},
		{user: "edge-1", publish: "$JS.ACK.POS.kitchen-0.1.1.1.1.0"},
		{user: "edge-1", publish: "$KV.keys.store-1.edge-1"},
		{user: "edge-1", subscribe: "pos.>"},
		{user: "edge-1", subscribe: "pos.store-1.order.edge-1"},
		{user: "edge-1", subscribe: "live.pos.>"},
		{user: "edge-1", subscribe: "live.>"},
		{user: "edge-1", subscribe: "_INBOX.>"},
		{user: "edge-1", subscribe: "_INBOX_bridge.>"},
		{user: "edge-1", subscribe: ">"},
		{user: "ops", subscribe: "pos.>", allowed: true},
		{user: "ops", subscribe: "live.>", allowed: true},
		{user: "ops", subscribe: "kitchen.>", allowed: true},
		{user: "ops", subscribe: "dlq.>", allowed: true},
		{user: "ops", publish: "$JS.API.STREAM.INFO.POS", allowed: true},
		{user: "ops", publish: "$JS.API.DIRECT.GET.DLQ.dlq.store-1.order", allowed: true},
		{user: "ops", publish: "pos.store-1.order.ops"},
		{user: "ops", publish: "$JS.API.STREAM.DELETE.POS"},
		{user: "ops", publish: "$JS.API.STREAM.PURGE.DLQ"},
		{user: "ops", publish: "$JS.API.CONSUMER.DELETE.POS.kitchen-0"},
		{user: "ops", publish: "$JS.API.CONSUMER.RESET.POS.kitchen-0"},
		{user: "ops", subscribe: "$KV.>"},
		{user: "bridge", publish: "$JS.API.STREAM.INFO.POS", allowed: true},
		{user: "bridge", subscribe: ">", allowed: true},
	} {
		t.Run(strings.TrimSpace(row.user+" "+row.publish+row.subscribe), func(t *testing.T) {
			refused := make(chan error, 10)
			nc, err := nats.Connect(url, nats.UserInfo(row.user, "s3cr3t"),
				nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err }))
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			if row.subscribe != "" {
				_, err = nc.SubscribeSync(row.subscribe)
			} else {
				err = nc.Publish(row.publish, nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.FlushTimeout(patience); err != nil {
				t.Fatal(err)
			}
			// The refusal comes before the answer to the flush.
			if allowed := nc.LastError() == nil; allowed != row.allowed {
				t.Errorf("allowed: %v, want %v (%v)", allowed, row.allowed, nc.LastError())
			}
			if !row.allowed {
				if err := <-refused; !errors.Is(err, nats.ErrPermissionViolation) {
					t.Errorf("refused with %v", err)
				}
			}
		})
	}
}

// The TLS block is a comment; without its # it must be what the server understands.
func TestHubConfsTLSBlockIsOne(t *testing.T) {
	for _, u := range users {
		t.Setenv(u.variable, u.hash)
	}
	conf, err := os.ReadFile("hub.conf")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	lines := strings.Split(string(conf), "\n")
	inside, seen := false, 0
	for i, line := range lines {
		inside = inside || strings.HasPrefix(line, "# tls {")
		if inside {
			seen++
			lines[i] = strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(line, "#"), " "), "/etc/kitchenbridge", dir)
		}
		inside = inside && line != "# }"
	}
	if seen < 5 {
		t.Fatalf("%d lines of a TLS block found", seen)
	}
	cert, key := certificate(t)
	for name, content := range map[string][]byte{"hub.crt": cert, "hub.key": key, "hub.conf": []byte(strings.Join(lines, "\n"))} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	opts, err := server.ProcessConfigFile(filepath.Join(dir, "hub.conf"))
	if err != nil {
		t.Fatal(err)
	}
	if opts.TLSConfig == nil || opts.TLSRateLimit != 500 {
		t.Errorf("TLS %v, rate limit %d", opts.TLSConfig != nil, opts.TLSRateLimit)
	}
}

func certificate(t *testing.T) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder})
}

func TestHubConfNeedsItsPasswords(t *testing.T) {
	for _, missing := range users {
		t.Run(missing.variable, func(t *testing.T) {
			for _, u := range users {
				t.Setenv(u.variable, u.hash) // put back after the test
			}
			if err := os.Unsetenv(missing.variable); err != nil {
				t.Fatal(err)
			}
			if _, err := server.ProcessConfigFile("hub.conf"); err == nil || !strings.Contains(err.Error(), missing.variable) {
				t.Errorf("error is %v, want %s in it", err, missing.variable)
			}
		})
	}
}
