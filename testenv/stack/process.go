package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Build compiles edge and bridge into dir and returns their paths. It needs the go
// command and a working directory inside the module.
func Build(ctx context.Context, dir string) (edge, bridge string, err error) {
	if err := BuildPackages(ctx, dir, "", "./cmd/edge", "./cmd/bridge"); err != nil {
		return "", "", err
	}
	return filepath.Join(dir, "edge"), filepath.Join(dir, "bridge"), nil
}

// BuildPackages compiles main packages, named from the module's root ("./cmd/edge"), into
// dir, each under its folder's name. tags are build tags, separated by commas; "" is none.
func BuildPackages(ctx context.Context, dir, tags string, packages ...string) error {
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("find the module: %w", err)
	}
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-tags", tags, "-o", dir + string(filepath.Separator)}, packages...)...)
	cmd.Dir = strings.TrimSpace(string(root))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", strings.Join(packages, ", "), err, out)
	}
	return nil
}

// Process is one run of a program: started, watched, and ended by its id.
type Process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // set before done is closed

	mu   sync.Mutex
	tail bytes.Buffer
}

// tailBytes bounds what is kept of a program's log for error messages.
const tailBytes = 8 << 10

// StartProcess starts path with args and this process's environment; its output goes to
// the file at logPath, which grows over restarts.
func StartProcess(name, path, logPath string, args ...string) (*Process, error) {
	return startProcess(name, path, logPath, nil, args...)
}

// startProcess adds env ("NAME=value") to the environment.
func startProcess(name, path, logPath string, env []string, args ...string) (*Process, error) {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	p := &Process{name: name, done: make(chan struct{})}
	p.cmd = exec.Command(path, args...)
	if len(env) > 0 {
		p.cmd.Env = append(os.Environ(), env...)
	}
	out := io.MultiWriter(log, (*tailWriter)(p))
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = childAttr()
	if err := p.cmd.Start(); err != nil {
		log.Close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		log.Close()
		close(p.done)
	}()
	return p, nil
}

type tailWriter Process

func (w *tailWriter) Write(b []byte) (int, error) {
	p := (*Process)(w)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tail.Write(b)
	if over := p.tail.Len() - tailBytes; over > 0 {
		p.tail.Next(over)
	}
	return len(b), nil
}

// Tail returns the last lines the program wrote.
func (p *Process) Tail() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tail.String()
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended returns how a program ended by itself, with the last lines of its log. Call it
// after Done is closed.
func (p *Process) Ended() error {
	return fmt.Errorf("%s ended by itself: %v\n%s", p.name, p.err, p.Tail())
}

// Kill ends the program as a crash would (SIGKILL) and waits for its end.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Signal sends the program a signal, as SIGSTOP to freeze it and SIGCONT to let it go on.
// The signal of a program that has ended is an error.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Stop asks the program to stop (SIGTERM) and waits; after limit it is killed and that
// is an error, as is an exit status other than 0.
func (p *Process) Stop(limit time.Duration) error {
	select {
	case <-p.done:
		return fmt.Errorf("%s had ended before it was told to: %w\n%s", p.name, p.err, p.Tail())
	default:
	}
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(limit):
		p.Kill()
		return fmt.Errorf("%s did not stop within %v\n%s", p.name, limit, p.Tail())
	}
	if p.err != nil {
		return fmt.Errorf("%s stopped badly: %w\n%s", p.name, p.err, p.Tail())
	}
	return nil
}

// WaitReady asks url until it answers 200. It fails at once when the program ends.
func (p *Process) WaitReady(ctx context.Context, url string) error {
	client := &http.Client{Timeout: time.Second}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := "no answer yet"
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err != nil {
			last = err.Error()
		} else {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			last = fmt.Sprintf("%s: %s", resp.Status, bytes.TrimSpace(body))
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended while starting: %w\n%s", p.name, p.err, p.Tail())
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %s\n%s", p.name, last, p.Tail())
		case <-tick.C:
		}
	}
}

const (
	firstPort, ports = 12_000, 20_000 // below the ephemeral ranges of Linux, macOS and Windows
	portTries        = 100
)

// FreeAddr returns a loopback address that nobody listens on: preferred when it is free,
// else one below the range of outgoing connections, so that none of these takes it while
// its program is down. What it returned lately it does not return again: the program that
// is to listen there may not have begun to.
func FreeAddr(preferred string) (string, error) {
	handedOut.Lock()
	defer handedOut.Unlock()
	if preferred != "" && free(preferred) {
		return preferred, nil
	}
	for range portTries {
		port := firstPort + rand.IntN(ports)
		if addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port)); !slices.Contains(handedOut.lately[:], port) && free(addr) {
			handedOut.lately[handedOut.next%len(handedOut.lately)] = port
			handedOut.next++
			return addr, nil
		}
	}
	return "", errors.New("no free port on 127.0.0.1")
}

// handedOut are the ports that FreeAddr drew last.
var handedOut struct {
	sync.Mutex
	lately [256]int
	next   int
}

func free(addr string) bool {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	_ = l.Close()
	return true
}
