package keysync

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// PortalConfig says how the Portal is reached: the section `portal` of a program's
// configuration.
type PortalConfig struct {
	// URL is the Portal's base address; a site is fetched from <url>/sites/<site>. https,
	// or http on a loopback address. No user, query or fragment. Required.
	URL string `koanf:"url"`

	// TokenFile holds the token for Authorization, one line. It is read again when the
	// Portal answers 401. Others than owner and group must have no access to it. Excludes
	// KeyID, SecretKeyFile and TokenURL; one of the two ways is required.
	TokenFile string `koanf:"token_file"`

	// KeyID and SecretKeyFile are the integrator's credentials, with which a token is
	// asked for at <token_url>/integrator/token. It is kept for 20 of the 21 days it
	// lives. The file is protected as TokenFile is. All three go together.
	KeyID         string `koanf:"key_id"`
	SecretKeyFile string `koanf:"secret_key_file"`

	// TokenURL is the base address of the token endpoint, of the same form as URL.
	TokenURL string `koanf:"token_url"`

	// AuthScheme stands before the token in Authorization; "none" sends the bare token.
	// Default Bearer.
	AuthScheme string `koanf:"auth_scheme"`

	// CAFile holds the authorities to trust for both addresses instead of the system's, PEM.
	CAFile string `koanf:"ca_file"`

	// Path is where the encryption block stands in the site object: member names
	// separated by dots. Default security.enterprise_kitchen.
	Path string `koanf:"path"`

	// Timeout ends one request, from the connection to the last byte of its answer.
	// Default 10s, at most 5m.
	Timeout time.Duration `koanf:"timeout"`

	// MaxBytes is the longest site object taken, after decompression. Default 1048576 (1
	// MiB), 1024 to 67108864.
	MaxBytes int64 `koanf:"max_bytes"`

	// Poll is the time between two requests for one site, give or take a tenth. A new
	// key is sealed with two polls after its beginning: use the same value for the whole
	// fleet. Default 60s, 100ms to 24h.
	Poll time.Duration `koanf:"poll"`

	// Insecure allows http:// beyond loopback. Keys and tokens then travel in clear.
	Insecure bool `koanf:"insecure"`
}

// Validate reports all mistakes at once, each line beginning with its key. It reads no
// file; [New] does.
func (c PortalConfig) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.URL == "" {
		wrong("url: required: the Portal's base address, as in https://portal.example")
	} else if err := checkURL(c.URL, c.Insecure); err != nil {
		wrong("url: %w", err)
	}
	issued := c.KeyID != "" || c.SecretKeyFile != "" || c.TokenURL != ""
	switch {
	case c.TokenFile == "" && !issued:
		wrong("token_file: required, or else key_id, secret_key_file and token_url")
	case c.TokenFile != "" && issued:
		wrong("token_file: excludes key_id, secret_key_file and token_url: keep one of the two ways")
	case issued:
		if c.KeyID == "" {
			wrong("key_id: required with secret_key_file and token_url")
		}
		if c.SecretKeyFile == "" {
			wrong("secret_key_file: required with key_id and token_url")
		}
		if c.TokenURL == "" {
			wrong("token_url: required with key_id and secret_key_file")
		} else if err := checkURL(c.TokenURL, c.Insecure); err != nil {
			wrong("token_url: %w", err)
		}
	}
	if strings.ContainsFunc(c.AuthScheme, func(r rune) bool { return r <= ' ' || r > '~' }) {
		wrong("auth_scheme: one word was expected, as Bearer, or none")
	}
	c = c.withDefaults()
	if slices.Contains(strings.Split(c.Path, "."), "") {
		wrong("path: %q has an empty name: member names separated by dots were expected", c.Path)
	}
	if c.Timeout < time.Millisecond || c.Timeout > 5*time.Minute {
		wrong("timeout: %v is out of range: 1ms to 5m", c.Timeout)
	}
	if c.MaxBytes < 1<<10 || c.MaxBytes > 64<<20 {
		wrong("max_bytes: %d is out of range: 1024 to %d", c.MaxBytes, 64<<20)
	}
	if c.Poll < 100*time.Millisecond || c.Poll > 24*time.Hour {
		wrong("poll: %v is out of range: 100ms to 24h", c.Poll)
	}
	return errors.Join(errs...)
}

func (c PortalConfig) withDefaults() PortalConfig {
	c.AuthScheme = cmp.Or(c.AuthScheme, "Bearer")
	c.Path = cmp.Or(c.Path, "security.enterprise_kitchen")
	c.Timeout = cmp.Or(c.Timeout, 10*time.Second)
	c.MaxBytes = cmp.Or(c.MaxBytes, 1<<20)
	c.Poll = cmp.Or(c.Poll, time.Minute)
	return c
}

// Config says which sites' keys are kept, and where they come from.
type Config struct {
	// Portal is where the sites' keys come from. Required.
	Portal PortalConfig `koanf:"portal"`

	// BindingFile holds the binding and lane keys of the sites, see [ReadBindingFile]. It
	// must be readable by its owner only and hold every site. Required.
	BindingFile string `koanf:"binding_file"`

	// NoBinding is for a vendor's own program, which has no binding keys and needs none:
	// [Site.Binding] is nil. Excludes BindingFile.
	NoBinding bool `koanf:"-"`

	// Sites are the sites by name, with the cipher settings of each. Required.
	Sites map[string]envelope.Settings `koanf:"-"`

	// Log gets state changes: a new key, encryption switched, refresh failing or working
	// again. Default slog.Default().
	Log *slog.Logger `koanf:"-"`

	// Metrics is where the metrics are registered. Default: nowhere.
	Metrics prometheus.Registerer `koanf:"-"`
}

// Validate reports all mistakes at once, each line beginning with its key. It reads no
// file; [New] does.
func (c Config) Validate() error {
	errs := prefixed("portal.", c.Portal.Validate())
	switch {
	case c.NoBinding && c.BindingFile != "":
		errs = append(errs, errors.New("binding_file: excluded by NoBinding"))
	case !c.NoBinding && c.BindingFile == "":
		errs = append(errs, errors.New("binding_file: required: the file with the sites' binding keys; `bridge binding mint` makes it"))
	}
	if len(c.Sites) == 0 {
		errs = append(errs, errors.New("sites: at least one site is required"))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Sites)) {
		if err := envelope.ValidName(name); err != nil {
			errs = append(errs, fmt.Errorf("sites: %w", err))
		}
		errs = append(errs, prefixed("sites."+name+".", c.Sites[name].Validate())...)
	}
	return errors.Join(errs...)
}

// prefixed takes joined errors apart and names where each stands.
func prefixed(prefix string, err error) []error {
	if err == nil {
		return nil
	}
	errs := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		errs = slices.Clone(joined.Unwrap())
	}
	for i, e := range errs {
		errs[i] = fmt.Errorf("%s%w", prefix, e)
	}
	return errs
}
