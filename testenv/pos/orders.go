package pos

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"time"
)

// Message is one order, in one of its versions, or one alert.
type Message struct {
	Kind    string // "order" or "alert"
	OrderID string // "_id" in the body; an alert has one too
	Version int    // "version" in the body, from 1; an alert has only the first
	Body    []byte // JSON; a few are indented, as some POS send them
}

// Generator makes plausible restaurant orders. It holds no state: what it makes depends
// only on seed, site and canary, and on the numbers given to Message. Two generators share
// an order id only when seed and site are the same. Safe for concurrent use.
type Generator struct {
	seed   uint64 // of seed and site
	canary string
}

// NewGenerator makes a Generator. The canary stands in every body; whoever finds it where
// only ciphertext should be has found a leak. "" is Canary(seed, site).
func NewGenerator(seed uint64, site, canary string) Generator {
	if canary == "" {
		canary = Canary(seed, site)
	}
	return Generator{binary.BigEndian.Uint64(digest("orders", seed, site)), canary}
}

// Canary is the text by which a leaked payload is recognised, unless another was chosen.
func Canary(seed uint64, site string) string {
	return "canary-" + hex.EncodeToString(digest("canary", seed, site)[:10])
}

func digest(label string, seed uint64, site string) []byte {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s", label, seed, site))
	return sum[:]
}

// Versions says how often the i-th message is sent: an order once and then with each of
// its updates, an alert once. From 1 to 4.
func (g Generator) Versions(i uint64) int {
	r := g.rng(i, 0)
	if alert(r) {
		return 1
	}
	n := 1
	for n < 4 && r.Float64() < 0.35 {
		n++
	}
	return n
}

// alert is the first draw of a message: one in fifteen is an alert.
func alert(r *rand.Rand) bool { return r.IntN(15) == 0 }

func (g Generator) rng(i uint64, version int) *rand.Rand {
	return rand.New(rand.NewPCG(g.seed+uint64(version), i))
}

type order struct {
	ID           string      `json:"_id"`
	Number       string      `json:"order_number"`
	Version      int         `json:"version"`
	BusinessDate string      `json:"business_date"`
	Source       string      `json:"order_source"`
	Software     string      `json:"pos_software"`
	Terminal     string      `json:"terminal"`
	Employee     employee    `json:"employee"`
	State        string      `json:"state"`
	Destination  destination `json:"destination"`
	Expo         int         `json:"expo_number,omitempty"`
	Customer     *customer   `json:"customer,omitempty"`
	Comment      string      `json:"comment,omitempty"`
	Items        []item      `json:"items"`
	Total        int         `json:"total"`
	Reference    string      `json:"reference"`
}

type employee struct {
	ID   string `json:"id"`
	Name string `json:"name"`
}

type destination struct {
	ID              string `json:"id"`
	Name            string `json:"name"`
	ConsumptionType string `json:"consumption_type"`
}

type customer struct {
	Name    string `json:"name"`
	Phone   string `json:"phone,omitempty"`
	Address string `json:"address,omitempty"`
}

type item struct {
	ID        string     `json:"id"`
	SKU       string     `json:"sku"`
	Name      string     `json:"name"`
	Quantity  int        `json:"quantity"`
	Price     int        `json:"price"` // in cents
	Seat      int        `json:"seat,omitempty"`
	Course    string     `json:"course"`
	Modifiers []modifier `json:"modifiers,omitempty"`
	Comment   string     `json:"comment,omitempty"`
	Voided    bool       `json:"voided,omitempty"`
}

type modifier struct {
	Name  string `json:"name"`
	Price int    `json:"price"`
}

type alertBody struct {
	ID           string      `json:"_id"`
	Version      int         `json:"version"`
	Type         string      `json:"type"`
	Message      string      `json:"message"`
	BusinessDate string      `json:"business_date"`
	Destination  destination `json:"destination"`
	Priority     string      `json:"priority"`
	Station      string      `json:"station"`
	Software     string      `json:"pos_software"`
	Terminal     string      `json:"terminal"`
	RaisedBy     employee    `json:"raised_by"`
	Recipients   []string    `json:"recipients"`
	Reference    string      `json:"reference"`
}

type dish struct {
	sku, name, course string
	price             int
	modifiers         []modifier
}

var (
	menu = []dish{
		{"ST-01", "Gazpacho andaluz", "starter", 690, []modifier{{"sin pepino", 0}, {"extra bread", 120}}},
		{"ST-02", "Soupe à l'oignon gratinée", "starter", 850, []modifier{{"no cheese", 0}, {"extra Gruyère", 180}}},
		{"ST-03", "枝豆 Edamame", "starter", 520, []modifier{{"no salt", 0}, {"chili", 50}}},
		{"ST-04", "Mozzarella sticks", "starter", 740, []modifier{{"marinara", 0}, {"ranch", 0}}},
		{"MN-01", "Cheeseburger", "main", 1290, []modifier{{"rare", 0}, {"medium", 0}, {"well done", 0}, {"no onion", 0}, {"extra bacon", 250}, {"gluten-free bun", 150}}},
		{"MN-02", "Jalapeño burger", "main", 1390, []modifier{{"medium", 0}, {"no jalapeños", 0}, {"double patty", 450}}},
		{"MN-03", "Pizza Margherita", "main", 1150, []modifier{{"half & half", 0}, {"extra mozzarella", 200}, {"no basil", 0}}},
		{"MN-04", "Käsespätzle", "main", 1240, []modifier{{"ohne Röstzwiebeln", 0}, {"Salat dazu", 350}}},
		{"MN-05", "担々麺 Tantanmen", "main", 1480, []modifier{{"味玉 ajitama", 180}, {"less spicy", 0}, {"大盛 large", 220}}},
		{"MN-06", "Bò bún", "main", 1320, []modifier{{"no peanuts", 0}, {"tofu instead of beef", 0}}},
		{"MN-07", "Борщ со сметаной", "main", 980, []modifier{{"без сметаны", 0}}},
		{"MN-08", "Fish \"n\" chips", "main", 1450, []modifier{{"mushy peas", 150}, {"curry sauce", 120}, {"malt vinegar", 0}}},
		{"MN-09", "Caesar salad", "main", 1120, []modifier{{"grilled chicken", 380}, {"no anchovies", 0}, {"dressing on the side", 0}}},
		{"SD-01", "French fries", "side", 420, []modifier{{"large", 150}, {"no salt", 0}, {"truffle mayo", 200}}},
		{"SD-02", "Onion rings", "side", 480, nil},
		{"SD-03", "Gurkensalat", "side", 390, []modifier{{"ohne Dill", 0}}},
		{"DS-01", "Crème brûlée", "dessert", 790, nil},
		{"DS-02", "Açaí bowl", "dessert", 950, []modifier{{"granola", 100}, {"no banana", 0}}},
		{"DS-03", "Kids' ice cream 🍦", "dessert", 390, []modifier{{"vanilla", 0}, {"chocolate", 0}, {"sprinkles", 50}}},
		{"DR-01", "Cola 0.5 l", "drink", 350, []modifier{{"no ice", 0}, {"light", 0}}},
		{"DR-02", "Café crème", "drink", 380, []modifier{{"oat milk", 60}, {"decaf", 0}}},
		{"DR-03", "Ayran", "drink", 320, nil},
	}
	destinations = []destination{
		{"1", "Dining room", "dine-in"}, {"2", "Terrasse", "dine-in"}, {"3", "Counter", "takeout"},
		{"4", "Drive-thru", "takeout"}, {"5", "Kerbside", "takeout"}, {"6", "Delivery", "delivery"},
	}
	sources   = []string{"pos", "kiosk", "web", "app", "drive-thru", "phone"}
	customers = []string{"Ada", "José Muñoz", "Zoë Łukasik", "Nguyễn Thị Hoa", "O'Brien", "王小明", "Müller, Tisch 4", "Ólafur Þórsson", "فاطمة"}
	streets   = []string{"12 Rue de l'Église", "Königstraße 7", "4th Ave & Pine", "1-2-3 銀座"}
	comments  = []string{"birthday 🎂, candle please", "nut allergy!", "guest is in a hurry", "ohne Nüsse", "split the bill \\ three ways", "high chair", "second course on call"}
	itemNotes = []string{"cut in half", "sauce on the side", "très cuit", "no <garnish>", "share plate"}
	alerts    = []struct{ kind, message string }{
		{"assistance", "Manager to the counter"}, {"out-of-stock", "86: Crème brûlée"}, {"rush", "Coach with 48 guests arrives"},
		{"equipment", "Fryer 2 below 160 °C"}, {"delivery", "Courier waits for order"},
	}
	employees = []employee{{"e-17", "Renée"}, {"e-204", "Thomas K."}, {"e-31", "Đorđe"}, {"e-8", "Mai"}}
	stations  = []string{"grill", "fry", "cold", "expo"}
)

func pick[T any](r *rand.Rand, of []T) T { return of[r.IntN(len(of))] }

// Message makes the i-th message in one of its versions, from 1. A later version holds the
// whole order, with what has changed since.
func (g Generator) Message(i uint64, version int) Message {
	r := g.rng(i, 0)
	id := fmt.Sprintf("%016x%08x", g.seed, i)
	date := time.Date(2026, 1, 1+int(g.seed%365), 0, 0, 0, 0, time.UTC).Format(time.DateOnly)
	if alert(r) {
		a := pick(r, alerts)
		return Message{"alert", id, 1, encode(r, alertBody{
			ID: id, Version: 1, Type: a.kind, Message: a.message, BusinessDate: date, Destination: pick(r, destinations),
			Priority: pick(r, []string{"normal", "high"}), Station: pick(r, stations), Recipients: []string{"expo", "manager on duty"},
			Software: software, Terminal: terminal(r), RaisedBy: pick(r, employees),
			Reference: g.canary + " " + pick(r, comments),
		})}
	}
	o := order{
		ID: id, Number: fmt.Sprintf("%c-%d", 'A'+rune(g.seed%26), 100+i), Version: version, BusinessDate: date,
		Source: pick(r, sources), Software: software, Terminal: terminal(r), Employee: pick(r, employees), State: "open", Destination: pick(r, destinations), Reference: g.canary,
	}
	if r.IntN(3) > 0 {
		o.Expo = 1 + r.IntN(99)
	}
	if o.Destination.ConsumptionType != "dine-in" || r.IntN(4) == 0 {
		o.Customer = &customer{Name: pick(r, customers), Phone: fmt.Sprintf("+1 555 %04d", r.IntN(10_000))}
		if o.Destination.ConsumptionType == "delivery" {
			o.Customer.Address = pick(r, streets)
		}
	}
	if r.IntN(4) == 0 {
		o.Comment = pick(r, comments)
	}
	// Mostly a few items; now and then a party.
	n := 1 + r.IntN(4)
	if r.IntN(12) == 0 {
		n += r.IntN(16)
	}
	for range n {
		o.add(r)
	}
	for v := 2; v <= version; v++ {
		o.change(g.rng(i, v))
	}
	for _, it := range o.Items {
		if it.Voided {
			continue
		}
		each := it.Price
		for _, m := range it.Modifiers {
			each += m.Price
		}
		o.Total += each * it.Quantity
	}
	return Message{"order", id, version, encode(g.rng(i, -version), o)}
}

const software = "testenv/pos 1.0"

func terminal(r *rand.Rand) string { return fmt.Sprintf("till-%d", 1+r.IntN(6)) }

func (o *order) add(r *rand.Rand) {
	d := pick(r, menu)
	it := item{ID: fmt.Sprint(len(o.Items) + 1), SKU: d.sku, Name: d.name, Quantity: 1, Price: d.price, Course: d.course}
	if r.IntN(5) == 0 {
		it.Quantity += 1 + r.IntN(4)
	}
	if o.Destination.ConsumptionType == "dine-in" {
		it.Seat = 1 + r.IntN(8)
	}
	for _, m := range d.modifiers {
		if r.IntN(3) == 0 {
			it.Modifiers = append(it.Modifiers, m)
		}
	}
	if r.IntN(6) == 0 {
		it.Comment = pick(r, itemNotes)
	}
	o.Items = append(o.Items, it)
}

// change is what an update brings.
func (o *order) change(r *rand.Rand) {
	switch r.IntN(5) {
	case 0, 1:
		o.add(r)
	case 2:
		o.Items[r.IntN(len(o.Items))].Voided = true
	case 3:
		o.Comment = pick(r, comments)
	case 4:
		o.Expo = 1 + r.IntN(99)
		o.Destination = pick(r, destinations)
	}
}

func encode(r *rand.Rand, v any) []byte {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if r.IntN(8) == 0 {
		enc.SetIndent("", "  ")
	}
	// Cannot fail: the types hold strings and numbers only.
	_ = enc.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}
