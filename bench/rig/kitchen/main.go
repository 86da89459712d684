// Command kitchen stands for the Kitchens of all sites in one process, as fast as it can:
// a listener for each site, so that whoever posts needs a connection to each, and an
// answer at once. It counts each id once, notes numbers that go backwards, and opens
// every 32nd order with the testenv's own crypto to see that it is that site's. Sites at the
// end of the list can be dead: they take the connection and never answer.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

func main() { os.Exit(rig.Main("kitchen", run)) }

// siteFile is a site as the bench writes it.
type siteFile struct {
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"`
	Phrase      string `json:"phrase"`
	Dead        bool   `json:"dead"`
}

func run(ctx context.Context) error {
	admin := flag.String("admin", "", "host:port of /readyz, /addresses, /stats and /arrivals")
	file := flag.String("sites", "", "JSON file of the sites")
	iterations := flag.Int("iterations", 1, "of PBKDF2")
	flag.Parse()
	raw, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var sites []siteFile
	if err := json.Unmarshal(raw, &sites); err != nil {
		return err
	}
	k := &kitchen{byPort: make(map[int]*site, len(sites))}
	server := &http.Server{Handler: k, ReadHeaderTimeout: time.Minute, ErrorLog: log.New(io.Discard, "", 0)}
	defer server.Close()
	var serving sync.WaitGroup
	defer serving.Wait()
	defer server.Close() // before the wait
	addresses := make(map[string]string, len(sites))
	for _, s := range sites {
		c, err := vendorcrypto.Derive(vendorcrypto.Profile{Cipher: "a256gcm", Iterations: *iterations}, vendorcrypto.Secret(s.Phrase))
		if err != nil {
			return err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		addresses[s.Name] = l.Addr().String()
		k.byPort[l.Addr().(*net.TCPAddr).Port] = &site{name: s.Name, fingerprint: s.Fingerprint, cipher: c, dead: s.Dead, arrivals: make(map[string]int64)}
		serving.Go(func() { _ = server.Serve(l) }) // it ends with server.Close
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /addresses", func(w http.ResponseWriter, _ *http.Request) { rig.WriteJSON(w, addresses) })
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) { rig.WriteJSON(w, k.stats()) })
	mux.HandleFunc("GET /arrivals", func(w http.ResponseWriter, _ *http.Request) { rig.WriteJSON(w, k.arrivals()) })
	return rig.Serve(ctx, *admin, mux, func() error { return nil })
}

type kitchen struct {
	// Fixed once serving.
	byPort map[int]*site

	unique, repeats, inversions, opened, wrong, dead atomic.Int64
	why                                              atomic.Pointer[string] // the first wrong one
}

type site struct {
	// Fixed at birth.
	name, fingerprint string
	cipher            *vendorcrypto.Cipher
	dead              bool

	mu       sync.Mutex
	arrivals map[string]int64 // Guarded by mu: by id, Unix ns
	top      uint64           // Guarded by mu: highest Kb-Seq
}

const sampleEvery = 32

var answer = []byte(`{"ok":true}`)

func (k *kitchen) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	port := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr).Port
	s := k.byPort[port]
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the sender has gone
	}
	if s.dead {
		k.dead.Add(1)
		<-r.Context().Done() // until the sender gives up
		return
	}
	now := time.Now().UnixNano()
	id := r.Header.Get("Idempotency-Key")
	seq, _ := strconv.ParseUint(r.Header.Get("Kb-Seq"), 10, 64) // 0: the sender promises no order
	s.mu.Lock()
	_, again := s.arrivals[id]
	if !again {
		s.arrivals[id] = now
	}
	inverted := !again && seq > 0 && seq < s.top
	s.top = max(s.top, seq)
	s.mu.Unlock()
	if inverted {
		k.inversions.Add(1)
	}
	switch {
	case id == "":
		k.complain(fmt.Errorf("an order of %s without Idempotency-Key", s.name))
	case again:
		k.repeats.Add(1)
	case k.unique.Add(1)%sampleEvery == 1:
		k.complain(s.check(r, body))
		k.opened.Add(1)
	}
	w.Header()["Content-Type"] = contentType
	_, _ = w.Write(answer)
}

var contentType = []string{"application/json"}

func (k *kitchen) complain(err error) {
	if err == nil {
		return
	}
	k.wrong.Add(1)
	why := err.Error()
	k.why.CompareAndSwap(nil, &why)
}

// check opens an order and looks whose it is.
func (s *site) check(r *http.Request, body []byte) error {
	if fp := r.Header.Get("Sec-Fingerprint"); fp != s.fingerprint {
		return fmt.Errorf("an order of %s came under the fingerprint %.40q", s.name, fp)
	}
	plain, err := s.cipher.Open(r.Header.Get("Sec-Iv"), string(body))
	if err != nil {
		return fmt.Errorf("an order of %s: %w", s.name, err)
	}
	var order struct {
		Site string `json:"site"`
	}
	if err := json.Unmarshal(plain, &order); err != nil {
		return fmt.Errorf("an order of %s: %w", s.name, err)
	}
	if order.Site != s.name {
		return errors.New("an order of " + order.Site + " came to " + s.name)
	}
	return nil
}

// stats as the bench reads them.
type stats struct {
	Unique     int64  `json:"unique"`
	Repeats    int64  `json:"repeats"`
	Inversions int64  `json:"inversions"`
	Opened     int64  `json:"opened"`
	Wrong      int64  `json:"wrong"`
	Dead       int64  `json:"dead"` // requests that a dead site took
	Why        string `json:"why"`
}

func (k *kitchen) stats() stats {
	s := stats{Unique: k.unique.Load(), Repeats: k.repeats.Load(), Inversions: k.inversions.Load(), Opened: k.opened.Load(), Wrong: k.wrong.Load(), Dead: k.dead.Load()}
	if why := k.why.Load(); why != nil {
		s.Why = *why
	}
	return s
}

func (k *kitchen) arrivals() map[string]int64 {
	all := make(map[string]int64)
	for _, s := range k.byPort {
		s.mu.Lock()
		maps.Copy(all, s.arrivals)
		s.mu.Unlock()
	}
	return all
}
