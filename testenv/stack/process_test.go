package stack

import "testing"

// Nobody listens yet where the first of two programs is to: the second gets another address.
func TestAddressesDiffer(t *testing.T) {
	seen := make(map[string]bool)
	for i := range len(handedOut.lately) {
		addr, err := FreeAddr("")
		if err != nil {
			t.Fatal(err)
		}
		if seen[addr] {
			t.Fatalf("%s came twice within %d", addr, i+1)
		}
		seen[addr] = true
	}
}
