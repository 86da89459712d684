package envelope

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func testSecret(fill byte) []byte { return bytes.Repeat([]byte{fill}, 32) }

func testBindingKey(tb testing.TB, id string, fill byte) *BindingKey {
	tb.Helper()
	k, err := NewBindingKey(id, testSecret(fill))
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func testLane(tb testing.TB, fill byte) *LaneKey {
	tb.Helper()
	l, err := NewLaneKey(testSecret(fill))
	if err != nil {
		tb.Fatal(err)
	}
	return l
}

func testBinding(tb testing.TB, site string, keys ...*BindingKey) *Binding {
	tb.Helper()
	b, err := NewBinding(site, testLane(tb, 9), keys...)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func testEvent() *Event {
	return &Event{Site: "store-1", Kind: "order", Edge: "edge-1", Epoch: "e1", From: 7, Seq: 7, ID: "id", Accepted: 1000, Deadline: 2000,
		Order: "o", Via: "hub", Triple: Triple{[]byte("iv"), []byte("fp"), []byte("message")}}
}

func testReport() *Report {
	return &Report{Site: "store-1", Edge: "edge-1", Epoch: "e1", Seq: 7, ID: "id", Endpoint: "main", N: 1, State: "failed", Reason: "expired",
		Status: 503, Attempts: 2, Started: 1000, Settled: 2000, Triple: Triple{[]byte("iv"), []byte("kb:b1"), []byte("message")}}
}

func TestBindingRefuses(t *testing.T) {
	k, lane := testBindingKey(t, "b1", 1), testLane(t, 9)
	for name, make := range map[string]func() error{
		"id with a dot":    func() error { _, err := NewBindingKey("b.1", testSecret(1)); return err },
		"no id":            func() error { _, err := NewBindingKey("", testSecret(1)); return err },
		"short secret":     func() error { _, err := NewBindingKey("b1", testSecret(1)[1:]); return err },
		"long secret":      func() error { _, err := NewBindingKey("b1", append(testSecret(1), 1)); return err },
		"no secret":        func() error { _, err := NewBindingKey("b1", nil); return err },
		"short lane key":   func() error { _, err := NewLaneKey(testSecret(1)[1:]); return err },
		"no keys":          func() error { _, err := NewBinding("store-1", lane); return err },
		"no lane key":      func() error { _, err := NewBinding("store-1", nil, k); return err },
		"nil key":          func() error { _, err := NewBinding("store-1", lane, nil); return err },
		"same id twice":    func() error { _, err := NewBinding("store-1", lane, k, testBindingKey(t, "b1", 2)); return err },
		"site with a star": func() error { _, err := NewBinding("*", lane, k); return err },
	} {
		if err := make(); !errors.Is(err, ErrSettings) {
			t.Errorf("%s: %v, want ErrSettings", name, err)
		}
	}
	if _, err := NewBinding("*", nil); len(lines(err)) != 3 {
		t.Errorf("three mistakes are reported as:\n%v", err)
	}
}

func TestBinding(t *testing.T) {
	newest, retired := testBindingKey(t, "b2", 2), testBindingKey(t, "b1", 1)
	keys := []*BindingKey{newest, retired}
	b := testBinding(t, "store-1", keys...)
	keys[0] = nil
	if b.Site() != "store-1" || b.Current() != newest || b.Lane() == nil {
		t.Errorf("site %s, current %v, lane %v", b.Site(), b.Current(), b.Lane())
	}
	if k, ok := b.Key("b1"); !ok || k != retired || k.ID() != "b1" {
		t.Errorf("key b1 is %v", k)
	}
	if _, ok := b.Key("b3"); ok {
		t.Error("there is a key b3")
	}
}

// TestTagCovers changes every field of an event and of a report, one at a time: the tag must notice. A field that is added later is
// in this test at once.
func TestTagCovers(t *testing.T) {
	b := testBinding(t, "store-1", testBindingKey(t, "b1", 1))
	k := b.Current()

	eventTag := k.TagEvent(testEvent())
	if err := b.VerifyEvent(testEvent(), "b1", eventTag); err != nil {
		t.Fatal(err)
	}
	n := eachChange(testEvent(), func(path string, e *Event) {
		if err := b.VerifyEvent(e, "b1", eventTag); !errors.Is(err, ErrTag) {
			t.Errorf("event with another %s: %v, want ErrTag", path, err)
		}
		if path != "Site" {
			return
		}
		if err := k.VerifyEvent(e, eventTag); !errors.Is(err, ErrTag) {
			t.Errorf("the key alone, another site: %v, want ErrTag", err)
		}
	})
	if n != 14 {
		t.Errorf("changed %d fields of an event, want 14", n)
	}

	reportTag := k.TagReport(testReport())
	if err := b.VerifyReport(testReport(), "b1", reportTag); err != nil {
		t.Fatal(err)
	}
	n = eachChange(testReport(), func(path string, r *Report) {
		err := b.VerifyReport(r, "b1", reportTag)
		// The fingerprint only says which key opens the answer, and the wrong one does not.
		if path == "Triple.Fingerprint" {
			if err != nil {
				t.Errorf("report with another %s: %v", path, err)
			}
		} else if !errors.Is(err, ErrTag) {
			t.Errorf("report with another %s: %v, want ErrTag", path, err)
		}
	})
	if n != 16 {
		t.Errorf("changed %d fields of a report, want 16", n)
	}
}

// eachChange calls f with copies of v that differ in one field each, and returns how many there are.
func eachChange[T any](v *T, f func(path string, changed *T)) (n int) {
	var walk func(path []int, name string, typ reflect.Type)
	walk = func(path []int, name string, typ reflect.Type) {
		if typ.Kind() == reflect.Struct {
			for i := range typ.NumField() {
				walk(append(path[:len(path):len(path)], i), strings.TrimPrefix(name+"."+typ.Field(i).Name, "."), typ.Field(i).Type)
			}
			return
		}
		changed := *v
		switch field := reflect.ValueOf(&changed).Elem().FieldByIndex(path); field.Kind() {
		case reflect.String:
			field.SetString(field.String() + "x")
		case reflect.Int, reflect.Int64:
			field.SetInt(field.Int() + 1)
		case reflect.Uint64:
			field.SetUint(field.Uint() + 1)
		case reflect.Slice:
			field.SetBytes(append(bytes.Clone(field.Bytes()), 'x'))
		default:
			panic("no change for " + field.Kind().String())
		}
		n++
		f(name, &changed)
	}
	walk(nil, "", reflect.TypeFor[T]())
	return n
}

func TestTagErrorsSayWhichMessage(t *testing.T) {
	b := testBinding(t, "store-1", testBindingKey(t, "b1", 1))
	e := testEvent()
	e.ID = strings.Repeat("i", 5000)
	for name, c := range map[string]struct {
		err  error
		says string
	}{
		"tag":         {b.VerifyEvent(e, "b1", "no tag"), "of site \"store-1\", binding key b1"},
		"unknown":     {b.VerifyEvent(e, "b9", "no tag"), `site store-1 has no binding key "b9"`},
		"other site":  {testBinding(t, "store-2", testBindingKey(t, "b1", 1)).VerifyEvent(e, "b1", ""), `it is of site "store-1", the binding of site store-2`},
		"report":      {b.VerifyReport(testReport(), "b1", ""), `report on event "id"`},
		"other bind":  {b.VerifyReport(testReport(), "", ""), `report on event "id": site store-1 has no binding key ""`},
		"key, report": {testBindingKey(t, "b1", 1).VerifyReport(testReport(), "x"), `report on event "id" of site "store-1"`},
	} {
		if !errors.Is(c.err, ErrTag) || !strings.Contains(c.err.Error(), c.says) || len(c.err.Error()) > 300 {
			t.Errorf("%s: %v, want ErrTag that says %s", name, c.err, c.says)
		}
	}
}

// TestTagsConcurrently: the pooled HMAC states of many goroutines do not meet.
func TestTagsConcurrently(t *testing.T) {
	k, lane := testBindingKey(t, "b1", 1), testLane(t, 9)
	events := make([]*Event, 50)
	want := make([]string, len(events))
	all := func(e *Event) string {
		return fmt.Sprint(k.TagEvent(e), lane.Order(e.ID), lane.EnvelopeID(e.Site, "", e.Kind, e.Triple), lane.PayloadHash(e.Kind, e.Triple.Message))
	}
	for i := range events {
		e := testEvent()
		e.Seq, e.ID = uint64(i), fmt.Sprint(i)
		e.Triple.Message = bytes.Repeat([]byte{byte(i)}, i*i*20)
		e.Order = strings.Repeat("o", i*1000) // some beyond what is kept in the pool
		events[i], want[i] = e, all(e)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i, e := range events {
				if got := all(e); got != want[i] {
					t.Errorf("event %d: got %s, want %s", i, got, want[i])
				}
			}
		})
	}
	wg.Wait()
}

func TestSealsUnderABindingKey(t *testing.T) {
	newest, retired := testBindingKey(t, "b2", 2), testBindingKey(t, "b1", 1)
	b := testBinding(t, "store-1", newest, retired)
	for _, k := range []*BindingKey{newest, retired} {
		plaintext := []byte(`{"status":200}`)
		report, err := k.SealReport(plaintext)
		if err != nil {
			t.Fatal(err)
		}
		text, err := k.AppendSealPlain([]byte("kept"), plaintext)
		if err != nil || !bytes.HasPrefix(text, []byte("kept{")) {
			t.Fatalf("%s, %v", text, err)
		}
		plain, err := ParseTriple(text[len("kept"):], 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, fp := range [][]byte{report.Fingerprint, plain.Fingerprint} {
			if string(fp) != "kb:"+k.ID() || !IsBindingFingerprint(fp) {
				t.Errorf("fingerprint %s", fp)
			}
		}
		if got, err := b.OpenReport([]byte("kept"), report); err != nil || string(got) != "kept"+string(plaintext) {
			t.Errorf("report opened %q, %v", got, err)
		}
		if got, err := b.OpenPlain([]byte("kept"), plain); err != nil || string(got) != "kept"+string(plaintext) {
			t.Errorf("plain opened %q, %v", got, err)
		}
		if _, err := b.OpenPlain(nil, report); !errors.Is(err, ErrDecrypt) {
			t.Errorf("a report opens as a plain event: %v", err)
		}
		if _, err := b.OpenReport(nil, plain); !errors.Is(err, ErrDecrypt) {
			t.Errorf("a plain event opens as a report: %v", err)
		}
		if _, err := testBinding(t, "store-1", testBindingKey(t, k.ID(), 3)).OpenReport(nil, report); !errors.Is(err, ErrDecrypt) {
			t.Errorf("opens with another secret of the same id: %v", err)
		}
	}
	for _, fp := range []string{"", "kb", "b1", "KB:b1", "xkb:b1"} {
		if IsBindingFingerprint([]byte(fp)) {
			t.Errorf("%q is taken for a binding key's", fp)
		}
	}
}

func TestLaneKey(t *testing.T) {
	l := testLane(t, 1)
	form := regexp.MustCompile(`^[a-z2-7]{32}$`)
	seen := map[string]string{}
	add := func(name, id string) {
		t.Helper()
		if !form.MatchString(id) {
			t.Errorf("%s: %q is no id", name, id)
		}
		if other, ok := seen[id]; ok {
			t.Errorf("%s and %s share an id", name, other)
		}
		seen[id] = name
	}
	triple := Triple{IV: []byte("iv"), Fingerprint: []byte("fp"), Message: []byte("m")}
	add("order", l.Order("a"))
	add("order, other lane key", testLane(t, 2).Order("a"))
	add("message", l.MessageID("a", "b", "c", "d"))
	add("message, other lane key", testLane(t, 2).MessageID("a", "b", "c", "d"))
	add("message, other site", l.MessageID("x", "b", "c", "d"))
	add("message, other POS", l.MessageID("a", "x", "c", "d"))
	add("message, other kind", l.MessageID("a", "b", "x", "d"))
	add("message, other key", l.MessageID("a", "b", "c", "x"))
	add("message, boundary moved", l.MessageID("ab", "", "c", "d"))
	add("envelope", l.EnvelopeID("a", "b", "c", triple))
	add("envelope, other fingerprint", l.EnvelopeID("a", "b", "c", Triple{IV: triple.IV, Fingerprint: []byte("x")}))
	add("envelope, other IV", l.EnvelopeID("a", "b", "c", Triple{IV: []byte("x"), Fingerprint: triple.Fingerprint}))
	add("envelope, IV and fingerprint swapped", l.EnvelopeID("a", "b", "c", Triple{IV: triple.Fingerprint, Fingerprint: triple.IV}))
	if l.EnvelopeID("a", "b", "c", triple) != l.EnvelopeID("a", "b", "c", Triple{IV: triple.IV, Fingerprint: triple.Fingerprint}) {
		t.Error("the message is a part of the envelope's id")
	}
	if l.Order("") != "" {
		t.Error("an order without id has an order key")
	}
	if l.PayloadHash("order", []byte("x")) == l.PayloadHash("alert", []byte("x")) || l.PayloadHash("order", nil) == l.PayloadHash("order", []byte("x")) {
		t.Error("payload hashes of different payloads are equal")
	}
}

// All programs change keys at one moment, whenever they read the file; before it the new key
// verifies and opens.
func TestCurrentIsTheNewestKeyThatHasBegun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type from struct {
			id   string
			fill byte
			wait time.Duration // 0: always
		}
		always := from{"b1", 1, 0}
		for _, row := range []struct {
			name string
			keys []from
			want []string // after 0, 1, 2, … minutes
		}{
			{"one that always does", []from{always}, []string{"b1", "b1"}},
			{"a new one", []from{{"b2", 2, time.Minute}, always}, []string{"b1", "b2", "b2"}},
			{"two new ones", []from{{"b3", 3, 2 * time.Minute}, {"b2", 2, time.Minute}, always}, []string{"b1", "b2", "b3"}},
			{"the newest begins first", []from{{"b3", 3, time.Minute}, {"b2", 2, 2 * time.Minute}, always}, []string{"b1", "b3", "b3"}},
			{"none has begun: the oldest", []from{{"b3", 3, 2 * time.Minute}, {"b2", 2, time.Minute}}, []string{"b2", "b2", "b3"}},
			{"one has begun long ago", []from{{"b2", 2, -time.Hour}, always}, []string{"b2"}},
		} {
			var keys []*BindingKey
			for _, k := range row.keys {
				key := testBindingKey(t, k.id, k.fill)
				if k.wait != 0 {
					key = key.WithUseFrom(time.Now().Add(k.wait))
				}
				keys = append(keys, key)
			}
			b := testBinding(t, "store-1", keys...)
			for i, want := range row.want {
				if got := b.Current().ID(); got != want {
					t.Errorf("%s: after %d min: %s, want %s", row.name, i, got, want)
				}
				time.Sleep(time.Minute)
			}
			e := testEvent()
			for _, k := range keys {
				if err := b.VerifyEvent(e, k.ID(), k.TagEvent(e)); err != nil {
					t.Errorf("%s: %v", row.name, err)
				}
			}
		}
	})
}

func TestSucceedKeepsWhatStays(t *testing.T) {
	old := testBinding(t, "store-1", testBindingKey(t, "b1", 1))
	from := time.Unix(2000, 0)
	read := testBinding(t, "store-1", testBindingKey(t, "b2", 2).WithUseFrom(from), testBindingKey(t, "b1", 1))
	next, err := read.Succeed(old)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := old.Key("b1")
	if after, ok := next.Key("b1"); !ok || after != before {
		t.Error("a key that stays is another object: what it counts begins anew")
	}
	if k, ok := next.Key("b2"); !ok || !k.UseFrom().Equal(from) || next.Lane() != old.Lane() {
		t.Error("the new key is not there, or the lane key is another")
	}
	// A changed time changes the time, and not what is counted.
	later, err := testBinding(t, "store-1", testBindingKey(t, "b1", 1).WithUseFrom(from)).Succeed(old)
	if err != nil {
		t.Fatal(err)
	}
	if k := later.Current(); k.sub != before.sub || !k.UseFrom().Equal(from) {
		t.Error("the key was made anew, or has the time of before")
	}
}

func TestSucceedRefuses(t *testing.T) {
	old := testBinding(t, "store-1", testBindingKey(t, "b1", 1))
	otherLane, err := NewBinding("store-1", testLane(t, 8), testBindingKey(t, "b1", 1))
	if err != nil {
		t.Fatal(err)
	}
	for name, row := range map[string]struct {
		next *Binding
		want string
	}{
		"another site":                 {testBinding(t, "store-2", testBindingKey(t, "b1", 1)), "site: "},
		"another lane key":             {otherLane, "lane: "},
		"another secret of the one id": {testBinding(t, "store-1", testBindingKey(t, "b1", 2)), "keys: "},
	} {
		if _, err := row.next.Succeed(old); !errors.Is(err, ErrSettings) || !strings.HasPrefix(err.Error(), row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
