// Package admin is the listener for ops that both programs have: is it alive, is it
// ready and if not why, and its metrics. It has no authorization of its own, so it stays
// on loopback or behind something that has.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Config of a Server.
type Config struct {
	Listen  string                  // host:port, required
	Metrics prometheus.Gatherer     // shown on /metrics, required
	Ready   map[string]func() error // what has to work, by name; nil from a func means it does
	Log     *slog.Logger            // nil is slog.Default()
}

// Server answers ops. Make it with New, then Run it once.
type Server struct {
	cfg  Config
	http http.Server
}

// New checks cfg and starts nothing.
func New(cfg Config) (*Server, error) {
	if cfg.Listen == "" || cfg.Metrics == nil {
		return nil, errors.New("admin: listen and metrics are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	s := &Server{cfg: cfg}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", Healthz)
	mux.HandleFunc("GET /readyz", Readyz(cfg.Ready))
	mux.Handle("GET /metrics", promhttp.HandlerFor(cfg.Metrics, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	s.http = http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// Run serves until ctx ends. The error of a listener that cannot be opened names it.
func (s *Server) Run(ctx context.Context) error {
	l, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return fmt.Errorf("admin.listen: %w", err)
	}
	s.cfg.Log.Info("listening", "for", "ops", "addr", l.Addr().String())
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if s.http.Shutdown(limit) != nil {
			s.http.Close()
		}
	})
	err = s.http.Serve(l)
	if stop() {
		return fmt.Errorf("admin.listen: %w", err)
	}
	<-stopped
	return nil
}

// Healthz says that the process answers.
func Healthz(w http.ResponseWriter, _ *http.Request) {
	write(w, http.StatusOK, map[string]any{"status": "ok"})
}

// Readyz says whether everything in ready works, 200 or 503, and names what does not and
// why, so that the one who looks need not search the log.
func Readyz(ready map[string]func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		failing := make(map[string]string)
		for _, name := range slices.Sorted(maps.Keys(ready)) {
			if err := ready[name](); err != nil {
				failing[name] = err.Error()
			}
		}
		if len(failing) > 0 {
			write(w, http.StatusServiceUnavailable, map[string]any{"status": "not ready", "failing": failing})
			return
		}
		write(w, http.StatusOK, map[string]any{"status": "ready"})
	}
}

func write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client went away; nobody else is concerned
}
