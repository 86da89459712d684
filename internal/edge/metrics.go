package edge

import (
	"github.com/prometheus/client_golang/prometheus"
)

// outcome says how a request ended; the label of kb_edge_requests_total.
type outcome string

const (
	outcomeDelivered   outcome = "delivered"   // answered with the Kitchen's answer
	outcomeFailed      outcome = "failed"      // 502: it ended before the POS had its answer
	outcomeAccepted    outcome = "accepted"    // 202 (or 200): stored, not reported yet
	outcomeInvalid     outcome = "invalid"     // 400, 411, 413, 415, 422: the request itself
	outcomeCredential  outcome = "credential"  // 401, 403, 404, 400 code 1: who may come in
	outcomeKeys        outcome = "keys"        // 400 codes 2 and 3, 503 without keys
	outcomeConflict    outcome = "conflict"    // 422: the key or the envelope came before, with something else
	outcomeBusy        outcome = "busy"        // 503: too many requests at once
	outcomeNotStored   outcome = "not-stored"  // 503: certainly nothing is stored
	outcomeUnknown     outcome = "unknown"     // 503: nobody knows
	outcomeDisappeared outcome = "disappeared" // the POS went away, or sent its body too slowly
)

// Reasons of kb_edge_drops_total.
const (
	dropMessage    = "forgotten"          // a settled message, within 24 h: messages is too low
	dropAnswer     = "forgotten-answer"   // the same, for the sake of answer_bytes
	dropEnvelope   = "forgotten-envelope" // of many envelopes of one message the oldest
	dropUnverified = "report-unverified"  // a report whose tag does not verify
	dropMalformed  = "report-malformed"   // a report with a tag, and a state that is none
	dropUnknown    = "report-unknown"     // a report on a message that is not remembered
	dropAnswerSeal = "report-answer"      // a verified report whose answer does not open
	dropNoReport   = "no-report"          // 72 h after the deadline, and no report came
)

type metrics struct {
	requests *prometheus.CounterVec
	drops    *prometheus.CounterVec
	accept   prometheus.Histogram
}

func newMetrics() *metrics {
	return &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_edge_requests_total", Help: "Requests of POS by kind and outcome.",
		}, []string{"kind", "outcome"}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_edge_drops_total", Help: "What was dropped or forgotten, by reason.",
		}, []string{"reason"}),
		accept: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kb_edge_accept_seconds", Help: "From a request's headers to the hub's acknowledgement, for requests that were stored.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}),
	}
}

// register puts the metrics where they are read. unsettled and unknown are asked when
// they are.
func (m *metrics) register(r prometheus.Registerer, unsettled, unknown func() int) error {
	gauge := func(name, help string, f func() int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(f()) })
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.drops, m.accept,
		gauge("kb_edge_unsettled", "Messages stored or being stored, and not reported yet.", unsettled),
		gauge("kb_edge_unknown", "Sites whose oldest message has an unknown outcome at the hub, and holds back the next.", unknown),
	} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
