package envelope

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// The labels of the sub-keys, and what each is for.
const (
	labelEventTag   = "kb-event-tag"
	labelReportTag  = "kb-report-tag"
	labelReportSeal = "kb-report-seal"
	labelPlainSeal  = "kb-plain-seal"
)

const bindingPrefix = "kb:"

// What is sealed under a binding key always looks like this.
var bindingSettings = Settings{Profile: A256GCM}.normal()

// IsBindingFingerprint reports whether fp names a binding key ("kb:<id>"). Doors and the Portal client refuse such fingerprints.
func IsBindingFingerprint(fp []byte) bool { return bytes.HasPrefix(fp, []byte(bindingPrefix)) }

// BindingKey is one of a site's binding keys. It is immutable and safe for concurrent use. It keeps its sub-keys, not the secret
// they were derived from.
type BindingKey struct {
	id   string
	form form
	sub  *bindingSubKeys
	from time.Time // zero: always
}

type bindingSubKeys struct {
	eventTag, reportTag   *mac
	reportSeal, plainSeal *suite
}

// NewBindingKey derives the sub-keys of a secret of 32 random bytes. The id is a name ([ValidName]). The errors are ErrSettings.
func NewBindingKey(id string, secret []byte) (*BindingKey, error) {
	if err := ValidName(id); err != nil {
		return nil, fmt.Errorf("binding key: id: %w", err)
	}
	if err := checkSecret(secret); err != nil {
		return nil, fmt.Errorf("binding key %s: %w", id, err)
	}
	sub := &bindingSubKeys{}
	var errs [4]error
	sub.eventTag, errs[0] = newMAC(secret, labelEventTag)
	sub.reportTag, errs[1] = newMAC(secret, labelReportTag)
	sub.reportSeal, errs[2] = newSubSuite(secret, labelReportSeal)
	sub.plainSeal, errs[3] = newSubSuite(secret, labelPlainSeal)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("binding key %s: %w", id, err)
	}
	return &BindingKey{id: id, form: newForm(bindingSettings, bindingPrefix+id), sub: sub}, nil
}

func checkSecret(secret []byte) error {
	if len(secret) != keySize {
		return &fieldError{"secret", fmt.Sprintf("%d bytes; %d random bytes are required", len(secret), keySize)}
	}
	return nil
}

func newSubSuite(secret []byte, label string) (*suite, error) {
	key, err := subKey(secret, label)
	if err != nil {
		return nil, err
	}
	return newSuite(A256GCM, key)
}

// ID returns the name of the key: the value of Kb-Bind.
func (k *BindingKey) ID() string { return k.id }

// UseFrom returns when the key begins to tag and seal, zero for one that always does. It verifies and opens before that too.
func (k *BindingKey) UseFrom() time.Time { return k.from }

// WithUseFrom returns the same key, which tags and seals from another time on. What is sealed under either counts as sealed under
// both.
func (k *BindingKey) WithUseFrom(t time.Time) *BindingKey {
	c := *k
	c.from = t
	return &c
}

// sameSecret tells whether two keys were derived from one secret, by what they make.
func (k *BindingKey) sameSecret(other *BindingKey) bool {
	var e Event
	a, b := k.eventTag(&e), other.eventTag(&e)
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// Event is what the tag of an event covers: the triple, and what the broker says about it.
type Event struct {
	Site  string
	Kind  string
	Edge  string // name of the edge
	Epoch string // epoch of the edge's store
	From  uint64 // first sequence that the event stands for; Seq unless it stands for a run
	Seq   uint64 // sequence of (site, edge, epoch), from 1
	ID    string // Kb-Id
	// Accepted and Deadline are Unix milliseconds, hub time.
	Accepted, Deadline int64
	Order              string // Kb-Order, "" when there is none
	Via                string
	Triple             Triple
}

// TagEvent returns the event's tag: HMAC-SHA-256 under kb-event-tag, base64url without padding (43 characters). It covers the values
// exactly as they stand; a From of 0 is not a Seq.
func (k *BindingKey) TagEvent(e *Event) string {
	tag := k.eventTag(e)
	return string(tag[:])
}

// VerifyEvent checks a tag in constant time. Error: ErrTag.
func (k *BindingKey) VerifyEvent(e *Event, tag string) error {
	want := k.eventTag(e)
	if !sameTag(&want, tag) {
		return fmt.Errorf("%w: event %s of site %s, binding key %s", ErrTag, quote(e.ID), quote(e.Site), k.id)
	}
	return nil
}

func (k *BindingKey) eventTag(e *Event) tagText {
	m := k.sub.eventTag
	f := m.begin()
	text(f, e.Site)
	text(f, e.Kind)
	text(f, e.Edge)
	text(f, e.Epoch)
	number(f, e.Seq)
	number(f, e.From)
	text(f, e.ID)
	number(f, e.Accepted)
	number(f, e.Deadline)
	text(f, e.Order)
	text(f, e.Via)
	text(f, e.Triple.IV)
	text(f, e.Triple.Fingerprint)
	return newTagText(m.finish(f, e.Triple.Message))
}

// Report is what the tag of a report covers: the fate of one delivery, and the Kitchen's answer, sealed.
type Report struct {
	Site     string
	Edge     string // name of the edge that accepted the event
	Epoch    string
	Seq      uint64 // of the event
	ID       string // Kb-Id of the event
	Endpoint string // "-" when the event reached none
	N        int    // 0, or the number of the replay
	State    string
	Reason   string
	Status   int // HTTP status of the last attempt, 0 when there was none
	Attempts int
	// Started and Settled are Unix milliseconds, hub time.
	Started, Settled int64
	Triple           Triple // the answer, sealed by SealReport
}

// TagReport returns the report's tag: HMAC-SHA-256 under kb-report-tag, base64url without padding (43 characters).
func (k *BindingKey) TagReport(r *Report) string {
	tag := k.reportTag(r)
	return string(tag[:])
}

// VerifyReport checks a tag in constant time. Error: ErrTag.
func (k *BindingKey) VerifyReport(r *Report, tag string) error {
	want := k.reportTag(r)
	if !sameTag(&want, tag) {
		return fmt.Errorf("%w: report on event %s of site %s, binding key %s", ErrTag, quote(r.ID), quote(r.Site), k.id)
	}
	return nil
}

func (k *BindingKey) reportTag(r *Report) tagText {
	m := k.sub.reportTag
	f := m.begin()
	text(f, r.Site)
	text(f, r.Edge)
	text(f, r.Epoch)
	number(f, r.Seq)
	text(f, r.ID)
	text(f, r.Endpoint)
	number(f, r.N)
	text(f, r.State)
	text(f, r.Reason)
	number(f, r.Status)
	number(f, r.Attempts)
	number(f, r.Started)
	number(f, r.Settled)
	text(f, r.Triple.IV)
	return newTagText(m.finish(f, r.Triple.Message))
}

// tagText is the text of a tag: base64url of 32 bytes without padding.
type tagText [43]byte

func newTagText(sum [sha256.Size]byte) (t tagText) {
	base64URL.Encode(t[:], sum[:])
	return t
}

func sameTag(want *tagText, tag string) bool {
	if len(tag) != len(want) {
		return false
	}
	var got tagText
	copy(got[:], tag)
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1
}

// SealReport seals a Kitchen's answer: a256gcm under kb-report-seal, base64, fingerprint "kb:<id>". Error: ErrKeyExhausted.
func (k *BindingKey) SealReport(plaintext []byte) (Triple, error) {
	t, err := k.form.seal(k.sub.reportSeal, bindingPrefix+k.id, plaintext)
	if err != nil {
		return Triple{}, fmt.Errorf("binding key %s: %w", k.id, err)
	}
	return t, nil
}

// AppendSealPlain seals an event of a site without encryption for its way over the broker, and appends the triple to dst as JSON:
// a256gcm under kb-plain-seal, base64, fingerprint "kb:<id>". Allocations and overlaps are as for [Key.AppendSeal]. Error:
// ErrKeyExhausted.
func (k *BindingKey) AppendSealPlain(dst, plaintext []byte) ([]byte, error) {
	dst, err := k.form.appendSeal(dst, k.sub.plainSeal, plaintext)
	if err != nil {
		return nil, fmt.Errorf("binding key %s: %w", k.id, err)
	}
	return dst, nil
}

// String names the key by its id.
func (k *BindingKey) String() string {
	if k == nil {
		return "binding key <nil>"
	}
	return "binding key " + k.id
}

// Format prints String under every verb.
func (k *BindingKey) Format(f fmt.State, _ rune) { io.WriteString(f, k.String()) }

// LogValue is String.
func (k *BindingKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// Binding is one site's binding keys and lane key. It is immutable and safe for concurrent use.
type Binding struct {
	site string
	lane *LaneKey
	keys []*BindingKey // newest first
}

// NewBinding takes the site's lane key and at least one binding key, newest first, with different ids. The errors are ErrSettings.
func NewBinding(site string, lane *LaneKey, keys ...*BindingKey) (*Binding, error) {
	var errs []error
	wrong := func(field, text string) { errs = append(errs, &fieldError{field, text}) }
	if err := ValidName(site); err != nil {
		errs = append(errs, fmt.Errorf("site: %w", err))
	}
	if lane == nil {
		wrong("lane", "required")
	}
	if len(keys) == 0 {
		wrong("keys", "at least one binding key is required")
	}
	seen := make(map[string]bool, len(keys))
	for i, k := range keys {
		switch {
		case k == nil:
			wrong(fmt.Sprintf("keys[%d]", i), "nil")
			continue
		case seen[k.id]:
			wrong(fmt.Sprintf("keys[%d]", i), "id "+k.id+" is there already; each binding key of a site needs its own")
		}
		seen[k.id] = true
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return &Binding{site: site, lane: lane, keys: slices.Clone(keys)}, nil
}

// Site returns the name of the site.
func (b *Binding) Site() string { return b.site }

// Current returns the binding key to tag and seal with: the newest that has begun ([BindingKey.UseFrom]), by this machine's clock;
// the oldest, if none has. Take it once for one message: the next call may return another.
func (b *Binding) Current() *BindingKey {
	last := len(b.keys) - 1
	var now time.Time
	for _, k := range b.keys[:last] {
		if k.from.IsZero() {
			return k
		}
		if now.IsZero() {
			now = time.Now()
		}
		if !now.Before(k.from) {
			return k
		}
	}
	return b.keys[last]
}

// Succeed returns a binding that holds what b holds, and that continues old: keys that both have stay the same ones, with what they
// count. It is for a binding that was read anew. ErrSettings when b is no later state of old: it is of another site, its lane key
// is another, which would put the updates of orders into other lanes than the orders, or a key of the same id has another secret.
func (b *Binding) Succeed(old *Binding) (*Binding, error) {
	if b.site != old.site {
		return nil, &fieldError{"site", "it is " + quote(b.site) + ", and was " + quote(old.site)}
	}
	if !b.lane.sameSecret(old.lane) {
		return nil, &fieldError{"lane", "it is another key than before; a lane key never changes"}
	}
	next := &Binding{site: b.site, lane: old.lane, keys: slices.Clone(b.keys)}
	for i, k := range next.keys {
		before, had := old.Key(k.id)
		switch {
		case !had:
		case !before.sameSecret(k):
			return nil, &fieldError{"keys", "key " + k.id + " has another secret than before; a new secret needs a new id"}
		case before.from.Equal(k.from):
			next.keys[i] = before
		default:
			next.keys[i] = before.WithUseFrom(k.from)
		}
	}
	return next, nil
}

// Lane returns the lane key.
func (b *Binding) Lane() *LaneKey { return b.lane }

// Key returns the binding key with the id.
func (b *Binding) Key(id string) (*BindingKey, bool) {
	for _, k := range b.keys {
		if k.id == id {
			return k, true
		}
	}
	return nil, false
}

// VerifyEvent checks the tag of an event of this site with the binding key that bind (Kb-Bind) names. Error: ErrTag, also when the
// event is of another site or the binding key is unknown.
func (b *Binding) VerifyEvent(e *Event, bind, tag string) error {
	k, err := b.verifier(e.Site, bind)
	if err != nil {
		return fmt.Errorf("%w: event %s: %w", ErrTag, quote(e.ID), err)
	}
	return k.VerifyEvent(e, tag)
}

// VerifyReport checks the tag of a report of this site with the binding key that bind (Kb-Bind) names. Error: ErrTag, also when the
// report is of another site or the binding key is unknown.
func (b *Binding) VerifyReport(r *Report, bind, tag string) error {
	k, err := b.verifier(r.Site, bind)
	if err != nil {
		return fmt.Errorf("%w: report on event %s: %w", ErrTag, quote(r.ID), err)
	}
	return k.VerifyReport(r, tag)
}

func (b *Binding) verifier(site, bind string) (*BindingKey, error) {
	if site != b.site {
		return nil, fmt.Errorf("it is of site %s, the binding of site %s", quote(site), b.site)
	}
	k, ok := b.Key(bind)
	if !ok {
		return nil, fmt.Errorf("site %s has no binding key %s", b.site, quote(bind))
	}
	return k, nil
}

// OpenReport opens what SealReport sealed and appends it to dst, as by [Key.Open]. Errors: ErrUnknownFingerprint, ErrIV, ErrDecrypt.
func (b *Binding) OpenReport(dst []byte, t Triple) ([]byte, error) {
	return b.open(dst, t, func(s *bindingSubKeys) *suite { return s.reportSeal })
}

// OpenPlain opens what AppendSealPlain sealed and appends it to dst, as by [Key.Open]. Errors: ErrUnknownFingerprint, ErrIV,
// ErrDecrypt.
func (b *Binding) OpenPlain(dst []byte, t Triple) ([]byte, error) {
	return b.open(dst, t, func(s *bindingSubKeys) *suite { return s.plainSeal })
}

func (b *Binding) open(dst []byte, t Triple, suite func(*bindingSubKeys) *suite) ([]byte, error) {
	id, ok := bytes.CutPrefix(t.Fingerprint, []byte(bindingPrefix))
	if ok {
		for _, k := range b.keys {
			if k.id != string(id) {
				continue
			}
			dst, err := k.form.open(dst, suite(k.sub), t)
			if err != nil {
				return nil, fmt.Errorf("binding key %s: %w", k.id, err)
			}
			return dst, nil
		}
	}
	return nil, fmt.Errorf("%w %s: it names no binding key of site %s", ErrUnknownFingerprint, quote(t.Fingerprint), b.site)
}

// String names the site and the ids of its keys.
func (b *Binding) String() string {
	if b == nil {
		return "binding <nil>"
	}
	ids := make([]string, len(b.keys))
	for i, k := range b.keys {
		ids[i] = k.id
	}
	return "binding " + b.site + " [" + strings.Join(ids, " ") + "]"
}

// Format prints String under every verb.
func (b *Binding) Format(f fmt.State, _ rune) { io.WriteString(f, b.String()) }

// LogValue is String.
func (b *Binding) LogValue() slog.Value { return slog.StringValue(b.String()) }
