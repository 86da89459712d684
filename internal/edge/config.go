package edge

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Config is the configuration of an edge. It is the reference of its file: every setting
// is a field here, durations are written 10m or 500ms.
type Config struct {
	// Name of this edge among all edges of the hub: ^[a-z0-9][a-z0-9_-]{0,62}$. Two edges
	// never share one. Required.
	Name string `koanf:"name"`

	// Listen are the addresses for POS. Default: one, 127.0.0.1:8080, for all sites.
	Listen []ListenConfig `koanf:"listen"`

	// Admin is the address for ops.
	Admin AdminConfig `koanf:"admin"`

	// Hub is where events go. Hub.URLs is required: an edge embeds no hub.
	Hub broker.HubConfig `koanf:"hub"`

	// Portal is where the sites' keys come from. Required.
	Portal keysync.PortalConfig `koanf:"portal"`

	// BindingFile holds the sites' binding and lane keys, mode 0600; the same file as the
	// bridge's. Required.
	BindingFile string `koanf:"binding_file"`

	// Cipher is the cipher profile of the sites that set none of their own. Default: none,
	// so each site needs its own.
	Cipher envelope.Settings `koanf:"cipher"`

	// Sites are the sites served here, by name. At least one is required.
	Sites map[string]SiteConfig `koanf:"sites"`

	// Kinds are the kinds of messages taken, by name: POST /<kind>. order and alert are
	// always there and may be set differently; others are added. A name is as that of a
	// site, and none of expired, report, sites, messages, healthz, readyz, metrics.
	Kinds map[string]KindConfig `koanf:"kinds"`

	// MaxBody is the longest body taken, in bytes, as it is sent (an encrypted one: its
	// text). Default 122880 (120 KiB), at least 1024, at most what still fits into a message
	// of the hub (256 KiB) once it is sealed and encoded: 193520 under base64, 129008 at an
	// edge with a site under hex.
	MaxBody int64 `koanf:"max_body"`

	// Wait is how long a POS waits for the Kitchen's answer when its request does not
	// prefer another time (Prefer: wait=N). Default 2s, at most MaxWait.
	Wait time.Duration `koanf:"wait"`

	// MaxWait is the longest a request may wait for the Kitchen. Default 30s, at most 5m.
	MaxWait time.Duration `koanf:"max_wait"`

	// CommitWait is how long a request waits to be stored: for the messages of its site
	// before it, at most half of this, and for the hub's acknowledgement. After it, the
	// POS gets a 503. Default 5s, 100ms to 1m.
	CommitWait time.Duration `koanf:"commit_wait"`

	// MaxRequests is how many requests are read and stored at once; more get a 503. Those
	// that wait for a Kitchen do not count. Default 1024.
	MaxRequests int `koanf:"max_requests"`

	// MaxSiteRequests is the same for one site, so that one site's trouble leaves room for
	// the others. Default 128, at most MaxRequests.
	MaxSiteRequests int `koanf:"max_site_requests"`

	// MaxWaiting is how many requests wait for their Kitchen at once; more are answered at
	// once with what is known, as under Prefer: wait=0. Default 16384.
	MaxWaiting int `koanf:"max_waiting"`

	// Messages is how many messages are remembered, for GET /messages/{id} and to
	// recognize what comes again: settled ones for 24 hours, unsettled ones until they are
	// settled. Beyond it the one settled first is forgotten; when all are unsettled, new
	// requests get a 503. Default 100000, about 60 MB.
	Messages int `koanf:"messages"`

	// AnswerBytes bounds what is remembered of the Kitchens' answers, in bytes; beyond it
	// the message settled first is forgotten. Default 67108864 (64 MiB), at least 1048576.
	AnswerBytes int64 `koanf:"answer_bytes"`

	// Shutdown is how long a stop waits for the requests in flight. Default 10s, at most 5m.
	Shutdown time.Duration `koanf:"shutdown"`

	// Listening, when not nil, is called once when the addresses of Listen are open, with
	// them in that order.
	Listening func([]net.Addr) `koanf:"-"`

	// Log: nil is slog.Default().
	Log *slog.Logger `koanf:"-"`

	// Metrics is shown under /metrics. nil: a registry of the edge's own.
	Metrics *prometheus.Registry `koanf:"-"`
}

// ListenConfig is one address for POS.
type ListenConfig struct {
	// Addr is host:port. An empty host is every interface. Required.
	Addr string `koanf:"addr"`
	// Site is the only site served at this address. Default: all of them; the site is the
	// token's, or the path's (/sites/<site>/order).
	Site string `koanf:"site"`
	// TLS of this address. Default: none, so tokens and plain orders can be read on the way.
	TLS TLSConfig `koanf:"tls"`
}

// TLSConfig is a certificate; TLS 1.2 or later is spoken with it. A renewed certificate
// is used from the next start on.
type TLSConfig struct {
	// CertFile holds the certificate and its chain, PEM. With KeyFile or not at all.
	CertFile string `koanf:"cert_file"`
	// KeyFile holds the private key, PEM.
	KeyFile string `koanf:"key_file"`
}

func (c TLSConfig) on() bool { return c.CertFile != "" || c.KeyFile != "" }

// AdminConfig is the address for ops: /healthz, /readyz, /metrics.
type AdminConfig struct {
	// Listen is host:port, or "off". There is no authorization on it: keep it on loopback,
	// or behind something that has one. Default 127.0.0.1:9641.
	Listen string `koanf:"listen"`
}

// SiteConfig is one site.
type SiteConfig struct {
	// Cipher is the site's cipher profile, as the Kitchen and the POS have it. Default: the
	// edge's Cipher. Of no effect while the Portal has encryption switched off for the site.
	Cipher envelope.Settings `koanf:"cipher"`

	door.SiteConfig `koanf:",squash"`

	// AcceptStatus answers what is stored and not delivered yet: 202 (default), or 200 for
	// a POS that takes nothing else.
	AcceptStatus int `koanf:"accept_status"`

	// Body is the form of an encrypted body: "text" (default), the message itself; or
	// "json-string": it may also be a JSON string, in quotes, and the Kitchen gets what is
	// in it.
	Body string `koanf:"body"`

	// OrderID overrides the pointer of every kind for this site. Default: the kind's.
	OrderID *string `koanf:"order_id"`
}

// KindConfig is one kind of message.
type KindConfig struct {
	// Deadline is how long after acceptance a message may be delivered; afterwards it is
	// reported as failed. A POS shortens it with Kb-Within. Default 10m; alert 2m. 1s to
	// 72h, and not above the bridge's max_deadline of the kind.
	Deadline time.Duration `koanf:"deadline"`
	// OrderID is the JSON pointer (RFC 6901) of the order's id in the payload, a string or
	// number, which keeps an order and its updates together. "" switches that off; so does
	// a payload without it, for itself. Default /_id.
	OrderID *string `koanf:"order_id"`
}

const (
	defaultListen          = "127.0.0.1:8080"
	defaultAdmin           = "127.0.0.1:9641"
	adminOff               = "off"
	defaultDeadline        = 10 * time.Minute
	defaultAlertDeadline   = 2 * time.Minute
	defaultOrderID         = "/_id"
	defaultMaxBody         = 120 << 10
	defaultWait            = 2 * time.Second
	defaultMaxWait         = 30 * time.Second
	defaultCommitWait      = 5 * time.Second
	defaultMaxRequests     = 1024
	defaultMaxSiteRequests = 128
	defaultMaxWaiting      = 16384
	defaultMessages        = 100_000
	defaultAnswerBytes     = 64 << 20
	defaultShutdown        = 10 * time.Second

	// maxEvent is the longest message that the hub's stream takes, headers and body, and
	// eventRoom what is left in it for everything that is not the sealed payload.
	maxEvent        = 256 << 10
	eventRoom       = 4 << 10
	sealTag         = 16             // a256gcm appends as many bytes
	longestDeadline = 72 * time.Hour // what the hub keeps
)

// reserved are kinds that mean something else: to the bridge, or as a path here.
var reserved = []string{"expired", "report", "sites", "messages", "healthz", "readyz", "metrics"}

// withDefaults fills in what was left out.
func (c Config) withDefaults() Config {
	if len(c.Listen) == 0 {
		c.Listen = []ListenConfig{{Addr: defaultListen}}
	}
	c.Admin.Listen = cmp.Or(c.Admin.Listen, defaultAdmin)
	c.MaxBody = cmp.Or(c.MaxBody, defaultMaxBody)
	c.MaxWait = cmp.Or(c.MaxWait, defaultMaxWait)
	c.Wait = cmp.Or(c.Wait, min(defaultWait, c.MaxWait))
	c.CommitWait = cmp.Or(c.CommitWait, defaultCommitWait)
	c.MaxRequests = cmp.Or(c.MaxRequests, defaultMaxRequests)
	c.MaxSiteRequests = cmp.Or(c.MaxSiteRequests, min(defaultMaxSiteRequests, c.MaxRequests))
	c.MaxWaiting = cmp.Or(c.MaxWaiting, defaultMaxWaiting)
	c.Messages = cmp.Or(c.Messages, defaultMessages)
	c.AnswerBytes = cmp.Or(c.AnswerBytes, defaultAnswerBytes)
	c.Shutdown = cmp.Or(c.Shutdown, defaultShutdown)
	c.Log = cmp.Or(c.Log, slog.Default())

	kinds := map[string]KindConfig{"order": {}, "alert": {}}
	maps.Copy(kinds, c.Kinds)
	for name, k := range kinds {
		if name == "alert" {
			k.Deadline = cmp.Or(k.Deadline, defaultAlertDeadline)
		}
		k.Deadline = cmp.Or(k.Deadline, defaultDeadline)
		if k.OrderID == nil {
			k.OrderID = new(defaultOrderID)
		}
		kinds[name] = k
	}
	c.Kinds = kinds

	sites := maps.Clone(c.Sites)
	for name, s := range sites {
		s.AcceptStatus = cmp.Or(s.AcceptStatus, http.StatusAccepted)
		s.Body = cmp.Or(s.Body, bodyText)
		if s.Cipher == (envelope.Settings{}) {
			s.Cipher = c.Cipher
		}
		sites[name] = s
	}
	c.Sites = sites
	return c
}

// Values of SiteConfig.Body.
const (
	bodyText       = "text"
	bodyJSONString = "json-string"
)

// Validate reports all mistakes at once, each line beginning with the key it is about. It
// reads no file; New does.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if err := envelope.ValidName(c.Name); err != nil {
		wrong("name: %w", err)
	}
	errs = append(errs, c.checkListen()...)
	if c.Admin.Listen != adminOff {
		if _, _, err := net.SplitHostPort(c.Admin.Listen); err != nil {
			wrong("admin.listen: %w; write host:port, or off", err)
		}
	}
	if len(c.Hub.URLs) == 0 {
		wrong("hub.urls: required: the addresses of the hub, as in nats://hub.example:4222; an edge embeds none")
	}
	if c.Hub.Listen != "" || len(c.Hub.Users) > 0 || c.Hub.Sync != "" {
		wrong("hub: listen, users and sync are settings of an embedded hub; an edge embeds none, so set them at the bridge")
	} else {
		errs = append(errs, prefixed("hub.", c.Hub.Validate())...)
	}
	errs = append(errs, prefixed("portal.", c.Portal.Validate())...)
	if c.BindingFile == "" {
		wrong("binding_file: required: the file with the sites' binding keys, the same as the bridge's; `bridge binding mint` makes it")
	}
	errs = append(errs, c.checkSites()...)
	errs = append(errs, c.checkKinds()...)

	within := func(key string, v, least, most time.Duration) {
		if v < least || v > most {
			wrong("%s: %v is out of range: %v to %v", key, v, least, most)
		}
	}
	count := func(key string, v, least, most int64) {
		if v < least || v > most {
			wrong("%s: %d is out of range: %d to %d", key, v, least, most)
		}
	}
	count("max_body", c.MaxBody, 1<<10, c.largestBody())
	within("max_wait", c.MaxWait, time.Millisecond, 5*time.Minute)
	if c.MaxWait >= time.Millisecond {
		within("wait", c.Wait, time.Millisecond, c.MaxWait)
	}
	within("commit_wait", c.CommitWait, 100*time.Millisecond, time.Minute)
	count("max_requests", int64(c.MaxRequests), 1, 1<<20)
	count("max_site_requests", int64(c.MaxSiteRequests), 1, max(1, int64(c.MaxRequests)))
	count("max_waiting", int64(c.MaxWaiting), 1, 1<<20)
	count("messages", int64(c.Messages), 100, 100_000_000)
	count("answer_bytes", c.AnswerBytes, 1<<20, 1<<40)
	within("shutdown", c.Shutdown, time.Millisecond, 5*time.Minute)
	return errors.Join(errs...)
}

// largestBody is the longest plain body that fits into an event of every site.
func (c Config) largestBody() int64 {
	most := int64(maxEvent-eventRoom)/4*3 - sealTag
	for _, s := range c.Sites {
		if s.Cipher.MessageEncoding == envelope.Hex {
			return int64(maxEvent-eventRoom)/2 - sealTag
		}
	}
	return most
}

func (c Config) checkListen() []error {
	var errs []error
	seen := make(map[string]int)
	for i, l := range c.Listen {
		wrong := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("listen[%d]."+format, append([]any{i}, args...)...))
		}
		_, port, err := net.SplitHostPort(l.Addr)
		if err != nil {
			wrong("addr: %w; write host:port, as in 127.0.0.1:8080", err)
		} else if first, twice := seen[l.Addr]; twice && port != "0" {
			wrong("addr: %s is listen[%d] already", l.Addr, first)
		} else {
			seen[l.Addr] = i
		}
		if l.TLS.on() && l.TLS.CertFile == "" {
			wrong("tls.cert_file: required with key_file")
		}
		if l.TLS.on() && l.TLS.KeyFile == "" {
			wrong("tls.key_file: required with cert_file")
		}
	}
	return errs
}

func (c Config) checkSites() []error {
	var errs []error
	if len(c.Sites) == 0 {
		errs = append(errs, errors.New("sites: at least one site is required"))
	}
	doors := make(map[string]door.SiteConfig, len(c.Sites))
	fleet := false
	for _, name := range slices.Sorted(maps.Keys(c.Sites)) {
		s := c.Sites[name]
		doors[name] = s.SiteConfig
		// The fleet's is judged once, not once for each of its sites.
		if own := s.Cipher != c.Cipher; own {
			errs = append(errs, prefixed("sites."+name+".cipher.", s.Cipher.Validate())...)
		} else if !fleet {
			fleet = true
			errs = append(errs, prefixed("cipher.", s.Cipher.Validate())...)
		}
		if s.AcceptStatus != http.StatusAccepted && s.AcceptStatus != http.StatusOK {
			errs = append(errs, fmt.Errorf("sites.%s.accept_status: %d is neither 202 nor 200", name, s.AcceptStatus))
		}
		if s.Body != bodyText && s.Body != bodyJSONString {
			errs = append(errs, fmt.Errorf("sites.%s.body: %q is neither %s nor %s", name, s.Body, bodyText, bodyJSONString))
		}
		if s.OrderID != nil {
			if _, err := parsePointer(*s.OrderID); err != nil {
				errs = append(errs, fmt.Errorf("sites.%s.order_id: %w", name, err))
			}
		}
	}
	listeners := make([]door.Listener, len(c.Listen))
	for i, l := range c.Listen {
		listeners[i] = door.Listener{Addr: l.Addr, Site: l.Site}
	}
	return append(errs, prefixed("", door.Validate(doors, listeners))...)
}

func (c Config) checkKinds() []error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(c.Kinds)) {
		k := c.Kinds[name]
		if err := envelope.ValidName(name); err != nil {
			errs = append(errs, fmt.Errorf("kinds: %w", err))
		}
		if slices.Contains(reserved, name) {
			errs = append(errs, fmt.Errorf("kinds.%s: the name is reserved; choose another", name))
		}
		if k.Deadline < time.Second || k.Deadline > longestDeadline {
			errs = append(errs, fmt.Errorf("kinds.%s.deadline: %v is out of range: 1s to %v", name, k.Deadline, longestDeadline))
		}
		if _, err := parsePointer(*k.OrderID); err != nil {
			errs = append(errs, fmt.Errorf("kinds.%s.order_id: %w", name, err))
		}
	}
	return errs
}

// prefixed takes joined errors apart and says where each stands.
func prefixed(prefix string, err error) []error {
	if err == nil {
		return nil
	}
	errs := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		errs = slices.Clone(joined.Unwrap())
	}
	if prefix == "" {
		return errs
	}
	for i, e := range errs {
		errs[i] = fmt.Errorf("%s%w", prefix, e)
	}
	return errs
}
