package envelope

import (
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"log/slog"
)

const (
	labelOrder       = "kb-order"
	labelMessageID   = "kb-message-id"
	labelEnvelopeID  = "kb-envelope-id"
	labelPayloadHash = "kb-payload-hash"
)

// LaneKey is a site's lane key: minted once, never rotated, so that what it hashes stays the same for the life of the site. It is
// immutable and safe for concurrent use. It keeps its sub-keys, not the secret they were derived from.
type LaneKey struct{ sub *laneSubKeys }

type laneSubKeys struct{ order, messageID, envelopeID, payload *mac }

// NewLaneKey derives the sub-keys of a secret of 32 random bytes. The errors are ErrSettings.
func NewLaneKey(secret []byte) (*LaneKey, error) {
	if err := checkSecret(secret); err != nil {
		return nil, fmt.Errorf("lane key: %w", err)
	}
	sub := &laneSubKeys{}
	var errs [4]error
	sub.order, errs[0] = newMAC(secret, labelOrder)
	sub.messageID, errs[1] = newMAC(secret, labelMessageID)
	sub.envelopeID, errs[2] = newMAC(secret, labelEnvelopeID)
	sub.payload, errs[3] = newMAC(secret, labelPayloadHash)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, fmt.Errorf("lane key: %w", err)
	}
	return &LaneKey{sub: sub}, nil
}

// Order returns Kb-Order for the id of an order: 32 characters of a-z and 2-7. Without an id there is no order key: "" gives "".
func (l *LaneKey) Order(orderID string) string {
	if orderID == "" {
		return ""
	}
	m := l.sub.order
	f := m.begin()
	text(f, orderID)
	return m.id(f)
}

// sameSecret tells whether two lane keys were derived from one secret, by what they make.
func (l *LaneKey) sameSecret(other *LaneKey) bool { return l.Order("same") == other.Order("same") }

// MessageID returns Kb-Id for what a POS sent under an Idempotency-Key: 32 characters of a-z and 2-7. pos is the identity of the
// POS, so that two of them never meet in one id.
func (l *LaneKey) MessageID(site, pos, kind, key string) string {
	m := l.sub.messageID
	f := m.begin()
	text(f, site)
	text(f, pos)
	text(f, kind)
	text(f, key)
	return m.id(f)
}

// EnvelopeID returns Kb-Id for an encrypted request without an Idempotency-Key: 32 characters of a-z and 2-7. It is made of the
// texts of fingerprint and IV as they stand, which name one message.
func (l *LaneKey) EnvelopeID(site, pos, kind string, t Triple) string {
	m := l.sub.envelopeID
	f := m.begin()
	text(f, site)
	text(f, pos)
	text(f, kind)
	text(f, t.Fingerprint)
	text(f, t.IV)
	return m.id(f)
}

// PayloadHash returns a keyed hash of an opened payload, to tell whether the same Idempotency-Key came with the same body.
func (l *LaneKey) PayloadHash(kind string, payload []byte) [32]byte {
	m := l.sub.payload
	f := m.begin()
	text(f, kind)
	return m.finish(f, payload)
}

var idEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// id returns the first 20 bytes of the HMAC as text.
func (m *mac) id(f *fields) string {
	sum := m.sum(f)
	var id [32]byte
	idEncoding.Encode(id[:], sum[:20])
	return string(id[:])
}

// String says no more than what it is.
func (l *LaneKey) String() string {
	if l == nil {
		return "lane key <nil>"
	}
	return "lane key"
}

// Format prints String under every verb.
func (l *LaneKey) Format(f fmt.State, _ rune) { io.WriteString(f, l.String()) }

// LogValue is String.
func (l *LaneKey) LogValue() slog.Value { return slog.StringValue(l.String()) }
