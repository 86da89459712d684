package kitchen

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/vendorcrypto"
)

// handler lists everything a door answers.
func (k *Kitchen) handler(d *door) http.Handler {
	mux := http.NewServeMux()
	if len(d.sites) == 1 {
		mux.HandleFunc("POST /{kind}", func(w http.ResponseWriter, r *http.Request) { k.visit(w, r, d, d.sites[0].name) })
	}
	mux.HandleFunc("POST /sites/{site}/{kind}", func(w http.ResponseWriter, r *http.Request) { k.visit(w, r, d, r.PathValue("site")) })
	mux.HandleFunc("/redirected/{site}/{kind}", k.follow)
	mux.HandleFunc("/", k.stray)
	return mux
}

func (k *Kitchen) stray(w http.ResponseWriter, r *http.Request) {
	k.mu.Lock()
	k.strays++
	k.mu.Unlock()
	status := http.StatusNotFound
	if r.Method != http.MethodPost {
		status = http.StatusMethodNotAllowed
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"message":%q}`, http.StatusText(status))
}

// follow answers as if all were well: a sender that follows redirects believes it, and the
// ledger knows better.
func (k *Kitchen) follow(w http.ResponseWriter, _ *http.Request) {
	k.mu.Lock()
	k.followed++
	k.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"status":"queued"}`)
}

// visit takes one event from its arrival to its end.
func (k *Kitchen) visit(w http.ResponseWriter, r *http.Request, d *door, siteName string) {
	kind := r.PathValue("kind")
	k.mu.Lock()
	s := k.sites[siteName]
	k.mu.Unlock()
	if s == nil || !slices.Contains(d.sites, s) || !name.MatchString(kind) {
		k.stray(w, r)
		return
	}
	v := k.arrive(s, kind, r.Header)
	defer k.leave()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(v.life, cancel)()

	if v.refuse {
		cut(w, true)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, k.cfg.MaxBody))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			k.refuse(ctx, w, v, refusal{status: http.StatusRequestEntityTooLarge, why: "body too large", message: "Payload too large"})
			return
		}
		k.gaveUp(v)
		return
	}
	refused := k.inspect(v, r.Header, body)

	wait(ctx, v.latency)
	hangs := v.fault != nil && v.fault.Do == Hang
	if hangs && !v.fault.Processed {
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		k.abandoned(w, v, refused == nil && (v.fault == nil || v.fault.Processed || hangs))
		return
	}

	var ticket uint64
	repeat := false
	if refused == nil && (v.fault == nil || v.fault.Processed) {
		var ok bool
		if ticket, repeat, ok = k.process(v, false); !ok {
			cut(w, true)
			return
		}
	}
	switch {
	case v.fault != nil:
		k.misbehave(ctx, w, v)
	case refused != nil:
		k.refuse(ctx, w, v, *refused)
	case repeat && v.plan.repeat != 0 && v.plan.repeat != http.StatusOK:
		k.answer(ctx, w, v, v.plan.repeat, jsonHeader(), []byte(`{"message":"already received"}`))
	default:
		k.answer(ctx, w, v, http.StatusOK, jsonHeader(), success(ticket))
	}
}

// visitor is a request inside the Kitchen.
type visitor struct {
	plan
	site   *site
	rec    *Record         // guarded by Kitchen.mu
	life   context.Context // of the site when the request came
	refuse bool
}

func jsonHeader() http.Header { return http.Header{"Content-Type": {"application/json"}} }

func success(ticket uint64) []byte {
	return fmt.Appendf(nil, `{"status":"queued","ticket":"K-%06d"}`, ticket)
}

// arrive enters a request into the ledger and draws its fate.
func (k *Kitchen) arrive(s *site, kind string, h http.Header) *visitor {
	rec := &Record{Site: s.name, Kind: kind, Key: h.Get("Idempotency-Key"), IV: h.Get("Sec-Iv"), Fingerprint: h.Get("Sec-Fingerprint"), Attempt: 1, Received: time.Now()}
	var ok bool
	if rec.Edge, rec.Epoch, rec.Seq, ok = number(h); !ok {
		rec.Problems = append(rec.Problems, BadHeaders)
	}
	k.wg.Add(1) // its connection is in it too, so it is not 0 here
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.inFlight++; k.inFlight == 1 {
		k.idle = make(chan struct{})
	}
	k.arrived++
	rec.N = k.arrived
	v := &visitor{plan: s.plan(kind), site: s, rec: rec, life: s.life, refuse: s.Refuse}
	if rec.Key != "" {
		e, _ := k.keys.get(keyOf{s.name, rec.Key})
		e.attempts++
		rec.Attempt = e.attempts
		k.keys.set(keyOf{s.name, rec.Key}, e)
	}
	k.keep(rec)
	k.add(s, func(c *Counts) {
		c.Requests++
		if !ok {
			count(&c.Problems, BadHeaders)
		}
	})
	switch {
	case v.refuse:
		rec.Refusal = "the site refuses connections"
	case v.fault != nil:
		rec.Action = v.fault.Do
		if rec.Action == "" {
			rec.Action = Answer
		}
		k.add(s, func(c *Counts) { count(&c.Faults, rec.Action) })
	}
	return v
}

// number reads Kb-Edge and Kb-Seq. Both missing is fine; what is not ok is returned empty.
func number(h http.Header) (edge, epoch string, seq uint64, ok bool) {
	e, n := h.Values("Kb-Edge"), h.Values("Kb-Seq")
	if len(e) == 0 && len(n) == 0 {
		return "", "", 0, true
	}
	if len(e) != 1 || len(n) != 1 {
		return "", "", 0, false
	}
	edge, epoch, _ = strings.Cut(e[0], ".")
	seq, err := strconv.ParseUint(n[0], 10, 64)
	if edge == "" || epoch == "" || err != nil || seq == 0 {
		return "", "", 0, false
	}
	return edge, epoch, seq, true
}

func (k *Kitchen) leave() {
	defer k.wg.Done()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.inFlight--; k.inFlight == 0 {
		close(k.idle)
	}
}

// add counts for the site and in total. k.mu is held.
func (k *Kitchen) add(s *site, f func(*Counts)) {
	f(&s.counts)
	f(&k.total)
}

// refusal is the Kitchen's own no, as the protocol words it.
type refusal struct {
	status  int
	code    int    // errorCode; 0: none
	message string // in the answer
	why     string // in the ledger
}

// The protocol's errors.
func incorrect(why string) *refusal {
	return &refusal{http.StatusBadRequest, 1, "Incorrect security headers", why}
}

func undecryptable(why string) *refusal {
	return &refusal{http.StatusBadRequest, 2, "Unable to decrypt payload", why}
}

func (k *Kitchen) mismatch(why string) *refusal {
	if k.cfg.NoMismatch {
		return undecryptable(why)
	}
	return &refusal{http.StatusBadRequest, 3, "Security credential mismatch", why}
}

// inspect opens a request and enters what it finds into the ledger. nil: acceptable.
func (k *Kitchen) inspect(v *visitor, h http.Header, body []byte) *refusal {
	payload, mismatched, refused := k.open(v.site.name, h, body)
	var order string
	var version int64
	payloadHash := ""
	if refused == nil {
		payloadHash = vendorcrypto.PayloadHash(payload)
		order, version = k.identify(payload)
	}
	triple := vendorcrypto.TripleHash(h.Get("Sec-Iv"), h.Get("Sec-Fingerprint"), body)

	k.mu.Lock()
	defer k.mu.Unlock()
	r := v.rec
	r.Bytes, r.TripleHash, r.PayloadHash, r.OrderID, r.Version = len(body), triple, payloadHash, order, version
	if refused != nil {
		r.Refusal = refused.why
		k.add(v.site, func(c *Counts) {
			c.Refused++
			switch {
			case mismatched:
				c.MismatchErrors++
			case refused.code == 1:
				c.HeaderErrors++
			case refused.code == 2:
				c.DecryptErrors++
			}
		})
		return refused
	}
	var found []Problem
	if r.IV != "" {
		iv := ivOf{r.Site, r.Fingerprint, r.IV}
		if before, ok := k.ivs.get(iv); !ok {
			k.ivs.set(iv, triple)
		} else if before != triple {
			found = append(found, IVReused)
		}
	}
	if r.Key != "" {
		key := keyOf{r.Site, r.Key}
		e, _ := k.keys.get(key)
		if e.payload == "" {
			e.kind, e.payload = r.Kind, payloadHash
			k.keys.set(key, e)
		} else if e.kind != r.Kind || e.payload != payloadHash {
			found = append(found, KeyMoved)
		}
	}
	k.blame(v, found)
	return nil
}

// blame enters problems. k.mu is held.
func (k *Kitchen) blame(v *visitor, found []Problem) {
	v.rec.Problems = append(v.rec.Problems, found...)
	k.add(v.site, func(c *Counts) {
		for _, p := range found {
			count(&c.Problems, p)
		}
	})
}

// open checks the headers in the protocol's order and decrypts the body.
func (k *Kitchen) open(siteName string, h http.Header, body []byte) (payload []byte, mismatched bool, _ *refusal) {
	var encryption bool
	var keys []vendorcrypto.Key
	if k.cfg.Keys != nil {
		encryption, keys = k.cfg.Keys(siteName)
	}
	ivs, fingerprints, auth := h.Values("Sec-Iv"), h.Values("Sec-Fingerprint"), h.Values("Authorization")
	if k.cfg.Token != nil {
		if token := k.cfg.Token(siteName); token != "" {
			if len(auth) != 1 {
				return nil, false, incorrect(fmt.Sprintf("%d authorization headers", len(auth)))
			}
			if subtle.ConstantTimeCompare([]byte(auth[0]), []byte("Bearer "+string(token))) != 1 {
				return nil, false, &refusal{http.StatusUnauthorized, 0, "Unauthorized", "wrong authorization"}
			}
		}
	}
	if media, _, err := mime.ParseMediaType(h.Get("Content-Type")); err != nil || media != "application/json" {
		return nil, false, &refusal{http.StatusUnsupportedMediaType, 0, "Unsupported media type", fmt.Sprintf("content-type %q", h.Get("Content-Type"))}
	}
	if !encryption {
		if len(ivs)+len(fingerprints) > 0 {
			return nil, true, k.mismatch("security headers at a site without encryption")
		}
		if !json.Valid(body) {
			return nil, false, &refusal{http.StatusBadRequest, 0, "Body is not valid JSON", "body is not valid JSON"}
		}
		return body, false, nil
	}
	if len(ivs) != 1 || ivs[0] == "" || len(fingerprints) != 1 || fingerprints[0] == "" {
		return nil, false, incorrect(fmt.Sprintf("%d sec-iv and %d sec-fingerprint headers, or empty ones", len(ivs), len(fingerprints)))
	}
	now := time.Now()
	i := slices.IndexFunc(keys, func(key vendorcrypto.Key) bool { return key.Fingerprint == fingerprints[0] })
	if i < 0 {
		return nil, true, k.mismatch("unknown fingerprint")
	}
	if !keys[i].ValidAt(now, k.cfg.Skew) {
		return nil, true, k.mismatch("key outside its validity")
	}
	c, err := k.ciphers.Cipher(k.cfg.profile(siteName), keys[i])
	if err != nil {
		return nil, false, undecryptable(err.Error())
	}
	payload, err = c.Open(ivs[0], string(body))
	if err != nil {
		return nil, false, undecryptable(err.Error())
	}
	if !json.Valid(payload) {
		return nil, false, undecryptable("plaintext is not valid JSON")
	}
	return payload, false, nil
}

// identify reads an order's id and version. What is not there, or of another type, is "" or 0.
func (k *Kitchen) identify(payload []byte) (order string, version int64) {
	dec := json.NewDecoder(bytes.NewReader(payload))
	dec.UseNumber()
	var doc any
	if dec.Decode(&doc) != nil {
		return "", 0
	}
	switch id := at(doc, k.cfg.OrderPointer).(type) {
	case string:
		order = id
	case json.Number:
		order = id.String()
	}
	if n, ok := at(doc, k.cfg.VersionPointer).(json.Number); ok {
		version, _ = n.Int64()
	}
	return order, version
}

// at resolves a JSON pointer.
func at(doc any, pointer string) any {
	for token := range strings.SplitSeq(pointer[1:], "/") {
		token = strings.NewReplacer("~1", "/", "~0", "~").Replace(token)
		switch d := doc.(type) {
		case map[string]any:
			doc = d[token]
		case []any:
			i, err := strconv.Atoi(token)
			if err != nil || i < 0 || i >= len(d) {
				return nil
			}
			doc = d[i]
		default:
			return nil
		}
	}
	return doc
}

// process cooks an event, or recognises it as cooked. ok is false when the Kitchen went
// down before.
func (k *Kitchen) process(v *visitor, late bool) (ticket uint64, repeat, ok bool) {
	k.mu.Lock()
	if v.life.Err() != nil {
		k.mu.Unlock()
		return 0, false, false
	}
	r := v.rec
	key := keyOf{r.Site, r.Key}
	e, _ := k.keys.get(key)
	r.Repeat, r.Late, r.Processed = e.cooked, late, time.Now()
	k.place++
	r.Place = k.place
	if !r.Repeat {
		e.ticket = k.place
		e.cooked = true
		before := len(r.Problems)
		k.judge(r)
		found := slices.Clone(r.Problems[before:])
		r.Problems = r.Problems[:before]
		k.blame(v, found)
	}
	if r.Key != "" {
		k.keys.set(key, e)
	}
	v.site.fingerprint = r.Fingerprint
	k.add(v.site, func(c *Counts) {
		if late {
			c.Late++
		}
		switch {
		case r.Repeat:
			c.Repeats++
		case r.Inverted():
			c.Inversions++
			if late {
				c.LateInversions++
			}
			fallthrough
		default:
			c.Delivered++
		}
	})
	done := r.clone()
	k.mu.Unlock()
	if k.cfg.OnProcessed != nil {
		k.cfg.OnProcessed(done)
	}
	return e.ticket, done.Repeat, true
}

// gaveUp notes that the client is gone, unless it is the Kitchen that went down.
func (k *Kitchen) gaveUp(v *visitor) {
	if v.life.Err() != nil { // ends before connections are cut
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !v.rec.GaveUp {
		v.rec.GaveUp = true
		k.add(v.site, func(c *Counts) { c.GaveUp++ })
	}
}

// abandoned ends a request that lost its client, or its Kitchen, before it was processed.
func (k *Kitchen) abandoned(w http.ResponseWriter, v *visitor, cookable bool) {
	k.gaveUp(v)
	if v.life.Err() != nil {
		cut(w, true)
		return
	}
	if cookable && v.late {
		wait(v.life, v.lateDelay)
		k.process(v, true)
	}
}

// misbehave gives the answer of a fault.
func (k *Kitchen) misbehave(ctx context.Context, w http.ResponseWriter, v *visitor) {
	f := v.fault
	status, header, body := f.status(), f.header(time.Now()), f.body()
	switch f.Do {
	case Hang:
		<-ctx.Done()
		k.gaveUp(v)
		cut(w, true)
	case Drop:
		cut(w, true)
	case Reset, Truncate, Stall:
		// The promised length is never reached, so the client sees where it was cut.
		header.Set("Content-Length", strconv.Itoa(2*len(body)+1))
		k.answer(ctx, w, v, status, header, body)
		_ = http.NewResponseController(w).Flush()
		if f.Do == Stall {
			<-ctx.Done()
			k.gaveUp(v)
		}
		cut(w, f.Do == Reset)
	case Huge:
		size := f.Size
		if size == 0 {
			size = 64 << 20
		}
		k.answer(ctx, w, v, status, header, nil)
		chunk := bytes.Repeat([]byte(" "), 32<<10)
		for size > 0 {
			n, err := w.Write(chunk[:min(size, int64(len(chunk)))])
			if size -= int64(n); err != nil || ctx.Err() != nil {
				k.gaveUp(v)
				return
			}
		}
	case Redirect:
		if header.Get("Location") == "" {
			header.Set("Location", "/redirected/"+v.site.name+"/"+v.rec.Kind)
		}
		k.answer(ctx, w, v, status, header, body)
	default:
		k.answer(ctx, w, v, status, header, body)
	}
}

func (k *Kitchen) refuse(ctx context.Context, w http.ResponseWriter, v *visitor, no refusal) {
	k.mu.Lock()
	if v.rec.Refusal == "" { // not counted by inspect
		v.rec.Refusal = no.why
		k.add(v.site, func(c *Counts) { c.Refused++ })
	}
	v.rec.Code = no.code
	k.mu.Unlock()
	header := jsonHeader()
	if no.status == http.StatusUnauthorized {
		header.Set("WWW-Authenticate", "Bearer")
	}
	body := fmt.Appendf(nil, `{"message":%q}`, no.message)
	if no.code != 0 {
		body = fmt.Appendf(nil, `{"errorCode":%d,"message":%q}`, no.code, no.message)
	}
	k.answer(ctx, w, v, no.status, header, body)
}

// answer enters the answer into the ledger, then writes it: whoever has read the answer
// finds it in the ledger.
func (k *Kitchen) answer(ctx context.Context, w http.ResponseWriter, v *visitor, status int, header http.Header, body []byte) {
	if ctx.Err() != nil {
		k.gaveUp(v)
	}
	k.mu.Lock()
	v.rec.Status, v.rec.Answered = status, time.Now()
	k.mu.Unlock()
	maps.Copy(w.Header(), header)
	w.WriteHeader(status)
	if _, err := w.Write(body); err != nil && !errors.Is(err, http.ErrBodyNotAllowed) {
		k.gaveUp(v)
	}
}

// wait returns when d has passed or ctx has ended.
func wait(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// cut closes the connection under an answer: by a reset, or in order after what was
// written so far.
func cut(w http.ResponseWriter, reset bool) {
	h, ok := w.(http.Hijacker)
	if !ok {
		return
	}
	conn, buf, err := h.Hijack()
	if err != nil {
		return // already closed
	}
	defer conn.Close()
	if !reset {
		_ = buf.Flush()
		return
	}
	inner := conn
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		inner = t.NetConn()
	}
	if tcp, ok := inner.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
}
