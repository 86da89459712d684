package edge

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

// answer tells the POS what is known of its message.
func (s *ingest) answer(w http.ResponseWriter, m view, site *site, location string) outcome {
	switch m.state {
	case stateDelivered:
		s.answerDelivered(w, m)
		return outcomeDelivered
	case stateFailed:
		f := problem(http.StatusBadGateway, m.reason, "The message was stored, and did not reach the Kitchen. It will not be tried again; a new attempt needs a new Idempotency-Key.")
		f.Ext["id"], f.Ext["state"], f.Ext["attempts"] = m.id, m.state, m.attempts
		if m.kitchenStatus != 0 {
			f.Ext["kitchen_status"] = m.kitchenStatus
		}
		f.Write(w)
		return outcomeFailed
	case stateAccepted:
		w.Header().Set("Location", location)
		writeJSON(w, site.acceptStatus, acceptedDocument{ID: m.id, State: m.state, Durability: s.knownDurability()})
		return outcomeAccepted
	case stateRefused:
		o, f := unavailable(m.refusal)
		f.Write(w)
		return o
	default: // pending, unknown
		detail := "The hub did not say whether it has stored the message. The edge goes on asking; send it again with the same Idempotency-Key to hear the outcome."
		if m.withoutKey {
			detail = "The hub did not say whether it has stored the message. The edge goes on asking; look at the Location. Sent again without an Idempotency-Key it could reach the Kitchen twice."
		}
		w.Header().Set("Location", location)
		f := problem(http.StatusServiceUnavailable, "hub-silent", detail)
		f.RetryAfter = retryHub
		f.Ext["outcome"], f.Ext["id"] = "unknown", m.id
		f.Write(w)
		return outcomeUnknown
	}
}

type acceptedDocument struct {
	ID         string `json:"id"`
	State      state  `json:"state"`
	Durability string `json:"durability,omitempty"`
}

// knownDurability is what can be said of the hub's disk, "" when nothing can.
func (s *ingest) knownDurability() string {
	switch d := s.durability(); d {
	case "fsync", "interval":
		return d
	}
	return ""
}

// answerDelivered passes on the Kitchen's own answer.
func (s *ingest) answerDelivered(w http.ResponseWriter, m view) {
	status := m.kitchenStatus
	if status < 200 || status > 299 {
		// Counted as delivered all the same: a 409 to what it had already.
		writeJSON(w, http.StatusOK, struct {
			ID            string `json:"id"`
			State         state  `json:"state"`
			KitchenStatus int    `json:"kitchen_status"`
		}{m.id, m.state, status})
		return
	}
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if m.answer.contentType != "" {
		h.Set("Content-Type", m.answer.contentType)
	} else {
		h["Content-Type"] = nil // none, rather than a guess from the body
	}
	if status == http.StatusNoContent || status == http.StatusResetContent {
		w.WriteHeader(status)
		return
	}
	h.Set("Content-Length", strconv.Itoa(len(m.answer.body)))
	w.WriteHeader(status)
	// The POS may have gone; there is nobody else to tell.
	_, _ = w.Write(m.answer.body)
}

// unavailable is the answer for what is certainly not stored.
func unavailable(why error) (outcome, *door.Refusal) {
	o, reason, detail, retry := outcomeNotStored, "hub-away", "The hub cannot be reached.", retryHub
	switch {
	case errors.Is(why, errNoKey):
		o, reason, detail = outcomeKeys, "keys-none", "The site has no key that may seal now."
	case errors.Is(why, errStopped):
		reason, detail = "stopping", "The edge is stopping."
	case errors.Is(why, errTurn):
		reason, detail, retry = "hub-slow", "Messages of this site before it took too long.", retryBusy
	case errors.Is(why, errAway), errors.Is(why, broker.ErrAway):
	case errors.Is(why, broker.ErrDenied):
		reason, detail = "hub-forbidden", "This edge may not publish at the hub: its user there must be the edge's own name, in the role of an edge."
	case errors.Is(why, broker.ErrRejected), errors.Is(why, broker.ErrInvalid):
		reason, detail = "hub-refused", "The hub refused the message; it may be full."
	default: // the POS that sent it first has gone
		o, reason, detail = outcomeDisappeared, "gone", "The first attempt ended before it had its turn."
	}
	f := problem(http.StatusServiceUnavailable, reason, detail+" Nothing is stored; send it again, with the same Idempotency-Key if it had one.")
	f.RetryAfter = retry
	f.Ext["outcome"] = "not-stored"
	return o, f
}

// busy is the answer while there is no room for another request.
func busy(detail string) *door.Refusal {
	f := problem(http.StatusServiceUnavailable, "busy", detail+" Nothing is stored; send it again.")
	f.RetryAfter = retryBusy
	f.Ext["outcome"] = "not-stored"
	return f
}

// conflict is the answer for a claim that the register did not take.
func conflict(err error) (outcome, *door.Refusal) {
	switch {
	case errors.Is(err, errOtherPayload):
		return outcomeConflict, problem(http.StatusUnprocessableEntity, "other-payload",
			"This Idempotency-Key, or this IV, was used before with another payload. Nothing new is stored; a new message needs a new one.")
	case errors.Is(err, errEnvelopeSeen):
		return outcomeConflict, problem(http.StatusUnprocessableEntity, "envelope-seen",
			"This fingerprint and IV were used before for another request. Nothing new is stored; each request needs a fresh IV.")
	}
	return outcomeBusy, busy("As many messages are unsettled as the edge remembers.")
}

// outcomeOf puts a refusal in its class.
func outcomeOf(f *door.Refusal) outcome {
	switch {
	case f.ErrorCode == 1:
		return outcomeCredential
	case f.ErrorCode != 0, f.Status == http.StatusServiceUnavailable:
		return outcomeKeys
	}
	switch f.Status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound:
		return outcomeCredential
	}
	return outcomeInvalid
}

// messageDocument is what GET /messages/{id} answers.
type messageDocument struct {
	ID            string     `json:"id"`
	Kind          string     `json:"kind"`
	State         state      `json:"state"`
	Overdue       bool       `json:"overdue,omitempty"`
	Accepted      *time.Time `json:"accepted,omitempty"`
	Deadline      *time.Time `json:"deadline,omitempty"`
	Settled       *time.Time `json:"settled,omitempty"`
	Reason        string     `json:"reason,omitempty"`
	KitchenStatus int        `json:"kitchen_status,omitempty"`
	Attempts      int        `json:"attempts,omitempty"`
}

func (m view) document(now time.Time) messageDocument {
	moment := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		t = t.UTC().Truncate(time.Millisecond)
		return &t
	}
	return messageDocument{
		ID: m.id, Kind: m.kind, State: m.state,
		Overdue:  !m.state.final() && !m.deadline.IsZero() && now.After(m.deadline),
		Accepted: moment(m.accepted), Deadline: moment(m.deadline), Settled: moment(m.settledAt),
		Reason: m.reason, KitchenStatus: m.kitchenStatus, Attempts: m.attempts,
	}
}

// writeJSON answers with a document of our own.
func writeJSON(w http.ResponseWriter, status int, document any) {
	body, err := json.Marshal(document)
	if err != nil {
		door.Problem(http.StatusInternalServerError, "", "The answer could not be written.").Write(w)
		return
	}
	// What Header.Set does, with one array for all values.
	values := [...]string{"application/json", strconv.Itoa(len(body)), "no-store", "nosniff"}
	h := w.Header()
	h["Content-Type"] = values[0:1:1]
	h["Content-Length"] = values[1:2:2]
	h["Cache-Control"] = values[2:3:3]
	h["X-Content-Type-Options"] = values[3:4:4]
	w.WriteHeader(status)
	_, _ = w.Write(body)
}
