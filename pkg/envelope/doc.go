// Package envelope seals, opens and tags what travels between a POS, the broker and a Kitchen.
//
// It promises four things.
//
//   - A [Triple] (IV, key fingerprint, encrypted message) is read strictly and written canonically, as JSON and as HTTP headers.
//   - A [Key] makes and opens triples under the cipher profile of its site, which its [Settings] fix and a message cannot change.
//     A [Keyring] picks the key: to seal ([Keyring.Primary]), at a door ([Keyring.Accept]), to recover ([Keyring.Open]).
//   - A [Binding] ties a triple to its site, kind, sequence and deadline with a tag ([BindingKey.TagEvent], [Binding.VerifyEvent]),
//     so that whoever holds the broker cannot move, alter or replay it unnoticed. A [LaneKey] makes ids that reveal nothing.
//   - Secrets cannot be printed by accident: every type that holds one redacts itself in fmt, encoding/json and log/slog.
//
// Everything here is immutable once made and safe for concurrent use. The package starts no goroutine, logs nothing and keeps no
// global state. The bytes are specified in docs/spec/envelope.md; testdata/vectors holds the test vectors.
package envelope
