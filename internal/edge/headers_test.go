package edge

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestPreferredWait(t *testing.T) {
	for _, tc := range []struct {
		name   string
		values []string
		want   time.Duration
		none   bool
	}{
		{name: "no header", none: true},
		{name: "seconds", values: []string{"wait=10"}, want: 10 * time.Second},
		{name: "zero", values: []string{"wait=0"}},
		{name: "quoted", values: []string{`wait="10"`}, want: 10 * time.Second},
		{name: "blanks", values: []string{" wait\t= 10 "}, want: 10 * time.Second},
		{name: "any case", values: []string{"WAIT=10"}, want: 10 * time.Second},
		{name: "among others", values: []string{"respond-async, wait=10, handling=lenient"}, want: 10 * time.Second},
		{name: "in a second header", values: []string{"return=minimal", "wait=10"}, want: 10 * time.Second},
		{name: "with parameters", values: []string{`wait=10; foo="a,b;c"`}, want: 10 * time.Second},
		{name: "parameters of another", values: []string{`foo="x, wait=7"; wait=8, wait=10`}, want: 10 * time.Second},
		{name: "the first of two", values: []string{"wait=1, wait=2", "wait=3"}, want: time.Second},
		{name: "more than fits", values: []string{"wait=99999999999999999999"}, want: (1 << 31) * time.Second},
		{name: "an unreadable first one is none", values: []string{"wait=soon, wait=2"}, none: true},
		{name: "no value", values: []string{"wait"}, none: true},
		{name: "empty value", values: []string{"wait="}, none: true},
		{name: "negative", values: []string{"wait=-1"}, none: true},
		{name: "fraction", values: []string{"wait=1.5"}, none: true},
		{name: "another word", values: []string{"waiting=10"}, none: true},
		{name: "an open quote", values: []string{`foo="wait=1, wait=2`}, none: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, ok := preferredWait(tc.values)
			if got != tc.want || ok == tc.none {
				t.Errorf("%v, %v; want %v, %v", got, ok, tc.want, !tc.none)
			}
		})
	}
}

func TestWishes(t *testing.T) {
	const wait, maxWait, deadline = 2 * time.Second, 30 * time.Second, 10 * time.Minute
	for _, tc := range []struct {
		name   string
		header http.Header
		want   wishes
		reason string
	}{
		{name: "none", want: wishes{wait: wait, within: deadline}},
		{name: "all", header: with("Idempotency-Key", `"8e03978e-40d5"`, "Prefer", "wait=7", "Kb-Within", "90", "Traceparent", "00-a-b-01"),
			want: wishes{key: `"8e03978e-40d5"`, wait: 7 * time.Second, within: 90 * time.Second, trace: "00-a-b-01"}},
		{name: "no wait", header: with("Prefer", "wait=0"), want: wishes{within: deadline}},
		{name: "a wait above the longest", header: with("Prefer", "wait=31"), want: wishes{wait: maxWait, within: deadline}},
		{name: "a deadline above the kind's", header: with("Kb-Within", "601"), want: wishes{wait: wait, within: deadline}},
		{name: "a deadline that fits nowhere", header: with("Kb-Within", strings.Repeat("9", 40)), want: wishes{wait: wait, within: deadline}},
		{name: "an empty key", header: with("Idempotency-Key", ""), reason: "idempotency-key"},
		{name: "a key beyond ASCII", header: with("Idempotency-Key", "schlüssel"), reason: "idempotency-key"},
		{name: "a negative deadline", header: with("Kb-Within", "-1"), reason: "within"},
		{name: "a deadline with a unit", header: with("Kb-Within", "10s"), reason: "within"},
		{name: "two deadlines", header: with("Kb-Within", "1", "Kb-Within", "2"), reason: "within"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, f := readWishes(tc.header, wait, maxWait, deadline)
			if tc.reason != "" {
				if f == nil || f.Status != 400 || f.Ext["reason"] != tc.reason {
					t.Fatalf("%+v, want a refusal for %s", f, tc.reason)
				}
				return
			}
			if f != nil || got != tc.want {
				t.Errorf("%+v, %+v; want %+v", got, f, tc.want)
			}
		})
	}
}

func FuzzPrefer(f *testing.F) {
	f.Add("wait=10")
	f.Add(`respond-async, wait="10"; x=y`)
	f.Add(`a="\",wait=1", wait=2`)
	f.Add("wait=99999999999999999999")
	f.Fuzz(func(t *testing.T, value string) {
		d, ok := preferredWait([]string{value})
		if d < 0 || d > (1<<31)*time.Second || d%time.Second != 0 || !ok && d != 0 {
			t.Errorf("%q: %v, %v", value, d, ok)
		}
		// In front of everything, a preference counts whatever follows.
		if d, ok := preferredWait([]string{"wait=5, " + value}); !ok || d != 5*time.Second {
			t.Errorf("before %q: %v, %v", value, d, ok)
		}
	})
}
