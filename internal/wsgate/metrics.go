package wsgate

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// Why an event, or a frame of it, was not shown.
const (
	dropMalformed = "malformed" // the message is not an event
	dropTag       = "tag"       // its tag does not verify, or it lies under another event's subject
	dropExpired   = "expired"   // its deadline is over
	dropRepeated  = "repeated"  // it passed before
	dropKeys      = "keys"      // nothing is known of its site's keys yet
	dropRewrap    = "rewrap"    // sealed in the form that its site uses no more, and not to be brought into the other
	dropSlow      = "slow"      // a frame that waited for a screen whose queue ran full
	dropClosed    = "closed"    // a frame that waited for a screen that went or was closed
)

// Why a screen's socket ended.
const (
	closeHandshake = "handshake" // the handshake's answer did not reach it
	closeClient    = "client"    // the screen closed it
	closeGone      = "gone"      // the network did
	closeProtocol  = "protocol"  // the screen broke the protocol, or sent too large a message
	closeMessage   = "message"   // the screen sent a message, which this gateway does not take
	closeSlow      = "slow"      // its queue was full
	closeWrite     = "write"     // a frame did not leave in time
	closeStale     = "stale"     // the hub was silent for too long
	closeGap       = "gap"       // the feed may have missed events
	closeShutdown  = "shutdown"  // the gateway stopped
)

type metrics struct {
	screens  prometheus.Gauge
	frames   prometheus.Counter
	drops    *prometheus.CounterVec
	closes   *prometheus.CounterVec
	refusals *prometheus.CounterVec
}

// newMetrics makes the metrics and registers them with r, if there is one.
func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		screens: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "kb_wsgate_screens", Help: "Screens connected now."}),
		frames: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kb_wsgate_frames_total", Help: "Events' frames written to screens, each screen's counted; heartbeats are not."}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_wsgate_drops_total", Help: "What was not shown, by reason: events; with slow and closed, one screen's frames."}, []string{"reason"}),
		closes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_wsgate_closes_total", Help: "Screens whose socket ended, by reason."}, []string{"reason"}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_wsgate_refusals_total", Help: "Handshakes refused, by HTTP status and, after a slash, the seed's errorCode."}, []string{"code"}),
	}
	// A series that is there from the start can be told from one that was never counted.
	for _, reason := range []string{dropMalformed, dropTag, dropExpired, dropRepeated, dropKeys, dropRewrap, dropSlow, dropClosed} {
		m.drops.WithLabelValues(reason)
	}
	for _, reason := range []string{closeHandshake, closeClient, closeGone, closeProtocol, closeMessage, closeSlow, closeWrite, closeStale, closeGap, closeShutdown} {
		m.closes.WithLabelValues(reason)
	}
	if r == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.screens, m.frames, m.drops, m.closes, m.refusals} {
		errs = append(errs, r.Register(c))
	}
	return m, errors.Join(errs...)
}

func (m *metrics) drop(reason string, n int) {
	if n > 0 {
		m.drops.WithLabelValues(reason).Add(float64(n))
	}
}
