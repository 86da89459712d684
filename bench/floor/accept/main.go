// Command accept is the floor under the edge: orders by HTTP in, each of them on the disk
// before its 202.
//
// Unavoidable: to read an HTTP request, to know by its token whose site it is, to store as
// many bytes as the sealed order has under a subject of its site, to wait until the disk
// has them, and to answer 202 with the id.
//
// How: net/http with one handler and no router; a map from token to subject; an embedded
// JetStream server, SyncAlways, spoken to in process; one publish for each request, and its
// PubAck awaited. Requests publish as they come, at the same time and in no order. The
// order is not sealed: it is filled up to the size that it would have.
//
// Left out, as the product's own: whether the body is JSON, sealing, encryption of the
// stream at rest, order within a site and its numbers, the tag, the register that
// recognizes what comes again, the order's id, limits, metrics, forwarding to the hub.
//
// Could it be 10 % faster? JetStream syncs once for each message, one after the other, so the
// disk sets the pace: a loop that does nothing but append as many bytes to a file and sync
// it is faster by a sixth, and speaks no HTTP. Connections to the server in process were
// tried in numbers from 1 to 8 and made no difference. What would help is to let requests
// share a sync: that is the product's part, and why its budget is a multiple.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
)

func main() { os.Exit(rig.Main("accept", run)) }

const (
	streamName = "OUT"
	patience   = 5 * time.Second // with the disk
	maxBody    = 128 << 10
	// sealed is how long an order of 1 KiB is when it is sealed and written as a triple.
	sealed = 1536
)

func run(ctx context.Context) error {
	listen := flag.String("listen", "", "host:port for orders, /readyz, /stored and /last")
	data := flag.String("data", "", "folder of the stream")
	file := flag.String("sites", "", "JSON file: the site's name by its token")
	flag.Parse()
	raw, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var sites map[string]string
	if err := json.Unmarshal(raw, &sites); err != nil {
		return err
	}
	srv, err := startServer(*data)
	if err != nil {
		return err
	}
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	nc, err := nats.Connect("", nats.InProcessServer(srv))
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	out, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: streamName, Subjects: []string{"pos.>"}, Discard: jetstream.DiscardNew, AllowDirect: true})
	if err != nil {
		return err
	}
	s := newServer(sites, func(subject string, body []byte) ([]byte, error) {
		m, err := nc.Request(subject, body, patience)
		if err != nil {
			return nil, err
		}
		return m.Data, nil
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /stored", func(w http.ResponseWriter, r *http.Request) {
		info, err := out.Info(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		rig.WriteJSON(w, info.State.Msgs)
	})
	mux.HandleFunc("GET /last/{site}", func(w http.ResponseWriter, r *http.Request) {
		m, err := out.GetLastMsgForSubject(r.Context(), subjectOf(r.PathValue("site")))
		if err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		_, _ = w.Write(m.Data)
	})
	web := &http.Server{Addr: *listen, ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			mux.ServeHTTP(w, r)
			return
		}
		s.order(w, r)
	})}
	defer context.AfterFunc(ctx, func() { web.Close() })()
	if err := web.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// startServer runs JetStream in this process, for this process.
func startServer(dir string) (*server.Server, error) {
	srv, err := server.NewServer(&server.Options{ServerName: "floor", DontListen: true, NoSigs: true, NoLog: true,
		JetStream: true, StoreDir: dir, JetStreamMaxStore: 1 << 40, SyncAlways: true})
	if err != nil {
		return nil, err
	}
	srv.Start()
	if !srv.ReadyForConnections(10 * time.Second) {
		return nil, errors.New("the embedded server is not ready")
	}
	return srv, nil
}

func subjectOf(site string) string { return "pos." + site + ".order" }

type handler struct {
	publish  func(subject string, body []byte) (ack []byte, err error)
	subjects map[string]string // by Authorization
}

func newServer(sites map[string]string, publish func(string, []byte) ([]byte, error)) *handler {
	s := &handler{publish: publish, subjects: make(map[string]string, len(sites))}
	for token, site := range sites {
		s.subjects["Bearer "+token] = subjectOf(site)
	}
	return s
}

var filling = bytes.Repeat([]byte{'.'}, sealed)

func (s *handler) order(w http.ResponseWriter, r *http.Request) {
	subject := s.subjects[r.Header.Get("Authorization")]
	if subject == "" || r.ContentLength <= 0 || r.ContentLength > maxBody {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	n := int(r.ContentLength)
	body := make([]byte, max(n, sealed))
	if _, err := io.ReadFull(r.Body, body[:n]); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	copy(body[n:], filling)
	ack, err := s.publish(subject, body)
	var seq uint64
	if err == nil {
		seq, err = acknowledged(ack)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusAccepted)
	_, _ = io.WriteString(w, `{"id":"`+strconv.FormatUint(seq, 10)+`"}`)
}

// acknowledged reads the sequence out of {"stream":"OUT","seq":7}.
func acknowledged(ack []byte) (uint64, error) {
	rest, ok := bytes.CutPrefix(ack, []byte(`{"stream":"`+streamName+`","seq":`))
	digits, ends := bytes.CutSuffix(rest, []byte(`}`))
	if seq, err := strconv.ParseUint(string(digits), 10, 64); ok && ends && err == nil {
		return seq, nil
	}
	return 0, fmt.Errorf("not stored: %.200s", ack)
}
