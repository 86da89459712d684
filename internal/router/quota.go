package router

import (
	"sync"
	"time"
)

// quota allows so much in a minute: each times of one key, and all times in total, which
// bounds its memory too. Safe for concurrent use.
type quota[K comparable] struct {
	each, all int // fixed at birth

	mu sync.Mutex
	// Guarded by mu.
	until time.Time // end of the minute
	of    map[K]int
	total int
}

// take tells whether one more of the key is within the quota, and counts it if so.
func (q *quota[K]) take(key K, now time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !now.Before(q.until) {
		q.until, q.total, q.of = now.Add(time.Minute), 0, make(map[K]int)
	}
	if q.total >= q.all || q.of[key] >= q.each {
		return false
	}
	q.of[key]++
	q.total++
	return true
}
