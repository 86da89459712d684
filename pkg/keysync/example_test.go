package keysync_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

// A vendor's own program: fetch the keys of a site, seal an order with the key that is
// to be used now, and open what comes back.
func Example() {
	stub, err := portal.Start(portal.Config{Sites: map[string]portal.SiteConfig{"store-7": {Encryption: true}}})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer stub.Close()
	dir, err := os.MkdirTemp("", "keysync")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	if _, _, _, err := stub.WriteCredentials(dir); err != nil {
		fmt.Println(err)
		return
	}

	keys, err := keysync.New(keysync.Config{
		Portal: keysync.PortalConfig{
			URL:       stub.URL(),
			TokenFile: filepath.Join(dir, "token"),
			CAFile:    filepath.Join(dir, "ca.pem"),
		},
		Sites:     map[string]envelope.Settings{"store-7": {Profile: envelope.A256GCM}},
		NoBinding: true, // a vendor's program neither tags nor verifies
		Log:       slog.New(slog.DiscardHandler),
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- keys.Run(ctx) }()
	defer func() { stop(); <-done }()

	if err := keys.Refresh(ctx, "store-7"); err != nil {
		fmt.Println(err)
		return
	}
	site := keys.Site("store-7")
	key, err := site.Keyring.Primary(time.Now())
	if err != nil {
		fmt.Println(err)
		return
	}
	sealed, err := key.Seal([]byte(`{"order_number":"42"}`))
	if err != nil {
		fmt.Println(err)
		return
	}
	plain, err := site.Keyring.Accept(nil, sealed, time.Now(), 2*time.Minute)
	fmt.Println(string(plain), err)
	// Output: {"order_number":"42"} <nil>
}
