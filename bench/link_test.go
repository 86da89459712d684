package main

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// echo answers what it is told, on loopback.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return l.Addr().String()
}

func TestALinkThatIsCutLetsNothingThrough(t *testing.T) {
	c := &crew{}
	l, err := c.newLink()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.close(); err != nil {
			t.Error(err)
		}
	}()
	l.to(echo(t))
	call := func() (net.Conn, error) {
		conn, err := net.Dial("tcp", l.address)
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err = conn.Write([]byte("hello"))
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 5))
		}
		return conn, err
	}
	if _, err := call(); err == nil {
		t.Error("answered before it was opened")
	}
	before := time.Now()
	first := l.open()
	conn, err := call()
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	if at, err := connected(t.Context(), first); err != nil || at.Before(before) || at.After(time.Now()) {
		t.Errorf("first connection at %v, opened at %v: %v", at, before, err)
	}
	l.cut()
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes from a connection that was cut", n)
	}
	if _, err := call(); err == nil {
		t.Error("answered after it was cut")
	}
}

func TestACopiedFolderHasAllFiles(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "to")
	for _, name := range []string{"a", "sub/b", "sub/sub/c"} {
		path := filepath.Join(from, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyFolder(to, from); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "sub/b", "sub/sub/c"} {
		if got, err := os.ReadFile(filepath.Join(to, name)); err != nil || string(got) != name {
			t.Errorf("%s holds %q: %v", name, got, err)
		}
	}
	if err := copyFolder(to, from); err == nil {
		t.Error("copied over what was there")
	}
}
