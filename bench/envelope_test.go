package main

import (
	"errors"
	"testing"
	"time"
)

func TestEnvelopeTurnsCheckWhatTheyMade(t *testing.T) {
	for _, b := range envelopeBenches() {
		t.Run(b.name, func(t *testing.T) {
			p, err := b.open(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			for name, s := range map[string]side{"product": p.product, "floor": p.floor} {
				got, err := s(t.Context(), time.Millisecond)
				if err != nil || got["ns"] <= 0 {
					t.Errorf("%s: %v, %v", name, got, err)
				}
			}
		})
	}
	idle := work{call: func() error { return nil }, done: func() error { return same(nil, []byte("order")) }}
	if got, err := idle.side(t.Context(), time.Millisecond); !errors.Is(err, errNotThePlaintext) {
		t.Errorf("doing nothing is measured as %v (%v)", got, err)
	}
}
