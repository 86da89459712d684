package keysync

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// bindingPoll is how often the binding file is looked at; far below UseAfter.
	bindingPoll = 3 * time.Second
	// bindingEvery is the shortest time between two readings that are asked for.
	bindingEvery = time.Second
)

// What a reading of the binding file came to.
const (
	bindingTaken   = "taken"
	bindingRefused = "refused"
)

// rebinding is the binding file, for as long as it is watched.
type rebinding struct {
	// Fixed at birth.
	path  string
	reads *prometheus.CounterVec
	place chan struct{} // whoever fills it may read; there is one

	// Owned by who has the place.
	seen os.FileInfo // of what was read last; nil: it could not be looked at
	last time.Time   // when that was
}

// newRebinding looks at the file. It is to be called before the file is read, so that a
// change in between is seen later.
func newRebinding(path string) *rebinding {
	r := &rebinding{path: path, place: make(chan struct{}, 1)}
	r.seen, _ = os.Stat(path) // reading it says what is wrong
	return r
}

// put makes the state the site's, with the binding of now.
func (st *siteState) put(next *Site) {
	st.mu.Lock()
	defer st.mu.Unlock()
	next.Binding = st.binding
	st.now.Store(next)
}

// bind replaces the binding and nothing else.
func (st *siteState) bind(b *envelope.Binding) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.binding = b
	next := *st.now.Load()
	next.Binding = b
	st.now.Store(&next)
}

// watchBinding reads the file when it has changed, until ctx ends.
func (k *Keys) watchBinding(ctx context.Context) {
	tick := time.NewTicker(bindingPoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			k.reread(0)
		}
	}
}

// RereadBinding reads the binding file now, if it has changed since it was read, so that the
// caller can look again for a binding key that it did not find. It reads at most once a
// second, and without a change it only looks at the file's times: anybody may name keys that
// do not exist. Calls at the same moment share one reading.
func (k *Keys) RereadBinding() {
	if k.rebind != nil {
		k.reread(bindingEvery)
	}
}

// reread takes over what the file holds, as a whole or not at all (I9), unless it was read
// less than every ago, or is what was read last.
func (k *Keys) reread(every time.Duration) {
	f := k.rebind
	f.place <- struct{}{}
	defer func() { <-f.place }()
	now := time.Now()
	if !f.last.IsZero() && now.Sub(f.last) < every {
		return
	}
	info, err := os.Stat(f.path)
	if err == nil && f.seen != nil && sameState(info, f.seen) || err != nil && f.seen == nil {
		return
	}
	f.seen, f.last = info, now
	if err != nil {
		f.seen = nil
	}
	next, err := k.successors()
	if err != nil {
		f.reads.WithLabelValues(bindingRefused).Inc()
		k.log.Error("binding file not taken over, the keys from before stay", "err", err)
		return
	}
	for name, b := range next {
		k.sites[name].bind(b)
	}
	f.reads.WithLabelValues(bindingTaken).Inc()
	k.log.Info("binding file taken over", "sites", len(next))
}

// sameState tells that a file was not written, replaced or given other permissions.
func sameState(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode()
}

// successors reads the file and gives what it has for each site, if all of that can follow
// what there is.
func (k *Keys) successors() (map[string]*envelope.Binding, error) {
	names := slices.Sorted(maps.Keys(k.sites))
	read, err := bindingsFor(k.rebind.path, names)
	if err != nil {
		return nil, err
	}
	next := make(map[string]*envelope.Binding, len(names))
	var errs []error
	for _, name := range names {
		b, err := read[name].Succeed(k.sites[name].now.Load().Binding)
		if err != nil {
			errs = append(errs, fmt.Errorf("binding_file: %s: sites.%s.%w", k.rebind.path, name, err))
			continue
		}
		next[name] = b
	}
	return next, errors.Join(errs...)
}
