package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"testing"
	"time"

	floor "github.com/kitchenbridge/kitchenbridge/bench/floor/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

// envelopeBytes is the plaintext of these rows.
const envelopeBytes = 1024

func envelopeBenches() []bench {
	const how = "time of one call, fastest of many batches in a turn; value and floor share process and machine, so believe the ratio"
	of := func(name string, bound float64, how string, open func(*envelope.Key, *floor.Floor, []byte) (product, base work, err error)) bench {
		return bench{
			name: name, turn: 400 * time.Millisecond, quick: 120 * time.Millisecond,
			rows: []row{
				{name: name, key: "ns", unit: nanoseconds, budget: budget{kind: ratioAtMost, bound: bound}, how: how},
				{name: name + ".allocs", key: "allocs", unit: allocations, budget: budget{kind: valueAtMost, bound: 0},
					how: "allocations of one call into a buffer that has room"},
			},
			open: func(context.Context, *lab) (*pair, error) {
				k, err := envelopeKey()
				if err != nil {
					return nil, err
				}
				f, err := floor.New(bytes.Repeat([]byte{7}, 32), envelopeBytes)
				if err != nil {
					return nil, err
				}
				product, base, err := open(k, f, orderOf("bench", 1, envelopeBytes))
				if err != nil {
					return nil, err
				}
				return &pair{product: product.side, floor: base.side}, nil
			},
		}
	}
	return []bench{
		of("envelope.seal", 1.15, "random IV and AES-256-GCM of 1 KiB, bytes to bytes; "+how, openSeal),
		of("envelope.open", 1.15, "AES-256-GCM of 1 KiB, bytes to bytes; "+how, openOpen),
		of("envelope.triple", 1.25, "1 KiB to a triple's JSON and back, against cipher and base64 both ways and one copy; "+how, openTriple),
	}
}

func envelopeKey() (*envelope.Key, error) {
	k, err := envelope.NewKey(cipherSettings, envelope.KeyConfig{
		Fingerprint: "d41d8cd98f00b204e9800998ecf8427e", Passphrase: "a phrase of the bench", ValidUntil: time.Now().Add(time.Hour)})
	if err != nil {
		return nil, err
	}
	return k, k.Derive()
}

// work is one operation, repeated. done checks what the last call made.
type work struct {
	call func() error
	done func() error
}

// batch is how many calls are timed at once: long enough for the clock, short enough to
// find moments in which nothing else ran.
const batch = 128

// side times batches for a turn and gives the fastest.
func (w work) side(ctx context.Context, turn time.Duration) (sample, error) {
	fastest := math.Inf(1)
	for end := time.Now().Add(turn); time.Now().Before(end); {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		start := time.Now()
		for range batch {
			if err := w.call(); err != nil {
				return nil, err
			}
		}
		fastest = min(fastest, float64(time.Since(start))/batch)
	}
	if err := w.done(); err != nil {
		return nil, err
	}
	return sample{"ns": fastest, "allocs": testing.AllocsPerRun(100, func() { _ = w.call() })}, nil
}

var errNotThePlaintext = errors.New("what came back is not the plaintext")

func same(got, want []byte) error {
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: %d bytes for %d", errNotThePlaintext, len(got), len(want))
	}
	return nil
}

func openSeal(k *envelope.Key, f *floor.Floor, plaintext []byte) (product, base work, err error) {
	iv, dst := make([]byte, 0, 16), make([]byte, 0, len(plaintext)+16)
	var sealed, floorIV, floorSealed []byte
	product.call = func() (err error) {
		if iv, err = k.NewIV(iv[:0]); err != nil {
			return err
		}
		sealed, err = k.SealRaw(dst, iv, plaintext)
		return err
	}
	product.done = func() error {
		got, err := k.OpenRaw(nil, iv, sealed)
		return errors.Join(err, same(got, plaintext))
	}
	base.call = func() error {
		floorIV, floorSealed = f.Seal(plaintext)
		return nil
	}
	base.done = func() error {
		got, err := f.Open(floorIV, floorSealed)
		return errors.Join(err, same(got, plaintext))
	}
	return product, base, nil
}

func openOpen(k *envelope.Key, f *floor.Floor, plaintext []byte) (product, base work, err error) {
	iv, err := k.NewIV(nil)
	if err != nil {
		return product, base, err
	}
	sealed, err := k.SealRaw(nil, iv, plaintext)
	if err != nil {
		return product, base, err
	}
	// The floor's results are its own buffers.
	floorIV, floorSealed := f.Seal(plaintext)
	floorIV, floorSealed = bytes.Clone(floorIV), bytes.Clone(floorSealed)
	dst := make([]byte, 0, len(plaintext))
	var opened, floorOpened []byte
	product.call = func() (err error) {
		opened, err = k.OpenRaw(dst, iv, sealed)
		return err
	}
	product.done = func() error { return same(opened, plaintext) }
	base.call = func() (err error) {
		floorOpened, err = f.Open(floorIV, floorSealed)
		return err
	}
	base.done = func() error { return same(floorOpened, plaintext) }
	return product, base, nil
}

func openTriple(k *envelope.Key, f *floor.Floor, plaintext []byte) (product, base work, err error) {
	text, dst := make([]byte, 0, 2*len(plaintext)+256), make([]byte, 0, 2*len(plaintext)+256)
	var opened, floorOpened []byte
	product.call = func() (err error) {
		b, err := k.AppendSeal(text, plaintext)
		if err != nil {
			return err
		}
		t, err := envelope.ParseTriple(b, 0)
		if err != nil {
			return err
		}
		opened, err = k.Open(dst, t)
		return err
	}
	product.done = func() error { return same(opened, plaintext) }
	base.call = func() (err error) {
		floorOpened, err = f.Triple(plaintext)
		return err
	}
	base.done = func() error { return same(floorOpened, plaintext) }
	return product, base, nil
}
