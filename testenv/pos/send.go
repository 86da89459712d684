package pos

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// wire is a message as it goes out.
type wire struct {
	iv, fingerprint string // "" for plain
	body            []byte
}

// deliver sends one message, with as many attempts as it takes and may take, and puts its
// order's next version in line.
func (d *Driver) deliver(ctx context.Context, j job) {
	m := d.gen.Message(j.index, j.version)
	e := &Entry{
		Site: d.cfg.Site, Kind: m.Kind, OrderID: m.OrderID, Version: m.Version,
		PayloadHash: vendorcrypto.PayloadHash(m.Body), Sent: time.Now(),
	}
	if d.cfg.IdempotencyKeys {
		e.Key = fmt.Sprintf("%s-%d", m.OrderID, m.Version)
	}
	d.begin(e)
	end := d.attempts(ctx, e, m)
	d.change(e, func() {
		e.State, e.Answered = end, time.Now()
		switch {
		case end == Delivered || end == Failed:
			e.Settled = e.Answered
		case e.Location != "" && (end == Pending || end == Unknown):
			d.open = append(d.open, e)
		}
		if end.Accepted() {
			d.answer.add(e.Answered.Sub(e.Sent))
		}
	})
	// Of a message without an answer nobody knows where it stands, so nothing is sent that
	// would have to come after it. A refused order has no updates.
	if end.Accepted() && j.version < d.gen.Versions(j.index) {
		d.mu.Lock()
		d.updates = append(d.updates, job{j.index, j.version + 1})
		d.mu.Unlock()
	}
}

// attempts tries until something is certain or may not be tried again.
func (d *Driver) attempts(ctx context.Context, e *Entry, m Message) State {
	var out *wire
	mismatched := false
	for n := 1; ; n++ {
		v := verdict{retry: true, certain: true}
		var err error
		if out == nil || e.Key != "" {
			out, err = d.seal(m)
		}
		if err == nil {
			v, err = d.attempt(ctx, e, m.Kind, out)
		}
		d.change(e, func() {
			e.Attempts = n
			e.Doubtful = e.Doubtful || !v.certain
			e.Status, e.Code, e.Reason, e.Kitchen, e.Location, e.Err = v.status, v.code, v.reason, v.kitchen, v.location, ""
			if err != nil {
				e.Err = err.Error()
			}
			if v.id != "" {
				// A plain message without a key is a new one at each attempt.
				e.IDMoved = e.IDMoved || e.ID != "" && e.ID != v.id && (e.Key != "" || out.iv != "")
				e.ID = v.id
			}
			d.tally.Attempts++
			if d.tally.Statuses == nil {
				d.tally.Statuses = map[int]uint64{}
			}
			d.tally.Statuses[v.status]++
		})
		if v.state != "" {
			return v.state
		}
		again := v.retry && n < d.cfg.Attempts && ctx.Err() == nil
		if again && v.code == 3 {
			// The Portal may have another key by now. A new IV without an Idempotency-Key is a
			// new message, so this is only for one that is certainly not stored.
			again = !mismatched && (e.Key != "" || !e.Doubtful)
			mismatched, out = true, nil
		}
		if again && e.Doubtful && e.Key == "" {
			again = out != nil && out.iv != ""
		}
		if !again || !wait(ctx, d.pause(n, v.after)) {
			if e.Doubtful {
				return Unknown
			}
			return Refused
		}
	}
}

// pause is the time before the attempt after the n-th.
func (d *Driver) pause(n int, after time.Duration) time.Duration {
	if after == 0 {
		d.mu.Lock()
		share := d.rng.Float64()
		d.mu.Unlock()
		after = time.Duration(share * float64(d.cfg.Backoff<<min(n-1, 16)))
	}
	return min(after, d.cfg.MaxBackoff)
}

// seal makes what goes out, with the newest key the Portal has.
func (d *Driver) seal(m Message) (*wire, error) {
	encryption := false
	var keys []vendorcrypto.Key
	if d.cfg.Mode == Encrypted {
		encryption, keys = d.cfg.Keys(d.cfg.Site)
	}
	if !encryption {
		return &wire{body: m.Body}, nil
	}
	c, k, err := d.cipher(keys)
	if err != nil {
		return nil, err
	}
	iv, message := c.Seal(m.Body)
	if m.Version%4 == 2 { // some POS end the text with a line break
		message += "\n"
	}
	return &wire{iv: iv, fingerprint: k.Fingerprint, body: []byte(message)}, nil
}

func (d *Driver) cipher(keys []vendorcrypto.Key) (*vendorcrypto.Cipher, vendorcrypto.Key, error) {
	k, ok := vendorcrypto.Newest(keys, time.Now())
	if !ok {
		return nil, k, fmt.Errorf("none of the site's %d keys is valid now", len(keys))
	}
	c, err := d.ciphers.Cipher(d.cfg.Profile, k)
	return c, k, err
}

// attempt sends once and judges the answer. An error comes with a verdict too.
func (d *Driver) attempt(ctx context.Context, e *Entry, kind string, out *wire) (verdict, error) {
	d.change(e, func() {
		e.IV, e.Fingerprint, e.Bytes = out.iv, out.fingerprint, len(out.body)
		e.TripleHash = vendorcrypto.TripleHash(out.iv, out.fingerprint, out.body)
	})
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Timeout)
	defer cancel()
	path := []string{kind}
	if d.cfg.SitePath {
		path = []string{"sites", d.cfg.Site, kind}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.base.JoinPath(path...).String(), bytes.NewReader(out.body))
	if err != nil {
		return verdict{certain: true}, err
	}
	h := req.Header
	h.Set("Content-Type", "application/json")
	h.Set("Accept", "application/json")
	d.authorize(h)
	if out.iv != "" {
		h.Set("Sec-Iv", out.iv)
		h.Set("Sec-Fingerprint", out.fingerprint)
	}
	if e.Key != "" {
		h.Set("Idempotency-Key", e.Key)
		req.GetBody = nil // else net/http would send it again by itself, uncounted
	}
	if d.cfg.Wait != 0 {
		h.Set("Prefer", "wait="+seconds(d.cfg.Wait))
	}
	if d.cfg.Within != 0 {
		h.Set("Kb-Within", seconds(d.cfg.Within))
	}
	res, err := d.client.Do(req)
	if err != nil {
		// Without a connection nothing was sent, nor over one that is not trusted.
		op, ok := errors.AsType[*net.OpError](err)
		_, stranger := errors.AsType[*tls.CertificateVerificationError](err)
		return verdict{retry: true, certain: stranger || ok && op.Op == "dial"}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return verdict{retry: true}, fmt.Errorf("read the answer: %w", err)
	}
	return judge(res.StatusCode, res.Header, body, time.Now()), nil
}

// maxAnswer bounds what is read of an answer; the rest closes the connection.
const maxAnswer = 1 << 20

func (d *Driver) authorize(h http.Header) {
	if d.cfg.Token != "" {
		h.Set("Authorization", "Bearer "+string(d.cfg.Token))
	}
}

func seconds(d time.Duration) string {
	return strconv.FormatInt(int64((max(d, 0)+time.Second-1)/time.Second), 10)
}

// verdict is what one answer means.
type verdict struct {
	status       int
	id, location string
	code         int
	reason       string
	kitchen      int
	state        State // "": the message is not accepted by this answer
	retry        bool
	certain      bool // the message is certainly not stored by this attempt, or state says it is
	after        time.Duration
}

// document has the members of the edge's own answers that matter here.
type document struct {
	ID        string `json:"id"`
	State     string `json:"state"`
	Outcome   string `json:"outcome"`
	Reason    string `json:"reason"`
	Kitchen   int    `json:"kitchen_status"`
	ErrorCode int    `json:"errorCode"`
	Overdue   bool   `json:"overdue"`
}

func judge(status int, h http.Header, body []byte, now time.Time) verdict {
	var doc document
	_ = json.Unmarshal(body, &doc) // the Kitchen may answer anything
	v := verdict{
		status: status, certain: true,
		id: h.Get("Kb-Id"), location: h.Get("Location"),
		after: retryAfter(h.Get("Retry-After"), now),
	}
	if v.id == "" && strings.Contains(v.location, "/messages/") {
		v.id = v.location[strings.LastIndexByte(v.location, '/')+1:]
	}
	switch {
	case status/100 == 2 && v.location != "":
		v.state = Pending
	case status/100 == 2:
		// The Kitchen's own answer, unless the edge says that the Kitchen had it already.
		v.state, v.kitchen = Delivered, status
		if doc.State == "delivered" && doc.Kitchen != 0 && doc.ID == v.id {
			v.kitchen = doc.Kitchen
		}
	default:
		v.code, v.reason, v.kitchen = doc.ErrorCode, doc.Reason, doc.Kitchen
		switch {
		case status == http.StatusBadGateway && doc.State == "failed":
			v.state = Failed
		case status == http.StatusServiceUnavailable:
			v.retry, v.certain = true, doc.Outcome != "unknown"
		case status == http.StatusRequestTimeout, status == http.StatusTooEarly, status == http.StatusTooManyRequests:
			v.retry = true
		case status >= 500:
			v.retry, v.certain = true, false
		case doc.ErrorCode == 3:
			v.retry = true
		}
	}
	return v
}

// retryAfter reads the header in both its forms; 0 when there is none.
func retryAfter(s string, now time.Time) time.Duration {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return time.Duration(n) * time.Second
	}
	if t, err := http.ParseTime(s); err == nil {
		return max(t.Sub(now), 0)
	}
	return 0
}

// pollers bounds the questions under way at once.
const pollers = 8

// ask asks once about everything that is open and returns how much still is.
func (d *Driver) ask(ctx context.Context) int {
	d.mu.Lock()
	open := d.open
	d.open = nil
	d.mu.Unlock()
	queue := make(chan *Entry, len(open))
	for _, e := range open {
		queue <- e
	}
	close(queue)
	var wg sync.WaitGroup
	for range min(pollers, len(open)) {
		wg.Go(func() {
			for e := range queue {
				if d.poll(ctx, e) {
					d.mu.Lock()
					d.open = append(d.open, e)
					d.mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.open)
}

// poll asks about one message and reports whether to ask again.
func (d *Driver) poll(ctx context.Context, e *Entry) (again bool) {
	if ctx.Err() != nil {
		return true
	}
	status, doc, err := d.question(ctx, e)
	now := time.Now()
	d.change(e, func() {
		e.Polls++
		e.PollCode = status
		again = now.Sub(e.Answered) < d.cfg.PollLimit
		if err != nil {
			return
		}
		switch {
		case status == http.StatusNotFound && e.State == Unknown:
			again = false // not stored, or an edge that has forgotten: it cannot be told apart
		case status != http.StatusOK:
		case doc.State == "delivered" || doc.State == "failed":
			e.State, e.Settled, e.Reason, e.Kitchen, e.Overdue = State(doc.State), now, doc.Reason, doc.Kitchen, false
			again = false
		default:
			e.Overdue = doc.Overdue
			if doc.State == "accepted" {
				e.State = Pending
			}
		}
	})
	return again
}

func (d *Driver) question(ctx context.Context, e *Entry) (status int, doc document, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Timeout)
	defer cancel()
	// The path is the edge's to choose; the host is not, or the token could go elsewhere.
	where, err := d.base.Parse(e.Location)
	if err != nil {
		return 0, doc, err
	}
	where.Scheme, where.Host, where.User = d.base.Scheme, d.base.Host, d.base.User
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, where.String(), nil)
	if err != nil {
		return 0, doc, err
	}
	d.authorize(req.Header)
	if d.cfg.Mode == Encrypted {
		if encryption, keys := d.cfg.Keys(d.cfg.Site); encryption {
			c, k, err := d.cipher(keys)
			if err != nil {
				return 0, doc, err
			}
			iv, _ := c.Seal(nil)
			req.Header.Set("Sec-Iv", iv)
			req.Header.Set("Sec-Fingerprint", k.Fingerprint)
		}
	}
	res, err := d.client.Do(req)
	if err != nil {
		return 0, doc, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer))
	if err != nil {
		return res.StatusCode, doc, err
	}
	if res.StatusCode == http.StatusOK {
		err = json.Unmarshal(body, &doc)
	}
	return res.StatusCode, doc, err
}
