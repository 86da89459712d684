package kitchenbridge_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestOperationsNamesEveryAlarmAndMetric holds docs/operations.md to the code: what asks a
// person to act, and what dashboards are built on, has a line there.
func TestOperationsNamesEveryAlarmAndMetric(t *testing.T) {
	page, err := os.ReadFile("docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	has := func(s string) bool { return strings.Contains(string(page), "`"+s) }
	alarms, metrics := alarmsAndMetrics(t)
	if len(alarms) < 10 || len(metrics) < 15 {
		t.Fatalf("found %d alarms and %d metrics: the test looks in the wrong place", len(alarms), len(metrics))
	}
	for _, a := range alarms {
		if !has(a + "`") {
			t.Errorf("no line for the Error log %q", a)
		}
	}
	for _, m := range metrics {
		if !has(m+"`") && !has(m+"{") {
			t.Errorf("no line for the metric %s", m)
		}
	}
	for _, m := range regexp.MustCompile("`(kb_[a-z_]+)").FindAllStringSubmatch(string(page), -1) {
		if !slices.Contains(metrics, m[1]) {
			t.Errorf("the page names %s, which no code makes", m[1])
		}
	}
}

// alarmsAndMetrics reads the constant messages of Error logs, and the names of metrics,
// from the source.
func alarmsAndMetrics(t *testing.T) (alarms, metrics []string) {
	t.Helper()
	metricName := regexp.MustCompile(`^(kb_[a-z]+_)?[a-z_]+$`)
	for _, root := range []string{"internal", "pkg", "cmd"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			prefix := "kb_" + file.Name.Name + "_"
			add := func(name string) {
				if metricName.MatchString(name) {
					if !strings.HasPrefix(name, "kb_") {
						name = prefix + name
					}
					metrics = append(metrics, name)
				}
			}
			ast.Inspect(file, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					name := ""
					switch f := n.Fun.(type) {
					case *ast.SelectorExpr:
						name = f.Sel.Name
					case *ast.Ident:
						name = f.Name
					}
					if len(n.Args) == 0 {
						return true
					}
					s, constant := text(n.Args[0])
					switch {
					case name == "Error" && constant:
						alarms = append(alarms, s)
					case constant && (name == "vec" || name == "counter" || name == "gauge" || name == "NewDesc"):
						add(s)
					}
				case *ast.KeyValueExpr:
					if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Name" && strings.Contains(path, "metrics") {
						if s, ok := text(n.Value); ok {
							add(s)
						}
					}
				case *ast.ValueSpec:
					for i, name := range n.Names {
						if strings.HasPrefix(name.Name, "alarm") && i < len(n.Values) {
							if s, ok := text(n.Values[i]); ok {
								alarms = append(alarms, s)
							}
						}
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(alarms)
	slices.Sort(metrics)
	return slices.Compact(alarms), slices.Compact(metrics)
}

func text(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}
