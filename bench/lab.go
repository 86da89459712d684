package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kitchenbridge/kitchenbridge/testenv/stack"
)

// lab is what the benches of one run share: a folder, the programs built into it, and a
// log of what happened.
type lab struct {
	dir   string
	keep  bool // the folder is the caller's
	quick bool
	log   *os.File
	warn  io.Writer // for what the reader of the results must know

	build sync.Once
	err   error // of the build
	count int   // of folders handed out
}

func newLab(o options, warn io.Writer) (*lab, error) {
	l := &lab{dir: o.keep, keep: o.keep != "", quick: o.quick, warn: warn}
	var err error
	if l.keep {
		if l.dir, err = filepath.Abs(l.dir); err == nil {
			err = os.MkdirAll(l.dir, 0o700)
		}
	} else {
		l.dir, err = os.MkdirTemp("", "kitchenbridge-bench-")
	}
	if err != nil {
		return nil, err
	}
	if l.log, err = os.Create(filepath.Join(l.dir, "bench.log")); err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

func (l *lab) close() error {
	var err error
	if l.log != nil {
		err = l.log.Close()
	}
	if !l.keep {
		err = errors.Join(err, os.RemoveAll(l.dir))
	}
	return err
}

func (l *lab) logf(format string, args ...any) {
	fmt.Fprintf(l.log, time.Now().Format("15:04:05.000 ")+format+"\n", args...)
}

// warnf tells the reader, and the log.
func (l *lab) warnf(format string, args ...any) {
	fmt.Fprintf(l.warn, "bench: "+format+"\n", args...)
	l.logf(format, args...)
}

// program returns the path of a program by its name; all are built at the first call.
func (l *lab) program(ctx context.Context, name string) (string, error) {
	l.build.Do(func() { l.err = buildAll(ctx, filepath.Join(l.dir, "bin")) })
	return filepath.Join(l.dir, "bin", name), l.err
}

func buildAll(ctx context.Context, dir string) error {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("find the module: %w", err)
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator),
		"./cmd/edge", "./cmd/bridge", "./bench/rig/...", "./bench/floor/...")
	cmd.Dir = strings.TrimSpace(string(root))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return nil
}

// folder makes a new folder for one bench.
func (l *lab) folder(name string) (string, error) {
	l.count++
	dir := filepath.Join(l.dir, fmt.Sprintf("%02d-%s", l.count, name))
	return dir, os.MkdirAll(dir, 0o700)
}

// crew are the processes of one bench.
type crew struct {
	lab  *lab
	dir  string
	mu   sync.Mutex
	all  []*stack.Process // Guarded by mu, in the order of their start
	undo []func() error   // Guarded by mu
}

func (l *lab) crew(name string) (*crew, error) {
	dir, err := l.folder(name)
	return &crew{lab: l, dir: dir}, err
}

func (c *crew) file(name string) string { return filepath.Join(c.dir, name) }

// start runs a program and waits until http://admin/readyz says 200. label names its log.
func (c *crew) start(ctx context.Context, program, label, admin string, args ...string) (*stack.Process, error) {
	path, err := c.lab.program(ctx, program)
	if err != nil {
		return nil, err
	}
	p, err := stack.StartProcess(label, path, c.file(label+".log"), args...)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.all = append(c.all, p)
	c.mu.Unlock()
	ready, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	return p, p.WaitReady(ready, "http://"+admin+"/readyz")
}

const (
	readyLimit = 60 * time.Second
	stopLimit  = 20 * time.Second
)

// later has f called by close.
func (c *crew) later(f func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.undo = append(c.undo, f)
}

// stop ends one process now.
func (c *crew) stop(p *stack.Process) error {
	c.mu.Lock()
	for i, other := range c.all {
		if other == p {
			c.all = append(c.all[:i], c.all[i+1:]...)
			break
		}
	}
	c.mu.Unlock()
	return p.Stop(stopLimit)
}

// close ends everything, the last first. A process that does not stop well is an error:
// what it measured is then in doubt.
func (c *crew) close() error {
	c.mu.Lock()
	all, undo := c.all, c.undo
	c.all, c.undo = nil, nil
	c.mu.Unlock()
	var errs []error
	for i := len(undo) - 1; i >= 0; i-- {
		errs = append(errs, undo[i]())
	}
	for i := len(all) - 1; i >= 0; i-- {
		errs = append(errs, all[i].Stop(stopLimit))
	}
	return errors.Join(errs...)
}

// fail ends everything after a failed start; it returns the failure with what closing adds.
func (c *crew) fail(err error) error { return errors.Join(err, c.close()) }
