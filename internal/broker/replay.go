package broker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

const (
	replaySubject = "replay.kitchen."
	replayQueue   = "bridges"
	replaysAtOnce = 16
	replayQueued  = 4096 // questions that wait; more are not answered, and come again
	replaySilence = 5 * time.Second
	hdrReplay     = "Kb-Replay" // the answer's number, from 1
	hdrReplayEnd  = "Kb-Replay-End"
)

// ReplayRequest asks for the reports of one edge at one site.
type ReplayRequest struct {
	Site string `json:"-"`
	Edge string `json:"edge"`
	// Stream and After say how far they are known: After is a sequence of the stream KITCHEN
	// that was created at Stream, Unix ns. 0: not known; or the stream is another one.
	Stream int64  `json:"stream,omitempty"`
	After  uint64 `json:"after,omitempty"`
	// Since is from when on they are asked for otherwise, hub time.
	Since time.Time `json:"since"`
}

// ReplayAnswer is the end of an answer: all reports up to sequence Last have been said.
type ReplayAnswer struct {
	Stream int64         `json:"stream"`
	Last   uint64        `json:"last"`
	Count  int           `json:"count"`
	Now    time.Time     `json:"now"` // by the bridge's clock
	Error  string        `json:"error,omitempty"`
	RTT    time.Duration `json:"-"` // from the question to the first answer
}

// AskReports asks any bridge for reports, and hands f each, in their order, from the
// caller's goroutine. It returns nil only when all have come. ErrAway: no bridge answers.
func (b *Broker) AskReports(ctx context.Context, q ReplayRequest, f func(*Report)) (ReplayAnswer, error) {
	fail := func(err error) (ReplayAnswer, error) {
		return ReplayAnswer{}, fmt.Errorf("ask for reports of %s: %w", q.Site, err)
	}
	body, err := json.Marshal(q)
	if err != nil {
		return fail(err)
	}
	if err := envelope.ValidName(q.Site); err != nil {
		return fail(fmt.Errorf("%w: %w", ErrInvalid, err))
	}
	in := make(chan *nats.Msg, 4*readBatch)
	inbox := b.nc.NewInbox()
	sub, err := b.nc.ChanSubscribe(inbox, in)
	if err != nil {
		return fail(err)
	}
	defer sub.Unsubscribe()
	began := time.Now()
	if err := b.nc.PublishRequest(replaySubject+q.Site, inbox, body); err != nil {
		return fail(&awayError{err})
	}
	var rtt time.Duration
	silence := time.NewTimer(replaySilence)
	defer silence.Stop()
	for count := 0; ; {
		var m *nats.Msg
		select {
		case m = <-in:
		case <-silence.C:
			return fail(&awayError{noAnswer(replaySilence)})
		case <-ctx.Done():
			return fail(context.Cause(ctx))
		}
		silence.Reset(replaySilence)
		if rtt == 0 {
			rtt = time.Since(began)
		}
		switch {
		case m.Header.Get(hdrReplayEnd) != "":
			var a ReplayAnswer
			if err := json.Unmarshal(m.Data, &a); err != nil {
				return fail(fmt.Errorf("%w: %w", ErrMalformed, err))
			}
			if a.Error != "" {
				return fail(fmt.Errorf("the bridge: %s", a.Error))
			}
			if a.Count != count {
				return fail(fmt.Errorf("%d of %d reports came", count, a.Count))
			}
			a.RTT = rtt
			return a, nil
		case m.Header.Get(hdrReplay) == strconv.Itoa(count+1):
			count++
			r, err := decodeReport("kitchen."+q.Site+"."+KindReport, m.Header, m.Data)
			if err != nil {
				b.malformedReport("kitchen."+q.Site+"."+KindReport, 0, err)
				continue
			}
			f(r)
		default:
			if code, _ := status(m); code == "503" {
				return fail(&awayError{nats.ErrNoResponders})
			}
			return fail(errors.New("a report was lost on its way"))
		}
	}
}

// AnswerReplays answers such questions of edges until ctx ends, together with all other
// bridges. An edge gets its own reports only, and only into its own inbox.
func (b *Broker) AnswerReplays(ctx context.Context) error {
	in := make(chan *nats.Msg, replayQueued)
	sub, err := b.nc.ChanQueueSubscribe(replaySubject+"*", replayQueue, in)
	if err != nil {
		return fmt.Errorf("answer replays: %w", err)
	}
	defer sub.Unsubscribe()
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, replaysAtOnce)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-b.closed:
			return fmt.Errorf("answer replays: %w", errClosed)
		case m := <-in:
			var q ReplayRequest
			q.Site = strings.TrimPrefix(m.Subject, replaySubject)
			err := json.Unmarshal(m.Data, &q)
			err = errors.Join(err, envelope.ValidName(q.Site), envelope.ValidName(q.Edge))
			if err != nil || !strings.HasPrefix(m.Reply, inboxPrefix(q.Edge)+".") {
				b.metrics.malformed.WithLabelValues("replay").Inc()
				continue
			}
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return nil
			}
			wg.Go(func() {
				defer func() { <-slots }()
				b.answerReplay(ctx, q, m.Reply)
			})
		}
	}
}

// replayLimit bounds one answer.
const replayLimit = 15 * time.Second

func (b *Broker) answerReplay(ctx context.Context, q ReplayRequest, reply string) {
	ctx, cancel := context.WithTimeout(ctx, replayLimit)
	defer cancel()
	a := ReplayAnswer{}
	var err error
	a.Stream, a.Last, a.Count, err = b.sendReports(ctx, q, reply)
	if err != nil {
		a.Error = err.Error()
	}
	a.Now = time.Now()
	body, err := json.Marshal(a)
	if err != nil {
		return
	}
	// What is lost is asked again.
	_ = b.nc.PublishMsg(&nats.Msg{Subject: reply, Header: nats.Header{hdrReplayEnd: []string{"1"}}, Data: body})
}

func (b *Broker) sendReports(ctx context.Context, q ReplayRequest, reply string) (stream int64, last uint64, count int, err error) {
	st, err := b.js.Stream(ctx, streamKitchen)
	if err != nil {
		return 0, 0, 0, err
	}
	stream = st.CachedInfo().Created.UnixNano()
	from := uint64(0)
	if q.Stream == stream {
		from = q.After + 1
	}
	filter := "kitchen." + q.Site + "." + KindReport
	err = b.reportsOf(ctx, filter, q.Since, from, func(at uint64, r *Report) error {
		last = at
		if r.Edge != q.Edge {
			return nil
		}
		msg, err := encodeReport(r)
		if err != nil {
			return nil // it was read, so it can be written
		}
		count++
		msg.Subject = reply
		delete(msg.Header, hdrMsgID)
		msg.Header[hdrReplay] = []string{strconv.Itoa(count)}
		return b.nc.PublishMsg(msg)
	})
	if last == 0 && from > 0 {
		last = q.After
	}
	return stream, last, count, err
}
