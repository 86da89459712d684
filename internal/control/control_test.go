package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// folder is a data folder with a path that is short enough on every system.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start serves h and returns when it answers; stop ends it and returns its error.
func start(t *testing.T, path string, h http.Handler) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, path, h) }()
	deadline := time.Now().Add(10 * time.Second)
	for {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
			break
		}
		select {
		case err := <-done:
			t.Fatal(err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("does not serve")
		}
	}
	var once bool
	stop = func() error {
		if once {
			return nil
		}
		once = true
		cancel(errors.New("told to stop"))
		return <-done
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

func hello() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		Answer(w, http.StatusOK, map[string]string{"hello": r.URL.RequestURI()})
	})
}

func TestOnlyTheOwnerCanConnect(t *testing.T) {
	path := filepath.Join(folder(t), "edge.sock")
	stop := start(t, path, hello())
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 || info.Mode().Type() != fs.ModeSocket {
		t.Fatalf("%v, %v", info, err)
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Fatalf("more than the socket is left in the folder: %v, %v", entries, err)
	}
	c := NewClient(path)
	defer c.Close()
	var got map[string]string
	if err := c.Do(t.Context(), "GET", "/status?a=b", &got); err != nil || got["hello"] != "/status?a=b" {
		t.Fatal(got, err)
	}
	c.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the socket is still there: %v", err)
	}
}

// stale leaves a socket behind as a killed process does.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

func TestServeReplacesWhatADeadProcessLeft(t *testing.T) {
	path := filepath.Join(folder(t), "edge.sock")
	stale(t, path)
	// Killed while it made the socket.
	staging := filepath.Join(filepath.Dir(path), stagingFolder)
	if err := os.Mkdir(staging, 0o700); err != nil {
		t.Fatal(err)
	}
	stale(t, filepath.Join(staging, stagingName))
	stop := start(t, path, hello())
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}

func TestServeNeverTakesThePlaceOf(t *testing.T) {
	t.Run("a live process", func(t *testing.T) {
		path := filepath.Join(folder(t), "edge.sock")
		start(t, path, hello())
		err := Serve(t.Context(), path, hello())
		if err == nil || !strings.Contains(err.Error(), "a running process answers on "+path) {
			t.Fatal(err)
		}
		c := NewClient(path)
		defer c.Close()
		if err := c.Do(t.Context(), "GET", "/", nil); err != nil {
			t.Fatalf("the one that was there does not answer any more: %v", err)
		}
	})
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(folder(t), "edge.sock")
		if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Serve(t.Context(), path, hello())
		if err == nil || !strings.Contains(err.Error(), "is no socket") {
			t.Fatal(err)
		}
		if b, _ := os.ReadFile(path); string(b) != "mine" {
			t.Fatal("the file is gone")
		}
	})
	t.Run("a folder that is not there", func(t *testing.T) {
		err := Serve(t.Context(), filepath.Join(folder(t), "absent", "edge.sock"), hello())
		if !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	})
}

func TestAPathThatIsTooLongSaysWhatToDo(t *testing.T) {
	dir := folder(t)
	fits := filepath.Join(dir, strings.Repeat("d", maxPath-len(dir)-len("//edge.sock")), "edge.sock")
	if len(fits) != maxPath {
		t.Fatal(len(fits))
	}
	if err := os.Mkdir(filepath.Dir(fits), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := CheckPath(fits); err != nil {
		t.Fatal(err)
	}
	if err := start(t, fits, hello())(); err != nil {
		t.Fatal(err)
	}
	for _, long := range []string{
		filepath.Join(filepath.Dir(fits)+"d", "edge.sock"),
		filepath.Join(filepath.Dir(fits)+strings.Repeat("d", 6), "s"), // its staging path is the longer one
	} {
		for what, err := range map[string]error{
			"check": CheckPath(long), "serve": Serve(t.Context(), long, hello()), "client": NewClient(long).Do(t.Context(), "GET", "/", nil),
		} {
			if err == nil || !strings.Contains(err.Error(), "bytes too long") || !strings.Contains(err.Error(), "shorter path") || !strings.Contains(err.Error(), long) {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

func TestTheClientSaysWhyNobodyAnswers(t *testing.T) {
	dir := folder(t)
	ask := func(path string) error {
		c := NewClient(path)
		defer c.Close()
		return c.Do(t.Context(), "GET", "/status", nil)
	}
	t.Run("nothing there", func(t *testing.T) {
		err := ask(filepath.Join(dir, "edge.sock"))
		if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "there is no socket") {
			t.Fatal(err)
		}
	})
	t.Run("left behind", func(t *testing.T) {
		path := filepath.Join(dir, "stale.sock")
		stale(t, path)
		err := ask(path)
		if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "left behind") {
			t.Fatal(err)
		}
	})
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(dir, "file.sock")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := ask(path); !errors.Is(err, ErrNotRunning) {
			t.Fatal(err)
		}
	})
	t.Run("another user's", func(t *testing.T) {
		// Root may enter everywhere, so the system's answer is put in by hand.
		path := filepath.Join(dir, "theirs.sock")
		for name, make := range map[string]func(){"belongs to another user": func() { stale(t, path) }, "a folder that this user may not enter": func() { os.Remove(path) }} {
			make()
			err := NewClient(path).explain(t.Context(), fmt.Errorf("dial: %w", os.ErrPermission))
			if !errors.Is(err, ErrNotYours) || !strings.Contains(err.Error(), "as root") || !strings.Contains(err.Error(), name) {
				t.Error(err)
			}
			os.Remove(path)
		}
	})
	t.Run("no answer in time", func(t *testing.T) {
		path := filepath.Join(dir, "slow.sock")
		start(t, path, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
		c := NewClient(path)
		defer c.Close()
		late := errors.New("no answer within 10ms")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, late)
		defer cancel()
		if err := c.Do(ctx, "GET", "/", nil); !errors.Is(err, late) {
			t.Fatal(err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		path := filepath.Join(dir, "no.sock")
		start(t, path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/plain" {
				http.NotFound(w, r)
				return
			}
			Refuse(w, http.StatusConflict, "not while draining")
		}))
		for target, want := range map[string]Error{"/": {Status: 409, Text: "not while draining"}, "/plain": {Status: 404, Text: "404 page not found"}} {
			e, ok := errors.AsType[*Error](NewClient(path).Do(t.Context(), "GET", target, nil))
			if !ok || e.Status != want.Status || e.Text != want.Text {
				t.Errorf("%s: %+v", target, e)
			}
		}
	})
}

func TestStopWaitsForRequestsAndTellsThem(t *testing.T) {
	path := filepath.Join(folder(t), "edge.sock")
	begun, ended := make(chan struct{}), make(chan struct{})
	stop := start(t, path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		<-r.Context().Done()
		Refuse(w, http.StatusServiceUnavailable, context.Cause(r.Context()).Error())
		close(ended)
	}))
	c := NewClient(path)
	defer c.Close()
	answer := make(chan error, 1)
	go func() { answer <- c.Do(context.Background(), "POST", "/drain", nil) }()
	<-begun
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	default:
		t.Fatal("Serve returned before the request had ended")
	}
	if e, ok := errors.AsType[*Error](<-answer); !ok || e.Text != "told to stop" {
		t.Fatalf("%+v", e)
	}
}

func TestLinesAreCompleteOrAnError(t *testing.T) {
	broken := errors.New("block 7\nis corrupt")
	path := filepath.Join(folder(t), "edge.sock")
	start(t, path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		Lines(w, func(put func(any) error) error {
			switch r.URL.Path {
			case "/none":
				return nil
			case "/early":
				return broken
			}
			for i := range 2000 {
				if err := put(map[string]any{"n": i, "text": "<b>" + strings.Repeat("x", 100)}); err != nil {
					return err
				}
				if i == 1000 && r.URL.Path == "/late" {
					return broken
				}
			}
			return nil
		})
	}))
	for target, want := range map[string]struct {
		lines int
		err   string
	}{
		"/none":  {0, ""},
		"/all":   {2000, ""},
		"/early": {0, "block 7\nis corrupt"},
		"/late":  {1001, "the answer is not complete: block 7 is corrupt"},
	} {
		c := NewClient(path)
		n := 0
		err := c.Lines(t.Context(), "GET", target, func(line json.RawMessage) error {
			var v struct {
				N    int    `json:"n"`
				Text string `json:"text"`
			}
			if err := json.Unmarshal(line, &v); err != nil || v.N != n || !strings.HasPrefix(v.Text, "<b>x") {
				return fmt.Errorf("line %d: %s: %w", n, line, err)
			}
			n++
			return nil
		})
		got := ""
		if err != nil {
			got = err.Error()
		}
		if n != want.lines || got != want.err {
			t.Errorf("%s: %d lines, %q; want %d, %q", target, n, got, want.lines, want.err)
		}
		c.Close()
	}
	mine := errors.New("enough")
	c := NewClient(path)
	defer c.Close()
	if err := c.Lines(t.Context(), "GET", "/all", func(json.RawMessage) error { return mine }); !errors.Is(err, mine) {
		t.Fatal(err)
	}
}

// TestLinesOfAProcessThatDies: what was cut off is never taken for all there is.
func TestLinesOfAProcessThatDies(t *testing.T) {
	path := filepath.Join(folder(t), "edge.sock")
	start(t, path, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("{}\n"))
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		if conn, _, err := rc.Hijack(); err == nil {
			conn.Close()
		}
	}))
	c := NewClient(path)
	defer c.Close()
	n := 0
	err := c.Lines(t.Context(), "GET", "/", func(json.RawMessage) error { n++; return nil })
	if err == nil || !strings.Contains(err.Error(), "not complete") || n != 1 {
		t.Fatal(n, err)
	}
}
