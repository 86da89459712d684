package broker

import (
	"strings"
	"testing"
	"time"
)

// someBcrypt is the hash of s3cr3t.
const someBcrypt = "$2a$04$ovatxLhm4wfWDDyZ/yfhVOHEkqOg4VxcCdap26Cz06ei5M4O/BjBy"

func TestHubConfigSaysWhatIsWrong(t *testing.T) {
	user := UserConfig{Name: "edge-1", PasswordBcrypt: someBcrypt, Role: RoleEdge}
	for _, row := range []struct {
		name string
		cfg  HubConfig
		want []string // each in a line of its own; none: valid
	}{
		{"nothing set is an embedded hub in process", HubConfig{}, nil},
		{"loopback needs no users", HubConfig{Listen: "127.0.0.1:4222"}, nil},
		{"loopback by name", HubConfig{Listen: "localhost:4222"}, nil},
		{"loopback of IPv6", HubConfig{Listen: "[::1]:4222"}, nil},
		{"beyond loopback with users", HubConfig{Listen: "0.0.0.0:4222", Users: []UserConfig{user}}, nil},
		{"urls with a password", HubConfig{URLs: []string{"tls://hub:4222"}, User: "edge-1", PasswordFile: "p"}, nil},
		{"urls with creds and TLS", HubConfig{URLs: []string{"nats://a:4222", "wss://b"}, CredsFile: "c", CAFile: "ca", CertFile: "c", KeyFile: "k", Replicas: 3, Partitions: 16}, nil},

		{"beyond loopback without users", HubConfig{Listen: "0.0.0.0:4222"}, []string{"listen: 0.0.0.0:4222 is reachable from other machines"}},
		{"all addresses without users", HubConfig{Listen: ":4222"}, []string{"listen: :4222 is reachable"}},
		{"a name that is not localhost", HubConfig{Listen: "hub.local:4222"}, []string{"listen: hub.local:4222 is reachable"}},
		{"listen is no address", HubConfig{Listen: "4222"}, []string{`listen: "4222" is not host:port`}},
		{"listen has no port", HubConfig{Listen: "127.0.0.1:99999"}, []string{"listen: "}},
		{"users nobody can use", HubConfig{Users: []UserConfig{user}}, []string{"users: nobody can connect without listen"}},
		{"certificate without listener", HubConfig{CertFile: "c", KeyFile: "k"}, []string{"cert_file: only with urls or listen", "key_file: only with urls or listen"}},
		{"certificate without key", HubConfig{Listen: "127.0.0.1:1", CertFile: "c"}, []string{"cert_file: needs key_file"}},
		{"client certificates without TLS", HubConfig{Listen: "127.0.0.1:1", CAFile: "ca"}, []string{"ca_file: a listener"}},
		{"login at an embedded hub", HubConfig{User: "u", PasswordFile: "p", CredsFile: "c"}, []string{"user: only with urls", "password_file: only with urls", "creds_file: only with urls", "creds_file: excludes user"}},
		{"unknown sync", HubConfig{Sync: "never"}, []string{`sync: "never" is neither always nor interval`}},
		{"replicas of an embedded hub", HubConfig{Replicas: 3}, []string{"replicas: only with urls"}},

		{"urls exclude what is the embedded hub's", HubConfig{URLs: []string{"nats://h:1"}, Listen: "127.0.0.1:1", Users: []UserConfig{user}, Sync: "always"}, []string{"listen: opens the embedded hub", "users: are of the embedded hub", "sync: is of the embedded hub"}},
		{"url without scheme", HubConfig{URLs: []string{"hub:4222"}}, []string{"urls[0]: write nats://"}},
		{"url of another protocol", HubConfig{URLs: []string{"nats://a:1", "http://b:1"}}, []string{"urls[1]: write nats://"}},
		{"user without password", HubConfig{URLs: []string{"nats://h:1"}, User: "u"}, []string{"user: needs password_file"}},
		{"even number of replicas", HubConfig{URLs: []string{"nats://h:1"}, Replicas: 2}, []string{"replicas: 2 is not 1, 3 or 5"}},

		{"user with nothing", HubConfig{Listen: "0.0.0.0:1", Users: []UserConfig{{}}}, []string{"users[0].name: ", "users[0].password_bcrypt: give either", `users[0].role: ""`}},
		{"user who is everybody", HubConfig{Listen: "0.0.0.0:1", Users: []UserConfig{{Name: "*", PasswordFile: "p", Role: RoleEdge}}}, []string{"users[0].name: "}},
		{"user twice", HubConfig{Listen: "0.0.0.0:1", Users: []UserConfig{user, user}}, []string{"users[1].name: edge-1 is there twice"}},
		{"user with two passwords", HubConfig{Listen: "0.0.0.0:1", Users: []UserConfig{{Name: "a", PasswordBcrypt: someBcrypt, PasswordFile: "p", Role: RoleOps}}}, []string{"users[0].password_bcrypt: give either"}},
		{"password in clear", HubConfig{Listen: "0.0.0.0:1", Users: []UserConfig{{Name: "a", PasswordBcrypt: "hunter2", Role: RoleOps}}}, []string{"users[0].password_bcrypt: is no bcrypt hash"}},

		{"too many partitions", HubConfig{Partitions: 256}, []string{"partitions: 256 is not in 1 to 64"}},
		{"negative numbers", HubConfig{Partitions: -1, MaxBytes: -1, ReconnectMax: -time.Second}, []string{"reconnect_max: -1s is negative", "partitions: -1", "max_bytes: -1"}},
		{"a stream too small for a message", HubConfig{MaxBytes: 1000}, []string{"max_bytes: 1000 is less than 1 MiB"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			err := row.cfg.Validate()
			if err == nil {
				if len(row.want) > 0 {
					t.Errorf("valid, want %q", row.want)
				}
				return
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(row.want) {
				t.Fatalf("%d mistakes, want %d:\n%v", len(lines), len(row.want), err)
			}
			for i, want := range row.want {
				if !strings.HasPrefix(lines[i], want) {
					t.Errorf("line %d is %q, want %q", i, lines[i], want)
				}
			}
		})
	}
}

func TestHubConfigNeverRepeatsAPassword(t *testing.T) {
	for _, cfg := range []HubConfig{
		{URLs: []string{"nats://user:hunter2@hub:4222"}},
		{URLs: []string{"nats://user:hunter2@hub:bad port"}},
		{URLs: []string{"http://user:hunter2@hub"}},
		{Users: []UserConfig{{PasswordBcrypt: "hunter2"}}},
	} {
		if err := cfg.Validate(); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("error is %v", err)
		}
	}
}

func TestReconnectPausesAreRandomAndBounded(t *testing.T) {
	for _, row := range []struct {
		attempt int
		ceiling time.Duration
	}{
		{0, time.Second}, {1, time.Second}, {2, 2 * time.Second}, {6, 32 * time.Second}, {7, time.Minute}, {64, time.Minute}, {1 << 30, time.Minute},
	} {
		seen := make(map[time.Duration]bool)
		for range 1000 {
			d := jitter(row.attempt, time.Second, time.Minute)
			if d <= 0 || d > row.ceiling {
				t.Fatalf("attempt %d pauses %v, the ceiling is %v", row.attempt, d, row.ceiling)
			}
			seen[d] = true
		}
		if len(seen) < 900 {
			t.Errorf("attempt %d: only %d different pauses of 1000", row.attempt, len(seen))
		}
	}
}
