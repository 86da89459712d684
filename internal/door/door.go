// Package door decides who may come in, and how a refusal reads. Edge and WebSocket
// gateway share it, so that a POS and a screen meet the same rule.
//
// The rule, in this order:
//
//  1. Authorization. Under "required" a missing one is the seed's 400, errorCode 1; a
//     wrong one is 401.
//  2. Site: the token's, else the path's or the listener's. A token of another site is
//     403, under "none" too: the visitor was meant for another door.
//  3. Security headers, against the Portal's encryption flag. On: both, in form, and a
//     fingerprint the site accepts now, if need be after one refresh; or neither, where
//     plain is accepted. Off: neither.
//
// A fingerprint is public, so it authenticates nothing and never names the site.
package door

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// Skew is how far a key may be outside its validity and still be accepted: the
// allowance for clocks. Use it for Keyring.Accept too, else a request let in here is
// refused there.
const Skew = 2 * time.Minute

// retryAfter is what a visitor is told to wait while a site's keys are out of reach:
// shorter than a Portal poll, since the first fetch is retried on its own.
const retryAfter = 5 * time.Second

// Keys are the sites' keys as the door needs them; *keysync.Keys is one. Its methods
// are called by many requests at once.
type Keys interface {
	// Site returns the site as last fetched, nil when it is not configured.
	Site(name string) *keysync.Site
	// RefreshFor fetches the site once because of an unknown fingerprint. nil means:
	// fetched, look again.
	RefreshFor(ctx context.Context, site, fingerprint string) error
}

// Door knows the credentials of all sites. It is safe for concurrent use.
type Door struct {
	// Fixed at birth.
	sites map[string]site
	// tokens is looked up by the hash of what was presented. A map lookup is not
	// constant-time, and need not be: what its time could tell is about the hash, which
	// the visitor cannot steer, and a token of 128 random bits is not found from the
	// beginning of its hash.
	tokens map[[sha256.Size]byte]holder
	keys   Keys
}

type site struct {
	open          bool // authorization: none
	allowInsecure bool
	acceptPlain   *bool
}

type holder struct{ site, name string }

// New makes a door. It refuses sites with mistakes, all named at once; what depends on
// listeners is checked by Validate.
func New(sites map[string]SiteConfig, keys Keys) (*Door, error) {
	errs := validateSites(sites)
	if keys == nil {
		errs = append(errs, errors.New("door: Keys is required"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	d := &Door{
		sites:  make(map[string]site, len(sites)),
		tokens: make(map[[sha256.Size]byte]holder),
		keys:   keys,
	}
	for name, c := range sites {
		d.sites[name] = site{
			open:          c.Authorization == AuthorizationNone,
			allowInsecure: c.AllowInsecure,
			acceptPlain:   c.AcceptPlain,
		}
		for _, t := range c.Tokens {
			sum, err := parseSHA256(t.SHA256)
			if err != nil {
				return nil, fmt.Errorf("sites.%s.tokens: %w", name, err)
			}
			d.tokens[sum] = holder{site: name, name: t.Name}
		}
	}
	return d, nil
}

// Visitor is who was let in.
type Visitor struct {
	// Site is the one the visitor belongs to.
	Site string
	// Who is the token's name, "" under authorization none.
	Who string
	// Plain: no IV and fingerprint came with the request, so its body is not encrypted.
	Plain bool
	// IV and Fingerprint as they stand in the headers; nil when Plain.
	IV, Fingerprint []byte
	// Keys is the site as it was when the visitor was checked: use it for the body, so
	// that one request sees one keyring.
	Keys *keysync.Site
}

// Admit checks r's authorization, its site and its security headers, and returns either
// the visitor or a refusal. It never reads the body. It may wait for one fetch from the
// Portal, bounded by r's context, when the fingerprint is unknown.
//
// pathSite is the site named by the path or the listener, "" = by the token only.
// loopback tells whether the listener can be reached from this machine only.
func (d *Door) Admit(r *http.Request, pathSite string, loopback bool) (Visitor, *Refusal) {
	v, refusal := d.identify(r.Header, pathSite, loopback)
	if refusal != nil {
		return Visitor{}, refusal
	}
	ivs, fingerprints := present(r.Header, envelope.HeaderIV), present(r.Header, envelope.HeaderFingerprint)
	keys := d.keys.Site(v.Site)
	if refusal := usable(keys); refusal != nil {
		return Visitor{}, refusal
	}
	v.Keys = keys
	switch {
	case !keys.Encryption && len(ivs)+len(fingerprints) == 0:
		v.Plain = true
		return v, nil
	case !keys.Encryption:
		return Visitor{}, Mismatch
	case len(ivs)+len(fingerprints) == 0 && d.sites[v.Site].plain(loopback):
		v.Plain = true
		return v, nil
	case len(ivs) != 1 || len(fingerprints) != 1:
		return Visitor{}, Incorrect
	}
	v.IV, v.Fingerprint = []byte(ivs[0]), []byte(fingerprints[0])
	if err := keys.Keyring.CheckIV(v.IV); err != nil {
		return Visitor{}, Undecryptable
	}
	if envelope.IsBindingFingerprint(v.Fingerprint) {
		return Visitor{}, Mismatch
	}
	if accepts(keys, v.Fingerprint) {
		return v, nil
	}
	return d.admitRefreshed(r.Context(), v)
}

// identify answers who comes and to which site.
func (d *Door) identify(h http.Header, pathSite string, loopback bool) (Visitor, *Refusal) {
	token, given, refusal := credential(h)
	if refusal != nil {
		return Visitor{}, refusal
	}
	who, known := holder{}, false
	if given {
		who, known = d.tokens[sha256.Sum256([]byte(token))]
	}
	s, configured := d.sites[pathSite]
	if known {
		if pathSite != "" && pathSite != who.site {
			return Visitor{}, Problem(http.StatusForbidden, "", "This credential is not for the site it was used at.")
		}
		return Visitor{Site: who.site, Who: who.name}, nil
	}
	switch {
	case configured && s.open && !loopback && !s.allowInsecure:
		// Validate refuses such a configuration; a program that skipped it stays shut.
		return Visitor{}, Problem(http.StatusForbidden, "", "This site takes visitors without authorization from its own machine only.")
	case configured && s.open:
		// What else may stand in Authorization is not ours to judge here.
		return Visitor{Site: pathSite}, nil
	case given:
		return Visitor{}, Problem(http.StatusUnauthorized, "", "This credential is not known here.")
	case pathSite != "" && !configured:
		return Visitor{}, Problem(http.StatusNotFound, "", "The site named by the path is not served here.")
	}
	return Visitor{}, Incorrect
}

// admitRefreshed is the second and last look, after one refresh.
func (d *Door) admitRefreshed(ctx context.Context, v Visitor) (Visitor, *Refusal) {
	_, held := v.Keys.Keyring.Key(v.Fingerprint)
	err := d.keys.RefreshFor(ctx, v.Site, string(v.Fingerprint))
	if errors.Is(err, keysync.ErrStillUnknown) {
		return Visitor{}, Mismatch
	}
	v.Keys = d.keys.Site(v.Site)
	if refusal := usable(v.Keys); refusal != nil {
		return Visitor{}, refusal
	}
	// The refresh may have brought other settings with it: what was checked against the
	// old value is checked again.
	switch {
	case !v.Keys.Encryption:
		return Visitor{}, Mismatch
	case v.Keys.Keyring.CheckIV(v.IV) != nil:
		return Visitor{}, Undecryptable
	case accepts(v.Keys, v.Fingerprint):
		return v, nil
	case err != nil && !held:
		// Nobody could say whether the key exists, so "mismatch" would be a guess.
		f := Problem(http.StatusServiceUnavailable, "", "The site's keys could not be refreshed, so this fingerprint can be neither accepted nor refused. Try again.")
		f.RetryAfter = retryAfter
		f.Ext = map[string]any{"reason": "keys-refresh-failed"}
		return Visitor{}, f
	}
	return Visitor{}, Mismatch
}

func (s site) plain(loopback bool) bool {
	if s.acceptPlain != nil {
		return *s.acceptPlain
	}
	return !s.open || loopback
}

// usable refuses while the site's keys were never fetched: nothing is known of the site
// then, not even whether it encrypts.
func usable(s *keysync.Site) *Refusal {
	if s != nil && !s.Fetched.IsZero() && (!s.Encryption || s.Keyring != nil) {
		return nil
	}
	f := Problem(http.StatusServiceUnavailable, "", "The site's keys have not been fetched from the Portal yet. Try again.")
	f.RetryAfter = retryAfter
	f.Ext = map[string]any{"reason": "keys-not-fetched"}
	return f
}

// accepts tells whether the fingerprint names a key of s inside its validity and Skew,
// the same bounds as Keyring.Accept's.
func accepts(s *keysync.Site, fingerprint []byte) bool {
	key, ok := s.Keyring.Key(fingerprint)
	if !ok {
		return false
	}
	now := time.Now()
	return !now.Before(key.ValidAfter().Add(-Skew)) && now.Before(key.ValidUntil().Add(Skew))
}

// credential reads the presented token. The seed says only "authorization", so both
// forms seen in the field are taken: "Bearer <token>", the scheme in any case, and the
// bare token. Another scheme is a credential too, one that nothing here matches.
// More than one header is refused: which of them counts would be a guess.
func credential(h http.Header) (token string, given bool, refusal *Refusal) {
	values := present(h, "Authorization")
	switch len(values) {
	case 0:
		return "", false, nil
	case 1:
	default:
		return "", false, Incorrect
	}
	token = values[0]
	if scheme, rest, ok := strings.Cut(token, " "); ok && strings.EqualFold(scheme, "Bearer") {
		token = strings.TrimSpace(rest)
	} else if strings.EqualFold(token, "Bearer") {
		token = ""
	}
	return token, token != "", nil
}

// present returns a header's values that are not empty: an empty one says nothing.
func present(h http.Header, name string) []string {
	var out []string
	for _, v := range h.Values(name) {
		if v = strings.TrimSpace(v); v != "" {
			out = append(out, v)
		}
	}
	return out
}
