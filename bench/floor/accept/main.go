// Command accept is the floor under the edge: orders by HTTP in, events at the hub out.
//
// Unavoidable: to read an HTTP request, to know by its token whose site it is, to draw an
// IV, to seal the body with the site's key, to write the triple as text, to publish it
// under an id that lets the hub drop a repeat, to wait for the hub's acknowledgement, and
// to answer 202 with the id.
//
// How: net/http with one handler and no router; a map from token to site; AES-256-GCM and
// base64 appended straight into the message's body; one request to the hub for each
// order, its id a counter. The orders of one site are published as they come, at the same
// time and in no order.
//
// Left out, as the product's own: whether the body is JSON, order within a site and its
// numbers, the tag, the register that recognizes what comes again, the order's id, limits,
// metrics, time-outs other than the hub's.
//
// Could it be 10 % faster? net/http is half of the time; a hand-written HTTP server would
// save perhaps a third of that, and nobody should put one in front of strangers. The
// request to the hub is nats.go's own; publishing asynchronously with one waiting list
// would save a channel for each order, about 1 µs of 60. Sealing is 2 µs.
package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
)

func main() { os.Exit(rig.Main("accept", run)) }

// siteFile is a site as the bench writes it.
type siteFile struct {
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"`
	Phrase      string `json:"phrase"`
	Token       string `json:"token"`
}

func run(ctx context.Context) error {
	hub := flag.String("hub", "", "nats://host:port")
	listen := flag.String("listen", "", "host:port for orders, and /readyz")
	file := flag.String("sites", "", "JSON file of the sites")
	flag.Parse()
	raw, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var sites []siteFile
	if err := json.Unmarshal(raw, &sites); err != nil {
		return err
	}
	nc, err := nats.Connect(*hub)
	if err != nil {
		return err
	}
	defer nc.Close()
	s := &server{publish: func(m *nats.Msg) (*nats.Msg, error) { return nc.RequestMsg(m, 5*time.Second) }, sites: make(map[string]*site),
		run: strconv.FormatInt(time.Now().UnixNano(), 36)}
	for _, f := range sites {
		if s.sites["Bearer "+f.Token], err = newSite(f); err != nil {
			return err
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	srv := &http.Server{Addr: *listen, ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			mux.ServeHTTP(w, r)
			return
		}
		s.order(w, r)
	})}
	defer context.AfterFunc(ctx, func() { srv.Close() })()
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

type site struct {
	subject string
	head    string // of the triple's JSON, up to the IV
	middle  string // from the IV to the message
	aead    cipher.AEAD
}

func newSite(f siteFile) (*site, error) {
	key, err := pbkdf2.Key(sha256.New, f.Phrase, nil, 1, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &site{subject: "pos." + f.Name + ".order.floor", head: `{"iv":"`, middle: `","fingerprint":"` + f.Fingerprint + `","message":"`, aead: aead}, nil
}

type server struct {
	publish func(*nats.Msg) (*nats.Msg, error)
	sites   map[string]*site // by Authorization
	run     string           // makes the ids of this process its own
	ids     atomic.Uint64
}

func (s *server) order(w http.ResponseWriter, r *http.Request) {
	t := s.sites[r.Header.Get("Authorization")]
	if t == nil || r.ContentLength <= 0 || r.ContentLength > 128<<10 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	plain := make([]byte, r.ContentLength, int(r.ContentLength)+t.aead.Overhead())
	if _, err := io.ReadFull(r.Body, plain); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	id := s.run + strconv.FormatUint(s.ids.Add(1), 36)
	reply, err := s.publish(&nats.Msg{Subject: t.subject, Header: nats.Header{"Nats-Msg-Id": {id}, "Kb-Id": {id}}, Data: t.seal(plain)})
	if err == nil {
		err = acknowledged(reply.Data)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusAccepted)
	_, _ = io.WriteString(w, `{"id":"`+id+`"}`)
}

// seal makes the triple. The plaintext is overwritten.
func (t *site) seal(plain []byte) []byte {
	var iv [12]byte
	rand.Read(iv[:])
	sealed := t.aead.Seal(plain[:0], iv[:], plain, nil)
	b := make([]byte, 0, len(t.head)+16+len(t.middle)+base64.StdEncoding.EncodedLen(len(sealed))+2)
	b = append(b, t.head...)
	b = base64.StdEncoding.AppendEncode(b, iv[:])
	b = append(b, t.middle...)
	b = base64.StdEncoding.AppendEncode(b, sealed)
	return append(b, `"}`...)
}

// acknowledged reads the hub's word.
func acknowledged(data []byte) error {
	var ack struct {
		Seq   uint64          `json:"seq"`
		Error json.RawMessage `json:"error"`
	}
	if err := json.Unmarshal(data, &ack); err != nil {
		return err
	}
	if ack.Seq == 0 {
		return fmt.Errorf("not stored: %s", ack.Error)
	}
	return nil
}
