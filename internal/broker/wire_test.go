package broker

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// storedAs is the subject the stream gives an event.
func storedAs(subject string, partitions int) string {
	rest := strings.TrimPrefix(subject, "pos.")
	site, _, _ := strings.Cut(rest, ".")
	return fmt.Sprintf("pos.%d.%s", partitionOf(site, partitions), rest)
}

func TestEventComesBackAsItWas(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*Event)
	}{
		{"an order", func(*Event) {}},
		{"without an order key", func(e *Event) { e.Order = "" }},
		{"a run", func(e *Event) { e.From, e.Kind = 2, KindExpired }},
		{"delivered in the store", func(e *Event) { e.Via = "store" }},
		{"without a trace", func(e *Event) { e.Traceparent = "" }},
		{"the largest numbers", func(e *Event) { e.Seq, e.Accepted, e.Deadline = 1<<64-1, maxTime, maxTime }},
		{"a message with a line break at its end", func(e *Event) { e.Triple.Message = []byte("YQ==\n") }},
		{"the longest names", func(e *Event) {
			long := strings.Repeat("a", 63)
			e.Site, e.Kind, e.Edge, e.Bind = long, long, long, long
		}},
		{"a ULID as its id", func(e *Event) { e.ID, e.Epoch = "01ARZ3NDEKTSV4RRFFQ69G5FAV", "01ARZ3NDEKTSV4RRFFQ69G5FAV" }},
	} {
		t.Run(row.name, func(t *testing.T) {
			want := event("store-1", 9)
			row.change(want)
			m, err := encodeEvent(want)
			if err != nil {
				t.Fatal(err)
			}
			got, err := decodeEvent(storedAs(m.Subject, 4), m.Header, m.Data, 4)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(*want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestEventOnTheWire(t *testing.T) {
	m, err := encodeEvent(event("store-1", 9))
	if err != nil {
		t.Fatal(err)
	}
	want := &nats.Msg{
		Subject: "pos.store-1.order.edge-1",
		Header: nats.Header{
			"Nats-Msg-Id": {"edge-1.e1:store-1:9:tag-9"}, "Kb-Id": {"id9"}, "Kb-Edge": {"edge-1.e1"}, "Kb-Seq": {"9"}, "Kb-Kind": {"order"},
			"Kb-Fingerprint": {"0cc175b9c0f1b6a8"}, "Kb-Order": {"order9"}, "Kb-Accepted": {"1700000000000"}, "Kb-Deadline": {"1700000600000"},
			"Kb-Via": {"hub"}, "Kb-Bind": {"b1"}, "Kb-Tag": {"tag-9"},
			"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
		},
		Data: []byte(`{"iv":"AAECAwQFBgcICQoL","fingerprint":"0cc175b9c0f1b6a8","message":"Y2lwaGVydGV4dA=="}`),
	}
	if d := cmp.Diff(want.Subject, m.Subject) + cmp.Diff(want.Header, m.Header) + cmp.Diff(string(want.Data), string(m.Data)); d != "" {
		t.Error(d)
	}
	run := event("store-1", 9)
	run.From = 4
	if m, err = encodeEvent(run); err != nil || m.Header.Get("Kb-From") != "4" {
		t.Errorf("a run's Kb-From is %q, %v", m.Header.Get("Kb-From"), err)
	}
}

func TestEventThatDoesNotFitTheWireIsRefused(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*Event)
		want   string
	}{
		{"a site that is every site", func(e *Event) { e.Site = "*" }, "site"},
		{"a site that is two tokens", func(e *Event) { e.Site = "a.b" }, "site"},
		{"no site", func(e *Event) { e.Site = "" }, "site"},
		{"a kind in capitals", func(e *Event) { e.Kind = "Order" }, "Kb-Kind"},
		{"an edge with a space", func(e *Event) { e.Edge = "a b" }, "Kb-Edge"},
		{"an epoch with a dot", func(e *Event) { e.Epoch = "a.b" }, "Kb-Edge"},
		{"no epoch", func(e *Event) { e.Epoch = "" }, "Kb-Edge"},
		{"no id", func(e *Event) { e.ID = "" }, "Kb-Id"},
		{"an id with a line break", func(e *Event) { e.ID = "a\r\nNats-Rollup: all" }, "Kb-Id"},
		{"an id that is too long", func(e *Event) { e.ID = strings.Repeat("a", 129) }, "Kb-Id"},
		{"no sequence", func(e *Event) { e.Seq, e.From = 0, 0 }, "Kb-Seq"},
		{"no first sequence", func(e *Event) { e.From = 0 }, "Kb-From"},
		{"a run that goes backwards", func(e *Event) { e.From = 10 }, "Kb-From"},
		{"a deadline before time began", func(e *Event) { e.Deadline = -1 }, "Kb-Deadline"},
		{"a deadline nobody can write", func(e *Event) { e.Deadline = maxTime + 1 }, "Kb-Deadline"},
		{"an unknown way", func(e *Event) { e.Via = "pigeon" }, "Kb-Via"},
		{"no binding key", func(e *Event) { e.Bind = "" }, "Kb-Bind"},
		{"no tag", func(e *Event) { e.Tag = "" }, "Kb-Tag"},
		{"no fingerprint", func(e *Event) { e.Triple.Fingerprint = nil }, "Kb-Fingerprint"},
		{"an order key with a space", func(e *Event) { e.Order = "a b" }, "Kb-Order"},
	} {
		t.Run(row.name, func(t *testing.T) {
			e := event("store-1", 9)
			row.change(e)
			_, err := encodeEvent(e)
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), row.want) {
				t.Errorf("error is %v, want ErrInvalid about %s", err, row.want)
			}
		})
	}
	e := event("store-1", 9)
	e.Traceparent = "nonsense\r\nKb-Tag: other"
	if m, err := encodeEvent(e); err != nil || m.Header.Get("traceparent") != "" {
		t.Errorf("a broken trace must cost nothing and go nowhere: %v, %v", m, err)
	}
}

func TestMalformedEventIsToldNotTrusted(t *testing.T) {
	type message struct {
		subject string
		h       nats.Header
		body    []byte
	}
	set := func(key string, values ...string) func(*message) {
		return func(m *message) { m.h[key] = values }
	}
	drop := func(key string) func(*message) {
		return func(m *message) { delete(m.h, key) }
	}
	subject := func(s string) func(*message) {
		return func(m *message) { m.subject = s }
	}
	body := func(s string) func(*message) {
		return func(m *message) { m.body = []byte(s) }
	}
	p := partitionOf("store-1", 4)
	type row struct {
		name   string
		change func(*message)
		want   string
	}
	rows := []row{
		{"no headers at all", func(m *message) { m.h = nil }, "Kb-Kind"},
		{"number with a sign", set("Kb-Seq", "+9"), "Kb-Seq"},
		{"number with zeros before", set("Kb-Seq", "09"), "Kb-Seq"},
		{"number with a space", set("Kb-Seq", "9 "), "Kb-Seq"},
		{"number in hex", set("Kb-Seq", "0x9"), "Kb-Seq"},
		{"number that is too large", set("Kb-Seq", "18446744073709551616"), "Kb-Seq"},
		{"no number", set("Kb-Seq", ""), "Kb-Seq"},
		{"sequence zero", set("Kb-Seq", "0"), "Kb-Seq"},
		{"negative time", set("Kb-Deadline", "-1"), "Kb-Deadline"},
		{"time nobody can write", set("Kb-Accepted", "99999999999999999"), "Kb-Accepted"},
		{"run that is none", set("Kb-From", "9"), "Kb-From"},
		{"run from zero", set("Kb-From", "0"), "Kb-From"},
		{"run that goes backwards", set("Kb-From", "10"), "Kb-From"},
		{"edge without epoch", set("Kb-Edge", "edge-1"), "Kb-Edge"},
		{"edge with two epochs", set("Kb-Edge", "edge-1.e1.e2"), "Kb-Edge"},
		{"another edge than the subject's", set("Kb-Edge", "edge-2.e1"), "Kb-Edge"},
		{"another kind than the subject's", set("Kb-Kind", "alert"), "Kb-Kind"},
		{"another fingerprint than the body's", set("Kb-Fingerprint", "other"), "Kb-Fingerprint"},
		{"fingerprint with a space", set("Kb-Fingerprint", "a b"), "Kb-Fingerprint"},
		{"message id of another event", set("Nats-Msg-Id", "edge-1.e1:store-1:8"), "Nats-Msg-Id"},
		{"unknown way", set("Kb-Via", "HUB"), "Kb-Via"},
		{"binding key with a dot", set("Kb-Bind", "b.1"), "Kb-Bind"},
		{"empty order key", set("Kb-Order", ""), "Kb-Order"},
		{"two order keys", set("Kb-Order", "a", "b"), "Kb-Order"},
		{"header in other letters", func(m *message) { m.h["kb-id"] = m.h["Kb-Id"]; delete(m.h, "Kb-Id") }, "Kb-Id"},

		{"subject of another partition", subject(fmt.Sprintf("pos.%d.store-1.order.edge-1", (p+1)%4)), "partition"},
		{"subject of the right partition written otherwise", subject(fmt.Sprintf("pos.0%d.store-1.order.edge-1", p)), "partition"},
		{"subject of another kind", subject(fmt.Sprintf("pos.%d.store-1.alert.edge-1", p)), "Kb-Kind"},
		{"subject of another edge", subject(fmt.Sprintf("pos.%d.store-1.order.edge-2", p)), "Kb-Edge"},
		{"subject of another site", subject(fmt.Sprintf("pos.%d.store-2.order.edge-1", partitionOf("store-2", 4))), "Nats-Msg-Id"},
		{"subject with a site that is no name", subject(fmt.Sprintf("pos.%d.STORE.order.edge-1", partitionOf("STORE", 4))), "site"},
		{"subject that is too short", subject("pos.0.store-1.order"), "subject"},
		{"subject that is too long", subject("pos.0.store-1.order.edge-1.x"), "subject"},
		{"subject of another stream", subject("kitchen.store-1.report"), "subject"},
		{"no subject", subject(""), "subject"},

		{"no body", body(""), "body"},
		{"body that is no JSON", body("{"), "body"},
		{"body with a field twice", body(`{"iv":"a","iv":"b","fingerprint":"0cc175b9c0f1b6a8","message":"c"}`), "body"},
		{"body without a message", body(`{"iv":"a","fingerprint":"0cc175b9c0f1b6a8"}`), "body"},
		{"body with something behind it", body(`{"iv":"a","fingerprint":"0cc175b9c0f1b6a8","message":"c"}{}`), "body"},
	}
	for _, key := range []string{hdrMsgID, hdrID, hdrEdge, hdrSeq, hdrKind, hdrFingerprint, hdrAccepted, hdrDeadline, hdrVia, hdrBind, hdrTag} {
		rows = append(rows,
			row{"without " + key, drop(key), key},
			row{"with an empty " + key, set(key, ""), key},
			row{"with " + key + " twice", func(m *message) { m.h[key] = append(m.h[key], m.h[key]...) }, key})
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			good, err := encodeEvent(event("store-1", 9))
			if err != nil {
				t.Fatal(err)
			}
			m := message{storedAs(good.Subject, 4), maps.Clone(good.Header), good.Data}
			row.change(&m)
			_, err = decodeEvent(m.subject, m.h, m.body, 4)
			if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), row.want) {
				t.Errorf("error is %v, want ErrMalformed about %s", err, row.want)
			}
		})
	}

	t.Run("a broken trace costs nothing", func(t *testing.T) {
		m, err := encodeEvent(event("store-1", 9))
		if err != nil {
			t.Fatal(err)
		}
		m.Header["traceparent"] = []string{"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01"}
		e, err := decodeEvent(storedAs(m.Subject, 4), m.Header, m.Data, 4)
		if err != nil || e.Traceparent != "" {
			t.Errorf("trace %q, %v", e.Traceparent, err)
		}
	})
}

func TestReportComesBackAsItWas(t *testing.T) {
	for _, row := range []struct {
		name   string
		change func(*Report)
	}{
		{"delivered", func(*Report) {}},
		{"failed", func(r *Report) { r.State, r.Reason, r.Status, r.Attempts = StateFailed, "deadline", 0, 12 }},
		{"no endpoint", func(r *Report) { r.State, r.Reason, r.Endpoint = StateFailed, "no-route", NoEndpoint }},
		{"a replay", func(r *Report) { r.N = 3 }},
		{"the largest numbers", func(r *Report) {
			r.Seq, r.StreamSeq, r.Status, r.Started, r.Settled = 1<<64-1, 1<<64-1, 999, maxTime, maxTime
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			want := report("store-1", 9)
			row.change(want)
			m, err := encodeReport(want)
			if err != nil {
				t.Fatal(err)
			}
			for _, subject := range []string{m.Subject, "live." + m.Subject} {
				got, err := decodeReport(subject, m.Header, m.Data)
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(want, got); d != "" {
					t.Error(d)
				}
			}
		})
	}
}

func TestReportOnTheWire(t *testing.T) {
	r := report("store-1", 9)
	r.State, r.Reason = StateFailed, "deadline"
	m, err := encodeReport(r)
	if err != nil {
		t.Fatal(err)
	}
	wantHeader := nats.Header{
		"Nats-Msg-Id": {"edge-1.e1:store-1:9:main:0"}, "Kb-Id": {"id9"}, "Kb-Edge": {"edge-1.e1"}, "Kb-Seq": {"9"}, "Kb-Kind": {"order"},
		"Kb-Endpoint": {"main"}, "Kb-N": {"0"}, "Kb-State": {"failed"}, "Kb-Reason": {"deadline"}, "Kb-Status": {"200"}, "Kb-Attempts": {"1"},
		"Kb-Started": {"1700000000100"}, "Kb-Settled": {"1700000000200"}, "Kb-Stream-Seq": {"7"}, "Kb-Bind": {"b1"}, "Kb-Tag": {"tag-9"},
	}
	wantBody := `{"iv":"AAECAwQFBgcICQoL","fingerprint":"kb:b1","message":"c2VhbGVk"}`
	if d := cmp.Diff("kitchen.store-1.report", m.Subject) + cmp.Diff(wantHeader, m.Header) + cmp.Diff(wantBody, string(m.Data)); d != "" {
		t.Error(d)
	}
}

func TestMalformedReportIsTold(t *testing.T) {
	keys := []string{hdrMsgID, hdrID, hdrEdge, hdrSeq, hdrKind, hdrEndpoint, hdrN, hdrState, hdrStatus, hdrAttempts, hdrStarted, hdrSettled, hdrStreamSeq, hdrBind, hdrTag}
	for _, key := range keys {
		for _, values := range [][]string{nil, {}, {""}, {"!"}, {"a", "b"}} {
			m, err := encodeReport(report("store-1", 9))
			if err != nil {
				t.Fatal(err)
			}
			m.Header[key] = values
			if _, err := decodeReport(m.Subject, m.Header, m.Data); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), key) {
				t.Errorf("%s = %q: error is %v", key, values, err)
			}
		}
	}
	m, err := encodeReport(report("store-1", 9))
	if err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"", "kitchen.store-1", "kitchen.store-1.bump", "kitchen.store-2.report", "kitchen..report", "live.pos.store-1.report", "kitchen.store-1.report.x"} {
		if _, err := decodeReport(subject, m.Header, m.Data); !errors.Is(err, ErrMalformed) {
			t.Errorf("subject %q: error is %v", subject, err)
		}
	}
	if _, err := decodeReport(m.Subject, m.Header, []byte("{}")); !errors.Is(err, ErrMalformed) {
		t.Errorf("body without a triple: error is %v", err)
	}
}

func TestReportThatDoesNotFitTheWireIsRefused(t *testing.T) {
	for name, change := range map[string]func(*Report){
		"unknown state":           func(r *Report) { r.State = "lost" },
		"no endpoint":             func(r *Report) { r.Endpoint = "" },
		"endpoint with a dot":     func(r *Report) { r.Endpoint = "a.b" },
		"negative replay":         func(r *Report) { r.N = -1 },
		"status of four digits":   func(r *Report) { r.Status = 1000 },
		"reason that is a text":   func(r *Report) { r.Reason = "it broke" },
		"settled before time was": func(r *Report) { r.Settled = -1 },
		"nothing sealed":          func(r *Report) { r.Triple = envelope.Triple{} },
		"no kind":                 func(r *Report) { r.Kind = "" },
	} {
		r := report("store-1", 9)
		change(r)
		if _, err := encodeReport(r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestDeadLetterCarriesTheEventAsItStood(t *testing.T) {
	stored := time.Unix(1_700_000_000, 123)
	d := DeadLetter{Reason: "quarantine", Attempts: 2, Status: 422, Delivery: &Delivery{
		Site: "store-1", Kind: "order", StreamSeq: 41, Stored: stored, Subject: "pos.3.store-1.order.edge-1", Body: []byte("as it was"),
		Header: http.Header{
			"Kb-Id": {"a", "b"}, "Kb-Tag": {"t"}, "X-Other": {"x"},
			"Nats-Msg-Id": {"edge-1.e1:store-1:9:tag-9"}, "Nats-Rollup": {"all"}, "nats-ttl": {"1s"}, "Kb-Dead-Reason": {"forged"},
			"Broken\r\nNats-Rollup": {"all"}, "Also": {"a\r\nNats-Rollup: all"},
		},
	}}
	m, err := encodeDeadLetter(d)
	if err != nil {
		t.Fatal(err)
	}
	want := nats.Header{
		"Kb-Id": {"a", "b"}, "Kb-Tag": {"t"}, "X-Other": {"x"},
		"Nats-Msg-Id": {"POS:41:-:1700000000000000123"}, "Kb-Dead-Reason": {"quarantine"}, "Kb-Dead-Endpoint": {"-"},
		"Kb-Dead-Attempts": {"2"}, "Kb-Dead-Status": {"422"}, "Kb-Dead-Subject": {"pos.3.store-1.order.edge-1"},
		"Kb-Dead-Stream-Seq": {"41"}, "Kb-Dead-Stored": {"2023-11-14T22:13:20.000000123Z"},
	}
	if d := cmp.Diff("dlq.store-1.order", m.Subject) + cmp.Diff(want, m.Header) + cmp.Diff("as it was", string(m.Data)); d != "" {
		t.Error(d)
	}

	d.Delivery.Site, d.Delivery.Kind = "*", "Order"
	d.Delivery.Header = http.Header{"A": {strings.Repeat("x", maxDeadHeaders)}, "Kb-Id": {"a"}}
	if m, err = encodeDeadLetter(d); err != nil {
		t.Fatal(err)
	}
	if m.Subject != "dlq.-.-" {
		t.Errorf("names that are none: subject %s", m.Subject)
	}
	if m.Header.Get("Kb-Dead-Cut") != "true" || m.Header.Get("A") != "" {
		t.Error("headers that fill a message are not cut")
	}
	for name, d := range map[string]DeadLetter{
		"nothing":                   {Reason: "quarantine"},
		"no reason":                 {Delivery: &Delivery{}},
		"a reason that is a text":   {Delivery: &Delivery{}, Reason: "it broke"},
		"an endpoint that is a URL": {Delivery: &Delivery{}, Reason: "quarantine", Endpoint: "https://kitchen/"},
		"a status that is none":     {Delivery: &Delivery{}, Reason: "quarantine", Status: -1},
	} {
		if _, err := encodeDeadLetter(d); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestReplySubjectsAreRead(t *testing.T) {
	want := meta{delivered: 2, stream: 30, consumer: 4, stored: time.Unix(0, 1_700_000_000_000_000_005)}
	for _, reply := range []string{
		"$JS.ACK.POS.kitchen-1.2.30.4.1700000000000000005.6",
		"$JS.ACK.hub.ACCHASH.POS.kitchen-1.2.30.4.1700000000000000005.6",
		"$JS.ACK._.ACCHASH.POS.kitchen-1.2.30.4.1700000000000000005.6.token",
	} {
		if got, err := parseMeta(reply); err != nil || got != want {
			t.Errorf("%s: %+v, %v", reply, got, err)
		}
	}
	for _, reply := range []string{"", "$JS.ACK.", "$JS.FC.POS.x.y", "$JS.ACK.POS.kitchen-1.2.30.4.5", "$JS.ACK.POS.kitchen-1.2.30.x.5.6", "_INBOX.x"} {
		if got, err := parseMeta(reply); err == nil {
			t.Errorf("%q gave %+v", reply, got)
		}
	}
}

// FuzzDecode reads any message as an event and as a report. What is accepted must be
// exactly what would be written.
func FuzzDecode(f *testing.F) {
	header := func(h nats.Header) []byte {
		var b bytes.Buffer
		b.WriteString("NATS/1.0\r\n")
		if err := http.Header(h).Write(&b); err != nil {
			f.Fatal(err)
		}
		b.WriteString("\r\n")
		return b.Bytes()
	}
	e, err := encodeEvent(event("store-1", 9))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(storedAs(e.Subject, 4), header(e.Header), e.Data)
	r, err := encodeReport(report("store-1", 9))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(r.Subject, header(r.Header), r.Data)
	f.Add("pos.0.a.b.c", []byte("NATS/1.0 404 Not Found\r\n\r\n"), []byte(nil))

	f.Fuzz(func(t *testing.T, subject string, head, body []byte) {
		h, err := nats.DecodeHeadersMsg(head)
		if err != nil {
			return
		}
		same := func(m *nats.Msg, err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("accepted, and cannot be written: %v", err)
			}
			for key, values := range m.Header {
				if d := cmp.Diff(values, h[key]); d != "" {
					t.Errorf("%s: %s", key, d)
				}
			}
			before, err1 := envelope.ParseTriple(body, 0)
			after, err2 := envelope.ParseTriple(m.Data, 0)
			if d := cmp.Diff(before, after); d != "" || err1 != nil || err2 != nil {
				t.Errorf("%s %v %v", d, err1, err2)
			}
		}
		if e, err := decodeEvent(subject, h, body, 4); err == nil {
			m, err := encodeEvent(&e)
			same(m, err)
			if storedAs(m.Subject, 4) != subject {
				t.Errorf("subject %s is written as %s", subject, m.Subject)
			}
		} else if !errors.Is(err, ErrMalformed) {
			t.Errorf("error is %v", err)
		}
		if r, err := decodeReport(subject, h, body); err == nil {
			m, err := encodeReport(r)
			same(m, err)
		} else if !errors.Is(err, ErrMalformed) {
			t.Errorf("error is %v", err)
		}
		// A malformed event is quarantined: that must always be possible.
		d := &Delivery{Subject: subject, Header: h, Body: body}
		_, d.Site, d.Kind, d.Edge, _ = splitStored(subject)
		if _, err := encodeDeadLetter(DeadLetter{Delivery: d, Reason: "quarantine"}); err != nil {
			t.Errorf("no dead letter: %v", err)
		}
	})
}

func BenchmarkEvent(b *testing.B) {
	e := event("store-1", 9)
	e.Triple.Message = bytes.Repeat([]byte("A"), 1400)
	m, err := encodeEvent(e)
	if err != nil {
		b.Fatal(err)
	}
	subject := storedAs(m.Subject, 4)
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := encodeEvent(e); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("decode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := decodeEvent(subject, m.Header, m.Data, 4); err != nil {
				b.Fatal(err)
			}
		}
	})
}
