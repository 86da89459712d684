package broker

import (
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// HubConfig is `hub:` in the configuration of both programs.
type HubConfig struct {
	// URLs of the hub's servers (nats://, tls://, ws://, wss://). Name all servers of a cluster.
	// Empty: the hub is embedded (bridge only). Excludes listen, users, sync.
	URLs []string `koanf:"urls"`
	// User and PasswordFile log in at the hub. The file is read again at every
	// reconnect. Both or neither; excludes creds_file. Only with urls.
	User         string `koanf:"user"`
	PasswordFile string `koanf:"password_file"`
	// CredsFile holds a user JWT and its key. Read again at every reconnect. Only with urls.
	CredsFile string `koanf:"creds_file"`
	// CAFile (PEM). With urls: whom to trust as the hub, instead of the system's roots.
	// Embedded: clients must show a certificate signed by it.
	CAFile string `koanf:"ca_file"`
	// CertFile and KeyFile (PEM), both or neither. With urls: the client's certificate.
	// Embedded: the certificate of listen, which is then TLS only.
	CertFile string `koanf:"cert_file"`
	KeyFile  string `koanf:"key_file"`
	// ReconnectMax bounds the random pause before a reconnect: it grows from 1 s to
	// this. Default 60 s; 1 s to an embedded hub.
	ReconnectMax time.Duration `koanf:"reconnect_max"`

	// Listen opens the embedded hub to others: host:port. "": in process only. Beyond
	// loopback it requires users. Excludes urls.
	Listen string `koanf:"listen"`
	// Users who may connect to the embedded hub. None: on loopback everybody may, with all rights.
	Users []UserConfig `koanf:"users"`
	// Sync of the embedded hub: "always" (default), a message is on the disk before it is
	// acknowledged; "interval", up to a second of acknowledged messages is lost in a power cut.
	Sync string `koanf:"sync"`

	// Partitions of the POS stream. Default 4 embedded, 16 with urls. Fixed for the
	// life of the stream. Of no account at an edge.
	Partitions int `koanf:"partitions"`
	// Replicas of each stream. Default 3 on a cluster, 1 on a single server. Only with urls; of no account at an edge.
	Replicas int `koanf:"replicas"`
	// MaxBytes the POS stream may hold; KITCHEN gets as much, DLQ a quarter of it.
	// Default 4 GiB. Of no account at an edge.
	MaxBytes int64 `koanf:"max_bytes"`
}

// UserConfig is one user of the embedded hub.
type UserConfig struct {
	// Name of the user; for an edge the edge's name. Required.
	Name string `koanf:"name"`
	// PasswordBcrypt is the bcrypt hash of the password. This or PasswordFile.
	PasswordBcrypt string `koanf:"password_bcrypt"`
	// PasswordFile holds the password, or its bcrypt hash, on its first line.
	PasswordFile string `koanf:"password_file"`
	// Role: "edge", which publishes and asks for what is its own and no more, or "ops", which reads. Required.
	Role string `koanf:"role"`
}

// EmbeddedConfig is what StartEmbedded takes.
type EmbeddedConfig struct {
	HubConfig
	// DataDir is the folder of the hub's data. It is created when missing, and locked while the hub runs. Required.
	DataDir string
	// Log takes the hub's warnings and errors. nil: slog.Default().
	Log *slog.Logger
}

// ConnectConfig is what Connect takes.
type ConnectConfig struct {
	HubConfig
	// Name of the program at the hub: the edge's name, or the bridge's. A name
	// (envelope.ValidName). Required.
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
	// Heartbeat is how often the hub says that it is there when it has no event. Default 500 ms, at least 100 ms.
	Heartbeat time.Duration
	// Handle gets each event, in stream order, from Run's goroutine. Required.
	Handle func(*Delivery)
	// Gap, when not nil, is called from Run's goroutine before the first event after
	// a loss that cannot be made good: GapReset, GapLost.
	Gap func(reason string)
}
