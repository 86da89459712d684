package broker

import (
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/time/rate"
)

// Embedded is a hub in this process: nats-server with JetStream. It runs from
// StartEmbedded until Shutdown.
type Embedded struct {
	// Fixed at birth.
	cfg            HubConfig
	log            *slog.Logger
	srv            *server.Server
	user, password string // of this process's own connection; "" when the hub asks nobody

	stop func()
}

// StartEmbedded starts a hub whose data is in cfg.DataDir and returns when it is
// ready. It refuses a folder that another process's hub uses, one it cannot write to,
// and an address that is taken. The data of a hub that was killed is recovered first,
// which takes as long as it needs.
func StartEmbedded(cfg EmbeddedConfig) (*Embedded, error) {
	if len(cfg.URLs) > 0 {
		return nil, errors.New("hub: urls name a hub elsewhere: none is embedded")
	}
	if err := cfg.HubConfig.Validate(); err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	if cfg.DataDir == "" {
		return nil, errors.New("hub: no data folder")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}

	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return nil, fmt.Errorf("hub: data folder: %w", err)
	}
	unlock, err := lockFile(filepath.Join(cfg.DataDir, "hub.lock"))
	if err != nil {
		return nil, fmt.Errorf("hub: data folder %s: %w", cfg.DataDir, err)
	}
	e, err := startLocked(cfg)
	if err != nil {
		unlock()
		return nil, err
	}
	e.stop = sync.OnceFunc(func() {
		e.srv.Shutdown()
		e.srv.WaitForShutdown()
		unlock()
	})
	return e, nil
}

func startLocked(cfg EmbeddedConfig) (*Embedded, error) {
	e := &Embedded{cfg: cfg.HubConfig, log: cfg.Log}
	opts, err := e.options(cfg.DataDir)
	if err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	if cfg.Listen != "" {
		// The server would only log that the address is taken.
		l, err := net.Listen("tcp", cfg.Listen)
		if err != nil {
			return nil, fmt.Errorf("hub: listen on %s: %w", cfg.Listen, err)
		}
		l.Close()
	}

	srv, err := server.NewServer(opts)
	if err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	log := &serverLog{log: cfg.Log, refused: rate.Sometimes{First: 10, Interval: time.Minute}}
	srv.SetLoggerV2(log, false, false, false)
	srv.Start() // returns with JetStream recovered and the listener open, or logs a fatal error
	if err := log.fatal(); err == nil && !srv.ReadyForConnections(10*time.Second) {
		log.Fatalf("not ready for connections within 10 s")
	}
	if err := log.fatal(); err != nil {
		srv.Shutdown()
		srv.WaitForShutdown()
		return nil, fmt.Errorf("hub: data folder %s: %w", cfg.DataDir, err)
	}
	e.srv = srv

	if cfg.Sync == syncInterval {
		cfg.Log.Warn("hub: acknowledges before the disk has it", "sync", syncInterval, "may_lose", syncEvery.String())
	}
	if loopback, _ := isLoopback(cfg.Listen); cfg.Listen != "" && !loopback && cfg.CertFile == "" {
		cfg.Log.Warn("hub: passwords cross the network in clear", "listen", cfg.Listen, "remedy", "hub.cert_file, hub.key_file")
	}
	return e, nil
}

// syncEvery is how often `sync: interval` writes to the disk.
const syncEvery = time.Second

// The name of an embedded hub says how it syncs. A client is told the name of its server
// and nothing else about it, and an edge owes its POS the word (I1).
const serverFsync, serverInterval = "kitchenbridge", "kitchenbridge-sync-interval"

func serverName(sync string) string {
	if sync == syncInterval {
		return serverInterval
	}
	return serverFsync
}

func (e *Embedded) options(dir string) (*server.Options, error) {
	c := e.cfg
	o := &server.Options{
		ServerName:             serverName(c.Sync),
		NoSigs:                 true, // signals are the program's
		NoLog:                  true,
		JetStream:              true,
		DisableJetStreamBanner: true,
		StoreDir:               dir,
		JetStreamMaxStore:      1 << 60, // each stream has its own bound, which max_bytes may move
		JetStreamMaxMemory:     128 << 20,
		SyncAlways:             c.Sync != syncInterval,
		MaxPayload:             1 << 20,
		DontListen:             c.Listen == "",
	}
	if !o.SyncAlways {
		o.SyncInterval = syncEvery
	}
	if c.Listen == "" {
		return o, nil
	}

	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return nil, err
	}
	o.Host = host
	if o.Host == "" {
		o.Host = "0.0.0.0"
	}
	if o.Port, err = net.LookupPort("tcp", port); err != nil {
		return nil, err
	}
	if o.Port == 0 {
		o.Port = server.RANDOM_PORT
	}
	if c.CertFile != "" {
		load, err := certificateFiles(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, err
		}
		o.TLS = true
		o.TLSTimeout = 5
		o.TLSConfig = &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() },
		}
		if c.CAFile != "" {
			pool, err := readCertPool(c.CAFile)
			if err != nil {
				return nil, fmt.Errorf("ca_file: %w", err)
			}
			o.TLSVerify = true
			o.TLSConfig.ClientCAs = pool
			o.TLSConfig.ClientAuth = tls.RequireAndVerifyClientCert
		}
	}
	if len(c.Users) == 0 {
		return o, nil
	}
	// The process's own connection has all rights, a password nobody knows, and a name no user can have.
	e.user, e.password = "_bridge", rand.Text()
	o.Users = append(o.Users, &server.User{
		Username: e.user, Password: e.password,
		AllowedConnectionTypes: map[string]struct{}{inProcess: {}},
	})
	var errs []error
	for i, u := range c.Users {
		password := u.PasswordBcrypt.Reveal()
		if u.PasswordFile != "" {
			if password, err = readSecretLine(u.PasswordFile); err != nil {
				errs = append(errs, fmt.Errorf("users[%d].password_file: %w", i, err))
			}
		}
		o.Users = append(o.Users, &server.User{Username: u.Name, Password: password, Permissions: permissions(u.Role, u.Name)})
	}
	return o, errors.Join(errs...)
}

// inProcess is how the server calls a connection without a network.
const inProcess = "IN_PROCESS"

// permissions of a user of the embedded hub. deploy/nats/hub.conf grants the same.
func permissions(role, name string) *server.Permissions {
	inbox := inboxPrefix(name) + ".>"
	if role == RoleEdge {
		return &server.Permissions{
			Publish: &server.SubjectPermission{Allow: []string{
				"pos.*.*." + name,
				"ops." + name + ".>",
				"replay.kitchen.*",
				directGet + streamPOS + ".pos.*.*.*." + name,
			}},
			Subscribe: &server.SubjectPermission{Allow: []string{"live.kitchen.>", inbox}},
		}
	}
	allow := []string{"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST"}
	for _, s := range []string{streamPOS, streamKitchen, streamDLQ} {
		allow = append(allow,
			"$JS.API.STREAM.INFO."+s, "$JS.API.STREAM.MSG.GET."+s, directGet+s, directGet+s+".>",
			"$JS.API.CONSUMER.NAMES."+s, "$JS.API.CONSUMER.LIST."+s, "$JS.API.CONSUMER.INFO."+s+".*")
	}
	return &server.Permissions{
		Publish:   &server.SubjectPermission{Allow: allow},
		Subscribe: &server.SubjectPermission{Allow: []string{"pos.>", "live.>", "kitchen.>", "dlq.>", "ops.>", inbox}},
	}
}

// Format prints what it is under every verb: it holds a password.
func (e *Embedded) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "hub in process (listen %q)", e.cfg.Listen)
}

// ClientURL is where others reach the hub; "" when it does not listen.
func (e *Embedded) ClientURL() string {
	if e.cfg.Listen == "" {
		return ""
	}
	return e.srv.ClientURL()
}

// Shutdown stops the hub and waits until its data is on the disk and its folder free.
// Close the connections to it first. It may be called more than once.
func (e *Embedded) Shutdown() { e.stop() }

// readSecretLine reads the first line of a file: a password, not an empty one.
func readSecretLine(path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	if line = strings.TrimSuffix(line, "\r"); line == "" {
		return "", fmt.Errorf("%s: the first line is empty", path)
	}
	return line, nil
}

// serverLog gives the server's warnings and errors to slog.
type serverLog struct {
	log     *slog.Logger
	refused rate.Sometimes

	mu    sync.Mutex
	first error // Guarded by mu: the first fatal error
}

func (l *serverLog) Noticef(string, ...any) {}
func (l *serverLog) Debugf(string, ...any)  {}
func (l *serverLog) Tracef(string, ...any)  {}

func (l *serverLog) Warnf(format string, v ...any) {
	// Plain passwords come from files, or are this process's own and random.
	if strings.HasPrefix(format, "Plaintext passwords detected") {
		return
	}
	l.log.Warn("hub: server warns", "text", fmt.Sprintf(format, v...))
}

// Errorf takes a failed login for what it is: anyone who reaches the port can cause one,
// at any rate.
func (l *serverLog) Errorf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	lower := strings.ToLower(text)
	if strings.Contains(lower, "authentication error") || strings.Contains(lower, "tls handshake error") {
		l.refused.Do(func() { l.log.Warn("hub: client turned away", "text", text) })
		return
	}
	l.log.Error("hub: server error", "text", text)
}

// Fatalf keeps the error: a server in a process of ours does not end it.
func (l *serverLog) Fatalf(format string, v ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.first == nil {
		l.first = fmt.Errorf(format, v...)
	}
}

func (l *serverLog) fatal() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first
}

// lockHolder names the process in the error about a locked file.
func lockHolder(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "another process"
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return "another process"
	}
	return fmt.Sprintf("process %d", pid)
}
