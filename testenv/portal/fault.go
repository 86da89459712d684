package portal

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Kind names one way of answering badly.
type Kind string

// The faults, each an imitation of something a real Portal, or a box in front of it, does.
const (
	None Kind = "" // answer well

	// Refusals.
	Unauthorized    Kind = "401"
	Forbidden       Kind = "403"
	NotFound        Kind = "404"
	TooManyRequests Kind = "429" // with Fault.RetryAfter
	ServerError     Kind = "500"
	Unavailable     Kind = "503" // with Fault.RetryAfter

	// The line.
	SlowDrip Kind = "slow-drip" // one byte every 20 ms, without end
	Hang     Kind = "hang"      // the request is read and never answered
	HangUp   Kind = "hang-up"   // the connection is closed without an answer
	CutOff   Kind = "cut-off"   // the connection is closed in the middle of the body
	Oversize Kind = "oversize"  // 100 MB of well-formed JSON

	// Not our Portal.
	HTML             Kind = "html"               // 200 with a log-in page
	HTTPRedirect     Kind = "redirect-http"      // to an http address
	HostRedirect     Kind = "redirect-host"      // to another host name, over https
	SameHostRedirect Kind = "redirect-same-host" // to the same host, where the answer is

	// The document.
	TruncatedJSON        Kind = "truncated-json"        // ends in the middle, with a fitting Content-Length
	NoBlock              Kind = "no-block"              // no encryption block in the site object
	NoEncryption         Kind = "no-encryption"         // the block lacks its switch
	EncryptionText       Kind = "encryption-text"       // the switch is the text "true"
	ThreeKeys            Kind = "three-keys"            //
	NoKeys               Kind = "no-keys"               // encryption on, keys missing
	EmptyKeys            Kind = "empty-keys"            // encryption on, an empty list
	DuplicateFingerprint Kind = "duplicate-fingerprint" // two keys of one fingerprint
	ReversedValidity     Kind = "reversed-validity"     // valid_until before valid_after
	NoZone               Kind = "no-zone"               // times without a zone
	BadTime              Kind = "bad-time"              // a time that is none
	BindingFingerprint   Kind = "binding-fingerprint"   // a fingerprint that begins with kb:
	EmptyPhrase          Kind = "empty-phrase"          //
	ShortPhrase          Kind = "short-phrase"          // 15 bytes: too few for 128 random bits
)

// Kinds lists every fault, so that a test can show that it knows them all.
func Kinds() []Kind {
	return []Kind{
		Unauthorized, Forbidden, NotFound, TooManyRequests, ServerError, Unavailable,
		SlowDrip, Hang, HangUp, CutOff, Oversize,
		HTML, HTTPRedirect, HostRedirect, SameHostRedirect,
		TruncatedJSON, NoBlock, NoEncryption, EncryptionText, ThreeKeys, NoKeys, EmptyKeys, DuplicateFingerprint,
		ReversedValidity, NoZone, BadTime, BindingFingerprint, EmptyPhrase, ShortPhrase,
	}
}

// Fault is a bad answer. The zero value is none.
type Fault struct {
	Kind Kind

	// RetryAfter is the text of that header under 429 and 503: seconds or an HTTP date.
	// Empty: the header is not sent.
	RetryAfter string
}

// disturb answers in the handler's place and reports whether it did. Faults of the
// document are left to siteObject.
func (p *Portal) disturb(w http.ResponseWriter, r *http.Request, f Fault) bool {
	retryAfter := func(status int) {
		if f.RetryAfter != "" {
			w.Header().Set("Retry-After", f.RetryAfter)
		}
		http.Error(w, http.StatusText(status), status)
	}
	switch f.Kind {
	case Unauthorized:
		p.deny(w)
	case Forbidden:
		http.Error(w, "forbidden", http.StatusForbidden)
	case NotFound:
		http.NotFound(w, r)
	case TooManyRequests:
		retryAfter(http.StatusTooManyRequests)
	case ServerError:
		http.Error(w, "<html>oops</html>", http.StatusInternalServerError)
	case Unavailable:
		retryAfter(http.StatusServiceUnavailable)
	case SlowDrip:
		p.drip(w, r)
	case Hang:
		p.wait(r)
	case HangUp:
		panic(http.ErrAbortHandler)
	case Oversize:
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"padding":"`)
		for chunk := strings.Repeat("a", 1<<16); ; {
			if _, err := fmt.Fprint(w, chunk); err != nil {
				return true
			}
			select {
			case <-p.stop:
				return true
			default:
			}
		}
	case HTML:
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<!doctype html><title>Log in</title><p>Welcome to the guest network")
	case HTTPRedirect:
		http.Redirect(w, r, "http://"+p.trap.addr+"/trap", http.StatusFound)
	case HostRedirect:
		u, err := url.Parse(p.URL())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return true
		}
		http.Redirect(w, r, "https://localhost:"+u.Port()+"/trap", http.StatusTemporaryRedirect)
	case SameHostRedirect:
		if strings.HasSuffix(r.URL.Path, "/") {
			return false
		}
		http.Redirect(w, r, r.URL.Path+"/", http.StatusMovedPermanently)
	default:
		return false
	}
	return true
}

func (p *Portal) drip(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	flush := http.NewResponseController(w)
	for b := []byte("{"); ; b = []byte(" ") {
		if _, err := w.Write(b); err != nil || flush.Flush() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-p.stop:
			return
		}
	}
}

func (p *Portal) wait(r *http.Request) {
	select {
	case <-r.Context().Done():
	case <-p.stop:
	}
}

// spoil changes a good block into the bad one the fault asks for.
func spoil(block map[string]any, s site, f Fault) {
	keys := shown(s.keys)
	if len(keys) == 0 {
		return
	}
	last := &keys[len(keys)-1]
	switch f.Kind {
	case NoEncryption:
		delete(block, "encryption")
		return
	case EncryptionText:
		block["encryption"] = "true"
		return
	case NoKeys:
		block["encryption"] = true
		delete(block, "keys")
		return
	case EmptyKeys:
		keys = []wireKey{}
	case ThreeKeys:
		for len(keys) < 3 {
			keys = append(keys, shown([]Key{newKey(time.Now(), time.Hour)})...)
		}
	case DuplicateFingerprint:
		twin := shown([]Key{newKey(time.Now(), time.Hour)})[0]
		twin.Fingerprint = last.Fingerprint
		keys = []wireKey{*last, twin}
	case ReversedValidity:
		last.ValidAfter, last.ValidUntil = last.ValidUntil, last.ValidAfter
	case NoZone:
		last.ValidAfter = strings.TrimSuffix(last.ValidAfter, "Z")
		last.ValidUntil = strings.TrimSuffix(last.ValidUntil, "Z")
	case BadTime:
		last.ValidUntil = "2026-02-30T25:00:00Z"
	case BindingFingerprint:
		last.Fingerprint = "kb:b1"
	case EmptyPhrase:
		last.Value = ""
	case ShortPhrase:
		last.Value = "fifteen letters"
	default:
		return
	}
	block["encryption"], block["keys"] = true, slices.Clone(keys)
}
