package kitchenbridge_test

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kitchenbridge/kitchenbridge/"

// rules say which packages may import what, and why. `of` and `not` are prefixes of
// import paths, without the module's own name where they are ours.
var rules = []struct {
	of     string
	not    []string
	except []string
	why    string
}{
	{of: "pkg/envelope", not: []string{"pkg/", "internal/", "cmd/", "testenv", "bench", "golang.org/x/", "github.com/"},
		why: "the envelope is for vendors on either end: the standard library and nothing else"},
	{of: "pkg/keysync", not: []string{"internal/", "cmd/", "testenv", "bench", "github.com/nats-io/"},
		why: "a POS or Kitchen vendor uses it without NATS and without the bridge"},
	{of: "internal/broker", not: []string{"pkg/keysync", "internal/", "cmd/", "testenv", "bench"},
		why: "the broker carries envelopes and knows neither their keys' origin nor who uses it"},
	{of: "internal/door", not: []string{"internal/", "cmd/", "testenv", "bench", "github.com/nats-io/"},
		why: "who may come in does not depend on what happens then"},
	{of: "internal/router", not: []string{"internal/edge", "internal/bridge", "internal/wsgate", "internal/console", "internal/cli", "internal/door", "cmd/", "testenv", "bench"},
		why: "imports go down, never sideways: HTTP endpoints and screens fail apart"},
	{of: "internal/wsgate", not: []string{"internal/edge", "internal/bridge", "internal/router", "internal/console", "internal/cli", "cmd/", "testenv", "bench"},
		why: "imports go down, never sideways: HTTP endpoints and screens fail apart"},
	{of: "internal/edge", not: []string{"internal/bridge", "internal/router", "internal/wsgate", "internal/console", "internal/cli", "cmd/", "testenv", "bench"},
		why: "the edge runs in a store without the bridge's code"},
	{of: "internal/bridge", not: []string{"internal/edge", "internal/cli", "cmd/", "testenv", "bench"},
		why: "the bridge and the edge meet on the wire only"},
	{of: "internal/cli", not: []string{"pkg/", "internal/", "cmd/", "testenv", "bench", "github.com/nats-io/"},
		why: "command lines know settings, not what they mean"},
	{of: "cmd/", not: []string{"testenv", "bench", "github.com/nats-io/"},
		why: "a program ships no test code, and the broker's client stays behind internal/broker"},
	{of: "testenv/vendorcrypto", not: []string{"pkg/", "internal/", "cmd/"},
		why: "the stub's code path must be able to disagree with the product's"},
	{of: "testenv/kitchen", not: []string{"pkg/", "internal/", "cmd/"},
		why: "the stub's code path must be able to disagree with the product's"},
	{of: "testenv/pos", not: []string{"pkg/", "internal/", "cmd/"},
		why: "the stub's code path must be able to disagree with the product's"},
	{of: "", not: []string{"github.com/nats-io/"}, except: []string{"internal/broker", "deploy/nats", "testenv/cluster", "testenv/conformance", "testenv/faults", "bench"},
		why: "everything NATS is behind internal/broker; what judges it from outside has its own eyes"},
}

func TestImportsGoDownNeverSideways(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	packages := 0
	used := make([]bool, len(rules))
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		packages++
		path := strings.TrimPrefix(p.ImportPath, module)
		for i, r := range rules {
			if !strings.HasPrefix(path, r.of) || slices.ContainsFunc(r.except, func(e string) bool { return strings.HasPrefix(path, e) }) {
				continue
			}
			used[i] = true
			for _, imp := range p.Imports {
				imp = strings.TrimPrefix(imp, module)
				// A package's own sub-packages belong to it.
				if r.of != "" && strings.HasPrefix(imp, strings.TrimSuffix(r.of, "/")+"/") {
					continue
				}
				for _, bad := range r.not {
					if strings.HasPrefix(imp, bad) {
						t.Errorf("%s imports %s: %s", path, imp, r.why)
					}
				}
			}
		}
	}
	if packages < 10 {
		t.Fatalf("only %d packages found: the test looks in the wrong place", packages)
	}
	for i, r := range rules {
		if !used[i] {
			t.Errorf("the rule for %q meets no package: the package moved, so must the rule", r.of)
		}
	}
}
