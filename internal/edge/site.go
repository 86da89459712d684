package edge

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

// site is what ingest knows of one.
type site struct {
	// Fixed at birth.
	acceptStatus int
	jsonString   bool
	kinds        map[string]kind

	// gate holds a token for each request of the site that is being read or stored, or
	// waits for the Portal, so that one site's trouble does not take all slots.
	gate chan struct{}

	// sayNoKey bounds how often it is said that no key may seal: each request would.
	sayNoKey rate.Sometimes
}

type kind struct {
	deadline time.Duration
	order    pointer
}

// newSites makes the sites of a configuration with its defaults.
func (c Config) newSites() (map[string]*site, error) {
	var errs []error
	follow := func(key string, text *string) pointer {
		p, err := parsePointer(*text)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s.order_id: %w", key, err))
		}
		return p
	}
	kinds := make(map[string]kind, len(c.Kinds))
	for name, k := range c.Kinds {
		kinds[name] = kind{deadline: k.Deadline, order: follow("kinds."+name, k.OrderID)}
	}
	sites := make(map[string]*site, len(c.Sites))
	for name, s := range c.Sites {
		own := kinds
		if s.OrderID != nil {
			p := follow("sites."+name, s.OrderID)
			own = maps.Clone(kinds)
			for name, k := range own {
				k.order = p
				own[name] = k
			}
		}
		sites[name] = &site{
			acceptStatus: s.AcceptStatus, jsonString: s.Body == bodyJSONString, kinds: own,
			gate: make(chan struct{}, c.MaxSiteRequests), sayNoKey: rate.Sometimes{First: 1, Interval: time.Minute},
		}
	}
	return sites, errors.Join(errs...)
}

// gatedKeys counts a request that waits for the Portal against its site: whoever makes up
// fingerprints takes that site's room and nobody else's (I9).
type gatedKeys struct {
	door.Keys
	sites map[string]*site
}

var errGate = errors.New("as many requests of the site as may are under way")

func (k gatedKeys) RefreshFor(ctx context.Context, site, fingerprint string) error {
	gate := k.sites[site].gate
	if !take(gate) {
		return errGate
	}
	defer give(gate)
	return k.Keys.RefreshFor(ctx, site, fingerprint)
}
