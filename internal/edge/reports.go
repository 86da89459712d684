package edge

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/time/rate"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// reportKeys is what reports need of the sites' keys.
type reportKeys interface {
	Site(name string) *keysync.Site
	// RereadBinding looks whether there are new binding keys, which Site then has.
	RereadBinding()
}

// reports settles messages by what the bridge reports of them. What comes from the hub is
// believed only when its tag verifies (I7).
type reports struct {
	// Fixed at birth.
	edge, epoch string
	keys        reportKeys
	register    *register
	metrics     *metrics
	log         *slog.Logger

	// A flood of forged reports must not become a flood of log lines; it is counted anyway.
	warn rate.Sometimes
}

// take takes one report. It is called by one goroutine.
func (f *reports) take(r *broker.Report) {
	if r.Edge != f.edge {
		return // another edge of the site: its own affair
	}
	site := f.keys.Site(r.Site)
	if site == nil {
		f.count(r, dropUnknown, fmt.Errorf("site %q is not configured", r.Site))
		return
	}
	if _, known := site.Binding.Key(r.Bind); !known {
		// Perhaps the bridge has read a new binding file before this edge.
		f.keys.RereadBinding()
		site = f.keys.Site(r.Site)
	}
	if err := site.Binding.VerifyReport(&r.Report, r.Bind, r.Tag); err != nil {
		f.count(r, dropUnverified, err)
		return
	}
	if r.Epoch != f.epoch {
		f.metrics.drops.WithLabelValues(dropUnknown).Inc() // accepted before this start
		return
	}
	v := verdict{site: r.Site, id: r.ID, seq: r.Seq, state: state(r.State), reason: r.Reason, attempts: r.Attempts, kitchenStatus: r.Status}
	if !v.state.final() {
		f.count(r, dropMalformed, fmt.Errorf("state %q is neither delivered nor failed", r.State))
		return
	}
	if v.state == stateDelivered {
		var err error
		if v.answer, err = openAnswer(site.Binding, r.Triple); err != nil {
			// It was delivered all the same: only what the Kitchen said is lost.
			f.count(r, dropAnswerSeal, err)
		}
	}
	if !f.register.settle(v, time.Now()) {
		f.metrics.drops.WithLabelValues(dropUnknown).Inc()
	}
}

// count counts what cannot be used of a report.
func (f *reports) count(r *broker.Report, reason string, err error) {
	f.metrics.drops.WithLabelValues(reason).Inc()
	f.warn.Do(func() {
		f.log.Warn("report is not usable", "site", r.Site, "kind", r.Kind, "id", r.ID, "seq", r.Seq, "reason", reason, "err", err)
	})
}

// openAnswer opens the Kitchen's answer in a report.
func openAnswer(b *envelope.Binding, t envelope.Triple) (answer, error) {
	text, err := b.OpenReport(nil, t)
	if err != nil {
		return answer{}, err
	}
	var sealed struct {
		Headers map[string]string `json:"headers"`
		Body    []byte            `json:"body"` // base64
	}
	if err := json.Unmarshal(text, &sealed); err != nil {
		return answer{}, fmt.Errorf("answer in the report: %w", err)
	}
	return answer{contentType: sealed.Headers["content-type"], body: sealed.Body}, nil
}
