package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// sample is what one turn of one side gave, by row.key.
type sample map[string]float64

// side measures one turn of about the given length. It returns an error when the work
// that it counts was not done, whole and right.
type side func(ctx context.Context, turn time.Duration) (sample, error)

// pair are product and floor of one bench, running and ready to be measured in turn.
type pair struct {
	product side
	floor   side // nil when the budgets are absolute and nothing is compared
	close   func() error
}

// bench is one set-up that gives one or more rows.
type bench struct {
	name string
	rows []row
	// open starts what is measured.
	open func(ctx context.Context, l *lab) (*pair, error)
	// turn and quick are the length of a turn, and that of -quick.
	turn, quick time.Duration
	// cold: each turn starts from nothing, so a warm-up would be wasted.
	cold bool
}

// row is one line of the report.
type row struct {
	name   string
	key    string // in the samples
	unit   unit
	budget budget
	how    string // one line: how to read it
}

// kind says what a budget bounds.
type kind int

const (
	ratioAtMost kind = iota
	ratioAtLeast
	valueAtMost
	reported // no budget: printed for the reader
)

// budget is what a row may cost.
type budget struct {
	kind  kind
	bound float64
	// slack is taken off the product's value before the ratio, in the row's unit.
	slack float64
}

func (b budget) text(u unit) string {
	switch b.kind {
	case ratioAtMost:
		s := "ratio<=" + strconv.FormatFloat(b.bound, 'f', 2, 64)
		if b.slack > 0 {
			s += "+" + u.text(b.slack)
		}
		return s
	case ratioAtLeast:
		return "ratio>=" + strconv.FormatFloat(b.bound, 'f', 2, 64)
	case valueAtMost:
		return "value<=" + u.text(b.bound)
	}
	return "none"
}

// Verdicts of a row.
const (
	verdictOK   = "ok"
	verdictOver = "over"
)

// holds judges the median value, and the median of the ratios (NaN without a floor). A
// number that is none is over: it was never within a budget.
func (b budget) holds(value, ratio float64) string {
	ok := false
	switch b.kind {
	case ratioAtMost:
		ok = ratio <= b.bound
	case ratioAtLeast:
		ok = ratio >= b.bound
	case valueAtMost:
		ok = value <= b.bound
	case reported:
		ok = !math.IsNaN(value)
	}
	if ok {
		return verdictOK
	}
	return verdictOver
}

// unit names what a value counts.
type unit string

const (
	nanoseconds  unit = "ns"
	microseconds unit = "µs"
	milliseconds unit = "ms"
	perSecond    unit = "/s"
	kibibytes    unit = "KiB"
	allocations  unit = "allocs"
)

// text prints three significant digits, or all there are before the point.
func (u unit) text(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	decimals := 0
	if abs := math.Abs(v); abs > 0 && abs < 100 {
		decimals = min(max(2-int(math.Floor(math.Log10(abs))), 0), 3)
	}
	s := strconv.FormatFloat(v, 'f', decimals, 64)
	if strings.Contains(s, ".") {
		s = strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
	}
	return s + string(u)
}

// result is one measured row. Without a floor, Floor and Ratio are null in JSON.
type result struct {
	Name    string    `json:"name"`
	Unit    unit      `json:"unit"`
	Value   float64   `json:"value"`
	Floor   number    `json:"floor"`
	Ratio   number    `json:"ratio"`
	Budget  string    `json:"budget"`
	Verdict string    `json:"verdict"`
	Values  []float64 `json:"values"`
	Floors  []float64 `json:"floors,omitempty"`
	Ratios  []float64 `json:"ratios,omitempty"`
	How     string    `json:"how"`
}

// number is a float64 that JSON shows as null when it is none.
type number float64

func (n number) MarshalJSON() ([]byte, error) {
	if math.IsNaN(float64(n)) || math.IsInf(float64(n), 0) {
		return []byte("null"), nil
	}
	return json.Marshal(float64(n))
}

func (n number) text() string {
	if math.IsNaN(float64(n)) {
		return "-"
	}
	return strconv.FormatFloat(float64(n), 'f', 2, 64)
}

// line is the row as it is printed.
func (r result) line() string {
	return fmt.Sprintf("%s value=%s floor=%s ratio=%s budget=%s %s",
		r.Name, r.Unit.text(r.Value), r.Unit.text(float64(r.Floor)), r.Ratio.text(), r.Budget, r.Verdict)
}

// spread is the lowest and highest ratio, or value where there is no ratio.
func (r result) spread() string {
	if len(r.Ratios) > 0 {
		return fmt.Sprintf("%.2f to %.2f", slices.Min(r.Ratios), slices.Max(r.Ratios))
	}
	return fmt.Sprintf("%s to %s", r.Unit.text(slices.Min(r.Values)), r.Unit.text(slices.Max(r.Values)))
}

func anyOver(results []result) bool {
	return slices.ContainsFunc(results, func(r result) bool { return r.Verdict == verdictOver })
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// measure runs a bench: a warm-up of each side, then turns. Who goes first alternates, so
// that neither is always the one that finds the machine as the other left it.
func measure(ctx context.Context, l *lab, b bench, runs int) (_ []result, err error) {
	turn := b.turn
	if l.quick {
		turn = b.quick
	}
	ctx, cancel := context.WithTimeoutCause(ctx, benchLimit, fmt.Errorf("not done within %v", benchLimit))
	defer cancel()
	p, err := b.open(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	if p.close != nil {
		defer func() { err = errors.Join(err, p.close()) }()
	}
	sides := []struct {
		name string
		side side
	}{{"product", p.product}, {"floor", p.floor}}
	if p.floor == nil {
		sides = sides[:1]
	}
	if !b.cold {
		for _, s := range sides {
			if _, err := s.side(ctx, turn/2); err != nil {
				return nil, fmt.Errorf("warm-up of the %s: %w", s.name, err)
			}
		}
	}
	samples := make(map[string][]sample)
	for i := range runs {
		for j := range sides {
			s := sides[(i+j)%len(sides)]
			got, err := s.side(ctx, turn)
			if err != nil {
				return nil, fmt.Errorf("turn %d of the %s: %w", i+1, s.name, err)
			}
			samples[s.name] = append(samples[s.name], got)
			l.logf("%s turn %d %s %v", b.name, i+1, s.name, got)
		}
	}
	var results []result
	for _, r := range b.rows {
		got, err := r.judge(samples["product"], samples["floor"])
		if err != nil {
			return nil, err
		}
		results = append(results, got)
	}
	return results, nil
}

// benchLimit bounds one bench: a run that hangs is a failure to measure.
const benchLimit = 3 * time.Minute

// judge makes a row's result of the turns. floors is empty when nothing was compared.
func (r row) judge(products, floors []sample) (result, error) {
	res := result{Name: r.name, Unit: r.unit, Budget: r.budget.text(r.unit), How: r.how,
		Floor: number(math.NaN()), Ratio: number(math.NaN())}
	values, err := r.column(products)
	if err != nil {
		return res, fmt.Errorf("product: %w", err)
	}
	res.Values, res.Value = values, median(values)
	if len(floors) > 0 && r.budget.kind != reported {
		if res.Floors, err = r.column(floors); err != nil {
			return res, fmt.Errorf("floor: %w", err)
		}
		res.Floor = number(median(res.Floors))
		if len(res.Floors) != len(values) {
			return res, fmt.Errorf("%s: %d turns of the product, %d of the floor", r.name, len(values), len(res.Floors))
		}
		for i, v := range values {
			if res.Floors[i] > 0 {
				res.Ratios = append(res.Ratios, max(v-r.budget.slack, 0)/res.Floors[i])
			}
		}
		if len(res.Ratios) == len(values) {
			res.Ratio = number(median(res.Ratios))
		} else {
			res.Ratios = nil
		}
	}
	res.Verdict = r.budget.holds(res.Value, float64(res.Ratio))
	return res, nil
}

func (r row) column(samples []sample) ([]float64, error) {
	if len(samples) == 0 {
		return nil, fmt.Errorf("%s: no turn was measured", r.name)
	}
	var out []float64
	for i, s := range samples {
		v, ok := s[r.key]
		if !ok || math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, fmt.Errorf("%s: turn %d did not measure %q", r.name, i+1, r.key)
		}
		out = append(out, v)
	}
	return out, nil
}

// median of at least one value. The values keep their order.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// percentile is the smallest of the values that at least a part p (0 to 1) of them does
// not exceed. It sorts values.
func percentile[T int64 | float64 | time.Duration](values []T, p float64) T {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	i := int(math.Ceil(p*float64(len(values)))) - 1
	return values[min(max(i, 0), len(values)-1)]
}
