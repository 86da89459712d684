package broker

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	published    *prometheus.CounterVec // what, outcome
	retries      prometheus.Counter
	disconnects  prometheus.Counter
	asyncErrors  *prometheus.CounterVec // reason
	takeovers    *prometheus.CounterVec // reason
	malformed    *prometheus.CounterVec // what
	feedRestarts *prometheus.CounterVec // reason
}

// newMetrics registers the metrics with r, or takes the ones another Broker of this
// process has registered there. nil: they are kept, and nobody sees them.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kb_broker_" + name, Help: help}, labels)
	}
	retries := counter("publish_retries_total", "Publish attempts after the first.")
	disconnects := counter("disconnects_total", "Connections to the hub lost.")
	m := &metrics{
		published:    counter("published_total", "Messages published, by outcome: stored, duplicate, rejected, unknown.", "what", "outcome"),
		asyncErrors:  counter("errors_total", "Errors the hub or its client reported outside a call, by reason.", "reason"),
		takeovers:    counter("takeovers_total", "Partitions taken over, by reason: start, link, gap, hub, caller.", "reason"),
		malformed:    counter("malformed_total", "Messages from the hub that are not what the wire format says.", "what"),
		feedRestarts: counter("feed_restarts_total", "Feed consumers made anew, by reason: link, gap, silent, hub.", "reason"),
	}
	if r != nil {
		for _, c := range []**prometheus.CounterVec{
			&m.published, &retries, &disconnects, &m.asyncErrors, &m.takeovers, &m.malformed, &m.feedRestarts,
		} {
			err := r.Register(*c)
			if there, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); ok {
				if *c, ok = there.ExistingCollector.(*prometheus.CounterVec); ok {
					continue
				}
			}
			if err != nil {
				return nil, err
			}
		}
	}
	m.retries, m.disconnects = retries.WithLabelValues(), disconnects.WithLabelValues()
	return m, nil
}
