package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	floor "github.com/kitchenbridge/kitchenbridge/bench/floor/envelope"
)

func TestMedianIsTheMiddleAndKeepsTheOrderOfItsInput(t *testing.T) {
	for _, c := range []struct {
		name string
		in   []float64
		want float64
	}{
		{"one", []float64{3}, 3},
		{"odd", []float64{9, 1, 5}, 5},
		{"even", []float64{4, 1, 2, 100}, 3},
		{"an outlier moves nothing", []float64{1, 1, 1, 1, 1e9}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := slices.Clone(c.in)
			if got := median(c.in); got != c.want {
				t.Errorf("median %v, want %v", got, c.want)
			}
			if !slices.Equal(before, c.in) {
				t.Errorf("the input became %v", c.in)
			}
		})
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing is %v, want NaN", got)
	}
}

func TestPercentileIsOneOfTheValues(t *testing.T) {
	hundred := make([]int64, 100)
	for i := range hundred {
		hundred[i] = int64(100 - i)
	}
	for _, c := range []struct {
		p    float64
		want int64
	}{{0, 1}, {0.5, 50}, {0.99, 99}, {1, 100}} {
		if got := percentile(slices.Clone(hundred), c.p); got != c.want {
			t.Errorf("percentile %v is %d, want %d", c.p, got, c.want)
		}
	}
	if got := percentile([]time.Duration{}, 0.99); got != 0 {
		t.Errorf("percentile of nothing is %v", got)
	}
}

func TestBudgetJudges(t *testing.T) {
	none := math.NaN()
	for _, c := range []struct {
		name         string
		budget       budget
		value, ratio float64
		want         string
	}{
		{"cost within", budget{kind: ratioAtMost, bound: 1.25}, 5, 1.25, verdictOK},
		{"cost above", budget{kind: ratioAtMost, bound: 1.25}, 5, 1.26, verdictOver},
		{"cost never compared", budget{kind: ratioAtMost, bound: 1.25}, 5, none, verdictOver},
		{"rate within", budget{kind: ratioAtLeast, bound: 0.9}, 5, 0.9, verdictOK},
		{"rate below", budget{kind: ratioAtLeast, bound: 0.9}, 5, 0.89, verdictOver},
		{"rate never compared", budget{kind: ratioAtLeast, bound: 0.9}, 5, none, verdictOver},
		{"value within", budget{kind: valueAtMost, bound: 60}, 60, none, verdictOK},
		{"value above", budget{kind: valueAtMost, bound: 60}, 60.1, none, verdictOver},
		{"no value", budget{kind: valueAtMost, bound: 60}, none, none, verdictOver},
		{"reported", budget{kind: reported}, 1e9, none, verdictOK},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.budget.holds(c.value, c.ratio); got != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

func TestUnitPrintsThreeDigits(t *testing.T) {
	for _, c := range []struct {
		v    float64
		u    unit
		want string
	}{
		{0, allocations, "0allocs"}, {371.4, nanoseconds, "371ns"}, {12.345, milliseconds, "12.3ms"}, {1.005, kibibytes, "1KiB"},
		{0.01234, milliseconds, "0.012ms"}, {12667.2, perSecond, "12667/s"}, {math.NaN(), perSecond, "-"},
	} {
		if got := c.u.text(c.v); got != c.want {
			t.Errorf("%v is printed %q, want %q", c.v, got, c.want)
		}
	}
}

// labFor is a lab for benches that start no program.
func labFor(t *testing.T, quick bool) *lab {
	t.Helper()
	l, err := newLab(options{quick: quick, keep: t.TempDir()}, &bytes.Buffer{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// scripted gives one value after the other and notes when it was asked.
func scripted(asked *[]string, name string, values ...float64) side {
	return func(context.Context, time.Duration) (sample, error) {
		*asked = append(*asked, name)
		v := values[0]
		values = values[1:]
		return sample{"v": v}, nil
	}
}

func TestMeasureTakesTurnsAndTakesTheMedianOfTheirRatios(t *testing.T) {
	var asked []string
	closed := false
	b := bench{name: "b", rows: []row{{name: "b", key: "v", unit: nanoseconds, budget: budget{kind: ratioAtMost, bound: 1.5}, how: "h"}},
		open: func(context.Context, *lab) (*pair, error) {
			return &pair{
				// The first values are the warm-ups'. Turn by turn the ratios are 1, 4 and 2; the medians' would be 3.
				product: scripted(&asked, "product", 1e9, 10, 40, 60),
				floor:   scripted(&asked, "floor", 1, 10, 10, 30),
				close:   func() error { closed = true; return nil },
			}, nil
		}}
	got, err := measure(t.Context(), labFor(t, false), b, 3)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"product", "floor", "product", "floor", "floor", "product", "product", "floor"}
	if !slices.Equal(asked, want) {
		t.Errorf("the turns were %v, want %v", asked, want)
	}
	if !closed {
		t.Error("the pair was not closed")
	}
	if r := got[0]; r.Value != 40 || r.Floor != 10 || r.Ratio != 2 || r.Verdict != verdictOver {
		t.Errorf("%+v", r)
	}
}

func TestSlackIsTakenOffTheProductBeforeTheRatio(t *testing.T) {
	r := row{name: "p99", key: "v", unit: milliseconds, budget: budget{kind: ratioAtMost, bound: 1.15, slack: 1}}
	got, err := r.judge([]sample{{"v": 3.3}}, []sample{{"v": 2}})
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(float64(got.Ratio)-1.15) > 1e-9 || got.Value != 3.3 {
		t.Errorf("ratio %v of value %v, want 1.15 of 3.3", got.Ratio, got.Value)
	}
	if got.Budget != "ratio<=1.15+1ms" {
		t.Errorf("budget reads %q", got.Budget)
	}
}

func TestAValueThatWasNotMeasuredIsAnError(t *testing.T) {
	r := row{name: "x", key: "v", budget: budget{kind: ratioAtMost, bound: 1}}
	for name, c := range map[string]struct{ products, floors []sample }{
		"no turns":          {nil, nil},
		"another key":       {[]sample{{"w": 1}}, nil},
		"infinite":          {[]sample{{"v": math.Inf(1)}}, nil},
		"not a number":      {[]sample{{"v": math.NaN()}}, nil},
		"floor without it":  {[]sample{{"v": 1}}, []sample{{}}},
		"floor's turn lost": {[]sample{{"v": 1}, {"v": 1}}, []sample{{"v": 1}}},
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := r.judge(c.products, c.floors); err == nil {
				t.Errorf("judged as %+v", got)
			}
		})
	}
}

// envelopeBench measures the floor of the triple against itself, called times times. The budget
// leaves room for a machine on which other tests run at the same time.
func envelopeBench(times int) bench {
	return bench{name: "self", turn: 20 * time.Millisecond, quick: 20 * time.Millisecond,
		rows: []row{{name: "self", key: "ns", unit: nanoseconds, budget: budget{kind: ratioAtMost, bound: 5}, how: "the floor against itself"}},
		open: func(context.Context, *lab) (*pair, error) {
			f, err := floor.New(make([]byte, 32), envelopeBytes)
			if err != nil {
				return nil, err
			}
			plaintext := orderOf("s", 1, envelopeBytes)
			of := func(times int) side {
				var got []byte
				return work{
					call: func() (err error) {
						for range times {
							got, err = f.Triple(plaintext)
						}
						return err
					},
					done: func() error { return same(got, plaintext) },
				}.side
			}
			return &pair{product: of(times), floor: of(1)}, nil
		}}
}

func TestASlowProductIsReportedOver(t *testing.T) {
	for _, c := range []struct {
		name    string
		times   int
		verdict string
		check   bool
		exit    int
	}{
		{"as fast as the floor", 1, verdictOK, true, exitOK},
		{"many times as slow", 25, verdictOver, false, exitOK},
		{"many times as slow, checked", 25, verdictOver, true, exitOver},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, errOut bytes.Buffer
			code := run(t.Context(), options{runs: 3, check: c.check, keep: t.TempDir()}, []bench{envelopeBench(c.times)}, &out, &errOut)
			first, _, _ := strings.Cut(out.String(), "\n")
			if code != c.exit || !strings.HasSuffix(first, " "+c.verdict) {
				t.Errorf("exit %d, want %d; %q, want %s\n%s", code, c.exit, first, c.verdict, errOut.String())
			}
		})
	}
}

var lineForm = regexp.MustCompile(`^\S+ value=\S+ floor=\S+ ratio=\S+ budget=\S+ (ok|over)$`)

func TestEachRowIsALineAndHowToReadIt(t *testing.T) {
	var out, errOut bytes.Buffer
	if code := run(t.Context(), options{runs: 1, keep: t.TempDir()}, []bench{envelopeBench(1)}, &out, &errOut); code != exitOK {
		t.Fatalf("exit %d: %s", code, errOut.String())
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !lineForm.MatchString(lines[0]) || lines[1] != "    the floor against itself" {
		t.Errorf("printed %q", lines)
	}
}

func TestJSONHoldsEveryTurn(t *testing.T) {
	var out, errOut bytes.Buffer
	if code := run(t.Context(), options{runs: 3, json: true, keep: t.TempDir()}, []bench{envelopeBench(1)}, &out, &errOut); code != exitOK {
		t.Fatalf("exit %d: %s", code, errOut.String())
	}
	var got []result
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if len(got) != 1 || len(got[0].Values) != 3 || len(got[0].Floors) != 3 || len(got[0].Ratios) != 3 {
		t.Errorf("%+v", got)
	}
	raw, err := json.Marshal(result{Floor: number(math.NaN()), Ratio: number(math.Inf(1))})
	if err != nil || !strings.Contains(string(raw), `"floor":null,"ratio":null`) {
		t.Errorf("what was not compared reads %s (%v)", raw, err)
	}
}

func TestATurnThatFailsIsNoRow(t *testing.T) {
	nothing := errors.New("of 100 events 0 have come")
	failing := func(context.Context, time.Duration) (sample, error) { return nil, nothing }
	fine := func(context.Context, time.Duration) (sample, error) { return sample{"v": 1}, nil }
	rows := []row{{name: "b", key: "v", budget: budget{kind: ratioAtMost, bound: 1}}}
	for name, p := range map[string]pair{
		"product":  {product: failing, floor: fine},
		"floor":    {product: fine, floor: failing},
		"at close": {product: fine, floor: fine, close: func() error { return nothing }},
	} {
		t.Run(name, func(t *testing.T) {
			var out, errOut bytes.Buffer
			b := bench{name: "b", rows: rows, open: func(context.Context, *lab) (*pair, error) { return &p, nil }}
			if code := run(t.Context(), options{runs: 2, keep: t.TempDir()}, []bench{b}, &out, &errOut); code != exitUnmeasured {
				t.Errorf("exit %d, want %d", code, exitUnmeasured)
			}
			if out.Len() > 0 || !strings.Contains(errOut.String(), nothing.Error()) {
				t.Errorf("printed %q and said %q", out.String(), errOut.String())
			}
		})
	}
}

func TestOneFailureDoesNotHideTheOtherRows(t *testing.T) {
	broken := bench{name: "broken", rows: []row{{name: "broken", key: "v"}},
		open: func(context.Context, *lab) (*pair, error) { return nil, errors.New("no") }}
	var out, errOut bytes.Buffer
	if code := run(t.Context(), options{runs: 1, keep: t.TempDir()}, []bench{broken, envelopeBench(1)}, &out, &errOut); code != exitUnmeasured {
		t.Errorf("exit %d, want %d", code, exitUnmeasured)
	}
	if !strings.HasPrefix(out.String(), "self value=") {
		t.Errorf("printed %q", out.String())
	}
}

func TestWaitingInVainIsAnErrorThatSaysForWhat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		err := eventually(t.Context(), func() (bool, string, error) { return false, "of 8000 events 7999 have come", nil })
		if err == nil || !strings.Contains(err.Error(), "7999") {
			t.Errorf("%v", err)
		}
		if took := time.Since(begun); took < settleLimit || took > settleLimit+time.Second {
			t.Errorf("gave up after %v, not %v", took, settleLimit)
		}
	})
}
