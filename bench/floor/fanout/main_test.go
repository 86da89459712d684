package main

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

func TestAnEventReachesTheScreensOfItsSite(t *testing.T) {
	f, err := newFanout()
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(f)
	defer server.Close()
	defer f.closeAll()
	screen := func(site string) *websocket.Conn {
		conn, _, err := websocket.DefaultDialer.Dial("ws"+strings.TrimPrefix(server.URL, "http")+"/sites/"+site, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	a, b, other := screen("s1"), screen("s1"), screen("s2")
	for deadline := time.Now().Add(5 * time.Second); ; {
		f.mu.Lock()
		n := len(f.screens["s1"]) + len(f.screens["s2"])
		f.mu.Unlock()
		if n == 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d screens of 3 came in", n)
		}
	}
	f.show("pos.0.s1.order.edge", []byte("ticket"))
	f.show("pos.0.s1.order.edge", nil) // a heartbeat of the hub
	f.show("_INBOX.x", []byte("no event"))
	f.sayAlive()
	for name, c := range map[string]struct {
		conn *websocket.Conn
		want []string
	}{"first": {a, []string{"ticket", "isAlive?"}}, "second": {b, []string{"ticket", "isAlive?"}}, "another site's": {other, []string{"isAlive?"}}} {
		for _, want := range c.want {
			if err := c.conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, got, err := c.conn.ReadMessage(); err != nil || string(got) != want {
				t.Errorf("%s screen got %q, %v, want %q", name, got, err, want)
			}
		}
	}
}
