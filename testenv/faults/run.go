package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

const (
	// iterations of PBKDF2: these runs are not about guessing pass phrases.
	iterations = 1000
	poll       = 250 * time.Millisecond // of the Portal
	// drainMost is how long everything may take to settle once nothing goes wrong any more.
	drainMost = 12 * time.Second
	// runMost ends a run that hangs.
	runMost = time.Minute
)

// programs are the built programs.
type programs struct{ edge, bridge, hub string }

// run is one run under way.
type run struct {
	plan    plan
	seed    uint64
	dir     string
	stack   *stack.Stack
	hub     *hubReader
	tills   []till
	screens []*screen
	secrets map[string]siteSecrets
	search  *search
	log     *timeline

	// What is to be done at the next processing, or the next report; nil: nothing.
	cooked, reported atomic.Pointer[func()]

	faults int
	found  Evidence
	// conducts are the Kitchens' behaviours, by site, where they were changed.
	conducts map[string]conduct
	// pending are what steps left to be done while others go on.
	pending []chan error
	holding sync.WaitGroup // programs that are held, until they work again
	// spoiled is how often the Portal had been asked about a site when its fault was set.
	spoiled map[string]int

	mu sync.Mutex // Guards what follows.
	// keys are all that the Portal ever gave out, by fingerprint.
	keys    map[string]portal.Key
	keyless bool // that the edge ran out of keys was noted
}

// till is one POS.
type till struct {
	*pos.Driver
	site   string
	who    string // the name of its token, "" without
	within time.Duration
}

// result is a run's end.
type result struct {
	Outcome
	faults   int
	timeline []string
	trouble  []string
	dir      string
	took     time.Duration
	lag      time.Duration
}

// bad tells whether the run shows anything that it should not.
func (r *result) bad() bool { return len(r.Violations) > 0 || len(r.trouble) > 0 }

// timeline is what happened when, since the first message.
type timeline struct {
	mu    sync.Mutex
	begun time.Time
	lines []string
	show  io.Writer // nil: shown only when a run is bad
}

func (t *timeline) add(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	line := fmt.Sprintf("%8.3fs  %s", time.Since(t.begun).Seconds(), fmt.Sprintf(format, args...))
	t.lines = append(t.lines, line)
	if t.show != nil {
		fmt.Fprintln(t.show, "  "+line)
	}
}

// source is where everything random of a run comes from. Seeds that follow each other
// have nothing in common.
func source(scenario string, seed uint64) *rand.Rand {
	return rand.New(rand.NewChaCha8(sha256.Sum256(fmt.Appendf(nil, "%s %d", scenario, seed))))
}

// perform does one run. An error says that the harness could not do it; what the programs
// did wrong is in the result.
func perform(ctx context.Context, sc scenario, seed uint64, built programs, dir string, env []string, show io.Writer) (res result, err error) {
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, runMost, fmt.Errorf("the run took more than %v", runMost))
	defer cancel()
	r := &run{
		plan: sc.plan(source(sc.name, seed)), seed: seed, dir: dir,
		log: &timeline{begun: time.Now(), show: show}, search: newSearch(), keys: map[string]portal.Key{},
	}
	defer func() {
		res.faults, res.timeline, res.dir, res.took = r.faults, r.log.lines, dir, time.Since(began)
	}()
	if err := r.prepare(ctx, built, env); err != nil {
		return res, err
	}
	stopped := false
	defer func() {
		if !stopped {
			err = errors.Join(err, r.stack.Close())
		}
	}()
	if err := r.stack.Start(ctx); err != nil {
		return res, err
	}
	if r.hub, err = connectHub(r.stack.Hub); err != nil {
		return res, err
	}
	defer r.hub.close()
	r.hub.whenReport(func() { strike(&r.reported) })
	if err := r.makeTills(); err != nil {
		return res, err
	}

	measured := r.measureLag()
	defer measured()
	endScreens := r.startScreens(ctx)
	defer endScreens()
	r.load(ctx)
	if err := r.drain(ctx); err != nil {
		return res, err
	}
	r.awaitScreens(ctx)
	endScreens()
	r.collectTold()
	if err := r.prepareSearch(); err != nil {
		return res, err
	}
	if err := r.searchMetrics(ctx); err != nil {
		return res, err
	}
	measured()
	r.hub.close()
	stopped = true
	if err := r.stack.Close(); err != nil {
		r.trouble("%v", err)
	}
	if err := r.searchRest(); err != nil {
		return res, err
	}
	r.found.Asked = r.stack.Kitchen.Ledger()
	r.judgeStubs()
	res.Outcome = Reconcile(&r.found)
	res.trouble, res.lag = r.found.Trouble, r.found.Lag
	return res, nil
}

// lagEvery is how often the harness looks whether it gets time to run.
const lagEvery = 2 * time.Millisecond

// measureLag measures until the function that it returns is called, which may be done
// again.
func (r *run) measureLag() (end func()) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(lagEvery)
		defer tick.Stop()
		for last := time.Now(); ; {
			select {
			case <-stop:
				return
			case <-tick.C:
				now := time.Now()
				r.found.Lag = max(r.found.Lag, now.Sub(last)-lagEvery)
				last = now
			}
		}
	})
	return sync.OnceFunc(func() {
		close(stop)
		wg.Wait()
	})
}

func strike(f *atomic.Pointer[func()]) {
	if do := f.Swap(nil); do != nil {
		(*do)()
	}
}

func (r *run) trouble(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.log.add("TROUBLE %s", text)
	r.found.Trouble = append(r.found.Trouble, text)
}

// later does what a step does not wait for; load waits for it.
func (r *run) later(do func() error) {
	done := make(chan error, 1)
	r.pending = append(r.pending, done)
	go func() { done <- do() }()
}

func (r *run) outage(from, to time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found.Outages = append(r.found.Outages, Span{from, to})
}

func (r *run) prepare(ctx context.Context, built programs, env []string) (err error) {
	p := &r.plan
	edge, bridge := quick(p)
	merge(edge, p.edge)
	merge(bridge, p.bridge)
	cfg := stack.Config{
		Sites: p.sites, Dir: r.dir, Edge: built.edge, Bridge: built.bridge, Poll: poll, Iterations: iterations, Integrator: p.integrator,
		EdgeSettings: edge, BridgeSettings: bridge, EdgeEnv: env, BridgeEnv: env,
		Behaviour: p.behaviour, OnProcessed: func(kitchen.Record) { strike(&r.cooked) },
		KitchenSettings: func(c *kitchen.Config) {
			c.Seed = r.seed
			if p.kitchen != nil {
				p.kitchen(c)
			}
		},
		Log: slog.New(slog.DiscardHandler),
	}
	if p.apart {
		cfg.Hub = built.hub
	}
	if r.stack, err = stack.Prepare(ctx, cfg); err != nil {
		return err
	}
	r.conducts, r.spoiled = map[string]conduct{}, map[string]int{}
	r.found = Evidence{Deadlines: p.deadlines, Settle: settle, Calm: p.calm, Screen: screenTimes}
	r.noteKeys()
	r.secrets, err = readBinding(filepath.Join(r.dir, "binding.json"))
	return err
}

func merge(into, from map[string]any) {
	for k, v := range from {
		sub, ok := v.(map[string]any)
		has, both := into[k].(map[string]any)
		if ok && both {
			merge(has, sub)
			continue
		}
		into[k] = v
	}
}

// noteKeys remembers what the Portal gives out now; call it around every rotation.
func (r *run) noteKeys() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for site := range r.plan.sites {
		for _, k := range r.stack.Portal.Keys(site) {
			r.keys[k.Fingerprint] = k
		}
	}
}

// posName is the name that the stack gives a POS's token.
const posName = "pos-1"

// canaryLabel marks every payload of a run.
func (r *run) canary() string { return pos.Canary(r.seed, "all") }

func (r *run) makeTills() error {
	for i, site := range slices.Sorted(maps.Keys(r.plan.sites)) {
		e := r.stack.Endpoints[site]
		t := till{site: site}
		if e.POSToken != "" {
			t.who = posName
		}
		if r.plan.within != nil {
			t.within = r.plan.within(site)
		}
		cfg := pos.Config{
			BaseURL: e.Edge, Site: site, Token: vendorcrypto.Secret(e.POSToken), Keys: r.stack.Keys,
			Profile: vendorcrypto.Profile{Cipher: e.Profile, Iterations: e.Iterations},
			Seed:    r.seed, Canary: r.canary(), Rate: r.plan.rate, Within: t.within,
		}
		posOf(i, r.plan.sites[site], &cfg)
		if cfg.Mode != pos.Encrypted {
			cfg.OnChange = r.watchKeys
		}
		var err error
		if t.Driver, err = pos.New(cfg); err != nil {
			return err
		}
		r.tills = append(r.tills, t)
	}
	return nil
}

// watchKeys looks at what a POS is told that leaves encryption to the edge: the edge had
// the keys once, so it must not run out of them, whatever the Portal says (I9). After a
// start of its own it has to get them first.
func (r *run) watchKeys(e pos.Entry) {
	if !r.plan.calm || e.Status != http.StatusServiceUnavailable || !strings.HasPrefix(e.Reason, "keys-") {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.keyless {
		r.keyless = true
		r.trouble("the edge has no key of %s any more (%s)", e.Site, e.Reason)
	}
}

// load lets POS send while things go wrong, and puts everything right in the end.
func (r *run) load(ctx context.Context) {
	r.log.mu.Lock()
	r.log.begun = time.Now()
	r.log.mu.Unlock()
	sending, stop := context.WithTimeout(ctx, r.plan.load)
	defer stop()
	var wg sync.WaitGroup
	for _, t := range r.tills {
		wg.Go(func() {
			if err := t.Run(sending); err != nil {
				r.mu.Lock()
				defer r.mu.Unlock()
				r.trouble("%v", err)
			}
		})
	}
	r.log.add("%s", r.plan.String())
	begun := time.Now()
	for _, s := range r.plan.steps {
		if !sleep(ctx, time.Until(begun.Add(s.at))) {
			break
		}
		r.log.add("%s", s.what)
		before := time.Now()
		struck, err := s.do(ctx, r)
		r.faults += struck
		switch {
		case err != nil:
			r.trouble("%s: %v", s.what, err)
		case struck > 1:
			r.log.add("done: %s (%d faults)", s.what, struck)
		case time.Since(before) > 20*time.Millisecond:
			r.log.add("done: %s", s.what)
		}
		if err != nil {
			break
		}
	}
	wg.Wait()
	r.log.add("POS have stopped sending")
	for _, do := range r.pending {
		if err := <-do; err != nil {
			r.trouble("%v", err)
		}
	}
	for _, site := range slices.Sorted(maps.Keys(r.conducts)) {
		struck, err := r.behave(site, kitchen.Behaviour{})
		r.faults += struck
		if err != nil {
			r.trouble("%v", err)
		}
	}
	if err := r.portalWell(); err != nil {
		r.trouble("%v", err)
	}
}

// drain waits until every event on the hub is settled, and reads the hub's streams.
func (r *run) drain(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, drainMost)
	defer cancel()
	if err := r.hub.await(ctx); err != nil {
		return err
	}
	var tails []*tail
	for _, stream := range []string{"POS", "KITCHEN", "DLQ"} {
		t, err := r.hub.tail(ctx, stream)
		if err != nil {
			return err
		}
		tails = append(tails, t)
	}
	read := func() error {
		return errors.Join(
			tails[0].read(ctx, r.readStored), tails[1].read(ctx, r.readSettled), tails[2].read(ctx, r.readDead))
	}
	for {
		if err := read(); err != nil {
			return fmt.Errorf("read the hub: %w", err)
		}
		if r.settled() {
			break
		}
		if !sleep(ctx, 50*time.Millisecond) {
			r.log.add("gave up waiting for %d events, %d reports are there", len(r.found.Stored), len(r.found.Settled))
			break
		}
	}
	r.log.add("%d events are settled", len(r.found.Stored))

	// What comes after the end would be wrong, and needs a moment to show.
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), drainMost)
	defer cancel()
	told, stop := context.WithTimeout(ctx, 400*time.Millisecond)
	if r.plan.calm {
		told, stop = context.WithTimeout(ctx, 3*time.Second)
	}
	defer stop()
	var wg sync.WaitGroup
	for _, t := range r.tills {
		wg.Go(func() { _ = t.Drain(told) }) // what is pending then stands in the ledger
	}
	sleep(ctx, settle)
	wg.Wait()
	if err := r.stack.Kitchen.Idle(ctx); err != nil {
		r.trouble("%v", err)
	}
	return read()
}

// settled tells whether each event of an edge has a report, and each forged one a trace.
func (r *run) settled() bool {
	done := map[eventID]bool{}
	for i := range r.found.Settled {
		done[r.found.Settled[i].eventID] = true
	}
	traced := map[uint64]bool{}
	for i := range r.found.Dead {
		traced[r.found.Dead[i].StreamSeq] = true
	}
	for i := range r.found.Stored {
		s := &r.found.Stored[i]
		if s.Forged != "" && !traced[s.StreamSeq] || s.Forged == "" && !done[s.eventID] {
			return false
		}
	}
	return true
}

func (r *run) readStored(m *jetstream.RawStreamMsg) {
	s, err := parseStored(m)
	if err != nil && s.Forged == "" {
		r.trouble("event at %d of POS: %v", m.Sequence, err)
		return
	}
	r.found.Stored = append(r.found.Stored, s)
}

func (r *run) readSettled(m *jetstream.RawStreamMsg) {
	switch s, ok, err := parseSettled(m); {
	case err != nil:
		r.trouble("report at %d of KITCHEN: %v", m.Sequence, err)
	case ok:
		r.found.Settled = append(r.found.Settled, s)
	}
}

func (r *run) readDead(m *jetstream.RawStreamMsg) {
	d, err := parseDead(m)
	if err != nil {
		r.trouble("dead letter at %d of DLQ: %v", m.Sequence, err)
		return
	}
	r.found.Dead = append(r.found.Dead, d)
}

func (r *run) collectTold() {
	for _, t := range r.tills {
		for _, e := range t.Ledger() {
			told := Told{Entry: e, Within: t.within}
			if e.Key != "" {
				id, err := r.secrets[t.site].messageID(t.site, t.who, e.Kind, e.Key)
				if err != nil {
					r.trouble("id of %s: %v", e.Key, err)
				}
				told.WantID = id
			}
			r.found.Told = append(r.found.Told, told)
		}
	}
}

// judgeStubs adds what the stubs themselves say of a sender.
func (r *run) judgeStubs() {
	k := r.stack.Kitchen.Stats()
	if k.Followed > 0 {
		r.trouble("%d redirects of a Kitchen were followed", k.Followed)
	}
	if k.Strays > 0 {
		r.trouble("%d requests to a Kitchen went to no place of it", k.Strays)
	}
	if n := r.stack.Portal.Stats().Trapped; n > 0 {
		r.trouble("%d redirects of the Portal were followed", n)
	}
	if k.Dropped+k.Forgotten > 0 {
		r.trouble("the Kitchen's ledger was too small: %d records dropped", k.Dropped+k.Forgotten)
	}
}

// prepareSearch gathers what must be found nowhere.
func (r *run) prepareSearch() error {
	var errs []error
	add := func(what, secret string) {
		if secret != "" {
			errs = append(errs, r.search.add(what, secret))
		}
	}
	add("a payload's canary", r.canary())
	for _, t := range r.tills {
		e := r.stack.Endpoints[t.site]
		add("a POS's token", e.POSToken)
		add("a screen's token", e.ScreenToken)
		if entries := t.Ledger(); len(entries) > 0 {
			// All orders of a driver begin alike.
			add("an order's id", entries[0].OrderID[:16])
		}
	}
	add("the Portal's token", r.stack.Portal.Token())
	_, secretKey := r.stack.Portal.Credentials()
	add("the Portal's secret key", secretKey)
	r.noteKeys()
	for _, k := range r.keys {
		add("a pass phrase", k.Value)
		derived, err := derive(k.Value)
		errs = append(errs, err)
		add("a cipher's key", derived)
	}
	for site, s := range r.secrets {
		keys, err := s.all()
		if err != nil {
			errs = append(errs, fmt.Errorf("secrets of %s: %w", site, err))
		}
		for what, key := range keys {
			add(what, key)
		}
	}
	return errors.Join(errs...)
}

func (r *run) leaked(leaks []Leak) { r.found.Leaks = append(r.found.Leaks, leaks...) }

// searchMetrics searches what the programs tell anybody who asks.
func (r *run) searchMetrics(ctx context.Context) error {
	for name, base := range map[string]string{"edge": r.stack.EdgeAdmin, "bridge": r.stack.BridgeAdmin} {
		for _, path := range []string{"/metrics", "/readyz", "/healthz"} {
			body, err := get(ctx, base+path)
			if err != nil {
				r.trouble("%s: %v", name, err)
				continue
			}
			if len(body) == 0 {
				r.trouble("%s: %s is empty", name, path)
			}
			r.leaked(r.search.leaksIn(name+path, body))
		}
	}
	if err := r.hub.readAll(ctx); err != nil {
		return err
	}
	heard, cut := r.hub.traffic()
	if len(heard) == 0 || cut > 0 {
		return fmt.Errorf("the hub's traffic was not all heard: %d bytes, %d more were cut off", len(heard), cut)
	}
	r.leaked(r.search.leaksIn("the hub's subjects, headers or bodies", heard))
	return nil
}

func get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, 8<<20))
}

// secretFiles are where secrets stand on purpose, 0600.
var secretFiles = map[string]bool{"binding.json": true, "portal-token": true, "portal-secret": true}

// searchRest searches what the stopped programs leave on the disk: their data and logs.
func (r *run) searchRest() error {
	for _, log := range []string{"edge.log", "bridge.log"} {
		if info, err := os.Stat(filepath.Join(r.dir, log)); err != nil || info.Size() == 0 {
			return fmt.Errorf("%s: nothing to search (%v)", log, err)
		}
	}
	leaks, err := r.search.leaksUnder(r.dir, secretFiles)
	r.leaked(leaks)
	return err
}

// describe writes what is wrong with a run, and what led to it.
func (res *result) describe(out io.Writer, sc scenario, seed uint64, most int) {
	fmt.Fprintf(out, "scenario %s seed %d FAILED; replay: go run ./testenv/faults -scenario %s -runs 1 -seed %d -v\n", sc.name, seed, sc.name, seed)
	for _, line := range res.timeline {
		fmt.Fprintln(out, "  "+line)
	}
	for _, t := range res.trouble {
		fmt.Fprintf(out, "  trouble: %s\n", strings.ReplaceAll(t, "\n", "\n    "))
	}
	for i, v := range res.Violations {
		if i == most {
			fmt.Fprintf(out, "  … and %d more violations\n", len(res.Violations)-most)
			break
		}
		fmt.Fprintf(out, "  %v\n", v)
	}
	fmt.Fprintf(out, "  logs and data: %s\n", res.dir)
}
