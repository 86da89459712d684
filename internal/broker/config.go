package broker

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"regexp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"crypto/tls"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"io/fs"
	"os"
)

// HubConfig is `hub:` in the configuration of both programs.
type HubConfig struct {
	// URLs of the hub's servers (nats://, tls://, ws://, wss://), without credentials. Name all servers
	// of a cluster. None: the hub is embedded (bridge only). Excludes listen, users and sync.
	URLs []string `koanf:"urls"`
	// User and PasswordFile log in at the hub; the first line of the file is the password, read again at
	// every reconnect. Both or neither, only with urls. Excludes creds_file.
	User         string `koanf:"user"`
	PasswordFile string `koanf:"password_file"`
	// CredsFile holds a user JWT and its key, read again at every reconnect. Only with urls.
	CredsFile string `koanf:"creds_file"`
	// CAFile (PEM). With urls: whom to trust as the hub, instead of the system's roots.
	// Embedded, with listen and cert_file: clients must show a certificate signed by it.
	CAFile string `koanf:"ca_file"`
	// CertFile and KeyFile (PEM), both or neither. With urls: the client's certificate.
	// Embedded, with listen: the listener's certificate; it then speaks TLS only.
	CertFile string `koanf:"cert_file"`
	KeyFile  string `koanf:"key_file"`
	// ReconnectMax bounds the random pause before a reconnect, whose ceiling doubles from 1 s up to it.
	// Default 60 s; 1 s to an embedded hub.
	ReconnectMax time.Duration `koanf:"reconnect_max"`

	// Listen opens the embedded hub to others: host:port. "": in process only. Beyond loopback it
	// requires users. Excludes urls.
	Listen string `koanf:"listen"`
	// Users who may connect to the embedded hub. None: on loopback everybody may, with all rights. Excludes urls.
	Users []UserConfig `koanf:"users"`
	// Sync of the embedded hub. "always" (default): a message is on the disk before it is acknowledged.
	// "interval": a power cut may lose the last second of acknowledged messages. Excludes urls.
	Sync string `koanf:"sync"`

	// Partitions of the POS stream, 1 to 64. Default 4 embedded, 16 with urls. Fixed for the life of the
	// stream. Of no account at an edge.
	Partitions int `koanf:"partitions"`
	// Replicas of each stream: 1, 3 or 5. Default 3 on a cluster, 1 on a single server. Only with urls; of
	// no account at an edge.
	Replicas int `koanf:"replicas"`
	// MaxBytes the POS stream may hold, at least 1 MiB; KITCHEN may hold as much, DLQ a quarter. A full
	// stream refuses. Default 4 GiB. Of no account at an edge.
	MaxBytes int64 `koanf:"max_bytes"`
}

// Roles of the users of an embedded hub.
const (
	// RoleEdge publishes the events of the edge that the user is named for, asks for the last of them, and
	// hears reports. It reads nobody's events and manages nothing.
	RoleEdge = "edge"
	// RoleOps reads: subjects, stream states, stored messages. It publishes nothing and changes nothing.
	RoleOps = "ops"
)

// UserConfig is one user of the embedded hub.
type UserConfig struct {
	// Name of the user; for an edge the edge's name. Required.
	Name string `koanf:"name"`
	// PasswordBcrypt is the bcrypt hash of the password. This or password_file.
	PasswordBcrypt envelope.Secret `koanf:"password_bcrypt"`
	// PasswordFile holds the password, or its bcrypt hash, on its first line.
	PasswordFile string `koanf:"password_file"`
	// Role: "edge" or "ops". Required.
	Role string `koanf:"role"`
}

// EmbeddedConfig is what StartEmbedded takes.
type EmbeddedConfig struct {
	HubConfig
	// DataDir is the folder of the hub's data, created when missing, locked while the hub runs. Required.
	DataDir string
	// Log takes the hub's warnings and errors. nil: slog.Default().
	Log *slog.Logger
}

// ConnectConfig is what Connect takes.
type ConnectConfig struct {
	HubConfig
	// Name of the program at the hub: the edge's name, or the bridge's (envelope.ValidName). Required.
	Name string
	// Embedded is the hub in this process. nil: the hub is at URLs.
	Embedded *Embedded
	// Log: nil = slog.Default().
	Log *slog.Logger
	// Metrics: nil = not registered.
	Metrics prometheus.Registerer
}

// FeedConfig is what NewFeed takes.
type FeedConfig struct {
	// Heartbeat is how often the hub says that it is there when it has no event. At least 100 ms; default 500 ms.
	Heartbeat time.Duration
	// Handle gets each event, in stream order, from Run's goroutine. Required.
	Handle func(*Delivery)
	// Gap, when not nil, is called from Run's goroutine when events are lost to the feed, before the first
	// one after the loss: GapReset, GapLost.
	Gap func(reason string)
}

const (
	defaultMaxBytes           = 4 << 30
	defaultPartitions         = 16
	defaultEmbeddedPartitions = 4
	maxPartitions             = 64 // beyond, throughput falls steeply: a filtered consumer scans what lies between its events
	syncAlways                = "always"
	syncInterval              = "interval"
)

var bcryptHash = regexp.MustCompile(`^\$2[abxy]\$\d\d\$[./A-Za-z0-9]{53}$`)

// CheckFiles reports every file that the settings name and that cannot be used, each line
// beginning with the setting's key. Validate looks at no file.
func (c HubConfig) CheckFiles() error {
	var errs []error
	add := func(key string, err error) { errs = append(errs, fmt.Errorf("%s: %w", key, err)) }
	for _, f := range []struct{ key, path string }{
		{"password_file", c.PasswordFile}, {"creds_file", c.CredsFile}, {"cert_file", c.CertFile}, {"key_file", c.KeyFile},
	} {
		if f.path == "" {
			continue
		}
		if _, err := os.ReadFile(f.path); err != nil {
			add(f.key, err)
		}
	}
	if c.CAFile != "" {
		if _, err := readCertPool(c.CAFile); err != nil {
			add("ca_file", err)
		}
	}
	if c.CertFile != "" && c.KeyFile != "" {
		if _, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			add("cert_file", err)
		}
	}
	return errors.Join(errs...)
}

// Validate reports all mistakes, each with its key. It opens no file.
func (c HubConfig) Validate() error {
	var errs []error
	add := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf(key+": "+format, args...))
	}
	embedded := len(c.URLs) == 0

	for i, s := range c.URLs {
		key := fmt.Sprintf("urls[%d]", i)
		u, err := url.Parse(s)
		switch {
		case err != nil: // url.Error repeats the text, which may hold a password
			add(key, "not a URL: write nats://host:port")
		case !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) || u.Host == "":
			add(key, "write nats://, tls://, ws:// or wss:// and host:port")
		case u.User != nil:
			add(key, "credentials belong in user and password_file, or creds_file")
		}
	}
	if embedded {
		for _, f := range []struct{ key, value string }{
			{"user", c.User}, {"password_file", c.PasswordFile}, {"creds_file", c.CredsFile},
		} {
			if f.value != "" {
				add(f.key, "only with urls: the bridge needs no login at its embedded hub")
			}
		}
		if c.Replicas != 0 {
			add("replicas", "only with urls: an embedded hub is a single server")
		}
		if c.Listen == "" {
			for _, f := range []struct{ key, value string }{
				{"ca_file", c.CAFile}, {"cert_file", c.CertFile}, {"key_file", c.KeyFile},
			} {
				if f.value != "" {
					add(f.key, "only with urls or listen")
				}
			}
			if len(c.Users) > 0 {
				add("users", "nobody can connect without listen")
			}
		} else if c.CAFile != "" && c.CertFile == "" {
			add("ca_file", "a listener that checks certificates needs cert_file and key_file of its own")
		}
	} else {
		if c.Listen != "" {
			add("listen", "opens the embedded hub, which urls excludes")
		}
		if len(c.Users) > 0 {
			add("users", "are of the embedded hub, which urls excludes")
		}
		if c.Sync != "" {
			add("sync", "is of the embedded hub, which urls excludes: set sync_interval in the hub's own configuration")
		}
	}
	if (c.User == "") != (c.PasswordFile == "") {
		add("user", "needs password_file, and password_file needs user")
	}
	if c.CredsFile != "" && c.User != "" {
		add("creds_file", "excludes user and password_file")
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		add("cert_file", "needs key_file, and key_file needs cert_file")
	}
	if c.ReconnectMax < 0 {
		add("reconnect_max", "%v is negative", c.ReconnectMax)
	}

	if c.Listen != "" {
		if loopback, err := isLoopback(c.Listen); err != nil {
			add("listen", "%v", err)
		} else if !loopback && len(c.Users) == 0 {
			add("listen", "%s is reachable from other machines: configure users, or listen on 127.0.0.1", c.Listen)
		}
	}
	names := make(map[string]bool)
	for i, u := range c.Users {
		key := fmt.Sprintf("users[%d].", i)
		if err := envelope.ValidName(u.Name); err != nil {
			add(key+"name", "%v", err)
		} else if names[u.Name] {
			add(key+"name", "%s is there twice", u.Name)
		}
		names[u.Name] = true
		if (u.PasswordBcrypt == "") == (u.PasswordFile == "") {
			add(key+"password_bcrypt", "give either password_bcrypt or password_file")
		}
		if u.PasswordBcrypt != "" && !bcryptHash.MatchString(u.PasswordBcrypt.Reveal()) {
			add(key+"password_bcrypt", "is no bcrypt hash ($2a$…): make one with `nats server passwd` or `htpasswd -B`")
		}
		if u.Role != RoleEdge && u.Role != RoleOps {
			add(key+"role", "%q is neither %s nor %s", u.Role, RoleEdge, RoleOps)
		}
	}
	if !slices.Contains([]string{"", syncAlways, syncInterval}, c.Sync) {
		add("sync", "%q is neither %s nor %s", c.Sync, syncAlways, syncInterval)
	}

	if c.Partitions < 0 || c.Partitions > maxPartitions {
		add("partitions", "%d is not in 1 to %d", c.Partitions, maxPartitions)
	}
	if !slices.Contains([]int{0, 1, 3, 5}, c.Replicas) {
		add("replicas", "%d is not 1, 3 or 5", c.Replicas)
	}
	if c.MaxBytes < 0 || c.MaxBytes > 0 && c.MaxBytes < 1<<20 {
		add("max_bytes", "%d is less than 1 MiB (%d)", c.MaxBytes, 1<<20)
	}
	return errors.Join(errs...)
}

func (c HubConfig) partitions() int {
	if len(c.URLs) == 0 {
		return cmp.Or(c.Partitions, defaultEmbeddedPartitions)
	}
	return cmp.Or(c.Partitions, defaultPartitions)
}

func (c HubConfig) maxBytes() int64 { return cmp.Or(c.MaxBytes, defaultMaxBytes) }

// isLoopback reports whether only this machine can reach the address. A name other
// than localhost counts as reachable, whatever it resolves to now.
func isLoopback(addr string) (bool, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return false, fmt.Errorf("%q is not host:port", addr)
	}
	if n, err := net.LookupPort("tcp", port); err != nil || n < 0 {
		return false, fmt.Errorf("%q has no valid port", addr)
	}
	if host == "localhost" {
		return true, nil
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback(), nil
}
