// Command bench measures the product against floors: minimal programs that do only the
// work nobody can avoid (bench/floor). Product and floor take turns, so that whatever
// else the machine does meets both; what counts is the median of the turns' ratios.
//
//	go run ./bench                      every row
//	go run ./bench -only deliver,ws     the rows whose names begin so
//	go run ./bench -write docs/perf.md  every row, and the table in the documentation
//
// Where a budget is about CPU, product, floor, hub, Kitchen and load are processes of
// their own, and the kernel's account of the one process is read before and after.
//
// Exit status: 0 when everything was measured, 1 when something could not be, 2 for a
// mistake on the command line, 3 with -check when a row is over its budget.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// options of one run.
type options struct {
	only  []string
	runs  int
	quick bool
	json  bool
	check bool
	list  bool
	write string
	keep  string
}

func main() {
	o, err := parse(os.Args[1:], os.Stderr)
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(exitUsage)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, o, benches(), os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Exit statuses.
const (
	exitOK         = 0
	exitUnmeasured = 1
	exitUsage      = 2
	exitOver       = 3
)

const (
	defaultRuns = 5
	quickRuns   = 3
)

// parse reads the command line. Errors are complete sentences for a person.
func parse(args []string, errOut io.Writer) (options, error) {
	var o options
	var only string
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(errOut)
	f.StringVar(&only, "only", "", "comma-separated beginnings of names: measure these rows only")
	f.IntVar(&o.runs, "runs", 0, "turns of product and floor each; 0: 5, or 3 with -quick")
	f.BoolVar(&o.quick, "quick", false, "short turns and fewer connections: a look, not a verdict")
	f.BoolVar(&o.json, "json", false, "print the results as JSON")
	f.BoolVar(&o.check, "check", false, "exit with status 3 when a row is over its budget")
	f.BoolVar(&o.list, "list", false, "print the rows with their budgets and how to read them, and measure nothing")
	f.StringVar(&o.write, "write", "", "write the table of all rows to this file")
	f.StringVar(&o.keep, "dir", "", "keep programs, settings and logs in this folder; default: a temporary one, removed at the end")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	switch {
	case f.NArg() > 0:
		return o, fmt.Errorf("%q: there are no arguments, only flags", f.Arg(0))
	case o.runs < 0 || o.runs > 99:
		return o, fmt.Errorf("-runs %d is not in 1 to 99", o.runs)
	case o.write != "" && only != "":
		return o, errors.New("-write wants all rows, -only leaves some out")
	case o.write != "" && o.quick:
		return o, errors.New("-write wants full turns, -quick cuts them short")
	}
	if o.runs == 0 {
		o.runs = defaultRuns
		if o.quick {
			o.runs = quickRuns
		}
	}
	for name := range strings.SplitSeq(only, ",") {
		if name = strings.TrimSpace(name); name != "" {
			o.only = append(o.only, name)
		}
	}
	return o, nil
}

// choose returns the benches that have rows to measure, with those rows only. Every name
// must mean something.
func choose(all []bench, only []string) ([]bench, error) {
	if len(only) == 0 {
		return all, nil
	}
	used := make(map[string]bool)
	var chosen []bench
	for _, b := range all {
		var rows []row
		for _, r := range b.rows {
			wanted := false
			for _, name := range only {
				if strings.HasPrefix(r.name, name) {
					wanted, used[name] = true, true
				}
			}
			if wanted {
				rows = append(rows, r)
			}
		}
		if len(rows) > 0 {
			b.rows = rows
			chosen = append(chosen, b)
		}
	}
	for _, name := range only {
		if !used[name] {
			return nil, fmt.Errorf("-only %s: no row's name begins so; -list prints them", name)
		}
	}
	return chosen, nil
}

// run measures and reports; it returns the exit status.
func run(ctx context.Context, o options, all []bench, out, errOut io.Writer) int {
	chosen, err := choose(all, o.only)
	if err != nil {
		fmt.Fprintln(errOut, "bench:", err)
		return exitUsage
	}
	if o.list {
		for _, b := range chosen {
			for _, r := range b.rows {
				fmt.Fprintf(out, "%s budget=%s\n    %s\n", r.name, r.budget.text(r.unit), r.how)
			}
		}
		return exitOK
	}
	l, err := newLab(o, errOut)
	if err != nil {
		fmt.Fprintln(errOut, "bench:", err)
		return exitUnmeasured
	}
	defer func() {
		if err := l.close(); err != nil {
			fmt.Fprintln(errOut, "bench:", err)
		}
	}()

	var results []result
	failed := false
	for _, b := range chosen {
		if ctx.Err() != nil {
			break
		}
		began := time.Now()
		got, err := measure(ctx, l, b, o.runs)
		if err != nil {
			failed = true
			fmt.Fprintf(errOut, "bench: %s: not measured: %v\n", b.name, err)
			continue
		}
		results = append(results, got...)
		if !o.json {
			for _, r := range got {
				fmt.Fprintf(out, "%s\n    %s\n", r.line(), r.How)
			}
		}
		l.logf("%s took %v", b.name, time.Since(began).Round(100*time.Millisecond))
	}
	if o.json {
		if err := writeJSON(out, results); err != nil {
			fmt.Fprintln(errOut, "bench:", err)
			failed = true
		}
	}
	if ctx.Err() != nil {
		fmt.Fprintln(errOut, "bench: stopped before the end")
		return exitUnmeasured
	}
	if o.write != "" && !failed {
		if err := writeDocument(ctx, o.write, results, o.runs); err != nil {
			fmt.Fprintln(errOut, "bench:", err)
			failed = true
		}
	}
	switch {
	case failed:
		return exitUnmeasured
	case o.check && anyOver(results):
		return exitOver
	}
	return exitOK
}
