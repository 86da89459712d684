package keysync

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

var kitchenPath = strings.Split("security.enterprise_kitchen", ".")

// phraseInTests is looked for in every error: see secrets_test.go too.
const phraseInTests = "correct horse battery staple"

func oneKey(change ...string) string {
	k := `{"fingerprint":"f1","value":"` + phraseInTests + `","valid_after":"2026-01-01T00:00:00Z","valid_until":"2026-02-01T00:00:00Z"}`
	return strings.NewReplacer(change...).Replace(k)
}

func inBlock(block string) string {
	return `{"_id":"x","security":{"other":{},"enterprise_kitchen":` + block + `}}`
}

func withKeys(keys ...string) string {
	return inBlock(`{"encryption":true,"keys":[` + strings.Join(keys, ",") + `]}`)
}

func TestParseSite(t *testing.T) {
	second := oneKey("f1", "f2", "2026-01-", "2026-01-2", "2026-02-01", "2026-03-01")
	second = strings.Replace(second, "2026-01-201", "2026-01-20", 1)
	for _, row := range []struct {
		name string
		doc  string
		kdf  string
		want string // "" = accepted with these keys, else the reason
		keys []string
		text string // part of the error
	}{
		{name: "one key", doc: withKeys(oneKey()), keys: []string{"f1"}},
		{name: "two keys come oldest first", doc: withKeys(second, oneKey()), keys: []string{"f1", "f2"}},
		{name: "encryption off", doc: inBlock(`{"encryption":false}`)},
		{name: "keys left behind an encryption that is off", doc: inBlock(`{"encryption":false,"keys":[1,2,3]}`)},
		{name: "unknown fields anywhere", doc: strings.Replace(withKeys(oneKey(`"f1",`, `"f1","rotated_by":{"a":1},`)), `"_id":"x"`, `"_id":7,"_id":8,"keys":[]`, 1), keys: []string{"f1"}},
		{name: "white space round it", doc: " \n" + withKeys(oneKey()) + "\n", keys: []string{"f1"}},
		{name: "numeric zone", doc: withKeys(oneKey("00:00:00Z", "00:00:00+02:00")), keys: []string{"f1"}},
		{name: "numeric zone without colon, and a fraction", doc: withKeys(oneKey("00:00:00Z", "00:00:00.123+0000")), keys: []string{"f1"}},
		{name: "phrase in any language", doc: withKeys(oneKey(phraseInTests, "\u00fcber \\u20ac \u732b")), keys: []string{"f1"}},
		{name: "hkdf with 16 bytes", kdf: "hkdf", doc: withKeys(oneKey(phraseInTests, "0123456789abcdef")), keys: []string{"f1"}},

		{name: "empty", doc: "", want: "not_json", text: "ends too early"},
		{name: "HTML", doc: "<!doctype html>", want: "not_json", text: "HTML"},
		{name: "no JSON", doc: "nope", want: "not_json", text: "byte"},
		{name: "not UTF-8", doc: "{\"a\":\"\xff\"}", want: "not_json", text: "UTF-8"},
		{name: "truncated", doc: withKeys(oneKey())[:90], want: "not_json", text: "ends too early"},
		{name: "more behind it", doc: withKeys(oneKey()) + "{}", want: "not_json", text: "more follows"},
		{name: "a list", doc: `[]`, want: "not_json", text: "not an object"},
		{name: "null", doc: `null`, want: "not_json"},
		{name: "no security", doc: `{"_id":"x"}`, want: "no_block", text: "security: missing"},
		{name: "no block", doc: `{"security":{}}`, want: "no_block", text: "security.enterprise_kitchen: missing"},
		{name: "security is text", doc: `{"security":"off"}`, want: "no_block", text: "security: an object"},
		{name: "block is null", doc: inBlock(`null`), want: "no_block", text: "security.enterprise_kitchen: an object"},
		{name: "two blocks", doc: `{"security":{"enterprise_kitchen":{},"enterprise_kitchen":{}}}`, want: "no_block", text: "more than once"},
		{name: "block in other letters", doc: `{"security":{"Enterprise_Kitchen":{"encryption":false}}}`, want: "no_block"},
		{name: "encryption missing", doc: inBlock(`{"keys":[]}`), want: "block", text: "encryption: missing"},
		{name: "encryption in other letters", doc: inBlock(`{"Encryption":false}`), want: "block", text: "encryption: missing"},
		{name: "encryption twice", doc: inBlock(`{"encryption":true,"encryption":false}`), want: "block", text: "encryption: given more than once"},
		{name: "encryption as text", doc: inBlock(`{"encryption":"true"}`), want: "block", text: "true or false"},
		{name: "encryption null", doc: inBlock(`{"encryption":null}`), want: "block", text: "true or false"},
		{name: "encryption on, keys missing", doc: inBlock(`{"encryption":true}`), want: "no_keys", text: "missing though"},
		{name: "encryption on, keys null", doc: inBlock(`{"encryption":true,"keys":null}`), want: "no_keys"},
		{name: "encryption on, keys empty", doc: withKeys(), want: "no_keys", text: "empty though"},
		{name: "keys are an object", doc: inBlock(`{"encryption":true,"keys":{}}`), want: "block", text: "a list"},
		{name: "keys twice", doc: inBlock(`{"encryption":true,"keys":[],"keys":[]}`), want: "block", text: "more than once"},
		{name: "three keys", doc: withKeys(oneKey(), oneKey("f1", "f2"), oneKey("f1", "f3")), want: "too_many_keys", text: "3 keys, at most 2"},
		{name: "a key is text", doc: withKeys(`"f1"`), want: "block", text: "keys[0]: an object"},
		{name: "fingerprint missing", doc: withKeys(oneKey(`"fingerprint"`, `"finger"`)), want: "block", text: "keys[0].fingerprint: missing"},
		{name: "fingerprint twice", doc: withKeys(oneKey(`{`, `{"fingerprint":"f0",`)), want: "block", text: "more than once"},
		{name: "fingerprint empty", doc: withKeys(oneKey("f1", "")), want: "fingerprint", text: "keys[0].fingerprint"},
		{name: "fingerprint a number", doc: withKeys(oneKey(`"f1"`, `1`)), want: "block", text: "a text"},
		{name: "fingerprint null", doc: withKeys(oneKey(`"f1"`, `null`)), want: "block", text: "a text"},
		{name: "fingerprint of a binding key", doc: withKeys(oneKey("f1", "kb:f1")), want: "fingerprint", text: "reserved"},
		{name: "fingerprint with a line break", doc: withKeys(oneKey("f1", `f\r\n1`)), want: "fingerprint", text: "visible ASCII"},
		{name: "fingerprint is the phrase", doc: withKeys(oneKey("f1", phraseInTests)), want: "fingerprint", text: "visible ASCII"},
		{name: "fingerprint too long", doc: withKeys(oneKey("f1", strings.Repeat("f", 129))), want: "fingerprint", text: "1 to 128"},
		{name: "fingerprints equal", doc: withKeys(oneKey(), oneKey("2026-02", "2026-03")), want: "duplicate_fingerprint", text: "keys[1].fingerprint"},
		{name: "phrase missing", doc: withKeys(oneKey(`"value"`, `"Value"`)), want: "block", text: "keys[0].value: missing"},
		{name: "phrase empty", doc: withKeys(oneKey(phraseInTests, "")), want: "phrase", text: "keys[0].value: empty"},
		{name: "phrase with half a character", doc: withKeys(oneKey(phraseInTests, phraseInTests+`\ud800`)), want: "phrase", text: "U+FFFD"},
		{name: "phrase too short for hkdf", kdf: "hkdf", doc: withKeys(oneKey(phraseInTests, "fifteen letters")), want: "phrase", text: "15 bytes"},
		{name: "second key wrong", doc: withKeys(oneKey(), oneKey("f1", "f2", phraseInTests, "")), want: "phrase", text: "keys[1].value"},
		{name: "time without zone", doc: withKeys(oneKey("02-01T00:00:00Z", "02-01T00:00:00")), want: "time", text: "valid_until: has no time zone"},
		{name: "time with a blank, without zone", doc: withKeys(oneKey("01-01T00:00:00Z", "01-01 00:00:00")), want: "time", text: "valid_after: has no time zone"},
		{name: "a day", doc: withKeys(oneKey("2026-02-01T00:00:00Z", "2026-02-01")), want: "time", text: "not a time"},
		{name: "no such day", doc: withKeys(oneKey("2026-02-01", "2026-02-30")), want: "time", text: "not a time"},
		{name: "a number for a time", doc: withKeys(oneKey(`"2026-02-01T00:00:00Z"`, `1769904000`)), want: "block", text: "valid_until: a text"},
		{name: "a number in text for a time", doc: withKeys(oneKey(`2026-02-01T00:00:00Z`, `1769904000`)), want: "time", text: "not a time"},
		{name: "time missing", doc: withKeys(oneKey(`valid_until`, `valid_till`)), want: "block", text: "valid_until: missing"},
		{name: "validity reversed", doc: withKeys(oneKey("2026-02", "2025-12")), want: "validity", text: "not after valid_after"},
		{name: "validity of no length", doc: withKeys(oneKey("2026-02", "2026-01")), want: "validity", text: "not after valid_after"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := cheap
			if row.kdf != "" {
				s.KDF, s.Iterations = row.kdf, 0
			}
			d, err := parseSite([]byte(row.doc), kitchenPath, s, time.Minute)
			if row.want == "" {
				if err != nil {
					t.Fatalf("refused: %v", err)
				}
				got := []string{}
				for _, k := range d.keys {
					got = append(got, k.Fingerprint)
				}
				if len(got) != len(row.keys) || !slices.Equal(got, row.keys) && len(got) > 0 {
					t.Errorf("keys %v, want %v", got, row.keys)
				}
				if d.encryption != (len(row.keys) > 0) {
					t.Errorf("encryption %v", d.encryption)
				}
				return
			}
			if err == nil {
				t.Fatal("accepted")
			}
			if got := reasonOf(err); got != row.want {
				t.Errorf("reason %s, want %s (%v)", got, row.want, err)
			}
			if !strings.Contains(err.Error(), row.text) {
				t.Errorf("%q does not say %q", err, row.text)
			}
			if strings.Contains(err.Error(), "horse") {
				t.Errorf("the error quotes the document: %v", err)
			}
		})
	}
}

func TestPathOfTheBlock(t *testing.T) {
	for _, row := range []struct{ path, doc string }{
		{"kitchen", `{"kitchen":{"encryption":false}}`},
		{"a.b.c.d", `{"a":{"b":{"c":{"d":{"encryption":false}}}}}`},
	} {
		if _, err := parseSite([]byte(row.doc), strings.Split(row.path, "."), cheap, time.Minute); err != nil {
			t.Errorf("%s: %v", row.path, err)
		}
	}
}

// The rule without acknowledgements: everybody gets two polls to fetch the new key.
func TestSealFrom(t *testing.T) {
	day := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) time.Time { return day.Add(d) }
	for _, row := range []struct {
		name       string
		olderUntil time.Duration // from the newer key's valid_after
		poll       time.Duration
		want       time.Duration // likewise
	}{
		{"long overlap: two polls", 24 * time.Hour, time.Minute, 2 * time.Minute},
		{"overlap of an hour: two polls", time.Hour, time.Minute, 2 * time.Minute},
		{"slow poll: ten minutes before the older key's end", time.Hour, time.Hour, 50 * time.Minute},
		{"slow poll, overlap just long enough", 2*time.Hour + 10*time.Minute, time.Hour, 2 * time.Hour},
		{"short overlap: a quarter of it is left", 8 * time.Minute, 5 * time.Minute, 6 * time.Minute},
		{"short overlap, fast poll: two polls", 8 * time.Second, time.Second, 2 * time.Second},
		{"very short overlap", time.Second, time.Minute, 750 * time.Millisecond},
		{"no overlap: at once", 0, time.Minute, 0},
		{"a gap: not before its time", -time.Hour, time.Minute, 0},
	} {
		t.Run(row.name, func(t *testing.T) {
			older := envelope.KeyConfig{ValidAfter: at(-240 * time.Hour), ValidUntil: at(row.olderUntil)}
			newer := envelope.KeyConfig{ValidAfter: day, ValidUntil: at(240 * time.Hour)}
			if got := sealFrom(older, newer, row.poll); !got.Equal(at(row.want)) {
				t.Errorf("seals from valid_after + %v, want + %v", got.Sub(day), row.want)
			}
		})
	}
}

// The same, as the site's keyring sees it.
func TestPrimaryFollowsTheSealingRule(t *testing.T) {
	day := time.Date(2026, 1, 10, 0, 0, 0, 0, time.UTC)
	doc := siteObject(true,
		testKey{"new", day, day.Add(48 * time.Hour)},
		testKey{"old", day.Add(-24 * time.Hour), day.Add(24 * time.Hour)})
	d, err := parseSite(doc, kitchenPath, cheap, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var keys []*envelope.Key
	for _, c := range d.keys {
		k, err := envelope.NewKey(cheap, c)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, k)
	}
	ring, err := envelope.NewKeyring(cheap, keys...)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range []struct {
		at   time.Duration
		want string
	}{
		{-24 * time.Hour, "old"}, {-time.Second, "old"}, {0, "old"}, {119 * time.Second, "old"},
		{2 * time.Minute, "new"}, {24 * time.Hour, "new"}, {48*time.Hour - 1, "new"},
		{-24*time.Hour - 1, ""}, {48 * time.Hour, ""},
	} {
		k, err := ring.Primary(day.Add(row.at))
		got := ""
		if err == nil {
			got = k.Fingerprint()
		}
		if got != row.want {
			t.Errorf("at %v: %q, want %q (%v)", row.at, got, row.want, err)
		}
	}
}

// FuzzSiteObject: whatever the Portal sends, the outcome is an error with a reason, or a
// document that makes a keyring and means the same when it is written down again.
func FuzzSiteObject(f *testing.F) {
	f.Add([]byte(withKeys(oneKey())))
	f.Add([]byte(inBlock(`{"encryption":false}`)))
	f.Fuzz(func(t *testing.T, body []byte) {
		d, err := parseSite(body, kitchenPath, cheap, time.Minute)
		if err != nil {
			if r := reasonOf(err); !slices.Contains(reasons, reason(r)) {
				t.Fatalf("error without a known reason: %T", err)
			}
			return
		}
		if !d.encryption && len(d.keys) > 0 || d.encryption && (len(d.keys) == 0 || len(d.keys) > maxKeys) {
			t.Fatalf("encryption %v with %d keys", d.encryption, len(d.keys))
		}
		type wire struct {
			Fingerprint string    `json:"fingerprint"`
			Value       string    `json:"value"`
			ValidAfter  time.Time `json:"valid_after"`
			ValidUntil  time.Time `json:"valid_until"`
		}
		var keys []*envelope.Key
		list := []wire{}
		for _, c := range d.keys {
			if c.SealFrom.Before(c.ValidAfter) {
				t.Fatal("sealed with before its time")
			}
			k, err := envelope.NewKey(cheap, c)
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, k)
			list = append(list, wire{c.Fingerprint, c.Passphrase.Reveal(), c.ValidAfter, c.ValidUntil})
		}
		if _, err := envelope.NewKeyring(cheap, keys...); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(map[string]any{"security": map[string]any{"enterprise_kitchen": map[string]any{"encryption": d.encryption, "keys": list}}})
		if err != nil {
			t.Fatal(err)
		}
		e, err := parseSite(again, kitchenPath, cheap, time.Minute)
		if err != nil {
			t.Fatalf("not accepted again: %v", err)
		}
		if e.encryption != d.encryption || !slices.EqualFunc(e.keys, d.keys, func(a, b envelope.KeyConfig) bool {
			return a.Fingerprint == b.Fingerprint && a.Passphrase == b.Passphrase && a.ValidAfter.Equal(b.ValidAfter) && a.ValidUntil.Equal(b.ValidUntil) && a.SealFrom.Equal(b.SealFrom)
		}) {
			t.Fatal("means something else when written again")
		}
	})
}

// A fuzz test runs its committed seeds only if they are where it looks.
func TestFuzzSeedsAreThere(t *testing.T) {
	seeds, err := filepath.Glob(filepath.Join("testdata", "fuzz", "FuzzSiteObject", "*"))
	if err != nil {
		t.Fatal(err)
	}
	if len(seeds) < 20 {
		t.Errorf("%d seeds, want at least 20", len(seeds))
	}
	for _, s := range seeds {
		if b, err := os.ReadFile(s); err != nil || !strings.HasPrefix(string(b), "go test fuzz v1\n") {
			t.Errorf("%s is no seed: %v", s, err)
		}
	}
}
