package cli

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

type testHub struct {
	URLs   []string `koanf:"urls"`
	Listen string   `koanf:"listen"`
}

type testListen struct {
	Addr string `koanf:"addr"`
}

// TestDoor stands in for a squashed struct of another package: the decoder reaches
// an embedded struct only when it is exported.
type TestDoor struct {
	Authorization string `koanf:"authorization"`
	AcceptPlain   *bool  `koanf:"accept_plain"`
}

type testSite struct {
	TestDoor `koanf:",squash"`
	Status   int `koanf:"accept_status"`
}

type testConfig struct {
	Name   string              `koanf:"name"`
	Wait   time.Duration       `koanf:"wait"`
	Max    int                 `koanf:"max_body"`
	Strict bool                `koanf:"strict"`
	Hub    testHub             `koanf:"hub"`
	Listen []testListen        `koanf:"listen"`
	Sites  map[string]testSite `koanf:"sites"`
	Secret string              `koanf:"-"`
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadFlagsWinOverEnvironmentOverFile(t *testing.T) {
	file := write(t, `
name: from-file
wait: 2s
max_body: 1
hub: {urls: [nats://a], listen: file:1}
listen: [{addr: ":1"}]
sites:
  store-1: {authorization: none, accept_plain: false, accept_status: 200}
`)
	flags := pflag.NewFlagSet("t", pflag.ContinueOnError)
	flags.String("hub.listen", "", "")
	flags.String("name", "default-of-the-flag", "")
	if err := flags.Parse([]string{"--hub.listen", "flag:1"}); err != nil {
		t.Fatal(err)
	}
	var got testConfig
	err := Load(&got, Source{File: file, Flags: flags,
		Env: []string{"KB_HUB_LISTEN=env:1", "KB_HUB_URLS=nats://b,nats://c", "KB_WAIT=3s", "KB_MAX_BODY=7", "KB_STRICT=true", "PATH=/bin"},
		Set: []string{"sites.store-1.accept_status=202"}})
	if err != nil {
		t.Fatal(err)
	}
	no := false
	want := testConfig{Name: "from-file", Wait: 3 * time.Second, Max: 7, Strict: true,
		Hub:    testHub{URLs: []string{"nats://b", "nats://c"}, Listen: "flag:1"},
		Listen: []testListen{{Addr: ":1"}},
		Sites:  map[string]testSite{"store-1": {TestDoor{"none", &no}, 202}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
}

func TestLoadReportsEveryMistakeAtOnce(t *testing.T) {
	file := write(t, `
nam: x
wait: 2
strict: [1]
hub: {listn: a, password: b}
listen: [{adr: ":1"}]
sites:
  store-1: {authorisation: none}
secret: y
`)
	var c testConfig
	err := Load(&c, Source{File: file, Env: []string{"KB_HUB_LISTN=x", "KB_MAX_BODY=many"}, Set: []string{"hub.what=1", "noequals", "name.first=x"}})
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"nam: no such setting; did you mean name?",
		"hub.listn: no such setting; did you mean listen?",
		"hub.password: no such setting; here may stand: listen, urls",
		"listen[0].adr: no such setting; did you mean addr?",
		"sites.store-1.authorisation: no such setting; did you mean authorization?",
		"secret: no such setting",
		"2 has no unit",
		"strict",
		"KB_HUB_LISTN names no setting",
		`KB_MAX_BODY: "many" is not a whole number`,
		"--set hub.what: no such setting hub.what",
		"--set noequals: write it as path=value",
		"--set name.first: name has nothing below it",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("missing %q in\n%v", want, err)
		}
	}
}

func TestLoadSaysWhatIsWrongWithAFile(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"not YAML":      {"a: [", "not YAML"},
		"a key twice":   {"name: a\nname: b\n", "already defined"},
		"bad duration":  {"wait: soon\n", `"soon" is not a duration`},
		"wrong type":    {"max_body: many\n", "max_body"},
		"list expected": {"listen: here\n", "listen"},
	} {
		t.Run(name, func(t *testing.T) {
			var into testConfig
			err := Load(&into, Source{File: write(t, c.text)})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("%v, want %q", err, c.want)
			}
		})
	}
	var into testConfig
	if err := Load(&into, Source{File: filepath.Join(t.TempDir(), "absent.yaml")}); err == nil {
		t.Fatal("an absent file was no error")
	}
}

func TestSettingsNameEachLeafOnce(t *testing.T) {
	var got []string
	for _, s := range Settings(reflect.TypeFor[testConfig]()) {
		got = append(got, s.Path+" "+s.Env)
	}
	want := []string{"name KB_NAME", "wait KB_WAIT", "max_body KB_MAX_BODY", "strict KB_STRICT", "hub.urls KB_HUB_URLS", "hub.listen KB_HUB_LISTEN",
		"listen[].addr ", "sites.<name>.authorization ", "sites.<name>.accept_plain ", "sites.<name>.accept_status "}
	if d := cmp.Diff(want, got); d != "" {
		t.Fatal(d)
	}
}
