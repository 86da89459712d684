// Package cli is what the command lines of the two programs share: where settings
// come from, how a program starts, stops and says what is wrong.
package cli

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// Version is set by the linker (-X) in release builds; else it is read from the
// build information.
var Version = ""

// LogConfig says how a program logs; it writes to standard error.
type LogConfig struct {
	Level  string `koanf:"level"`  // debug, info (default), warn, error
	Format string `koanf:"format"` // text (default), json
}

// Validate reports what is wrong with c, by the paths of its settings.
func (c LogConfig) Validate() error {
	var errs []error
	if c.Level != "" {
		var l slog.Level
		if err := l.UnmarshalText([]byte(c.Level)); err != nil {
			errs = append(errs, fmt.Errorf("log.level: %q is none of debug, info, warn, error", c.Level))
		}
	}
	switch c.Format {
	case "", "text", "json":
	default:
		errs = append(errs, fmt.Errorf("log.format: %q is neither text nor json", c.Format))
	}
	return errors.Join(errs...)
}

// Logger builds the logger that c describes.
func (c LogConfig) Logger(w io.Writer) *slog.Logger {
	var level slog.Level
	if c.Level != "" {
		_ = level.UnmarshalText([]byte(c.Level)) // Validate has seen it
	}
	opts := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// Program is one of the two programs, as its main describes it.
type Program[C any] struct {
	Name  string
	Short string // one line
	Long  string
	Flags map[string]string // settings that also are flags: path, help
	// Validate reports all mistakes in a loaded configuration.
	Validate func(*C) error
	// Check does what needs the machine and starts nothing: files are there, keys can be read.
	Check func(*C) error
	// Run works until ctx ends, and returns nil when it ended because it was told to.
	Run func(ctx context.Context, c *C) error
	Log func(*C) LogConfig
	// ValidName says whether a name may stand in the settings.
	ValidName func(string) error
}

// Loader gives a sub-command the program's settings.
type Loader[C any] struct {
	program *Program[C]
	file    string
	set     []string
	cmd     *cobra.Command
}

// Load reads the settings and reports everything wrong with them at once.
func (l *Loader[C]) Load() (*C, error) {
	c := new(C)
	err := Load(c, Source{File: l.file, Env: os.Environ(), Flags: l.cmd.Root().PersistentFlags(), Set: l.set})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(l.program.Validate(c), l.program.Log(c).Validate()); err != nil {
		if l.file == "" {
			err = fmt.Errorf("no file was named with --config; from the environment and flags alone:\n%w", err)
		}
		return nil, err
	}
	return c, nil
}

// Command builds the program's command line: run, check-config, settings, token,
// version, completion, and what more adds.
func (p *Program[C]) Command(more ...func(*Loader[C]) *cobra.Command) *cobra.Command {
	l := &Loader[C]{program: p}
	root := &cobra.Command{Use: p.Name, Short: p.Short, Long: p.Long, SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	l.cmd = root
	root.PersistentFlags().StringVarP(&l.file, "config", "c", "", "YAML file with the settings")
	root.PersistentFlags().StringArrayVar(&l.set, "set", nil, "one setting, `path=value`; wins over everything; may be repeated")
	for _, s := range Settings(reflect.TypeFor[C]()) {
		help, ok := p.Flags[s.Path]
		if !ok {
			continue
		}
		if s.Type.Kind() == reflect.Slice {
			root.PersistentFlags().StringSlice(s.Path, nil, help)
		} else {
			root.PersistentFlags().String(s.Path, "", help)
		}
	}

	root.AddCommand(
		&cobra.Command{Use: "run", Short: "Run until stopped (SIGINT, SIGTERM)", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := l.Load()
				if err != nil {
					return err
				}
				slog.SetDefault(p.Log(c).Logger(cmd.ErrOrStderr()))
				slog.Info("starting", "program", p.Name, "version", version())
				if err := p.Run(cmd.Context(), c); err != nil {
					return err
				}
				slog.Info("stopped", "program", p.Name)
				return nil
			}},
		&cobra.Command{Use: "check-config", Short: "Report everything that is wrong with the settings, and start nothing", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				c, err := l.Load()
				if err != nil {
					return err
				}
				if err := p.Check(c); err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), "the settings are good")
				return nil
			}},
		&cobra.Command{Use: "settings", Short: "List every setting with its environment variable", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				for _, s := range Settings(reflect.TypeFor[C]()) {
					fmt.Fprintf(cmd.OutOrStdout(), "%-44s %-10s %s\n", s.Path, kind(s.Type), s.Env)
				}
				return nil
			}},
		&cobra.Command{Use: "token NAME", Short: "Make a token and print it once, with the lines for the settings", Args: cobra.ExactArgs(1),
			Long: "Make a random token of 256 bits. The token is printed once and kept nowhere; the settings hold its SHA-256.",
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := p.ValidName(args[0]); err != nil {
					return fmt.Errorf("the name: %w", err)
				}
				token, sum := NewToken()
				fmt.Fprintf(cmd.OutOrStdout(), "token: %s\n\ntokens:\n  - {name: %s, sha256: %s}\n", token, args[0], sum)
				return nil
			}},
		&cobra.Command{Use: "version", Short: "Print the version", Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				fmt.Fprintln(cmd.OutOrStdout(), p.Name, version())
				return nil
			}},
	)
	for _, f := range more {
		root.AddCommand(f(l))
	}
	return root
}

// Main runs the command line and returns the exit status: 0, or 1 after an error
// was written to standard error. The first SIGINT or SIGTERM ends the context; a
// second one ends the process at once.
func Main(root *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	if err := root.ExecuteContext(ctx); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			fmt.Fprintf(os.Stderr, "%s: %s\n", root.Name(), line)
		}
		return 1
	}
	return 0
}

// NewToken makes a random token of 256 bits and the hex SHA-256 that settings hold.
func NewToken() (token, sum string) {
	var b [32]byte
	rand.Read(b[:])
	token = base64.RawURLEncoding.EncodeToString(b[:])
	h := sha256.Sum256([]byte(token))
	return token, hex.EncodeToString(h[:])
}

func kind(t reflect.Type) string {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t.String() == "time.Duration":
		return "duration"
	case t.Kind() == reflect.Slice:
		return "list"
	case t.Kind() == reflect.Map:
		return "map"
	}
	return t.Kind().String()
}

func version() string {
	if Version != "" {
		return Version
	}
	if bi, ok := debug.ReadBuildInfo(); ok && bi.Main.Version != "" {
		return bi.Main.Version
	}
	return "(devel)"
}
