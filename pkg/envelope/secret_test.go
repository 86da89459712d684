package envelope

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// TestSecretsCannotBePrinted prints every type that holds a secret in every way there is, alone and inside other values, and looks
// for the secrets in every form in which bytes are written.
func TestSecretsCannotBePrinted(t *testing.T) {
	const phrase = "Zaphod Beeblebrox 42"
	s := testSettings(A256GCM)
	c := KeyConfig{Fingerprint: "fp", Passphrase: phrase, ValidAfter: noon, ValidUntil: noon.Add(1)}
	ring := func(s Settings) (*Key, *Keyring) {
		k, err := NewKey(s, c)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Derive(); err != nil {
			t.Fatal(err)
		}
		return k, testRing(t, s, k)
	}
	key, keys := ring(s)
	ctrKey, ctrKeys := ring(testSettings(A256CTR))
	fresh, err := NewKey(s, c)
	if err != nil {
		t.Fatal(err)
	}
	bindingSecret, laneSecret := []byte("0123456789abcdefghijklmnopqrstuv"), []byte("vutsrqponmlkjihgfedcba9876543210")
	bindingKey, err := NewBindingKey("b1", bindingSecret)
	if err != nil {
		t.Fatal(err)
	}
	lane, err := NewLaneKey(laneSecret)
	if err != nil {
		t.Fatal(err)
	}
	binding, err := NewBinding("store-1", lane, bindingKey)
	if err != nil {
		t.Fatal(err)
	}
	bindingKey.TagEvent(testEvent())
	lane.Order("x")

	needles := map[string]string{}
	hide := func(name string, secret []byte) {
		// Six bytes are enough to know it by, at either end, however they are written.
		for _, part := range [][]byte{secret[:6], secret[len(secret)-6:]} {
			needles[name+" as text"] = string(part)
			needles[name+" in hex"] = hex.EncodeToString(part)
			needles[name+" in base64"] = base64.StdEncoding.EncodeToString(part)
			needles[name+" as bytes"] = strings.Trim(fmt.Sprint(part), "[]")
			needles[name+" in Go syntax"] = strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", part), "[]byte{"), "}")
		}
	}
	hide("pass phrase", []byte(phrase))
	hide("binding secret", bindingSecret)
	hide("lane secret", laneSecret)
	for _, k := range []*Key{key, ctrKey} {
		derived, err := deriveKey(k.settings, phrase)
		if err != nil {
			t.Fatal(err)
		}
		hide("key of "+string(k.settings.Profile), derived)
	}
	for _, label := range []string{labelEventTag, labelReportTag, labelReportSeal, labelPlainSeal} {
		sub, err := subKey(bindingSecret, label)
		if err != nil {
			t.Fatal(err)
		}
		hide(label, sub)
	}

	for name, m := range map[string]*mac{
		labelEventTag: bindingKey.sub.eventTag, labelReportTag: bindingKey.sub.reportTag,
		labelOrder: lane.sub.order, labelMessageID: lane.sub.messageID, labelEnvelopeID: lane.sub.envelopeID, labelPayloadHash: lane.sub.payload,
	} {
		// Between a constant and padding stand the eight words that serve as well as the key.
		hide("inner state of "+name, m.inner[4:36])
		hide("outer state of "+name, m.outer[4:36])
	}

	type exported struct{ V any }
	type unexported struct{ v any }
	values := map[string]any{
		"Secret": Secret(phrase), "KeyConfig": c, "*KeyConfig": &c,
		"*Key": key, "Key": *key, "underived *Key": fresh, "underived Key": *fresh, "ctr *Key": ctrKey, "ctr Key": *ctrKey,
		"*Keyring": keys, "Keyring": *keys, "ctr *Keyring": ctrKeys, "ctr Keyring": *ctrKeys,
		"*BindingKey": bindingKey, "BindingKey": *bindingKey, "*LaneKey": lane, "LaneKey": *lane, "*Binding": binding, "Binding": *binding,
		"[]*Key": []*Key{key}, "map": map[string]*Key{"k": key}, "[]Secret": []Secret{phrase}, "map of Secret": map[string]Secret{"k": phrase},
		"struct with unexported fields": struct {
			k  *Key
			kv Key
			r  *Keyring
			b  *Binding
			bk BindingKey
			l  LaneKey
		}{key, *key, keys, binding, *bindingKey, *lane},
		"pointer to struct with unexported fields": &struct {
			k *Key
			b BindingKey
		}{key, *bindingKey},
	}
	printed := 0
	for name, v := range values {
		wraps := map[string]any{name: v, name + " in a field": exported{v}, name + " in a pointer's field": &exported{v}, name + " in a slice": []any{v}}
		// A Secret and a KeyConfig hold the text itself and have no say in an unexported field, nor under %p; see Secret. The others
		// hold nothing that printing could reach.
		holdsText := strings.Contains(name, "Secret") || strings.Contains(name, "KeyConfig")
		if !holdsText {
			wraps[name+" in an unexported field"] = unexported{v}
			wraps[name+" in a pointer's unexported field"] = &unexported{v}
		}
		for name, v := range wraps {
			outputs := map[string]string{}
			for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%T", "%p", "%10.3v", "%!"} {
				if verb != "%p" || !holdsText {
					outputs[verb] = fmt.Sprintf(verb, v)
				}
			}
			outputs["Sprint"] = fmt.Sprint(v)
			outputs["Errorf"] = fmt.Errorf("with %v: %w", v, errors.New("cause")).Error()
			b, err := json.Marshal(v)
			outputs["json"] = fmt.Sprint(string(b), err)
			for kind, handler := range map[string]func(*bytes.Buffer) slog.Handler{
				"slog text": func(b *bytes.Buffer) slog.Handler { return slog.NewTextHandler(b, nil) },
				"slog json": func(b *bytes.Buffer) slog.Handler { return slog.NewJSONHandler(b, nil) },
			} {
				var buf bytes.Buffer
				slog.New(handler(&buf)).Info("m", "v", v, slog.Group("g", "v", v))
				outputs[kind] = buf.String()
			}
			for how, output := range outputs {
				printed++
				for secret, needle := range needles {
					if strings.Contains(output, needle) || strings.Contains(strings.ToLower(output), strings.ToLower(hex.EncodeToString([]byte(needle)))) {
						t.Errorf("%s by %s shows the %s: %.300s", name, how, secret, output)
					}
				}
			}
		}
	}
	if printed < 1000 {
		t.Errorf("printed %d times only", printed)
	}
	if Secret(phrase).Reveal() != phrase {
		t.Error("Reveal does not")
	}
}

// TestTypesNameThemselves: what is safe to say is said, in logs and errors.
func TestTypesNameThemselves(t *testing.T) {
	s := testSettings(A256GCM)
	key := testKey(t, s, "fp")
	bindingKey := testBindingKey(t, "b1", 1)
	for _, c := range []struct {
		v    fmt.Stringer
		want string
	}{
		{Secret("x"), "[redacted]"}, {Secret(""), "[redacted]"},
		{key, "key fp"}, {(*Key)(nil), "key <nil>"},
		{testRing(t, s, key, testKey(t, s, "gp")), "keyring a256gcm [fp gp]"}, {(*Keyring)(nil), "keyring <nil>"},
		{bindingKey, "binding key b1"}, {(*BindingKey)(nil), "binding key <nil>"},
		{testBinding(t, "store-1", bindingKey, testBindingKey(t, "b0", 0)), "binding store-1 [b1 b0]"}, {(*Binding)(nil), "binding <nil>"},
		{testLane(t, 1), "lane key"}, {(*LaneKey)(nil), "lane key <nil>"},
	} {
		same(t, c.v.String(), c.want)
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d"} {
			same(t, fmt.Sprintf(verb, c.v), c.want)
		}
		same(t, c.v.(slog.LogValuer).LogValue().String(), c.want)
	}
	same(t, Secret("x").GoString(), redacted)
	if text, err := Secret("x").MarshalText(); err != nil || string(text) != redacted {
		t.Errorf("MarshalText: %s, %v", text, err)
	}
}
