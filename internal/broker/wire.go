package broker

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// Headers of what kitchenbridge publishes. Numbers are decimal, without sign or
// leading zeros; times are Unix milliseconds. A header that an event does not need
// is absent, never empty.
//
//	event, on pos.<site>.<kind>.<edge>; body: the triple as JSON
//	  Nats-Msg-Id    <name>.<epoch>:<site>:<Kb-Seq>:<first 16 of Kb-Tag>   transport only: it lets the hub drop a repeat
//	  Kb-Id          id of the message
//	  Kb-Edge        <name>.<epoch> of the edge; the name is the subject's
//	  Kb-Seq         sequence of (site, edge, epoch), from 1
//	  Kb-From        first sequence of a run, below Kb-Seq; absent otherwise
//	  Kb-Kind        the subject's kind
//	  Kb-Fingerprint the triple's
//	  Kb-Order       hash of the order's id; absent when there is none
//	  Kb-Accepted, Kb-Deadline
//	  Kb-Via         "hub" or "store": who delivers
//	  Kb-Bind        id of the binding key that made Kb-Tag
//	  Kb-Tag         authenticates all of the above but Nats-Msg-Id, and the body
//	  traceparent    W3C trace context; absent when there is none
//
//	report, on kitchen.<site>.report; body: the Kitchen's answer, sealed, as a triple
//	  Nats-Msg-Id    <name>.<epoch>:<site>:<Kb-Seq>:<Kb-Endpoint>:<Kb-N>
//	  Kb-Id, Kb-Edge, Kb-Seq, Kb-Kind   of the event
//	  Kb-Endpoint    name of the endpoint; "-" when the event reached none
//	  Kb-N           0, or the number of the replay
//	  Kb-State       delivered, failed
//	  Kb-Reason      why it failed; absent when there is nothing to say
//	  Kb-Status      HTTP status of the last attempt, 0 when there was none
//	  Kb-Attempts, Kb-Started, Kb-Settled
//	  Kb-Stream-Seq  the event's sequence in POS
//	  Kb-Bind, Kb-Tag
//
//	dead letter, on dlq.<site>.<kind>; headers and body: the event's, as they stood, and
//	  Nats-Msg-Id    POS:<stream sequence>:<endpoint>:<stored, Unix ns>
//	  Kb-Dead-Reason, Kb-Dead-Endpoint, Kb-Dead-Attempts, Kb-Dead-Status
//	  Kb-Dead-Subject, Kb-Dead-Stream-Seq, Kb-Dead-Stored   where and when the event was stored
//	  Kb-Dead-Cut    "true" when not all of the event's headers had room; absent otherwise
const (
	hdrMsgID       = nats.MsgIdHdr
	hdrID          = "Kb-Id"
	hdrEdge        = "Kb-Edge"
	hdrSeq         = "Kb-Seq"
	hdrFrom        = "Kb-From"
	hdrKind        = "Kb-Kind"
	hdrFingerprint = "Kb-Fingerprint"
	hdrOrder       = "Kb-Order"
	hdrAccepted    = "Kb-Accepted"
	hdrDeadline    = "Kb-Deadline"
	hdrVia         = "Kb-Via"
	hdrBind        = "Kb-Bind"
	hdrTag         = "Kb-Tag"
	hdrTrace       = "traceparent"

	hdrEndpoint  = "Kb-Endpoint"
	hdrN         = "Kb-N"
	hdrState     = "Kb-State"
	hdrReason    = "Kb-Reason"
	hdrStatus    = "Kb-Status"
	hdrAttempts  = "Kb-Attempts"
	hdrStarted   = "Kb-Started"
	hdrSettled   = "Kb-Settled"
	hdrStreamSeq = "Kb-Stream-Seq"

	hdrDead          = "Kb-Dead-"
	hdrDeadReason    = hdrDead + "Reason"
	hdrDeadEndpoint  = hdrDead + "Endpoint"
	hdrDeadAttempts  = hdrDead + "Attempts"
	hdrDeadStatus    = hdrDead + "Status"
	hdrDeadSubject   = hdrDead + "Subject"
	hdrDeadStreamSeq = hdrDead + "Stream-Seq"
	hdrDeadStored    = hdrDead + "Stored"
	hdrDeadCut       = hdrDead + "Cut"
)

// maxDeadHeaders bounds the headers that a dead letter takes over: the hub refuses
// more than 64 KiB, and an event must not be able to make its own dead letter impossible.
const maxDeadHeaders = 32 << 10

// States of a delivery, as a report says them.
const (
	StateDelivered = "delivered"
	StateFailed    = "failed"
)

// NoEndpoint stands where an endpoint would, when an event reached none.
const NoEndpoint = "-"

// KindReport is the kind of KITCHEN's reports; KindExpired the reserved kind of events
// that expired at an edge.
const (
	KindReport  = "report"
	KindExpired = "expired"
)

// maxTime bounds the times on the wire: the end of the year 9999, which time.Time and
// JSON can still say.
const maxTime = 253402300799999

// header collects the headers of one message. All values share one array.
type header struct {
	h      nats.Header
	values []string
}

func newHeader(n int) *header {
	return &header{h: make(nats.Header, n), values: make([]string, 0, n)}
}

func (w *header) add(key, value string) {
	w.values = append(w.values, value)
	n := len(w.values)
	w.h[key] = w.values[n-1 : n : n]
}

func (w *header) uint(key string, v uint64) { w.add(key, strconv.FormatUint(v, 10)) }

func (w *header) int(key string, v int64) { w.add(key, strconv.FormatInt(v, 10)) }

// fields reads values and keeps the first thing that is wrong. The same checks hold on
// the way out and on the way in, which makes the two symmetrical.
type fields struct {
	h   nats.Header
	err error
}

func (f *fields) fail(format string, args ...any) {
	if f.err == nil {
		f.err = fmt.Errorf(format, args...)
	}
}

// check applies what must hold for a value of the key.
func (f *fields) check(key, value string, valid func(string) error) {
	if err := valid(value); err != nil {
		f.fail("%s: %w", key, err)
	}
}

// number checks what is a uint64 on the wire and something narrower in a message.
func (f *fields) number(key string, v int64, limit uint64) {
	if v < 0 || uint64(v) > limit {
		f.fail("%s: %d is not in 0 to %d", key, v, limit)
	}
}

func (f *fields) text(key string, valid func(string) error) string {
	values := f.h[key]
	if len(values) != 1 {
		f.fail("%s: there %d times, not once", key, len(values))
		return ""
	}
	f.check(key, values[0], valid)
	return values[0]
}

func (f *fields) optional(key string, valid func(string) error) string {
	if _, there := f.h[key]; !there {
		return ""
	}
	return f.text(key, valid)
}

// is demands the one value that follows from the rest.
func (f *fields) is(key, want string) {
	f.text(key, func(s string) error {
		if s != want {
			return fmt.Errorf("%.80q, but the rest says %.80q", s, want)
		}
		return nil
	})
}

func (f *fields) uint(key string, limit uint64) uint64 {
	var n uint64
	f.text(key, func(s string) (err error) {
		n, err = parseUint(s, limit)
		return err
	})
	return n
}

func parseUint(s string, limit uint64) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || s[0] == '0' && s != "0" || s[0] == '+' || n > limit {
		return 0, fmt.Errorf("%.40q is not a number from 0 to %d", s, limit)
	}
	return n, nil
}

const anyUint = ^uint64(0)

// token accepts what ids, epochs, hashes and tags are made of.
func token(s string) error {
	if s == "" || len(s) > 128 {
		return fmt.Errorf("%d characters, not 1 to 128", len(s))
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_':
		default:
			return fmt.Errorf("%.40q holds more than letters, digits, - and _", s)
		}
	}
	return nil
}

// visible accepts a fingerprint: visible ASCII.
func visible(s string) error {
	if s == "" || len(s) > 128 {
		return fmt.Errorf("%d characters, not 1 to 128", len(s))
	}
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return fmt.Errorf("%.40q holds more than visible ASCII", s)
		}
	}
	return nil
}

func oneOf(values ...string) func(string) error {
	return func(s string) error {
		if slices.Contains(values, s) {
			return nil
		}
		return fmt.Errorf("%.40q is none of %s", s, strings.Join(values, ", "))
	}
}

var (
	validVia   = oneOf("hub", "store")
	validState = oneOf(StateDelivered, StateFailed)
)

func validEndpoint(s string) error {
	if s == NoEndpoint {
		return nil
	}
	return envelope.ValidName(s)
}

// validTrace accepts a W3C traceparent: version-trace-parent-flags, in lower-case hex.
func validTrace(s string) bool {
	if len(s) != 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' || s[:2] == "ff" {
		return false
	}
	for i := range len(s) {
		if i == 2 || i == 35 || i == 52 {
			continue
		}
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// edgeOf splits Kb-Edge.
func (f *fields) edge() (name, epoch string) {
	name, epoch, found := strings.Cut(f.text(hdrEdge, func(string) error { return nil }), ".")
	if !found {
		f.fail("%s: not <name>.<epoch>", hdrEdge)
	}
	f.check(hdrEdge, name, envelope.ValidName)
	f.check(hdrEdge, epoch, token)
	return name, epoch
}

func (f *fields) triple(body []byte, fingerprint string) envelope.Triple {
	t, err := envelope.ParseTriple(body, 0) // the stream bounds its size
	if err != nil {
		f.fail("body: %w", err)
		return envelope.Triple{}
	}
	if fingerprint != "" && string(t.Fingerprint) != fingerprint {
		f.fail("%s: %.40q, but the body's is %.40q", hdrFingerprint, fingerprint, t.Fingerprint)
	}
	return t
}

// checkEvent holds what must hold for an event, wherever it comes from.
func (f *fields) checkEvent(e *Event) {
	f.check("site", e.Site, envelope.ValidName)
	f.check(hdrKind, e.Kind, envelope.ValidName)
	f.check(hdrEdge, e.Edge, envelope.ValidName)
	f.check(hdrEdge, e.Epoch, token)
	f.check(hdrID, e.ID, token)
	f.check(hdrVia, e.Via, validVia)
	f.check(hdrBind, e.Bind, envelope.ValidName)
	f.check(hdrTag, e.Tag, token)
	if e.Order != "" {
		f.check(hdrOrder, e.Order, token)
	}
	if e.Seq == 0 {
		f.fail("%s: 0, but sequences begin at 1", hdrSeq)
	}
	if e.From == 0 || e.From > e.Seq {
		f.fail("%s: %d is not in 1 to %d", hdrFrom, e.From, e.Seq)
	}
	f.number(hdrAccepted, e.Accepted, maxTime)
	f.number(hdrDeadline, e.Deadline, maxTime)
	f.check(hdrFingerprint, string(e.Triple.Fingerprint), visible)
}

// eventMsgID ends in a part of the tag. The hub drops what comes under an id that it has
// seen, whoever sent that: with nothing in the id that others cannot know beforehand, any
// user of the hub could make it drop another's next event.
func eventMsgID(e *Event) string {
	return position(e.Edge, e.Epoch, e.Site, e.Seq) + ":" + e.Tag[:min(len(e.Tag), 16)]
}

func position(edge, epoch, site string, seq uint64) string {
	return edge + "." + epoch + ":" + site + ":" + strconv.FormatUint(seq, 10)
}

// encodeEvent makes the message of an event. Error: ErrInvalid.
func encodeEvent(e *Event) (*nats.Msg, error) {
	var f fields
	if f.checkEvent(e); f.err != nil {
		return nil, fmt.Errorf("event: %w: %w", ErrInvalid, f.err)
	}
	w := newHeader(14)
	w.add(hdrMsgID, eventMsgID(e))
	w.add(hdrID, e.ID)
	w.add(hdrEdge, e.Edge+"."+e.Epoch)
	w.uint(hdrSeq, e.Seq)
	if e.From != e.Seq {
		w.uint(hdrFrom, e.From)
	}
	w.add(hdrKind, e.Kind)
	w.add(hdrFingerprint, string(e.Triple.Fingerprint))
	if e.Order != "" {
		w.add(hdrOrder, e.Order)
	}
	w.int(hdrAccepted, e.Accepted)
	w.int(hdrDeadline, e.Deadline)
	w.add(hdrVia, e.Via)
	w.add(hdrBind, e.Bind)
	w.add(hdrTag, e.Tag)
	if validTrace(e.Traceparent) {
		w.add(hdrTrace, e.Traceparent)
	}
	return &nats.Msg{
		Subject: "pos." + e.Site + "." + e.Kind + "." + e.Edge,
		Header:  w.h,
		Data:    encodeTriple(e.Triple),
	}, nil
}

func encodeTriple(t envelope.Triple) []byte {
	const around = len(`{"iv":"","fingerprint":"","message":""}`) + 8 // and an escape or two
	return t.AppendJSON(make([]byte, 0, around+len(t.IV)+len(t.Fingerprint)+len(t.Message)))
}

// decodeEvent reads what encodeEvent made, from the subject it is stored under:
// pos.<partition>.<site>.<kind>.<edge>. With partitions > 0 the partition must be the
// site's: a message moved to another would lose its place in its site's order. The
// event shares body. Error: ErrMalformed; the event then holds what could be read.
func decodeEvent(subject string, h nats.Header, body []byte, partitions int) (Event, error) {
	var e Event
	partition, site, kind, edge, ok := splitStored(subject)
	if !ok {
		return e, fmt.Errorf("event: %w: subject %.80q", ErrMalformed, subject)
	}
	f := fields{h: h}
	e.Site = site
	e.Kind = f.text(hdrKind, envelope.ValidName)
	e.Edge, e.Epoch = f.edge()
	e.Seq = f.uint(hdrSeq, anyUint)
	e.From = e.Seq
	if _, run := h[hdrFrom]; run {
		if e.From = f.uint(hdrFrom, anyUint); e.From == e.Seq {
			f.fail("%s: %d is %s itself", hdrFrom, e.From, hdrSeq)
		}
	}
	e.ID = f.text(hdrID, token)
	fingerprint := f.text(hdrFingerprint, visible)
	e.Order = f.optional(hdrOrder, token)
	e.Accepted = int64(f.uint(hdrAccepted, maxTime))
	e.Deadline = int64(f.uint(hdrDeadline, maxTime))
	e.Via = f.text(hdrVia, validVia)
	e.Bind = f.text(hdrBind, envelope.ValidName)
	e.Tag = f.text(hdrTag, token)
	if t := h[hdrTrace]; len(t) == 1 && validTrace(t[0]) {
		e.Traceparent = t[0]
	}
	if e.Kind != kind {
		f.fail("%s: %.40q, but the subject's kind is %.40q", hdrKind, e.Kind, kind)
	}
	if e.Edge != edge {
		f.fail("%s: %.40q, but the subject's edge is %.40q", hdrEdge, e.Edge, edge)
	}
	if partitions > 0 && partition != strconv.Itoa(partitionOf(site, partitions)) {
		f.fail("subject: partition %.10q, but the site's is %d of %d", partition, partitionOf(site, partitions), partitions)
	}
	e.Triple = f.triple(body, fingerprint)
	f.checkEvent(&e)
	f.is(hdrMsgID, eventMsgID(&e))
	if f.err != nil {
		return e, fmt.Errorf("event: %w: %w", ErrMalformed, f.err)
	}
	return e, nil
}

// splitStored splits pos.<partition>.<site>.<kind>.<edge>.
func splitStored(subject string) (partition, site, kind, edge string, ok bool) {
	rest, ok := strings.CutPrefix(subject, "pos.")
	if !ok {
		return "", "", "", "", false
	}
	partition, rest, _ = strings.Cut(rest, ".")
	site, rest, _ = strings.Cut(rest, ".")
	kind, edge, ok = strings.Cut(rest, ".")
	if !ok || strings.Contains(edge, ".") {
		return "", "", "", "", false
	}
	return partition, site, kind, edge, true
}

// checkReport holds what must hold for a report, wherever it comes from.
func (f *fields) checkReport(r *Report) {
	f.check("site", r.Site, envelope.ValidName)
	f.check(hdrKind, r.Kind, envelope.ValidName)
	f.check(hdrEdge, r.Edge, envelope.ValidName)
	f.check(hdrEdge, r.Epoch, token)
	f.check(hdrID, r.ID, token)
	f.check(hdrEndpoint, r.Endpoint, validEndpoint)
	f.check(hdrState, r.State, validState)
	if r.Reason != "" {
		f.check(hdrReason, r.Reason, envelope.ValidName)
	}
	f.check(hdrBind, r.Bind, envelope.ValidName)
	f.check(hdrTag, r.Tag, token)
	if r.Seq == 0 {
		f.fail("%s: 0, but sequences begin at 1", hdrSeq)
	}
	f.number(hdrN, int64(r.N), maxCount)
	f.number(hdrStatus, int64(r.Status), 999)
	f.number(hdrAttempts, int64(r.Attempts), maxCount)
	f.number(hdrStarted, r.Started, maxTime)
	f.number(hdrSettled, r.Settled, maxTime)
	f.check("fingerprint", string(r.Triple.Fingerprint), visible)
}

const maxCount = 1<<31 - 1

func reportMsgID(edge, epoch, site string, seq uint64, endpoint string, n int) string {
	return position(edge, epoch, site, seq) + ":" + endpoint + ":" + strconv.Itoa(n)
}

// encodeReport makes the message of a report. Error: ErrInvalid.
func encodeReport(r *Report) (*nats.Msg, error) {
	var f fields
	if f.checkReport(r); f.err != nil {
		return nil, fmt.Errorf("report: %w: %w", ErrInvalid, f.err)
	}
	w := newHeader(16)
	w.add(hdrMsgID, reportMsgID(r.Edge, r.Epoch, r.Site, r.Seq, r.Endpoint, r.N))
	w.add(hdrID, r.ID)
	w.add(hdrEdge, r.Edge+"."+r.Epoch)
	w.uint(hdrSeq, r.Seq)
	w.add(hdrKind, r.Kind)
	w.add(hdrEndpoint, r.Endpoint)
	w.int(hdrN, int64(r.N))
	w.add(hdrState, r.State)
	if r.Reason != "" {
		w.add(hdrReason, r.Reason)
	}
	w.int(hdrStatus, int64(r.Status))
	w.int(hdrAttempts, int64(r.Attempts))
	w.int(hdrStarted, r.Started)
	w.int(hdrSettled, r.Settled)
	w.uint(hdrStreamSeq, r.StreamSeq)
	w.add(hdrBind, r.Bind)
	w.add(hdrTag, r.Tag)
	return &nats.Msg{
		Subject: "kitchen." + r.Site + "." + KindReport,
		Header:  w.h,
		Data:    encodeTriple(r.Triple),
	}, nil
}

// decodeReport reads what encodeReport made, from kitchen.<site>.report or the live
// subject of it. The report shares body. Error: ErrMalformed.
func decodeReport(subject string, h nats.Header, body []byte) (*Report, error) {
	rest, ok := strings.CutPrefix(strings.TrimPrefix(subject, "live."), "kitchen.")
	site, kind, cut := strings.Cut(rest, ".")
	if !ok || !cut || kind != KindReport {
		return nil, fmt.Errorf("report: %w: subject %.80q", ErrMalformed, subject)
	}
	f := fields{h: h}
	r := &Report{}
	r.Site = site
	r.ID = f.text(hdrID, token)
	r.Edge, r.Epoch = f.edge()
	r.Seq = f.uint(hdrSeq, anyUint)
	r.Kind = f.text(hdrKind, envelope.ValidName)
	r.Endpoint = f.text(hdrEndpoint, validEndpoint)
	r.N = int(f.uint(hdrN, maxCount))
	r.State = f.text(hdrState, validState)
	r.Reason = f.optional(hdrReason, envelope.ValidName)
	r.Status = int(f.uint(hdrStatus, 999))
	r.Attempts = int(f.uint(hdrAttempts, maxCount))
	r.Started = int64(f.uint(hdrStarted, maxTime))
	r.Settled = int64(f.uint(hdrSettled, maxTime))
	r.StreamSeq = f.uint(hdrStreamSeq, anyUint)
	r.Bind = f.text(hdrBind, envelope.ValidName)
	r.Tag = f.text(hdrTag, token)
	r.Triple = f.triple(body, "")
	f.checkReport(r)
	f.is(hdrMsgID, reportMsgID(r.Edge, r.Epoch, r.Site, r.Seq, r.Endpoint, r.N))
	if f.err != nil {
		return nil, fmt.Errorf("report: %w: %w", ErrMalformed, f.err)
	}
	return r, nil
}

// encodeDeadLetter makes the message of a dead letter. Names that are none give "-"
// in the subject. Error: ErrInvalid.
func encodeDeadLetter(d DeadLetter) (*nats.Msg, error) {
	if d.Delivery == nil {
		return nil, fmt.Errorf("dead letter: %w: no delivery", ErrInvalid)
	}
	if d.Endpoint == "" {
		d.Endpoint = NoEndpoint
	}
	var f fields
	f.check(hdrDeadReason, d.Reason, envelope.ValidName)
	f.check(hdrDeadEndpoint, d.Endpoint, validEndpoint)
	f.number(hdrDeadAttempts, int64(d.Attempts), maxCount)
	f.number(hdrDeadStatus, int64(d.Status), 999)
	if f.err != nil {
		return nil, fmt.Errorf("dead letter: %w: %w", ErrInvalid, f.err)
	}
	v := d.Delivery
	w := newHeader(9)
	size := 0
	for _, key := range slices.Sorted(maps.Keys(v.Header)) {
		values := v.Header[key]
		// What speaks to the hub spoke to it once. What says that it is dead is ours to say.
		if hasPrefixFold(key, "Nats-") || hasPrefixFold(key, hdrDead) || !headerSafe(key, values) {
			continue
		}
		for _, value := range values {
			size += len(key) + len(value) + 4
		}
		if size > maxDeadHeaders {
			w.add(hdrDeadCut, "true")
			break
		}
		w.h[key] = values
	}
	// The time keeps apart what two streams stored under one sequence, one of them made anew.
	w.add(hdrMsgID, fmt.Sprintf("%s:%d:%s:%d", streamPOS, v.StreamSeq, d.Endpoint, v.Stored.UnixNano()))
	w.add(hdrDeadReason, d.Reason)
	w.add(hdrDeadEndpoint, d.Endpoint)
	w.int(hdrDeadAttempts, int64(d.Attempts))
	w.int(hdrDeadStatus, int64(d.Status))
	w.add(hdrDeadSubject, v.Subject)
	w.uint(hdrDeadStreamSeq, v.StreamSeq)
	w.add(hdrDeadStored, v.Stored.UTC().Format(time.RFC3339Nano))
	name := func(s string) string {
		if envelope.ValidName(s) != nil {
			return "-"
		}
		return s
	}
	return &nats.Msg{Subject: "dlq." + name(v.Site) + "." + name(v.Kind), Header: w.h, Data: v.Body}, nil
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// headerSafe reports whether a header read from the hub can be written again.
func headerSafe(key string, values []string) bool {
	for i := range len(key) {
		if c := key[i]; c <= ' ' || c > '~' || c == ':' {
			return false
		}
	}
	for _, v := range values {
		if strings.ContainsAny(v, "\r\n") {
			return false
		}
	}
	return key != ""
}

// status of a control message from the hub: one without a body, made of a status line.
func status(m *nats.Msg) (code, description string) {
	return m.Header.Get("Status"), m.Header.Get("Description")
}

var errNotAck = errors.New("reply subject is not $JS.ACK.…")

// meta is what a delivered message's reply subject says of it.
type meta struct {
	delivered, stream, consumer uint64
	stored                      time.Time
}

// parseMeta reads
//
//	$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>
//	$JS.ACK.<domain>.<account>.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>[.<token>]
func parseMeta(reply string) (meta, error) {
	rest, ok := strings.CutPrefix(reply, "$JS.ACK.")
	if !ok {
		return meta{}, errNotAck
	}
	skip := 2
	if n := strings.Count(rest, "."); n >= 8 {
		skip = 4
	} else if n != 6 {
		return meta{}, errNotAck
	}
	for range skip {
		_, rest, _ = strings.Cut(rest, ".")
	}
	var n [4]uint64
	for i := range n {
		var s string
		s, rest, _ = strings.Cut(rest, ".")
		v, err := strconv.ParseUint(s, 10, 63)
		if err != nil {
			return meta{}, errNotAck
		}
		n[i] = v
	}
	return meta{delivered: n[0], stream: n[1], consumer: n[2], stored: time.Unix(0, int64(n[3]))}, nil
}

// deliver makes a Delivery of a message of POS.
func (b *Broker) deliver(m *nats.Msg, at meta) *Delivery {
	d := &Delivery{
		StreamSeq:   at.stream,
		ConsumerSeq: at.consumer,
		Stored:      at.stored,
		Redelivered: at.delivered > 1,
		Subject:     m.Subject,
		Header:      m.Header,
		Body:        m.Data,
	}
	_, d.Site, d.Kind, d.Edge, _ = splitStored(m.Subject)
	if d.Event, d.Err = decodeEvent(m.Subject, m.Header, m.Data, b.partitions); d.Err != nil {
		b.metrics.malformed.WithLabelValues("event").Inc()
	}
	return d
}
