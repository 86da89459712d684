package router

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
)

// endpoint is one site's Kitchen. Its state is explicit and stands here only: open,
// paused until a time, or stopped. It outlives the partitions' owners, so that what a
// Kitchen asked for is kept when the hub's connection comes back.
type endpoint struct {
	// Fixed at birth.
	site    string
	name    string
	cfg     KitchenConfig
	router  *Config
	base    url.URL
	timeout time.Duration
	fixed   http.Header // what every POST carries, without the credential
	rt      http.RoundTripper
	close   func() // idle connections

	credential atomic.Pointer[[]string] // the Authorization header's values, nil without

	mu sync.Mutex
	// Guarded by mu.
	until    time.Time // paused until then
	failures int       // attempts in a row that call for another one later
	stopped  bool      // by 410, until the next start
	proven   bool      // it has taken something: it can decrypt
	alarmed  alarms
}

func newEndpoint(site string, cfg KitchenConfig, router *Config, closing context.Context) (*endpoint, error) {
	base, err := cfg.base()
	if err != nil {
		return nil, fmt.Errorf("sites.%s.url: %w", site, err)
	}
	tlsConfig, err := cfg.tlsConfig()
	if err != nil {
		return nil, fmt.Errorf("sites.%s.ca_file: %w", site, err)
	}
	e := &endpoint{
		site:    site,
		name:    cmp.Or(cfg.Endpoint, defaultEndpoint),
		cfg:     cfg,
		router:  router,
		base:    *base,
		timeout: cmp.Or(cfg.Timeout, router.AttemptTimeout),
		fixed: http.Header{
			"Content-Type": {"application/json"},
			"Accept":       {"application/json"},
			"User-Agent":   {"kitchenbridge"},
		},
	}
	for name, value := range cfg.Headers {
		e.fixed[textproto.CanonicalMIMEHeaderKey(name)] = []string{value}
	}
	if err := e.readCredential(); err != nil {
		return nil, fmt.Errorf("sites.%s.authorization_file: %w", site, err)
	}
	// A dial may outlive the attempt it began for, not the router.
	dialer := net.Dialer{Timeout: e.timeout, KeepAlive: 30 * time.Second}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			defer context.AfterFunc(closing, cancel)()
			return dialer.DialContext(ctx, network, addr)
		},
		TLSClientConfig:        tlsConfig,
		TLSHandshakeTimeout:    e.timeout,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           2,
		MaxIdleConnsPerHost:    2,
		MaxConnsPerHost:        4,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		// The report holds the answer as it came.
		DisableCompression: true,
	}
	e.rt = t
	e.close = t.CloseIdleConnections
	return e, nil
}

func (e *endpoint) readCredential() error {
	secret, err := e.cfg.authorization()
	if err != nil {
		return err
	}
	if secret == "" {
		return nil
	}
	e.credential.Store(&[]string{secret.Reveal()})
	return nil
}

// answer is what came of one attempt.
type answer struct {
	status int // 0: none
	header http.Header
	body   []byte // at most MaxAnswer bytes

	failure Reason // why there is none
	err     error
	// sent: the request may have reached the Kitchen. An answer that is missing then is
	// an unknown outcome.
	sent bool
}

func (a *answer) unanswered() bool { return a.status == 0 && a.sent }

// post makes one attempt, which ends by the item's deadline. It follows no redirect and
// never sends twice: the transport could repeat a request that carries an
// Idempotency-Key by itself, were it able to rewind the body, and would not wait for
// what the first one does (I4).
func (e *endpoint) post(ctx context.Context, d *broker.Delivery, f form, attempt int, deadline time.Time) answer {
	until := time.Now().Add(e.timeout)
	if deadline.Before(until) {
		until = deadline
	}
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	var used atomic.Pointer[net.Conn]
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { used.Store(&i.Conn) },
	})
	resp, err := e.rt.RoundTrip(e.request(d, f, attempt, deadline).WithContext(ctx))
	if err != nil {
		return noAnswer(ctx, err, used.Load())
	}
	defer resp.Body.Close()
	body, err := readAnswer(resp, e.router.MaxAnswer)
	if err != nil && resp.StatusCode == http.StatusBadRequest {
		// What a 400 means stands in its body.
		return noAnswer(ctx, err, used.Load())
	}
	return answer{status: resp.StatusCode, header: resp.Header, body: body, sent: true}
}

// noAnswer says why there is none, and closes the connection if there was one: HTTP/1
// would do so itself, HTTP/2 would go on using it. The connection belongs to the
// transport, which finds it broken and makes another.
func noAnswer(ctx context.Context, err error, used *net.Conn) answer {
	if used != nil {
		conn := *used
		if secure, ok := conn.(*tls.Conn); ok {
			conn = secure.NetConn() // without a word to the other side, which may not listen
		}
		if conn != nil {
			_ = conn.Close()
		}
	}
	return answer{failure: failureOf(ctx, err, used != nil), err: err, sent: used != nil}
}

func failureOf(ctx context.Context, err error, sent bool) Reason {
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return ReasonDNS
	}
	if isTLS(err) {
		return ReasonTLS
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return ReasonRefusedConn
	case ctx.Err() != nil:
		return ReasonTimeout
	case sent:
		return ReasonCut
	}
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
		return ReasonTimeout
	}
	return ReasonNetwork
}

func isTLS(err error) bool {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.AlertError](err); ok {
		return true
	}
	_, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok
}

// request builds the POST. Header values share one array, and those that never change
// are shared by all requests, which a transport must not alter.
func (e *endpoint) request(d *broker.Delivery, f form, attempt int, deadline time.Time) *http.Request {
	ev := &d.Event
	u := e.base // a copy
	u.Path += "/" + ev.Kind
	if u.RawPath != "" {
		u.RawPath += "/" + ev.Kind
	}
	h := make(http.Header, len(e.fixed)+9)
	maps.Copy(h, e.fixed)
	if c := e.credential.Load(); c != nil {
		h["Authorization"] = *c
	}
	values := make([]string, 0, 8)
	set := func(name, value string) {
		values = append(values, value)
		h[name] = values[len(values)-1 : len(values) : len(values)]
	}
	if f.sealed() {
		set("Sec-Iv", f.iv)
		set("Sec-Fingerprint", f.fingerprint)
	}
	set("Idempotency-Key", ev.ID)
	set("Kb-Seq", strconv.FormatUint(ev.Seq, 10))
	set("Kb-Edge", ev.Edge+"."+ev.Epoch)
	set("Kb-Attempt", strconv.Itoa(attempt))
	set("Kb-Deadline", strconv.FormatInt(deadline.UnixMilli(), 10))
	if ev.Traceparent != "" {
		set("Traceparent", ev.Traceparent)
	}
	return &http.Request{
		Method:        http.MethodPost,
		URL:           &u,
		Host:          u.Host,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        h,
		Body:          io.NopCloser(bytes.NewReader(f.body)),
		ContentLength: int64(len(f.body)),
	}
}

// drainMost is how much of an answer beyond MaxAnswer is read so that the connection can
// be used again; a longer one costs the connection.
const drainMost = 256 << 10

// readAnswer reads what the report keeps of the body.
func readAnswer(resp *http.Response, most int) ([]byte, error) {
	if resp.ContentLength == 0 || resp.Body == http.NoBody {
		return nil, nil
	}
	var b bytes.Buffer
	if n := resp.ContentLength; n > 0 && n <= int64(most) {
		b.Grow(int(n) + bytes.MinRead)
	}
	_, err := b.ReadFrom(io.LimitReader(resp.Body, int64(most)))
	if err == nil && b.Len() == most {
		// Whether the rest can be read does not matter: without it the connection is closed.
		_, _ = io.CopyN(io.Discard, resp.Body, drainMost)
	}
	return b.Bytes(), err
}

// wait says until when nothing may be posted, and whether ever again.
func (e *endpoint) wait() (until time.Time, stopped bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.until, e.stopped
}

// pause keeps the endpoint from being posted to for at least d.
func (e *endpoint) pause(now time.Time, d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pauseLocked(now.Add(d))
}

func (e *endpoint) pauseLocked(until time.Time) {
	if until.After(e.until) {
		e.until = until
	}
}

// failed notes an attempt that calls for another one later, and pauses the endpoint: for
// what the Kitchen asked for, else with back-off; and at least settle when the outcome is
// unknown. first is true when the endpoint worked before.
func (e *endpoint) failed(now time.Time, a *answer) (first bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failures++
	pause := e.backoff(e.failures)
	if asked, ok := retryAfter(a.header, now); ok && asked > 0 {
		pause = min(asked, e.router.RetryAfterMax)
	}
	if a.unanswered() {
		pause = max(pause, e.router.Settle)
	}
	e.pauseLocked(now.Add(pause))
	return e.failures == 1
}

// backoff draws from zero to a cap that doubles with each failure: full jitter.
func (e *endpoint) backoff(failures int) time.Duration {
	limit := e.router.BackoffMin
	for range failures - 1 {
		if limit >= e.router.BackoffMax/2 {
			limit = e.router.BackoffMax
			break
		}
		limit *= 2
	}
	return rand.N(limit + 1)
}

// answered notes that the Kitchen works, whatever it thinks of an event. It returns how
// many attempts had failed before.
func (e *endpoint) answered(taken bool) (failures int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	failures, e.failures = e.failures, 0
	if taken {
		e.proven = true
		e.alarmed = nil
	}
	return failures
}

func (e *endpoint) isProven() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.proven
}

func (e *endpoint) prove() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.proven = true
}

// stop ends the endpoint until the next start.
func (e *endpoint) stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stopped = true
}

// alarms remembers when each was last raised.
type alarms map[Reason]time.Time

const alarmAgain = time.Minute

// alarm tells whether to raise one now: at once the first time, then once a minute until
// the endpoint takes something.
func (e *endpoint) alarm(r Reason, now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if last, ok := e.alarmed[r]; ok && now.Sub(last) < alarmAgain {
		return false
	}
	if e.alarmed == nil {
		e.alarmed = make(alarms)
	}
	e.alarmed[r] = now
	return true
}
