package router

import (
	"errors"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// cause says why an event was quarantined, or a copy of it not looked at.
type cause string

const (
	// Quarantined.
	causeMalformed   cause = "malformed"    // headers or body cannot be read
	causeUnknownSite cause = "unknown-site" // no binding key of the site here: nothing can be verified
	causeUnknownBind cause = "unknown-bind" // tagged with a binding key that is not, or no longer, here
	causeTag         cause = "tag"          // altered or forged
	causeRun         cause = "run"          // says of more than one number, or of the kind "expired", what no edge says
	causeReplay      cause = "replay"       // an event that was taken up before, at another place of the stream

	// Not looked at.
	causeReported    cause = "reported"    // the report log has its report
	causeRedelivered cause = "redelivered" // a copy of what the lane holds or has settled
)

// drop says why an event has no dead letter.
type drop string

const (
	dropRefused drop = "refused" // the hub certainly did not take it
	dropSampled drop = "sampled" // quarantined, and enough like it were kept in the minute
)

// state is what a report says became of its delivery.
type state string

const (
	stateDelivered state = "delivered"
	stateFailed    state = "failed"
)

// metrics are resolved once for each value of a label, so that counting costs one look-up
// of a constant, and so that a series is there to be alerted on before it first counts.
type metrics struct {
	deliveries  map[state]*counter[Reason]
	attempts    *counter[Reason]
	quarantined *counter[cause]
	skipped     *counter[cause]
	dropped     *counter[drop]
	badReports  prometheus.Counter
	latency     prometheus.Histogram
	pending     atomic.Int64
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "kb", Subsystem: "router", Name: name, Help: help}, labels)
	}
	deliveries := vec("deliveries_total", "Deliveries that ended, by the state and reason that were reported.", "state", "reason")
	attempts := vec("attempts_total", "Attempts to deliver, by what came of them; keys: nothing could be posted with the keys at hand.", "reason")
	quarantined := vec("quarantined_total", "Events that are not what an edge sent: not delivered, not reported, a sample dead-lettered.", "cause")
	skipped := vec("skipped_total", "Copies of events that were acknowledged or dropped without a look.", "cause")
	dropped := vec("dropped_dead_letters_total", "Dead letters that were not stored; the event itself stays in POS.", "cause")
	m := &metrics{
		deliveries: map[state]*counter[Reason]{
			stateDelivered: newCounter(deliveries.MustCurryWith(prometheus.Labels{"state": string(stateDelivered)}),
				ReasonAccepted, ReasonRepeated),
			stateFailed: newCounter(deliveries.MustCurryWith(prometheus.Labels{"state": string(stateFailed)}),
				ReasonConflict, ReasonUndecryptable, ReasonUnknownKey, ReasonRefused, ReasonRedirect, ReasonGone,
				ReasonExpired, ReasonOutcomeUnknown, ReasonStopped, ReasonNoRoute),
		},
		attempts: newCounter(attempts,
			ReasonAccepted, ReasonRepeated,
			ReasonConflict, ReasonUndecryptable, ReasonUnknownKey, ReasonRefused, ReasonRedirect, ReasonGone,
			ReasonCredential, ReasonUnencrypted, ReasonBusy, ReasonThrottled, ReasonKitchenError, ReasonUnexpected,
			ReasonTimeout, ReasonCut, ReasonRefusedConn, ReasonDNS, ReasonTLS, ReasonNetwork, ReasonKeys),
		quarantined: newCounter(quarantined, causeMalformed, causeUnknownSite, causeUnknownBind, causeTag, causeRun, causeReplay),
		skipped:     newCounter(skipped, causeReported, causeRedelivered),
		dropped:     newCounter(dropped, dropRefused, dropSampled),
		badReports: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "kb", Subsystem: "router", Name: "unverified_reports_total",
			Help: "Reports in the log that did not verify and were not believed.",
		}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "kb", Subsystem: "router", Name: "latency_seconds",
			Help:    "From the hub's storing of an event to the hub's storing of its report.",
			Buckets: []float64{.001, .002, .003, .005, .01, .02, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600},
		}),
	}
	if reg == nil {
		return m, nil
	}
	pending := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "kb", Subsystem: "router", Name: "pending",
		Help: "Events taken from the hub and not acknowledged yet.",
	}, func() float64 { return float64(m.pending.Load()) })
	var errs []error
	for _, c := range []prometheus.Collector{deliveries, attempts, quarantined, skipped, dropped, m.badReports, m.latency, pending} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}

// counter counts by one label of a closed vocabulary.
type counter[L ~string] struct {
	vec *prometheus.CounterVec
	of  map[L]prometheus.Counter
}

func newCounter[L ~string](vec *prometheus.CounterVec, labels ...L) *counter[L] {
	c := &counter[L]{vec: vec, of: make(map[L]prometheus.Counter, len(labels))}
	for _, l := range labels {
		c.of[l] = vec.WithLabelValues(string(l))
	}
	return c
}

func (c *counter[L]) inc(label L) {
	if one, ok := c.of[label]; ok {
		one.Inc()
		return
	}
	c.vec.WithLabelValues(string(label)).Inc()
}
