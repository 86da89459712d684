// Package keysync keeps the key set of each site as the Portal has it: it fetches the
// site objects, refreshes them, and hands out immutable values that are swapped whole.
//
// What it promises:
//   - A refresh that fails, or a document that cannot be right, changes nothing: the keys
//     that were there stay, the failure is counted by reason and logged once.
//   - Reading a site's keys takes no lock and waits for nobody. A new key is derived before
//     it is put in place, so that no message pays for it.
//   - An unknown fingerprint costs one request to the Portal, whoever asks and however
//     often.
//   - No text made here, error or log, holds a key, a token, a URL or a part of a document.
//
// It knows no broker: a vendor of a POS or a Kitchen can use it with package envelope
// alone, see the example.
//
// # Which key seals
//
// Nobody acknowledges keys, so a new key is sealed with only when everybody must have
// fetched it: two polls after its beginning, or ten minutes before the end of the older
// key if that is sooner (a quarter of their overlap, if they overlap for less than forty
// minutes), and never before its own beginning. [envelope.Keyring.Primary] follows from
// that.
//
// # The site object
//
// GET <url>/sites/<site> gives a JSON object. At `path` stands the encryption block:
//
//	{"encryption": true, "keys": [{"fingerprint": …, "value": …, "valid_after": …, "valid_until": …}]}
//
// with at most two keys. Times are ISO-8601 with Z or a numeric zone; a time without a
// zone is refused, since two programs would read it differently. Everything else in the
// object is ignored.
//
// # The binding keys
//
// They come from a file ([ReadBindingFile]), which is read anew within seconds of a change
// ([RotateBindingFile] makes one), and at once when [Keys.RereadBinding] is called. A file
// that cannot be right, that lacks a configured site or has another lane key for one,
// changes nothing.
package keysync

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// concurrency is how many scheduled requests are under way at once.
	concurrency = 8

	// Retired keys are kept for the longest time that something sealed with them can still
	// wait somewhere; their number is bounded for a Portal that rotates all the time.
	retiredFor = 14 * 24 * time.Hour
	maxRetired = 32
)

var (
	// ErrStillUnknown: the Portal was asked, and the site has no such key.
	ErrStillUnknown = errors.New("fingerprint is unknown to the Portal too")

	// ErrNoSite: the site is not configured.
	ErrNoSite = errors.New("site is not configured")
)

// Site is what is known about a site's keys at one moment. It is immutable: a change
// makes another Site. While the Portal's document and the binding file stay the same, only
// Fetched differs from one Site to the next; Keyring is then the same pointer.
type Site struct {
	Name     string
	Settings envelope.Settings

	// Fetched is when the Portal last confirmed this state. Zero: never; then nothing is
	// known about the site, not even whether it encrypts.
	Fetched time.Time

	// Encryption is the site's switch on the Portal.
	Encryption bool

	// Keyring holds the Portal's keys, never nil; empty while Encryption is off and before
	// the first fetch.
	Keyring *envelope.Keyring

	// Binding holds the site's binding keys; nil under [Config.NoBinding].
	Binding *envelope.Binding

	retired *envelope.Keyring // keys that left the document
}

// Recover opens what was sealed with a key of the site, also with one that left the
// Portal's document in the last 14 days while this process ran. It is for messages that
// were accepted before; at a door use Keyring.Accept. Errors as [envelope.Keyring.Open].
func (s *Site) Recover(dst []byte, t envelope.Triple) ([]byte, error) {
	plain, err := s.Keyring.Open(dst, t)
	if s.retired != nil && errors.Is(err, envelope.ErrUnknownFingerprint) {
		return s.retired.Open(dst, t)
	}
	return plain, err
}

// Keys keeps the key sets of the configured sites. All methods are safe for concurrent
// use.
type Keys struct {
	// Fixed at birth.
	sites  map[string]*siteState
	path   []string
	poll   time.Duration
	born   time.Time
	log    *slog.Logger
	get    func(ctx context.Context, site, etag string) (answer, error)
	close  func()
	derive chan struct{} // a place for each derivation at a time
	count  *prometheus.CounterVec
	rebind *rebinding // nil under Config.NoBinding

	started atomic.Bool     // by Run
	life    context.Context // of the fetches; ends with Run
	end     context.CancelCauseFunc
	flights sync.WaitGroup // Go only in launch, which looks at life first

	mu sync.Mutex
	// Guarded by mu.
	hold    time.Time // the Portal's rate limit: no request before
	unknown unknowns  // by site and fingerprint
	failing int       // sites whose latest fetch failed
	many    bool      // so many that not each one was logged
}

// siteState is one site's place in Keys.
type siteState struct {
	// Fixed at birth.
	name     string
	settings envelope.Settings

	now atomic.Pointer[Site] // written with mu held: by the flight, and by bind

	// Owned by the flight: at most one fetch of a site is under way.
	etag    string
	sum     [sha256.Size]byte // of the document in place
	retired []retiredKey      // newest last

	mu sync.Mutex
	// Guarded by mu.
	binding   *envelope.Binding
	flight    *flight   // the fetch under way, or nil
	demanded  time.Time // end of the latest fetch that Refresh started
	err       error     // of the latest fetch; nil before the first
	failures  int       // in a row
	loggedBad bool      // the failure was logged, so its end will be
}

type retiredKey struct {
	key   *envelope.Key
	until time.Time
}

// New checks cfg, reads the files it names, and reports every mistake at once, one line
// each, beginning with its key. It starts nothing: the keys come with [Keys.Run] or
// [Keys.Refresh].
func New(cfg Config) (*Keys, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Portal = cfg.Portal.withDefaults()
	portal, portalErr := newClient(cfg.Portal)
	var bindings map[string]*envelope.Binding
	var rebind *rebinding
	var bindingErr error
	if !cfg.NoBinding {
		rebind = newRebinding(cfg.BindingFile)
		bindings, bindingErr = bindingsFor(cfg.BindingFile, slices.Sorted(maps.Keys(cfg.Sites)))
	}
	if err := errors.Join(portalErr, bindingErr); err != nil {
		return nil, err
	}
	k := &Keys{
		sites:  make(map[string]*siteState, len(cfg.Sites)),
		path:   strings.Split(cfg.Portal.Path, "."),
		poll:   cfg.Portal.Poll,
		born:   time.Now(),
		log:    cfg.Log,
		get:    portal.get,
		close:  portal.http.CloseIdleConnections,
		derive: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		rebind: rebind,
	}
	k.life, k.end = context.WithCancelCause(context.Background())
	if k.log == nil {
		k.log = slog.Default()
	}
	for name, settings := range cfg.Sites {
		empty, err := envelope.NewKeyring(settings)
		if err != nil {
			return nil, fmt.Errorf("keysync: sites.%s: %w", name, err)
		}
		st := &siteState{name: name, settings: settings, binding: bindings[name]}
		st.now.Store(&Site{Name: name, Settings: settings, Keyring: empty, Binding: st.binding, retired: empty})
		k.sites[name] = st
	}
	if err := k.register(cfg.Metrics); err != nil {
		return nil, fmt.Errorf("keysync: metrics: %w", err)
	}
	return k, nil
}

// bindingsFor reads the file and names all the sites that it lacks.
func bindingsFor(path string, sites []string) (map[string]*envelope.Binding, error) {
	bindings, err := ReadBindingFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("binding_file: %w", err)
	}
	missing := slices.DeleteFunc(slices.Clone(sites), func(s string) bool { return bindings[s] != nil })
	if len(missing) == 0 {
		return bindings, nil
	}
	what := path + " has no binding for " + strings.Join(missing, ", ")
	if err != nil {
		what = path + " does not exist"
	}
	return nil, fmt.Errorf("binding_file: %s: on the bridge's machine run `bridge binding mint --file %s --site %s`, and copy the same file to every edge and bridge (one minted elsewhere has other keys, and what it tags is quarantined)",
		what, path, strings.Join(missing, ","))
}

// Site returns what is known about a site now; nil when it is not configured. Keep the
// value for one piece of work, and ask again for the next.
func (k *Keys) Site(name string) *Site {
	st, ok := k.sites[name]
	if !ok {
		return nil
	}
	return st.now.Load()
}

// Ready is nil when every site has been fetched once. Else it names each one that has
// not, and why.
func (k *Keys) Ready() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(k.sites)) {
		st := k.sites[name]
		if !st.now.Load().Fetched.IsZero() {
			continue
		}
		st.mu.Lock()
		err := st.err
		st.mu.Unlock()
		if err == nil {
			err = errors.New("not asked for yet")
		}
		errs = append(errs, fmt.Errorf("keysync: no keys of site %s: %w", name, err))
	}
	return errors.Join(errs...)
}

// fetch asks the Portal about one site and puts the answer in place. A site has one
// flight at a time, and only that calls fetch.
func (k *Keys) fetch(ctx context.Context, st *siteState) (reason, error) {
	a, err := k.get(ctx, st.name, st.etag)
	if err != nil {
		return "", err
	}
	now := time.Now()
	old := st.now.Load()
	sum := sha256.Sum256(a.body)
	if a.unchanged || !old.Fetched.IsZero() && sum == st.sum {
		same := *old
		same.Fetched = now
		st.put(&same)
		if !a.unchanged {
			st.etag = a.etag
		}
		return unchanged, nil
	}
	doc, err := parseSite(a.body, k.path, st.settings, k.poll)
	if err != nil {
		return "", err
	}
	ring, err := k.ring(ctx, old, doc)
	if err != nil {
		return "", err
	}
	next := &Site{Name: st.name, Settings: st.settings, Fetched: now, Encryption: doc.encryption, Keyring: ring, retired: old.retired}
	if ring != old.Keyring {
		if next.retired, err = st.retire(old.Keyring, ring, now); err != nil {
			return "", refused(badBlock, "retired keys: %w", err)
		}
	}
	st.put(next)
	st.etag, st.sum = a.etag, sum
	if ring == old.Keyring && doc.encryption == old.Encryption && !old.Fetched.IsZero() {
		return unchanged, nil // something else in the object changed
	}
	k.tell(old, next)
	return changed, nil
}

// ring makes the key set of doc. Keys that stay are the same ones, with their derived
// cipher; new ones are derived here, before anybody can need them. A set that stays is
// old's own.
func (k *Keys) ring(ctx context.Context, old *Site, doc document) (*envelope.Keyring, error) {
	keys := make([]*envelope.Key, 0, len(doc.keys))
	same := len(doc.keys) == len(old.Keyring.Keys())
	for _, c := range doc.keys {
		key, ok := old.Keyring.Key([]byte(c.Fingerprint))
		same = same && ok && key.Matches(old.Settings, c) && key.SealFrom().Equal(c.SealFrom)
		if !ok {
			key, ok = old.retired.Key([]byte(c.Fingerprint))
		}
		if ok && key.Matches(old.Settings, c) {
			if !key.SealFrom().Equal(c.SealFrom) {
				key = key.WithSealFrom(c.SealFrom)
			}
		} else {
			var err error
			if key, err = envelope.NewKey(old.Settings, c); err != nil {
				return nil, &fetchError{reason: badFingerprint, text: "a key of the site is not usable", cause: err}
			}
		}
		keys = append(keys, key)
	}
	if same {
		return old.Keyring, nil
	}
	for _, key := range keys {
		if err := k.deriveOne(ctx, key); err != nil {
			return nil, err
		}
	}
	ring, err := envelope.NewKeyring(old.Settings, keys...)
	if err != nil {
		return nil, &fetchError{reason: badBlock, text: "the site's keys make no key set", cause: err}
	}
	return ring, nil
}

func (k *Keys) deriveOne(ctx context.Context, key *envelope.Key) error {
	select {
	case k.derive <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-k.derive }()
	if err := key.Derive(); err != nil {
		return &fetchError{reason: badPhrase, text: "the cipher key could not be derived", cause: err}
	}
	return nil
}

// retire keeps the keys of the old set that the new one lacks, and forgets those whose
// time is over.
func (st *siteState) retire(old, next *envelope.Keyring, now time.Time) (*envelope.Keyring, error) {
	kept := slices.DeleteFunc(slices.Clone(st.retired), func(r retiredKey) bool {
		_, back := next.Key([]byte(r.key.Fingerprint()))
		_, again := old.Key([]byte(r.key.Fingerprint()))
		return back || again || !now.Before(r.until)
	})
	for _, key := range old.Keys() {
		if _, stays := next.Key([]byte(key.Fingerprint())); !stays {
			kept = append(kept, retiredKey{key, now.Add(retiredFor)})
		}
	}
	kept = kept[max(0, len(kept)-maxRetired):]
	keys := make([]*envelope.Key, 0, len(kept))
	for _, r := range kept {
		keys = append(keys, r.key)
	}
	ring, err := envelope.NewKeyring(st.settings, keys...)
	if err != nil {
		return nil, err
	}
	st.retired = kept
	return ring, nil
}

// tell logs what changed from one state to the next.
func (k *Keys) tell(old, next *Site) {
	log := k.log.With("site", next.Name)
	if old.Fetched.IsZero() {
		log.Info("site fetched from the portal", "encryption", next.Encryption, "keys", len(next.Keyring.Keys()))
		return
	}
	switch {
	case old.Encryption && !next.Encryption:
		log.Warn("encryption of the site was switched off on the portal")
	case !old.Encryption && next.Encryption:
		log.Warn("encryption of the site was switched on on the portal")
	}
	for _, key := range next.Keyring.Keys() {
		if _, had := old.Keyring.Key([]byte(key.Fingerprint())); !had {
			log.Info("new key", "fingerprint", key.Fingerprint(), "valid_after", key.ValidAfter(), "valid_until", key.ValidUntil(), "seal_from", key.SealFrom())
		}
	}
	for _, key := range old.Keyring.Keys() {
		if _, has := next.Keyring.Key([]byte(key.Fingerprint())); !has {
			log.Info("key left the portal", "fingerprint", key.Fingerprint(), "valid_until", key.ValidUntil())
		}
	}
}
