package main

import (
	"strings"
	"testing"
)

func TestTheKitchensComplaintsFailATurn(t *testing.T) {
	before := kitchenStats{Unique: 10, Repeats: 1, Inversions: 1, Opened: 4, Wrong: 1}
	good := before
	good.Unique, good.Opened = 20, 5
	if err := complaint(before, good); err != nil {
		t.Errorf("a good turn: %v", err)
	}
	for name, change := range map[string]func(*kitchenStats){
		"could not use": func(s *kitchenStats) { s.Wrong++; s.Why = "no key" },
		"twice":         func(s *kitchenStats) { s.Repeats++ },
		"after a later": func(s *kitchenStats) { s.Inversions++ },
		"opened no":     func(s *kitchenStats) { s.Opened = before.Opened },
	} {
		after := good
		change(&after)
		if err := complaint(before, after); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
