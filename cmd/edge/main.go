// Command edge takes POS traffic in a store, or for many stores, wraps it in envelopes
// and publishes them to the hub.
package main

import (
	"context"
	"os"

	"github.com/kitchenbridge/kitchenbridge/internal/cli"
	"github.com/kitchenbridge/kitchenbridge/internal/edge"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// config is the edge's file: the edge's own settings, and how it logs.
type config struct {
	edge.Config `koanf:",squash"`
	Logs        cli.LogConfig `koanf:"log"`
}

func main() {
	program := &cli.Program[config]{
		Name:  "edge",
		Short: "Take POS orders, seal them and publish them to the hub",
		Long: `edge stands where POS traffic enters: in a store, or for many stores at once. It validates
and seals each order, gives it its number and tag, publishes it to the hub, and answers
the POS with what the Kitchen said, or with a promise it can ask about.

Settings come from a YAML file (--config), then the environment (KB_…), then flags; a
later one wins. ` + "`edge settings`" + ` lists them all, ` + "`edge check-config`" + ` checks them.`,
		Flags: map[string]string{
			"name":         "name of this edge at the hub",
			"hub.urls":     "the hub's servers, comma-separated",
			"binding_file": "file with the sites' binding keys",
			"admin.listen": "listener for ops (/healthz, /readyz, /metrics), or off",
			"log.level":    "debug, info, warn or error",
			"log.format":   "text or json",
		},
		Validate: func(c *config) error { return c.Config.Validate() },
		Check: func(c *config) error {
			_, err := edge.New(c.Config)
			return err
		},
		Run: func(ctx context.Context, c *config) error {
			e, err := edge.New(c.Config)
			if err != nil {
				return err
			}
			return e.Run(ctx)
		},
		Log:       func(c *config) cli.LogConfig { return c.Logs },
		ValidName: envelope.ValidName,
	}
	os.Exit(cli.Main(program.Command()))
}
