package keysync

import (
	"fmt"
	"time"
)

// reason is the closed vocabulary of what a fetch can end in: the label `result` of
// kb_keysync_fetch_total.
type reason string

const (
	// The fetch succeeded.
	changed   reason = "changed"   // a new key set was put in place
	unchanged reason = "unchanged" // 304, or the same document again

	// The Portal refused.
	unauthorized reason = "unauthorized" // 401, with a fresh token too
	forbidden    reason = "forbidden"    // 403
	notFound     reason = "not_found"    // 404: the site is not known there
	rateLimited  reason = "rate_limited" // 429
	serverError  reason = "server_error" // 5xx
	badStatus    reason = "status"       // any other status
	redirect     reason = "redirect"     // to http, to another host, or in a circle
	tokenFailed  reason = "token"        // no token to ask with

	// The answer did not arrive.
	timedOut     reason = "timeout"   // portal.timeout ended, a slow drip included
	noConnection reason = "connect"   // DNS, refused, reset, no HTTP
	badTLS       reason = "tls"       // not trusted, or no TLS at all
	cutOff       reason = "cut_off"   // ended in the middle
	tooLarge     reason = "too_large" // above portal.max_bytes

	// The answer is no usable document.
	notJSON              reason = "not_json"
	noBlock              reason = "no_block"
	badBlock             reason = "block"
	noKeys               reason = "no_keys"
	tooManyKeys          reason = "too_many_keys"
	duplicateFingerprint reason = "duplicate_fingerprint"
	badFingerprint       reason = "fingerprint"
	badPhrase            reason = "phrase"
	badTime              reason = "time"
	badValidity          reason = "validity"
)

var reasons = []reason{
	changed, unchanged,
	unauthorized, forbidden, notFound, rateLimited, serverError, badStatus, redirect, tokenFailed,
	timedOut, noConnection, badTLS, cutOff, tooLarge,
	notJSON, noBlock, badBlock, noKeys, tooManyKeys, duplicateFingerprint, badFingerprint, badPhrase, badTime, badValidity,
}

// fetchError says why a fetch changed nothing. Its text holds no secret, no part of a
// body and no URL.
type fetchError struct {
	reason     reason
	text       string
	cause      error         // may be nil; not part of the text
	retryAfter time.Duration // 0: the Portal did not say
}

func (e *fetchError) Error() string { return e.text + " (" + string(e.reason) + ")" }
func (e *fetchError) Unwrap() error { return e.cause }

// refused makes a fetchError whose text includes what is wrapped with %w.
func refused(r reason, format string, args ...any) *fetchError {
	err := fmt.Errorf(format, args...)
	return &fetchError{reason: r, text: err.Error(), cause: err}
}
