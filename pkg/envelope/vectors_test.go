package envelope

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const vectorFolder = "testdata/vectors"

// TestVectors runs every file of the folder; docs/spec/envelope.md says what the fields mean.
func TestVectors(t *testing.T) {
	files, err := os.ReadDir(vectorFolder)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	for _, f := range files {
		if f.Name() == "make.mjs" {
			continue
		}
		b, err := os.ReadFile(filepath.Join(vectorFolder, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		var head vectorHead
		if err := json.Unmarshal(b, &head); err != nil {
			t.Fatalf("%s: %v", f.Name(), err)
		}
		found[head.Kind]++
		t.Run(strings.TrimSuffix(f.Name(), ".json"), func(t *testing.T) {
			run := vectorKinds[head.Kind]
			if run == nil {
				t.Fatalf("unknown kind %q", head.Kind)
			}
			if head.Comment == "" {
				t.Error("no comment that says what must happen")
			}
			run(t, b)
			if t.Failed() {
				t.Log(head.Comment)
			}
		})
	}
	for kind := range vectorKinds {
		if found[kind] == 0 {
			t.Errorf("no vector of kind %q", kind)
		}
	}
}

var vectorKinds = map[string]func(*testing.T, []byte){
	"triple": vectorTriple, "settings": vectorSettings, "parse": vectorParse, "http": vectorHTTP, "accept": vectorAccept,
	"primary": vectorPrimary, "event-tag": vectorEventTag, "report-tag": vectorReportTag, "report-seal": vectorReportSeal,
	"plain-seal": vectorPlainSeal, "order": vectorOrder, "message-id": vectorMessageID, "envelope-id": vectorEnvelopeID,
	"payload-hash": vectorPayloadHash,
}

var sentinels = map[string]error{
	"settings": ErrSettings, "triple": ErrTriple, "too-large": ErrTooLarge, "headers": ErrHeaders, "iv": ErrIV, "decrypt": ErrDecrypt,
	"unknown-fingerprint": ErrUnknownFingerprint, "key-not-valid": ErrKeyNotValid, "no-key": ErrNoKey, "tag": ErrTag,
}

// expect checks that err is what the vector says, and nothing else besides. It reports whether there is a result to look at.
func expect(t *testing.T, want string, err error) bool {
	t.Helper()
	if want == "ok" {
		if err != nil {
			t.Fatalf("refused: %v", err)
		}
		return true
	}
	sentinel := sentinels[want]
	if sentinel == nil {
		t.Fatalf("unknown expectation %q", want)
	}
	if !errors.Is(err, sentinel) {
		t.Fatalf("got error %v, want one that is %q", err, sentinel)
	}
	for name, other := range sentinels {
		if other != sentinel && errors.Is(err, other) {
			t.Errorf("error %v is %s besides %s", err, name, want)
		}
	}
	if err.Error() == sentinel.Error() {
		t.Errorf("error %q says no more than its sentinel", err)
	}
	return false
}

func decodeVector[T any](t *testing.T, b []byte) (v T) {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

type hexBytes []byte

func (h *hexBytes) UnmarshalText(b []byte) (err error) {
	*h, err = hex.DecodeString(string(b))
	return err
}

type vectorSettingsJSON struct {
	Profile         Profile  `json:"profile"`
	KDF             string   `json:"kdf"`
	Hash            string   `json:"hash"`
	Iterations      int      `json:"iterations"`
	Salt            string   `json:"salt"`
	IVEncoding      Encoding `json:"iv_encoding"`
	MessageEncoding Encoding `json:"message_encoding"`
}

type vectorHead struct{ Comment, Kind, Expect string }

func vectorTriple(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Settings    vectorSettingsJSON
		Passphrase  Secret
		Fingerprint string
		KeyHex      hexBytes `json:"key_hex"`
		IVHex       hexBytes `json:"iv_hex"`
		Plaintext   string
		Triple      string
		Canonical   bool
	}](t, b)
	s := Settings(v.Settings)
	k, err := NewKey(s, KeyConfig{Fingerprint: v.Fingerprint, Passphrase: v.Passphrase, ValidUntil: time.Unix(1, 0)})
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewKeyring(s, k)
	if err != nil {
		t.Fatal(err)
	}
	triple, err := ParseTriple([]byte(v.Triple), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.CheckIV(triple.IV); (v.Expect == "iv") != errors.Is(err, ErrIV) {
		t.Errorf("CheckIV: %v", err)
	}
	plaintext, err := r.Open([]byte("kept"), triple)
	if !expect(t, v.Expect, err) {
		return
	}
	if string(plaintext) != "kept"+v.Plaintext {
		t.Errorf("opened\n%q, want\n%q", plaintext, v.Plaintext)
	}
	h := http.Header{}
	triple.SetHTTP(h)
	if again, err := FromHTTP(h, triple.Message); err != nil || !sameTriple(again, triple) {
		t.Errorf("by way of HTTP: %v, %v", again, err)
	}

	key, err := deriveKey(k.settings, v.Passphrase)
	if err != nil || !bytes.Equal(key, v.KeyHex) {
		t.Errorf("derived %x, %v, want %x", key, err, v.KeyHex)
	}
	ciphertext, err := k.SealRaw(nil, v.IVHex, []byte(v.Plaintext))
	if v.Canonical && err == nil {
		sealed := Triple{IV: encodeText(k.form.iv, v.IVHex), Fingerprint: []byte(v.Fingerprint), Message: encodeText(k.form.message, ciphertext)}
		if got := sealed.AppendJSON(nil); string(got) != v.Triple {
			t.Errorf("sealed as\n%s, want\n%s", got, v.Triple)
		}
	}
}

func encodeText(e Encoding, b []byte) []byte {
	text := make([]byte, e.encodedLen(len(b)))
	e.encode(text, b)
	return text
}

func sameTriple(a, b Triple) bool {
	return bytes.Equal(a.IV, b.IV) && bytes.Equal(a.Fingerprint, b.Fingerprint) && bytes.Equal(a.Message, b.Message)
}

func vectorSettings(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Settings    vectorSettingsJSON
		Passphrase  Secret
		Fingerprint string
	}](t, b)
	_, err := NewKey(Settings(v.Settings), KeyConfig{Fingerprint: v.Fingerprint, Passphrase: v.Passphrase, ValidUntil: time.Unix(1, 0)})
	expect(t, v.Expect, err)
}

func vectorParse(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		JSON                     string `json:"json"`
		JSONBase64               string `json:"json_base64"`
		Max                      int
		IV, Fingerprint, Message string
	}](t, b)
	input := []byte(v.JSON)
	if v.JSONBase64 != "" {
		var err error
		if input, err = base64.StdEncoding.DecodeString(v.JSONBase64); err != nil {
			t.Fatal(err)
		}
	}
	triple, err := ParseTriple(input, v.Max)
	if !expect(t, v.Expect, err) {
		return
	}
	if want := (Triple{[]byte(v.IV), []byte(v.Fingerprint), []byte(v.Message)}); !sameTriple(triple, want) {
		t.Errorf("read %q, want %q", triple, want)
	}
}

func vectorHTTP(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Headers                        [][2]string
		Body, IV, Fingerprint, Message string
	}](t, b)
	h := http.Header{}
	for _, kv := range v.Headers {
		h.Add(kv[0], kv[1])
	}
	triple, err := FromHTTP(h, []byte(v.Body))
	if !expect(t, v.Expect, err) {
		return
	}
	if want := (Triple{[]byte(v.IV), []byte(v.Fingerprint), []byte(v.Message)}); !sameTriple(triple, want) {
		t.Errorf("read %q, want %q", triple, want)
	}
}

type vectorKey struct {
	Fingerprint string
	Passphrase  Secret
	ValidAfter  time.Time `json:"valid_after"`
	ValidUntil  time.Time `json:"valid_until"`
	SealFrom    string    `json:"seal_from"`
}

func vectorRing(t *testing.T, s Settings, keys []vectorKey) *Keyring {
	t.Helper()
	var made []*Key
	for _, v := range keys {
		c := KeyConfig{Fingerprint: v.Fingerprint, Passphrase: v.Passphrase, ValidAfter: v.ValidAfter, ValidUntil: v.ValidUntil}
		if v.SealFrom != "" {
			if err := c.SealFrom.UnmarshalText([]byte(v.SealFrom)); err != nil {
				t.Fatal(err)
			}
		}
		k, err := NewKey(s, c)
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, k)
	}
	r, err := NewKeyring(s, made...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func vectorAccept(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Settings    vectorSettingsJSON
		Keys        []vectorKey
		Now         time.Time
		SkewSeconds int `json:"skew_seconds"`
		Triple      string
		Plaintext   string
	}](t, b)
	r := vectorRing(t, Settings(v.Settings), v.Keys)
	triple, err := ParseTriple([]byte(v.Triple), 0)
	if err != nil {
		t.Fatal(err)
	}
	plaintext, err := r.Accept(nil, triple, v.Now, time.Duration(v.SkewSeconds)*time.Second)
	if expect(t, v.Expect, err) && string(plaintext) != v.Plaintext {
		t.Errorf("opened %q, want %q", plaintext, v.Plaintext)
	}
	if v.Expect == "key-not-valid" {
		if _, err := r.Open(nil, triple); err != nil {
			t.Errorf("an ended key does not recover: %v", err)
		}
	}
}

func vectorPrimary(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Settings    vectorSettingsJSON
		Keys        []vectorKey
		Now         time.Time
		Fingerprint string
	}](t, b)
	k, err := vectorRing(t, Settings(v.Settings), v.Keys).Primary(v.Now)
	if expect(t, v.Expect, err) && k.Fingerprint() != v.Fingerprint {
		t.Errorf("primary is %s, want %s", k.Fingerprint(), v.Fingerprint)
	}
}

type vectorBindingJSON struct {
	Site    string
	LaneHex hexBytes `json:"lane_hex"`
	Keys    []struct {
		ID        string
		SecretHex hexBytes `json:"secret_hex"`
	}
}

func (v vectorBindingJSON) binding(t *testing.T) *Binding {
	t.Helper()
	var keys []*BindingKey
	for _, k := range v.Keys {
		key, err := NewBindingKey(k.ID, k.SecretHex)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	b, err := NewBinding(v.Site, vectorLane(t, v.LaneHex), keys...)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func vectorLane(t *testing.T, secret []byte) *LaneKey {
	t.Helper()
	l, err := NewLaneKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func vectorEventTag(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Binding vectorBindingJSON
		Event   struct {
			Site, Kind, Edge, Epoch  string
			From, Seq                uint64 `json:",string"`
			ID                       string
			Accepted, Deadline       int64 `json:",string"`
			Order, Via               string
			IV, Fingerprint, Message string
		}
		Bind       string
		CoveredHex hexBytes `json:"covered_hex"`
		Tag        string
	}](t, b)
	e := &Event{Site: v.Event.Site, Kind: v.Event.Kind, Edge: v.Event.Edge, Epoch: v.Event.Epoch, From: v.Event.From, Seq: v.Event.Seq,
		ID: v.Event.ID, Accepted: v.Event.Accepted, Deadline: v.Event.Deadline, Order: v.Event.Order, Via: v.Event.Via,
		Triple: Triple{[]byte(v.Event.IV), []byte(v.Event.Fingerprint), []byte(v.Event.Message)}}
	binding := v.Binding.binding(t)
	if !expect(t, v.Expect, binding.VerifyEvent(e, v.Bind, v.Tag)) {
		return
	}
	k, _ := binding.Key(v.Bind)
	if got := k.TagEvent(e); got != v.Tag {
		t.Errorf("tagged %s, want %s", got, v.Tag)
	}
	covers(t, k.sub.eventTag, v.CoveredHex, v.Tag)
}

// covers checks that a vector's tag is the HMAC of what the vector says that it covers.
func covers(t *testing.T, m *mac, covered []byte, tag string) {
	t.Helper()
	f := m.begin()
	f.buf = append(f.buf[:0], covered...)
	if got := newTagText(m.sum(f)); string(got[:]) != tag {
		t.Errorf("covered_hex gives tag %s, want %s", got[:], tag)
	}
}

func vectorReportTag(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorHead
		Binding vectorBindingJSON
		Report  struct {
			Site, Edge, Epoch        string
			Seq                      uint64 `json:",string"`
			ID, Endpoint             string
			N                        int `json:",string"`
			State, Reason            string
			Status, Attempts         int   `json:",string"`
			Started, Settled         int64 `json:",string"`
			IV, Fingerprint, Message string
		}
		Bind       string
		CoveredHex hexBytes `json:"covered_hex"`
		Tag        string
	}](t, b)
	r := &Report{Site: v.Report.Site, Edge: v.Report.Edge, Epoch: v.Report.Epoch, Seq: v.Report.Seq, ID: v.Report.ID,
		Endpoint: v.Report.Endpoint, N: v.Report.N, State: v.Report.State, Reason: v.Report.Reason, Status: v.Report.Status,
		Attempts: v.Report.Attempts, Started: v.Report.Started, Settled: v.Report.Settled,
		Triple: Triple{[]byte(v.Report.IV), []byte(v.Report.Fingerprint), []byte(v.Report.Message)}}
	binding := v.Binding.binding(t)
	if !expect(t, v.Expect, binding.VerifyReport(r, v.Bind, v.Tag)) {
		return
	}
	k, _ := binding.Key(v.Bind)
	if got := k.TagReport(r); got != v.Tag {
		t.Errorf("tagged %s, want %s", got, v.Tag)
	}
	covers(t, k.sub.reportTag, v.CoveredHex, v.Tag)
}

func vectorReportSeal(t *testing.T, b []byte) {
	vectorSeal(t, b, labelReportSeal, (*Binding).OpenReport)
}

func vectorPlainSeal(t *testing.T, b []byte) {
	vectorSeal(t, b, labelPlainSeal, (*Binding).OpenPlain)
}

func vectorSeal(t *testing.T, b []byte, label string, open func(*Binding, []byte, Triple) ([]byte, error)) {
	v := decodeVector[struct {
		vectorHead
		Binding   vectorBindingJSON
		SubKeyHex hexBytes `json:"sub_key_hex"`
		Triple    string
		Plaintext string
	}](t, b)
	triple, err := ParseTriple([]byte(v.Triple), 0)
	if err != nil {
		t.Fatal(err)
	}
	plaintext, err := open(v.Binding.binding(t), []byte("kept"), triple)
	if !expect(t, v.Expect, err) {
		return
	}
	if string(plaintext) != "kept"+v.Plaintext {
		t.Errorf("opened %q, want %q", plaintext, v.Plaintext)
	}
	found := false
	for _, k := range v.Binding.Keys {
		key, err := subKey(k.SecretHex, label)
		if err != nil {
			t.Fatal(err)
		}
		found = found || bytes.Equal(key, v.SubKeyHex)
	}
	if !found {
		t.Errorf("no binding key has the sub-key %x", v.SubKeyHex)
	}
}

type vectorLaneHead struct {
	vectorHead
	LaneHex     hexBytes `json:"lane_hex"`
	Site, POS   string
	KindOfEvent string `json:"kind_of_event"`
	Want        string
}

func vectorOrder(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorLaneHead
		OrderID string `json:"order_id"`
	}](t, b)
	same(t, vectorLane(t, v.LaneHex).Order(v.OrderID), v.Want)
}

func vectorMessageID(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorLaneHead
		Key string
	}](t, b)
	same(t, vectorLane(t, v.LaneHex).MessageID(v.Site, v.POS, v.KindOfEvent, v.Key), v.Want)
}

func vectorEnvelopeID(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorLaneHead
		Fingerprint, IV string
	}](t, b)
	triple := Triple{IV: []byte(v.IV), Fingerprint: []byte(v.Fingerprint), Message: []byte("not part of it")}
	same(t, vectorLane(t, v.LaneHex).EnvelopeID(v.Site, v.POS, v.KindOfEvent, triple), v.Want)
}

func vectorPayloadHash(t *testing.T, b []byte) {
	v := decodeVector[struct {
		vectorLaneHead
		Payload string
		WantHex string `json:"want_hex"`
	}](t, b)
	same(t, fmt.Sprintf("%x", vectorLane(t, v.LaneHex).PayloadHash(v.KindOfEvent, []byte(v.Payload))), v.WantHex)
}

func same[T comparable](t *testing.T, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}
