package keysync

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

func TestPortalConfigValidate(t *testing.T) {
	good := PortalConfig{URL: "https://portal.example", TokenFile: "token"}
	issued := PortalConfig{URL: "https://portal.example/v1", TokenURL: "https://pb.example", KeyID: "id", SecretKeyFile: "secret"}
	with := func(c PortalConfig, change func(*PortalConfig)) PortalConfig {
		change(&c)
		return c
	}
	for _, row := range []struct {
		name string
		cfg  PortalConfig
		want []string // each begins one line; none: valid
	}{
		{"token file", good, nil},
		{"issued tokens", issued, nil},
		{"http on loopback", with(good, func(c *PortalConfig) { c.URL = "http://127.0.0.1:8080" }), nil},
		{"http on localhost", with(good, func(c *PortalConfig) { c.URL = "http://localhost:8080" }), nil},
		{"http on IPv6 loopback", with(good, func(c *PortalConfig) { c.URL = "http://[::1]:8080" }), nil},
		{"http elsewhere, insecure", with(good, func(c *PortalConfig) { c.URL, c.Insecure = "http://portal.example", true }), nil},
		{"largest values", with(good, func(c *PortalConfig) { c.Poll, c.Timeout, c.MaxBytes = 24*time.Hour, 5*time.Minute, 64<<20 }), nil},

		{"nothing", PortalConfig{}, []string{"url: required", "token_file: required"}},
		{"http elsewhere", with(good, func(c *PortalConfig) { c.URL = "http://portal.example" }), []string{"url: https is required"}},
		{"http on a name that only looks like loopback", with(good, func(c *PortalConfig) { c.URL = "http://localhost.example" }), []string{"url: https is required"}},
		{"http token endpoint", with(issued, func(c *PortalConfig) { c.TokenURL = "http://pb.example" }), []string{"token_url: https is required"}},
		{"no scheme", with(good, func(c *PortalConfig) { c.URL = "portal.example" }), []string{"url: a whole address"}},
		{"another scheme", with(good, func(c *PortalConfig) { c.URL = "ftp://portal.example" }), []string{`url: scheme "ftp"`}},
		{"password in it", with(good, func(c *PortalConfig) { c.URL = "https://u:hunter2@portal.example" }), []string{"url: a user or password"}},
		{"query in it", with(good, func(c *PortalConfig) { c.URL = "https://portal.example?key=hunter2" }), []string{"url: a query"}},
		{"no URL at all", with(good, func(c *PortalConfig) { c.URL = "https://hunter2 %zz" }), []string{"url: not a URL"}},
		{"both ways", with(issued, func(c *PortalConfig) { c.TokenFile = "token" }), []string{"token_file: excludes"}},
		{"half of the second way", PortalConfig{URL: "https://portal.example", KeyID: "id"}, []string{"secret_key_file: required", "token_url: required"}},
		{"other half", PortalConfig{URL: "https://portal.example", TokenURL: "https://pb.example"}, []string{"key_id: required", "secret_key_file: required"}},
		{"scheme of two words", with(good, func(c *PortalConfig) { c.AuthScheme = "Bearer x" }), []string{"auth_scheme: one word"}},
		{"path with a hole", with(good, func(c *PortalConfig) { c.Path = "security..kitchen" }), []string{"path: "}},
		{"everything at once", PortalConfig{URL: "x", Timeout: -1, MaxBytes: 1, Poll: time.Millisecond, Path: "."},
			[]string{"url: ", "token_file: ", "path: ", "timeout: -1ns is out of range", "max_bytes: 1 is", "poll: 1ms is"}},
	} {
		t.Run(row.name, func(t *testing.T) { wantLines(t, row.cfg.Validate(), row.want) })
	}
}

func wantLines(t *testing.T, err error, want []string) {
	t.Helper()
	if len(want) == 0 {
		if err != nil {
			t.Errorf("%v, want none", err)
		}
		return
	}
	if err == nil {
		t.Fatal("valid")
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != len(want) {
		t.Errorf("%d lines, want %d:\n%v", len(lines), len(want), err)
	}
	for i := range min(len(lines), len(want)) {
		if !strings.HasPrefix(lines[i], want[i]) {
			t.Errorf("line %q, want it to begin with %q", lines[i], want[i])
		}
	}
	if strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error quotes a secret: %v", err)
	}
}

func TestConfigValidateNamesEveryMistake(t *testing.T) {
	err := Config{
		Portal: PortalConfig{URL: "http://portal.example", TokenFile: "t", Poll: 1},
		Sites:  map[string]envelope.Settings{"ok": cheap, "bad": {Profile: "des", KDF: "x"}, "No Name": cheap},
	}.Validate()
	wantLines(t, err, []string{"portal.url: ", "portal.poll: ", "binding_file: required", "sites: ", "sites.bad.profile", "sites.bad.kdf"})
	wantLines(t, Config{Portal: PortalConfig{URL: "https://p.example", TokenFile: "t"}, BindingFile: "b", NoBinding: true}.Validate(),
		[]string{"binding_file: excluded", "sites: at least one"})
}

func TestNewReportsEveryFileThatIsWrong(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cfg := Config{
		Portal:      PortalConfig{URL: "https://p.example", TokenFile: file("token", "tok", 0o644), CAFile: file("ca", "no PEM", 0o644)},
		BindingFile: filepath.Join(dir, "none"), Sites: settingsOf("s1", "s2"),
	}
	_, err := New(cfg)
	if err == nil {
		t.Fatal("made")
	}
	for _, want := range []string{"portal.token_file", "0644", "chmod", "portal.ca_file", "no PEM certificate", "binding_file", "does not exist: on the bridge's machine run `bridge binding mint --file " + cfg.BindingFile + " --site s1,s2`"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}

	cfg.Portal.TokenFile, cfg.Portal.CAFile = file("token2", " \n", 0o600), filepath.Join(dir, "absent")
	if _, err = New(cfg); err == nil || !strings.Contains(err.Error(), "is empty") || !strings.Contains(err.Error(), "absent") {
		t.Errorf("%v, want an empty token file and an absent CA file", err)
	}
	cfg.Portal.TokenFile = file("token3", "two words\n", 0o600)
	cfg.Portal.CAFile = ""
	if _, err = New(cfg); err == nil || !strings.Contains(err.Error(), "something else than one token") {
		t.Errorf("%v, want that the token cannot stand in a header", err)
	}
	cfg.Portal.TokenFile = file("token4", "tok", 0o440)
	cfg.BindingFile = mintedFile(t, "s2")
	cfg.Sites = settingsOf("s1", "s2", "s3")
	if _, err = New(cfg); err == nil || !strings.Contains(err.Error(), "no binding for s1, s3: on the bridge's machine run `bridge binding mint --file "+cfg.BindingFile+" --site s1,s3`") {
		t.Errorf("%v, want every missing site and the command", err)
	}
	cfg.Sites = settingsOf("s2")
	k, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if b := k.Site("s2").Binding; b == nil || b.Site() != "s2" {
		t.Errorf("binding %v", b)
	}
}

func TestNewRegistersItsMetricsOnceOrFails(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	cfg := Config{Portal: PortalConfig{URL: "https://p.example", TokenFile: token}, NoBinding: true, Sites: settingsOf("s1"), Metrics: reg}
	k, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); err == nil {
		t.Error("the same metrics were registered twice")
	}
	m := rig{Keys: k, reg: reg}.metrics(t)
	for _, r := range reasons {
		if v, has := m["kb_keysync_fetch_total "+string(r)]; !has || v != 0 {
			t.Errorf("result %s is not there from the start", r)
		}
	}
	if _, has := m["kb_keysync_keyring_age_seconds"]; !has {
		t.Error("no age")
	}
}
