package wsgate

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

const (
	// readLimit bounds a message from a screen. None is taken yet, so it need only be
	// large enough for the screen to be told so.
	readLimit = 4 << 10
	// closeWait is how long a close frame may take to leave, and then the screen's
	// answer to it to come.
	closeWait = time.Second
)

// frame is one event as every screen of a site gets it: encoded once, and compressed
// once, when the first screen that negotiated compression is written to.
type frame struct {
	message *websocket.PreparedMessage
	size    int // bytes before compression
}

func newFrame(text []byte) (*frame, error) {
	message, err := websocket.NewPreparedMessage(websocket.TextMessage, text)
	if err != nil {
		return nil, err
	}
	return &frame{message: message, size: len(text)}, nil
}

// farewell is how a session ends.
type farewell struct {
	reason string // label of the metric
	code   int    // close code; 0 = no close frame is sent, the socket is of no use
	text   string
	flush  bool // what is queued goes out before the close frame
}

var (
	byeRefused  = &farewell{reason: closeHandshake}
	byeGone     = &farewell{reason: closeGone}
	byeClient   = &farewell{reason: closeClient}
	byeProtocol = &farewell{reason: closeProtocol}
	byeWrite    = &farewell{reason: closeWrite}
	byeMessage  = &farewell{reason: closeMessage, code: websocket.CloseUnsupportedData, text: "this gateway takes no messages from screens yet"}
	byeSlow     = &farewell{reason: closeSlow, code: websocket.CloseTryAgainLater, text: "too slow: frames were dropped; reconnect"}
	byeStale    = &farewell{reason: closeStale, code: websocket.CloseTryAgainLater, text: "cut off from the hub; try again later"}
	byeGap      = &farewell{reason: closeGap, code: websocket.CloseServiceRestart, text: "events may have been missed; reconnect"}
	byeShutdown = &farewell{reason: closeShutdown, code: websocket.CloseServiceRestart, text: "the gateway is stopping; reconnect", flush: true}
)

// screen is one session. While nothing is queued it holds one goroutine, which reads.
//
// It is in its hall before the handshake is answered, so that the screen misses nothing
// of what comes after the answer.
type screen struct {
	// Fixed at birth.
	gate     *Gate
	hall     *hall
	who      string               // name of its token
	upgraded chan *websocket.Conn // gives the connection, or is closed without

	// conn is set under mu once upgraded gave it, before anybody reads or writes.
	conn *websocket.Conn

	// Guarded by hall.mu.
	place int // in hall.screens, -1 = not in it

	// writers counts the writer, which is started when there is something to write and
	// ends when there is nothing: at most one at a time. It is started under mu, and
	// never again once serve waits for it.
	writers sync.WaitGroup

	// Guarded by mu.
	mu      sync.Mutex
	queue   []*frame // what waits is queue[head:]
	head    int
	bytes   int  // of what waits
	alive   bool // a heartbeat waits; a second one would say nothing more
	writing bool // a writer is at work, or there is no connection yet
	severed bool // the connection is to be closed, or is
	bye     *farewell
}

func newScreen(g *Gate, h *hall, who string) *screen {
	return &screen{gate: g, hall: h, who: who, upgraded: make(chan *websocket.Conn, 1), place: -1, writing: true}
}

// serve is the session's life.
func (s *screen) serve() {
	conn, ok := <-s.upgraded
	if !ok {
		s.end(byeRefused)
		return
	}
	s.gate.metrics.screens.Inc()
	defer s.gate.metrics.screens.Dec()
	s.start(conn)
	s.end(s.read())
	s.cut()
	s.writers.Wait()
}

// start begins to write what has come since the screen is in its hall.
func (s *screen) start(conn *websocket.Conn) {
	s.mu.Lock()
	s.conn = conn
	severed := s.severed
	if !severed {
		s.writing = false
		if s.head < len(s.queue) || s.alive || s.bye != nil {
			s.wake()
		}
	}
	s.mu.Unlock()
	if severed {
		conn.Close()
	}
}

// cut closes the socket, whatever is under way, and returns how many frames still waited.
func (s *screen) cut() int {
	s.mu.Lock()
	s.severed = true
	conn, left := s.conn, s.forget()
	s.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
	s.gate.metrics.drop(dropClosed, left)
	return left
}

// read returns once the socket is of no more use, and why.
func (s *screen) read() *farewell {
	s.conn.SetReadLimit(readLimit)
	for {
		// A message is not read: the next round passes over it. Pings, and the screen's
		// close frame, are answered inside.
		_, _, err := s.conn.NextReader()
		if err != nil {
			return whyReadEnded(err)
		}
		s.end(byeMessage)
	}
}

func whyReadEnded(err error) *farewell {
	if closed, ok := errors.AsType[*websocket.CloseError](err); ok && closed.Code != websocket.CloseAbnormalClosure {
		return byeClient
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) || websocket.IsCloseError(err, websocket.CloseAbnormalClosure) {
		return byeGone
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return byeGone
	}
	return byeProtocol
}

// offer queues a frame. When the queue is full the screen is closed: in the seed's
// dialect it cannot be told what it missed, so it must not go on as if it had all.
func (s *screen) offer(f *frame) {
	s.mu.Lock()
	if s.bye != nil {
		s.mu.Unlock()
		return
	}
	waiting := len(s.queue) - s.head
	// A frame larger than the bound passes when nothing else waits: it has to pass somehow.
	if waiting >= s.gate.cfg.QueueFrames || waiting > 0 && s.bytes+f.size > s.gate.cfg.QueueBytes {
		s.mu.Unlock()
		if s.end(byeSlow) {
			s.gate.metrics.drop(dropSlow, 1)
		}
		return
	}
	s.queue = append(s.queue, f)
	s.bytes += f.size
	s.wake()
	s.mu.Unlock()
}

// heartbeat asks for an "isAlive?". It is not queued behind frames.
func (s *screen) heartbeat() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bye == nil {
		s.alive = true
		s.wake()
	}
}

// end closes the session for the given reason, and tells whether it was the first to
// say so. It does not wait.
func (s *screen) end(why *farewell) bool {
	s.mu.Lock()
	if s.bye != nil {
		s.mu.Unlock()
		return false
	}
	s.bye = why
	s.alive = false
	dropped := 0
	if !why.flush {
		dropped = s.forget()
	}
	if why.code != 0 {
		s.wake()
	}
	s.mu.Unlock()

	s.hall.leave(s)
	if why == byeSlow {
		s.gate.metrics.drop(dropSlow, dropped)
	} else {
		s.gate.metrics.drop(dropClosed, dropped)
	}
	s.gate.metrics.closes.WithLabelValues(why.reason).Inc()
	s.gate.log.Info("screen left", "site", s.hall.site, "who", s.who, "reason", why.reason)
	return true
}

// forget empties the queue and returns how many frames waited. The caller holds mu.
func (s *screen) forget() int {
	waiting := len(s.queue) - s.head
	s.queue, s.head, s.bytes = nil, 0, 0
	return waiting
}

// wake starts the writer if none is at work. The caller holds mu.
func (s *screen) wake() {
	if !s.writing {
		s.writing = true
		s.writers.Go(s.write)
	}
}

// write writes what is queued, and the farewell when there is one, until nothing waits.
func (s *screen) write() {
	for {
		alive, f, bye := s.next()
		switch {
		case bye != nil:
			s.part(bye)
			return
		case !alive && f == nil:
			return
		}
		// The heartbeat may have waited behind a slow write: it must not be said when it
		// is no longer true.
		ok := !alive || !s.gate.fresh() || s.send(s.gate.alive)
		if f != nil {
			if ok = ok && s.send(f); ok {
				s.gate.metrics.frames.Inc()
			} else {
				s.gate.metrics.drop(dropClosed, 1)
			}
		}
		if !ok {
			return
		}
	}
}

// next takes the next things to write. When there is nothing more, or only the farewell,
// the caller is no longer the writer.
func (s *screen) next() (alive bool, f *frame, bye *farewell) {
	s.mu.Lock()
	defer s.mu.Unlock()
	alive, s.alive = s.alive, false
	if s.head < len(s.queue) {
		f = s.queue[s.head]
		s.queue[s.head] = nil
		s.head++
		s.bytes -= f.size
		if s.head == len(s.queue) {
			s.queue, s.head = s.queue[:0], 0
			// An idle screen does not keep the room of its worst moment.
			if cap(s.queue) > 8 {
				s.queue = nil
			}
		}
	}
	if alive || f != nil {
		return alive, f, nil
	}
	s.writing = false
	if s.bye != nil && s.bye.code != 0 {
		bye = s.bye
	}
	return false, nil, bye
}

// send writes one frame. When that fails the socket is of no use: the session is over,
// and the caller stays its last writer.
func (s *screen) send(f *frame) bool {
	// Only the writer touches the deadline, and there is one writer at a time.
	_ = s.conn.SetWriteDeadline(time.Now().Add(s.gate.cfg.WriteTimeout))
	if err := s.conn.WritePreparedMessage(f.message); err != nil {
		s.end(byeWrite)
		s.conn.Close()
		return false
	}
	return true
}

// part sends the close frame and gives the screen a moment to answer it.
func (s *screen) part(bye *farewell) {
	deadline := time.Now().Add(closeWait)
	if s.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(bye.code, bye.text), deadline) != nil {
		s.conn.Close()
		return
	}
	_ = s.conn.SetReadDeadline(deadline)
}
