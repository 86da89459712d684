package router

import (
	"testing"
	"time"
)

func TestQuotaIsForAMinute(t *testing.T) {
	q := quota[int]{each: 2, all: 5}
	now := time.Unix(0, 0)
	took := func(key int) (n int) {
		for range 10 {
			if q.take(key, now) {
				n++
			}
		}
		return n
	}
	for minute := range 3 {
		for key, want := range []int{2, 2, 1, 0} {
			if got := took(key); got != want {
				t.Errorf("minute %d: %d of key %d, want %d", minute, got, key, want)
			}
		}
		if len(q.of) > q.all {
			t.Errorf("%d keys remembered", len(q.of))
		}
		now = now.Add(time.Minute)
	}
}
