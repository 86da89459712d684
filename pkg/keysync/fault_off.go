//go:build !faultswitch

package keysync

// faultForgetKeys forgets a site's keys when they cannot be fetched. testenv/faults
// -selftest does so, to show that it is noticed. Outside builds with the tag faultswitch it
// is a constant: nothing of it is in a program.
const faultForgetKeys = false
