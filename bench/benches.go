package main

import "slices"

// benches are all there are, in the order in which they run.
func benches() []bench {
	return slices.Concat(envelopeBenches(), acceptBenches(), deliverBenches(), wsBenches(), e2eBenches())
}
