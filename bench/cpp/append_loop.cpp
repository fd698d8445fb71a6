// How fast can bytes be put into fresh memory with the system calls that GrowableTensor makes? A library that the benchmark
// loads into its own process, so that both are what the kernel does for the same process.
//
// A memory file mapped page by page behind a reservation: for each piece of 1 MiB one fallocate and one mmap a page of 64 KiB,
// two madvise for the run (not for a child; populate), and one memcpy of the piece. Thread: any; each call has memory of its
// own.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr std::size_t kPage = std::size_t{64} << 10;
constexpr std::size_t kPiece = std::size_t{1} << 20;
constexpr int kPopulateWrite = 23;                       // MADV_POPULATE_WRITE, which older C libraries do not name
constexpr std::size_t kHugePage = std::size_t{2} << 20;  // the library's reservations start on one

bool append_piece(int file, char* at, std::size_t from, const char* piece) {
  for (std::size_t page = from; page < from + kPiece; page += kPage) {
    if (::fallocate(file, 0, static_cast<off_t>(page), kPage) != 0) return false;
  }
  for (std::size_t page = from; page < from + kPiece; page += kPage) {
    void* got = ::mmap(at + page, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, static_cast<off_t>(page));
    if (got == MAP_FAILED) return false;
  }
  if (::madvise(at + from, kPiece, MADV_DONTFORK) != 0) return false;
  static_cast<void>(::madvise(at + from, kPiece, kPopulateWrite));  // a hint: kernels before 5.14 do not know it
  std::memcpy(at + from, piece, kPiece);
  return true;
}

}  // namespace

extern "C" {

/// What append_loop made: give it to append_loop_free.
struct AppendLoop {
  void* reservation;
  std::size_t bytes;
  int file;
};

/// Appends the piece (1 MiB) `pieces` times to fresh memory. False where a system call failed; errno says how.
[[gnu::visibility("default")]] bool append_loop(const char* piece, std::size_t pieces, AppendLoop* made) {
  made->bytes = pieces * kPiece + kHugePage;
  made->file = ::memfd_create("bench", MFD_CLOEXEC);
  made->reservation = ::mmap(nullptr, made->bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made->file < 0 || made->reservation == MAP_FAILED) return false;
  const std::size_t over = reinterpret_cast<std::uintptr_t>(made->reservation) % kHugePage;
  char* const at = static_cast<char*>(made->reservation) + (over == 0 ? 0 : kHugePage - over);
  if (::madvise(at, pieces * kPiece, MADV_DONTFORK) != 0) return false;
  for (std::size_t number = 0; number < pieces; ++number) {
    if (!append_piece(made->file, at, number * kPiece, piece)) return false;
  }
  return true;
}

[[gnu::visibility("default")]] void append_loop_free(const AppendLoop* made) {
  ::munmap(made->reservation, made->bytes);
  ::close(made->file);
}
}
