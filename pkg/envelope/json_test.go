package envelope

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"
)

var jsonSamples = []string{
	``, ` `, `0`, `-0`, `01`, `-`, `1.5`, `1.`, `.5`, `1e9`, `1E+9`, `1e-`, `-1.25e-7`, `+1`, `0x1`, `NaN`, `1 2`, ` 7 `,
	`true`, `false`, `null`, `tru`, `nulll`, `True`,
	`""`, `"a`, `"\"\\\/\b\f\n\r\t\u00e9\uD800"`, `"\x"`, `"\u12g4"`, `"\u12`, "\"\n\"", "\"\x00\"", "\"\x7f\"", `"é€🍟"`, "\"\xff\"", "\"\xed\xa0\x80\"",
	`{}`, `{ }`, `[]`, `[ ]`, `[1,2,3]`, `[1,]`, `[,1]`, `[1 2]`, `{"a":1}`, `{"a":1,"a":2}`, `{"a":1,}`, `{"a"}`, `{"a":}`, `{a:1}`, `{1:1}`, `{"a" : [ {} , "b" ] }`,
	`[}`, `{]`, `[`, `{`, `{"a":1`, `]`, `}`, `[[[]]]`, "\ufeff{}", "{}\x00", "\x00", `"a"b`, "\v1", "[1\xff]",
	`{"_id":"65f1c0ffee","items":[{"name":"Crème brûlée \u00e9","qty":2,"price":-1.5e3,"tags":[null,true,false]}]}`,
}

func TestValidJSONAgreesWithEncodingJSON(t *testing.T) {
	nest := func(open, end string, n int) string { return strings.Repeat(open, n) + strings.Repeat(end, n) }
	samples := append([]string{nest("[", "]", maxJSONDepth), nest("[", "]", maxJSONDepth+1), nest(`{"a":[`, `]}`, maxJSONDepth/2), nest(`{"a":[`, `]}`, maxJSONDepth/2+1)}, jsonSamples...)
	valid := 0
	for _, s := range samples {
		want := json.Valid([]byte(s)) && utf8.ValidString(s)
		if want {
			valid++
		}
		if got := validJSON([]byte(s)); got != want {
			t.Errorf("validJSON(%.100q) = %v, want %v", s, got, want)
		}
	}
	if valid < 10 || valid > len(samples)-10 {
		t.Errorf("%d of %d samples are valid; the test needs both sorts", valid, len(samples))
	}
}
