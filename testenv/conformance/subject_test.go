package conformance

import (
	"errors"
	"fmt"
	"hash/fnv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// partitionOf is how internal/broker finds a site's partition.
func partitionOf(site string, partitions int) int {
	f := fnv.New32a()
	f.Write([]byte(site))
	return int(f.Sum32() % uint32(partitions))
}

func TestPartitionOfASiteIsItsHashModuloPartitions(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		for _, partitions := range []int{1, 4, 16} {
			s, r := h.pos(t, partitions, nil)
			sites := []string{"0", "a", "store-1", "store_1", strings.Repeat("x", 63)}
			for i := range 200 {
				sites = append(sites, fmt.Sprintf("store-%d-%x", i, i*7919))
			}
			var msgs []*nats.Msg
			for _, site := range sites {
				msgs = append(msgs, &nats.Msg{Subject: r + "." + site + ".order.e1"})
			}
			at := make(map[uint64]string)
			for i, a := range sendAtOnce(t, h.nc, msgs...) {
				if a.Error != nil {
					t.Fatal(a)
				}
				at[a.Seq] = sites[i]
			}
			c := h.consumer(t, s, nil)
			sub := pull(t, h.nc, c, pullRequest{Batch: len(sites), Expires: time.Minute})
			used := make(map[int]bool)
			for range sites {
				m, meta := delivery(t, sub)
				site := at[meta.Sequence.Stream]
				p := partitionOf(site, partitions)
				used[p] = true
				if want := fmt.Sprintf("%s.%d.%s.order.e1", r, p, site); m.Subject != want {
					t.Errorf("%d partitions: stored as %s, want %s", partitions, m.Subject, want)
				}
			}
			if len(used) != partitions {
				t.Errorf("%d of %d partitions used by %d sites", len(used), partitions, len(sites))
			}
		}
	})
}

func TestRepublishedMessageTellsItsSequenceAndTheOneBeforeOfItsSubject(t *testing.T) {
	onEach(t, func(t *testing.T, h *hub) {
		var live string
		s, r := h.pos(t, 4, func(c *jetstream.StreamConfig) {
			r, _, _ := strings.Cut(c.Subjects[0], ".")
			live = "live-" + r
			c.RePublish = &jetstream.RePublish{Source: r + ".*.*.*.*", Destination: live + ".{{wildcard(2)}}.{{wildcard(3)}}.{{wildcard(4)}}"}
		})
		sub := subscribe(t, h.nc, live+".>")
		for i, row := range []struct{ subject, before string }{
			{"s1.order.e1", "0"},
			{"s1.alert.e1", "0"}, // another subject
			{"s1.order.e1", "1"},
			{"s1.order.e2", "0"},
			{"s1.order.e1", "3"},
		} {
			seq := store(t, h.nc, r+"."+row.subject, header(hdrMsgID, fmt.Sprint(i)), "body")
			if a := publish(t, h.nc, r+"."+row.subject, header(hdrMsgID, fmt.Sprint(i)), "body"); !a.Duplicate { // is not told again
				t.Errorf("the same again: %v", a)
			}
			m := next(t, sub)
			stored := fmt.Sprintf("%s.%d.%s", r, partitionOf("s1", 4), row.subject)
			if m.Subject != live+"."+row.subject || string(m.Data) != "body" {
				t.Errorf("republished as %s %q, want %s.%s", m.Subject, m.Data, live, row.subject)
			}
			if last(m, hdrStream) != name(s) || last(m, hdrSubject) != stored || last(m, hdrMsgID) != fmt.Sprint(i) {
				t.Errorf("republished with %v, want stream %s and subject %s", m.Header, name(s), stored)
			}
			if last(m, hdrSequence) != fmt.Sprint(seq) || last(m, hdrLastSequence) != row.before {
				t.Errorf("republished %s as %s after %s, want %d after %s", row.subject, last(m, hdrSequence), last(m, hdrLastSequence), seq, row.before)
			}
		}
	})
}

// Permissions are the connection's, before any stream sees a message: one server shows them.
func TestPermissionsApplyToThePublishedSubject(t *testing.T) {
	const password = "secret"
	edge := &server.Permissions{
		Publish: &server.SubjectPermission{Allow: []string{
			"pos.*.*.e1", "$JS.API.DIRECT.GET.POS.pos.*.*.*.e1",
		}},
		Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_e1.>"}},
	}
	srv := startServer(t, t.TempDir(), func(o *server.Options) {
		o.Users = []*server.User{{Username: "admin", Password: password}, {Username: "e1", Password: password, Permissions: edge}}
	})
	dial := func(user string, opts ...nats.Option) *nats.Conn {
		nc, err := nats.Connect("", append(opts, nats.InProcessServer(srv), nats.UserInfo(user, password))...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	admin := dial("admin")
	h := &hub{js: jetStream(t, admin)}
	s := h.create(t, jetstream.StreamConfig{
		Name: "POS", Subjects: []string{"pos.*.*.*"}, AllowDirect: true,
		SubjectTransform: &jetstream.SubjectTransformConfig{Source: "pos.*.*.*", Destination: "pos.{{partition(4,1)}}.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}"},
	})

	denied := make(chan error, 100)
	nc := dial("e1", nats.CustomInboxPrefix("_INBOX_e1"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err }))
	stored := fmt.Sprintf("pos.%d.s1.order.e1", partitionOf("s1", 4))
	store(t, nc, "pos.s1.order.e1", nil, "")
	if m := message(t, admin, s, 1); m.Subject != stored {
		t.Fatalf("stored as %s, want %s: the stored name needs no permission", m.Subject, stored)
	}
	// A wildcard asked for by direct get is literal text to the permissions.
	reply, err := nc.Request("$JS.API.DIRECT.GET.POS.pos.*.s1.*.e1", nil, patience)
	if err != nil || last(reply, hdrSequence) != "1" {
		t.Errorf("the edge's own last message: %v, %v", reply, err)
	}
	for _, subject := range []string{
		stored, // the stored name is no name to publish under
		"pos.s1.order.e2",
		"pos.s1.order",
		"pos.s1.order.e1.more",
		"$JS.API.DIRECT.GET.POS.pos.*.s1.*.*",
		"$JS.API.DIRECT.GET.POS.pos.>",
		"$JS.API.DIRECT.GET.POS",
		"$JS.API.STREAM.MSG.GET.POS",
		"$JS.API.STREAM.INFO.POS",
	} {
		inbox := subscribe(t, nc, nc.NewInbox())
		if err := nc.PublishRequest(subject, inbox.Subject, nil); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-denied: // beside the request, which gets no answer
			if !errors.Is(err, nats.ErrPermissionViolation) || !strings.Contains(err.Error(), fmt.Sprintf("Publish to %q", subject)) {
				t.Errorf("publish to %s: told %v", subject, err)
			}
		case <-time.After(patience):
			t.Errorf("publish to %s was not denied", subject)
		}
		if n, _, _ := inbox.Pending(); n != 0 {
			t.Errorf("publish to %s was denied and answered", subject)
		}
	}
	holds(t, s, 1, 1)
}
