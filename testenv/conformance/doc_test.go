package conformance

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestTableNamesEveryTestAndCodeThatExists(t *testing.T) {
	doc, err := parser.ParseFile(token.NewFileSet(), "doc.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	exists := map[string]map[string]bool{}
	listed := map[string]bool{}
	for line := range strings.Lines(doc.Doc.Text()) {
		row := strings.Split(strings.TrimSpace(line), " | ")
		if len(row) == 1 || row[0] == "behaviour" {
			continue
		}
		if len(row) != 3 || listed[row[2]] {
			t.Errorf("not a row, or one of a test that has one: %s", line)
			continue
		}
		listed[row[2]] = true
		code, _, _ := strings.Cut(row[1], "planned:")
		for name := range strings.SplitSeq(code, ", ") {
			if name == "" {
				continue
			}
			pkg, identifier, _ := strings.Cut(name, ".")
			if exists[pkg] == nil {
				exists[pkg] = declared(t, filepath.Join("..", "..", "internal", pkg, "*.go"), false)
			}
			if !exists[pkg][identifier] {
				t.Errorf("%s relies on %s, which is not declared", row[2], name)
			}
		}
	}
	tests := declared(t, "*.go", true)
	delete(tests, "TestMain")
	delete(tests, t.Name())
	for test := range tests {
		if strings.HasPrefix(test, "Test") && !listed[test] {
			t.Errorf("%s has no row", test)
		}
	}
	for test := range listed {
		if !tests[test] {
			t.Errorf("%s has a row and is not declared", test)
		}
	}
}

// declared returns the names of what files declare at top level, methods among them.
func declared(t *testing.T, files string, tests bool) map[string]bool {
	t.Helper()
	paths, err := filepath.Glob(files)
	if err != nil {
		t.Fatal(err)
	}
	paths = slices.DeleteFunc(paths, func(p string) bool { return strings.HasSuffix(p, "_test.go") != tests })
	if len(paths) == 0 {
		t.Fatalf("no files are %s", files)
	}
	names := map[string]bool{}
	for _, path := range paths {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				names[d.Name.Name] = true
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						names[spec.Name.Name] = true
					case *ast.ValueSpec:
						for _, n := range spec.Names {
							names[n.Name] = true
						}
					}
				}
			}
		}
	}
	return names
}
