package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// caller is a POS with one connection. It speaks as much HTTP/1.1 as it needs, so that
// sending costs a small part of answering, and the sender is not what is measured.
type caller struct {
	conn net.Conn
	in   *bufio.Reader
	body []byte // room for answers
}

// answerLimit bounds one request.
const answerLimit = 30 * time.Second

func dial(ctx context.Context, address string) (*caller, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return newCaller(conn), nil
}

func newCaller(conn net.Conn) *caller {
	return &caller{conn: conn, in: bufio.NewReaderSize(conn, 2048)}
}

// orderRequest is a whole request: POST /order.
func orderRequest(address, token, prefer string, body []byte) []byte {
	b := fmt.Appendf(nil, "POST /order HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nPrefer: %s\r\nContent-Length: %d\r\n\r\n",
		address, token, prefer, len(body))
	return append(b, body...)
}

// reply is what came back. body is valid until the next call.
type reply struct {
	status int
	id     string // Kb-Id
	body   []byte
}

var errReply = errors.New("not an answer in HTTP/1.1 with a length")

// call sends a request and reads the answer.
func (c *caller) call(request []byte) (reply, error) {
	if err := c.conn.SetDeadline(time.Now().Add(answerLimit)); err != nil {
		return reply{}, err
	}
	if _, err := c.conn.Write(request); err != nil {
		return reply{}, err
	}
	return c.read()
}

func (c *caller) read() (reply, error) {
	var r reply
	line, err := c.line()
	if err != nil {
		return r, err
	}
	rest, ok := bytes.CutPrefix(line, []byte("HTTP/1.1 "))
	if !ok || len(rest) < 3 {
		return r, fmt.Errorf("%w: %.40q", errReply, line)
	}
	if r.status, err = strconv.Atoi(string(rest[:3])); err != nil {
		return r, fmt.Errorf("%w: %.40q", errReply, line)
	}
	length := -1
	for {
		if line, err = c.line(); err != nil {
			return r, err
		}
		if len(line) == 0 {
			break
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			return r, fmt.Errorf("%w: %.40q", errReply, line)
		}
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			if length, err = strconv.Atoi(string(value)); err != nil || length > 1<<20 {
				return r, fmt.Errorf("%w: %.40q", errReply, line)
			}
		case bytes.EqualFold(name, []byte("Kb-Id")):
			r.id = string(value)
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			return r, fmt.Errorf("%w: %.40q", errReply, line)
		}
	}
	if length < 0 {
		return r, errReply
	}
	if cap(c.body) < length {
		c.body = make([]byte, length)
	}
	r.body = c.body[:length]
	_, err = io.ReadFull(c.in, r.body)
	return r, err
}

// line reads up to a line's end, and leaves that out.
func (c *caller) line() ([]byte, error) {
	line, err := c.in.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	return bytes.TrimRight(line, "\r\n"), nil
}

func (c *caller) close() error { return c.conn.Close() }

// wants demands a status.
func (r reply) wants(status int) error {
	if r.status != status {
		return fmt.Errorf("%d %s, not %d: %.200s", r.status, http.StatusText(r.status), status, r.body)
	}
	return nil
}
