package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/oklog/ulid/v2"

	"github.com/kitchenbridge/kitchenbridge/internal/admin"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// store takes requests that are fit to be sent; *committer is one.
type store interface {
	// Commit returns nil when d is stored, errNotStored when it certainly is not, and
	// errUnknown when nobody knows yet; d.progress then hears of it later.
	Commit(ctx context.Context, d *draft) error
}

var (
	errNotStored = errors.New("not stored")
	errUnknown   = errors.New("not known whether it is stored")
)

func notStored(why error) error { return fmt.Errorf("%w: %w", errNotStored, why) }

// draft is an event before it has its number.
type draft struct {
	site, kind string
	id         string
	order      string        // Kb-Order, "" = none
	within     time.Duration // from acceptance to the deadline
	triple     envelope.Triple
	binding    *envelope.Binding
	trace      string
	progress   progress
}

// progress hears what becomes of a draft. *message is one.
type progress interface {
	// numbered is called before the event is sent, and again if that number was given back.
	numbered(seq uint64, accepted, deadline time.Time)
	// unknown is called at most once, before Commit returns errUnknown.
	unknown()
	// stored is called once: before Commit returns nil, or some time after unknown.
	stored()
}

// ingest answers POS.
type ingest struct {
	// Fixed at birth.
	door       *door.Door
	store      store
	register   *register
	sites      map[string]*site
	kinds      []string // sorted
	maxBody    int64
	wait       time.Duration // for the Kitchen, unless the POS prefers another
	maxWait    time.Duration
	commitWait time.Duration
	maxWaiting int64
	durability func() string
	ready      http.HandlerFunc
	metrics    *metrics
	log        *slog.Logger

	// slots holds a token for each request that is being read or stored.
	slots chan struct{}
	// waiting counts the requests that wait for a Kitchen.
	waiting atomic.Int64
	// stopping is closed when the edge stops: whoever waits for a Kitchen is answered.
	stopping chan struct{}
	// running is held for reading by each request. Who takes it for writing has waited for
	// all of them, and no other begins.
	running sync.RWMutex
}

// listener says by which address requests come.
type listener struct {
	site     string // the only one served, "" = by token or path
	loopback bool
}

const (
	retryBusy = time.Second
	retryHub  = 5 * time.Second
)

// handler serves everything that a POS may ask for at one address.
func (s *ingest) handler(l listener) http.Handler {
	return s.limited(routed(func(mux *http.ServeMux) {
		for _, k := range s.kinds {
			mux.HandleFunc("POST /"+k, func(w http.ResponseWriter, r *http.Request) { s.post(w, r, l, k) })
			mux.HandleFunc("POST /sites/{site}/"+k, func(w http.ResponseWriter, r *http.Request) { s.post(w, r, l, k) })
		}
		mux.HandleFunc("GET /messages/{id}", func(w http.ResponseWriter, r *http.Request) { s.message(w, r, l) })
		mux.HandleFunc("GET /sites/{site}/messages/{id}", func(w http.ResponseWriter, r *http.Request) { s.message(w, r, l) })
		mux.HandleFunc("GET /healthz", admin.Healthz)
		mux.HandleFunc("GET /readyz", s.ready)
	}))
}

// limited sets what holds for every request, before it is looked at.
func (s *ingest) limited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.running.TryRLock() {
			_, f := unavailable(errStopped)
			f.Write(w)
			return
		}
		defer s.running.RUnlock()
		r.Body = http.MaxBytesReader(w, r.Body, s.maxBody)
		next.ServeHTTP(w, r)
	})
}

// routed serves the routes that add adds to a mux, and answers what has none in the form of
// all other refusals.
func routed(add func(*http.ServeMux)) http.Handler {
	// What no route of mux takes falls to "/". Only then is routes asked why: it has no such
	// pattern, and tells a path that is not there from a method that may not be used.
	mux, routes := http.NewServeMux(), http.NewServeMux()
	add(mux)
	add(routes)
	unrouted := func(w http.ResponseWriter, r *http.Request) {
		var own statusOnly
		h, _ := routes.Handler(r)
		h.ServeHTTP(&own, r)
		if own.status == http.StatusMethodNotAllowed {
			allow := own.header.Get("Allow")
			w.Header().Set("Allow", allow)
			problem(http.StatusMethodNotAllowed, "method", "This path takes "+allow+" only.").Write(w)
			return
		}
		problem(http.StatusNotFound, "no-route", "There is nothing at this path; kinds of messages that are not configured count as nothing.").Write(w)
	}
	mux.HandleFunc("/", unrouted)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != path.Clean(r.URL.Path):
			// The mux would redirect, which a POS does not follow with its body.
			problem(http.StatusNotFound, "no-route", "There is nothing at this path.").Write(w)
		case !strings.HasPrefix(r.URL.Path, "/"):
			unrouted(w, r) // "*", for which the mux has an answer of its own
		default:
			mux.ServeHTTP(w, r)
		}
	})
}

// statusOnly takes an answer for its status and headers.
type statusOnly struct {
	status int
	header http.Header
}

func (w *statusOnly) Header() http.Header {
	if w.header == nil {
		w.header = make(http.Header)
	}
	return w.header
}
func (w *statusOnly) WriteHeader(status int)      { w.status = status }
func (w *statusOnly) Write(b []byte) (int, error) { return len(b), nil }

// problem makes a refusal that a program can tell by its reason.
func problem(status int, reason, detail string) *door.Refusal {
	f := door.Problem(status, "", detail)
	f.Ext = map[string]any{"reason": reason}
	return f
}

// post takes one message.
func (s *ingest) post(w http.ResponseWriter, r *http.Request, l listener, kind string) {
	begun := time.Now()
	count := func(o outcome) { s.metrics.requests.WithLabelValues(kind, string(o)).Inc() }
	refuse := func(f *door.Refusal, o outcome) {
		count(o)
		f.Write(w)
	}
	if !take(s.slots) {
		refuse(busy("The edge is handling as many requests as it may."), outcomeBusy)
		return
	}
	held := s.slots
	defer func() { give(held) }()

	v, refusal := s.door.Admit(r, siteOf(r, l), l.loopback)
	if refusal != nil {
		refuse(refusal, outcomeOf(refusal))
		return
	}
	site := s.sites[v.Site]
	if !take(site.gate) {
		refuse(busy("The site has as many requests under way as it may."), outcomeBusy)
		return
	}
	gate := site.gate
	defer func() { give(gate) }()

	if f := checkMedia(r.Header); f != nil {
		refuse(f, outcomeInvalid)
		return
	}
	wish, f := readWishes(r.Header, s.wait, s.maxWait, site.kinds[kind].deadline)
	if f != nil {
		refuse(f, outcomeInvalid)
		return
	}
	body, f := s.read(w, r)
	if f != nil {
		o := outcomeInvalid
		if f.Status == http.StatusRequestTimeout {
			o = outcomeDisappeared
		}
		refuse(f, o)
		return
	}
	t, payload, f := open(v, site, body)
	if f != nil {
		refuse(f, outcomeOf(f))
		return
	}

	c := claimOf(v, kind, wish.key, t, payload)
	m, fresh, err := s.register.claim(c)
	if err != nil {
		if errors.Is(err, errOtherPayload) {
			w.Header().Set(headerID, c.id) // that of the first one
		}
		o, f := conflict(err)
		refuse(f, o)
		return
	}
	w.Header().Set(headerID, m.id)
	if fresh {
		err := s.commit(r.Context(), m, v, site, kind, wish, t, payload)
		if err == nil {
			s.metrics.accept.Observe(time.Since(begun).Seconds())
		} else if errors.Is(err, errNotStored) {
			m.refuse(err)
		}
	}
	// One that came before is being stored, or its outcome is still unknown: this request
	// hears the same as the first.
	known := m.await(r.Context(), s.commitWait, s.stopping, func(st state) bool {
		return st != statePending && (fresh || st != stateUnknown)
	})

	// Waiting for a Kitchen holds no memory and no turn, so it holds no slot either. The
	// payload must not be used any more, or it would be kept alive.
	give(gate)
	give(held)
	gate, held = nil, nil
	if known.state == stateAccepted && wish.wait > 0 {
		known = s.awaitKitchen(r.Context(), m, wish.wait)
	}
	count(s.answer(w, known, site, location(v, r, m.id)))
}

// awaitKitchen waits until m is settled, for at most d. When as many requests wait as
// may, this one does not: it is answered with what is known.
func (s *ingest) awaitKitchen(ctx context.Context, m *message, d time.Duration) view {
	if s.waiting.Add(1) > s.maxWaiting {
		d = 0
	}
	defer s.waiting.Add(-1)
	return m.await(ctx, d, s.stopping, state.final)
}

// take takes a token, if one is left.
func take(tokens chan struct{}) bool {
	select {
	case tokens <- struct{}{}:
		return true
	default:
		return false
	}
}

// give gives a token back; tokens may be nil: it has been given back already.
func give(tokens chan struct{}) {
	if tokens != nil {
		<-tokens
	}
}

// siteOf returns the site that the request names otherwise than by its token.
func siteOf(r *http.Request, l listener) string {
	if site := r.PathValue("site"); site != "" {
		if l.site != "" && site != l.site {
			return "-" // no site's name: not served here
		}
		return site
	}
	return l.site
}

// location is where the message can be asked for, with the means that this request used.
func location(v door.Visitor, r *http.Request, id string) string {
	if v.Who == "" && r.PathValue("site") != "" {
		return "/sites/" + v.Site + "/messages/" + id
	}
	return "/messages/" + id
}

// read reads the body. Its length is known before, so that too much is refused unread.
func (s *ingest) read(w http.ResponseWriter, r *http.Request) ([]byte, *door.Refusal) {
	tooLarge := func() *door.Refusal {
		f := problem(http.StatusRequestEntityTooLarge, "too-large", fmt.Sprintf("The body is larger than %d bytes.", s.maxBody))
		f.Ext["max_body"] = s.maxBody
		w.Header().Set("Connection", "close")
		return f
	}
	if r.ContentLength < 0 {
		w.Header().Set("Connection", "close")
		return nil, problem(http.StatusLengthRequired, "length", "Send Content-Length; a body of unknown length is not taken.")
	}
	if r.ContentLength > s.maxBody {
		return nil, tooLarge()
	}
	body := make([]byte, r.ContentLength)
	if _, err := io.ReadFull(r.Body, body); err != nil {
		w.Header().Set("Connection", "close")
		return nil, problem(http.StatusRequestTimeout, "body", "The body did not arrive whole in time.")
	}
	return body, nil
}

// open returns the payload in clear, and of an encrypted request its triple.
func open(v door.Visitor, site *site, body []byte) (t envelope.Triple, payload []byte, f *door.Refusal) {
	if v.Plain {
		if !isJSON(body) {
			return t, nil, badJSON(body)
		}
		return t, body, nil
	}
	message := body
	if site.jsonString {
		if text := bytes.TrimSpace(body); len(text) > 0 && text[0] == '"' {
			// Copied, so that the Kitchen gets the text and not what quotes it.
			unquoted, err := unquote(text)
			if err != nil {
				return t, nil, door.Undecryptable
			}
			message = unquoted
		}
	}
	t = envelope.Triple{IV: v.IV, Fingerprint: v.Fingerprint, Message: message}
	payload, err := v.Keys.Keyring.Accept(nil, t, time.Now(), door.Skew)
	switch {
	case errors.Is(err, envelope.ErrUnknownFingerprint), errors.Is(err, envelope.ErrKeyNotValid):
		return t, nil, door.Mismatch
	case err != nil:
		return t, nil, door.Undecryptable
	case isJSON(payload):
		return t, payload, nil
	case v.Keys.Settings.Profile == envelope.A256GCM:
		// Decrypted beyond doubt, so what is wrong is the JSON.
		return t, nil, badJSON(payload)
	}
	return t, nil, door.Undecryptable
}

func isJSON(b []byte) bool { return json.Valid(b) && utf8.Valid(b) }

// badJSON says where a payload stops being JSON, and nothing of what stands there.
func badJSON(payload []byte) *door.Refusal {
	detail := "The payload is empty; it must be JSON."
	if len(payload) > 0 {
		detail = "The payload is not valid JSON in UTF-8."
		var raw json.RawMessage
		if syntax, ok := errors.AsType[*json.SyntaxError](json.Unmarshal(payload, &raw)); ok {
			detail = fmt.Sprintf("The payload is not valid JSON: byte %d of %d is not what may stand there, or more had to follow.", syntax.Offset, len(payload))
		}
	}
	return problem(http.StatusBadRequest, "json", detail)
}

// claimOf makes what the request is registered by.
func claimOf(v door.Visitor, kind, key string, t envelope.Triple, payload []byte) claim {
	lane := v.Keys.Binding.Lane()
	c := claim{site: v.Site, who: v.Who, kind: kind, hash: lane.PayloadHash(kind, payload)}
	if !v.Plain {
		c.envelope = envelopeOf(v, lane)
	}
	switch {
	case key != "":
		c.id = lane.MessageID(v.Site, v.Who, kind, key)
	case !v.Plain:
		c.id = lane.EnvelopeID(v.Site, v.Who, kind, t)
	default:
		c.id = strings.ToLower(ulid.Make().String())
		c.withoutKey = true
	}
	return c
}

// envelopeOf names the envelope for the whole site, whoever sends it and as whatever kind:
// nobody may use it twice. An IV has more than one text in hex, and in base64url.
func envelopeOf(v door.Visitor, lane *envelope.LaneKey) string {
	iv := v.IV
	switch v.Keys.Settings.IVEncoding {
	case envelope.Hex:
		iv = bytes.ToLower(iv)
	case envelope.Base64URL:
		iv = bytes.TrimRight(iv, "=")
	}
	return lane.EnvelopeID(v.Site, "", "", envelope.Triple{IV: iv, Fingerprint: v.Fingerprint})
}

// commit has a message stored that nobody has stored yet.
func (s *ingest) commit(ctx context.Context, m *message, v door.Visitor, site *site, kind string, wish wishes, t envelope.Triple, payload []byte) error {
	binding := v.Keys.Binding
	if v.Plain {
		var err error
		if t, err = seal(v, payload); err != nil {
			site.sayNoKey.Do(func() { s.log.Error("no key to seal with", "site", v.Site, "kind", kind, "err", err) })
			return notStored(errors.Join(errNoKey, err))
		}
	}
	return s.store.Commit(ctx, &draft{
		site: v.Site, kind: kind, id: m.id,
		order:  binding.Lane().Order(site.kinds[kind].order.text(payload)),
		within: wish.within, triple: t, binding: binding, trace: wish.trace, progress: m,
	})
}

// errNoKey: the site's keys are there, and none of them may seal now.
var errNoKey = errors.New("no key of the site may seal now")

// seal encrypts a plain payload for its way: for the Kitchen, or where the Portal has
// encryption switched off, for the broker's eyes only.
func seal(v door.Visitor, payload []byte) (envelope.Triple, error) {
	if !v.Keys.Encryption {
		b, err := v.Keys.Binding.Current().AppendSealPlain(nil, payload)
		if err != nil {
			return envelope.Triple{}, err
		}
		return envelope.ParseTriple(b, 0)
	}
	key, err := v.Keys.Keyring.Primary(time.Now())
	if err != nil {
		return envelope.Triple{}, err
	}
	return key.Seal(payload)
}

// message answers what became of a message.
func (s *ingest) message(w http.ResponseWriter, r *http.Request, l listener) {
	if !take(s.slots) {
		busy("The edge is handling as many requests as it may.").Write(w)
		return
	}
	defer give(s.slots)
	v, refusal := s.door.Admit(r, siteOf(r, l), l.loopback)
	if refusal != nil {
		refusal.Write(w)
		return
	}
	m, ok := s.register.find(r.PathValue("id"), v.Site, v.Who)
	if !ok {
		problem(http.StatusNotFound, "no-message", "No message of this id is remembered for this credential.").Write(w)
		return
	}
	w.Header().Set(headerID, m.id)
	writeJSON(w, http.StatusOK, m.document(time.Now()))
}
