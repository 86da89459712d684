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
	dropStore      = "forgotten-store"    // the same, for the sake of outbox.max_bytes
)

type metrics struct {
	requests *prometheus.CounterVec
	drops    *prometheus.CounterVec
	accept   prometheus.Histogram
	overdue  prometheus.Counter
	epochs   prometheus.Counter
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
			Name: "kb_edge_accept_seconds", Help: "From a request's headers to the disk's acknowledgement, for requests that were stored.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}),
		overdue: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kb_edge_overdue_total", Help: "Messages that had no report when their deadline was over.",
		}),
		epochs: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kb_edge_epochs_total", Help: "Epochs begun because records were lost or the hub was ahead of the outbox.",
		}),
	}
}

// register puts the metrics where they are read. The outbox is asked when they are.
func (m *metrics) register(r prometheus.Registerer, o *outbox) error {
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f)
	}
	for _, c := range []prometheus.Collector{
		m.requests, m.drops, m.accept, m.overdue, m.epochs,
		gauge("kb_edge_unsettled", "Messages stored or being stored, and not reported yet.", func() float64 { return float64(o.register.waiting()) }),
		gauge("kb_edge_late", "Messages whose deadline is over, and nobody has said how they ended.", func() float64 { return float64(o.gauge().overdue) }),
		gauge("kb_edge_backlog", "Messages that the hub has not been told of.", func() float64 { return float64(o.gauge().backlog) }),
		gauge("kb_edge_backlog_age_seconds", "Age of the oldest of them.", func() float64 { return o.gauge().age.Seconds() }),
		gauge("kb_edge_outbox_bytes", "Size of the outbox.", func() float64 { return float64(o.used.Load()) }),
		gauge("kb_edge_outbox_max_bytes", "Bound of the outbox.", func() float64 { return float64(o.max) }),
		gauge("kb_edge_unknown", "1 while the disk does not say whether it has a record.", func() float64 {
			if o.gauge().unknown {
				return 1
			}
			return 0
		}),
	} {
		if err := r.Register(c); err != nil {
			return err
		}
	}
	return nil
}
