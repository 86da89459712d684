package wsgate

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

// Config says where screens connect, which sites they may watch, and what one screen
// may cost.
type Config struct {
	// Listen are the addresses screens connect to. Required.
	Listen []ListenConfig `koanf:"listen"`
	// Sites are those that have screens, by name. Required; the program fills it from its
	// own sites.
	Sites map[string]SiteConfig `koanf:"-"`
	// Origins are the pages that may connect, for every site: "https://screens.example",
	// or a bare word such as "ionic", which some clients send. A page from the gateway's
	// own host is always allowed, and so is a client that sends no Origin. Default none.
	Origins []string `koanf:"origins"`

	// Heartbeat is how often every screen gets "isAlive?". Default 1s, which is what
	// the seed's clients count on.
	Heartbeat time.Duration `koanf:"heartbeat"`
	// Stale is how long the hub may have been silent before "isAlive?" stops and new
	// screens are turned away. Default 2s. It must be longer than the feed's own heartbeat.
	Stale time.Duration `koanf:"stale"`
	// StaleClose is how long the hub may have been silent before sockets are closed. It
	// is looked at once a Heartbeat. Default 5s; longer than Stale.
	StaleClose time.Duration `koanf:"stale_close"`

	// QueueFrames and QueueBytes bound what waits for one screen: default 256 frames,
	// 1 MiB. One frame more closes the screen with 1013. The frames are shared by the
	// screens of a site, so the bytes are not used again for each.
	QueueFrames int `koanf:"queue_frames"`
	QueueBytes  int `koanf:"queue_bytes"`
	// WriteTimeout is how long one frame may take to leave for one screen. Default 5s.
	WriteTimeout time.Duration `koanf:"write_timeout"`
	// HandshakeTimeout bounds a handshake, the fetch for an unknown fingerprint
	// included. Default 10s.
	HandshakeTimeout time.Duration `koanf:"handshake_timeout"`
	// MaxConnections is how many screens there may be at once; the next is told 503.
	// Default 20000.
	MaxConnections int `koanf:"max_connections"`
	// Drain is how long a stopping gateway waits for its screens to take what is queued
	// and to close, before it cuts them. Default 5s.
	Drain time.Duration `koanf:"drain"`

	// Log is where state changes go; nil = slog.Default().
	Log *slog.Logger `koanf:"-"`
	// Metrics is where the gateway registers its metrics; nil = nowhere.
	Metrics prometheus.Registerer `koanf:"-"`
}

// ListenConfig is one address.
type ListenConfig struct {
	// Addr is "host:port"; an empty host is every address of the machine. Required.
	Addr string `koanf:"addr"`
	// Site is the only site served here; "" = all, told apart by token or by /sites/{site}.
	Site string `koanf:"site"`
	// TLS is served when both files are named; default: plain HTTP.
	TLS TLSConfig `koanf:"tls"`
}

// TLSConfig names a listener's certificate and key, both PEM. They are read at start.
type TLSConfig struct {
	CertFile string `koanf:"cert_file"`
	KeyFile  string `koanf:"key_file"`
}

// SiteConfig is one site's door for screens.
type SiteConfig struct {
	door.SiteConfig `koanf:",squash"`
	// Origins are further pages that may connect to this site. Default none.
	Origins []string `koanf:"origins"`
}

func (c Config) withDefaults() Config {
	c.Heartbeat = cmp.Or(c.Heartbeat, time.Second)
	c.Stale = cmp.Or(c.Stale, 2*time.Second)
	c.StaleClose = cmp.Or(c.StaleClose, 5*time.Second)
	c.QueueFrames = cmp.Or(c.QueueFrames, 256)
	c.QueueBytes = cmp.Or(c.QueueBytes, 1<<20)
	c.WriteTimeout = cmp.Or(c.WriteTimeout, 5*time.Second)
	c.HandshakeTimeout = cmp.Or(c.HandshakeTimeout, 10*time.Second)
	c.MaxConnections = cmp.Or(c.MaxConnections, 20_000)
	c.Drain = cmp.Or(c.Drain, 5*time.Second)
	c.Log = cmp.Or(c.Log, slog.Default())
	return c
}

// Validate reports every mistake, each line beginning with the key's path. It reads no files.
func (c Config) Validate() error {
	var errs []error
	if len(c.Listen) == 0 {
		errs = append(errs, errors.New("listen: required: the addresses screens connect to"))
	}
	addrs := make(map[string]int)
	for i, l := range c.Listen {
		if _, _, err := net.SplitHostPort(l.Addr); err != nil {
			errs = append(errs, fmt.Errorf("listen[%d].addr: %q is not host:port", i, l.Addr))
		} else if first, taken := addrs[l.Addr]; taken && !strings.HasSuffix(l.Addr, ":0") {
			errs = append(errs, fmt.Errorf("listen[%d].addr: %s is listen[%d]'s already", i, l.Addr, first))
		} else {
			addrs[l.Addr] = i
		}
		if (l.TLS.CertFile == "") != (l.TLS.KeyFile == "") {
			errs = append(errs, fmt.Errorf("listen[%d].tls: cert_file and key_file go together; one is missing", i))
		}
	}
	if len(c.Sites) == 0 {
		errs = append(errs, errors.New("sites: none has screens, so nobody could connect; give one screens, or leave listen out"))
	}
	if err := door.Validate(c.doors(), c.listeners()); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, checkOrigins("origins", c.Origins)...)
	for _, name := range slices.Sorted(maps.Keys(c.Sites)) {
		errs = append(errs, checkOrigins("sites."+name+".origins", c.Sites[name].Origins)...)
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"heartbeat", c.Heartbeat}, {"stale", c.Stale}, {"stale_close", c.StaleClose}, {"write_timeout", c.WriteTimeout},
		{"handshake_timeout", c.HandshakeTimeout}, {"drain", c.Drain},
	} {
		if d.value < 0 {
			errs = append(errs, fmt.Errorf("%s: %v is negative", d.key, d.value))
		}
	}
	for _, n := range []struct {
		key   string
		value int
	}{{"queue_frames", c.QueueFrames}, {"queue_bytes", c.QueueBytes}, {"max_connections", c.MaxConnections}} {
		if n.value < 0 {
			errs = append(errs, fmt.Errorf("%s: %d is negative", n.key, n.value))
		}
	}
	if d := c.withDefaults(); d.StaleClose <= d.Stale && d.Stale > 0 {
		errs = append(errs, fmt.Errorf("stale_close: %v is not longer than stale (%v)", d.StaleClose, d.Stale))
	}
	return errors.Join(errs...)
}

func (c Config) doors() map[string]door.SiteConfig {
	doors := make(map[string]door.SiteConfig, len(c.Sites))
	for name, s := range c.Sites {
		doors[name] = s.SiteConfig
	}
	return doors
}

func (c Config) listeners() []door.Listener {
	var out []door.Listener
	for _, l := range c.Listen {
		out = append(out, door.Listener{Addr: l.Addr, Site: l.Site})
	}
	return out
}

// checkOrigins refuses what no Origin header can equal. A pattern is refused too: an
// origin is compared whole.
func checkOrigins(path string, origins []string) []error {
	var errs []error
	for i, o := range origins {
		u, err := url.Parse(o)
		switch {
		case o == "" || err != nil || strings.ContainsAny(o, " \t*,"):
			errs = append(errs, fmt.Errorf("%s[%d]: %q is neither an origin (scheme://host) nor a bare word; patterns are not known", path, i, o))
		case u.Scheme != "" && (u.Host == "" || u.Path != "" || u.RawQuery != "" || u.Fragment != ""):
			errs = append(errs, fmt.Errorf("%s[%d]: %q is more or less than scheme://host[:port], which is all that a client sends", path, i, o))
		}
	}
	return errs
}
