package main

import (
	"os"
	"testing"
	"time"
)

func TestCPUTimeIsTheKernelsAccountOfAProcess(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for end := time.Now().Add(20 * time.Millisecond); time.Now().Before(end); {
		n++
	}
	after, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if used := after - before; used <= 0 || used > 10*time.Second {
		t.Errorf("%d rounds used %v", n, used)
	}
	for _, pid := range []int{-1, 0, 1 << 22, 1 << 30} {
		if got, err := cpuTime(pid); err == nil {
			t.Errorf("process %d, which is not there, has used %v", pid, got)
		}
	}
}

func TestResidentBytesOfAProcess(t *testing.T) {
	got, err := residentBytes(os.Getpid())
	if err != nil || got < 1<<20 || got > 1<<36 {
		t.Errorf("%d bytes, %v", got, err)
	}
	if _, err := residentBytes(1 << 30); err == nil {
		t.Error("a process that is not there has memory")
	}
}

func TestOpenFilesCanBeCounted(t *testing.T) {
	if got, err := openFiles(); err != nil || got < 100 {
		t.Errorf("%d, %v", got, err)
	}
}
