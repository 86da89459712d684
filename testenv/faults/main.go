// Command faults proves the promises under faults. It builds edge, bridge and a hub, runs
// them as processes of their own, lets POS send, makes things go wrong by a schedule drawn
// from a seed, and then compares three ledgers kept outside the programs: what each POS
// was told, what each Kitchen got, what the hub holds. docs/testing.md says what counts as
// lost, inverted, late, unreported and leaked.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

type options struct {
	scenario string
	runs     int
	seed     uint64
	dir      string
	verbose  bool
	list     bool
	selftest bool
}

func main() {
	var o options
	flag.StringVar(&o.scenario, "scenario", "", "the scenario to run, or all")
	flag.IntVar(&o.runs, "runs", 1, "how many runs, each with a seed of its own: the first has -seed, the next one more")
	flag.Uint64Var(&o.seed, "seed", 1, "seed of the first run")
	flag.StringVar(&o.dir, "dir", "", "keep programs, logs and data here (default: a temporary folder, removed unless a run fails)")
	flag.BoolVar(&o.verbose, "v", false, "show each run's timeline as it happens, and more violations")
	flag.BoolVar(&o.list, "list", false, "explain the scenarios")
	flag.BoolVar(&o.selftest, "selftest", false, "take away one safeguard of the programs at a time, and fail unless each is missed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := start(ctx, o, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context, o options, out io.Writer) (err error) {
	if o.list {
		for _, s := range scenarios {
			fmt.Fprintf(out, "%s\n%s\n\n", s.name, s.about)
		}
		return nil
	}
	if flag.NArg() > 0 || o.runs < 1 {
		return errors.New("takes no arguments, and -runs is at least 1")
	}
	chosen := scenarios
	if o.scenario != "all" && !o.selftest {
		s, err := findScenario(o.scenario)
		if err != nil {
			return err
		}
		chosen = []scenario{s}
	}
	b := &bench{out: out, verbose: o.verbose, keep: o.dir != ""}
	if b.dir, err = workDir(o.dir); err != nil {
		return err
	}
	if o.dir == "" {
		defer func() {
			if !b.keep {
				err = errors.Join(err, os.RemoveAll(b.dir))
			}
		}()
	}
	if o.selftest {
		return b.selftest(ctx, o.seed)
	}
	if b.built, err = build(ctx, filepath.Join(b.dir, "bin"), ""); err != nil {
		return err
	}
	var errs []error
	for _, s := range chosen {
		errs = append(errs, b.runs(ctx, s, o.runs, o.seed))
	}
	return errors.Join(errs...)
}

func workDir(dir string) (string, error) {
	if dir == "" {
		return os.MkdirTemp("", "kitchenbridge-faults-")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return dir, os.MkdirAll(dir, 0o700)
}

func build(ctx context.Context, dir, tags string) (programs, error) {
	err := stack.BuildPackages(ctx, dir, tags, "./cmd/edge", "./cmd/bridge", "./testenv/faults/hub")
	return programs{filepath.Join(dir, "edge"), filepath.Join(dir, "bridge"), filepath.Join(dir, "hub")}, err
}

// bench is where runs are made.
type bench struct {
	out     io.Writer
	dir     string
	built   programs
	verbose bool
	keep    bool // folders stay: a run failed, or somebody wants them
	made    int  // folders
}

// mostFailing is how many failing runs are enough to stop.
const mostFailing = 5

// minAccepted is how many messages a run must accept on average to prove anything.
const minAccepted = 200

// runs makes n runs and ends with one line that adds them up.
func (b *bench) runs(ctx context.Context, sc scenario, n int, seed uint64) error {
	sum := Outcome{Reasons: map[string]int{}}
	var faults, made, failing int
	for i := range n {
		s := seed + uint64(i)
		res, err := b.run(ctx, sc, s, nil)
		if ctx.Err() != nil {
			return fmt.Errorf("scenario %s seed %d: interrupted after %d whole runs", sc.name, s, made)
		}
		if err != nil {
			return fmt.Errorf("scenario %s seed %d: %w", sc.name, s, err)
		}
		made++
		faults += res.faults
		sum.Accepted += res.Accepted
		sum.Delivered += res.Delivered
		sum.Failed += res.Failed
		sum.Repeated += res.Repeated
		sum.Untold += res.Untold
		for reason, n := range res.Reasons {
			sum.Reasons[reason] += n
		}
		sum.Violations = append(sum.Violations, res.Violations...)
		if b.verbose {
			fmt.Fprintf(b.out, "seed %d: accepted %d delivered %d failed %d repeated %d faults %d untold %d violations %d lag %v in %v, failed for %v\n",
				s, res.Accepted, res.Delivered, res.Failed, res.Repeated, res.faults, res.Untold, len(res.Violations), res.lag.Round(time.Millisecond), res.took.Round(time.Millisecond), res.Reasons)
		}
		if res.bad() {
			most := 10
			if b.verbose {
				most = 50
			}
			res.describe(b.out, sc, s, most)
			if failing++; failing == mostFailing && made < n {
				fmt.Fprintf(b.out, "%d runs failed: no more are made\n", failing)
				break
			}
		}
	}
	if len(sum.Reasons) > 0 {
		fmt.Fprintf(b.out, "failed reports by reason: %v\n", sum.Reasons) // of the hub's: of messages that no POS was told yes for, too
	}
	fmt.Fprintf(b.out, "scenario %s runs %d accepted %d delivered %d failed %d repeated %d faults %d", sc.name, made, sum.Accepted, sum.Delivered, sum.Failed, sum.Repeated, faults)
	for _, c := range classes {
		fmt.Fprintf(b.out, " %s %d", c, sum.Count(c))
	}
	fmt.Fprintln(b.out)
	if failing > 0 {
		return fmt.Errorf("scenario %s: %d of %d runs failed", sc.name, failing, made)
	}
	return enough(&sum, made, faults)
}

// enough tells whether runs without violations prove anything.
func enough(sum *Outcome, runs, faults int) error {
	var errs []error
	if sum.Accepted < minAccepted*runs {
		errs = append(errs, fmt.Errorf("only %d messages were accepted in %d runs, fewer than %d each: too few to prove anything", sum.Accepted, runs, minAccepted))
	}
	if sum.Delivered == 0 {
		errs = append(errs, errors.New("nothing was delivered"))
	}
	if faults < runs {
		errs = append(errs, fmt.Errorf("%d faults in %d runs: too few to prove anything", faults, runs))
	}
	if sum.Delivered+sum.Failed != sum.Accepted {
		errs = append(errs, fmt.Errorf("the books do not balance: delivered %d + failed %d is not accepted %d", sum.Delivered, sum.Failed, sum.Accepted))
	}
	return errors.Join(errs...)
}

// run makes one run in a folder of its own, which is removed unless the run is bad.
func (b *bench) run(ctx context.Context, sc scenario, seed uint64, env []string) (res result, err error) {
	b.made++
	dir := filepath.Join(b.dir, fmt.Sprintf("%s-%d-%d", sc.name, seed, b.made))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return res, err
	}
	var show io.Writer
	if b.verbose {
		fmt.Fprintf(b.out, "scenario %s seed %d\n", sc.name, seed)
		show = b.out
	}
	res, err = perform(ctx, sc, seed, b.built, dir, env, show)
	if b.keep = b.keep || err != nil || res.bad(); b.keep {
		return res, err
	}
	return res, os.RemoveAll(dir)
}
