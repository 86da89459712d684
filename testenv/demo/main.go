// Command demo runs the whole path on 127.0.0.1: a stub Portal with rotating keys, POS
// that send plausible orders, the real edge and the real bridge with its hub as processes
// of their own, and a stub Kitchen that decrypts by code of its own. It shows what happens
// in a live table, and at the end says whether the books balance.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// sites of the demo: one of ours at both ends, one as in the seed's examples, one whose
// encryption is off on the Portal.
var sites = map[string]stack.Site{
	"harbour": {Profile: "a256gcm", Encryption: true},
	"station": {Profile: "a256ctr", Encryption: true, Open: true},
	"airport": {Profile: "a256gcm"},
}

type options struct {
	runFor time.Duration
	rate   float64
	rotate time.Duration
	dir    string
	seed   uint64
	// Every POS, the Kitchen and both programs derive each new key on the same machine; with
	// the product's 600,000 iterations that would show as latency of the demo's own stubs.
	iterations int
}

func main() {
	var o options
	flag.DurationVar(&o.runFor, "for", 0, "run this long, let everything settle, check the books and end; 0: until Ctrl-C")
	flag.Float64Var(&o.rate, "rate", 4, "orders a second of each POS (there are two a site)")
	flag.DurationVar(&o.rotate, "rotate", 4*time.Second, "time between two rotations of every key, at least 2s")
	flag.StringVar(&o.dir, "dir", "", "keep programs, settings, logs and data in this folder (default: a temporary one, removed at the end)")
	flag.Uint64Var(&o.seed, "seed", 1, "seed of the orders")
	flag.IntVar(&o.iterations, "iterations", 50_000, "PBKDF2 iterations of the sites' keys (the product's default is 600000)")
	flag.Parse()
	if flag.NArg() > 0 || o.rate <= 0 || o.rate > 200 || o.rotate < 2*time.Second || o.iterations < 1 || o.runFor < 0 {
		fmt.Fprintln(os.Stderr, "demo: takes no arguments; -rate is above 0 and at most 200, -rotate at least 2s, -iterations at least 1, -for not negative")
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends at once
	if err := run(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	dir := o.dir
	if dir == "" {
		if dir, err = os.MkdirTemp("", "kitchenbridge-demo-"); err != nil {
			return err
		}
		defer os.RemoveAll(dir)
	} else if dir, err = filepath.Abs(dir); err != nil {
		return err
	} else if err = os.MkdirAll(dir, 0o700); err != nil {
		return err
	}

	fmt.Fprintln(out, "building edge and bridge …")
	start, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	s, err := stack.Prepare(start, stack.Config{
		Dir: dir, Sites: sites, Iterations: o.iterations, RotateEvery: o.rotate, Poll: 500 * time.Millisecond,
		Ports:     stack.Ports{Edge: "127.0.0.1:8080", Hub: "127.0.0.1:4222", Screens: "127.0.0.1:8081"},
		Behaviour: kitchen.Behaviour{Latency: kitchen.Latency{Base: 2 * time.Millisecond, Jitter: 4 * time.Millisecond}},
		Log:       slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	fmt.Fprintln(out, "starting …")
	if err := s.Start(start); err != nil {
		return err
	}
	state := filepath.Join(dir, "demo.json")
	if err := s.WriteState(state); err != nil {
		return err
	}
	intro(out, s, state)

	drivers, err := posOf(s, o)
	if err != nil {
		return err
	}
	sending, stopSending := context.WithCancel(ctx)
	defer stopSending()
	if o.runFor > 0 {
		time.AfterFunc(o.runFor, stopSending)
	}
	// A program that ends by itself ends the demo: its own log says why.
	ended := make(chan error, 1)
	var watch sync.WaitGroup
	defer watch.Wait()
	watched, unwatch := context.WithCancel(context.Background())
	defer unwatch()
	for _, p := range []*stack.Process{s.Edge, s.Bridge} {
		watch.Go(func() {
			select {
			case <-p.Done():
				select {
				case ended <- p.Ended():
				default:
				}
				stopSending()
			case <-watched.Done():
			}
		})
	}

	v := &view{out: out, stack: s, drivers: drivers, terminal: isTerminal(out), started: time.Now()}
	showing, stopShowing := context.WithCancel(context.Background())
	var show sync.WaitGroup
	show.Go(func() { v.run(showing) })
	var senders sync.WaitGroup
	failed := make(chan error, len(drivers))
	for _, d := range drivers {
		senders.Go(func() { failed <- d.Run(sending) })
	}
	senders.Wait()

	// What was accepted gets the time that the last deadline could ask for, but a demo
	// whose Kitchen is well needs a second.
	drain, cancelDrain := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancelDrain()
	for _, d := range drivers {
		// What is still pending then is in the books.
		senders.Go(func() { _ = d.Drain(drain) })
	}
	senders.Wait()
	stopShowing()
	show.Wait()
	unwatch()
	for range drivers {
		err = errors.Join(err, <-failed)
	}
	if err != nil {
		return err
	}
	select {
	case err := <-ended:
		return err
	default:
	}
	if err := s.Stop(); err != nil {
		return err
	}
	return books(out, s, drivers)
}

// till is one POS of the demo.
type till struct {
	*pos.Driver
	site string
}

// posOf makes two POS for each site: one that leaves encryption to the edge, one that
// encrypts by itself where the Portal asks for it.
func posOf(s *stack.Stack, o options) ([]*till, error) {
	var drivers []*till
	for i, name := range slices.Sorted(maps.Keys(sites)) {
		e := s.Endpoints[name]
		for n, mode := range []pos.Mode{pos.Plain, pos.Encrypted} {
			if !sites[name].Encryption && mode == pos.Encrypted {
				mode = pos.Plain
			}
			d, err := pos.New(pos.Config{
				BaseURL: e.Edge, Site: name, Token: vendorcrypto.Secret(e.POSToken), Mode: mode,
				Profile: vendorcrypto.Profile{Cipher: e.Profile, Iterations: e.Iterations}, Keys: s.Keys,
				Rate: o.rate, IdempotencyKeys: true, Seed: o.seed + uint64(10*i+n),
			})
			if err != nil {
				return nil, err
			}
			drivers = append(drivers, &till{d, name})
		}
	}
	return drivers, nil
}

// books adds up what every POS was told and compares it with what the Kitchen got.
func books(out io.Writer, s *stack.Stack, drivers []*till) error {
	var t tally
	for _, d := range drivers {
		t.add(d.Tally())
	}
	k := s.Kitchen.Stats()
	fmt.Fprintf(out, "Kitchen: delivered %d repeats %d inversions %d decrypt errors %d; keys rotated %d times\n",
		k.Delivered, k.Repeats, k.Inversions, k.DecryptErrors, s.Portal.Rotations())
	fmt.Fprintf(out, "accepted %d delivered %d failed %d pending %d\n", t.accepted, t.delivered, t.failed, t.pending)
	var errs []error
	if t.accepted != t.delivered+t.failed+t.pending || t.pending != 0 || t.delivered == 0 {
		errs = append(errs, errors.New("the books do not balance: accepted = delivered + failed, nothing pending, something delivered"))
	}
	if t.unknown > 0 {
		errs = append(errs, fmt.Errorf("%d orders ended without a word on whether they were accepted", t.unknown))
	}
	if k.Delivered < t.delivered {
		errs = append(errs, fmt.Errorf("POS were told of %d delivered orders, the Kitchen got %d", t.delivered, k.Delivered))
	}
	if k.Inversions > 0 {
		errs = append(errs, fmt.Errorf("the Kitchen got %d orders after one that should follow them", k.Inversions))
	}
	return errors.Join(errs...)
}

// intro says what can be tried.
func intro(out io.Writer, s *stack.Stack, state string) {
	h, st := s.Endpoints["harbour"], s.Endpoints["station"]
	fmt.Fprintf(out, `
Try it (another terminal):
  curl -i %s/order -H 'Authorization: Bearer %s' -H 'Content-Type: application/json' -d '{"_id":"c-1","items":[{"name":"Soup"}]}'
  curl -i %s/order -H 'Content-Type: application/json' -d '{"_id":"c-2","items":[{"name":"Toast"}]}'
  curl %s/readyz; curl %s/readyz; curl %s/metrics
  node testenv/node/order.mjs %s station
  node testenv/node/screen.mjs %s harbour        (npm install --no-save ws first)
  nats --server %s sub 'live.>'                  (subjects are readable, bodies are not)
Screens: %s with Authorization: Bearer %s

`, h.Edge, h.POSToken, st.Edge, s.EdgeAdmin, s.BridgeAdmin, s.BridgeAdmin, state, state, s.Hub, h.Screen, h.ScreenToken)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
