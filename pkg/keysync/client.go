package keysync

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	// tokenLife is how long the Portal accepts an issued token; a new one is asked for
	// tokenEarly before that, so that a day's outage of the token endpoint costs nothing.
	tokenLife  = 21 * 24 * time.Hour
	tokenEarly = 24 * time.Hour

	// maxRetryAfter bounds what a Retry-After can ask for: a mistake there must not silence
	// the refresh for a day.
	maxRetryAfter = time.Hour

	maxTokenBytes = 16 << 10
	maxRedirects  = 3
)

// errTimeout is the cause of a request that portal.timeout ended.
var errTimeout = errors.New("no complete answer in time")

// client speaks to the Portal. It is safe for concurrent use.
type client struct {
	// Fixed at birth.
	sites    *url.URL
	http     *http.Client
	tokens   *tokens
	scheme   string // before the token in Authorization, with its blank
	timeout  time.Duration
	maxBytes int64
}

// answer is what the Portal said about a site: unchanged, or a document.
type answer struct {
	unchanged bool
	body      []byte
	etag      string
}

// newClient reads the files that c names and reports every mistake in them at once. It
// connects to nothing. c is valid and holds no defaults any more.
func newClient(c PortalConfig) (*client, error) {
	base, err := url.Parse(c.URL)
	if err != nil {
		return nil, fmt.Errorf("portal.url: %w", err)
	}
	var errs []error
	tlsConfig := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		pem, err := os.ReadFile(c.CAFile)
		tlsConfig.RootCAs = x509.NewCertPool()
		if err != nil {
			errs = append(errs, fmt.Errorf("portal.ca_file: %w", err))
		} else if !tlsConfig.RootCAs.AppendCertsFromPEM(pem) {
			errs = append(errs, fmt.Errorf("portal.ca_file: %s holds no PEM certificate", c.CAFile))
		}
	}
	p := &client{
		sites: base.JoinPath("sites"), timeout: c.Timeout, maxBytes: c.MaxBytes,
		http: &http.Client{
			CheckRedirect: checkRedirect,
			Transport: &http.Transport{
				Proxy:           http.ProxyFromEnvironment,
				TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true,
				MaxIdleConns: 2 * concurrency, MaxIdleConnsPerHost: concurrency,
				// Longer than the usual poll, so that its connection is there for the next one.
				IdleConnTimeout:        3 * time.Minute,
				MaxResponseHeaderBytes: 64 << 10,
			},
		},
	}
	if c.AuthScheme != "none" {
		p.scheme = c.AuthScheme + " "
	}
	if c.TokenFile != "" {
		if _, err := readToken(c.TokenFile); err != nil {
			errs = append(errs, fmt.Errorf("portal.token_file: %w", err))
		}
		p.tokens = newTokens(0, func(context.Context) (envelope.Secret, error) {
			token, err := readToken(c.TokenFile)
			if err != nil {
				return "", refused(tokenFailed, "portal.token_file: %w", err)
			}
			return token, nil
		})
	} else {
		if _, err := readSecret(c.SecretKeyFile); err != nil {
			errs = append(errs, fmt.Errorf("portal.secret_key_file: %w", err))
		}
		endpoint, err := url.Parse(c.TokenURL)
		if err != nil {
			return nil, fmt.Errorf("portal.token_url: %w", err)
		}
		endpoint = endpoint.JoinPath("integrator", "token")
		p.tokens = newTokens(tokenLife, func(ctx context.Context) (envelope.Secret, error) {
			return p.issue(ctx, endpoint, c.KeyID, c.SecretKeyFile)
		})
	}
	return p, errors.Join(errs...)
}

// checkRedirect follows a redirect of a GET within the same scheme and host; any other
// one is handed back as the answer, and refused there: it would carry the token to
// somebody else, or in clear.
func checkRedirect(next *http.Request, via []*http.Request) error {
	first := via[0]
	if first.Method != http.MethodGet || next.URL.Scheme != first.URL.Scheme || next.URL.Host != first.URL.Host || len(via) > maxRedirects {
		return http.ErrUseLastResponse
	}
	return nil
}

// get fetches the object of one site, with etag as the condition when it is not empty.
// Its errors are *fetchError, or the context's cause when ctx ended.
func (p *client) get(ctx context.Context, site, etag string) (answer, error) {
	token, err := p.tokens.get(ctx)
	if err != nil {
		return answer{}, err
	}
	a, err := p.getWith(ctx, site, etag, token)
	if bad, ok := errors.AsType[*fetchError](err); ok && bad.reason == unauthorized && p.tokens.drop(token) {
		// The token may have ended early, or been replaced: once with another one.
		fresh, err := p.tokens.get(ctx)
		if err != nil {
			return answer{}, err
		}
		if fresh != token {
			return p.getWith(ctx, site, etag, fresh)
		}
	}
	return a, err
}

func (p *client) getWith(ctx context.Context, site, etag string, token envelope.Secret) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.sites.JoinPath(site).String(), nil)
	if err != nil {
		return answer{}, refused(noConnection, "the request could not be made: portal.url and site give no URL")
	}
	req.Header.Set("Authorization", p.scheme+token.Reveal())
	if etag != "" {
		req.Header.Set("If-None-Match", etag)
	}
	status, header, body, err := p.do(ctx, req, p.maxBytes)
	switch {
	case err != nil:
		return answer{}, err
	case status == http.StatusNotModified && etag != "":
		return answer{unchanged: true}, nil
	case status != http.StatusOK:
		return answer{}, refusal("the Portal", status, header)
	}
	return answer{body: body, etag: header.Get("Etag")}, nil
}

// issue asks the token endpoint for a token.
func (p *client) issue(ctx context.Context, endpoint *url.URL, keyID, secretKeyFile string) (envelope.Secret, error) {
	secret, err := readSecret(secretKeyFile)
	if err != nil {
		return "", refused(tokenFailed, "portal.secret_key_file: %w", err)
	}
	in, err := json.Marshal(map[string]string{"key_id": keyID, "secret_key": secret.Reveal()})
	if err != nil {
		return "", refused(tokenFailed, "portal.secret_key_file: its text cannot stand in JSON")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint.String(), bytes.NewReader(in))
	if err != nil {
		return "", refused(tokenFailed, "the request could not be made: portal.token_url is no URL")
	}
	req.Header.Set("Content-Type", "application/json")
	status, header, body, err := p.do(ctx, req, maxTokenBytes)
	if err == nil && status != http.StatusOK && status != http.StatusCreated {
		err = refusal("the token endpoint", status, header)
	}
	if bad, ok := errors.AsType[*fetchError](err); ok {
		return "", &fetchError{reason: tokenFailed, text: "no token: " + bad.Error(), cause: bad.cause, retryAfter: bad.retryAfter}
	}
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(body))
	if strings.HasPrefix(text, `"`) && json.Unmarshal([]byte(text), &text) != nil {
		text = ""
	}
	if !isToken(text) {
		return "", refused(tokenFailed, "no token: the answer is not a bare or quoted token")
	}
	return envelope.Secret(text), nil
}

// isToken reports whether text can stand as credentials in Authorization (RFC 9110,
// token68), so that a log-in page or a JSON object is not taken for a token.
func isToken(text string) bool {
	for _, c := range []byte(text) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~+/=:", c) >= 0) {
			return false
		}
	}
	return text != ""
}

// do sends req and reads the whole answer, at most limit bytes, within the time-out:
// headers and body together, so that a slow drip ends as well.
func (p *client) do(ctx context.Context, req *http.Request, limit int64) (status int, _ http.Header, body []byte, _ error) {
	bounded, cancel := context.WithTimeoutCause(ctx, p.timeout, errTimeout)
	defer cancel()
	var connected atomic.Bool
	bounded = httptrace.WithClientTrace(bounded, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	})
	broken := func(err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(context.Cause(bounded), errTimeout):
			return &fetchError{reason: timedOut, text: fmt.Sprintf("no complete answer within %v", p.timeout), cause: err}
		case connected.Load():
			return &fetchError{reason: cutOff, text: "the connection ended before a whole HTTP answer was there", cause: err}
		}
		return noConn(err)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "kitchenbridge")
	resp, err := p.http.Do(req.WithContext(bounded))
	if err != nil {
		return 0, nil, nil, broken(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		// What an error page says is not for us, but reading it keeps the connection.
		io.CopyN(io.Discard, resp.Body, 16<<10)
		return resp.StatusCode, resp.Header, nil, nil
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return 0, nil, nil, broken(err)
	}
	if int64(len(body)) > limit {
		return 0, nil, nil, refused(tooLarge, "the answer is longer than %d bytes", limit)
	}
	return resp.StatusCode, resp.Header, body, nil
}

// noConn says why there is no connection. The texts of net/http quote URLs and whatever
// a server sent in place of HTTP, so only those of the lower layers are passed on.
func noConn(err error) *fetchError {
	e := &fetchError{reason: noConnection, text: "no connection", cause: err}
	if cert, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		e.reason, e.text = badTLS, "certificate: "+cert.Err.Error()+": does portal.ca_file name the right authority?"
	} else if alert, ok := errors.AsType[tls.AlertError](err); ok {
		e.reason, e.text = badTLS, alert.Error()
	} else if _, ok := errors.AsType[tls.RecordHeaderError](err); ok || errors.Is(err, http.ErrSchemeMismatch) {
		e.reason, e.text = badTLS, "the other side does not speak TLS"
	} else if dns, ok := errors.AsType[*net.DNSError](err); ok {
		e.text = dns.Error()
	} else if op, ok := errors.AsType[*net.OpError](err); ok {
		e.text = op.Error()
	}
	return e
}

// refusal turns a status that is not 200 into an error.
func refusal(who string, status int, header http.Header) *fetchError {
	e := &fetchError{text: fmt.Sprintf("%s answered %d", who, status)}
	switch {
	case status == http.StatusUnauthorized:
		e.reason = unauthorized
	case status == http.StatusForbidden:
		e.reason = forbidden
	case status == http.StatusNotFound:
		e.reason = notFound
	case status == http.StatusTooManyRequests:
		e.reason, e.retryAfter = rateLimited, retryAfter(header, time.Now())
	case status == http.StatusServiceUnavailable:
		e.reason, e.retryAfter = serverError, retryAfter(header, time.Now())
	case status >= 500:
		e.reason = serverError
	case status >= 300 && status < 400 && status != http.StatusNotModified:
		e.reason, e.text = redirect, e.text+": redirects to http, to another host or in a circle are not followed"
	default:
		e.reason = badStatus
	}
	return e
}

// retryAfter reads both forms of Retry-After, at most maxRetryAfter; 0 when it is absent,
// past or no such text. A date is compared with the answer's own Date where it has one:
// the two clocks need not agree.
func retryAfter(h http.Header, now time.Time) time.Duration {
	text := h.Get("Retry-After")
	if s, err := strconv.ParseUint(text, 10, 31); err == nil {
		return min(time.Duration(s)*time.Second, maxRetryAfter)
	}
	at, err := http.ParseTime(text)
	if err != nil {
		return 0
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date
	}
	return max(0, min(at.Sub(now), maxRetryAfter))
}

// readSecret reads a text out of a file that strangers cannot read; white space round it
// is not part of it.
func readSecret(path string) (envelope.Secret, error) {
	b, err := readPrivate(path, 0o007, maxTokenBytes)
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(string(b))
	if text == "" {
		return "", fmt.Errorf("%s is empty", path)
	}
	return envelope.Secret(text), nil
}

// readToken is readSecret for what must stand in a header.
func readToken(path string) (envelope.Secret, error) {
	token, err := readSecret(path)
	if strings.ContainsFunc(token.Reveal(), func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", fmt.Errorf("%s holds something else than one token of visible ASCII characters", path)
	}
	return token, err
}

// readPrivate reads a regular file of at most limit bytes, none of whose permission bits
// are among forbidden.
func readPrivate(path string, forbidden os.FileMode, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if open := info.Mode().Perm() & forbidden; open != 0 {
		return nil, fmt.Errorf("%s has mode %04o, so others than its owner can reach the secrets in it: run chmod %04o %s",
			path, info.Mode().Perm(), info.Mode().Perm()&^forbidden&0o600, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return b, nil
}

// checkURL reports why text cannot be a Portal's base address.
func checkURL(text string, insecure bool) error {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		// Its error would quote the address, which may hold a password.
		return errors.New("not a URL")
	case u.Host == "" || u.Hostname() == "":
		return errors.New("a whole address was expected, as in https://portal.example")
	case u.User != nil:
		return errors.New("a user or password in it is not supported: use token_file, or key_id with secret_key_file")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return errors.New("a query or fragment in it is not supported")
	case u.Scheme == "http" && !insecure && !isLoopback(u.Hostname()):
		return errors.New("https is required: keys would travel in clear (insecure: true allows it all the same)")
	case u.Scheme != "http" && u.Scheme != "https":
		return fmt.Errorf("scheme %q is not supported: use https", cmp.Or(u.Scheme, "(none)"))
	}
	return nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
