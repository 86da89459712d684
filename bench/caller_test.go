package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestCallerReadsAnswers(t *testing.T) {
	for _, c := range []struct {
		name, in string
		status   int
		id, body string
		err      error
	}{
		{"as net/http writes it", "HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nKb-Id: m1\r\nContent-Length: 4\r\n\r\nbody", 202, "m1", "body", nil},
		{"other letters, no body", "HTTP/1.1 200 OK\r\nkb-id:m2\r\ncontent-length: 0\r\n\r\n", 200, "m2", "", nil},
		{"no length", "HTTP/1.1 200 OK\r\n\r\n", 0, "", "", errReply},
		{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0, "", "", errReply},
		{"another protocol", "HTTP/2 200\r\n\r\n", 0, "", "", errReply},
		{"no status", "HTTP/1.1 OK\r\n\r\n", 0, "", "", errReply},
		{"not a header", "HTTP/1.1 200 OK\r\nabc\r\n\r\n", 0, "", "", errReply},
		{"a length that is none", "HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", 0, "", "", errReply},
		{"cut off", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbo", 0, "", "", io.ErrUnexpectedEOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			near, far := net.Pipe()
			defer near.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				defer far.Close()
				_, _ = io.WriteString(far, c.in)
			}()
			r, err := newCaller(near).read()
			near.Close()
			<-done
			if !errors.Is(err, c.err) || c.err == nil && err != nil {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if c.err == nil && (r.status != c.status || r.id != c.id || string(r.body) != c.body) {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestCallerIsUnderstoodByNetHTTP(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("Kb-Id", r.Header.Get("Authorization"))
		w.WriteHeader(http.StatusAccepted)
		_, _ = io.WriteString(w, r.Method+" "+r.URL.Path+" "+r.Header.Get("Prefer")+" "+string(body))
	}))
	defer server.Close()
	address := strings.TrimPrefix(server.URL, "http://")
	c, err := dial(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for range 3 { // on one connection
		r, err := c.call(orderRequest(address, "secret", "wait=0", []byte(`{"a":1}`)))
		if err != nil {
			t.Fatal(err)
		}
		if r.status != 202 || r.id != "Bearer secret" || string(r.body) != `POST /order wait=0 {"a":1}` {
			t.Errorf("%+v %s", r, r.body)
		}
		if err := r.wants(http.StatusOK); err == nil || !strings.Contains(err.Error(), "202") {
			t.Errorf("a wrong status passes: %v", err)
		}
	}
}
