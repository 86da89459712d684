package broker

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func benchStore(b *testing.B, sync string) *Store {
	cfg := storeIn(b.TempDir())
	cfg.MaxBytes, cfg.Sync = 16<<30, sync
	return openedStore(b, cfg)
}

// batches returns what stores events together the other way: as an atomic batch, a message
// for each.
func batches(b *testing.B, s *Store) (store func(events [][]byte)) {
	nc := s.now.nc
	js, err := jetstream.New(nc)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{
		Name: "BATCH", Subjects: []string{"batch"}, AllowAtomicPublish: true, MaxBytes: 16 << 30,
		Discard: jetstream.DiscardNew, Storage: jetstream.FileStorage,
	}); err != nil {
		b.Fatal(err)
	}
	n := 0
	return func(events [][]byte) {
		n++
		for i, event := range events {
			m := &nats.Msg{Subject: "batch", Data: event, Header: nats.Header{
				"Nats-Batch-Id":       {strconv.Itoa(n)},
				"Nats-Batch-Sequence": {strconv.Itoa(i + 1)},
			}}
			if i < len(events)-1 {
				if err := nc.PublishMsg(m); err != nil {
					b.Fatal(err)
				}
				continue
			}
			m.Header["Nats-Batch-Commit"] = []string{"1"}
			reply, err := nc.RequestMsg(m, storeTimeout)
			if err != nil || bytes.Contains(reply.Data, []byte("error")) {
				b.Fatalf("%v: %s", err, reply.Data)
			}
		}
	}
}

// packed returns what stores events together as one record.
func packed(b *testing.B, s *Store) (store func(events [][]byte)) {
	return func(events [][]byte) {
		if _, err := s.Append(b.Context(), bytes.Join(events, nil)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStoreProducers has 64 producers of events of 1.5 KB, each waiting for the sync of
// its own before the next; what waits is stored together. An operation is an event.
func BenchmarkStoreProducers(b *testing.B) {
	for _, way := range []struct {
		name string
		make func(*testing.B, *Store) func([][]byte)
	}{{"packed", packed}, {"batch", batches}} {
		b.Run(way.name, func(b *testing.B) {
			store := way.make(b, benchStore(b, syncAlways))
			const producers = 64
			in := make(chan chan struct{}, producers)
			var committer, all sync.WaitGroup
			commits := 0
			committer.Go(func() {
				var events [][]byte
				var waiting []chan struct{}
				for done := range in {
					waiting = append(waiting[:0], done)
					for more := true; more && len(waiting) < producers; {
						select {
						case done, ok := <-in:
							if more = ok; ok {
								waiting = append(waiting, done)
							}
						default:
							more = false
						}
					}
					events = events[:0]
					for range waiting {
						events = append(events, storeRecord(1))
					}
					store(events)
					commits++
					for _, done := range waiting {
						done <- struct{}{}
					}
				}
			})
			b.ResetTimer()
			for p := range producers {
				n := b.N / producers
				if p < b.N%producers {
					n++
				}
				all.Go(func() {
					done := make(chan struct{}, 1)
					for range n {
						in <- done
						<-done
					}
				})
			}
			all.Wait()
			close(in)
			committer.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			b.ReportMetric(float64(b.N)/float64(commits), "events/sync")
		})
	}
}

// BenchmarkStoreAppend stores n events of 1.5 KB with one sync; an operation is a sync.
func BenchmarkStoreAppend(b *testing.B) {
	for _, n := range []int{1, 16, 64} {
		events := make([][]byte, n)
		for i := range events {
			events[i] = storeRecord(uint64(i))
		}
		b.Run(fmt.Sprintf("events=%d/packed", n), func(b *testing.B) {
			store := packed(b, benchStore(b, syncAlways))
			b.ReportAllocs()
			for b.Loop() {
				store(events)
			}
		})
		b.Run(fmt.Sprintf("events=%d/batch", n), func(b *testing.B) {
			store := batches(b, benchStore(b, syncAlways))
			b.ReportAllocs()
			for b.Loop() {
				store(events)
			}
		})
	}
}

// BenchmarkStoreFloor writes and syncs as much as one event, without a store.
func BenchmarkStoreFloor(b *testing.B) {
	f, err := openSide(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = f.close() })
	record := storeRecord(1)
	var at int64
	for b.Loop() {
		if _, err := f.f.WriteAt(record, at); err != nil {
			b.Fatal(err)
		}
		if err := f.f.Sync(); err != nil {
			b.Fatal(err)
		}
		at += int64(len(record))
	}
}

// BenchmarkStoreAppendUnsynced is what an append costs beside its sync.
func BenchmarkStoreAppendUnsynced(b *testing.B) {
	s := benchStore(b, syncInterval)
	record := storeRecord(1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Append(b.Context(), record); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStoreRead reads records of 200 bytes; an operation is one.
func BenchmarkStoreRead(b *testing.B) {
	s := benchStore(b, syncInterval)
	for range 20_000 {
		if _, err := s.Append(b.Context(), make([]byte, 200)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	b.ResetTimer()
	for read := 0; read < b.N; {
		if err := s.Read(context.Background(), 0, func(uint64, []byte) bool { read++; return read < b.N }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
}

// BenchmarkStoreOpen closes and opens a store of 100 MB.
func BenchmarkStoreOpen(b *testing.B) {
	cfg := storeIn(b.TempDir())
	cfg.MaxBytes, cfg.Sync = 1<<30, syncInterval
	s := openedStore(b, cfg)
	for range 1000 {
		if _, err := s.Append(b.Context(), bytes.Repeat(storeRecord(1), 66)); err != nil {
			b.Fatal(err)
		}
	}
	closeStore(b, s)
	for b.Loop() {
		closeStore(b, openedStore(b, cfg))
	}
}

// BenchmarkStorePurge purges 1,000 records of 1.5 KB at a time.
func BenchmarkStorePurge(b *testing.B) {
	s := benchStore(b, syncInterval)
	for b.Loop() {
		b.StopTimer()
		for range 1000 {
			if _, err := s.Append(b.Context(), storeRecord(1)); err != nil {
				b.Fatal(err)
			}
		}
		b.StartTimer()
		if err := s.Purge(s.State().Last - 100); err != nil {
			b.Fatal(err)
		}
	}
}
