package broker

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
)

// A request ends with its reason, whatever ends it.
func TestARequestEndsWithItsReason(t *testing.T) {
	t.Parallel()
	enough := errors.New("enough")
	for _, row := range []struct {
		name string
		end  func(b *Broker, parent context.CancelCauseFunc)
		want string
	}{
		{"the link goes down", func(b *Broker, _ context.CancelCauseFunc) { b.linkDown(nil) }, errLinkDown.Error()},
		{"the connection is closed", func(b *Broker, _ context.CancelCauseFunc) { b.linkDown(errClosed) }, errLinkDown.Error()},
		{"another link comes", func(b *Broker, _ context.CancelCauseFunc) { b.linkUp(&nats.Conn{}) }, errLinkDown.Error()},
		{"the subject is denied", func(b *Broker, _ context.CancelCauseFunc) { b.deny("pos.a") }, ErrDenied.Error()},
		{"the caller has enough", func(_ *Broker, parent context.CancelCauseFunc) { parent(enough) }, enough.Error()},
		{"no answer comes", func(*Broker, context.CancelCauseFunc) { time.Sleep(attemptTimeout) }, "no answer within 2s"},
		{"first denied, then down", func(b *Broker, _ context.CancelCauseFunc) { b.deny("pos.a"); b.linkDown(nil) }, ErrDenied.Error()},
		{"another subject is denied, then down", func(b *Broker, _ context.CancelCauseFunc) { b.deny("pos.b"); b.linkDown(nil) }, errLinkDown.Error()},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := offline(t)
				b.linkUp(&nats.Conn{})
				parent, end := context.WithCancelCause(t.Context())
				defer end(nil)
				ctx, done := b.asks(parent, b.link, "pos.a", attemptTimeout)
				time.Sleep(attemptTimeout - 1)
				if ctx.Err() != nil {
					t.Fatalf("ended too early: %v", context.Cause(ctx))
				}
				row.end(b, end)
				synctest.Wait()
				if err := context.Cause(ctx); err == nil || err.Error() != row.want {
					t.Errorf("ended with %v, want %s", err, row.want)
				}
				done()
				if len(b.asking) != 0 {
					t.Error("the request is still known after its end")
				}
			})
		})
	}
	t.Run("the link went down before it began", func(t *testing.T) {
		b := offline(t)
		b.linkUp(&nats.Conn{})
		link := b.link
		b.linkDown(nil)
		b.linkUp(&nats.Conn{})
		ctx, done := b.asks(t.Context(), link, "pos.a", attemptTimeout)
		defer done()
		if err := context.Cause(ctx); !errors.Is(err, errLinkDown) {
			t.Errorf("ended with %v, want %v", err, errLinkDown)
		}
	})
	t.Run("it is done", func(t *testing.T) {
		b := offline(t)
		b.linkUp(&nats.Conn{})
		ctx, done := b.asks(t.Context(), b.link, "pos.a", attemptTimeout)
		done()
		if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v, want %v", err, context.Canceled)
		}
	})
}

// offline is a broker without a connection, for what only needs to know whether there is one.
func offline(t *testing.T) *Broker {
	t.Helper()
	m, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &Broker{metrics: m, log: slog.New(slog.DiscardHandler), linked: make(chan struct{}), closed: make(chan struct{}),
		asking: make(map[*asked]struct{}), trouble: errLinkDown}
}

// BenchmarkRequestContext is what a request costs beside what nats.go does.
func BenchmarkRequestContext(b *testing.B) {
	link, end := context.WithCancelCause(context.Background())
	defer end(nil)
	br := &Broker{link: link, asking: make(map[*asked]struct{})}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		_, done := br.asks(ctx, link, "pos.store-1.order.edge-1", attemptTimeout)
		done()
	}
}
