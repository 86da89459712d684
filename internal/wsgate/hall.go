package wsgate

import "sync"

// hall is where the screens of one site are. It is safe for concurrent use.
type hall struct {
	// Fixed at birth.
	site    string
	origins []string // of the site alone

	// Guarded by mu.
	mu      sync.Mutex
	screens []*screen
}

func (h *hall) enter(s *screen) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.place = len(h.screens)
	h.screens = append(h.screens, s)
}

// leave takes s out; a second time does nothing.
func (h *hall) leave(s *screen) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.place < 0 {
		return
	}
	last := len(h.screens) - 1
	moved := h.screens[last]
	h.screens[s.place], moved.place = moved, s.place
	h.screens[last] = nil
	h.screens = h.screens[:last]
	s.place = -1
	if last == 0 {
		h.screens = nil
	}
}

// appendTo appends the screens to dst, so that the caller can deal with each without
// holding the lock.
func (h *hall) appendTo(dst []*screen) []*screen {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append(dst, h.screens...)
}
