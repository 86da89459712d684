package wsgate

import (
	"strings"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

func TestValidateReportsEachMistake(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   []string // the beginnings of the lines
	}{
		{name: "what the tests run with", change: func(*Config) {}},
		{name: "origins of every form", change: func(c *Config) {
			c.Origins = []string{"ionic", "null", "https://a.example", "http://10.0.0.1:8080", "capacitor://localhost", "https://[::1]:8443"}
		}},
		{name: "two ports chosen by the system", change: func(c *Config) { c.Listen = append(c.Listen, c.Listen[0]) }},
		{name: "nothing", change: func(c *Config) { *c = Config{} }, want: []string{"listen: required", "sites: none has screens"}},
		{name: "addresses", change: func(c *Config) {
			c.Listen = []ListenConfig{{Addr: "127.0.0.1"}, {Addr: ""}, {Addr: "127.0.0.1:1"}, {Addr: "127.0.0.1:1", Site: "one"}}
		}, want: []string{"listen[0].addr", "listen[1].addr", "listen[3].addr: 127.0.0.1:1 is listen[2]'s already"}},
		{name: "half of tls", change: func(c *Config) { c.Listen[0].TLS.CertFile = "gate.pem" }, want: []string{"listen[0].tls: "}},
		{name: "the door's own", change: func(c *Config) {
			c.Listen[0].Addr, c.Listen[0].Site = "0.0.0.0:1", "six"
			c.Sites["seven"] = SiteConfig{}
			c.Sites["eight"] = SiteConfig{SiteConfig: door.SiteConfig{Authorization: "none"}}
			c.Listen = append(c.Listen, ListenConfig{Addr: ":2"})
		}, want: []string{"sites.seven.tokens: ", "listen[0].site: ", "sites.eight.authorization: none, but listen[1]"}},
		{name: "origins that no client sends", change: func(c *Config) {
			c.Origins = []string{"", "*", "https://*.example", "https://a.example/", "https://", "https://a.example, https://b.example"}
			c.Sites["two"] = SiteConfig{SiteConfig: c.Sites["two"].SiteConfig, Origins: []string{"https://a.example/screens"}}
		}, want: []string{"origins[0]", "origins[1]", "origins[2]", "origins[3]", "origins[4]", "origins[5]", "sites.two.origins[0]"}},
		{name: "negative values", change: func(c *Config) {
			c.Heartbeat, c.Stale, c.StaleClose, c.WriteTimeout, c.HandshakeTimeout, c.Drain = -1, -1, -1, -1, -1, -1
			c.QueueFrames, c.QueueBytes, c.MaxConnections = -1, -1, -1
		}, want: []string{"heartbeat", "stale", "stale_close", "write_timeout", "handshake_timeout", "drain", "queue_frames", "queue_bytes", "max_connections"}},
		{name: "closed before stale", change: func(c *Config) { c.Stale = 5 * time.Second }, want: []string{"stale_close: 5s is not longer than stale (5s)"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig()
			tc.change(&cfg)
			var lines []string
			if err := cfg.Validate(); err != nil {
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
