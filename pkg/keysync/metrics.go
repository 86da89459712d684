package keysync

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	keyringAge = prometheus.NewDesc("kb_keysync_keyring_age_seconds",
		"Time since the Portal last confirmed a site's keys, the largest over all sites; since the start for a site never fetched.", nil, nil)
	keyEnds = prometheus.NewDesc("kb_keysync_key_ends_seconds",
		"Time until a site's last key ends, the smallest over all encrypting sites; negative when one has none valid any more. Absent without such a site.", nil, nil)
)

// ages computes the gauges when they are asked for.
type ages struct{ keys *Keys }

func (k *Keys) register(r prometheus.Registerer) error {
	k.count = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kb_keysync_fetch_total",
		Help: "Fetches of a site from the Portal, by result: changed, unchanged, or the reason why nothing was changed.",
	}, []string{"result"})
	for _, r := range reasons {
		k.count.WithLabelValues(string(r))
	}
	collectors := []prometheus.Collector{k.count, ages{k}}
	if k.rebind != nil {
		k.rebind.reads = prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "kb_keysync_binding_reads_total",
			Help: "Readings of the binding file after it changed, by result: taken, or refused, which changes nothing.",
		}, []string{"result"})
		for _, result := range []string{bindingTaken, bindingRefused} {
			k.rebind.reads.WithLabelValues(result)
		}
		collectors = append(collectors, k.rebind.reads)
	}
	if r == nil {
		return nil
	}
	for i, c := range collectors {
		if err := r.Register(c); err != nil {
			for _, c := range collectors[:i] {
				r.Unregister(c)
			}
			return err
		}
	}
	return nil
}

func (a ages) Describe(ch chan<- *prometheus.Desc) {
	ch <- keyringAge
	ch <- keyEnds
}

func (a ages) Collect(ch chan<- prometheus.Metric) {
	now := time.Now()
	var age, ends time.Duration
	var ending bool
	for _, st := range a.keys.sites {
		s := st.now.Load()
		since := s.Fetched
		if since.IsZero() {
			since = a.keys.born
		}
		age = max(age, now.Sub(since))
		if end, ok := lastEnd(s); ok && (!ending || end.Sub(now) < ends) {
			ends, ending = end.Sub(now), true
		}
	}
	ch <- prometheus.MustNewConstMetric(keyringAge, prometheus.GaugeValue, age.Seconds())
	if ending {
		ch <- prometheus.MustNewConstMetric(keyEnds, prometheus.GaugeValue, ends.Seconds())
	}
}
