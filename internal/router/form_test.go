package router

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
	"github.com/kitchenbridge/kitchenbridge/pkg/keysync"
)

// What a Kitchen gets: by what the event is sealed with and what the site is now.
func TestFormOf(t *testing.T) {
	now := time.Now()
	valid := testKey(t, "k2", now.Add(-time.Hour), now.Add(time.Hour))
	older := testKey(t, "k1", now.Add(-2*time.Hour), now.Add(time.Minute))
	ended := testKey(t, "k0", now.Add(-3*time.Hour), now.Add(-time.Minute))
	unknown := testKey(t, "k9", now.Add(-time.Hour), now.Add(time.Hour))
	binding := testBinding(t, "s1")
	other := testBinding(t, "s2")
	body := []byte(`{"_id":"o1"}`)

	under := func(k *envelope.Key) envelope.Triple {
		triple, err := k.Seal(body)
		if err != nil {
			t.Fatal(err)
		}
		return triple
	}
	plain := func(b *envelope.Binding) envelope.Triple {
		raw, err := b.Current().AppendSealPlain(nil, body)
		if err != nil {
			t.Fatal(err)
		}
		triple, err := envelope.ParseTriple(raw, 0)
		if err != nil {
			t.Fatal(err)
		}
		return triple
	}
	trailing := under(valid)
	trailing.Message = append(bytes.Clone(trailing.Message), " \n"...)
	broken := under(valid)
	broken.Message = []byte("AAAA")
	site := func(encryption bool, keys ...*envelope.Key) *keysync.Site {
		return &keysync.Site{Name: "s1", Settings: testSettings, Fetched: now, Encryption: encryption, Keyring: testRing(t, keys...), Binding: binding}
	}
	never := site(false)
	never.Fetched = time.Time{}

	tests := []struct {
		name    string
		triple  envelope.Triple
		site    *keysync.Site
		refused string
		pass    bool   // untouched
		under   string // else sealed anew under this fingerprint, "" = plain
		err     error
	}{
		{name: "encrypted passes untouched", triple: under(valid), site: site(true, valid, older), pass: true},
		{name: "the POS's trailing space too", triple: trailing, site: site(true, valid), pass: true},
		{name: "under an older key that is still valid too", triple: under(older), site: site(true, valid, older), pass: true},
		{name: "under an unknown key too: the Kitchen may know it", triple: under(unknown), site: site(true, valid), pass: true},
		{name: "before the first fetch too", triple: under(valid), site: never, pass: true},
		{name: "under a key that ended: sealed with the primary", triple: under(ended), site: site(true, valid, ended), under: "k2"},
		{name: "under a key that ended, and no other is valid: as it is", triple: under(ended), site: site(true, ended), pass: true},
		{name: "refused: sealed with the other key", triple: under(valid), site: site(true, valid, older), refused: "k2", under: "k1"},
		{name: "the older one refused: sealed with the primary", triple: under(older), site: site(true, valid, older), refused: "k1", under: "k2"},
		{name: "refused, and there is no other", triple: under(valid), site: site(true, valid), refused: "k2", err: errNoOtherKey},
		{name: "refused, and the only other one has ended", triple: under(valid), site: site(true, valid, ended), refused: "k2", err: errNoOtherKey},
		{name: "refused, and the bridge cannot open it", triple: under(unknown), site: site(true, valid), refused: "k9", err: envelope.ErrUnknownFingerprint},
		{name: "refused, and it does not open", triple: broken, site: site(true, valid, older), refused: "k2", err: errPoison},
		{name: "ended, sealed with the primary, that refused: as it was", triple: under(ended), site: site(true, valid, ended), refused: "k2", pass: true},

		{name: "a plain site's event is opened", triple: plain(binding), site: site(false), under: ""},
		{name: "a plain site's event while the site is encrypted now: sealed with the primary", triple: plain(binding), site: site(true, valid, older), under: "k2"},
		{name: "the same, the primary refused", triple: plain(binding), site: site(true, valid, older), refused: "k2", under: "k1"},
		{name: "the same, and there is no key", triple: plain(binding), site: site(true), err: envelope.ErrNoKey},
		{name: "a plain site's event before the first fetch waits: plain or not?", triple: plain(binding), site: never, err: errNotFetched},
		{name: "a plain site's event under another site's key", triple: plain(other), site: site(false), err: errPoison},
		{name: "an encrypted event while the site is plain now: opened", triple: under(valid), site: site(false, valid), under: ""},
		{name: "the same, and the key is not known", triple: under(valid), site: site(false), err: envelope.ErrUnknownFingerprint},
		{name: "the same, and it does not open", triple: broken, site: site(false, valid), err: errPoison},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := formOf(tt.triple, tt.site, tt.refused, now)
			switch {
			case tt.err != nil:
				if !errors.Is(err, tt.err) {
					t.Errorf("error %v, want %v", err, tt.err)
				}
				if tt.err != errPoison && errors.Is(err, errPoison) {
					t.Errorf("%v is final, and keys may come back", err)
				}
			case err != nil:
				t.Error(err)
			case tt.pass:
				if !bytes.Equal(f.body, tt.triple.Message) || f.iv != string(tt.triple.IV) || f.fingerprint != string(tt.triple.Fingerprint) {
					t.Errorf("touched: %+v", f)
				}
			case tt.under == "":
				if f.sealed() || f.iv != "" || !bytes.Equal(f.body, body) {
					t.Errorf("not the plain body: %+v", f)
				}
			default:
				if f.fingerprint != tt.under {
					t.Fatalf("sealed under %q, want %q", f.fingerprint, tt.under)
				}
				got, err := tt.site.Keyring.Open(nil, envelope.Triple{IV: []byte(f.iv), Fingerprint: []byte(f.fingerprint), Message: f.body})
				if err != nil || !bytes.Equal(got, body) {
					t.Errorf("opens to %q, %v", got, err)
				}
				if f.iv == string(tt.triple.IV) {
					t.Error("an IV was used again")
				}
			}
		})
	}
}
