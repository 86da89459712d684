package door

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// Values of SiteConfig.Authorization.
const (
	AuthorizationRequired = "required"
	AuthorizationNone     = "none"
)

// SiteConfig says who may come in at one site's door.
type SiteConfig struct {
	// Authorization: "required" (default) asks for one of Tokens; "none" asks for
	// nothing, as in the seed's own examples. none excludes tokens, needs a path or
	// a listener that names the site, and beyond loopback allow_insecure.
	Authorization string `koanf:"authorization"`
	// AcceptPlain admits requests without both security headers while the Portal has
	// encryption switched on for the site. Default: true with required; with none only
	// on loopback listeners. Of no effect while the Portal has encryption switched off:
	// then plain is the only way.
	AcceptPlain *bool `koanf:"accept_plain"`
	// AllowInsecure lets "none" be served beyond loopback: whoever reaches the
	// listener may send orders to the site, or watch its traffic. Default false.
	AllowInsecure bool `koanf:"allow_insecure"`
	// Tokens are the credentials that open this site, and only this site.
	Tokens []TokenConfig `koanf:"tokens"`
}

// TokenConfig is one credential, kept as a hash.
type TokenConfig struct {
	// Name says who holds the token, unique in its site: ^[a-z0-9][a-z0-9_-]{0,62}$.
	// It stands in logs and is part of a message's identity: a new token for the same
	// POS keeps its name only by replacing the old one.
	Name string `koanf:"name"`
	// SHA256 is the hexadecimal SHA-256 of the token. The token must be random with at
	// least 128 bits: the hash of anything a person could choose is found by guessing.
	SHA256 string `koanf:"sha256"`
}

// Listener is what Validate needs to know of an address that serves the sites.
type Listener struct {
	// Addr is the address listened on, "host:port".
	Addr string
	// Site is the only site served here, "" = all of them.
	Site string
}

// TokenSHA256 returns what TokenConfig.SHA256 holds for token.
func TokenSHA256(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

// Loopback tells whether addr ("host:port" or a host) can be reached from this
// machine only. A name other than localhost, and an empty host, count as not.
func Loopback(addr string) bool {
	host := addr
	if h, _, err := net.SplitHostPort(addr); err == nil {
		host = h
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return err == nil && ip.Unmap().IsLoopback()
}

// Validate reports every mistake in sites and in how listeners serve them, each line
// beginning with the key's path ("sites.<name>.…", "listen[<i>].…"). A program calls
// it before New, which knows no listeners.
func Validate(sites map[string]SiteConfig, listeners []Listener) error {
	errs := validateSites(sites)
	for i, l := range listeners {
		if l.Site == "" {
			continue
		}
		if _, ok := sites[l.Site]; !ok {
			errs = append(errs, fmt.Errorf("listen[%d].site: %q is not one of sites; configure it there or name another", i, l.Site))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sites)) {
		if s := sites[name]; s.Authorization != AuthorizationNone || s.AllowInsecure {
			continue
		}
		for i, l := range listeners {
			if (l.Site == "" || l.Site == name) && !Loopback(l.Addr) {
				errs = append(errs, fmt.Errorf("sites.%s.authorization: none, but listen[%d] (%s) serves the site beyond loopback, to anybody; "+
					"set authorization: required, listen on 127.0.0.1, or set allow_insecure: true", name, i, l.Addr))
			}
		}
	}
	return errors.Join(errs...)
}

// validateSites checks what needs no listener.
func validateSites(sites map[string]SiteConfig) []error {
	var errs []error
	holders := make(map[string]string) // by hash: the path of the token that has it
	for _, name := range slices.Sorted(maps.Keys(sites)) {
		s, path := sites[name], "sites."+name
		if err := envelope.ValidName(name); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
		}
		switch s.Authorization {
		case "", AuthorizationRequired:
			if len(s.Tokens) == 0 {
				errs = append(errs, fmt.Errorf("%s.tokens: empty, so nobody could come in; add a token, or set authorization: none", path))
			}
		case AuthorizationNone:
			if len(s.Tokens) > 0 {
				errs = append(errs, fmt.Errorf("%s.tokens: of no use under authorization: none; remove one of the two", path))
			}
		default:
			errs = append(errs, fmt.Errorf("%s.authorization: %q is neither required nor none", path, s.Authorization))
		}
		names := make(map[string]bool)
		for i, t := range s.Tokens {
			at := fmt.Sprintf("%s.tokens[%d]", path, i)
			if err := envelope.ValidName(t.Name); err != nil {
				errs = append(errs, fmt.Errorf("%s.name: %w", at, err))
			} else if names[t.Name] {
				errs = append(errs, fmt.Errorf("%s.name: %q stands twice in the site; messages are told apart by it", at, t.Name))
			}
			names[t.Name] = true
			sum, err := parseSHA256(t.SHA256)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s.sha256: %w", at, err))
				continue
			}
			key := string(sum[:])
			if other, taken := holders[key]; taken {
				errs = append(errs, fmt.Errorf("%s.sha256: the same token as %s; a token is bound to one site and one holder", at, other))
				continue
			}
			holders[key] = at
		}
	}
	return errs
}

// parseSHA256 reads a configured hash. What it says never repeats the value: an
// operator may have put the token itself there.
func parseSHA256(s string) ([sha256.Size]byte, error) {
	var sum [sha256.Size]byte
	if s == "" {
		return sum, errors.New("required: the hexadecimal SHA-256 of the token")
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(sum) {
		return sum, fmt.Errorf("%d characters that are not a SHA-256 in hexadecimal (64 of 0-9, a-f); put the token's hash here, not the token", len(s))
	}
	copy(sum[:], b)
	if sum == sha256.Sum256(nil) {
		return sum, errors.New("this is the hash of the empty text, which no visitor can present")
	}
	return sum, nil
}
