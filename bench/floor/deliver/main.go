// Command deliver is the floor under the router: events from the hub to Kitchens by HTTP,
// and a report of each back to the hub.
//
// Unavoidable: to consume with an acknowledgement for each event, to take the triple
// apart, as its IV and fingerprint are headers and its message is the body, to POST it to
// its site's Kitchen within a time-out and read the answer, to publish a report under an
// id that lets the hub drop a repeat, to wait until that is stored, and to acknowledge the
// event only then. What fails is tried again later.
//
// How: one pull consumer, a goroutine for each event, one http.Transport used directly
// for all sites (no client, no cookies, no redirects), the triple cut at its quotes, the
// report published asynchronously. Nothing is in order and nobody waits for anybody.
//
// Left out, as the product's own: the order within a site, the tag, the deadline, what
// was reported before, sealing and tagging the report, the classification of answers,
// pauses of an endpoint, metrics.
//
// Could it be 10 % faster? Three quarters of the time is net/http's transport and the
// kernel's sockets. A hand-written HTTP/1.1 client, one goroutine for each connection,
// would save about a fifth; it would speak neither TLS nor through a proxy, so no careful
// engineer would ship it in that hour. The hub's client has no cheaper way to publish
// with an acknowledgement; a worker pool instead of a goroutine for each event was tried
// and gained nothing.
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
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/kitchenbridge/kitchenbridge/bench/rig"
)

func main() { os.Exit(rig.Main("deliver", run)) }

const (
	attemptTimeout = 3 * time.Second
	again          = 30 * time.Second // before what failed is tried again
)

func run(ctx context.Context) error {
	hub := flag.String("hub", "", "nats://host:port")
	admin := flag.String("admin", "", "host:port of /readyz")
	file := flag.String("kitchens", "", "JSON file: host:port by site")
	flag.Parse()
	raw, err := os.ReadFile(*file)
	if err != nil {
		return err
	}
	var addresses map[string]string
	if err := json.Unmarshal(raw, &addresses); err != nil {
		return err
	}
	d := &deliverer{urls: make(map[string]*url.URL, len(addresses)), rt: &http.Transport{MaxIdleConnsPerHost: 4, DisableCompression: true}}
	for site, address := range addresses {
		d.urls[site] = &url.URL{Scheme: "http", Host: address, Path: "/order"}
	}
	nc, err := nats.Connect(*hub)
	if err != nil {
		return err
	}
	defer nc.Close()
	if d.js, err = jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(8192)); err != nil {
		return err
	}
	c, err := d.js.CreateConsumer(ctx, "POS", jetstream.ConsumerConfig{Durable: "floor", AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: time.Minute, MaxDeliver: -1, MaxAckPending: 4096})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	consuming, err := c.Consume(func(m jetstream.Msg) {
		wg.Go(func() {
			if err := d.deliver(ctx, m); err != nil {
				_ = m.NakWithDelay(again) // it comes again by itself otherwise
			}
		})
	}, jetstream.PullMaxMessages(512))
	if err != nil {
		return err
	}
	err = rig.Serve(ctx, *admin, nil, func() error { return nil })
	consuming.Stop()
	<-consuming.Closed()
	wg.Wait()
	return err
}

type deliverer struct {
	js   jetstream.JetStream
	rt   http.RoundTripper
	urls map[string]*url.URL
}

// deliver posts one event (pos.<partition>.<site>.<kind>.<edge>), reports, acknowledges.
func (d *deliverer) deliver(ctx context.Context, m jetstream.Msg) error {
	parts := strings.SplitN(m.Subject(), ".", 4)
	if len(parts) < 4 {
		return fmt.Errorf("subject %q", m.Subject())
	}
	u := d.urls[parts[2]]
	if u == nil {
		return fmt.Errorf("site %q has no Kitchen", parts[2])
	}
	h := m.Headers()
	id := h.Get("Kb-Id")
	status, answer, err := d.post(ctx, u, id, m.Data())
	if err != nil {
		return err
	}
	if status/100 != 2 {
		return fmt.Errorf("the Kitchen says %d", status)
	}
	stored, err := d.js.PublishMsgAsync(&nats.Msg{Subject: "kitchen." + parts[2] + ".report", Data: answer,
		Header: nats.Header{"Nats-Msg-Id": {h.Get("Nats-Msg-Id") + ":kitchen:0"}, "Kb-Id": {id}, "Kb-State": {"delivered"}, "Kb-Status": {strconv.Itoa(status)}}})
	if err != nil {
		return err
	}
	select {
	case <-stored.Ok():
		return m.Ack()
	case err := <-stored.Err():
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

var jsonType = []string{"application/json"}

func (d *deliverer) post(ctx context.Context, u *url.URL, id string, triple []byte) (int, []byte, error) {
	iv, fingerprint, message, err := cut(triple)
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	r := (&http.Request{Method: http.MethodPost, URL: u, Host: u.Host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": jsonType, "Sec-Iv": {iv}, "Sec-Fingerprint": {fingerprint}, "Idempotency-Key": {id}},
		Body:   io.NopCloser(bytes.NewReader(message)), ContentLength: int64(len(message))}).WithContext(ctx)
	resp, err := d.rt.RoundTrip(r)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return resp.StatusCode, answer, err
}

var errTriple = errors.New("not a triple as the edge writes it")

// cut takes {"iv":"…","fingerprint":"…","message":"…"} apart at its quotes.
func cut(triple []byte) (iv, fingerprint string, message []byte, err error) {
	rest, ok := bytes.CutPrefix(triple, []byte(`{"iv":"`))
	a, rest, ok1 := bytes.Cut(rest, []byte(`","fingerprint":"`))
	b, rest, ok2 := bytes.Cut(rest, []byte(`","message":"`))
	message, ok3 := bytes.CutSuffix(rest, []byte(`"}`))
	if !ok || !ok1 || !ok2 || !ok3 {
		return "", "", nil, errTriple
	}
	return string(a), string(b), message, nil
}
