package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestReadyzNamesWhatDoesNotWork(t *testing.T) {
	var hub error
	s, err := New(Config{Listen: "127.0.0.1:0", Metrics: prometheus.NewRegistry(), Ready: map[string]func() error{
		"hub":  func() error { return hub },
		"keys": func() error { return nil },
	}})
	if err != nil {
		t.Fatal(err)
	}
	get := func(path string) (int, map[string]any) {
		w := httptest.NewRecorder()
		s.http.Handler.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		var body map[string]any
		_ = json.Unmarshal(w.Body.Bytes(), &body)
		return w.Code, body
	}
	if code, body := get("/readyz"); code != 200 || body["status"] != "ready" {
		t.Fatalf("%d %v", code, body)
	}
	hub = errors.New("no connection to the hub for 3s")
	code, body := get("/readyz")
	if code != 503 || body["failing"].(map[string]any)["hub"] != "no connection to the hub for 3s" || len(body["failing"].(map[string]any)) != 1 {
		t.Fatalf("%d %v", code, body)
	}
	if code, body := get("/healthz"); code != 200 || body["status"] != "ok" {
		t.Fatalf("%d %v", code, body)
	}
	if code, _ := get("/metrics"); code != 200 {
		t.Fatalf("metrics: %d", code)
	}
	if code, _ := get("/"); code != 404 {
		t.Fatalf("/: %d", code)
	}
}

func TestRunStopsWhenToldAndNamesATakenPort(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s, err := New(Config{Listen: taken.Addr().String(), Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "admin.listen: ") || !strings.Contains(err.Error(), taken.Addr().String()) {
		t.Fatal(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	s, err = New(Config{Listen: "127.0.0.1:0", Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{}); err == nil {
		t.Fatal("an empty Config was accepted")
	}
}
