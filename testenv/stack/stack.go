// Package stack runs the whole path on 127.0.0.1 for the demo, for tests and for fault
// runs: a stub Portal and a stub Kitchen in this process, edge and bridge as the real
// programs in processes of their own.
package stack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/cli"
	"github.com/kitchenbridge/kitchenbridge/testenv/kitchen"
	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// Site is one site of a Stack.
type Site struct {
	Profile    string // a256gcm or a256ctr; required
	Encryption bool   // the Portal's switch
	// Open: authorization none, on listeners of its own, as in the seed's examples.
	Open bool
}

// Config of a Stack. Zero values are the defaults.
type Config struct {
	// Sites by name, required.
	Sites map[string]Site
	// Dir holds programs, settings, keys, logs and the hub's data. Required; it must exist.
	Dir string
	// Programs are edge and bridge if they are built already. Default: built into Dir.
	Edge, Bridge string
	// RotateEvery is the time between two rotations of every key. Default 0: none.
	RotateEvery time.Duration
	// Integrator makes edge and bridge ask the Portal for a token with the integrator's
	// credentials. Default: they read one from a file.
	Integrator bool
	// Poll is how often edge and bridge ask the Portal. Default 1s.
	Poll time.Duration
	// Iterations of PBKDF2. Default: the product's own default.
	Iterations int
	// Ports are the preferred addresses; another one is taken where they are busy.
	Ports Ports
	// EdgeSettings and BridgeSettings are further settings of the programs, merged over
	// those of the Stack, in the form of their files.
	EdgeSettings, BridgeSettings map[string]any
	// Hub is the program of a hub that runs on its own, as testenv/faults/hub, for which it
	// is run with -listen, -ready and -data. Default: the bridge embeds the hub.
	Hub string
	// EdgeEnv and BridgeEnv are added to the programs' environment: NAME=value.
	EdgeEnv, BridgeEnv []string
	// KitchenSettings may change the Kitchen's settings before it starts. Default nil.
	KitchenSettings func(*kitchen.Config)
	// Behaviour the Kitchen starts with.
	Behaviour kitchen.Behaviour
	// OnProcessed is called for every request the Kitchen processes.
	OnProcessed func(kitchen.Record)
	// Log of the stubs. Default slog.Default().
	Log *slog.Logger
}

// Ports are preferred addresses, "" for any.
type Ports struct{ Edge, Hub, Screens string }

// Stack is a running path.
type Stack struct {
	cfg     Config
	Portal  *portal.Portal
	Kitchen *kitchen.Kitchen
	Edge    *Process // nil while it does not run
	Bridge  *Process
	HubProc *Process // nil always when the bridge embeds the hub

	Hub         string // nats://…
	hubReady    string // http://…, of a hub of its own
	EdgeAdmin   string // http://…
	BridgeAdmin string
	Endpoints   map[string]Endpoint

	mu         sync.Mutex
	encryption map[string]bool // Guarded by mu: the Portal's switches, by site
}

// Endpoint is how the world meets one site.
type Endpoint struct {
	Edge        string `json:"edge"`                   // base URL: POST {edge}/order
	Screen      string `json:"screen"`                 // WebSocket URL
	Profile     string `json:"profile"`                // a256gcm or a256ctr
	Iterations  int    `json:"iterations"`             // of PBKDF2-HMAC-SHA-256, empty salt
	POSToken    string `json:"pos_token,omitempty"`    // "" where authorization is none
	ScreenToken string `json:"screen_token,omitempty"` // "" where authorization is none
}

const defaultIterations = 600_000

// Prepare builds the programs if need be, starts Portal and Kitchen and writes the
// programs' settings. It starts neither program.
func Prepare(ctx context.Context, cfg Config) (s *Stack, err error) {
	if cfg.Dir == "" || len(cfg.Sites) == 0 {
		return nil, errors.New("stack: Dir and Sites are required")
	}
	if cfg.Poll == 0 {
		cfg.Poll = time.Second
	}
	if cfg.Iterations == 0 {
		cfg.Iterations = defaultIterations
	}
	if cfg.Edge == "" {
		if cfg.Edge, cfg.Bridge, err = Build(ctx, filepath.Join(cfg.Dir, "bin")); err != nil {
			return nil, err
		}
	}
	s = &Stack{cfg: cfg, Endpoints: make(map[string]Endpoint), encryption: make(map[string]bool)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()

	sites := make(map[string]portal.SiteConfig)
	profiles := make(map[string]vendorcrypto.Profile)
	names := slices.Sorted(maps.Keys(cfg.Sites))
	for _, name := range names {
		sites[name] = portal.SiteConfig{Encryption: cfg.Sites[name].Encryption}
		s.encryption[name] = cfg.Sites[name].Encryption
		profiles[name] = vendorcrypto.Profile{Cipher: cfg.Sites[name].Profile, Iterations: cfg.Iterations}
	}
	overlap := cfg.RotateEvery * 3 / 4 // shorter than a period, so that there are never three keys
	if s.Portal, err = portal.Start(portal.Config{Sites: sites, RotateEvery: cfg.RotateEvery, Overlap: overlap}); err != nil {
		return s, err
	}
	settings := kitchen.Config{Sites: names, Profiles: profiles, Keys: s.Keys, Skew: 2 * time.Second,
		Behaviour: cfg.Behaviour, OnProcessed: cfg.OnProcessed, Log: cfg.Log}
	if cfg.KitchenSettings != nil {
		cfg.KitchenSettings(&settings)
	}
	if s.Kitchen, err = kitchen.Start(settings); err != nil {
		return s, err
	}
	return s, s.writeSettings(ctx, names)
}

// Keys is what the Portal says of a site, in the vendors' terms.
func (s *Stack) Keys(site string) (encryption bool, keys []vendorcrypto.Key) {
	for _, k := range s.Portal.Keys(site) {
		keys = append(keys, vendorcrypto.Key{Fingerprint: k.Fingerprint, Passphrase: vendorcrypto.Secret(k.Value), ValidAfter: k.ValidAfter, ValidUntil: k.ValidUntil})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.encryption[site], keys
}

// SetEncryption turns a site's switch on the Portal; POS and Kitchen know of it at once.
func (s *Stack) SetEncryption(site string, on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.Portal.SetEncryption(site, on); err != nil {
		return err
	}
	s.encryption[site] = on
	return nil
}

// writeSettings picks addresses and tokens, mints the binding file with the real
// program, and writes edge.yaml and bridge.yaml (JSON, which is YAML).
func (s *Stack) writeSettings(ctx context.Context, names []string) error {
	dir := s.cfg.Dir
	var errs []error
	addr := func(preferred string) string {
		a, err := FreeAddr(preferred)
		errs = append(errs, err)
		return a
	}
	caFile, tokenFile := filepath.Join(dir, "portal-ca.pem"), filepath.Join(dir, "portal-token")
	errs = append(errs, s.Portal.WriteCAFile(caFile), os.WriteFile(tokenFile, []byte(s.Portal.Token()), 0o600))
	portalSettings := map[string]any{"url": s.Portal.URL(), "ca_file": caFile, "poll": s.cfg.Poll.String()}
	if s.cfg.Integrator {
		keyID, secret := s.Portal.Credentials()
		secretFile := s.file("portal-secret")
		errs = append(errs, os.WriteFile(secretFile, []byte(secret), 0o600))
		portalSettings["key_id"], portalSettings["secret_key_file"], portalSettings["token_url"] = keyID, secretFile, s.Portal.URL()
	} else {
		portalSettings["token_file"] = tokenFile
	}

	bindingFile := filepath.Join(dir, "binding.json")
	args := []string{"binding", "mint", "--file", bindingFile}
	for _, name := range names {
		args = append(args, "--site", name)
	}
	if out, err := exec.CommandContext(ctx, s.cfg.Bridge, args...).CombinedOutput(); err != nil {
		errs = append(errs, fmt.Errorf("bridge binding mint: %w\n%s", err, out))
	}

	edgeAddr, screenAddr, hubAddr := addr(s.cfg.Ports.Edge), addr(s.cfg.Ports.Screens), addr(s.cfg.Ports.Hub)
	edgeAdmin, bridgeAdmin := addr(""), addr("")
	s.Hub, s.EdgeAdmin, s.BridgeAdmin = "nats://"+hubAddr, "http://"+edgeAdmin, "http://"+bridgeAdmin
	bridgeHub := map[string]any{"listen": hubAddr}
	if s.cfg.Hub != "" {
		s.hubReady = "http://" + addr("")
		bridgeHub = map[string]any{"urls": []string{s.Hub}, "reconnect_max": "200ms", "partitions": hubPartitions}
	}

	edgeListen := []map[string]any{{"addr": edgeAddr}}
	screenListen := []map[string]any{{"addr": screenAddr}}
	edgeSites, bridgeSites := map[string]any{}, map[string]any{}
	for _, name := range names {
		site := s.cfg.Sites[name]
		cipher := map[string]any{"profile": site.Profile, "iterations": s.cfg.Iterations}
		e := Endpoint{Edge: "http://" + edgeAddr, Screen: "ws://" + screenAddr + "/", Profile: site.Profile, Iterations: s.cfg.Iterations}
		posDoor, screenDoor := map[string]any{}, map[string]any{}
		if site.Open {
			own, ownScreen := addr(""), addr("")
			edgeListen = append(edgeListen, map[string]any{"addr": own, "site": name})
			screenListen = append(screenListen, map[string]any{"addr": ownScreen, "site": name})
			e.Edge, e.Screen = "http://"+own, "ws://"+ownScreen+"/"
			posDoor["authorization"], screenDoor["authorization"] = "none", "none"
		} else {
			var posSum, screenSum string
			e.POSToken, posSum = cli.NewToken()
			e.ScreenToken, screenSum = cli.NewToken()
			posDoor["tokens"] = []map[string]any{{"name": "pos-1", "sha256": posSum}}
			screenDoor["tokens"] = []map[string]any{{"name": "screen-1", "sha256": screenSum}}
		}
		s.Endpoints[name] = e
		edgeSite := map[string]any{"cipher": cipher}
		maps.Copy(edgeSite, posDoor)
		edgeSites[name] = edgeSite
		bridgeSites[name] = map[string]any{"cipher": cipher, "screens": screenDoor, "kitchen": map[string]any{"url": s.Kitchen.URL(name)}}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	edge := map[string]any{
		"name": "edge-1", "listen": edgeListen, "admin": map[string]any{"listen": edgeAdmin},
		"hub":    map[string]any{"urls": []string{s.Hub}, "reconnect_max": "200ms"},
		"portal": portalSettings, "binding_file": bindingFile, "sites": edgeSites,
	}
	bridge := map[string]any{
		"data": filepath.Join(dir, "hub"), "admin": map[string]any{"listen": bridgeAdmin},
		"hub":    bridgeHub,
		"portal": portalSettings, "binding_file": bindingFile, "sites": bridgeSites,
		"screens": map[string]any{"listen": screenListen, "origins": []string{"ionic"}},
	}
	merge(edge, s.cfg.EdgeSettings)
	merge(bridge, s.cfg.BridgeSettings)
	return errors.Join(writeJSON(s.file("edge.yaml"), edge), writeJSON(s.file("bridge.yaml"), bridge))
}

// merge puts the values of from over those of into, map by map.
func merge(into, from map[string]any) {
	for k, v := range from {
		if sub, ok := v.(map[string]any); ok {
			if has, ok := into[k].(map[string]any); ok {
				merge(has, sub)
				continue
			}
		}
		into[k] = v
	}
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}

func (s *Stack) file(name string) string { return filepath.Join(s.cfg.Dir, name) }

// hubPartitions is what the embedded hub has by default; one of its own gets the same.
const hubPartitions = 4

// StartHub starts the hub that runs on its own and waits until it is ready.
func (s *Stack) StartHub(ctx context.Context) (err error) {
	s.HubProc, err = StartProcess("hub", s.cfg.Hub, s.file("hub.log"), "-listen", strings.TrimPrefix(s.Hub, "nats://"),
		"-ready", strings.TrimPrefix(s.hubReady, "http://"), "-data", s.file("hub"))
	if err != nil {
		return err
	}
	return s.HubProc.WaitReady(ctx, s.hubReady+"/readyz")
}

// StartBridge starts the bridge and waits until it is ready.
func (s *Stack) StartBridge(ctx context.Context) (err error) {
	if s.Bridge, err = startProcess("bridge", s.cfg.Bridge, s.file("bridge.log"), s.cfg.BridgeEnv, "run", "--config", s.file("bridge.yaml")); err != nil {
		return err
	}
	return s.Bridge.WaitReady(ctx, s.BridgeAdmin+"/readyz")
}

// StartEdge starts the edge and waits until it is ready.
func (s *Stack) StartEdge(ctx context.Context) (err error) {
	if s.Edge, err = startProcess("edge", s.cfg.Edge, s.file("edge.log"), s.cfg.EdgeEnv, "run", "--config", s.file("edge.yaml")); err != nil {
		return err
	}
	return s.Edge.WaitReady(ctx, s.EdgeAdmin+"/readyz")
}

// Start starts the programs: the hub if it is one of its own, then the bridge, since it
// may be the hub, then the edge.
func (s *Stack) Start(ctx context.Context) error {
	if s.cfg.Hub != "" {
		if err := s.StartHub(ctx); err != nil {
			return err
		}
	}
	if err := s.StartBridge(ctx); err != nil {
		return err
	}
	return s.StartEdge(ctx)
}

// stopLimit is how long a program may take to stop; both drain within 10 s by default.
const stopLimit = 20 * time.Second

// Stop ends the programs as an operator would, edge first.
func (s *Stack) Stop() error {
	var errs []error
	for _, p := range []**Process{&s.Edge, &s.Bridge, &s.HubProc} {
		if *p != nil {
			errs = append(errs, (*p).Stop(stopLimit))
			*p = nil
		}
	}
	return errors.Join(errs...)
}

// Close stops everything that still runs. Files stay in Dir.
func (s *Stack) Close() error {
	err := s.Stop()
	if s.Kitchen != nil {
		err = errors.Join(err, s.Kitchen.Close())
	}
	if s.Portal != nil {
		s.Portal.Close()
	}
	return err
}

// WriteState writes what a client of the running stack needs, tokens included, 0600.
func (s *Stack) WriteState(path string) error {
	return writeJSON(path, map[string]any{
		"hub": s.Hub, "edge_admin": s.EdgeAdmin, "bridge_admin": s.BridgeAdmin,
		"portal": map[string]any{"url": s.Portal.URL(), "ca_file": s.file("portal-ca.pem"), "token": s.Portal.Token()},
		"sites":  s.Endpoints,
	})
}
