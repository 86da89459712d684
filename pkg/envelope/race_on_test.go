//go:build race

package envelope

// Under the race detector sync.Pool drops objects at random, to find those who rely on them.
const raceDetector = true
