package broker

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// breakBlocks puts another file in the place of each open block of the store: what the server
// then writes to them meets that file's errors.
func breakBlocks(t *testing.T, s *Store, by string) {
	t.Helper()
	other, err := os.OpenFile(by, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	broken := 0
	for _, fd := range fds {
		path, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if err != nil || !strings.HasPrefix(path, s.cfg.Dir) || !strings.HasSuffix(path, ".blk") {
			continue
		}
		n := 0
		for _, c := range fd.Name() {
			n = 10*n + int(c-'0')
		}
		if err := syscall.Dup3(int(other.Fd()), n, syscall.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		broken++
	}
	if broken == 0 {
		t.Fatal("the store has no open block")
	}
}

// rested waits until the store may be opened again.
func rested(t *testing.T, s *Store) {
	t.Helper()
	s.writer.Lock()
	s.tried = s.tried.Add(-reopenEvery)
	s.writer.Unlock()
}

func TestStoreOpensItselfAgainAfterAWriteThatFailed(t *testing.T) {
	t.Parallel()
	for _, row := range []struct{ name, by string }{
		{"the disk is full", "/dev/full"}, // write: ENOSPC
		{"fsync fails", "/dev/null"},      // write: well; fsync: EINVAL; the block has nothing of it
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			cfg := storeIn(t.TempDir())
			s := openedStore(t, cfg)
			fill(t, s, 1, 20)

			breakBlocks(t, s, row.by)
			_, err := s.Append(deadline(t), storeRecord(21))
			if !errors.Is(err, ErrUnknown) || errors.Is(err, ErrStoreUnwell) { // opened less than a second ago
				t.Fatalf("a write failed: %v", err)
			}
			if st := s.State(); !errors.Is(st.Err, ErrStoreUnwell) || st.Last != 20 {
				t.Errorf("failed: %+v", st)
			}
			if err := s.Purge(3); !errors.Is(err, ErrStoreUnwell) {
				t.Errorf("purge: %v", err)
			}
			if _, err := s.Append(deadline(t), storeRecord(21)); !errors.Is(err, ErrUnknown) {
				t.Errorf("at once again: %v", err)
			}
			rested(t, s)
			if _, err := s.Append(deadline(t), storeRecord(21)); !errors.Is(err, ErrStoreUnwell) || errors.Is(err, ErrUnknown) {
				t.Errorf("the outcome: %v, want certainly not stored", err)
			}
			if st := s.State(); st.Lost || st.Last != 20 || st.Err != nil {
				t.Errorf("opened again: %+v", st)
			}
			fill(t, s, 21, 30)

			breakBlocks(t, s, row.by)
			rested(t, s)
			if _, err := s.Append(deadline(t), storeRecord(31)); !errors.Is(err, ErrStoreUnwell) || errors.Is(err, ErrUnknown) {
				t.Errorf("the second failure: %v, want an outcome at once", err)
			}
			fill(t, s, 31, 40)
			wantSequences(t, sequences(t, s, 0), 1, 40)
			closeStore(t, s)
			s = openedStore(t, cfg)
			if st := s.State(); st.Lost {
				t.Errorf("in the end: %+v", st)
			}
			wantSequences(t, sequences(t, s, 0), 1, 40)
		})
	}
}

func TestStoreFindsARecordThatWasStoredBeforeItFailed(t *testing.T) {
	t.Parallel()
	s := openedStore(t, storeIn(t.TempDir()))
	fill(t, s, 1, 5)
	// Stored, and the acknowledgement lost together with the server.
	if _, _, err := s.now.append(deadline(t), 1000, storeRecord(6), 5); err != nil {
		t.Fatal(err)
	}
	s.writer.Lock()
	s.fail(storeRecord(6), errors.New("injected"))
	s.writer.Unlock()
	if _, err := s.Append(deadline(t), storeRecord(6)); !errors.Is(err, ErrUnknown) {
		t.Errorf("before it may be opened: %v", err)
	}
	rested(t, s)
	fill(t, s, 6, 10)
	wantSequences(t, sequences(t, s, 0), 1, 10)
}

func TestStoreTakesNothingWhenRecordsAreLostWhileItRuns(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	s := openedStore(t, cfg)
	fill(t, s, 1, 10)
	s.writer.Lock()
	s.fail(storeRecord(11), errors.New("injected"))
	s.writer.Unlock()
	found, err := blockFiles(blocksDir(cfg.Dir))
	if err != nil || len(found) != 1 {
		t.Fatalf("blocks %v, error %v", found, err)
	}
	for _, path := range found {
		if err := os.Truncate(path, 4000); err != nil {
			t.Fatal(err)
		}
	}
	rested(t, s)
	if _, err := s.Append(deadline(t), storeRecord(11)); !errors.Is(err, ErrUnknown) {
		t.Errorf("records are lost: %v", err)
	}
	if st := s.State(); !st.Lost || !errors.Is(st.Err, ErrStoreUnwell) || !strings.Contains(st.Err.Error(), "restart") {
		t.Errorf("records are lost: %+v", st)
	}
	closeStore(t, s)
	s = openedStore(t, cfg)
	if st := s.State(); !st.Lost || st.Err != nil {
		t.Errorf("opened anew: %+v", st)
	}
}

func TestStoreIsReadOnWhileItIsOpenedAgain(t *testing.T) {
	t.Parallel()
	s := openedStore(t, storeIn(t.TempDir()))
	fill(t, s, 1, 1000)
	var seqs []uint64
	if err := s.Read(deadline(t), 0, func(seq uint64, _ []byte) bool {
		if seqs = append(seqs, seq); seq == 100 {
			s.writer.Lock()
			s.fail(storeRecord(1001), errors.New("injected"))
			s.tried = time.Time{}
			s.writer.Unlock()
			if _, err := s.Append(deadline(t), storeRecord(1001)); !errors.Is(err, ErrStoreUnwell) {
				t.Error(err)
			}
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	wantSequences(t, seqs, 1, 1000)
}

func TestStoreIsRefusedOnADiskThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	cfg := storeIn(t.TempDir())
	s := openedStore(t, cfg)
	fill(t, s, 1, 5)
	closeStore(t, s)
	// A folder in the place of the index cannot be removed while it has something in it.
	index := filepath.Join(blocksDir(cfg.Dir), "index.db")
	if err := os.Remove(index); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(index, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(deadline(t), cfg); err == nil || !strings.Contains(err.Error(), "cannot be written") {
		t.Errorf("opened: %v", err)
	}
	if err := os.RemoveAll(index); err != nil {
		t.Fatal(err)
	}
	wantSequences(t, sequences(t, openedStore(t, cfg), 0), 1, 5)
}
