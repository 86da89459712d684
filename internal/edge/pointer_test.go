package edge

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestPointerFinds(t *testing.T) {
	const doc = ` {"_id" : "o-1", "n":{"id":17, "f":-1.50e3}, "list":[{"id":"a"},["x","y"], 3], "":"empty", "a/b":"slash", "m~n":"tilde",
		"\u00e9":"accent", "caf\u00e9":"caf\u00e9 \"x\"", "twice":"first", "twice":"last", "deep":{"deep":{"deep":"down"}},
		"no":null, "yes":true, "obj":{}, "none":"", "tricky":"}],\\\"", "after":"still here", "twice2":{"a":1}, "twice2":{"b":2}} `
	for _, tc := range []struct{ pointer, want string }{
		{"/_id", "o-1"},
		{"/n/id", "17"},
		{"/n/f", "-1.50e3"},
		{"/list/0/id", "a"},
		{"/list/1/1", "y"},
		{"/list/2", "3"},
		{"/", "empty"},
		{"/a~1b", "slash"},
		{"/m~0n", "tilde"},
		{"/é", "accent"},
		{"/café", `café "x"`},
		{"/twice", "last"},
		{"/deep/deep/deep", "down"},
		{"/tricky", `}],\"`},
		{"/after", "still here"},
		{"/twice2/b", "2"},

		{"", ""},
		{"/missing", ""},
		{"/_ID", ""},
		{"/n", ""},
		{"/n/id/x", ""},
		{"/list/3", ""},
		{"/list/-", ""},
		{"/list/00", ""},
		{"/list/01", ""},
		{"/list/0x0", ""},
		{"/list/9999999999", ""},
		{"/no", ""},
		{"/yes", ""},
		{"/obj", ""},
		{"/none", ""},
		{"/twice2/a", ""},
	} {
		p, err := parsePointer(tc.pointer)
		if err != nil {
			t.Fatalf("%s: %v", tc.pointer, err)
		}
		if got := p.text([]byte(doc)); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.pointer, got, tc.want)
		}
	}
}

func TestPointerFindsNothingInAScalar(t *testing.T) {
	p, err := parsePointer("/_id")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{`"_id"`, `17`, `null`, `[]`, `{}`, ``} {
		if got := p.text([]byte(doc)); got != "" {
			t.Errorf("%s: %q", doc, got)
		}
	}
}

func TestPointerRefusesWhatIsNone(t *testing.T) {
	for text, want := range map[string]string{
		"_id":                      "begins with a slash",
		"/a~":                      "~0",
		"/a~2b":                    "~0",
		strings.Repeat("/a", 33):   "33 levels",
		"$.order._id":              "begins with a slash",
		"/ok/~01/" + "bad~" + "/x": "~0",
	} {
		if _, err := parsePointer(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want something with %q", text, err, want)
		}
	}
}

func FuzzPointer(f *testing.F) {
	f.Add("/_id", []byte(`{"_id":"o-1"}`))
	f.Add("/a/0/b", []byte(`{"a":[{"b":17},{"b":18}]}`))
	f.Add("/a~1b/~0", []byte(`{"a/b":{"~":"x","~":"y"}}`))
	f.Add("/é", []byte(`{"\u00e9":"\ud83d\ude00"}`))
	f.Add("/x", []byte(`{"y":"\\\"","x":[1,{"z":"}"}],"x":-0.5E+7}`))
	f.Add("/x", []byte(`{"x":`))
	f.Add("/0", []byte(`]]]`))
	f.Fuzz(func(t *testing.T, text string, doc []byte) {
		p, err := parsePointer(text)
		if err != nil {
			return
		}
		got := p.text(doc)
		if !json.Valid(doc) || !utf8.Valid(doc) {
			return // only that nothing breaks
		}
		if want := slowly(p, doc); got != want {
			t.Errorf("%q in %s: %q, want %q", text, doc, got, want)
		}
	})
}

// slowly does what pointer.text does, by unmarshalling everything.
func slowly(p pointer, doc []byte) string {
	if len(p) == 0 {
		return ""
	}
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.UseNumber()
	var v any
	if dec.Decode(&v) != nil {
		return ""
	}
	for _, token := range p {
		switch in := v.(type) {
		case map[string]any:
			v = in[token]
		case []any:
			i, ok := arrayIndex(token)
			if !ok || i >= len(in) {
				return ""
			}
			v = in[i]
		default:
			return ""
		}
	}
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	}
	return ""
}
