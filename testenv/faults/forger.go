package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// forgery is one way of altering a true event. It returns the subject it is published on.
type forgery struct {
	what  string
	alter func(r *run, subject []string, m *nats.Msg, rng *rand.Rand) []string
}

// subject is pos, site, kind, edge.
const (
	atSite = 1
	atKind = 2
)

// forgeries: whoever may publish on the hub can do all of it. Each has the true event's
// tag and, since the hub drops what comes twice under one number and tag, a number that no
// event has; those with another tag may bear the true number.
var forgeries = []forgery{
	{"another number", func(_ *run, s []string, _ *nats.Msg, _ *rand.Rand) []string { return s }},
	{"another site", func(r *run, s []string, _ *nats.Msg, rng *rand.Rand) []string {
		others := slices.DeleteFunc(slices.Sorted(maps.Keys(r.plan.sites)), func(site string) bool { return site == s[atSite] })
		s[atSite] = pick(rng, others)
		return s
	}},
	{"a site that is none", func(_ *run, s []string, _ *nats.Msg, _ *rand.Rand) []string {
		s[atSite] = "nowhere"
		return s
	}},
	{"another kind", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		s[atKind] = map[string]string{"order": "alert", "alert": "order"}[s[atKind]]
		m.Header.Set("Kb-Kind", s[atKind])
		return s
	}},
	{"a kind of the bridge's own", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		s[atKind] = "expired"
		m.Header.Set("Kb-Kind", s[atKind])
		return s
	}},
	{"a longer life", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		m.Header.Set("Kb-Deadline", strconv.FormatInt(time.Now().Add(time.Hour).UnixMilli(), 10))
		return s
	}},
	{"another ciphertext", func(_ *run, s []string, m *nats.Msg, rng *rand.Rand) []string {
		// Another letter inside the message: in base64 it is one again.
		text := string(m.Data)
		i := strings.LastIndex(text, `"message":"`) + len(`"message":"`)
		for i += rng.IntN(8); text[i] == 'A'; i++ {
		}
		m.Data = []byte(text[:i] + "A" + text[i+1:])
		return s
	}},
	{"a tag of nobody", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		m.Header.Set("Kb-Tag", strings.Repeat("A", 43))
		return s
	}},
	{"the true number and a tag of nobody", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		m.Header.Set("Kb-Seq", m.Header.Get(trueSeq))
		m.Header.Set("Kb-Tag", strings.Repeat("B", 43))
		return s
	}},
	{"a binding key that is none", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		m.Header.Set("Kb-Bind", "none")
		return s
	}},
	{"no tag", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		m.Header.Del("Kb-Tag")
		return s
	}},
	{"no event at all", func(_ *run, s []string, m *nats.Msg, _ *rand.Rand) []string {
		m.Header, m.Data = nats.Header{}, []byte(nonsense)
		return s
	}},
}

const (
	forgedPrefix = "forged" // begins every forged Kb-Id
	nonsense     = "nonsense"
	trueSeq      = "True-Seq" // for forgeries, and never published
)

// forgedAs says how an event on the hub is known to be forged, "" for a true one.
func forgedAs(m *jetstream.RawStreamMsg) string {
	switch {
	case string(m.Data) == nonsense:
		return nonsense
	case strings.HasPrefix(m.Header.Get("Kb-Id"), forgedPrefix):
		return m.Subject
	}
	return ""
}

// msgID is the transport id of an event, which the product checks.
func msgID(site string, h nats.Header) string {
	tag := h.Get("Kb-Tag")
	return fmt.Sprintf("%s:%s:%s:%s", h.Get("Kb-Edge"), site, h.Get("Kb-Seq"), tag[:min(16, len(tag))])
}

// forge makes an altered copy of a true event, ready to be published.
func (f forgery) forge(r *run, from *nats.Msg, rng *rand.Rand) *nats.Msg {
	m := &nats.Msg{Header: nats.Header{}, Data: slices.Clone(from.Data)}
	for name, values := range from.Header {
		if !strings.HasPrefix(name, "Nats-") {
			m.Header[name] = slices.Clone(values)
		}
	}
	m.Header.Set(trueSeq, m.Header.Get("Kb-Seq"))
	m.Header.Set("Kb-Seq", strconv.FormatUint(1_000_000+rng.Uint64N(1_000_000), 10))
	m.Header.Set("Kb-Id", fmt.Sprintf("%s%026x", forgedPrefix, rng.Uint64()))
	subject := f.alter(r, strings.Split(strings.TrimPrefix(from.Subject, "live."), "."), m, rng)
	m.Header.Del(trueSeq)
	if len(m.Header) > 0 {
		m.Header.Set("Nats-Msg-Id", msgID(subject[atSite], m.Header))
	}
	m.Subject = strings.Join(subject, ".")
	return m
}

// forge publishes altered copies of events that came lately. What they are is drawn now;
// which event is altered depends on what has come.
func forge(rng *rand.Rand, at time.Duration, n int) step {
	chosen := make([]forgery, n)
	var names []string
	for i := range chosen {
		chosen[i] = pick(rng, forgeries)
		names = append(names, chosen[i].what)
	}
	source := rand.New(rand.NewPCG(rng.Uint64(), 1))
	return step{at: at, what: "forge events with " + strings.Join(names, ", "), do: func(ctx context.Context, r *run) (int, error) {
		struck := 0
		for _, f := range chosen {
			recent := r.hub.lately()
			if len(recent) == 0 {
				break
			}
			m := f.forge(r, pick(source, recent), source)
			once, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
			_, err := r.hub.js.PublishMsg(once, m)
			cancel()
			if err == nil {
				struck++
			} // else the hub is away just now; whether it has the event is seen at the end
		}
		return struck, nil
	}}
}
