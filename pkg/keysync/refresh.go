package keysync

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// demandEvery is the shortest time between two fetches of one site that Refresh starts.
	demandEvery = time.Second

	// unknownFor is how long a fingerprint that the Portal does not know is not asked for
	// again; less than a poll, which would find it anyway.
	unknownFor = 30 * time.Second

	// maxUnknown bounds the memory of unknown fingerprints over all sites.
	maxUnknown = 4096

	// maxFingerprint is the longest fingerprint a key can have.
	maxFingerprint = 128

	// fewSites is how many failing sites are logged one by one.
	fewSites = 16
)

// errStopped is what a refresh gets once Run has ended.
var errStopped = errors.New("keysync: stopped")

// flight is one fetch that is under way.
type flight struct {
	done chan struct{}
	err  error // written before done is closed
}

// do fetches the site, or joins the fetch under way; own tells which. The fetch does not
// end with its caller: others may wait for it, and its outcome counts.
func (k *Keys) do(ctx context.Context, st *siteState, demanded bool) (own bool, _ error) {
	st.mu.Lock()
	f := st.flight
	if f == nil {
		if demanded && !st.demanded.IsZero() && time.Since(st.demanded) < demandEvery {
			defer st.mu.Unlock()
			return false, st.err
		}
		f = &flight{done: make(chan struct{})}
		if !k.launch(func() { k.fly(st, f, demanded) }) {
			st.mu.Unlock()
			return false, errStopped
		}
		st.flight, own = f, true
	}
	st.mu.Unlock()
	select {
	case <-f.done:
		return own, f.err
	case <-ctx.Done():
		return own, context.Cause(ctx)
	}
}

// launch starts a fetch, unless Run has ended: it waits for those that were started.
func (k *Keys) launch(fly func()) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.life.Err() != nil {
		return false
	}
	k.flights.Go(fly)
	return true
}

// fly is the one fetch of a site, with its place in the books.
func (k *Keys) fly(st *siteState, f *flight, demanded bool) {
	asked, err := k.fetchAndNote(st)
	f.err = err
	st.mu.Lock()
	st.flight = nil
	if demanded && asked {
		st.demanded = time.Now()
	}
	st.mu.Unlock()
	close(f.done)
}

// fetchAndNote fetches, counts and notes the outcome; !asked when the Portal was not
// asked, or not to the end.
func (k *Keys) fetchAndNote(st *siteState) (asked bool, _ error) {
	if wait := k.held(); wait > 0 {
		return false, fmt.Errorf("keysync: site %s: the Portal asked to be left alone for another %v", st.name, wait.Round(time.Second))
	}
	result, err := k.fetch(k.life, st)
	if err != nil && k.life.Err() != nil {
		return false, errStopped
	}
	if err != nil && faultForgetKeys {
		none, _ := envelope.NewKeyring(st.settings)
		st.put(&Site{Name: st.name, Settings: st.settings, Keyring: none, retired: none})
	}
	if err != nil {
		if bad, ok := errors.AsType[*fetchError](err); ok {
			result = bad.reason
			if result == rateLimited {
				k.holdFor(bad.retryAfter)
			}
		}
		err = fmt.Errorf("keysync: site %s: %w", st.name, err)
	}
	k.count.WithLabelValues(string(result)).Inc()
	k.note(st, result, err)
	return true, err
}

// note keeps the outcome and logs where the state changes.
func (k *Keys) note(st *siteState, result reason, err error) {
	st.mu.Lock()
	before, logged := st.failures, st.loggedBad
	st.err = err
	if err != nil {
		st.failures++
	} else {
		st.failures, st.loggedBad = 0, false
	}
	failures := st.failures
	st.mu.Unlock()

	k.mu.Lock()
	switch {
	case before == 0 && failures > 0:
		k.failing++
	case before > 0 && failures == 0:
		k.failing--
	}
	failing, many := k.failing, k.many
	// An outage of the Portal concerns every site; one line for each doubling tells as much
	// as one for each site.
	crowd := failures == 1 && failing > fewSites
	k.many = crowd || many && failing > 0
	k.mu.Unlock()

	switch {
	case err == nil:
		if logged {
			k.log.Info("refresh from the portal works again", "site", st.name, "attempt", before+1)
		}
		if many && failing == 0 {
			k.log.Info("refresh from the portal works again for all sites")
		}
	case crowd:
		if failing&(failing-1) == 0 {
			k.log.Warn("refresh from the portal fails for many sites", "sites", failing, "reason", string(result))
		}
	case failures == 1, logged && failures == k.attemptsToCap():
		k.log.Warn("refresh from the portal failed", "site", st.name, "attempt", failures, "reason", string(result), "err", err)
		st.mu.Lock()
		st.loggedBad = true
		st.mu.Unlock()
	}
}

// held tells how long the Portal's rate limit still lasts.
func (k *Keys) held() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	return max(0, time.Until(k.hold))
}

func (k *Keys) holdFor(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if until := time.Now().Add(d); until.After(k.hold) {
		k.hold = until
	}
}

// Refresh fetches a site now, unless a fetch that Refresh started ended less than a
// second ago: then it returns that outcome at once. Callers of one site share one
// request. It waits for the Portal (portal.timeout for each request), never for a rate
// limit. After Run has ended it only fails. Errors: [ErrNoSite], the context's cause, or
// why the fetch failed; the keys in place stay.
func (k *Keys) Refresh(ctx context.Context, site string) error {
	st, ok := k.sites[site]
	if !ok {
		return fmt.Errorf("keysync: site %q: %w", site, ErrNoSite)
	}
	_, err := k.do(ctx, st, true)
	return err
}

// RefreshFor fetches a site because of a fingerprint that was not accepted. nil means
// that the site has a key of that name now: look again. [ErrStillUnknown] means that the
// Portal was asked, for this caller or shortly before, and there is nothing new: no key
// of that name, or the same key, outside its validity. Any other error means that it
// could not be told. Waiting and sharing are as for [Keys.Refresh].
func (k *Keys) RefreshFor(ctx context.Context, site, fingerprint string) error {
	st, ok := k.sites[site]
	if !ok {
		return fmt.Errorf("keysync: site %q: %w", site, ErrNoSite)
	}
	still := fmt.Errorf("keysync: site %s: %w", site, ErrStillUnknown)
	if len(fingerprint) > maxFingerprint || strings.ContainsRune(fingerprint, 0) || envelope.IsBindingFingerprint([]byte(fingerprint)) {
		return still // no key of the Portal can have that name
	}
	id := site + "\x00" + fingerprint
	if usableNow(st.now.Load(), fingerprint) {
		return nil // another caller's refresh brought it meanwhile
	}
	if k.isUnknown(id) {
		return still
	}
	// A fetch that was under way may have asked too early, so one of our own follows it.
	for range 2 {
		own, err := k.do(ctx, st, true)
		if _, has := st.now.Load().Keyring.Key([]byte(fingerprint)); has {
			if own && !usableNow(st.now.Load(), fingerprint) {
				k.addUnknown(id)
			}
			return nil
		}
		if err != nil {
			return err
		}
		if own {
			k.addUnknown(id)
			break
		}
	}
	return still
}

func usableNow(s *Site, fingerprint string) bool {
	key, ok := s.Keyring.Key([]byte(fingerprint))
	now := time.Now()
	return ok && !now.Before(key.ValidAfter()) && now.Before(key.ValidUntil())
}

// unknowns remembers until when a fingerprint is not asked for again, in two halves: when
// the newer one is full, the older one is forgotten. The worst that does is one request
// more.
type unknowns struct{ newer, older map[string]time.Time }

func (u *unknowns) has(id string, now time.Time) bool {
	return now.Before(u.newer[id]) || now.Before(u.older[id])
}

func (u *unknowns) add(id string, until time.Time) {
	if u.newer == nil || len(u.newer) >= maxUnknown/2 {
		u.newer, u.older = make(map[string]time.Time), u.newer
	}
	u.newer[id] = until
}

func (k *Keys) isUnknown(id string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.unknown.has(id, time.Now())
}

func (k *Keys) addUnknown(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.unknown.add(id, time.Now().Add(min(unknownFor, k.poll)))
}
