package router

import (
	"net/http"
	"testing"
	"time"
)

// A row for each line of DESIGN's table that is about one attempt, and for each status it
// names.
func TestClassify(t *testing.T) {
	tests := []struct {
		name string
		o    outcome
		want ruling
	}{
		{"200 is delivered", outcome{status: 200}, ruling{delivered, ReasonAccepted, false}},
		{"201 is delivered", outcome{status: 201}, ruling{delivered, ReasonAccepted, false}},
		{"204 is delivered", outcome{status: 204}, ruling{delivered, ReasonAccepted, false}},
		{"299 is delivered", outcome{status: 299}, ruling{delivered, ReasonAccepted, false}},
		{"409 after an earlier attempt is delivered", outcome{status: 409, earlier: true}, ruling{delivered, ReasonRepeated, false}},
		{"409 to a first attempt is a dead letter", outcome{status: 409}, ruling{deadLetter, ReasonConflict, false}},
		{"400 code 3 wants another key", outcome{status: 400, code: 3, sealed: true}, ruling{rewrap, ReasonUnknownKey, false}},
		{"400 code 2 wants another key", outcome{status: 400, code: 2, sealed: true}, ruling{rewrap, ReasonUndecryptable, false}},
		{"400 code 1 with iv and fingerprint sent is our credential", outcome{status: 400, code: 1, sealed: true}, ruling{again, ReasonCredential, true}},
		{"400 code 1 without them is the site's encryption", outcome{status: 400, code: 1}, ruling{reform, ReasonUnencrypted, false}},
		{"400 with another code is a dead letter", outcome{status: 400, code: 4, sealed: true}, ruling{deadLetter, ReasonRefused, false}},
		{"400 without a code is a dead letter", outcome{status: 400, sealed: true}, ruling{deadLetter, ReasonRefused, false}},
		{"a code counts under 400 only", outcome{status: 422, code: 3, sealed: true}, ruling{deadLetter, ReasonRefused, false}},
		{"401 is our credential", outcome{status: 401}, ruling{again, ReasonCredential, true}},
		{"403 is our credential", outcome{status: 403}, ruling{again, ReasonCredential, true}},
		{"404 is a dead letter", outcome{status: 404}, ruling{deadLetter, ReasonRefused, false}},
		{"405 is a dead letter", outcome{status: 405}, ruling{deadLetter, ReasonRefused, false}},
		{"413 is a dead letter", outcome{status: 413}, ruling{deadLetter, ReasonRefused, false}},
		{"415 is a dead letter", outcome{status: 415}, ruling{deadLetter, ReasonRefused, false}},
		{"422 is a dead letter", outcome{status: 422}, ruling{deadLetter, ReasonRefused, false}},
		{"another 4xx is a dead letter", outcome{status: 418}, ruling{deadLetter, ReasonRefused, false}},
		{"the last 4xx is a dead letter", outcome{status: 499}, ruling{deadLetter, ReasonRefused, false}},
		{"301 is not followed", outcome{status: 301}, ruling{deadLetter, ReasonRedirect, false}},
		{"304 is a dead letter", outcome{status: 304}, ruling{deadLetter, ReasonRedirect, false}},
		{"307 is not followed", outcome{status: 307}, ruling{deadLetter, ReasonRedirect, false}},
		{"408 is tried again", outcome{status: 408}, ruling{again, ReasonBusy, false}},
		{"425 is tried again", outcome{status: 425}, ruling{again, ReasonBusy, false}},
		{"429 is tried again", outcome{status: 429}, ruling{again, ReasonThrottled, false}},
		{"500 is tried again", outcome{status: 500}, ruling{again, ReasonKitchenError, false}},
		{"501 is tried again", outcome{status: 501}, ruling{again, ReasonKitchenError, false}},
		{"503 is tried again", outcome{status: 503}, ruling{again, ReasonKitchenError, false}},
		{"599 is tried again", outcome{status: 599}, ruling{again, ReasonKitchenError, false}},
		{"a time-out is tried again", outcome{failure: ReasonTimeout}, ruling{again, ReasonTimeout, false}},
		{"a cut connection is tried again", outcome{failure: ReasonCut}, ruling{again, ReasonCut, false}},
		{"a refused connection is tried again", outcome{failure: ReasonRefusedConn}, ruling{again, ReasonRefusedConn, false}},
		{"TLS is tried again", outcome{failure: ReasonTLS}, ruling{again, ReasonTLS, false}},
		{"DNS is tried again", outcome{failure: ReasonDNS}, ruling{again, ReasonDNS, false}},
		{"410 stops the endpoint", outcome{status: 410}, ruling{stop, ReasonGone, true}},
		{"a status nobody defined must not cost an order", outcome{status: 600}, ruling{again, ReasonUnexpected, false}},
		{"101 must not cost an order", outcome{status: 101}, ruling{again, ReasonUnexpected, false}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := classify(tt.o); got != tt.want {
				t.Errorf("classify(%+v) = %+v, want %+v", tt.o, got, tt.want)
			}
		})
	}
	t.Run("each rule is met by a row", func(t *testing.T) {
		met := make(map[string]bool)
		for _, tt := range tests {
			for _, r := range rules {
				if tt.o.status >= r.from && tt.o.status <= r.to && (r.code == 0 || r.code == tt.o.code) && (r.when == nil || r.when(tt.o)) {
					met[r.name] = true
					break
				}
			}
		}
		if len(rules) == 0 {
			t.Fatal("there are no rules")
		}
		for _, r := range rules {
			if !met[r.name] {
				t.Errorf("no row of the test meets rule %q", r.name)
			}
		}
	})
}

func TestErrorCode(t *testing.T) {
	tests := []struct {
		name, body string
		want       int
	}{
		{"as the seed writes it", `{"errorCode":1,"message":"Incorrect security headers"}`, 1},
		{"code 2", `{"errorCode":2,"message":"Unable to decrypt payload"}`, 2},
		{"spaces and other members", " {\n \"status\": 400, \"errorCode\" : 3 }\r\n", 3},
		{"a number in quotes", `{"errorCode":"2"}`, 2},
		{"a byte order mark", "\xef\xbb\xbf{\"errorCode\":2}", 2},
		{"other capitals", `{"ErrorCode":3}`, 3},
		{"no code", `{"message":"x"}`, 0},
		{"null", `{"errorCode":null}`, 0},
		{"an object as code", `{"errorCode":{"a":1}}`, 0},
		{"a fraction", `{"errorCode":2.5}`, 0},
		{"an array", `[{"errorCode":2}]`, 0},
		{"HTML", `<html>errorCode 2</html>`, 0},
		{"cut off", `{"errorCode":2`, 0},
		{"nothing", ``, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := errorCode([]byte(tt.body)); got != tt.want {
				t.Errorf("errorCode(%q) = %d, want %d", tt.body, got, tt.want)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	date := func(d time.Duration) string { return now.Add(d).Format(http.TimeFormat) }
	tests := []struct {
		name, value, date string
		want              time.Duration
		ok                bool
	}{
		{"seconds", "120", "", 2 * time.Minute, true},
		{"zero seconds", "0", "", 0, true},
		{"seconds with spaces", " 7 ", "", 7 * time.Second, true},
		{"more seconds than a number holds are very many", "99999999999999999999", "", 1 << 31 * time.Second, true},
		{"a date", date(30 * time.Second), "", 30 * time.Second, true},
		{"a date in the past is now", date(-time.Hour), "", 0, true},
		{"a date counts from the answer's own", date(time.Hour + 5*time.Second), date(time.Hour), 5 * time.Second, true},
		{"an answer's broken date is not looked at", date(5 * time.Second), "yesterday", 5 * time.Second, true},
		{"RFC 850", now.Add(time.Minute).Format("Monday, 02-Jan-06 15:04:05 GMT"), "", time.Minute, true},
		{"asctime", now.Add(time.Minute).Format(time.ANSIC), "", time.Minute, true},
		{"missing", "", "", 0, false},
		{"negative", "-5", "", 0, false},
		{"a fraction", "1.5", "", 0, false},
		{"a unit", "5s", "", 0, false},
		{"words", "soon", "", 0, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := make(http.Header)
			if tt.value != "" {
				h.Set("Retry-After", tt.value)
			}
			if tt.date != "" {
				h.Set("Date", tt.date)
			}
			got, ok := retryAfter(h, now)
			if got != tt.want || ok != tt.ok {
				t.Errorf("retryAfter(%q) = %s, %t; want %s, %t", tt.value, got, ok, tt.want, tt.ok)
			}
		})
	}
	t.Run("without any header", func(t *testing.T) {
		if d, ok := retryAfter(nil, now); d != 0 || ok {
			t.Errorf("retryAfter(nil) = %s, %t", d, ok)
		}
	})
}
