package main

import (
	"math"
	"strings"
	"testing"
)

func TestDocumentHoldsEveryRowAndItsSetting(t *testing.T) {
	got := string(document([]result{
		{Name: "deliver", Unit: microseconds, Value: 150, Floor: 100, Ratio: 1.5, Budget: "ratio<=1.25", Verdict: verdictOver,
			Values: []float64{150}, Ratios: []float64{1.4, 1.5, 1.6}, How: "how to read deliver"},
		{Name: "order.e2e", Unit: milliseconds, Value: 12.5, Floor: number(math.NaN()), Ratio: number(math.NaN()), Budget: "value<=60ms", Verdict: verdictOK,
			Values: []float64{11, 12.5, 20}, How: "how to read e2e"},
	}, setting{processor: "A processor", system: "linux/amd64", goVersion: "go1.26", commit: "abc123", date: "2026-01-02", cores: 2, runs: 5}))
	for _, want := range []string{
		"| machine | A processor, 2 cores, linux/amd64 |", "| Go | go1.26 |", "| commit | abc123 |", "| date | 2026-01-02 |", "| turns | 5 ",
		"| `deliver` | 150µs | 100µs | 1.50 | 1.40 to 1.60 | ratio≤ 1.25 | **over** |\n",
		"| `order.e2e` | 12.5ms | - | - | 11ms to 20ms | value≤ 60ms | ok |\n",
		"1 of 2 rows are over their budget.", "- `deliver`: how to read deliver.\n", "- `order.e2e`: how to read e2e.\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
}
