package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

const (
	catchupEvents = 100_000
	quickEvents   = 10_000

	returnExpired = 50_000
	returnLive    = 6_000

	// fillLimit bounds how long an outbox is filled.
	fillLimit = 2 * time.Minute
)

func catchupBenches() []bench {
	const live, synced, expired, back = "edge.catchup", "edge.catchup.always", "edge.catchup.expired", "edge.return"
	cold := func(name string, open func(ctx context.Context, l *lab) (*pair, error), rows ...row) bench {
		return bench{name: name, turn: time.Second, quick: time.Second, cold: true, rows: rows, open: open}
	}
	const setting = "an edge with its outbox on disk, cut off from the hub when it starts"
	return []bench{
		cold(live, func(ctx context.Context, l *lab) (*pair, error) {
			return openCatchup(ctx, l, live, "interval", catchupEvents)
		},
			row{name: live, key: "rate", unit: perSecond, budget: budget{kind: ratioAtLeast, bound: 0.6},
				how: fmt.Sprintf("events a second from when the hub can be reached and is connected to, until it has stored all of %d that are to be delivered yet; %d sites, hub with sync: interval, forward.rate out of the way; %s; floor: one fast batch of as many and as long messages with the same headers, ready in memory", catchupEvents, acceptPOS, setting)},
			row{name: live + ".cpu", key: "cpu", unit: microseconds, budget: budget{kind: reported}, how: "CPU of the edge's process for an event in these turns"},
			row{name: live + ".fill", key: "fill", unit: perSecond, budget: budget{kind: reported},
				how: fmt.Sprintf("orders accepted a second from %d POS at once while that outbox was filled, the hub away; measured once", acceptPOS)},
			row{name: live + ".open", key: "open", unit: milliseconds, budget: budget{kind: reported},
				how: "from the start of the edge's process until it has read that outbox and takes orders"}),
		cold(synced, func(ctx context.Context, l *lab) (*pair, error) {
			return openCatchup(ctx, l, synced, "always", catchupEvents/5)
		},
			row{name: synced, key: "rate", unit: perSecond, budget: budget{kind: reported},
				how: fmt.Sprintf("as `%s`, with a hub that syncs each event (sync: always), and %d of them: the hub's disk is what is measured", live, catchupEvents/5)}),
		cold(expired, func(ctx context.Context, l *lab) (*pair, error) { return openExpired(ctx, l, expired) },
			row{name: expired, key: "rate", unit: perSecond, budget: budget{kind: valueAtLeast, bound: 50_000},
				how: fmt.Sprintf("expired events a second from when the hub can be reached and is connected to, until it has stored the runs of all of %d that expired while it was away; %s; %d sites, hub with sync: interval", catchupEvents, setting, acceptPOS)}),
		cold(back, func(ctx context.Context, l *lab) (*pair, error) { return openReturn(ctx, l, back) },
			row{name: back, key: "linked", unit: milliseconds, budget: budget{kind: valueAtMost, bound: 2000},
				how: fmt.Sprintf("from when the hub is connected to again until it has an order that was sent at that moment, behind %d events that expired and %d that are to be delivered; default settings, hub with sync: interval, %d sites", returnExpired, returnLive, acceptPOS)},
			row{name: back + ".reachable", key: "reachable", unit: milliseconds, budget: budget{kind: reported},
				how: "the same, from when the hub can be reached: the edge's pause between two attempts to connect is in it"}),
	}
}

// outbox is an edge's data folder, filled, and its settings.
type outbox struct {
	crew   *crew
	fleet  *fleet
	edge   *edge
	link   *link // to whatever hub is there
	filled string
	last   string // id of the last order in it
	fill   float64
	turns  int
}

// filling is one part of what an outbox holds.
type filling struct {
	events  int
	headers []string
	expires bool // wait until the last of it has failed
}

// fillOutbox runs an edge that never sees a hub, has it accept orders, stops it, and keeps
// its data folder. more are settings of the edge.
func fillOutbox(ctx context.Context, c *crew, sites []string, more map[string]any, parts ...filling) (*outbox, error) {
	if err := onDisk(c.dir); err != nil {
		return nil, err
	}
	f, err := newFleet(ctx, c, sites)
	if err != nil {
		return nil, err
	}
	o := &outbox{crew: c, fleet: f, filled: c.file("filled")}
	if o.link, err = c.newLink(); err != nil {
		return nil, err
	}
	settings := roomy()
	maps.Copy(settings, more)
	settings["kinds"] = map[string]any{"order": map[string]any{"deadline": "24h"}}
	if o.edge, err = c.edgeSettings(f, "nats://"+o.link.address, settings); err != nil {
		return nil, err
	}
	if err := o.run(ctx); err != nil {
		return nil, err
	}
	for _, part := range parts {
		t := newTills(f, o.edge.address, o.edge.tokens, o.edge.process.PID(), books{}, part.headers...)
		waits, took, err := t.send(ctx, acceptPOS, fillLimit, int64(part.events))
		if err != nil {
			return nil, err
		}
		if len(waits) != part.events {
			return nil, fmt.Errorf("%d of %d orders were accepted in %v", len(waits), part.events, took)
		}
		o.fill = float64(len(waits)) / took.Seconds()
		if o.last, err = o.edge.order(ctx, t.requests[0]); err != nil {
			return nil, err
		}
		if part.expires {
			if err := o.become(ctx, "failed"); err != nil {
				return nil, err
			}
		}
	}
	if err := c.stop(o.edge.process); err != nil {
		return nil, err
	}
	return o, os.Rename(c.file("edge-data"), o.filled)
}

// run starts the edge on what is in its data folder, without a hub, and waits until nothing
// but the hub is missing.
func (o *outbox) run(ctx context.Context) error {
	var err error
	if o.edge.process, err = o.crew.launch(ctx, "edge", "edge", "run", "--config", o.edge.file); err != nil {
		return err
	}
	return eventually(ctx, func() (bool, string, error) {
		select {
		case <-o.edge.process.Done():
			return false, "", o.edge.process.Ended()
		default:
		}
		failing, err := o.edge.failing(ctx)
		if err != nil {
			return false, fmt.Sprintf("the edge does not answer: %v", err), nil
		}
		delete(failing, "hub")
		return len(failing) == 0, fmt.Sprintf("the edge is not ready, and not only because the hub is away: %v", failing), nil
	})
}

// order has one order accepted, and returns its id.
func (e *edge) order(ctx context.Context, request []byte) (id string, err error) {
	till, err := dial(ctx, e.address)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, till.close()) }()
	r, err := till.call(request)
	if err == nil {
		err = r.wants(http.StatusAccepted)
	}
	return r.id, err
}

// failing is what the edge says keeps it from being ready.
func (e *edge) failing(ctx context.Context) (map[string]string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+e.admin+"/readyz", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Failing map[string]string `json:"failing"`
	}
	err = json.NewDecoder(resp.Body).Decode(&answer)
	return answer.Failing, err
}

// become waits until the last order of the outbox is in a state, and so until the outbox
// was read.
func (o *outbox) become(ctx context.Context, state string) error {
	return eventually(ctx, func() (bool, string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+o.edge.address+"/messages/"+o.last, nil)
		if err != nil {
			return false, "", err
		}
		req.Header.Set("Authorization", "Bearer "+o.edge.tokens[0])
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return false, fmt.Sprintf("the edge does not answer: %v", err), nil
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if err != nil {
			return false, err.Error(), nil
		}
		var m struct {
			State string `json:"state"`
		}
		_ = json.Unmarshal(body, &m) // or it says why not
		return resp.StatusCode == http.StatusOK && m.State == state, fmt.Sprintf("the outbox's last order is not %s: %s: %.200s", state, resp.Status, body), nil
	})
}

// round has a hub of its own, and an edge that has just been started on the filled outbox
// and does not reach the hub yet.
type round struct {
	*outbox
	hub    *hub
	dir    string
	opened time.Duration // from the edge's start until it has read the outbox
}

// begin starts a round.
func (o *outbox) begin(ctx context.Context, sync, state string) (_ *round, err error) {
	o.turns++
	r := &round{outbox: o}
	label := "hub-" + strconv.Itoa(o.turns)
	r.dir = o.crew.file(label)
	o.link.cut()
	data := o.crew.file("edge-data")
	if err := copyFolder(data, o.filled); err != nil {
		return nil, err
	}
	if r.hub, err = o.crew.startHub(ctx, label, sync, 1); err != nil {
		return nil, err
	}
	o.link.to(r.hub.address)
	start := time.Now()
	if err := o.run(ctx); err != nil {
		return nil, err
	}
	if err := o.become(ctx, state); err != nil {
		return nil, err
	}
	r.opened = time.Since(start)
	return r, nil
}

// end stops what begin started, and removes what they stored.
func (r *round) end() error {
	r.link.cut()
	errs := []error{r.crew.stop(r.edge.process)}
	errs = append(errs, r.hub.leave(), r.crew.stop(r.hub.process), os.RemoveAll(r.crew.file("edge-data")), os.RemoveAll(r.dir))
	return errors.Join(errs...)
}

// arrived waits until the hub has n messages from when the link was opened. It returns how
// long that took from when the link was used.
func (r *round) arrived(ctx context.Context, n int) (time.Duration, error) {
	began, err := connected(ctx, r.link.open())
	if err != nil {
		return 0, err
	}
	err = r.hub.books(r.fleet).await(ctx, n)
	return time.Since(began), err
}

func openCatchup(ctx context.Context, l *lab, name, sync string, events int) (_ *pair, err error) {
	if l.quick {
		events = quickEvents
	}
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	fast := map[string]any{"forward": map[string]any{"rate": 1_000_000}}
	o, err := fillOutbox(ctx, c, siteNames(acceptPOS), fast, filling{events: events - 1})
	if err != nil {
		return nil, err
	}
	var size messageSize
	return &pair{
		product: func(ctx context.Context, _ time.Duration) (_ sample, err error) {
			r, err := o.begin(ctx, sync, "accepted")
			if err != nil {
				return nil, err
			}
			defer func() { err = errors.Join(err, r.end()) }()
			before, err := cpuTime(o.edge.process.PID())
			if err != nil {
				return nil, err
			}
			took, err := r.arrived(ctx, events)
			if err != nil {
				return nil, err
			}
			after, err := cpuTime(o.edge.process.PID())
			if err != nil {
				return nil, err
			}
			for _, i := range []int{0, acceptPOS - 1} {
				if err := r.hub.books(o.fleet).check(ctx, i, orderOf(o.fleet.sites[i], 1, eventBytes)); err != nil {
					return nil, err
				}
			}
			if err := size.is(ctx, r.hub, events); err != nil {
				return nil, err
			}
			return sample{"rate": float64(events) / took.Seconds(), "cpu": float64((after - before).Nanoseconds()) / 1e3 / float64(events),
				"fill": o.fill, "open": float64(r.opened.Microseconds()) / 1e3}, nil
		},
		floor: func(ctx context.Context, _ time.Duration) (sample, error) {
			took, err := o.floor(ctx, sync, events, &size)
			return sample{"rate": float64(events) / took.Seconds()}, err
		},
		close: c.close,
	}, nil
}

// floor measures the floor over the same link.
func (o *outbox) floor(ctx context.Context, sync string, events int, size *messageSize) (_ time.Duration, err error) {
	o.turns++
	o.link.cut()
	label := "hub-" + strconv.Itoa(o.turns)
	h, err := o.crew.startHub(ctx, label, sync, 1)
	if err != nil {
		return 0, err
	}
	o.link.to(h.address)
	admin, err := stack.FreeAddr("")
	if err != nil {
		return 0, err
	}
	p, err := o.crew.start(ctx, "catchup", "floor", admin, "-hub", "nats://"+o.link.address, "-admin", admin,
		"-sites", strconv.Itoa(acceptPOS), "-events", strconv.Itoa(events), "-size", strconv.Itoa(sealedBytes))
	if err != nil {
		return 0, err
	}
	began, err := connected(ctx, o.link.open())
	if err != nil {
		return 0, err
	}
	if err := h.books(o.fleet).await(ctx, events); err != nil {
		return 0, err
	}
	took := time.Since(began)
	if err := size.is(ctx, h, events); err != nil {
		return 0, err
	}
	return took, errors.Join(o.crew.stop(p), h.leave(), o.crew.stop(h.process), os.RemoveAll(o.crew.file(label)))
}

func openExpired(ctx context.Context, l *lab, name string) (_ *pair, err error) {
	events := catchupEvents
	if l.quick {
		events = quickEvents
	}
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	fast := map[string]any{"forward": map[string]any{"rate": 1_000_000}}
	o, err := fillOutbox(ctx, c, siteNames(acceptPOS), fast, filling{events: events - 1, headers: []string{"Kb-Within: 1"}, expires: true})
	if err != nil {
		return nil, err
	}
	return &pair{
		product: func(ctx context.Context, _ time.Duration) (_ sample, err error) {
			r, err := o.begin(ctx, "interval", "failed")
			if err != nil {
				return nil, err
			}
			defer func() { err = errors.Join(err, r.end()) }()
			began, err := connected(ctx, r.link.open())
			if err != nil {
				return nil, err
			}
			runs := 0
			if err := eventually(ctx, func() (bool, string, error) {
				told, n, err := r.told(ctx)
				runs = n
				return told >= events, fmt.Sprintf("of %d expired events the hub was told of %d, in %d runs", events, told, n), err
			}); err != nil {
				return nil, err
			}
			took := time.Since(began)
			return sample{"rate": float64(events) / took.Seconds(), "runs": float64(runs), "open": float64(r.opened.Microseconds()) / 1e3}, nil
		},
		close: c.close,
	}, nil
}

// told adds up the last numbers of the sites' runs, which begin at 1 and have no holes; and
// counts the messages that the hub has.
func (r *round) told(ctx context.Context) (events, stored int, err error) {
	if stored, err = r.hub.stored(ctx, "POS"); err != nil || stored == 0 {
		return 0, stored, err
	}
	for _, site := range r.fleet.sites {
		h, err := r.hub.lastHeader(ctx, "POS", "pos.0."+site+".expired."+edgeName)
		if err != nil {
			return events, stored, err
		}
		if h == nil {
			continue
		}
		seq, err := strconv.Atoi(h.Get("Kb-Seq"))
		if err != nil {
			return events, stored, fmt.Errorf("number of the last run of %s: %w", site, err)
		}
		events += seq
	}
	return events, stored, nil
}

func openReturn(ctx context.Context, l *lab, name string) (_ *pair, err error) {
	expired, live := returnExpired, returnLive
	if l.quick {
		expired, live = expired/10, live/10
	}
	c, err := l.crew(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = c.fail(err)
		}
	}()
	o, err := fillOutbox(ctx, c, siteNames(acceptPOS), nil,
		filling{events: expired - 1, headers: []string{"Kb-Within: 1"}, expires: true}, filling{events: live - 1})
	if err != nil {
		return nil, err
	}
	return &pair{
		product: func(ctx context.Context, _ time.Duration) (_ sample, err error) {
			r, err := o.begin(ctx, "interval", "accepted")
			if err != nil {
				return nil, err
			}
			defer func() { err = errors.Join(err, r.end()) }()
			site := len(o.fleet.sites) - 1
			arrivals := make(chan *nats.Msg, 2*(live+expired))
			sub, err := r.hub.nc.ChanSubscribe("live.pos."+o.fleet.sites[site]+".order."+edgeName, arrivals)
			if err != nil {
				return nil, err
			}
			if err := r.hub.nc.Flush(); err != nil {
				return nil, err
			}
			reachable := time.Now()
			linked, err := connected(ctx, r.link.open())
			if err != nil {
				return nil, err
			}
			id, err := o.edge.order(ctx, orderRequest(o.edge.address, o.edge.tokens[site], "wait=0", orderOf(o.fleet.sites[site], 1, eventBytes)))
			if err != nil {
				return nil, err
			}
			limit, cancel := context.WithTimeoutCause(ctx, settleLimit, fmt.Errorf("the hub does not have order %s %v after it was accepted", id, settleLimit))
			defer cancel()
			for {
				select {
				case m := <-arrivals:
					if m.Header.Get("Kb-Id") != id {
						continue
					}
				case <-limit.Done():
					return nil, context.Cause(limit)
				}
				break
			}
			now := time.Now()
			if err := sub.Unsubscribe(); err != nil {
				return nil, err
			}
			// First in, first out: with the order everything before it is there.
			told, stored, err := r.told(ctx)
			if err != nil {
				return nil, err
			}
			if told < expired || stored < live+1 {
				return nil, fmt.Errorf("the order is at the hub before what was accepted before it: the hub was told of %d expired events of %d, and has %d messages", told, expired, stored)
			}
			return sample{"linked": float64(now.Sub(linked).Microseconds()) / 1e3, "reachable": float64(now.Sub(reachable).Microseconds()) / 1e3}, nil
		},
		close: c.close,
	}, nil
}

// copyFolder copies the files in a folder, and what is below it, and waits until the disk has
// them: nothing is left to be written in the turn. Sockets and locks are not copied.
func copyFolder(to, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch target := filepath.Join(to, rel); {
		case d.IsDir():
			return os.MkdirAll(target, 0o700)
		case d.Type().IsRegular():
			return copyFile(target, path)
		}
		return nil
	})
}

func copyFile(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Sync()
}

// sealedBytes is how long an order of eventBytes is when it is sealed and written as a triple.
const sealedBytes = 1460

// messageSize checks that product and floor send messages of the same size.
type messageSize struct{ bytes float64 }

// is compares what the hub's messages are long with those of the turn before.
func (s *messageSize) is(ctx context.Context, h *hub, events int) error {
	bytes, err := h.bytes(ctx, "POS")
	if err != nil {
		return err
	}
	each := float64(bytes) / float64(events)
	if s.bytes > 0 && (each > s.bytes*1.03 || each < s.bytes*0.97) {
		return fmt.Errorf("a message is %.0f bytes at the hub, and was %.0f in the turn before: product and floor do not send the same", each, s.bytes)
	}
	s.bytes = each
	return nil
}
