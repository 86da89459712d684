package keysync

import (
	"container/heap"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

// Run fetches every site at once and then each one every portal.poll, and reads the binding
// file when it changes, until ctx ends; it returns nil then, after all fetches have ended.
// Sites are spread over the interval, fetched eight at a time, more often when their last
// key is about to end, and less often while fetching fails. Run can be called once; the keys
// stay readable after it.
func (k *Keys) Run(ctx context.Context) error {
	if !k.started.CompareAndSwap(false, true) {
		return errors.New("keysync: Run was called before")
	}
	var wg sync.WaitGroup
	defer func() {
		k.mu.Lock()
		k.end(errStopped)
		k.mu.Unlock()
		k.flights.Wait()
		wg.Wait()
		k.close()
	}()

	watching, unwatch := context.WithCancel(ctx)
	defer unwatch() // before the wait
	if k.rebind != nil {
		wg.Go(func() { k.watchBinding(watching) })
	}

	// One queue and one timer for all sites, however many there are.
	now := time.Now()
	spread := min(time.Second, k.poll/10, time.Duration(len(k.sites))*10*time.Millisecond)
	queue := make(schedule, 0, len(k.sites))
	for _, st := range k.sites {
		queue = append(queue, &turn{st: st, at: now.Add(jitter(spread))})
	}
	heap.Init(&queue)

	ended := make(chan *turn, concurrency)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for underWay := 0; ; {
		now := time.Now()
		if wait := k.held(); wait > 0 && len(queue) > 0 {
			// The Portal's rate limit: nobody goes, and afterwards not all at once.
			for len(queue) > 0 && queue[0].at.Before(now.Add(wait)) {
				queue[0].at = now.Add(wait + jitter(k.poll/2))
				heap.Fix(&queue, 0)
			}
		}
		for underWay < concurrency && len(queue) > 0 && !queue[0].at.After(now) {
			t := heap.Pop(&queue).(*turn)
			underWay++
			wg.Go(func() {
				_, err := k.do(ctx, t.st, false)
				t.at = time.Now().Add(k.wait(t, err))
				ended <- t
			})
		}
		var due <-chan time.Time
		if underWay < concurrency && len(queue) > 0 {
			timer.Reset(queue[0].at.Sub(now))
			due = timer.C
		}
		select {
		case <-ctx.Done():
			return nil
		case t := <-ended:
			underWay--
			heap.Push(&queue, t)
		case <-due:
		}
	}
}

// wait tells how long after a fetch the site has its next turn.
func (k *Keys) wait(t *turn, err error) time.Duration {
	t.st.mu.Lock()
	failures := t.st.failures
	t.st.mu.Unlock()
	site := t.st.now.Load()
	if err != nil {
		// A failure that was not counted, as a rate limit's, waits like a first one.
		wait := k.beforeEnd(site, k.backoff(max(0, failures-1)))
		if bad, ok := errors.AsType[*fetchError](err); ok {
			wait = max(wait, bad.retryAfter+jitter(bad.retryAfter/10))
		}
		return wait
	}
	if !t.seen {
		// The first round came in a burst; from here on the sites are spread.
		t.seen = true
		return k.beforeEnd(site, k.poll/10+jitter(k.poll-k.poll/10))
	}
	return k.beforeEnd(site, k.poll-k.poll/10+jitter(k.poll/5))
}

// beforeEnd shortens a wait when the site's last key is to end within it: its successor
// must be here before. Each turn halves what is left, down to a quarter of a poll.
func (k *Keys) beforeEnd(site *Site, wait time.Duration) time.Duration {
	end, ok := lastEnd(site)
	if !ok {
		return wait
	}
	left := time.Until(end)
	if left <= 0 {
		return wait // too late to hurry
	}
	return min(wait, max(left/2, k.poll/4))
}

// lastEnd tells when the site will be without a valid key; !ok when it has none to end.
func lastEnd(s *Site) (end time.Time, ok bool) {
	for _, key := range s.Keyring.Keys() {
		if !ok || key.ValidUntil().After(end) {
			end, ok = key.ValidUntil(), true
		}
	}
	return end, ok
}

// The back-off of a failing site begins at a second and ends at five polls, but not
// above ten minutes unless the poll itself is longer.
func (k *Keys) backoff(failures int) time.Duration {
	return backoff(failures, min(time.Second, k.poll), k.backoffCap())
}

func (k *Keys) backoffCap() time.Duration { return max(k.poll, min(5*k.poll, 10*time.Minute)) }

// attemptsToCap is the failure in a row from which on the back-off grows no more.
func (k *Keys) attemptsToCap() int {
	n := 1
	for d := min(time.Second, k.poll); d < k.backoffCap(); d *= 2 {
		n++
	}
	return max(2, n)
}

// backoff is exponential with full jitter: a random part of base doubled for each
// failure before, at most limit, at least a tenth of base.
func backoff(failures int, base, limit time.Duration) time.Duration {
	d := base
	for range failures {
		if d >= limit {
			break // so that attempt 64 does not overflow
		}
		d *= 2
	}
	return max(jitter(min(d, limit)), base/10)
}

// jitter is a random duration from 0 to d.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d + 1)
}

// turn is a site's place in the schedule. It is owned by the queue, or by the fetch that
// it was popped for.
type turn struct {
	st   *siteState
	at   time.Time
	seen bool // fetched successfully once
}

// schedule is a heap of turns, earliest first.
type schedule []*turn

func (s schedule) Len() int           { return len(s) }
func (s schedule) Less(i, j int) bool { return s[i].at.Before(s[j].at) }
func (s schedule) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }
func (s *schedule) Push(t any)        { *s = append(*s, t.(*turn)) }
func (s *schedule) Pop() any {
	old := *s
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*s = old[:len(old)-1]
	return t
}
