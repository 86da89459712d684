package router

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Reason says why an attempt or a delivery ended as it did. The vocabulary is closed: it
// is the value of Kb-Reason and a label of the metrics.
type Reason string

const (
	// The Kitchen took it.
	ReasonAccepted Reason = "accepted" // 2xx
	ReasonRepeated Reason = "repeated" // 409, and an earlier attempt may have arrived

	// The Kitchen answered, and another attempt would be answered alike.
	ReasonConflict      Reason = "conflict"      // 409 to a first attempt
	ReasonUndecryptable Reason = "undecryptable" // 400 code 2, under each key there is
	ReasonUnknownKey    Reason = "unknown-key"   // 400 code 3, under each key there is
	ReasonRefused       Reason = "refused"       // any other 4xx
	ReasonRedirect      Reason = "redirect"      // 3xx, never followed
	ReasonGone          Reason = "gone"          // 410: the endpoint is stopped

	// The Kitchen answered, and later may be different.
	ReasonCredential   Reason = "credential"    // 401, 403; 400 code 1 although iv and fingerprint were sent
	ReasonUnencrypted  Reason = "unencrypted"   // 400 code 1, and none were sent
	ReasonBusy         Reason = "busy"          // 408, 425
	ReasonThrottled    Reason = "throttled"     // 429
	ReasonKitchenError Reason = "kitchen-error" // 5xx
	ReasonUnexpected   Reason = "unexpected"    // a status nobody defined

	// There was no answer.
	ReasonTimeout     Reason = "timeout" // of the attempt, or the deadline came
	ReasonCut         Reason = "cut"     // the connection broke, or what came was not HTTP
	ReasonRefusedConn Reason = "conn-refused"
	ReasonDNS         Reason = "dns"
	ReasonTLS         Reason = "tls"
	ReasonNetwork     Reason = "network" // any other failure to connect

	// There was no attempt.
	ReasonKeys           Reason = "keys"            // nothing to post with the keys at hand
	ReasonExpired        Reason = "expired"         // the deadline came, and the latest attempt is known to have failed
	ReasonOutcomeUnknown Reason = "outcome-unknown" // the deadline came, and the latest attempt is unanswered
	ReasonStopped        Reason = "stopped"         // the endpoint answered 410 before; people learn it now, not at the deadline
	ReasonNoRoute        Reason = "no-route"        // the site has no Kitchen here
	ReasonQuarantine     Reason = "quarantine"      // not what an edge sent: neither delivered nor reported
)

// verdict is what becomes of a delivery after an attempt.
type verdict int

const (
	// again: later, within the deadline. The zero value, since an outcome that nobody
	// thought of must not cost an order.
	again verdict = iota
	delivered
	deadLetter
	rewrap // get the site's keys anew, seal under another one, once; then deadLetter
	reform // get the site's keys anew: is it to be encrypted or not?
	stop   // deadLetter, and the endpoint takes nothing any more
)

// outcome is what classify looks at.
type outcome struct {
	status  int    // of the answer, 0 without one
	code    int    // errorCode of a 400, 0 without one
	failure Reason // why there was no answer
	earlier bool   // an earlier attempt of this delivery may have arrived
	sealed  bool   // iv and fingerprint were sent
}

type ruling struct {
	verdict verdict
	reason  Reason
	alarm   bool // someone has to act
}

// rules is DESIGN's table of failures as far as it is about one attempt. The first row
// that fits rules.
var rules = []struct {
	name     string
	from, to int // status, inclusive
	code     int // 0: any
	when     func(outcome) bool
	ruling
}{
	{name: "2xx", from: 200, to: 299, ruling: ruling{delivered, ReasonAccepted, false}},
	{name: "409 to a repeat", from: 409, to: 409, when: func(o outcome) bool { return o.earlier }, ruling: ruling{delivered, ReasonRepeated, false}},
	{name: "409", from: 409, to: 409, ruling: ruling{deadLetter, ReasonConflict, false}},
	{name: "400 code 3", from: 400, to: 400, code: 3, ruling: ruling{rewrap, ReasonUnknownKey, false}},
	{name: "400 code 2", from: 400, to: 400, code: 2, ruling: ruling{rewrap, ReasonUndecryptable, false}},
	{name: "400 code 1, headers sent", from: 400, to: 400, code: 1, when: func(o outcome) bool { return o.sealed }, ruling: ruling{again, ReasonCredential, true}},
	{name: "400 code 1, none sent", from: 400, to: 400, code: 1, ruling: ruling{reform, ReasonUnencrypted, false}},
	{name: "401", from: 401, to: 401, ruling: ruling{again, ReasonCredential, true}},
	{name: "403", from: 403, to: 403, ruling: ruling{again, ReasonCredential, true}},
	{name: "408", from: 408, to: 408, ruling: ruling{again, ReasonBusy, false}},
	{name: "410", from: 410, to: 410, ruling: ruling{stop, ReasonGone, true}},
	{name: "425", from: 425, to: 425, ruling: ruling{again, ReasonBusy, false}},
	{name: "429", from: 429, to: 429, ruling: ruling{again, ReasonThrottled, false}},
	{name: "404, 405, 413, 415, 422, other 4xx", from: 400, to: 499, ruling: ruling{deadLetter, ReasonRefused, false}},
	{name: "3xx", from: 300, to: 399, ruling: ruling{deadLetter, ReasonRedirect, false}},
	{name: "5xx", from: 500, to: 599, ruling: ruling{again, ReasonKitchenError, false}},
}

// classify rules over one attempt.
func classify(o outcome) ruling {
	if o.status == 0 {
		return ruling{again, o.failure, false}
	}
	for i := range rules {
		r := &rules[i]
		if o.status >= r.from && o.status <= r.to && (r.code == 0 || r.code == o.code) && (r.when == nil || r.when(o)) {
			return r.ruling
		}
	}
	return ruling{again, ReasonUnexpected, false}
}

// errorCode reads the errorCode of the seed's error bodies; 0 when there is none. It
// forgives what Kitchens get wrong around it: a byte order mark, a number in quotes, the
// name in other capitals, further members.
func errorCode(body []byte) int {
	var e struct {
		ErrorCode json.RawMessage `json:"errorCode"`
	}
	if json.Unmarshal(bytes.TrimPrefix(body, []byte("\xef\xbb\xbf")), &e) != nil {
		return 0
	}
	n, err := strconv.Atoi(strings.TrimSpace(strings.Trim(string(e.ErrorCode), `"`)))
	if err != nil {
		return 0
	}
	return n
}

// retryAfter reads Retry-After in both its forms: seconds, or a date, which is taken
// relative to the answer's own Date when it has one, so that a Kitchen's wrong clock
// does not matter. ok is false when the header is missing or means nothing.
func retryAfter(h http.Header, now time.Time) (wait time.Duration, ok bool) {
	const most = 1 << 31 // seconds; what is longer is capped by the caller anyway
	value := strings.TrimSpace(h.Get("Retry-After"))
	if value == "" {
		return 0, false
	}
	if strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > most {
			seconds = most
		}
		return time.Duration(seconds) * time.Second, true
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0, false
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date
	}
	return max(at.Sub(now), 0), true
}
