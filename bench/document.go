package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// writeDocument writes docs/perf.md.
func writeDocument(ctx context.Context, path string, results []result, runs int) error {
	return os.WriteFile(path, document(results, setting{
		processor: cmp.Or(processor(), runtime.GOARCH), cores: runtime.NumCPU(), system: runtime.GOOS + "/" + runtime.GOARCH,
		goVersion: runtime.Version(), commit: commit(ctx), date: time.Now().UTC().Format(time.DateOnly), runs: runs,
	}), 0o644)
}

// setting is where and when a table was made.
type setting struct {
	processor, system, goVersion, commit, date string
	cores, runs                                int
}

// commit is HEAD, and whether the working tree differs from it.
func commit(ctx context.Context) string {
	head, err := exec.CommandContext(ctx, "git", "rev-parse", "--short=12", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	id := strings.TrimSpace(string(head))
	if changed, err := exec.CommandContext(ctx, "git", "--no-optional-locks", "status", "--porcelain", "--", "*.go", "go.mod").Output(); err != nil || len(bytes.TrimSpace(changed)) > 0 {
		id += " and uncommitted changes"
	}
	return id
}

func document(results []result, s setting) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `# Performance

Written by `+"`go run ./bench -write docs/perf.md`"+` (`+"`make bench`"+`); do not edit by hand.

| | |
| --- | --- |
| machine | %s, %d cores, %s |
| Go | %s |
| commit | %s |
| date | %s |
| turns | %d of product and floor each, in turn |

`, s.processor, s.cores, s.system, s.goVersion, s.commit, s.date, s.runs)
	b.WriteString("| row | value | floor | ratio | lowest to highest | budget | |\n| --- | ---: | ---: | ---: | --- | --- | --- |\n")
	over := 0
	for _, r := range results {
		verdict := r.Verdict
		if verdict == verdictOver {
			verdict = "**over**"
			over++
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s | %s | %s |\n", r.Name, r.Unit.text(r.Value), r.Unit.text(float64(r.Floor)),
			r.Ratio.text(), r.spread(), strings.NewReplacer("<=", "≤ ", ">=", "≥ ").Replace(r.Budget), verdict)
	}
	fmt.Fprintf(&b, "\n%d of %d rows are over their budget.\n", over, len(results))
	b.WriteString(`
## How to read it

A **floor** is a minimal program that does only the work nobody can avoid; its source, in
` + "`bench/floor`" + `, says what that is, how it is done, and what would make it faster. Product and
floor take turns on the same machine under the same load, and **ratio** is the median of
the ratios of the turns: whatever else the machine did met both. Value and floor are
medians of their own, so their quotient need not be the ratio. The third column of ratios
says how far the turns were apart: where that is more than the distance to the budget,
the verdict is a matter of luck, and the row wants a quieter machine. Where nothing is
compared, it shows the values.

CPU is the kernel's account of the one process, read before and after a turn. Hub,
Kitchens and load are processes of their own and cost nothing here. Every turn counts what arrived
and opens a sample of it; a turn that lost something is a failure to measure, not a fast
turn.

`)
	for _, r := range results {
		fmt.Fprintf(&b, "- `%s`: %s.\n", r.Name, r.How)
	}
	return b.Bytes()
}
