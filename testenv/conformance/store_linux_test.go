package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// errorLog keeps what a server logs as an error.
type errorLog struct {
	mu    sync.Mutex
	texts []string // Guarded by mu.
}

func (l *errorLog) Noticef(string, ...any) {}
func (l *errorLog) Warnf(string, ...any)   {}
func (l *errorLog) Fatalf(string, ...any)  {}
func (l *errorLog) Debugf(string, ...any)  {}
func (l *errorLog) Tracef(string, ...any)  {}
func (l *errorLog) Errorf(format string, v ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.texts = append(l.texts, fmt.Sprintf(format, v...))
}

func (l *errorLog) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(strings.ToLower(strings.Join(l.texts, "\n")), text)
}

// The file of a block is replaced by /dev/full, whose writes fail with ENOSPC.
func TestFailedWriteIsLoggedAndNeverAnswered(t *testing.T) {
	dir := t.TempDir()
	log := &errorLog{}
	s := startServer(t, dir, func(o *server.Options) {
		o.JetStreamKey, o.JetStreamCipher = "a key of some length", server.ChaCha
	})
	s.SetLoggerV2(log, false, false, false)
	nc, err := nats.Connect("", nats.InProcessServer(s))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "OUT", Subjects: []string{"out"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "out", []byte("well")); err != nil {
		t.Fatal(err)
	}

	full, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatalf("files %v, error %v", fds, err)
	}
	broken := 0
	for _, fd := range fds {
		var n int
		path, err := os.Readlink(fd)
		if err != nil || !strings.HasPrefix(path, dir) || !strings.HasSuffix(path, ".blk") {
			continue
		}
		if _, err := fmt.Sscan(filepath.Base(fd), &n); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Dup3(int(full.Fd()), n, syscall.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		broken++
	}
	if broken == 0 {
		t.Fatal("the stream has no open block")
	}

	answers, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := nc.PublishRequest("out", answers.Subject, []byte("lost")); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the error is logged", func() bool { return log.has("critical write error") })
	if m, err := answers.NextMsg(200 * time.Millisecond); err == nil {
		t.Errorf("answered: %s", m.Data)
	}
}
