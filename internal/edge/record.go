package edge

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// A record of the outbox is what was in flight at one moment: events, and what became of
// events. It is one message of the stream OUT, so it is stored whole or not at all. The
// outbox is a log of them; everything that an edge knows of messages is rebuilt from it.
//
//	byte     version, 1
//	uvarint  cursor: record, index        all up to it is settled with the hub
//	uvarint  mark: record, index          nothing above it was ever sent
//	uvarint  doubt: record, index         see outbox.doubt
//	uvarint  hub time, Unix ms; 8 bytes   which boot of the machine; uvarint ms since it
//	text     epoch
//	entries, each: byte kind, uvarint length, that many bytes
//
// A text is a uvarint length and the bytes. Entries of an unknown kind are passed over, so
// that a later version may add some; anything else that cannot be read is damage.
const recordVersion = 1

// Kinds of entries.
const (
	entryEvent    = 1 // an event was accepted
	entrySettled  = 2 // an event ended
	entryEnvelope = 3 // a message came again in another envelope
	entryNumber   = 4 // the last number of a site whose events are not kept any more
	entryMark     = 5 // a newer mark than the header's
)

var errRecord = errors.New("damaged record")

// moment is when a record was made, by every clock that there is.
type moment struct {
	hub    int64 // Unix ms, hub time
	boot   [8]byte
	uptime int64 // ms
}

type recordHeader struct {
	cursor, mark, doubt position
	at                  moment
	epoch               string
}

// eventEntry is an accepted event with what only the edge knows of it.
type eventEntry struct {
	event      *broker.Event
	who        string
	hash       [32]byte
	envelope   string
	withoutKey bool
}

// settledEntry is how an event ended.
type settledEntry struct {
	site, epoch, id string
	seq             uint64
	state           state
	reason          string
	attempts        int
	kitchenStatus   int
	at              int64 // Unix ms, hub time
	answer          answer
}

type envelopeEntry struct{ id, envelope string }

type numberEntry struct {
	site string
	seq  uint64 // in the record's epoch
}

func putText[T string | []byte](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func putPosition(b []byte, p position) []byte {
	b = binary.AppendUvarint(b, p.record)
	return binary.AppendUvarint(b, uint64(p.index))
}

func putHeader(b []byte, h *recordHeader) []byte {
	b = append(b, recordVersion)
	b = putPosition(b, h.cursor)
	b = putPosition(b, h.mark)
	b = putPosition(b, h.doubt)
	b = binary.AppendUvarint(b, uint64(h.at.hub))
	b = append(b, h.at.boot[:]...)
	b = binary.AppendUvarint(b, uint64(h.at.uptime))
	return putText(b, h.epoch)
}

// putEntry appends an entry whose body put appends. The length stands before it in four
// bytes, whatever it is, so that nothing is moved.
func putEntry(b []byte, kind byte, put func([]byte) []byte) []byte {
	b = append(b, kind, 0x80, 0x80, 0x80, 0) // room for a uvarint of four bytes
	at := len(b)
	b = put(b)
	n := len(b) - at
	b[at-4], b[at-3], b[at-2], b[at-1] = byte(n)|0x80, byte(n>>7)|0x80, byte(n>>14)|0x80, byte(n>>21)
	return b
}

func putEvent(b []byte, e *eventEntry) []byte {
	return putEntry(b, entryEvent, func(b []byte) []byte {
		ev := e.event
		b = putText(b, ev.Site)
		b = putText(b, ev.Kind)
		b = putText(b, ev.Epoch)
		b = binary.AppendUvarint(b, ev.Seq)
		b = putText(b, ev.ID)
		b = putText(b, ev.Order)
		b = binary.AppendUvarint(b, uint64(ev.Accepted))
		b = binary.AppendUvarint(b, uint64(ev.Deadline))
		b = putText(b, ev.Bind)
		b = putText(b, ev.Tag)
		b = putText(b, ev.Traceparent)
		b = putText(b, ev.Triple.IV)
		b = putText(b, ev.Triple.Fingerprint)
		b = putText(b, ev.Triple.Message)
		b = putText(b, e.who)
		b = append(b, e.hash[:]...)
		b = putText(b, e.envelope)
		flags := byte(0)
		if e.withoutKey {
			flags = 1
		}
		return append(b, flags)
	})
}

func putSettled(b []byte, s *settledEntry) []byte {
	return putEntry(b, entrySettled, func(b []byte) []byte {
		b = putText(b, s.site)
		b = putText(b, s.epoch)
		b = binary.AppendUvarint(b, s.seq)
		b = putText(b, s.id)
		b = putText(b, string(s.state))
		b = putText(b, s.reason)
		b = binary.AppendUvarint(b, uint64(max(s.attempts, 0)))
		b = binary.AppendUvarint(b, uint64(max(s.kitchenStatus, 0)))
		b = binary.AppendUvarint(b, uint64(max(s.at, 0)))
		b = putText(b, s.answer.contentType)
		return putText(b, s.answer.body)
	})
}

func putEnvelope(b []byte, e envelopeEntry) []byte {
	return putEntry(b, entryEnvelope, func(b []byte) []byte { return putText(putText(b, e.id), e.envelope) })
}

func putNumber(b []byte, e numberEntry) []byte {
	return putEntry(b, entryNumber, func(b []byte) []byte { return binary.AppendUvarint(putText(b, e.site), e.seq) })
}

func putMark(b []byte, p position) []byte {
	return putEntry(b, entryMark, func(b []byte) []byte { return putPosition(b, p) })
}

// reader takes a record apart. After the first thing that is not there, everything is
// empty and bad is set.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.b, r.bad = nil, true
		return 0
	}
	r.b = r.b[n:]
	return v
}

// bytes returns a view into the record.
func (r *reader) bytes() []byte { return r.take(r.uvarint()) }

func (r *reader) take(n uint64) []byte {
	if n > uint64(len(r.b)) {
		r.b, r.bad = nil, true
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) text() string { return string(r.bytes()) }

func (r *reader) byte() byte {
	if b := r.take(1); len(b) == 1 {
		return b[0]
	}
	return 0
}

func (r *reader) position() position {
	return position{record: r.uvarint(), index: int(r.uvarint() & 0x7fffffff)}
}

// readRecord hands each entry to the function for its kind; nil passes it over. The index
// is its place in the record. What is handed over is a copy; an event comes without its
// triple unless bodies are wanted, and without Edge always.
func readRecord(record []byte, bodies bool, f recordVisitor) (recordHeader, error) {
	r := reader{b: record}
	if v := r.byte(); v != recordVersion {
		return recordHeader{}, fmt.Errorf("%w: version %d, this program reads %d", errRecord, v, recordVersion)
	}
	h := recordHeader{cursor: r.position(), mark: r.position(), doubt: r.position()}
	h.at.hub = int64(r.uvarint())
	copy(h.at.boot[:], r.take(8))
	h.at.uptime = int64(r.uvarint())
	h.epoch = r.text()
	if r.bad {
		return h, fmt.Errorf("%w: header", errRecord)
	}
	for i := 0; len(r.b) > 0; i++ {
		kind := r.byte()
		e := reader{b: r.bytes()}
		if r.bad {
			return h, fmt.Errorf("%w: entry %d", errRecord, i)
		}
		switch kind {
		case entryEvent:
			if f.event == nil {
				continue
			}
			v := e.event(bodies)
			if !e.bad {
				f.event(i, v)
			}
		case entrySettled:
			if f.settled == nil {
				continue
			}
			v := e.settled()
			if !e.bad {
				f.settled(v)
			}
		case entryEnvelope:
			if f.envelope == nil {
				continue
			}
			if v := (envelopeEntry{e.text(), e.text()}); !e.bad {
				f.envelope(v)
			}
		case entryNumber:
			if f.number == nil {
				continue
			}
			if v := (numberEntry{e.text(), e.uvarint()}); !e.bad {
				f.number(h.epoch, v)
			}
		case entryMark:
			if v := e.position(); !e.bad && h.mark.before(v) {
				h.mark = v
			}
		}
		if e.bad {
			return h, fmt.Errorf("%w: entry %d, of kind %d", errRecord, i, kind)
		}
	}
	return h, nil
}

// recordVisitor is who wants which entries.
type recordVisitor struct {
	event    func(index int, e eventEntry)
	settled  func(settledEntry)
	envelope func(envelopeEntry)
	number   func(epoch string, e numberEntry)
}

func (r *reader) event(body bool) eventEntry {
	ev := &broker.Event{Event: envelope.Event{Site: r.text(), Kind: r.text(), Epoch: r.text(), Seq: r.uvarint(), ID: r.text(), Order: r.text(), Via: via}}
	ev.From = ev.Seq
	ev.Accepted, ev.Deadline = int64(r.uvarint()), int64(r.uvarint())
	ev.Bind, ev.Tag, ev.Traceparent = r.text(), r.text(), r.text()
	iv, fp, message := r.bytes(), r.bytes(), r.bytes()
	if body {
		// One array for the three.
		all := make([]byte, 0, len(iv)+len(fp)+len(message))
		all = append(append(append(all, iv...), fp...), message...)
		a, b := len(iv), len(iv)+len(fp)
		ev.Triple = envelope.Triple{IV: all[:a:a], Fingerprint: all[a:b:b], Message: all[b:]}
	}
	e := eventEntry{event: ev, who: r.text()}
	copy(e.hash[:], r.take(32))
	e.envelope = r.text()
	e.withoutKey = r.byte()&1 != 0
	return e
}

func (r *reader) settled() settledEntry {
	s := settledEntry{site: r.text(), epoch: r.text()}
	s.seq = r.uvarint()
	s.id = r.text()
	s.state, s.reason = state(r.text()), r.text()
	s.attempts, s.kitchenStatus, s.at = int(r.uvarint()), int(r.uvarint()), int64(r.uvarint())
	s.answer.contentType = r.text()
	if body := r.bytes(); len(body) > 0 {
		s.answer.body = append([]byte(nil), body...)
	}
	if !s.state.final() {
		r.bad = true
	}
	return s
}
