package door

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"
)

// Refusal is one answer that keeps a visitor out. It is written in one of two
// forms: the seed's body when ErrorCode is set, else problem details as of RFC 9457.
//
// A Refusal is not changed once it is made: the package's own are shared by all
// requests.
type Refusal struct {
	// Status is the HTTP status, always 400 with an ErrorCode.
	Status int
	// ErrorCode is the seed's: 1, 2 or 3. 0 = a problem document.
	ErrorCode int
	// Title is the seed's message with an ErrorCode, else the problem's title;
	// "" = the status's own text.
	Title string
	// Detail says what is wrong with this request and what to do. It never
	// repeats what the visitor sent.
	Detail string
	// Type is the problem's type URI, "" = about:blank.
	Type string
	// RetryAfter is sent as Retry-After, rounded up to whole seconds. 0 = not sent.
	RetryAfter time.Duration
	// Ext holds further members of the problem document; type, title, status and
	// detail cannot be replaced by it.
	Ext map[string]any
}

// The seed's refusals, and the third one of the vendor's Kitchen API. Each is a
// status 400. They are shared: write them, do not change them.
var (
	// Incorrect: authorization, IV or fingerprint is missing, or there is more than one.
	Incorrect = &Refusal{Status: http.StatusBadRequest, ErrorCode: 1, Title: "Incorrect security headers"}
	// Undecryptable: the IV's form is wrong, or the body does not open.
	Undecryptable = &Refusal{Status: http.StatusBadRequest, ErrorCode: 2, Title: "Unable to decrypt payload"}
	// Mismatch: the fingerprint is not one the site accepts now, or the site has
	// encryption switched off and gets a fingerprint all the same.
	Mismatch = &Refusal{Status: http.StatusBadRequest, ErrorCode: 3, Title: "Security credential mismatch"}
)

// Problem makes a refusal that is written as a problem document of type about:blank.
// An empty title becomes the status's own text, as RFC 9457 asks for about:blank.
func Problem(status int, title, detail string) *Refusal {
	return &Refusal{Status: status, Title: title, Detail: detail}
}

// Reason names the refusal in few words, for a metric's label: "400/1" for the
// seed's first error, else the status.
func (f *Refusal) Reason() string {
	if f.ErrorCode != 0 {
		return strconv.Itoa(f.Status) + "/" + strconv.Itoa(f.ErrorCode)
	}
	return strconv.Itoa(f.Status)
}

// Write answers with the refusal. Nothing else may have been written to w.
func (f *Refusal) Write(w http.ResponseWriter) {
	body, contentType := f.problem(), "application/problem+json"
	if f.ErrorCode != 0 {
		body, contentType = f.seedBody(), "application/json"
	}
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if f.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	if f.RetryAfter > 0 {
		seconds := (f.RetryAfter + time.Second - 1) / time.Second
		h.Set("Retry-After", strconv.FormatInt(int64(seconds), 10))
	}
	w.WriteHeader(f.Status)
	// The visitor may have gone; there is nobody else to tell.
	_, _ = w.Write(body)
}

func (f *Refusal) seedBody() []byte {
	return fmt.Appendf(nil, `{"errorCode":%d,"message":%s}`, f.ErrorCode, text(f.Title))
}

// problem writes the members in a fixed order, so that one refusal is always the same bytes.
func (f *Refusal) problem() []byte {
	b := fmt.Appendf(nil, `{"type":%s,"title":%s,"status":%d`,
		text(cmp.Or(f.Type, "about:blank")), text(cmp.Or(f.Title, http.StatusText(f.Status))), f.Status)
	if f.Detail != "" {
		b = fmt.Appendf(b, `,"detail":%s`, text(f.Detail))
	}
	for _, name := range slices.Sorted(maps.Keys(f.Ext)) {
		switch name {
		case "type", "title", "status", "detail":
			continue
		}
		value, err := json.Marshal(f.Ext[name])
		if err != nil {
			value = text(fmt.Sprint(f.Ext[name]))
		}
		b = fmt.Appendf(b, `,%s:%s`, text(name), value)
	}
	return append(b, '}')
}

// text is s as a JSON string; a string always marshals.
func text(s string) []byte {
	b, _ := json.Marshal(s)
	return b
}
