package edge

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/cli"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

func TestValidateNamesEachMistake(t *testing.T) {
	site := func(change func(*SiteConfig)) func(*Config) {
		return func(c *Config) {
			s := c.Sites["gcm"]
			change(&s)
			c.Sites["gcm"] = s
		}
	}
	pointer := func(s string) *string { return &s }
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   []string // the beginnings of the lines
	}{
		{name: "valid", change: func(*Config) {}},
		{name: "no name", change: func(c *Config) { c.Name = "" }, want: []string{"name: "}},
		{name: "a name that escapes", change: func(c *Config) { c.Name = "store.*" }, want: []string{"name: "}},
		{name: "address without port", change: func(c *Config) { c.Listen = []ListenConfig{{Addr: "127.0.0.1"}} }, want: []string{"listen[0].addr: "}},
		{name: "address twice", change: func(c *Config) {
			c.Listen = []ListenConfig{{Addr: "127.0.0.1:80"}, {Addr: "127.0.0.1:80", Site: "gcm"}}
		}, want: []string{"listen[1].addr: 127.0.0.1:80 is listen[0]"}},
		{name: "certificate without key", change: func(c *Config) { c.Listen = []ListenConfig{{Addr: "127.0.0.1:80", TLS: TLSConfig{CertFile: "c"}}} }, want: []string{"listen[0].tls.key_file: "}},
		{name: "key without certificate", change: func(c *Config) { c.Listen = []ListenConfig{{Addr: "127.0.0.1:80", TLS: TLSConfig{KeyFile: "k"}}} }, want: []string{"listen[0].tls.cert_file: "}},
		{name: "listener of no site", change: func(c *Config) { c.Listen = []ListenConfig{{Addr: "127.0.0.1:80", Site: "gmc"}} }, want: []string{"listen[0].site: "}},
		{name: "no authorization beyond loopback", change: func(c *Config) { c.Listen = []ListenConfig{{Addr: ":80"}} }, want: []string{"sites.ctr.authorization: none, but listen[0]"}},
		{name: "no admin address", change: func(c *Config) { c.Admin.Listen = "off" }},
		{name: "admin address", change: func(c *Config) { c.Admin.Listen = "9641" }, want: []string{"admin.listen: "}},
		{name: "no hub", change: func(c *Config) { c.Hub.URLs = nil }, want: []string{"hub.urls: required"}},
		{name: "an embedded hub", change: func(c *Config) { c.Hub = broker.HubConfig{Listen: ":4222", Sync: "always"} }, want: []string{"hub.urls: required", "hub: listen, users and sync"}},
		{name: "the hub's own mistakes", change: func(c *Config) { c.Hub.User = "x" }, want: []string{"hub."}},
		{name: "the Portal's own mistakes", change: func(c *Config) { c.Portal.URL = "" }, want: []string{"portal.url: "}},
		{name: "no binding file", change: func(c *Config) { c.BindingFile = "" }, want: []string{"binding_file: "}},
		{name: "no sites", change: func(c *Config) { c.Sites = nil }, want: []string{"sites: at least one"}},
		{name: "no cipher, no fleet default", change: func(c *Config) {
			c.Cipher = envelope.Settings{}
			c.Sites = map[string]SiteConfig{"gcm": c.Sites["gcm"]}
		}, want: []string{"cipher.profile: "}},
		{name: "a cipher of its own is not filled up", change: site(func(s *SiteConfig) { s.Cipher.Iterations = 1000 }), want: []string{"sites.gcm.cipher.profile: "}},
		{name: "the door's own mistakes", change: site(func(s *SiteConfig) { s.Tokens = nil }), want: []string{"sites.gcm.tokens: "}},
		{name: "status", change: site(func(s *SiteConfig) { s.AcceptStatus = 201 }), want: []string{"sites.gcm.accept_status: 201"}},
		{name: "body", change: site(func(s *SiteConfig) { s.Body = "json" }), want: []string{`sites.gcm.body: "json"`}},
		{name: "the site's pointer", change: site(func(s *SiteConfig) { s.OrderID = pointer("_id") }), want: []string{"sites.gcm.order_id: "}},
		{name: "no pointer is fine", change: site(func(s *SiteConfig) { s.OrderID = pointer("") })},
		{name: "the kind's pointer", change: func(c *Config) { c.Kinds["order"] = KindConfig{OrderID: pointer("/a~")} }, want: []string{"kinds.order.order_id: "}},
		{name: "the kind's deadline", change: func(c *Config) { c.Kinds["alert"] = KindConfig{Deadline: 73 * time.Hour} }, want: []string{"kinds.alert.deadline: 73h"}},
		{name: "the kind's name", change: func(c *Config) { c.Kinds["Order"] = KindConfig{} }, want: []string{"kinds: "}},
		{name: "reserved kinds", change: func(c *Config) {
			c.Kinds["expired"], c.Kinds["report"], c.Kinds["messages"] = KindConfig{}, KindConfig{}, KindConfig{}
		},
			want: []string{"kinds.expired: ", "kinds.messages: ", "kinds.report: "}},
		{name: "the largest body", change: func(c *Config) { c.MaxBody = 193520 }},
		{name: "a body that no event holds", change: func(c *Config) { c.MaxBody = 193521 }, want: []string{"max_body: 193521 is out of range: 1024 to 193520"}},
		{name: "a body that hex does not hold", change: func(c *Config) {
			c.Cipher.MessageEncoding = envelope.Hex
			c.MaxBody = 129009
		}, want: []string{"max_body: 129009 is out of range: 1024 to 129008"}},
		{name: "the default body fits under hex", change: func(c *Config) { c.Cipher.MessageEncoding, c.MaxBody = envelope.Hex, 0 }},
		{name: "a wait above the longest", change: func(c *Config) { c.Wait, c.MaxWait = time.Minute, 30*time.Second }, want: []string{"wait: 1m0s"}},
		{name: "negative numbers", change: func(c *Config) {
			c.MaxBody, c.Wait, c.MaxWait, c.CommitWait, c.MaxRequests, c.MaxSiteRequests, c.MaxWaiting, c.Messages, c.AnswerBytes, c.Shutdown = -1, -1, -1, -1, -1, -1, -1, -1, -1, -1
		}, want: []string{"max_body: ", "max_wait: ", "commit_wait: ", "max_requests: ", "max_site_requests: ", "max_waiting: ", "messages: ", "answer_bytes: ", "shutdown: "}},
		{name: "one site's share above the whole", change: func(c *Config) { c.MaxRequests, c.MaxSiteRequests = 10, 11 }, want: []string{"max_site_requests: 11"}},
		{name: "all at once", change: func(c *Config) { c.Name, c.Hub.URLs, c.BindingFile, c.MaxBody = "", nil, "", 1 }, want: []string{"name: ", "hub.urls: ", "binding_file: ", "max_body: "}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := testConfig()
			tc.change(&c)
			var lines []string
			if err := c.Validate(); err != nil {
				lines = strings.Split(err.Error(), "\n")
			}
			if len(lines) != len(tc.want) {
				t.Fatalf("%d mistakes, want %d:\n%s", len(lines), len(tc.want), strings.Join(lines, "\n"))
			}
			for i, want := range tc.want {
				if !strings.HasPrefix(lines[i], want) {
					t.Errorf("mistake %d: %q, want it to begin with %q", i, lines[i], want)
				}
			}
		})
	}
}

func TestZeroValuesAreTheDocumentedDefaults(t *testing.T) {
	got := Config{Sites: map[string]SiteConfig{"one": {}}, Cipher: profile(envelope.A256GCM)}.withDefaults()
	id := "/_id"
	want := Config{
		Listen:  []ListenConfig{{Addr: "127.0.0.1:8080"}},
		Admin:   AdminConfig{Listen: "127.0.0.1:9641"},
		Cipher:  profile(envelope.A256GCM),
		Sites:   map[string]SiteConfig{"one": {Cipher: profile(envelope.A256GCM), AcceptStatus: 202, Body: "text"}},
		Kinds:   map[string]KindConfig{"order": {Deadline: 10 * time.Minute, OrderID: &id}, "alert": {Deadline: 2 * time.Minute, OrderID: &id}},
		MaxBody: 122880, Wait: 2 * time.Second, MaxWait: 30 * time.Second, CommitWait: 5 * time.Second,
		MaxRequests: 1024, MaxSiteRequests: 128, MaxWaiting: 16384, Messages: 100000, AnswerBytes: 67108864, Shutdown: 10 * time.Second,
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Config{}, "Log", "Metrics", "Listening")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// The defaults are not written into what was given.
	c := Config{Kinds: map[string]KindConfig{"receipt": {}}, Sites: map[string]SiteConfig{"one": {}}}
	c.withDefaults()
	if len(c.Kinds) != 1 || c.Kinds["receipt"].Deadline != 0 || c.Sites["one"].AcceptStatus != 0 {
		t.Errorf("changed: %+v", c)
	}
}

// The Config is the reference of the file, so a file that uses every setting of it loads.
func TestConfigLoadsFromAFile(t *testing.T) {
	const file = `
name: store-7
listen:
  - {addr: "127.0.0.1:8080"}
  - {addr: "0.0.0.0:8443", site: gcm, tls: {cert_file: cert.pem, key_file: key.pem}}
admin: {listen: "127.0.0.1:9700"}
hub: {urls: ["tls://hub.example:4222"], user: store-7, password_file: hub.password}
portal: {url: "https://portal.example", token_file: token, poll: 30s}
binding_file: binding.json
cipher: {profile: a256gcm}
sites:
  gcm:
    tokens: [{name: till-1, sha256: "` + "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef" + `"}]
    accept_status: 200
    body: json-string
    order_id: ""
  ctr:
    cipher: {profile: a256ctr, hash: sha1, iterations: 1000, salt: salt, iv_encoding: hex, message_encoding: hex}
    authorization: none
    allow_insecure: true
    accept_plain: false
kinds:
  alert: {deadline: 1m}
  receipt: {deadline: 1h, order_id: /order/id}
max_body: 65536
wait: 1s
max_wait: 10s
commit_wait: 3s
max_requests: 100
max_site_requests: 50
max_waiting: 1000
messages: 5000
answer_bytes: 1048576
shutdown: 5s
`
	path := filepath.Join(t.TempDir(), "edge.yaml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	var got Config
	if err := cli.Load(&got, cli.Source{File: path}); err != nil {
		t.Fatal(err)
	}
	no, off, orderID := false, "", "/order/id"
	want := Config{
		Name:   "store-7",
		Listen: []ListenConfig{{Addr: "127.0.0.1:8080"}, {Addr: "0.0.0.0:8443", Site: "gcm", TLS: TLSConfig{CertFile: "cert.pem", KeyFile: "key.pem"}}},
		Admin:  AdminConfig{Listen: "127.0.0.1:9700"},
		Hub:    broker.HubConfig{URLs: []string{"tls://hub.example:4222"}, User: "store-7", PasswordFile: "hub.password"},
		Portal: got.Portal, BindingFile: "binding.json", Cipher: profile(envelope.A256GCM),
		Sites: map[string]SiteConfig{
			"gcm": {AcceptStatus: 200, Body: "json-string", OrderID: &off, SiteConfig: door.SiteConfig{
				Tokens: []door.TokenConfig{{Name: "till-1", SHA256: strings.Repeat("0123456789abcdef", 4)}}}},
			"ctr": {Cipher: envelope.Settings{Profile: envelope.A256CTR, Hash: "sha1", Iterations: 1000, Salt: "salt", IVEncoding: envelope.Hex, MessageEncoding: envelope.Hex},
				SiteConfig: door.SiteConfig{Authorization: "none", AllowInsecure: true, AcceptPlain: &no}},
		},
		Kinds:   map[string]KindConfig{"alert": {Deadline: time.Minute}, "receipt": {Deadline: time.Hour, OrderID: &orderID}},
		MaxBody: 65536, Wait: time.Second, MaxWait: 10 * time.Second, CommitWait: 3 * time.Second,
		MaxRequests: 100, MaxSiteRequests: 50, MaxWaiting: 1000, Messages: 5000, AnswerBytes: 1 << 20, Shutdown: 5 * time.Second,
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Config{}, "Log", "Metrics", "Listening")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got.Portal.Poll != 30*time.Second {
		t.Errorf("portal.poll %v", got.Portal.Poll)
	}
	if err := got.Validate(); err != nil {
		t.Errorf("not valid:\n%v", err)
	}
	// Every setting of the edge's own stands in the file above.
	for f := range reflect.TypeFor[Config]().Fields() {
		name := f.Tag.Get("koanf")
		if name == "" {
			t.Errorf("field %s has no koanf tag", f.Name)
		}
		if name != "-" && !slices.ContainsFunc(strings.Split(file, "\n"), func(l string) bool { return strings.HasPrefix(l, name+":") }) {
			t.Errorf("setting %s does not stand in the file", name)
		}
	}
}
