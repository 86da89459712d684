package wsgate

import (
	"context"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/websocket"

	"github.com/kitchenbridge/kitchenbridge/internal/door"
)

const (
	// maxHeaderBytes of a handshake. The seed's example has about 700.
	maxHeaderBytes = 16 << 10
	// retryAfter is what a screen is told that comes when it cannot be served.
	retryAfter = 5 * time.Second
)

// handler answers what arrives at one listener.
func (g *Gate) handler(l ListenConfig) http.Handler {
	loopback := door.Loopback(l.Addr)
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, r *http.Request) {
		g.handshake(w, r, l.Site, loopback)
	})
	mux.HandleFunc("/sites/{site}", func(w http.ResponseWriter, r *http.Request) {
		site := r.PathValue("site")
		if l.Site != "" && site != l.Site {
			g.refuse(w, r, door.Problem(http.StatusNotFound, "", "The site named by the path is not served at this address."))
			return
		}
		g.handshake(w, r, site, loopback)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		g.refuse(w, r, door.Problem(http.StatusNotFound, "", "Screens connect to / or to /sites/{site}."))
	})
	return mux
}

// handshake lets a screen in, or refuses it before the upgrade.
func (g *Gate) handshake(w http.ResponseWriter, r *http.Request, pathSite string, loopback bool) {
	if refusal := checkUpgrade(w, r); refusal != nil {
		g.refuse(w, r, refusal)
		return
	}
	// The handshake's IV has been checked for its form once Admit returns, and that is
	// all it is for: every frame has an IV of its own.
	ctx, cancel := context.WithTimeout(r.Context(), g.cfg.HandshakeTimeout)
	defer cancel()
	visitor, refusal := g.door.Admit(r.WithContext(ctx), pathSite, loopback)
	if refusal != nil {
		g.refuse(w, r, refusal)
		return
	}
	hall := g.halls[visitor.Site]
	if !originAllowed(r, g.cfg.Origins, hall.origins) {
		g.refuse(w, r, door.Problem(http.StatusForbidden, "", "Pages of this origin may not connect; `origins` lists those that may."))
		return
	}
	if !g.fresh() {
		g.refuse(w, r, busy("The gateway is cut off from the hub, so a screen would show nothing. Try again.", "feed-stale"))
		return
	}
	s := newScreen(g, hall, visitor.Who)
	if refusal := g.begin(s); refusal != nil {
		g.refuse(w, r, refusal)
		return
	}
	defer close(s.upgraded)
	upgrader := g.plain
	if deflateOffered(r.Header) {
		upgrader = g.deflating
	}
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		// Upgrade has answered, unless the connection broke.
		g.log.Debug("handshake ended", "site", hall.site, "err", err)
		return
	}
	// Not by the session: logging takes a deep stack, which it would keep while idle.
	g.log.Info("screen came", "site", hall.site, "who", s.who)
	s.upgraded <- conn
}

// upgrader makes the upgrader for screens with or without compression.
func (g *Gate) upgrader(deflate bool) *websocket.Upgrader {
	return &websocket.Upgrader{
		HandshakeTimeout: g.cfg.WriteTimeout,
		// Screens send control frames only. What is written is prepared outside the
		// connection, so that the pool stays nearly empty.
		ReadBufferSize:    256,
		WriteBufferPool:   &g.buffers,
		EnableCompression: deflate,
		CheckOrigin:       func(*http.Request) bool { return true }, // it was checked before
		Error: func(w http.ResponseWriter, r *http.Request, status int, reason error) {
			g.refuse(w, r, door.Problem(status, "", strings.TrimPrefix(reason.Error(), "websocket: ")))
		},
	}
}

func (g *Gate) refuse(w http.ResponseWriter, r *http.Request, refusal *door.Refusal) {
	g.metrics.refusals.WithLabelValues(refusal.Reason()).Inc()
	g.log.Debug("screen refused", "reason", refusal.Reason(), "err", refusal.Detail)
	w.Header().Set("Connection", "close")
	refusal.Write(w)
}

// checkUpgrade refuses what is no WebSocket handshake, before it can cost anything.
func checkUpgrade(w http.ResponseWriter, r *http.Request) *door.Refusal {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		return door.Problem(http.StatusMethodNotAllowed, "", "A WebSocket handshake is a GET.")
	}
	if !websocket.IsWebSocketUpgrade(r) {
		w.Header().Set("Upgrade", "websocket")
		return door.Problem(http.StatusUpgradeRequired, "", "This address speaks WebSocket only.")
	}
	if r.Header.Get("Sec-Websocket-Version") != "13" {
		w.Header().Set("Sec-Websocket-Version", "13")
		return door.Problem(http.StatusUpgradeRequired, "", "This address speaks WebSocket version 13 only.")
	}
	return nil
}

func busy(detail, reason string) *door.Refusal {
	f := door.Problem(http.StatusServiceUnavailable, "", detail)
	f.RetryAfter = retryAfter
	f.Ext = map[string]any{"reason": reason}
	return f
}

// originAllowed holds pages of strangers off: a browser sends the page's origin, and
// nothing else tells it from a screen. A client that sends none is no browser.
func originAllowed(r *http.Request, lists ...[]string) bool {
	origins := r.Header.Values("Origin")
	switch len(origins) {
	case 0:
		return true
	case 1:
	default:
		return false
	}
	for _, list := range lists {
		if slices.ContainsFunc(list, func(o string) bool { return strings.EqualFold(o, origins[0]) }) {
			return true
		}
	}
	u, err := url.Parse(origins[0])
	return err == nil && u.Host != "" && strings.EqualFold(u.Host, r.Host)
}

// deflateOffered tells whether the client offers permessage-deflate in a way that can be
// taken: windows of the full size, and a server that starts each message afresh, which a
// client must always allow (RFC 7692, 7.1).
func deflateOffered(h http.Header) bool {
	for _, value := range h.Values("Sec-Websocket-Extensions") {
		for offer := range strings.SplitSeq(value, ",") {
			if deflateAcceptable(offer) {
				return true
			}
		}
	}
	return false
}

func deflateAcceptable(offer string) bool {
	name, parameters, _ := strings.Cut(offer, ";")
	if !strings.EqualFold(strings.TrimSpace(name), "permessage-deflate") {
		return false
	}
	for parameter := range strings.SplitSeq(parameters, ";") {
		key, value, _ := strings.Cut(parameter, "=")
		switch strings.ToLower(strings.TrimSpace(key)) {
		case "", "server_no_context_takeover", "client_no_context_takeover", "client_max_window_bits":
		case "server_max_window_bits":
			if strings.Trim(strings.TrimSpace(value), `"`) != "15" {
				return false
			}
		default:
			return false
		}
	}
	return true
}
