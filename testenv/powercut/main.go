//go:build linux

// Command powercut proves that what a store said yes to outlives a power cut. It runs the
// edge's store (internal/broker.Store) as a process of its own on a file system that loses
// what was not fsynced (testenv/powercut/disk), cuts the power at random moments, kills the
// process, starts it again on what is left, and looks for every record it had acknowledged.
// It needs Linux, root and /dev/fuse, and fails where these are missing.
//
// With -sync interval the same run must lose something: it shows that the test can fail.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kitchenbridge/kitchenbridge/internal/broker"
	"github.com/kitchenbridge/kitchenbridge/testenv/powercut/disk"
)

type options struct {
	cuts     int
	sync     string
	seed     uint64
	names    string
	unsynced string
	delay    time.Duration
	child    string
	minimum  int
}

func main() {
	var o options
	flag.IntVar(&o.cuts, "cuts", 100, "how many power cuts")
	flag.StringVar(&o.sync, "sync", "always", "the store's setting: always, or interval, which must lose something")
	flag.Uint64Var(&o.seed, "seed", 1, "seed of the moments and of what survives")
	flag.StringVar(&o.names, "names", string(disk.Journal), "when names are on the disk: journal or strict")
	flag.StringVar(&o.unsynced, "unsynced", string(disk.Scatter), "what survives of writes without fsync: drop, tear or scatter")
	flag.DurationVar(&o.delay, "fsync", time.Millisecond, "how long an fsync takes; the longer, the more cuts come while one is under way")
	flag.IntVar(&o.minimum, "minimum", 50, "least acknowledged records a cut, on average; fewer prove nothing")
	flag.StringVar(&o.child, "child", "", "for the program itself: write to a store below this folder")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if o.child != "" {
		err = write(ctx, o.child, o.sync, os.Stdout)
	} else {
		err = run(ctx, o, os.Stdout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "powercut:", err)
		os.Exit(1)
	}
}

// kept is how many records the writer leaves in the store, so that it also removes some.
const kept = 2000

// write opens the store, tells what is in it, and appends records until it is killed. It
// tells of each record: "have seq sum" at the start, "ready first last lost", then "ack seq
// sum" and "purge seq".
func write(ctx context.Context, dir, sync string, out io.Writer) error {
	s, err := broker.OpenStore(ctx, broker.StoreConfig{Dir: filepath.Join(dir, "out"), KeyFile: filepath.Join(dir, "out.key"), Sync: sync, MaxBytes: 256 << 20})
	if err != nil {
		return err
	}
	defer s.Close()
	w := bufio.NewWriter(out)
	if err := s.Read(ctx, 0, func(seq uint64, record []byte) bool {
		fmt.Fprintf(w, "have %d %d\n", seq, crc32.ChecksumIEEE(record))
		return true
	}); err != nil {
		return err
	}
	state := s.State()
	fmt.Fprintf(w, "ready %d %d %t\n", state.First, state.Last, state.Lost)
	if err := w.Flush(); err != nil {
		return err
	}
	for {
		record := make([]byte, 200+rand.IntN(3000))
		for i := range record {
			record[i] = byte(rand.Uint32())
		}
		seq, err := s.Append(ctx, record)
		for errors.Is(err, broker.ErrUnknown) {
			seq, err = s.Append(ctx, record)
		}
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "ack %d %d\n", seq, crc32.ChecksumIEEE(record)); err != nil {
			return err
		}
		if seq%500 == 0 && seq > kept {
			if err := s.Purge(seq - kept); err != nil {
				return err
			}
			if _, err := fmt.Fprintf(out, "purge %d\n", seq-kept); err != nil {
				return err
			}
		}
	}
}

// ledger is what the writer has said, kept where no cut reaches it.
type ledger struct {
	acked          map[uint64]uint32 // by sequence, without what it removed
	purged         uint64
	accepted, lost int
	said           int // openings that said they had lost records
}

// boot is one run of the writer. It returns when ready was said, or the writer has ended.
func (l *ledger) boot(lines *bufio.Scanner) error {
	have := map[uint64]uint32{}
	for lines.Scan() {
		var seq, first, last uint64
		var sum uint32
		var lost bool
		if _, err := fmt.Sscanf(lines.Text(), "have %d %d", &seq, &sum); err == nil {
			have[seq] = sum
			continue
		}
		if _, err := fmt.Sscanf(lines.Text(), "ready %d %d %t", &first, &last, &lost); err != nil {
			continue
		}
		if lost {
			l.said++
		}
		for seq, sum := range l.acked {
			if got, ok := have[seq]; !ok || got != sum {
				l.lost++
				delete(l.acked, seq)
			}
		}
		return nil
	}
	return errors.Join(errors.New("the writer ended before it was ready"), lines.Err())
}

// follow takes in what the writer says until it has ended.
func (l *ledger) follow(lines *bufio.Scanner) error {
	for lines.Scan() {
		var seq uint64
		var sum uint32
		if _, err := fmt.Sscanf(lines.Text(), "ack %d %d", &seq, &sum); err == nil {
			l.acked[seq] = sum
			l.accepted++
		} else if _, err := fmt.Sscanf(lines.Text(), "purge %d", &seq); err == nil {
			for old := range l.acked {
				if old <= seq {
					delete(l.acked, old)
				}
			}
			l.purged = seq
		}
	}
	return lines.Err()
}

func run(ctx context.Context, o options, out io.Writer) (err error) {
	if flag.NArg() > 0 || o.cuts < 1 || o.sync != "always" && o.sync != "interval" {
		return errors.New("takes no arguments; -cuts is at least 1, and -sync is always or interval")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "powercut-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	d, err := disk.New(disk.Config{Names: disk.Names(o.names), Unsynced: disk.Unsynced(o.unsynced), Seed: o.seed})
	if err != nil {
		return err
	}
	d.Set(disk.Faults{SyncDelay: o.delay})
	rng := rand.New(rand.NewPCG(o.seed, 1))
	l := &ledger{acked: map[uint64]uint32{}}
	var running time.Duration
	torn := 0
	began := time.Now()
	// One boot more than cuts: the last one only looks.
	for cut := range o.cuts + 1 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		took, loss, err := l.cut(ctx, d, dir, self, o.sync, time.Duration(100+rng.IntN(300))*time.Millisecond)
		if err != nil {
			return fmt.Errorf("after %d cuts: %w", cut, err)
		}
		running += took
		torn += loss.Torn
	}
	fmt.Fprintf(out, "powercut cuts %d accepted %d lost %d rate %.0f/s torn %d said-lost %d syncs %d in %v\n",
		o.cuts, l.accepted, l.lost, float64(l.accepted)/running.Seconds(), torn, l.said, d.Stats().Syncs, time.Since(began).Round(time.Second))
	switch {
	case l.accepted < o.minimum*o.cuts:
		return fmt.Errorf("%d records were acknowledged, fewer than %d a cut: too few to prove anything", l.accepted, o.minimum)
	case o.sync == "always" && l.lost > 0:
		return fmt.Errorf("%d acknowledged records are lost", l.lost)
	case o.sync == "interval" && l.lost == 0:
		return errors.New("nothing was lost without fsync: this run cannot find a loss")
	}
	return nil
}

// cut runs the writer for a while, cuts the power, and kills it.
func (l *ledger) cut(ctx context.Context, d *disk.Disk, dir, self, sync string, after time.Duration) (took time.Duration, loss disk.Loss, err error) {
	m, err := d.Mount(dir)
	if err != nil {
		return 0, loss, err
	}
	defer func() { err = errors.Join(err, m.Unmount()) }()
	var log strings.Builder
	cmd := exec.CommandContext(ctx, self, "-child", dir, "-sync", sync)
	cmd.Stderr = &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return 0, loss, err
	}
	if err := cmd.Start(); err != nil {
		return 0, loss, err
	}
	lines := bufio.NewScanner(pipe)
	if err := l.boot(lines); err != nil {
		_ = cmd.Process.Kill()
		return 0, loss, fmt.Errorf("%w: %w\n%s", err, cmd.Wait(), log.String())
	}
	began := time.Now()
	said := make(chan error, 1)
	go func() { said <- l.follow(lines) }()
	t := time.NewTimer(after)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	loss = d.Cut()
	took = time.Since(began)
	_ = cmd.Process.Kill()
	err = <-said
	_ = cmd.Wait() // it was killed
	return took, loss, err
}
