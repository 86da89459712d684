package stack

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/pos"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// TestBridgeKilledUnderLoad kills the bridge, and with it the embedded hub, four times
// while POS send. What the edge said yes to must reach the Kitchen, and in order: a kill
// may repeat what was in flight, under the same Idempotency-Key, and nothing else.
func TestBridgeKilledUnderLoad(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	const kills = 4
	sites := map[string]Site{}
	for i := range 6 {
		sites[fmt.Sprintf("store-%d", i)] = Site{Profile: []string{"a256gcm", "a256ctr"}[i%2], Encryption: i%3 != 2}
	}
	// The Kitchens take a while, so that each kill meets attempts in flight and a backlog.
	s, err := Prepare(ctx, Config{Dir: t.TempDir(), Sites: sites, Iterations: 1000,
		Behaviour:      kitchen.Behaviour{Latency: kitchen.Latency{Base: 5 * time.Millisecond, Jitter: 30 * time.Millisecond}},
		BridgeSettings: map[string]any{"delivery": map[string]any{"settle": "200ms", "attempt_timeout": "1s"}}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := s.Start(ctx); err != nil {
		t.Fatal(err)
	}

	var drivers []*pos.Driver
	for i, name := range slices.Sorted(maps.Keys(sites)) {
		e := s.Endpoints[name]
		mode := pos.Plain
		if sites[name].Encryption && i%2 == 1 {
			mode = pos.Encrypted
		}
		d, err := pos.New(pos.Config{BaseURL: e.Edge, Site: name, Token: vendorcrypto.Secret(e.POSToken), Mode: mode, Keys: s.Keys,
			Profile: vendorcrypto.Profile{Cipher: e.Profile, Iterations: e.Iterations}, Rate: 60, Concurrency: 8, IdempotencyKeys: true,
			Wait: -1, Attempts: 40, Backoff: 50 * time.Millisecond, MaxBackoff: 300 * time.Millisecond, Grace: 15 * time.Second, Seed: uint64(i)})
		if err != nil {
			t.Fatal(err)
		}
		drivers = append(drivers, d)
	}
	sending, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for _, d := range drivers {
		wg.Go(func() {
			if err := d.Run(sending); err != nil {
				t.Error(err)
			}
		})
	}
	for kill := range kills {
		before := s.Kitchen.Stats().Delivered
		await(ctx, t, "the Kitchen gets orders", func() bool { return s.Kitchen.Stats().Delivered > before+100 })
		s.Bridge.Kill()
		if err := s.StartBridge(ctx); err != nil {
			t.Fatalf("start after kill %d: %v", kill+1, err)
		}
	}
	before := s.Kitchen.Stats().Delivered
	await(ctx, t, "orders flow after the last kill", func() bool { return s.Kitchen.Stats().Delivered > before+100 })
	stop()
	wg.Wait()

	// The ledger outside the programs: every key a POS was told yes for, against what was cooked.
	told := map[string]bool{}
	accepted := 0
	for _, d := range drivers {
		for _, e := range d.Ledger() {
			switch e.State {
			case pos.Pending, pos.Delivered:
				told[e.ID] = true
				accepted++
			case pos.Failed:
				t.Errorf("order %s of %s ended as failed: %s", e.ID, e.Site, e.Reason)
			}
		}
	}
	await(ctx, t, "everything accepted is cooked", func() bool {
		for _, r := range s.Kitchen.Ledger() {
			if r.Delivered() {
				delete(told, r.Key)
			}
		}
		return len(told) == 0
	})
	k := s.Kitchen.Stats()
	t.Logf("%d kills: accepted %d, cooked %d, repeats %d, inversions %d", kills, accepted, k.Delivered, k.Repeats, k.Inversions)
	if k.Inversions > 0 || k.Problems[kitchen.SeqReused] > 0 || k.Problems[kitchen.KeyMoved] > 0 || k.DecryptErrors > 0 {
		t.Errorf("the Kitchen saw %d inversions, problems %v, %d it could not decrypt", k.Inversions, k.Problems, k.DecryptErrors)
	}
	if accepted < 1000 {
		t.Errorf("only %d orders were accepted: too few to prove anything", accepted)
	}
	// Each kill may repeat the one attempt in flight of each site.
	if k.Repeats > uint64(kills*len(sites)) {
		t.Errorf("%d repeats from %d kills and %d sites: the report log should have known", k.Repeats, kills, len(sites))
	}
	if t.Failed() {
		t.Logf("edge:\n%s\nbridge:\n%s", s.Edge.Tail(), s.Bridge.Tail())
	}
}

// await polls until ok holds; the test ends when ctx does.
func await(ctx context.Context, t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain: %s", what)
		case <-tick.C:
		}
	}
}
