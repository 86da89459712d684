package envelope_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/kitchenbridge/kitchenbridge/pkg/envelope"
)

var (
	// Few iterations, for a quick example: a key takes 0.12 s with the default of 600,000.
	settings = envelope.Settings{Profile: envelope.A256GCM, Iterations: 1000}
	may      = time.Date(2025, 5, 1, 0, 0, 0, 0, time.UTC)
)

func exampleKey(fingerprint string, from time.Time) *envelope.Key {
	key, err := envelope.NewKey(settings, envelope.KeyConfig{
		Fingerprint: fingerprint,
		Passphrase:  "from the Portal, for " + envelope.Secret(fingerprint),
		ValidAfter:  from,
		ValidUntil:  from.AddDate(0, 1, 7),
	})
	if err != nil {
		panic(err)
	}
	return key
}

// A POS seals an order and posts it; the Kitchen reads the triple from the request and opens it.
func Example_http() {
	ring, err := envelope.NewKeyring(settings, exampleKey("7d793037a0760186574b0282f2f435e7", may))
	if err != nil {
		panic(err)
	}
	now := may.Add(time.Hour)

	kitchen := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
		if err != nil {
			return
		}
		sealed, err := envelope.FromHTTP(r.Header, body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		order, err := ring.Accept(nil, sealed, now, 2*time.Minute)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Printf("the Kitchen got %s\n", order)
	}))
	defer kitchen.Close()

	key, err := ring.Primary(now)
	if err != nil {
		panic(err)
	}
	sealed, err := key.Seal([]byte(`{"_id":"65f1","items":["Burger"]}`))
	if err != nil {
		panic(err)
	}
	request, err := http.NewRequest("POST", kitchen.URL+"/order", bytes.NewReader(sealed.Message))
	if err != nil {
		panic(err)
	}
	request.Header.Set("Content-Type", "application/json")
	sealed.SetHTTP(request.Header)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		panic(err)
	}
	response.Body.Close()
	fmt.Println(response.StatusCode)
	// Output:
	// the Kitchen got {"_id":"65f1","items":["Burger"]}
	// 200
}

// A door finds the key by the fingerprint that a message names, and tells apart why it refuses one.
func ExampleKeyring_Accept() {
	june := may.AddDate(0, 1, 0)
	previous, current := exampleKey("previous", may), exampleKey("current", june)
	ring, err := envelope.NewKeyring(settings, previous, current)
	if err != nil {
		panic(err)
	}
	foreign := exampleKey("foreign", may)

	try := func(key *envelope.Key, now time.Time) {
		message, err := key.AppendSeal(nil, []byte(`{"_id":"65f1"}`))
		if err != nil {
			panic(err)
		}
		sealed, err := envelope.ParseTriple(message, 1<<20)
		if err != nil {
			panic(err)
		}
		order, err := ring.Accept(nil, sealed, now, 2*time.Minute)
		switch {
		case errors.Is(err, envelope.ErrUnknownFingerprint):
			fmt.Println(key.Fingerprint(), "is unknown: fetch the site's keys again, then answer errorCode 3")
		case errors.Is(err, envelope.ErrKeyNotValid):
			fmt.Println(key.Fingerprint(), "is not valid now: answer errorCode 3")
		case err != nil:
			fmt.Println("answer errorCode 2:", err)
		default:
			fmt.Printf("%s opened %s\n", key.Fingerprint(), order)
		}
	}
	try(previous, june.AddDate(0, 0, 3)) // the validities overlap by a week
	try(current, june.AddDate(0, 0, 3))
	try(previous, june.AddDate(0, 0, 8))
	try(foreign, june)
	// Output:
	// previous opened {"_id":"65f1"}
	// current opened {"_id":"65f1"}
	// previous is not valid now: answer errorCode 3
	// foreign is unknown: fetch the site's keys again, then answer errorCode 3
}

// An edge tags what it sends over the broker; a bridge verifies the tag before it delivers.
func ExampleBinding_VerifyEvent() {
	lane, err := envelope.NewLaneKey(bytes.Repeat([]byte{1}, 32)) // random, in real life
	if err != nil {
		panic(err)
	}
	bindingKey, err := envelope.NewBindingKey("b1", bytes.Repeat([]byte{2}, 32))
	if err != nil {
		panic(err)
	}
	binding, err := envelope.NewBinding("store-0113", lane, bindingKey)
	if err != nil {
		panic(err)
	}
	sealed, err := exampleKey("7d793037a0760186574b0282f2f435e7", may).Seal([]byte(`{"_id":"65f1"}`))
	if err != nil {
		panic(err)
	}

	event := envelope.Event{
		Site: "store-0113", Kind: "order", Edge: "edge-1", Epoch: "01jt3z", From: 42, Seq: 42,
		ID:       binding.Lane().MessageID("store-0113", "till-1", "order", "the POS's Idempotency-Key"),
		Accepted: may.UnixMilli(), Deadline: may.Add(10 * time.Minute).UnixMilli(),
		Order: binding.Lane().Order("65f1"), Via: "hub", Triple: sealed,
	}
	tag := binding.Current().TagEvent(&event) // travels beside the event, with the id of its key

	fmt.Println("as sent:", binding.VerifyEvent(&event, "b1", tag))
	event.Deadline += time.Hour.Milliseconds()
	fmt.Println("tampered with:", errors.Is(binding.VerifyEvent(&event, "b1", tag), envelope.ErrTag))
	// Output:
	// as sent: <nil>
	// tampered with: true
}
