//go:build !linux

// Command powercut needs Linux: see main.go.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "powercut: needs Linux with FUSE, and root")
	os.Exit(1)
}
