package door_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

func TestValidateReportsEachMistake(t *testing.T) {
	hash := door.TokenSHA256
	token := func(name, sum string) door.TokenConfig { return door.TokenConfig{Name: name, SHA256: sum} }
	good := door.SiteConfig{Tokens: []door.TokenConfig{token("till-1", hash("a"))}}
	everywhere := []door.Listener{{Addr: ":8080"}}

	for _, tc := range []struct {
		name      string
		sites     map[string]door.SiteConfig
		listeners []door.Listener
		want      []string // the beginnings of the lines
	}{
		{name: "tokens, any listener", sites: map[string]door.SiteConfig{"one": good}, listeners: everywhere},
		{name: "the same holder's name at two sites", sites: map[string]door.SiteConfig{
			"one": good, "two": {Tokens: []door.TokenConfig{token("till-1", hash("b"))}}}},
		{name: "none on loopback", sites: map[string]door.SiteConfig{"one": {Authorization: "none"}},
			listeners: []door.Listener{{Addr: "127.0.0.1:8080"}, {Addr: "[::1]:8080"}, {Addr: "localhost:8080", Site: "one"}}},
		{name: "none beyond loopback, allowed", sites: map[string]door.SiteConfig{"one": {Authorization: "none", AllowInsecure: true}}, listeners: everywhere},
		{name: "none, and another site's listener beyond loopback", sites: map[string]door.SiteConfig{"one": good, "two": {Authorization: "none"}},
			listeners: []door.Listener{{Addr: "0.0.0.0:8080", Site: "one"}, {Addr: "127.0.0.1:8081"}}},
		{name: "none beyond loopback, on each such listener", sites: map[string]door.SiteConfig{"one": {Authorization: "none"}},
			listeners: []door.Listener{{Addr: "127.0.0.1:1"}, {Addr: "0.0.0.0:2"}, {Addr: "kitchen.example:3", Site: "one"}},
			want:      []string{"sites.one.authorization: none, but listen[1] (0.0.0.0:2)", "sites.one.authorization: none, but listen[2] (kitchen.example:3)"}},
		{name: "listener of no site", sites: map[string]door.SiteConfig{"one": good}, listeners: []door.Listener{{Addr: ":1", Site: "tow"}},
			want: []string{`listen[0].site: "tow"`}},
		{name: "site's name", sites: map[string]door.SiteConfig{"One.*": good}, want: []string{"sites.One.*: "}},
		{name: "authorization", sites: map[string]door.SiteConfig{"one": {Authorization: "optional"}}, want: []string{`sites.one.authorization: "optional"`}},
		{name: "required, no tokens", sites: map[string]door.SiteConfig{"one": {}}, want: []string{"sites.one.tokens: empty"}},
		{name: "none, with tokens", sites: map[string]door.SiteConfig{"one": {Authorization: "none", Tokens: good.Tokens}}, want: []string{"sites.one.tokens: of no use"}},
		{name: "token's name", sites: map[string]door.SiteConfig{"one": {Tokens: []door.TokenConfig{token("", hash("a")), token("Till 1", hash("b"))}}},
			want: []string{"sites.one.tokens[0].name: ", "sites.one.tokens[1].name: "}},
		{name: "token's name twice", sites: map[string]door.SiteConfig{"one": {Tokens: []door.TokenConfig{token("till-1", hash("a")), token("till-1", hash("b"))}}},
			want: []string{`sites.one.tokens[1].name: "till-1" stands twice`}},
		{name: "token's hash", sites: map[string]door.SiteConfig{"one": {Tokens: []door.TokenConfig{
			token("a", ""), token("b", "my-token"), token("c", hash("x")[1:]), token("d", strings.Repeat("zz", 32)), token("e", hash(""))}}},
			want: []string{"sites.one.tokens[0].sha256: required", "sites.one.tokens[1].sha256: 8 characters", "sites.one.tokens[2].sha256: 63 characters",
				"sites.one.tokens[3].sha256: 64 characters", "sites.one.tokens[4].sha256: this is the hash of the empty text"}},
		{name: "one token for two sites, in another case too", sites: map[string]door.SiteConfig{
			"one": good, "two": {Tokens: []door.TokenConfig{token("till-2", strings.ToUpper(hash("a")))}}},
			want: []string{"sites.two.tokens[0].sha256: the same token as sites.one.tokens[0]"}},
		{name: "one token for two holders", sites: map[string]door.SiteConfig{"one": {Tokens: []door.TokenConfig{token("till-1", hash("a")), token("till-2", hash("a"))}}},
			want: []string{"sites.one.tokens[1].sha256: the same token as sites.one.tokens[0]"}},
		{name: "all at once", sites: map[string]door.SiteConfig{"one": {}, "two": {Authorization: "none"}, "three": {Authorization: "maybe"}},
			listeners: []door.Listener{{Addr: ":1", Site: "four"}, {Addr: ":2"}},
			want:      []string{`sites.one.tokens`, `sites.three.authorization`, `listen[0].site`, `sites.two.authorization: none, but listen[1]`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var lines []string
			if err := door.Validate(tc.sites, tc.listeners); err != nil {
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

func TestValidateNeverPrintsWhatMayBeAToken(t *testing.T) {
	const mistaken = "pasted-the-token-itself"
	err := door.Validate(map[string]door.SiteConfig{"one": {Tokens: []door.TokenConfig{{Name: "till-1", SHA256: mistaken}}}}, nil)
	if err == nil {
		t.Fatal("accepted a token in place of its hash")
	}
	if strings.Contains(err.Error(), mistaken) {
		t.Errorf("the error repeats the token: %v", err)
	}
}

func TestNewRefusesMistakes(t *testing.T) {
	_, err := door.New(map[string]door.SiteConfig{"one": {}, "two": {Authorization: "maybe"}}, nil)
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"sites.one.tokens", "sites.two.authorization", "Keys is required"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is missing from:\n%v", want, err)
		}
	}
}

func TestLoopback(t *testing.T) {
	got := make(map[string]bool)
	want := map[string]bool{
		"127.0.0.1:80": true, "127.8.9.1:80": true, "[::1]:80": true, "localhost:80": true, "[::ffff:127.0.0.1]:80": true, "::1": true, "[::1]": true, "127.0.0.1": true,
		":80": false, "": false, "0.0.0.0:80": false, "[::]:80": false, "10.0.0.1:80": false, "kitchen.example:80": false, "localhost.example:80": false,
	}
	for addr := range want {
		got[addr] = door.Loopback(addr)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
