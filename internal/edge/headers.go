package edge

import (
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

// The headers of a request, beside those that the door reads.
const (
	headerKey    = "Idempotency-Key"
	headerPrefer = "Prefer"
	headerWithin = "Kb-Within"
	headerTrace  = "Traceparent"

	// headerID stands in every answer to a request that got an id.
	headerID = "Kb-Id"
)

const maxKeyBytes = 255

// wishes are what the headers of one request ask for.
type wishes struct {
	key    string        // Idempotency-Key, "" when there is none
	wait   time.Duration // how long to wait for the Kitchen
	within time.Duration // from acceptance to the deadline, not above the kind's
	trace  string
}

// readWishes reads the headers that steer one request.
func readWishes(h http.Header, wait, maxWait, deadline time.Duration) (wishes, *door.Refusal) {
	w := wishes{wait: wait, within: deadline, trace: h.Get(headerTrace)}
	var wrong string
	if w.key, wrong = idempotencyKey(h.Values(headerKey)); wrong != "" {
		return w, problem(http.StatusBadRequest, "idempotency-key", wrong)
	}
	within, wrong := withinSeconds(h.Values(headerWithin))
	if wrong != "" {
		return w, problem(http.StatusBadRequest, "within", wrong)
	}
	if within > 0 {
		w.within = min(w.within, within)
	}
	if asked, ok := preferredWait(h.Values(headerPrefer)); ok {
		w.wait = min(asked, maxWait)
	}
	return w, nil
}

// idempotencyKey reads the key, "" when there is none, or says what is wrong with it.
func idempotencyKey(values []string) (key, wrong string) {
	switch len(values) {
	case 0:
		return "", ""
	case 1:
	default:
		return "", "Idempotency-Key stands more than once; send one."
	}
	key = values[0]
	if key == "" || len(key) > maxKeyBytes {
		return "", fmt.Sprintf("Idempotency-Key has %d characters; 1 to %d are allowed.", len(key), maxKeyBytes)
	}
	for i := range len(key) {
		if key[i] <= ' ' || key[i] > '~' {
			return "", "Idempotency-Key holds something other than visible ASCII characters; blanks are not allowed either."
		}
	}
	return key, ""
}

// withinSeconds reads Kb-Within, 0 when there is none, or says what is wrong with it.
func withinSeconds(values []string) (within time.Duration, wrong string) {
	switch len(values) {
	case 0:
		return 0, ""
	case 1:
	default:
		return 0, "Kb-Within stands more than once; send one."
	}
	d, ok := seconds(values[0])
	if !ok || d == 0 {
		return 0, "Kb-Within must be a whole number of seconds, at least 1."
	}
	return d, ""
}

// preferredWait reads the wait preference of RFC 7240, in seconds. What cannot be read is
// no preference, as the RFC says of preferences; of several the first counts.
func preferredWait(values []string) (time.Duration, bool) {
	for _, v := range values {
		for v != "" {
			var one string
			one, v = cutUnquoted(v, ',')
			one, _ = cutUnquoted(one, ';') // parameters of the preference
			name, value, _ := strings.Cut(one, "=")
			if !strings.EqualFold(strings.Trim(name, " \t"), "wait") {
				continue
			}
			value = strings.Trim(value, " \t")
			if n := len(value); n >= 2 && value[0] == '"' && value[n-1] == '"' {
				value = value[1 : n-1]
			}
			return seconds(value)
		}
	}
	return 0, false
}

// cutUnquoted cuts s at the first sep that stands outside a quoted string.
func cutUnquoted(s string, sep byte) (before, after string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case c == sep && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

// seconds reads a whole number of seconds, digits only. What would not fit is as long
// as can be: every caller caps it.
func seconds(text string) (time.Duration, bool) {
	const most = 1 << 31
	if text == "" || strings.Trim(text, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n > most {
		n = most
	}
	return time.Duration(n) * time.Second, true
}

// checkMedia refuses a body that is not said to be plain JSON text.
func checkMedia(h http.Header) *door.Refusal {
	for _, v := range h.Values("Content-Encoding") {
		if !strings.EqualFold(strings.TrimSpace(v), "identity") {
			return problem(http.StatusUnsupportedMediaType, "content-encoding", "A Content-Encoding is not accepted here; send the body as it is.")
		}
	}
	values := h.Values("Content-Type")
	if len(values) == 1 {
		if values[0] == "application/json" { // as nearly everybody writes it
			return nil
		}
		kind, params, err := mime.ParseMediaType(values[0])
		charset, has := params["charset"]
		if err == nil && kind == "application/json" && (!has || strings.EqualFold(charset, "utf-8")) {
			return nil
		}
	}
	return problem(http.StatusUnsupportedMediaType, "content-type", "Content-Type must be application/json, in UTF-8.")
}
