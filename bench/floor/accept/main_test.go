package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

const order = `{"_id":"1","site":"store-1"}`

func post(s *handler, authorization string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/order", strings.NewReader(order))
	r.Header.Set("Authorization", authorization)
	w := httptest.NewRecorder()
	s.order(w, r)
	return w
}

func TestAnOrderIsStoredWholeAndAsLongAsASealedOneBeforeItIsAccepted(t *testing.T) {
	var subjects []string
	s := newServer(map[string]string{"token": "store-1"}, func(subject string, body []byte) ([]byte, error) {
		subjects = append(subjects, subject)
		if !strings.HasPrefix(string(body), order) || len(body) != sealed {
			t.Errorf("stored %d bytes: %.60s", len(body), body)
		}
		return []byte(`{"stream":"OUT","seq":7}`), nil
	})
	w := post(s, "Bearer token")
	if w.Code != http.StatusAccepted || w.Body.String() != `{"id":"7"}` {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if len(subjects) != 1 || subjects[0] != "pos.store-1.order" {
		t.Errorf("stored under %q", subjects)
	}
}

func TestWhatIsNotStoredIsNotAccepted(t *testing.T) {
	for _, c := range []struct {
		name, authorization, ack string
		err                      error
		want                     int
	}{
		{"unknown token", "Bearer other", "", nil, http.StatusBadRequest},
		{"no answer", "Bearer token", "", errors.New("timeout"), http.StatusServiceUnavailable},
		{"refused", "Bearer token", `{"error":{"code":503},"stream":"OUT","seq":0}`, nil, http.StatusServiceUnavailable},
		{"no acknowledgement", "Bearer token", `+OK`, nil, http.StatusServiceUnavailable},
		{"another stream", "Bearer token", `{"stream":"IN","seq":7}`, nil, http.StatusServiceUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newServer(map[string]string{"token": "store-1"}, func(string, []byte) ([]byte, error) { return []byte(c.ack), c.err })
			if w := post(s, c.authorization); w.Code != c.want {
				t.Errorf("%d, want %d", w.Code, c.want)
			}
		})
	}
}

func TestTheFloorsServerSyncsEachMessage(t *testing.T) {
	srv, err := startServer(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	if !srv.JetStreamConfig().SyncAlways {
		t.Error("the floor does not sync each publish")
	}
}
