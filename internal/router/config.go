package router

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// Config says where each site's Kitchen is and how patiently it is served. The zero
// value of a field is its default.
type Config struct {
	// Sites are the Kitchens by the name of their site. An event of a site that is not
	// in it ends as failed, no-route. The program composes it from its own sites.
	Sites map[string]KitchenConfig `koanf:"-"`

	// AttemptTimeout is how long one POST may take, from dialling to the end of the
	// answer. A site may set its own. Default 3s.
	AttemptTimeout time.Duration `koanf:"attempt_timeout"`
	// Settle is how long a site's next POST waits after one that was sent and not
	// answered: the Kitchen may still be working on it. Default 1s.
	Settle time.Duration `koanf:"settle"`
	// BackoffMin and BackoffMax bound the wait after a failed attempt: it is drawn
	// between zero and a cap that doubles from BackoffMin up to BackoffMax. Defaults
	// 250ms and 10s.
	BackoffMin time.Duration `koanf:"backoff_min"`
	BackoffMax time.Duration `koanf:"backoff_max"`
	// RetryAfterMax is the longest wait a Kitchen may ask for with Retry-After; what is
	// longer is taken as this. An event's deadline is kept meanwhile. Default 10m.
	RetryAfterMax time.Duration `koanf:"retry_after_max"`
	// MaxAnswer is how much of a Kitchen's answer is kept for the report, in bytes. Reports
	// share one bounded stream, where the oldest give way. Default 16384.
	MaxAnswer int `koanf:"max_answer"`
	// MaxDeadline is the latest deadline an event may have, by kind, counted from when
	// the hub stored it: an edge with a wrong clock cannot keep an event alive longer.
	// It must not be shorter than the edges' deadline of the kind. Default 10m; alert 2m.
	MaxDeadline map[string]time.Duration `koanf:"max_deadline"`
	// DrainTimeout is how long a stop waits for attempts in flight and for their
	// reports. Default 10s.
	DrainTimeout time.Duration `koanf:"drain_timeout"`

	// Log: nil is slog.Default().
	Log *slog.Logger `koanf:"-"`
	// Metrics: nil registers nowhere.
	Metrics prometheus.Registerer `koanf:"-"`
}

// KitchenConfig is one site's Kitchen endpoint.
type KitchenConfig struct {
	// Endpoint names the Kitchen in reports and logs: ^[a-z0-9][a-z0-9_-]{0,62}$.
	// Events in flight when it is changed are delivered again. Default "kitchen".
	Endpoint string `koanf:"endpoint"`
	// URL is the base, http or https, without user, query and fragment: an order goes to
	// {url}/order. Required.
	URL string `koanf:"url"`
	// AuthorizationFile holds the value of the Authorization header, scheme included
	// ("Bearer …"), in one line. It is read at the start and again whenever the Kitchen
	// refuses it, so a new one needs no restart. "" sends none.
	AuthorizationFile string `koanf:"authorization_file"`
	// Headers are sent with every POST. They are no place for secrets, and none of
	// those the protocol or HTTP itself needs can be set.
	Headers map[string]string `koanf:"headers"`
	// Timeout replaces AttemptTimeout for this Kitchen. Default 0: not replaced.
	Timeout time.Duration `koanf:"timeout"`
	// CAFile holds the PEM certificates this Kitchen's is checked against, in place of
	// the system's. Needs https.
	CAFile string `koanf:"ca_file"`
	// AllowInsecure permits http:// beyond loopback: the credential, and the orders of a
	// site without encryption, are then readable on the way. Default false.
	AllowInsecure bool `koanf:"allow_insecure"`
}

// Defaults of Config and KitchenConfig.
const (
	defaultAttemptTimeout = 3 * time.Second
	defaultSettle         = time.Second
	defaultBackoffMin     = 250 * time.Millisecond
	defaultBackoffMax     = 10 * time.Second
	defaultRetryAfterMax  = 10 * time.Minute
	defaultMaxAnswer      = 16 << 10
	defaultMaxDeadline    = 10 * time.Minute
	defaultAlertDeadline  = 2 * time.Minute
	defaultDrainTimeout   = 10 * time.Second
	defaultEndpoint       = "kitchen"
)

// A report must fit into a message of the hub beside its headers, base64 twice.
const mostMaxAnswer = 128 << 10

// Validate reports every mistake at once, one a line, each with the key's path below
// this Config. It reads the files that the settings name.
func (c Config) Validate() error {
	var errs []error
	wrong := func(path, format string, args ...any) {
		errs = append(errs, fmt.Errorf(path+": "+format, args...))
	}
	for _, d := range []struct {
		path  string
		value time.Duration
	}{
		{"attempt_timeout", c.AttemptTimeout},
		{"settle", c.Settle},
		{"backoff_min", c.BackoffMin},
		{"backoff_max", c.BackoffMax},
		{"retry_after_max", c.RetryAfterMax},
		{"drain_timeout", c.DrainTimeout},
	} {
		if d.value < 0 {
			wrong(d.path, "%s is negative; leave it out for the default", d.value)
		}
	}
	if f := c.withDefaults(); f.BackoffMin > f.BackoffMax {
		wrong("backoff_min", "%s is longer than backoff_max, %s", f.BackoffMin, f.BackoffMax)
	}
	if c.MaxAnswer < 0 || c.MaxAnswer > mostMaxAnswer {
		wrong("max_answer", "%d bytes; between 0 (the default, %d) and %d are possible, as a report must fit into one message", c.MaxAnswer, defaultMaxAnswer, mostMaxAnswer)
	}
	for _, kind := range slices.Sorted(maps.Keys(c.MaxDeadline)) {
		if err := envelope.ValidName(kind); err != nil {
			wrong("max_deadline."+kind, "not the name of a kind: %w", err)
		}
		if d := c.MaxDeadline[kind]; d <= 0 {
			wrong("max_deadline."+kind, "%s; it must be longer than nothing", d)
		}
	}
	for _, site := range slices.Sorted(maps.Keys(c.Sites)) {
		if err := envelope.ValidName(site); err != nil {
			wrong("sites."+site, "%w", err)
		}
		for _, err := range lines(c.Sites[site].Validate()) {
			errs = append(errs, fmt.Errorf("sites.%s.%w", site, err))
		}
	}
	return errors.Join(errs...)
}

// Validate reports every mistake at once, one a line, each with the key's path below
// this KitchenConfig. It reads the files that the settings name.
func (c KitchenConfig) Validate() error {
	var errs []error
	wrong := func(path, format string, args ...any) {
		errs = append(errs, fmt.Errorf(path+": "+format, args...))
	}
	if c.Endpoint != "" {
		if err := envelope.ValidName(c.Endpoint); err != nil {
			wrong("endpoint", "%w", err)
		}
	}
	u, err := c.base()
	if err != nil {
		wrong("url", "%w", err)
	}
	if c.Timeout < 0 {
		wrong("timeout", "%s is negative; leave it out for attempt_timeout", c.Timeout)
	}
	if _, err := c.authorization(); err != nil {
		wrong("authorization_file", "%w", err)
	}
	if c.CAFile != "" {
		if u != nil && u.Scheme != "https" {
			wrong("ca_file", "it checks nothing under %s://; use an https url, or leave it out", u.Scheme)
		}
		if _, err := c.tlsConfig(); err != nil {
			wrong("ca_file", "%w", err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Headers)) {
		if err := checkHeader(name, c.Headers[name]); err != nil {
			wrong("headers."+name, "%w", err)
		}
	}
	return errors.Join(errs...)
}

// base parses the URL. Its errors never quote it: people write credentials into URLs.
func (c KitchenConfig) base() (*url.URL, error) {
	if c.URL == "" {
		return nil, errors.New("required, as https://kitchen.example")
	}
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return nil, errors.New("not a URL; write it as https://kitchen.example")
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("neither http nor https; write it as https://kitchen.example")
	case u.Hostname() == "":
		return nil, errors.New("it names no host; write it as https://kitchen.example")
	case u.User != nil:
		return nil, errors.New("it holds a user; put the credential into authorization_file")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, errors.New("it holds a query or fragment; the kind is appended to the path, so it must be a plain base")
	case u.Scheme == "http" && !c.AllowInsecure && !loopback(u.Hostname()):
		return nil, errors.New("http beyond loopback shows the credential, and the orders of a site without encryption, to whoever is on the way; use https, or set allow_insecure")
	}
	u.Path = strings.TrimRight(u.Path, "/")
	u.RawPath = strings.TrimRight(u.RawPath, "/")
	return u, nil
}

func loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// authorization reads the credential; "" when none is configured.
func (c KitchenConfig) authorization() (envelope.Secret, error) {
	if c.AuthorizationFile == "" {
		return "", nil
	}
	raw, err := os.ReadFile(c.AuthorizationFile)
	if err != nil {
		return "", err
	}
	value := strings.TrimSpace(string(raw))
	switch {
	case value == "":
		return "", fmt.Errorf("%s is empty; it must hold the value of the Authorization header", c.AuthorizationFile)
	case !headerText(value):
		return "", fmt.Errorf("%s holds more than one line, or control characters; it must hold the value of the Authorization header", c.AuthorizationFile)
	}
	return envelope.Secret(value), nil
}

// tlsConfig returns nil for the system's defaults.
func (c KitchenConfig) tlsConfig() (*tls.Config, error) {
	if c.CAFile == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate in PEM", c.CAFile)
	}
	return &tls.Config{RootCAs: pool}, nil
}

// reservedHeaders are those that the protocol or HTTP itself sets.
var reservedHeaders = map[string]string{
	"accept":              "",
	"accept-encoding":     "",
	"authorization":       "; its value belongs into authorization_file",
	"connection":          "",
	"content-encoding":    "",
	"content-length":      "",
	"content-type":        "",
	"cookie":              "",
	"expect":              "",
	"host":                "",
	"idempotency-key":     "",
	"keep-alive":          "",
	"proxy-authorization": "",
	"sec-fingerprint":     "",
	"sec-iv":              "",
	"te":                  "",
	"traceparent":         "",
	"trailer":             "",
	"transfer-encoding":   "",
	"upgrade":             "",
	"x-idempotency-key":   "",
}

func checkHeader(name, value string) error {
	lower := strings.ToLower(name)
	advice, reserved := reservedHeaders[lower]
	switch {
	case reserved || strings.HasPrefix(lower, "kb-"):
		return errors.New("the bridge or HTTP itself sets this header" + advice)
	case !headerName(name):
		return errors.New("not the name of a header")
	case !headerText(value):
		return errors.New("the value holds control characters")
	}
	return nil
}

// headerName tells whether s is a token of RFC 9110.
func headerName(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		alphanumeric := '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
		return !alphanumeric && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}

func headerText(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f })
}

func (c Config) withDefaults() Config {
	c.AttemptTimeout = cmp.Or(c.AttemptTimeout, defaultAttemptTimeout)
	c.Settle = cmp.Or(c.Settle, defaultSettle)
	c.BackoffMin = cmp.Or(c.BackoffMin, defaultBackoffMin)
	c.BackoffMax = cmp.Or(c.BackoffMax, defaultBackoffMax)
	c.RetryAfterMax = cmp.Or(c.RetryAfterMax, defaultRetryAfterMax)
	c.MaxAnswer = cmp.Or(c.MaxAnswer, defaultMaxAnswer)
	c.DrainTimeout = cmp.Or(c.DrainTimeout, defaultDrainTimeout)
	c.Log = cmp.Or(c.Log, slog.Default())
	return c
}

// maxDeadline is the longest life of an event of the kind in the hub.
func (c *Config) maxDeadline(kind string) time.Duration {
	if d, ok := c.MaxDeadline[kind]; ok {
		return d
	}
	if kind == "alert" {
		return defaultAlertDeadline
	}
	return defaultMaxDeadline
}

// lines takes an error of errors.Join apart.
func lines(err error) []error {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	return []error{err}
}
