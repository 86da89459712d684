package cli

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/providers/posflag"
	"github.com/knadh/koanf/providers/rawbytes"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"
)

// EnvPrefix begins the name of every environment variable that sets something.
const EnvPrefix = "KB_"

// Source says where a program's settings come from; a later one wins over an
// earlier one: the file, the environment, the flags.
type Source struct {
	File  string         // path of a YAML file, "" = none
	Env   []string       // as of os.Environ; only names that begin with KB_ count
	Flags *pflag.FlagSet // nil = none; a flag's name is the path of its setting
	Set   []string       // "path=value", as given with --set
}

// Load fills into, a pointer to a Config struct with koanf tags, from src.
//
// It reports every mistake it finds, joined into one error: a file that cannot be
// read, a key that names no setting, a value of the wrong type. What the values
// mean is checked by the Config's own Validate.
func Load(into any, src Source) error {
	t := reflect.TypeOf(into).Elem()
	k := koanf.New(".")
	var errs []error

	if src.File != "" {
		raw, err := os.ReadFile(src.File)
		if err != nil {
			return fmt.Errorf("configuration: %w", err)
		}
		if err := k.Load(rawbytes.Provider(raw), yaml.Parser()); err != nil {
			return fmt.Errorf("configuration %s: not YAML: %w", src.File, err)
		}
		errs = append(errs, unknownKeys(src.File, k.Raw(), t, "")...)
	}

	leaves := Settings(t)
	env, bad := fromEnv(src.Env, leaves)
	errs = append(errs, bad...)
	set, bad := fromSet(src.Set, t)
	errs = append(errs, bad...)
	if err := k.Load(confmap.Provider(env, "."), nil); err != nil {
		errs = append(errs, fmt.Errorf("environment: %w", err))
	}
	if src.Flags != nil {
		settings := make(map[string]bool)
		for _, l := range leaves {
			settings[l.Path] = true
		}
		provider := posflag.ProviderWithFlag(src.Flags, ".", k, func(f *pflag.Flag) (string, any) {
			if !f.Changed || !settings[f.Name] {
				return "", nil
			}
			return f.Name, posflag.FlagVal(src.Flags, f)
		})
		if err := k.Load(provider, nil); err != nil {
			errs = append(errs, fmt.Errorf("flags: %w", err))
		}
	}
	if err := k.Load(confmap.Provider(set, "."), nil); err != nil {
		errs = append(errs, fmt.Errorf("--set: %w", err))
	}

	err := k.UnmarshalWithConf("", into, koanf.UnmarshalConf{DecoderConfig: &mapstructure.DecoderConfig{
		Result:  into,
		TagName: "koanf",
		DecodeHook: mapstructure.ComposeDecodeHookFunc(
			mapstructure.TextUnmarshallerHookFunc(),
			durationHook,
		),
	}})
	errs = append(errs, decodeErrors(err)...)
	return errors.Join(errs...)
}

// Setting is one value an operator may set: a leaf of a Config struct.
type Setting struct {
	Path string // as in the file: hub.listen; below a map of names: sites.<name>.cipher.profile
	Env  string // its environment variable; "" for what stands below a map or a list
	Type reflect.Type
}

// Settings lists the leaves of the Config struct t in the order of its fields.
func Settings(t reflect.Type) []Setting {
	var out []Setting
	walk(t, "", false, &out)
	return out
}

func walk(t reflect.Type, path string, below bool, out *[]Setting) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t.Kind() == reflect.Struct:
		for f := range t.Fields() {
			name, squash, ok := tagOf(f)
			switch {
			case !ok:
			case squash:
				walk(f.Type, path, below, out)
			default:
				walk(f.Type, join(path, name), below, out)
			}
		}
	case t.Kind() == reflect.Map && t.Elem().Kind() == reflect.Struct:
		walk(t.Elem(), join(path, "<name>"), true, out)
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		walk(t.Elem(), path+"[]", true, out)
	default:
		s := Setting{Path: path, Type: t}
		if !below && t.Kind() != reflect.Map {
			s.Env = EnvPrefix + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
		}
		*out = append(*out, s)
	}
}

// tagOf reads a field's koanf tag; ok is false for what only code may set.
func tagOf(f reflect.StructField) (name string, squash, ok bool) {
	tag, has := f.Tag.Lookup("koanf")
	if !has || tag == "-" || !f.IsExported() {
		return "", false, false
	}
	name, opts, _ := strings.Cut(tag, ",")
	return name, opts == "squash", true
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// unknownKeys compares what a file holds with the struct it is for.
func unknownKeys(file string, raw any, t reflect.Type, path string) []error {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	var errs []error
	switch {
	case t.Kind() == reflect.Struct:
		m, ok := raw.(map[string]any)
		if !ok {
			return nil // a wrong type is the decoder's to report
		}
		fields := fieldsOf(t)
		for _, key := range slices.Sorted(maps.Keys(m)) {
			ft, ok := fields[key]
			if !ok {
				errs = append(errs, fmt.Errorf("%s: %s: no such setting%s", file, join(path, key), suggest(key, fields)))
				continue
			}
			errs = append(errs, unknownKeys(file, m[key], ft, join(path, key))...)
		}
	case t.Kind() == reflect.Map:
		m, _ := raw.(map[string]any)
		for _, key := range slices.Sorted(maps.Keys(m)) {
			errs = append(errs, unknownKeys(file, m[key], t.Elem(), join(path, key))...)
		}
	case t.Kind() == reflect.Slice:
		l, _ := raw.([]any)
		for i, e := range l {
			errs = append(errs, unknownKeys(file, e, t.Elem(), path+"["+strconv.Itoa(i)+"]")...)
		}
	}
	return errs
}

func fieldsOf(t reflect.Type) map[string]reflect.Type {
	out := make(map[string]reflect.Type)
	for f := range t.Fields() {
		name, squash, ok := tagOf(f)
		switch {
		case !ok:
		case squash:
			maps.Copy(out, fieldsOf(f.Type))
		default:
			out[name] = f.Type
		}
	}
	return out
}

// suggest names the known key nearest to a wrong one, when it is near.
func suggest(key string, fields map[string]reflect.Type) string {
	best, dist := "", 3
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if d := distance(key, name); d < dist {
			best, dist = name, d
		}
	}
	if best == "" {
		return "; here may stand: " + strings.Join(slices.Sorted(maps.Keys(fields)), ", ")
	}
	return "; did you mean " + best + "?"
}

// distance is the Levenshtein distance of two short names.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func fromEnv(environ []string, leaves []Setting) (map[string]any, []error) {
	byEnv := make(map[string]Setting)
	for _, l := range leaves {
		if l.Env != "" {
			byEnv[l.Env] = l
		}
	}
	out := make(map[string]any)
	var errs []error
	for _, kv := range environ {
		name, text, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, EnvPrefix) {
			continue
		}
		l, ok := byEnv[name]
		if !ok {
			errs = append(errs, fmt.Errorf("environment: %s names no setting; what stands below sites, kinds or another map is set in the file", name))
			continue
		}
		v, err := parse(text, l.Type)
		if err != nil {
			errs = append(errs, fmt.Errorf("environment: %s: %w", name, err))
			continue
		}
		out[l.Path] = v
	}
	return out, errs
}

func fromSet(pairs []string, t reflect.Type) (map[string]any, []error) {
	out := make(map[string]any)
	var errs []error
	for _, kv := range pairs {
		path, text, ok := strings.Cut(kv, "=")
		if !ok {
			errs = append(errs, fmt.Errorf("--set %s: write it as path=value", kv))
			continue
		}
		ft, err := typeAt(t, path)
		if err != nil {
			errs = append(errs, fmt.Errorf("--set %s: %w", path, err))
			continue
		}
		v, err := parse(text, ft)
		if err != nil {
			errs = append(errs, fmt.Errorf("--set %s: %w", path, err))
			continue
		}
		out[path] = v
	}
	return out, errs
}

// typeAt follows a dotted path through structs and maps of names.
func typeAt(t reflect.Type, path string) (reflect.Type, error) {
	at := ""
	for key := range strings.SplitSeq(path, ".") {
		for t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		switch t.Kind() {
		case reflect.Struct:
			fields := fieldsOf(t)
			ft, ok := fields[key]
			if !ok {
				return nil, fmt.Errorf("no such setting %s%s", join(at, key), suggest(key, fields))
			}
			t = ft
		case reflect.Map:
			t = t.Elem()
		default:
			return nil, fmt.Errorf("%s has nothing below it", at)
		}
		at = join(at, key)
	}
	return t, nil
}

// parse turns text from the environment or --set into a value of the field's kind.
func parse(text string, t reflect.Type) (any, error) {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == reflect.TypeFor[time.Duration](), t.Kind() == reflect.String:
		return text, nil
	case t.Kind() == reflect.Bool:
		v, err := strconv.ParseBool(text)
		if err != nil {
			return nil, fmt.Errorf("%q is neither true nor false", text)
		}
		return v, nil
	case t.Kind() >= reflect.Int && t.Kind() <= reflect.Uint64:
		v, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%q is not a whole number", text)
		}
		return v, nil
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.String:
		if text == "" {
			return []string{}, nil
		}
		return strings.Split(text, ","), nil
	}
	return nil, errors.New("can only be set in the file")
}

// durationHook reads "10m" and refuses a bare number, which would be nanoseconds.
func durationHook(from, to reflect.Type, data any) (any, error) {
	if to != reflect.TypeFor[time.Duration]() || from == to {
		return data, nil
	}
	s, ok := data.(string)
	if !ok {
		return nil, fmt.Errorf("%v has no unit: write a duration such as 500ms, 10s, 5m or 72h", data)
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return nil, fmt.Errorf("%q is not a duration: write for example 500ms, 10s, 5m or 72h", s)
	}
	return d, nil
}

// decodeErrors takes the decoder's one error apart, a line for each setting.
func decodeErrors(err error) []error {
	if err == nil {
		return nil
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		var out []error
		for _, e := range many.Unwrap() {
			out = append(out, decodeErrors(e)...)
		}
		return out
	}
	if next := errors.Unwrap(err); next != nil {
		if _, ok := next.(interface{ Unwrap() []error }); ok {
			return decodeErrors(next)
		}
	}
	return []error{fmt.Errorf("configuration: %w", err)}
}
