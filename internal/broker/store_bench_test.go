package broker

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func benchStore(b *testing.B, sync string) *Store {
	cfg := storeIn(b.TempDir())
	cfg.MaxBytes, cfg.Sync = 16<<30, sync
	return openedStore(b, cfg)
}

// BenchmarkStoreAppend is one record of the size of an event, or of 64; fsync is the floor
// of the first: as many bytes written and synced.
func BenchmarkStoreAppend(b *testing.B) {
	for _, events := range []int{1, 16, 64} {
		record := bytes.Repeat(storeRecord(1), events)
		b.Run(fmt.Sprintf("events=%d", events), func(b *testing.B) {
			s := benchStore(b, syncAlways)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Append(b.Context(), record); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N*events)/b.Elapsed().Seconds(), "events/s")
		})
		// The other way to sync several events once: an atomic batch, a message for each.
		b.Run(fmt.Sprintf("events=%d/batch", events), func(b *testing.B) {
			s := benchStore(b, syncAlways)
			js, err := jetstream.New(s.now.nc)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{
				Name: "BATCH", Subjects: []string{"batch"}, AllowAtomicPublish: true, MaxBytes: 16 << 30,
				Discard: jetstream.DiscardNew, Storage: jetstream.FileStorage,
			}); err != nil {
				b.Fatal(err)
			}
			event, n := storeRecord(1), 0
			b.ReportAllocs()
			for b.Loop() {
				n++
				for i := 1; i <= events; i++ {
					m := nats.NewMsg("batch")
					m.Data = event
					m.Header["Nats-Batch-Id"] = []string{fmt.Sprint(n)}
					m.Header["Nats-Batch-Sequence"] = []string{fmt.Sprint(i)}
					if i < events {
						if err := s.now.nc.PublishMsg(m); err != nil {
							b.Fatal(err)
						}
						continue
					}
					m.Header["Nats-Batch-Commit"] = []string{"1"}
					reply, err := s.now.nc.RequestMsg(m, storeTimeout)
					if err != nil || bytes.Contains(reply.Data, []byte("error")) {
						b.Fatalf("%v: %s", err, reply.Data)
					}
				}
			}
			b.ReportMetric(float64(b.N*events)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

// BenchmarkStoreFloor writes and syncs what a record has, without a store.
func BenchmarkStoreFloor(b *testing.B) {
	f, err := openSide(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.close() })
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

// BenchmarkStoreAppendInterval is an append without its fsync.
func BenchmarkStoreAppendInterval(b *testing.B) {
	s := benchStore(b, syncInterval)
	record := storeRecord(1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Append(b.Context(), record); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkStoreRead reads small records; an operation is one record.
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

// BenchmarkStoreOpen opens a store of 100 MB, which is read whole.
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
