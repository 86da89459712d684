package broker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// storeIn is a store in dir that a test may open again and again.
func storeIn(dir string) StoreConfig {
	return StoreConfig{Dir: filepath.Join(dir, "out"), KeyFile: filepath.Join(dir, "out.key"), MaxBytes: 64 << 20, Log: quiet}
}

func openedStore(t testing.TB, cfg StoreConfig) *Store {
	t.Helper()
	s, err := OpenStore(deadline(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// storeRecord is the record that the tests store as the n-th: 1.5 KB that tell n.
func storeRecord(n uint64) []byte {
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	b := make([]byte, 1500)
	r.Read(b)
	binary.BigEndian.PutUint64(b, n)
	return b
}

// fill appends the records [from, to], which must get these sequences.
func fill(t testing.TB, s *Store, from, to uint64) {
	t.Helper()
	for n := from; n <= to; n++ {
		if seq, err := s.Append(deadline(t), storeRecord(n)); err != nil || seq != n {
			t.Fatalf("record %d: sequence %d, error %v", n, seq, err)
		}
	}
}

// sequences reads the store, checks every record, and returns which there are.
func sequences(t testing.TB, s *Store, from uint64) []uint64 {
	t.Helper()
	var seqs []uint64
	err := s.Read(deadline(t), from, func(seq uint64, record []byte) bool {
		if !bytes.Equal(record, storeRecord(seq)) {
			t.Errorf("record %d is another than was appended", seq)
		}
		seqs = append(seqs, seq)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return seqs
}

func wantSequences(t testing.TB, got []uint64, first, last uint64) {
	t.Helper()
	for i, seq := range got {
		if seq != first+uint64(i) {
			t.Fatalf("record %d at place %d, want %d", seq, i, first+uint64(i))
		}
	}
	if uint64(len(got)) != last+1-first {
		t.Fatalf("%d records, want %d to %d", len(got), first, last)
	}
}

func TestStoreGivesBackWhatWasAppendedAlsoWhenOpenedAgain(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	s := openedStore(t, cfg)
	if st := s.State(); st.First != 1 || st.Last != 0 || st.Lost || st.Err != nil {
		t.Errorf("a new store is %+v", st)
	}
	wantSequences(t, sequences(t, s, 0), 1, 0)
	fill(t, s, 1, 700) // more than a batch of reading
	wantSequences(t, sequences(t, s, 0), 1, 700)
	wantSequences(t, sequences(t, s, 699), 699, 700)
	wantSequences(t, sequences(t, s, 701), 701, 700)
	before := s.State()
	closeStore(t, s)

	s = openedStore(t, cfg)
	wantSequences(t, sequences(t, s, 0), 1, 700)
	if st := s.State(); st.First != 1 || st.Last != 700 || st.Lost || st.Err != nil || st.Bytes != before.Bytes {
		t.Errorf("opened again it is %+v, was %+v", st, before)
	}
	fill(t, s, 701, 701)
	large := make([]byte, storeMaxRecord)
	rand.NewChaCha8([32]byte{}).Read(large)
	if seq, err := s.Append(deadline(t), large); err != nil || seq != 702 {
		t.Fatalf("the largest record: sequence %d, error %v", seq, err)
	}
	for _, record := range [][]byte{nil, append(large, 0)} {
		if _, err := s.Append(deadline(t), record); !errors.Is(err, ErrInvalid) {
			t.Errorf("a record of %d bytes: %v", len(record), err)
		}
	}
	if err := s.Read(deadline(t), 702, func(_ uint64, record []byte) bool {
		if !bytes.Equal(record, large) {
			t.Error("the largest record is another now")
		}
		return false
	}); err != nil {
		t.Error(err)
	}
	if s.Durability() != "fsync" {
		t.Errorf("durability %q", s.Durability())
	}
	err := filepath.WalkDir(cfg.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if bytes.Contains(raw, storeRecord(701)[100:200]) {
			t.Errorf("%s holds a record in clear", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func TestStorePurgesItsFrontOnly(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	s := openedStore(t, cfg)
	fill(t, s, 1, 800)
	for _, upTo := range []uint64{10, 5, 600} {
		if err := s.Purge(upTo); err != nil {
			t.Fatal(err)
		}
	}
	size := s.State().Bytes
	wantSequences(t, sequences(t, s, 0), 601, 800)
	closeStore(t, s)
	s = openedStore(t, cfg)
	if st := s.State(); st.First > 601 || st.Last != 800 || st.Lost {
		t.Fatalf("opened again it is %+v", st)
	}
	if err := s.Purge(600); err != nil {
		t.Fatal(err)
	}
	if st := s.State(); st.First != 601 || st.Bytes != size {
		t.Errorf("state %+v, want first 601, bytes %d", st, size)
	}
	if err := s.Purge(1 << 40); err != nil { // all
		t.Fatal(err)
	}
	if st := s.State(); st.First != 801 || st.Last != 800 || st.Bytes != 0 {
		t.Errorf("all purged: %+v", st)
	}
	closeStore(t, s)
	s = openedStore(t, cfg)
	if st := s.State(); st.Last != 800 || st.Lost {
		t.Errorf("all purged and opened again: %+v", st)
	}
	fill(t, s, 801, 801)
}

func TestStoreIsFullAtItsBoundAndTakesRecordsAgainAfterAPurge(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	cfg.MaxBytes = 2 << 20
	s := openedStore(t, cfg)
	var n uint64 = 1
	for ; ; n++ {
		_, err := s.Append(deadline(t), storeRecord(n))
		if errors.Is(err, ErrStoreFull) && !errors.Is(err, ErrUnknown) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	st := s.State()
	if !errors.Is(st.Err, ErrStoreFull) || st.Bytes > cfg.MaxBytes || st.Bytes < cfg.MaxBytes-2000 {
		t.Errorf("full: %+v", st)
	}
	wantSequences(t, sequences(t, s, 0), 1, n-1)
	if err := s.Purge(10); err != nil {
		t.Fatal(err)
	}
	fill(t, s, n, n+5)
	if st := s.State(); st.Err != nil {
		t.Errorf("after the purge: %+v", st)
	}
	closeStore(t, s)
	// A smaller bound removes nothing.
	cfg.MaxBytes = 2*storeMaxRecord + 1
	s = openedStore(t, cfg)
	wantSequences(t, sequences(t, s, 11), 11, n+5)
}

func TestStoreLeavesTheDiskItsReserve(t *testing.T) {
	t.Parallel()
	free, total := int64(1<<30), int64(100<<30)
	s, err := openStore(deadline(t), storeIn(t.TempDir()), func(string) (int64, int64) { return free, total })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	look := func(f, of int64) {
		s.mu.Lock()
		free, total, s.diskAt = f, of, time.Time{}
		s.mu.Unlock()
	}
	for _, row := range []struct {
		free, total     int64
		append, reserve bool // taken
	}{
		{33 << 20, 100 << 30, true, true},
		{31 << 20, 100 << 30, false, true},
		{7 << 20, 100 << 30, false, false},
		{3 << 20, 100 << 20, true, true}, // a small disk
		{1 << 20, 100 << 20, false, true},
		{-1, -1, true, true}, // not known
	} {
		look(row.free, row.total)
		_, err := s.Append(deadline(t), []byte("order"))
		if row.append && err != nil || !row.append && !errors.Is(err, ErrStoreFull) {
			t.Errorf("%d of %d free: %v", row.free, row.total, err)
		}
		if got := s.State(); (got.Err == nil) != row.append || row.free >= 0 && got.DiskFree > row.free {
			t.Errorf("%d of %d free: state %+v", row.free, row.total, got)
		}
		look(row.free, row.total)
		_, err = s.AppendReserved(deadline(t), []byte("end"))
		if row.reserve && err != nil || !row.reserve && !errors.Is(err, ErrStoreFull) {
			t.Errorf("%d of %d free, reserve: %v", row.free, row.total, err)
		}
	}
}

func TestStoreIsRefusedWithoutItsKey(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name string
		harm func(key string) error
		want string
	}{
		{"missing", os.Remove, "is missing"},
		{"another one", func(key string) error {
			return os.WriteFile(key, []byte(base64.StdEncoding.EncodeToString(make([]byte, 32))+"\n"), 0o600)
		}, "is not the one"},
		{"cut off", func(key string) error { return os.WriteFile(key, []byte("abc\n"), 0o600) }, "not 32 bytes in base64"},
		{"empty", func(key string) error { return os.Truncate(key, 0) }, "first line is empty"},
		{"readable by others", func(key string) error { return os.Chmod(key, 0o644) }, "chmod 600"},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			cfg := storeIn(t.TempDir())
			s := openedStore(t, cfg)
			if info, err := os.Stat(cfg.KeyFile); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("key file: %v, %v", info.Mode(), err)
			}
			fill(t, s, 1, 3)
			closeStore(t, s)
			key, err := os.ReadFile(cfg.KeyFile)
			if err != nil {
				t.Fatal(err)
			}
			if err := row.harm(cfg.KeyFile); err != nil {
				t.Fatal(err)
			}
			if s, err := OpenStore(deadline(t), cfg); err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("opened as %v with error %v, want %q", s, err, row.want)
			} else if strings.Contains(err.Error(), strings.TrimSpace(string(key))) {
				t.Error("the error tells the key")
			}
			_ = os.Remove(cfg.KeyFile)
			if err := os.WriteFile(cfg.KeyFile, key, 0o600); err != nil {
				t.Fatal(err)
			}
			wantSequences(t, sequences(t, openedStore(t, cfg), 0), 1, 3)
		})
	}
}

func TestStoreIsRefusedWhenWhatDescribesItIsDamaged(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"meta.inf", "meta.key", "meta.sum"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := storeIn(t.TempDir())
			s := openedStore(t, cfg)
			fill(t, s, 1, 3)
			closeStore(t, s)
			path := filepath.Join(filepath.Dir(blocksDir(cfg.Dir)), name)
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, whole[:len(whole)/2], 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err := OpenStore(deadline(t), cfg); err == nil || !strings.Contains(err.Error(), "is damaged") {
				t.Fatalf("opened as %v with error %v", s, err)
			}
			if err := os.WriteFile(path, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			wantSequences(t, sequences(t, openedStore(t, cfg), 0), 1, 3)
		})
	}
}

func TestStoreBelongsToOneProcess(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	s := openedStore(t, cfg)
	if _, err := OpenStore(deadline(t), cfg); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("opened twice: %v", err)
	}
	closeStore(t, s)
	if _, err := s.Append(deadline(t), []byte("x")); !errors.Is(err, ErrStoreUnwell) {
		t.Errorf("append to a closed store: %v", err)
	}
	if err := s.Purge(1); err != nil {
		t.Errorf("purge of nothing: %v", err)
	}
	if st := s.State(); !errors.Is(st.Err, ErrStoreUnwell) {
		t.Errorf("closed: %+v", st)
	}
	closeStore(t, s)
}

func TestStoreConfigReportsEveryMistake(t *testing.T) {
	t.Parallel()
	_, err := OpenStore(deadline(t), StoreConfig{Sync: "sometimes"})
	for _, want := range []string{"dir: ", "key_file: ", `sync: "sometimes"`, "max_bytes: "} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want %q in it", err, want)
		}
	}
}

func TestStoreIsReadAndPurgedWhileItIsWritten(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	cfg.Sync = syncInterval
	s := openedStore(t, cfg)
	if s.Durability() != "interval" {
		t.Errorf("durability %q", s.Durability())
	}
	const n = 2000
	purges, done := make(chan uint64, n), make(chan struct{})
	var others sync.WaitGroup
	others.Go(func() {
		for over := false; !over; {
			select {
			case <-done:
				over = true // after a last time
			default:
			}
			var before uint64
			if err := s.Read(t.Context(), 0, func(seq uint64, record []byte) bool {
				// What was purged meanwhile may be missing, nothing else.
				if before > 0 && seq != before+1 && seq > s.State().First {
					t.Errorf("record %d after %d, first is %d", seq, before, s.State().First)
				}
				before = seq
				return bytes.Equal(record, storeRecord(seq)) || t.Failed()
			}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	others.Go(func() {
		for upTo := range purges {
			if err := s.Purge(upTo); err != nil {
				t.Error(err)
			}
		}
	})
	for last := uint64(100); last <= n; last += 100 {
		fill(t, s, last-99, last)
		purges <- last - 100
	}
	close(purges)
	close(done)
	others.Wait()
	if st := s.State(); st.First != n-99 {
		t.Errorf("in the end: %+v", st)
	}
	closeStore(t, s)
	s = openedStore(t, cfg)
	if st := s.State(); st.Last != n || st.Lost {
		t.Errorf("opened again: %+v", st)
	}
}

func TestStoreRecordOfUnknownOutcomeIsStoredOnceWhenItIsAppendedAgain(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	s := openedStore(t, cfg)
	unknown, never := 0, 0
	for n := uint64(1); n <= 400; n++ {
		for {
			ctx, cancel := context.WithTimeout(deadline(t), time.Duration(rand.IntN(400))*time.Microsecond)
			seq, err := s.Append(ctx, storeRecord(n))
			cancel()
			if err == nil && seq != n {
				t.Fatalf("record %d has sequence %d", n, seq)
			}
			if err == nil {
				break
			}
			switch {
			case errors.Is(err, ErrUnknown):
				if unknown++; unknown == 1 {
					if _, err := s.Append(deadline(t), []byte("another")); !errors.Is(err, ErrInvalid) {
						t.Errorf("another record while the outcome is unknown: %v", err)
					}
				}
			case errors.Is(err, ErrStoreUnwell):
				never++
			default:
				t.Fatal(err)
			}
		}
	}
	if unknown == 0 {
		t.Error("no outcome was unknown: nothing was tested")
	}
	t.Logf("unknown %d times, never asked %d times", unknown, never)
	wantSequences(t, sequences(t, s, 0), 1, 400)
	closeStore(t, s)
	wantSequences(t, sequences(t, openedStore(t, cfg), 0), 1, 400)
}

func TestStoreSaysWhenTheDiskHasLostRecords(t *testing.T) {
	t.Parallel()
	origin := storeIn(t.TempDir())
	origin.MaxBytes = 20 << 20 // blocks of 4 MiB
	s := openedStore(t, origin)
	record := make([]byte, 220<<10)
	const n = 22 // two blocks
	at := func(seq uint64) []byte {
		binary.BigEndian.PutUint64(record, seq)
		return record
	}
	for seq := uint64(1); seq <= n; seq++ {
		if _, err := s.Append(deadline(t), at(seq)); err != nil {
			t.Fatalf("record %d: %v", seq, err)
		}
		if seq == n/2 {
			if err := s.Purge(5); err != nil {
				t.Fatal(err)
			}
		}
	}
	closeStore(t, s)
	found, err := blockFiles(blocksDir(origin.Dir))
	if err != nil || len(found) != 2 {
		t.Fatalf("blocks %v, error %v", found, err)
	}
	flip := func(path string, at int64) error {
		raw, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if at < 0 {
			at += int64(len(raw))
		}
		raw[at] ^= 0x20
		return os.WriteFile(path, raw, 0o600)
	}
	cut := func(path string, n int64) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, info.Size()-n)
	}
	type rows []struct {
		name string
		harm func(block func(n int) string, dir string) error
	}
	all := rows{
		{"a bit of the first block's begin", func(b func(int) string, _ string) error { return flip(b(0), 30) }},
		{"the first length in the first block", func(b func(int) string, _ string) error { return flip(b(0), 2) }},
		{"a bit of the last record", func(b func(int) string, _ string) error { return flip(b(1), -30) }},
		{"the end of the last block", func(b func(int) string, _ string) error { return cut(b(1), 5) }},
		{"the end of the first block", func(b func(int) string, _ string) error { return cut(b(0), 350<<10) }},
		{"the first block", func(b func(int) string, _ string) error { return os.Remove(b(0)) }},
		{"the last block's content", func(b func(int) string, _ string) error { return os.Truncate(b(1), 0) }},
		{"the key of the last block", func(b func(int) string, _ string) error {
			return flip(strings.TrimSuffix(b(1), ".blk")+".key", 30)
		}},
		{"the key of the first block", func(b func(int) string, _ string) error {
			return os.Remove(strings.TrimSuffix(b(0), ".blk") + ".key")
		}},
		{"all", func(_ func(int) string, dir string) error { return os.RemoveAll(filepath.Join(dir, "jetstream")) }},
	}
	for _, row := range all {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(filepath.Dir(origin.Dir))); err != nil {
				t.Fatal(err)
			}
			cfg := storeIn(dir)
			cfg.MaxBytes = origin.MaxBytes
			if err := os.Chmod(cfg.KeyFile, 0o600); err != nil {
				t.Fatal(err)
			}
			found, err := blockFiles(blocksDir(cfg.Dir))
			if err != nil {
				t.Fatal(err)
			}
			numbers := slices.Sorted(maps.Keys(found))
			if err := row.harm(func(n int) string { return found[numbers[n]] }, cfg.Dir); err != nil {
				t.Fatal(err)
			}
			s, err := OpenStore(deadline(t), cfg)
			if err != nil {
				if !strings.Contains(err.Error(), "is damaged") {
					t.Error(err)
				}
				return
			}
			if st := s.State(); !st.Lost {
				t.Errorf("nothing is lost, it says: %+v", st)
			}
			there := 0
			if err := s.Read(deadline(t), 0, func(seq uint64, record []byte) bool {
				there++
				if seq != binary.BigEndian.Uint64(record) {
					t.Errorf("record %d is that of %d", seq, binary.BigEndian.Uint64(record))
				}
				return true
			}); err != nil {
				t.Error(err)
			}
			if there >= n-5 {
				t.Errorf("all %d records are there", there)
			}
			closeStore(t, s)
			s = openedStore(t, cfg)
			if !s.State().Lost {
				t.Error("not told again, although nothing was appended")
			}
			if _, err := s.Append(deadline(t), []byte("the loss is known")); err != nil {
				t.Fatal(err)
			}
			if s.State().Lost {
				t.Error("lost after an append")
			}
			closeStore(t, s)
			s = openedStore(t, cfg)
			if st := s.State(); st.Lost {
				t.Errorf("told twice: %+v", st)
			}
			if _, err := s.Append(deadline(t), []byte("x")); err != nil {
				t.Error(err)
			}
		})
	}
}

// storeChildEnv makes TestStoreChild the other process of the tests below.
const storeChildEnv = "KB_TEST_STORE_CHILD"

// TestStoreChild appends until it is killed, when it is told to, and says what was acknowledged.
func TestStoreChild(t *testing.T) {
	dir := os.Getenv(storeChildEnv)
	if dir == "" {
		return // not the other process
	}
	s, err := OpenStore(t.Context(), storeIn(dir))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("store-last", s.State().Last, s.State().Lost)
	for n := s.State().Last + 1; ; n++ {
		seq, err := s.Append(t.Context(), storeRecord(n))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("store-has", seq)
	}
}

// storeChild starts the other process on the store in dir.
func storeChild(t *testing.T, dir string) (*exec.Cmd, *bufio.Scanner) {
	t.Helper()
	child := exec.Command(os.Args[0], "-test.run=^TestStoreChild$", "-test.v")
	child.Env = append(os.Environ(), storeChildEnv+"="+dir)
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	child.Stderr = io.Discard
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = child.Process.Kill() })
	return child, bufio.NewScanner(out)
}

func TestStoreHasEveryAcknowledgedRecordOfAKilledProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var acknowledged uint64
	for range 5 {
		child, says := storeChild(t, dir)
		enough := acknowledged + 50 + rand.Uint64N(300)
		for says.Scan() {
			if n, ok := strings.CutPrefix(says.Text(), "store-has "); ok {
				acknowledged, _ = strconv.ParseUint(n, 10, 64)
			}
			if acknowledged == enough {
				if err := child.Process.Kill(); err != nil { // SIGKILL; what it still says is read on
					t.Fatal(err)
				}
			}
		}
		_ = child.Wait() // killed
		if acknowledged < enough {
			t.Fatalf("the other process ended by itself after %d records", acknowledged)
		}
		s := openedStore(t, storeIn(dir))
		st := s.State()
		if st.Last < acknowledged || st.Last > acknowledged+2 || st.Lost {
			t.Fatalf("%d acknowledged, the store is %+v", acknowledged, st)
		}
		wantSequences(t, sequences(t, s, 0), 1, st.Last)
		closeStore(t, s)
		acknowledged = st.Last
	}
}
