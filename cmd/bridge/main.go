// Command bridge delivers what edges published to Kitchens and their screens. It embeds
// the hub unless the settings name another one.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/kitchenbridge/kitchenbridge/internal/bridge"
	"github.com/kitchenbridge/kitchenbridge/internal/cli"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// config is the bridge's file: the bridge's own settings, and how it logs.
type config struct {
	bridge.Config `koanf:",squash"`
	Logs          cli.LogConfig `koanf:"log"`
}

func main() {
	program := &cli.Program[config]{
		Name:  "bridge",
		Short: "Deliver orders from the hub to Kitchens and their screens",
		Long: `bridge takes each site's orders from the hub, in order, verifies them, posts them to the
site's Kitchen and reports what became of them; Kitchen screens connect to it by
WebSocket. It is the hub itself unless hub.urls names another one.

Settings come from a YAML file (--config), then the environment (KB_…), then flags; a
later one wins. ` + "`bridge settings`" + ` lists them all, ` + "`bridge check-config`" + ` checks them.`,
		Flags: map[string]string{
			"name":         "name of this bridge at the hub",
			"data":         "folder of the embedded hub",
			"hub.listen":   "open the embedded hub to edges at host:port",
			"hub.urls":     "use this hub instead of the embedded one; comma-separated",
			"binding_file": "file with the sites' binding keys",
			"admin.listen": "listener for ops (/healthz, /readyz, /metrics), or off",
			"log.level":    "debug, info, warn or error",
			"log.format":   "text or json",
		},
		Validate: func(c *config) error { return c.Config.Validate() },
		Check: func(c *config) error {
			_, err := bridge.New(c.Config)
			return err
		},
		Run: func(ctx context.Context, c *config) error {
			b, err := bridge.New(c.Config)
			if err != nil {
				return err
			}
			return b.Run(ctx)
		},
		Log:       func(c *config) cli.LogConfig { return c.Logs },
		ValidName: envelope.ValidName,
	}
	os.Exit(cli.Main(program.Command(assets, binding)))
}

// assetsTimeout is how long a person waits for a hub that does not answer.
const assetsTimeout = 15 * time.Second

// assets are the sub-commands for a hub that is not embedded.
func assets(l *cli.Loader[config]) *cobra.Command {
	cmd := &cobra.Command{Use: "assets", Short: "The streams, consumers and buckets on the hub at hub.urls", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	withHub := func(do func(ctx context.Context, hub bridge.Assets) error, done string) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			c, err := l.Load()
			if err != nil {
				return err
			}
			if len(c.Hub.URLs) == 0 {
				return errors.New("hub.urls is empty: the embedded hub's assets are made when the bridge starts")
			}
			hub, closeHub, err := bridge.Open(cmd.Context(), c.Config, nil)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), assetsTimeout)
			defer cancel()
			err = do(ctx, hub)
			if err != nil && !hub.Connected() {
				err = fmt.Errorf("hub %s: %s: check hub.urls, hub.user and hub.password_file", strings.Join(c.Hub.URLs, ", "), hub.Status())
			}
			if err := errors.Join(err, closeHub()); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), done)
			return nil
		}
	}
	cmd.AddCommand(
		&cobra.Command{Use: "check", Short: "Compare what is there with what the bridge needs; change nothing", Args: cobra.NoArgs,
			RunE: withHub(func(ctx context.Context, hub bridge.Assets) error { return hub.CheckAssets(ctx) }, "the hub has everything, as it should be")},
		&cobra.Command{Use: "apply", Short: "Create what is missing; change nothing that is there", Args: cobra.NoArgs,
			RunE: withHub(func(ctx context.Context, hub bridge.Assets) error {
				if err := hub.ApplyAssets(ctx); err != nil {
					return err
				}
				return hub.CheckAssets(ctx)
			}, "the hub has everything")},
	)
	return cmd
}

// binding are the sub-commands for the file of binding keys.
func binding(*cli.Loader[config]) *cobra.Command {
	cmd := &cobra.Command{Use: "binding", Short: "The file of binding keys that edges and bridge share", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	var file string
	var sites []string
	mint := &cobra.Command{Use: "mint", Short: "Make the file, or add the sites it lacks; what is there stays", Args: cobra.NoArgs,
		Long: `Make random binding and lane keys for sites. An existing file keeps what it holds and gains the
sites it lacks. The file is secret (0600): copy it to the edges over a channel you trust.`,
		Example: "  bridge binding mint --file binding.json --site store-1 --site store-2",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(sites) == 0 {
				return errors.New("name at least one site with --site")
			}
			if err := keysync.MintBindingFile(file, sites); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s holds the keys of: %v\n", file, sites)
			return nil
		}}
	mint.Flags().StringVar(&file, "file", "binding.json", "the file to make or extend")
	mint.Flags().StringSliceVar(&sites, "site", nil, "a site; may be repeated")

	var all bool
	var after time.Duration
	rotate := &cobra.Command{Use: "rotate SITE... | --all", Short: "Give sites a new binding key each; the ones before stay to verify and open",
		Long: `Put a new random binding key first for each site. It begins to tag and seal after --after; copy
the file to every edge and bridge before that. The programs read it within seconds, without a
restart. The keys before are retired then, and verify and open what they have tagged for 14
days; older ones are dropped from the file at the next rotation. Lane keys never change.

A key that has leaked stays good until its entry is deleted from the file everywhere.`,
		Example: `  bridge binding rotate --file binding.json store-1
  bridge binding rotate --file binding.json --all --after 1h`,
		RunE: func(cmd *cobra.Command, sites []string) error {
			if all == (len(sites) > 0) {
				return errors.New("name the sites to rotate, or all of them with --all")
			}
			rotated, from, err := keysync.RotateBindingFile(file, sites, after)
			if err != nil {
				return err
			}
			when := "used from " + from.Format(time.RFC3339) + ": copy the file to every edge and bridge before"
			if after == 0 {
				when = "used at once: what is tagged with it is quarantined by a bridge that has not this file"
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s has new keys for [%s], %s\n", file, few(rotated), when)
			return nil
		}}
	rotate.Flags().StringVar(&file, "file", "binding.json", "the file to change")
	rotate.Flags().BoolVar(&all, "all", false, "all sites of the file")
	rotate.Flags().DurationVar(&after, "after", keysync.UseAfter, "how long from now the new keys begin to tag, 0s to 336h")
	cmd.AddCommand(mint, rotate)
	return cmd
}

// few names the first of many.
func few(names []string) string {
	const most = 10
	if len(names) <= most {
		return strings.Join(names, " ")
	}
	return strings.Join(names[:most], " ") + fmt.Sprintf(" and %d more", len(names)-most)
}
