package keysync

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kitchenbridge/kitchenbridge/testenv/portal"
)

// No error, log line or printed value holds a phrase, a token, the secret key or a
// binding key, whatever the Portal answers.
func TestNoSecretIsTold(t *testing.T) {
	p := startPortal(t, "s1")
	secrets := map[string]string{"token": p.Token()}
	_, secrets["secret key"] = p.Credentials()
	binding := mintedFile(t, "s1")
	raw, err := os.ReadFile(binding)
	if err != nil {
		t.Fatal(err)
	}
	var file bindingFile
	if err := json.Unmarshal(raw, &file); err != nil {
		t.Fatal(err)
	}
	secrets["lane key"], secrets["binding key"] = file.Sites["s1"].Lane, file.Sites["s1"].Keys[0].Key

	var told strings.Builder
	tell := func(v any) {
		fmt.Fprintf(&told, "%v\n%+v\n%#v\n%s\n", v, v, v, v)
		if b, err := json.Marshal(v); err == nil {
			told.Write(b)
		}
		slog.New(slog.NewTextHandler(&told, nil)).Info("v", "v", v)
	}
	for _, issued := range []bool{false, true} {
		cfg := against(t, p, "s1")
		if issued {
			cfg = issuedBy(t, p, "s1")
		}
		cfg.BindingFile = binding
		cfg.Portal.MaxBytes = 4096
		r := newRig(t, cfg)
		for _, kind := range append([]portal.Kind{portal.None}, portal.Kinds()...) {
			if kind == portal.Hang || kind == portal.SlowDrip {
				continue // they end in a time-out, whose text is made here
			}
			if _, err := p.Rotate("s1"); err != nil {
				t.Fatal(err)
			}
			for i, k := range p.Keys("s1") {
				secrets[fmt.Sprintf("phrase %d under %s", i, kind)] = k.Value
			}
			for _, at := range []string{"s1", portal.TokenEndpoint} {
				p.SetFault(at, portal.Fault{Kind: kind})
				if at == portal.TokenEndpoint {
					p.RevokeTokens()
				}
				forget(r, "s1")
				if err := r.Refresh(t.Context(), "s1"); err != nil {
					tell(err)
				}
				tell(r.RefreshFor(t.Context(), "s1", "f"))
				tell(r.Ready())
				p.SetFault(at, portal.Fault{})
			}
			tell(r.Site("s1"))
			tell(*r.Site("s1"))
		}
		tell(r.Keys)
		tell(cfg)
		told.WriteString(r.log.String())
	}
	if len(secrets) < 30 || !strings.Contains(told.String(), string(tooManyKeys)) || !strings.Contains(told.String(), string(tokenFailed)) {
		t.Fatalf("only %d secrets, %d bytes told: the test tests nothing", len(secrets), told.Len())
	}
	for _, what := range slices.Sorted(maps.Keys(secrets)) {
		if i := strings.Index(told.String(), secrets[what]); i >= 0 {
			t.Errorf("%s was told: …%.80s", what, strings.ReplaceAll(told.String()[max(0, i-60):i], "\n", " "))
		}
	}
}

// A server that is none may answer anything, the token included.
func TestWhatAServerSendsIsNotQuoted(t *testing.T) {
	for name, send := range map[string]func(w http.ResponseWriter, r *http.Request){
		"no HTTP": func(w http.ResponseWriter, r *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				fmt.Fprintf(conn, "%s marked\r\n\r\n", r.Header.Get("Authorization"))
				conn.Close()
			}
		},
		"a location": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "https://elsewhere.example/?marked="+r.Header.Get("Authorization"))
			w.WriteHeader(http.StatusFound)
		},
		"a broken location": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "%zz marked "+r.Header.Get("Authorization"))
			w.WriteHeader(http.StatusFound)
		},
		"an error page": func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, "marked "+r.Header.Get("Authorization"), http.StatusTeapot)
		},
		"text": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "marked "+r.Header.Get("Authorization"))
		},
		"a retry header": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", "marked "+r.Header.Get("Authorization"))
			w.WriteHeader(http.StatusTooManyRequests)
		},
		"a block": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, `{"security":{"enterprise_kitchen":{"encryption":"marked %s"}}}`, r.Header.Get("Authorization"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(send))
			defer srv.Close()
			token := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(token, []byte("sesame"), 0o600); err != nil {
				t.Fatal(err)
			}
			r := newRig(t, Config{Portal: PortalConfig{URL: srv.URL, TokenFile: token}, Sites: settingsOf("s1")})
			err := r.Refresh(t.Context(), "s1")
			if err == nil {
				t.Fatal("accepted")
			}
			for _, told := range []string{err.Error(), fmt.Sprintf("%+v %#v", err, err), r.log.String(), r.Ready().Error()} {
				if strings.Contains(told, "sesame") || strings.Contains(told, "marked") {
					t.Errorf("quoted: %s", told)
				}
			}
		})
	}
}
