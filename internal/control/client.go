package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
)

// Errors that callers tell apart.
var (
	// ErrNotRunning: no process answers on the socket.
	ErrNotRunning = errors.New("not running")
	// ErrNotYours: the socket, or its folder, belongs to another user.
	ErrNotYours = errors.New("not yours")
)

// Error is what the program answered when it did not do what it was asked.
type Error struct {
	Status int    // of HTTP
	Text   string // why
	Body   []byte // the answer as it came, at most 1 MiB
}

// Error returns the program's own words.
func (e *Error) Error() string { return e.Text }

// Client asks the program that serves at a path. It is safe for concurrent use.
type Client struct {
	path string
	http http.Client
}

// NewClient makes a client; it connects with each request. Close it after use.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			d := net.Dialer{Timeout: dialLimit}
			return d.DialContext(ctx, "unix", path)
		},
		DisableCompression: true,
		Proxy:              nil, // it is no address of a network
	}
	return c
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do asks for target, a path with its query, and decodes the JSON answer into v, which
// may be nil. It waits as long as ctx lets it. Errors: ErrNotRunning, ErrNotYours, an
// *Error when the program refused, else what happened on the way.
func (c *Client) Do(ctx context.Context, method, target string, v any) error {
	body, err := c.ask(ctx, method, target)
	if err != nil {
		return err
	}
	defer body.Close()
	if v == nil {
		_, err = io.Copy(io.Discard, body)
	} else {
		err = json.NewDecoder(body).Decode(v)
	}
	if err != nil {
		return fmt.Errorf("answer from %s: %w", c.path, err)
	}
	return nil
}

// Lines asks for target and hands each line of the answer to f. The answer was complete
// only when Lines returns nil. Errors as of Do, and those of f.
func (c *Client) Lines(ctx context.Context, method, target string, f func(line json.RawMessage) error) error {
	body, err := c.ask(ctx, method, target)
	if err != nil {
		return err
	}
	defer body.Close()
	for d := json.NewDecoder(body); ; {
		var line json.RawMessage
		switch err := d.Decode(&line); {
		case errors.Is(err, io.EOF):
			if why := body.trailer.Get(errorEndsWith); why != "" {
				return fmt.Errorf("the answer is not complete: %s", why)
			}
			return nil
		case err != nil:
			return fmt.Errorf("the answer from %s is not complete: %w", c.path, err)
		}
		if err := f(line); err != nil {
			return err
		}
	}
}

// answer is a body and what follows it.
type answer struct {
	io.ReadCloser
	trailer http.Header // filled in when the body has been read
}

func (c *Client) ask(ctx context.Context, method, target string) (*answer, error) {
	if err := CheckPath(c.path); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://program"+target, nil)
	if err != nil {
		return nil, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if res.StatusCode/100 == 2 {
		return &answer{ReadCloser: res.Body, trailer: res.Trailer}, nil
	}
	defer res.Body.Close()
	const most = 1 << 20
	raw, err := io.ReadAll(io.LimitReader(res.Body, most))
	if err != nil {
		return nil, fmt.Errorf("answer from %s: %w", c.path, err)
	}
	e := &Error{Status: res.StatusCode, Text: strings.TrimSpace(string(raw)), Body: raw}
	var r refusal
	if json.Unmarshal(raw, &r) == nil && r.Error != "" {
		e.Text = r.Error
	}
	return nil, e
}

// explain says what an error of the way means to the one who asked.
func (c *Client) explain(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: there is no socket %s: the program is stopped, or its data folder is another one", ErrNotRunning, c.path)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: %s was left behind by a process that has ended; the next start removes it", ErrNotRunning, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %s%s: run this as the user that the program runs as, or as root", ErrNotYours, c.path, belongs(c.path))
	case errors.Is(err, syscall.ENOTSOCK), errors.Is(err, syscall.EPROTOTYPE):
		return fmt.Errorf("%w: %s is no socket", ErrNotRunning, c.path)
	}
	return fmt.Errorf("ask the program at %s: %w", c.path, err)
}

// belongs says whose the socket is, as far as this user may know.
func belongs(path string) string {
	if _, err := os.Stat(path); err != nil {
		return " is in a folder that this user may not enter"
	}
	return " belongs to another user"
}
