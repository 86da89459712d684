package router

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// form is an event as its Kitchen gets it.
type form struct {
	body []byte
	// iv and fingerprint are the security headers; both are empty for a plain body.
	iv, fingerprint string
}

func (f form) sealed() bool { return f.fingerprint != "" }

var (
	// errPoison: the keys are at hand, and the event does not open under them. Waiting
	// changes nothing.
	errPoison = errors.New("the event does not open under its own key")
	// errNoOtherKey: there is no valid key beside the one the Kitchen refused.
	errNoOtherKey = errors.New("the site has no other valid key")
	// errNotFetched: the Portal has not been asked yet whether the site is encrypted.
	errNotFetched = errors.New("the site's keys were never fetched")
)

// formOf brings an event into the form that the site's Kitchen expects now, without the
// key named refused ("" = none). What can be passed on untouched is: the message's bytes
// reach the Kitchen as the POS sent them. Any error but errPoison may go away.
func formOf(t envelope.Triple, site *keysync.Site, refused string, now time.Time) (form, error) {
	if envelope.IsBindingFingerprint(t.Fingerprint) {
		if site.Fetched.IsZero() {
			return form{}, errNotFetched
		}
		plain, err := site.Binding.OpenPlain(nil, t)
		if err != nil {
			return form{}, poison(err)
		}
		if !site.Encryption {
			return form{body: plain}, nil
		}
		return seal(plain, site, refused, now)
	}

	pass := form{body: t.Message, iv: string(t.IV), fingerprint: string(t.Fingerprint)}
	if site.Fetched.IsZero() {
		// The edge had the site's keys, and so has the Kitchen.
		return pass, nil
	}
	if site.Encryption && refused != pass.fingerprint {
		if key, known := site.Keyring.Key(t.Fingerprint); known && now.Before(key.ValidUntil()) {
			return pass, nil
		}
		// The key ended while the event waited, or is none of the Portal's: if another one
		// cannot be had, the Kitchen may still know it.
		if plain, err := site.Recover(nil, t); err == nil {
			if f, err := seal(plain, site, cmp.Or(refused, pass.fingerprint), now); err == nil {
				return f, nil
			}
		}
		return pass, nil
	}
	plain, err := site.Recover(nil, t)
	switch {
	case err != nil:
		return form{}, poison(err)
	case !site.Encryption:
		return form{body: plain}, nil
	}
	return seal(plain, site, refused, now)
}

func poison(err error) error {
	if errors.Is(err, envelope.ErrDecrypt) || errors.Is(err, envelope.ErrIV) {
		return fmt.Errorf("%w: %w", errPoison, err)
	}
	return err
}

func seal(plain []byte, site *keysync.Site, refused string, now time.Time) (form, error) {
	key, err := otherKey(site.Keyring, refused, now)
	if err != nil {
		return form{}, err
	}
	t, err := key.Seal(plain)
	if err != nil {
		return form{}, err
	}
	return form{body: t.Message, iv: string(t.IV), fingerprint: string(t.Fingerprint)}, nil
}

// otherKey is the primary, or when that was refused, the newest other key that is valid.
func otherKey(ring *envelope.Keyring, refused string, now time.Time) (*envelope.Key, error) {
	primary, err := ring.Primary(now)
	if err != nil {
		return nil, err
	}
	if primary.Fingerprint() != refused {
		return primary, nil
	}
	for _, k := range ring.Keys() {
		if k.Fingerprint() != refused && !now.Before(k.ValidAfter()) && now.Before(k.ValidUntil()) {
			return k, nil
		}
	}
	return nil, errNoOtherKey
}
