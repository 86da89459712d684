package router

import (
	"context"
	"errors"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// noEndpoint stands in reports on events that reached no Kitchen.
const noEndpoint = "-"

func endpointName(e *endpoint) string {
	if e == nil {
		return noEndpoint
	}
	return e.name
}

// Alarms: someone must act, and docs/operations.md says how.
const (
	alarmCredential  = "kitchen refuses the bridge's credential"
	alarmProfile     = "kitchen can decrypt nothing of the site"
	alarmUnencrypted = "kitchen wants security headers or a credential, the portal has the site's encryption off"
	alarmGone        = "kitchen endpoint is gone and stopped until the next start"
	alarmKeys        = "event cannot be brought into the kitchen's form with the keys at hand"
	alarmQuarantine  = "event quarantined"
	alarmReport      = "report in the log does not verify"
	alarmStore       = "hub does not store reports or dead letters"
	alarmDropped     = "hub refuses dead letters, they are dropped"
)

// warnClock has the offset beside it: above zero, the edge's clock is ahead.
const warnClock = "edge's clock differs from the hub's"

// examine says why an event is none that an edge sent for this site, "" when it is one.
// Nothing it says may be believed before (I7).
func (r *Router) examine(d *broker.Delivery) cause {
	ev := &d.Event
	if d.Err != nil {
		return causeMalformed
	}
	binding := r.binding(d.Site)
	if binding == nil {
		return causeUnknownSite
	}
	if _, known := binding.Key(ev.Bind); !known {
		// Perhaps its edge has read a new binding file before this bridge.
		r.keys.RereadBinding()
		binding = r.binding(d.Site)
	}
	if err := binding.VerifyEvent(&ev.Event, ev.Bind, ev.Tag); err != nil && !faultNoTag {
		if _, known := binding.Key(ev.Bind); !known {
			return causeUnknownBind
		}
		return causeTag
	}
	if ev.From != ev.Seq && ev.Kind != broker.KindExpired {
		return causeRun
	}
	return ""
}

// binding returns nil for a site of which nothing can be verified.
func (r *Router) binding(site string) *envelope.Binding {
	if s := r.keys.Site(site); s != nil {
		return s.Binding
	}
	return nil
}

// deliver attempts until the event's fate is known. False: the tenure ended before.
func (t *tenure) deliver(e *endpoint, it *item) bool {
	ev := &it.d.Event
	var next *form // to be posted at once, in place of the last one
	for {
		now := time.Now()
		if !now.Before(it.deadline) {
			it.expire()
			return true
		}
		until, stopped := e.wait()
		if stopped {
			it.fail(ReasonStopped)
			return true
		}
		if quiet := t.p.since.Add(t.r.cfg.Settle); it.quiet && quiet.After(until) {
			until = quiet
		}
		if until.After(now) {
			if until.After(it.deadline) {
				until = it.deadline
			}
			if !sleep(t.begin, until) {
				return false
			}
			continue
		}
		if next == nil {
			f, err := formOf(ev.Triple, t.r.keys.Site(e.site), it.refused, now)
			if err != nil {
				if next = t.unformed(e, it, err); it.fate != nil {
					return true
				}
				continue // it has taken time
			}
			next = &f
		}
		if t.begin.Err() != nil {
			return false
		}

		f := *next
		next = nil
		it.attempts++
		if it.started.IsZero() {
			it.started = now
		}
		// The Kitchen may have the event though an answer was lost: the attempts carry the
		// same id.
		if faultAckFirst {
			t.r.ackDelivery(it.d)
		}
		it.last = e.post(t.io, it.d, f, it.attempts, it.deadline)
		if it.last.sent {
			it.unknown, it.cut = it.last.status == 0, time.Now()
		}
		if it.last.status == 0 && t.io.Err() != nil {
			return false
		}
		o := outcome{
			status: it.last.status, failure: it.last.failure,
			earlier: it.attempts > 1 || it.before,
			sealed:  f.sealed(),
		}
		if o.status == 400 {
			o.code = errorCode(it.last.body)
		}
		r := classify(o)
		t.r.metrics.attempts.inc(r.reason)
		switch r.verdict {
		case delivered:
			t.answered(e, true)
			it.fate = &fate{state: stateDelivered, reason: r.reason}
		case deadLetter:
			t.answered(e, false)
			it.fail(r.reason)
		case stop:
			e.stop()
			t.alarm(alarmGone, e, it, r.reason, nil)
			it.fail(r.reason)
		case rewrap:
			next = t.rewrap(e, it, f, r.reason)
		case reform:
			next = t.reform(e, it, f, r.reason)
		default:
			t.later(e, it, r)
		}
		if it.fate != nil {
			return true
		}
	}
}

// unformed deals with an event that cannot be brought into the Kitchen's form: with the
// keys fetched anew, else later, else never.
func (t *tenure) unformed(e *endpoint, it *item, err error) *form {
	if !errors.Is(err, errPoison) && t.refresh(e, it) == nil {
		var f form
		if f, err = formOf(it.d.Event.Triple, t.r.keys.Site(e.site), it.refused, time.Now()); err == nil {
			return &f
		}
	}
	t.r.metrics.attempts.inc(ReasonKeys)
	t.alarm(alarmKeys, e, it, ReasonKeys, err)
	if errors.Is(err, errPoison) {
		it.fail(ReasonUndecryptable)
		return nil
	}
	it.unformed++
	e.pause(time.Now(), e.backoff(it.unformed))
	return nil
}

// rewrap answers a Kitchen that cannot open the event: under another valid key of the
// site, fetched anew; once, then the event is a dead letter. A Kitchen that never opened
// anything is another matter: its profile is wrong, and every order would end so.
func (t *tenure) rewrap(e *endpoint, it *item, f form, r Reason) *form {
	if !it.rewrapped {
		err := t.refresh(e, it)
		other, formErr := formOf(it.d.Event.Triple, t.r.keys.Site(e.site), f.fingerprint, time.Now())
		switch {
		case formErr == nil && other.fingerprint != f.fingerprint:
			it.rewrapped, it.refused = true, f.fingerprint
			return &other
		case err != nil:
			// The other key may be there and the Portal not: later.
			t.later(e, it, ruling{again, r, false})
			return nil
		}
	}
	if r == ReasonUndecryptable && !e.isProven() {
		it.refused = ""
		t.alarm(alarmProfile, e, it, r, nil)
		t.later(e, it, ruling{again, r, false})
		return nil
	}
	t.answered(e, false)
	it.fail(r)
	return nil
}

// reform answers a Kitchen that misses security headers on a plain event: perhaps the
// site's encryption was switched on.
func (t *tenure) reform(e *endpoint, it *item, f form, r Reason) *form {
	err := t.refresh(e, it)
	other, formErr := formOf(it.d.Event.Triple, t.r.keys.Site(e.site), "", time.Now())
	if formErr == nil && other.sealed() && !it.reformed {
		it.reformed = true
		return &other
	}
	if err == nil && formErr == nil {
		t.alarm(alarmUnencrypted, e, it, r, nil)
	}
	t.reread(e)
	t.later(e, it, ruling{again, r, false})
	return nil
}

// refresh asks the Portal for the site's keys, no longer than the event has time.
func (t *tenure) refresh(e *endpoint, it *item) error {
	ctx, cancel := context.WithDeadline(t.begin, it.deadline)
	defer cancel()
	return t.r.keys.Refresh(ctx, e.site)
}

// later pauses the endpoint before the next attempt.
func (t *tenure) later(e *endpoint, it *item, r ruling) {
	if r.alarm {
		t.alarm(alarmCredential, e, it, r.reason, nil)
		t.reread(e)
	}
	if e.failed(time.Now(), &it.last) {
		t.r.log.Warn("kitchen fails; attempts go on until the deadline", "site", e.site, "endpoint", e.name,
			"reason", r.reason, "status", it.last.status, "err", it.last.err)
	}
}

// reread looks for a new credential in the file.
func (t *tenure) reread(e *endpoint) {
	if err := e.readCredential(); err != nil {
		t.r.log.Warn("credential not read again; the one before is used", "site", e.site, "endpoint", e.name, "err", err)
	}
}

func (t *tenure) answered(e *endpoint, taken bool) {
	if failures := e.answered(taken); failures > 0 {
		t.r.log.Info("kitchen answers again", "site", e.site, "endpoint", e.name, "failures", failures)
	}
}

func (t *tenure) alarm(message string, e *endpoint, it *item, r Reason, err error) {
	if !e.alarm(r, time.Now()) {
		return
	}
	ev := &it.d.Event
	t.r.log.Error(message, "site", e.site, "endpoint", e.name, "edge", ev.Edge, "kind", ev.Kind, "seq", ev.Seq, "id", ev.ID,
		"reason", r, "status", it.last.status, "attempt", it.attempts, "err", err)
}
