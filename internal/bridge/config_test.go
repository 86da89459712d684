package bridge

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/internal/router"
	"github.com/kitchenbridge/kitchenbridge/internal/wsgate"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

func TestValidateNamesEveryMistakeByItsPathInTheFile(t *testing.T) {
	err := Config{
		Name:        "No",
		Admin:       AdminConfig{Listen: "nowhere"},
		Hub:         broker.HubConfig{Listen: "0.0.0.0:4222"},
		Portal:      keysync.PortalConfig{URL: "http://portal.example"},
		BindingFile: filepath.Join(t.TempDir(), "absent.json"),
		Delivery:    router.Config{BackoffMin: time.Hour},
		Screens:     wsgate.Config{Listen: []wsgate.ListenConfig{{Addr: ":9000"}}, Stale: -1},
		Sites: map[string]SiteConfig{
			"A": {Kitchen: router.KitchenConfig{URL: "ftp://x"}},
			"b": {Cipher: envelope.Settings{Iterations: 5}, Kitchen: router.KitchenConfig{URL: "http://k.example"},
				Screens: &wsgate.SiteConfig{SiteConfig: door.SiteConfig{Authorization: "none"}}},
		},
	}.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	for _, want := range []string{
		"name: ", "admin.listen: ", "hub.listen: ", "portal.url: ", "portal.token_file: ", "binding_file: ", "sites.A: ", "cipher.profile: ",
		"sites.A.kitchen.url: ", "sites.b.cipher.profile: ", "sites.b.kitchen.url: ", "sites.b.screens.authorization: ", "delivery.backoff_min: ", "screens.stale: ",
	} {
		found := 0
		for _, l := range lines {
			if strings.HasPrefix(l, want) {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%d lines begin with %q in\n%v", found, want, err)
		}
	}
}

func TestASitesCipherReplacesTheFleetsAsAWhole(t *testing.T) {
	c := Config{Cipher: envelope.Settings{Profile: "a256gcm", Salt: "fleet"}, Sites: map[string]SiteConfig{
		"own": {Cipher: envelope.Settings{Profile: "a256ctr"}}, "fleet": {},
	}}
	if got := c.cipher("own"); got != (envelope.Settings{Profile: "a256ctr"}) {
		t.Errorf("own: %+v", got)
	}
	if got := c.cipher("fleet"); got != c.Cipher {
		t.Errorf("fleet: %+v", got)
	}
}

func TestScreensWithoutAGateAreAMistake(t *testing.T) {
	file := filepath.Join(t.TempDir(), "binding.json")
	if err := keysync.MintBindingFile(file, []string{"a"}); err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("t"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := Config{Portal: keysync.PortalConfig{URL: "https://portal.example", TokenFile: token}, BindingFile: file,
		Cipher: envelope.Settings{Profile: "a256gcm"}, Sites: map[string]SiteConfig{"a": {Screens: &wsgate.SiteConfig{}}}}
	err := c.Validate()
	if err == nil || !strings.HasPrefix(err.Error(), "sites.a.screens: screens.listen is empty") {
		t.Fatal(err)
	}
	c.Sites["a"] = SiteConfig{}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
}
