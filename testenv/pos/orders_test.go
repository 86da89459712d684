package pos

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func TestOrdersArePlausible(t *testing.T) {
	g := NewGenerator(7, "store-1", "")
	ids := map[string]bool{}
	seen := map[string]int{}
	smallest, largest := 1<<20, 0
	const n = 3000
	for i := range uint64(n) {
		versions := g.Versions(i)
		if versions < 1 || versions > 4 {
			t.Fatalf("%d versions", versions)
		}
		m := g.Message(i, 1)
		if ids[m.OrderID] {
			t.Fatalf("the id %s twice", m.OrderID)
		}
		ids[m.OrderID] = true
		seen[m.Kind]++
		if m.Kind == "alert" && versions != 1 {
			t.Fatal("an alert with updates")
		}
		before := m
		for v := 2; v <= versions; v++ {
			seen["update"]++
			u := g.Message(i, v)
			if u.OrderID != m.OrderID || u.Version != v || bytes.Equal(u.Body, before.Body) {
				t.Fatalf("version %d of %s does not follow\n%s\n%s", v, m.OrderID, before.Body, u.Body)
			}
			before = u
		}
		for _, m := range []Message{m, before} {
			var o struct {
				ID          string      `json:"_id"`
				Version     int         `json:"version"`
				Number      string      `json:"order_number"`
				Reference   string      `json:"reference"`
				Destination destination `json:"destination"`
				Customer    *customer   `json:"customer"`
				Items       []item      `json:"items"`
				Expo        int         `json:"expo_number"`
			}
			if err := json.Unmarshal(m.Body, &o); err != nil {
				t.Fatalf("%v in %s", err, m.Body)
			}
			if o.ID != m.OrderID || o.Version != m.Version || !strings.Contains(o.Reference, Canary(7, "store-1")) {
				t.Fatalf("%+v is not in %s", m, m.Body)
			}
			if m.Kind == "order" && (o.Number == "" || len(o.Items) == 0) {
				t.Fatalf("no order: %s", m.Body)
			}
			for what, there := range map[string]bool{
				o.Destination.ConsumptionType: true, "customer": o.Customer != nil, "expo": o.Expo > 0, "indented": bytes.Contains(m.Body, []byte("\n")),
				"utf-8": bytes.ContainsFunc(m.Body, func(r rune) bool { return r > 0x7f }), "modifiers": bytes.Contains(m.Body, []byte(`"modifiers"`)),
				"voided": bytes.Contains(m.Body, []byte(`"voided"`)), "comment": bytes.Contains(m.Body, []byte(`"comment"`)),
			} {
				if there {
					seen[what]++
				}
			}
			smallest, largest = min(smallest, len(m.Body)), max(largest, len(m.Body))
		}
	}
	if smallest < 400 || smallest > 520 || largest < 2<<10 || largest > 16<<10 {
		t.Errorf("sizes from %d to %d bytes, want about 400 to some KiB", smallest, largest)
	}
	for _, what := range []string{"order", "alert", "update", "dine-in", "takeout", "delivery", "customer", "expo", "indented", "utf-8", "modifiers", "voided", "comment"} {
		if seen[what] < n/50 {
			t.Errorf("%s: only %d in %d", what, seen[what], n)
		}
	}
}

func TestOneSeedMakesTheSameOrdersAndAnotherDoesNot(t *testing.T) {
	all := func(g Generator) string {
		var b strings.Builder
		for i := range uint64(50) {
			for v := 1; v <= g.Versions(i); v++ {
				b.Write(g.Message(i, v).Body)
			}
		}
		return b.String()
	}
	base := all(NewGenerator(1, "s1", "c"))
	if base != all(NewGenerator(1, "s1", "c")) {
		t.Error("one seed, two sequences")
	}
	for name, g := range map[string]Generator{"seed": NewGenerator(2, "s1", "c"), "site": NewGenerator(1, "s2", "c")} {
		if base == all(g) {
			t.Errorf("another %s, the same orders", name)
		}
		for i := range uint64(50) {
			if strings.Contains(base, g.Message(i, 1).OrderID) {
				t.Errorf("another %s, an order id twice", name)
			}
		}
	}
}
