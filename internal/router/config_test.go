package router

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	credential := write("credential", "Bearer abc\n")
	empty := write("empty", " \n")
	two := write("two", "Bearer abc\nBearer def\n")
	noPEM := write("ca.pem", "certificate")
	site := func(change func(*KitchenConfig)) Config {
		k := KitchenConfig{URL: "https://kitchen.example/api"}
		change(&k)
		return Config{Sites: map[string]KitchenConfig{"s1": k}}
	}
	url := func(u string) Config { return site(func(k *KitchenConfig) { k.URL = u }) }
	header := func(name, value string) Config {
		return site(func(k *KitchenConfig) { k.Headers = map[string]string{name: value} })
	}

	tests := []struct {
		name string
		c    Config
		want []string // beginnings of the lines; none: valid
	}{
		{"nothing set is the default", Config{}, nil},
		{"a site with a url only", site(func(*KitchenConfig) {}), nil},
		{"everything of a site", site(func(k *KitchenConfig) {
			k.Endpoint, k.AuthorizationFile, k.Headers, k.Timeout = "main", credential, map[string]string{"X-Store": "12"}, time.Second
		}), nil},
		{"http on loopback", url("http://127.0.0.1:8080"), nil},
		{"http on loopback, IPv6", url("http://[::1]:8080/x/"), nil},
		{"http on localhost", url("http://localhost"), nil},
		{"http beyond loopback", url("http://kitchen.example"), []string{"sites.s1.url: http beyond loopback"}},
		{"http beyond loopback when allowed", site(func(k *KitchenConfig) { k.URL, k.AllowInsecure = "http://10.1.2.3", true }), nil},
		{"no url", url(""), []string{"sites.s1.url: required"}},
		{"url without a scheme", url("kitchen.example"), []string{"sites.s1.url: neither http nor https"}},
		{"url without a host", url("https:///x"), []string{"sites.s1.url: it names no host"}},
		{"url that is none", url("https://a b"), []string{"sites.s1.url: not a URL"}},
		{"url with a user", url("https://u:hunter2@kitchen.example"), []string{"sites.s1.url: it holds a user"}},
		{"url with a query", url("https://kitchen.example?key=hunter2"), []string{"sites.s1.url: it holds a query"}},
		{"url with a fragment", url("https://kitchen.example#x"), []string{"sites.s1.url: it holds a query or fragment"}},
		{"a name of a site that escapes", Config{Sites: map[string]KitchenConfig{"S.*": {URL: "https://k.example"}}}, []string{"sites.S.*: "}},
		{"a name of an endpoint that escapes", site(func(k *KitchenConfig) { k.Endpoint = "a:b" }), []string{"sites.s1.endpoint: "}},
		{"a credential that is not there", site(func(k *KitchenConfig) { k.AuthorizationFile = filepath.Join(dir, "none") }), []string{"sites.s1.authorization_file: open "}},
		{"an empty credential", site(func(k *KitchenConfig) { k.AuthorizationFile = empty }), []string{"sites.s1.authorization_file: " + empty}},
		{"two lines of credential", site(func(k *KitchenConfig) { k.AuthorizationFile = two }), []string{"sites.s1.authorization_file: " + two}},
		{"a ca_file without certificates", site(func(k *KitchenConfig) { k.CAFile = noPEM }), []string{"sites.s1.ca_file: " + noPEM}},
		{"a ca_file under http", site(func(k *KitchenConfig) { k.URL, k.CAFile = "http://localhost", noPEM }), []string{"sites.s1.ca_file: it checks nothing", "sites.s1.ca_file: " + noPEM}},
		{"a negative timeout", site(func(k *KitchenConfig) { k.Timeout = -1 }), []string{"sites.s1.timeout: "}},
		{"Authorization as a header", header("authorization", "x"), []string{"sites.s1.headers.authorization: the bridge or HTTP itself sets this header; its value belongs into authorization_file"}},
		{"the protocol's headers", header("Kb-Seq", "1"), []string{"sites.s1.headers.Kb-Seq: "}},
		{"the seed's headers", header("sec-iv", "1"), []string{"sites.s1.headers.sec-iv: "}},
		{"HTTP's headers", header("Host", "x"), []string{"sites.s1.headers.Host: "}},
		{"the other name of the key that lets a transport repeat", header("X-Idempotency-Key", "x"), []string{"sites.s1.headers.X-Idempotency-Key: "}},
		{"a header that is no name", header("a b", "x"), []string{"sites.s1.headers.a b: not the name"}},
		{"a header that smuggles another", header("X-A", "1\r\nX-B: 2"), []string{"sites.s1.headers.X-A: the value holds control characters"}},
		{"negative durations", Config{AttemptTimeout: -1, Settle: -1, BackoffMin: -1, BackoffMax: -1, RetryAfterMax: -1, DrainTimeout: -1}, []string{
			"attempt_timeout: ", "settle: ", "backoff_min: ", "backoff_max: ", "retry_after_max: ", "drain_timeout: "}},
		{"back-off the wrong way round", Config{BackoffMin: time.Minute}, []string{"backoff_min: 1m0s is longer than backoff_max, 10s"}},
		{"too much of an answer", Config{MaxAnswer: 1 << 20}, []string{"max_answer: 1048576 bytes"}},
		{"a kind that lives no time", Config{MaxDeadline: map[string]time.Duration{"order": 0}}, []string{"max_deadline.order: "}},
		{"a kind that is none", Config{MaxDeadline: map[string]time.Duration{"a.b": 1}}, []string{"max_deadline.a.b: "}},
		{"everything wrong at once", Config{Settle: -1, Sites: map[string]KitchenConfig{"a": {}, "b": {URL: "ftp://x", Timeout: -1}}}, []string{
			"settle: ", "sites.a.url: ", "sites.b.url: ", "sites.b.timeout: "}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := lines(tt.c.Validate())
			if len(got) != len(tt.want) {
				t.Fatalf("mistakes:\n%v\nwant %d", got, len(tt.want))
			}
			for i, err := range got {
				if !strings.HasPrefix(err.Error(), tt.want[i]) {
					t.Errorf("%q does not begin with %q", err, tt.want[i])
				}
				if strings.Contains(err.Error(), "hunter2") {
					t.Errorf("%q shows a secret", err)
				}
			}
		})
	}
}

// Every field of the settings has its name in the file, and every one in the file a
// spelling that people can guess.
func TestSettingsHaveNames(t *testing.T) {
	for _, c := range []any{Config{}, KitchenConfig{}} {
		typ := reflect.TypeOf(c)
		for f := range typ.Fields() {
			tag := f.Tag.Get("koanf")
			if tag == "" || tag != strings.ToLower(tag) {
				t.Errorf("%s.%s has koanf tag %q", typ.Name(), f.Name, tag)
			}
		}
	}
}

func TestNewRefuses(t *testing.T) {
	keys := testKeys(t, "s1", "s2")
	keys.change("s2", func(s *keysync.Site) { s.Binding = nil })
	k := KitchenConfig{URL: "https://kitchen.example"}
	_, err := New(Config{Settle: -1, Sites: map[string]KitchenConfig{"s1": k, "s2": k, "s3": k}}, newHubLog().connect(), keys)
	want := []string{"settle: ", "sites.s2: the binding file does not have it", "sites.s3: its keys are not configured"}
	got := lines(err)
	if len(got) != len(want) {
		t.Fatalf("mistakes:\n%v\nwant %d", err, len(want))
	}
	for i := range want {
		if !strings.HasPrefix(got[i].Error(), want[i]) {
			t.Errorf("%q does not begin with %q", got[i], want[i])
		}
	}
	reg := prometheus.NewRegistry()
	for i := range 2 {
		_, err := New(Config{Metrics: reg}, newHubLog().connect(), keys)
		if (err != nil) != (i == 1) {
			t.Errorf("New %d on one registry: %v", i+1, err)
		}
	}
}
