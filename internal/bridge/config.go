package bridge

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/router"
	"github.com/kitchenbridge/kitchenbridge/internal/wsgate"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Config is the reference of the bridge's configuration file. The zero value of a field
// is its default.
type Config struct {
	// Name of this bridge in logs and at the hub: ^[a-z0-9][a-z0-9_-]{0,62}$.
	// Default "bridge".
	Name string `koanf:"name"`
	// Data is the folder of the embedded hub: streams, consumers, buckets. One bridge at
	// a time may use it. Default "kitchenbridge-data". Of no account with hub.urls.
	Data string `koanf:"data"`
	// Admin is where ops look: /healthz, /readyz, /metrics.
	Admin AdminConfig `koanf:"admin"`
	// Hub: embedded by default; hub.urls names another one.
	Hub broker.HubConfig `koanf:"hub"`
	// Portal is where the sites' keys come from.
	Portal keysync.PortalConfig `koanf:"portal"`
	// BindingFile holds the sites' binding and lane keys, 0600. The edges need the same
	// one. `bridge binding mint` makes it. Required.
	BindingFile string `koanf:"binding_file"`
	// Cipher holds for every site that has no cipher of its own. cipher.profile must be
	// set here or at each site.
	Cipher envelope.Settings `koanf:"cipher"`
	// Delivery says how patiently Kitchens are served.
	Delivery router.Config `koanf:"delivery"`
	// Screens is the WebSocket gate. It is closed while screens.listen is empty.
	Screens wsgate.Config `koanf:"screens"`
	// Sites by name. Required, at least one.
	Sites map[string]SiteConfig `koanf:"sites"`

	// Log: nil is slog.Default().
	Log *slog.Logger `koanf:"-"`
}

// AdminConfig is the listener for ops. It has no authorization of its own: keep it on
// loopback or behind one that has.
type AdminConfig struct {
	// Listen is host:port. Default "127.0.0.1:9642"; "off" opens none.
	Listen string `koanf:"listen"`
}

// SiteConfig is one site.
type SiteConfig struct {
	// Cipher replaces the fleet's, as a whole, when its profile is set.
	Cipher envelope.Settings `koanf:"cipher"`
	// Kitchen is where the site's events go. Without a url they end as failed, no-route.
	Kitchen router.KitchenConfig `koanf:"kitchen"`
	// Screens says who may watch the site at the gate. Default: nobody.
	Screens *wsgate.SiteConfig `koanf:"screens"`
}

func (c Config) withDefaults() Config {
	c.Name = cmp.Or(c.Name, "bridge")
	c.Data = cmp.Or(c.Data, "kitchenbridge-data")
	c.Admin.Listen = cmp.Or(c.Admin.Listen, "127.0.0.1:9642")
	c.Log = cmp.Or(c.Log, slog.Default())
	return c
}

// Validate reports every mistake at once, one a line, each beginning with the path of
// its setting.
func (c Config) Validate() error {
	c = c.withDefaults()
	var errs []error
	if err := envelope.ValidName(c.Name); err != nil {
		errs = append(errs, fmt.Errorf("name: %w", err))
	}
	if c.Admin.Listen != "off" {
		if _, _, err := net.SplitHostPort(c.Admin.Listen); err != nil {
			errs = append(errs, fmt.Errorf("admin.listen: %q is neither host:port nor off", c.Admin.Listen))
		}
	}
	errs = append(errs, below("hub.", c.Hub.Validate())...)
	errs = append(errs, below("portal.", c.Portal.Validate())...)
	if c.BindingFile == "" {
		errs = append(errs, errors.New("binding_file: required; make one with: bridge binding mint --file binding.json --site NAME"))
	} else if _, err := os.Stat(c.BindingFile); err != nil {
		errs = append(errs, fmt.Errorf("binding_file: %w; make one with: bridge binding mint --file %s --site NAME", err, filepath.Base(c.BindingFile)))
	}
	if len(c.Sites) == 0 {
		errs = append(errs, errors.New("sites: required, at least one"))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Sites)) {
		at := "sites." + name
		if err := envelope.ValidName(name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", at, err))
		}
		s := c.Sites[name]
		if s.Cipher != (envelope.Settings{}) && s.Cipher.Profile == "" {
			errs = append(errs, fmt.Errorf("%s.cipher.profile: required beside the other settings of a cipher: a site's cipher replaces the fleet's as a whole", at))
		} else if s.Cipher.Profile != "" {
			errs = append(errs, below(at+".cipher.", s.Cipher.Validate())...)
		} else {
			// Once for the fleet, not once for each of its sites.
			errs = append(errs, below("cipher.", c.Cipher.Validate())...)
		}
		if s.Screens != nil && len(c.Screens.Listen) == 0 {
			errs = append(errs, fmt.Errorf("%s.screens: screens.listen is empty, so the gate is closed; name an address there, or leave this out", at))
		}
	}
	errs = append(errs, below("delivery.", c.delivery().Validate())...)
	if len(c.Screens.Listen) > 0 {
		errs = append(errs, below("screens.", c.screens().Validate())...)
	}
	// A site's name is checked by every part that knows the site; once is enough to read.
	said := make(map[string]bool)
	return errors.Join(slices.DeleteFunc(errs, func(err error) bool {
		again := said[err.Error()]
		said[err.Error()] = true
		return again
	})...)
}

// cipher is what holds for a site.
func (c Config) cipher(site string) envelope.Settings {
	if s := c.Sites[site].Cipher; s.Profile != "" {
		return s
	}
	return c.Cipher
}

// delivery gives the router the sites that have a Kitchen.
func (c Config) delivery() router.Config {
	r := c.Delivery
	r.Log = c.Log
	r.Sites = make(map[string]router.KitchenConfig)
	for name, s := range c.Sites {
		if s.Kitchen.URL != "" {
			r.Sites[name] = s.Kitchen
		}
	}
	return r
}

// screens gives the gate the sites that have screens.
func (c Config) screens() wsgate.Config {
	g := c.Screens
	g.Log = c.Log
	g.Sites = make(map[string]wsgate.SiteConfig)
	for name, s := range c.Sites {
		if s.Screens != nil {
			g.Sites[name] = *s.Screens
		}
	}
	return g
}

// below takes a joined error apart and puts the part's path before each line. What a
// part says of "sites.NAME.x" is found in the file under the site itself.
func below(path string, err error) []error {
	if err == nil {
		return nil
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range many.Unwrap() {
			out = append(out, below(path, e)...)
		}
		return out
	}
	text := err.Error()
	if rest, ok := strings.CutPrefix(text, "sites."); ok {
		if name, setting, ok := strings.Cut(rest, "."); ok {
			part := map[string]string{"delivery.": "kitchen.", "screens.": "screens."}[path]
			return []error{fmt.Errorf("sites.%s.%s%s", name, part, setting)}
		}
		return []error{fmt.Errorf("sites.%s", rest)}
	}
	return []error{fmt.Errorf("%s%s", path, text)}
}
