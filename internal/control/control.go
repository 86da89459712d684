// Package control is how a sub-command talks to its running program on the same machine:
// HTTP over a Unix socket in the program's data folder.
//
// It promises:
//
//   - Only the user that the program runs as, and root, can connect: the socket has mode
//     0600 from the moment it can be seen. There is no other authorization.
//   - Serve takes the place of a socket that a dead process left behind, never that of a
//     live one, and of nothing that is not a socket.
//   - A client is told apart "not running", "not yours" and "does not answer".
//
// It knows nothing of what is asked: that is the handler's.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

const (
	// maxPath is the longest path that a socket's address holds: 107 bytes on Linux, 103
	// on macOS.
	maxPath = len(syscall.RawSockaddrUnix{}.Path) - 1

	// stagingFolder and stagingName are where the socket is made before it gets its name.
	// Short: its path has to fit as well.
	stagingFolder = ".ctl"
	stagingName   = "s"

	mode = 0o600

	// stopLimit is how long a stop waits for answers that are being written.
	stopLimit = 5 * time.Second

	// writeLimit is how long a client may take to read the next part of an answer.
	writeLimit = 10 * time.Second

	readLimit     = 10 * time.Second
	idleLimit     = time.Minute
	maxHeader     = 8 << 10
	maxBody       = 64 << 10
	dialLimit     = 2 * time.Second
	errorEndsWith = "Kb-Error" // trailer: why the answer ends early
)

// CheckPath says whether a socket can have that path, and what to do when it is too long.
func CheckPath(path string) error {
	longest := max(len(path), len(stagingPath(path)))
	if longest <= maxPath {
		return nil
	}
	return fmt.Errorf("control socket: the path %s is %d bytes too long for a Unix socket (at most %d): use a data folder with a shorter path, or a relative one",
		path, longest-maxPath, maxPath)
}

func stagingPath(path string) string {
	return filepath.Join(filepath.Dir(path), stagingFolder, stagingName)
}

// Serve answers requests on a socket at path with h until ctx ends, then removes the
// socket and returns nil. The folder of path exists and is the caller's alone: whoever
// serves in it holds its lock.
//
// The context of each request ends with ctx, and h has to return then: Serve waits for
// that. A client has 10 s to read each part of an answer. Anything else that ends it is
// returned: a path that is too long, a live process or something that is no socket at
// path, a folder that takes no sockets.
func Serve(ctx context.Context, path string, h http.Handler) error {
	l, err := listen(path)
	if err != nil {
		return err
	}
	// For the requests that are in work when the end comes.
	var running sync.RWMutex
	stop, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	s := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !running.TryRLock() {
				http.Error(w, "stopping", http.StatusServiceUnavailable)
				return
			}
			defer running.RUnlock()
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			h.ServeHTTP(&pacedWriter{ResponseWriter: w, control: http.NewResponseController(w)}, r)
		}),
		BaseContext:       func(net.Listener) context.Context { return stop },
		ReadHeaderTimeout: readLimit,
		IdleTimeout:       idleLimit,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	stopped := make(chan struct{})
	onEnd := context.AfterFunc(ctx, func() {
		defer close(stopped)
		cancel(context.Cause(ctx))
		limit, done := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
		defer done()
		if s.Shutdown(limit) != nil {
			s.Close()
		}
	})
	err = s.Serve(l)
	if onEnd() { // it ended by itself
		cancel(err)
		s.Close()
		err = fmt.Errorf("control socket %s: %w", path, err)
	} else {
		<-stopped
		err = nil
	}
	running.Lock() // for good: all requests have ended, and none begins
	if rm := os.Remove(path); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("control socket: %w", rm))
	}
	return err
}

// listen opens the socket at path. It is made in a folder that nobody else can enter,
// given its mode and only then its name, so that there is no moment at which others could
// connect; and it listens before it can be found.
func listen(path string) (net.Listener, error) {
	if err := CheckPath(path); err != nil {
		return nil, err
	}
	if err := clear(path); err != nil {
		return nil, err
	}
	folder := filepath.Dir(stagingPath(path))
	if err := os.RemoveAll(folder); err != nil { // a process that was killed left it
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Mkdir(folder, 0o700); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer os.RemoveAll(folder)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stagingPath(path), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w: is the data folder on a local disk?", path, err)
	}
	l.SetUnlinkOnClose(false) // it would remove the name from before
	err = os.Chmod(stagingPath(path), mode)
	if err == nil {
		err = os.Rename(stagingPath(path), path)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// clear makes room at path if nothing lives there.
func clear(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("control socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("control socket: %s is there already and is no socket: move it away, its place is needed", path)
	}
	c, err := net.DialTimeout("unix", path, dialLimit)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("control socket: a running process answers on %s: stop it, or use another data folder", path)
	case !errors.Is(err, syscall.ECONNREFUSED):
		// A live process whose queue is full would look like this.
		return fmt.Errorf("control socket: %w: cannot tell whether a process still lives there; if none does, remove the file", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("control socket: left over from a process that has ended: %w", err)
	}
	return nil
}

// pacedWriter gives the client a new limit for each part of an answer, so that a long
// answer may take its time and a client that stopped reading cannot hold anything up.
type pacedWriter struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (w *pacedWriter) Write(b []byte) (int, error) {
	if err := w.control.SetWriteDeadline(time.Now().Add(writeLimit)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return 0, err
	}
	return w.ResponseWriter.Write(b)
}

func (w *pacedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Answer writes v as JSON with that status.
func Answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // the client went away; nobody else is concerned
}

// Refuse answers a request with why it was not done; the client returns it as an *Error.
func Refuse(w http.ResponseWriter, status int, why string) {
	Answer(w, status, refusal{Error: why})
}

type refusal struct {
	Error string `json:"error"`
}

// Lines writes one JSON value a line while each yields them. What goes wrong after the
// first line cannot change the status any more; the client gets it at the end all the
// same. Nothing written and an error: the answer is 500 with it.
//
// put returns an error when the client has gone.
func Lines(w http.ResponseWriter, each func(put func(v any) error) error) {
	begun := false
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	begin := func() {
		if !begun {
			begun = true
			w.Header().Set("Content-Type", "application/jsonl")
			w.Header().Set("Trailer", errorEndsWith)
		}
	}
	err := each(func(v any) error {
		begin()
		return enc.Encode(v)
	})
	switch {
	case err == nil:
		begin()
		// Chunked also when nothing was written: the client has to see that it is complete.
		_ = http.NewResponseController(w).Flush()
	case begun:
		w.Header().Set(errorEndsWith, oneLine(err.Error()))
	default:
		Refuse(w, http.StatusInternalServerError, err.Error())
	}
}

// oneLine makes a text fit for a header.
func oneLine(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < ' ' || c == 0x7f {
			b[i] = ' '
		}
	}
	return string(b)
}
