#include "vattn/driver/host/memory_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <vector>

#include "vattn/driver/host/system_error.hpp"
#include "vattn/fork.hpp"

namespace vattn::host {

namespace {

// Never to be executed, which a hardened system may insist on (vm.memfd_noexec); kernels before 6.3 do not know the flag.
constexpr unsigned kNoExec = 0x0008U;

// At most so much in one call: some kernels undo a fallocate that a signal interrupts, so that one which lasts longer than a
// profiler's tick would never end. What earlier calls committed stays. A huge page is not cut, so that it can be one.
constexpr std::size_t kPiece = std::size_t{2} << 20;
constexpr std::size_t kSmallestPiece = 64 << 10;
constexpr int kMostTries = 1000;

int make_file() noexcept {
  const int file = ::memfd_create("vattn", MFD_CLOEXEC | kNoExec);
  return file >= 0 || errno != EINVAL ? file : ::memfd_create("vattn", MFD_CLOEXEC);
}

int try_fallocate(int file, int mode, std::uint64_t offset, std::size_t size) noexcept {
  return ::fallocate(file, mode, static_cast<off_t>(offset), static_cast<off_t>(size)) == 0 ? 0 : errno;
}

constexpr int kPunch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

int try_punch(int file, std::uint64_t offset, std::size_t size) noexcept {
  int code = EINTR;
  for (int tries = 0; code == EINTR && tries < kMostTries; ++tries) code = try_fallocate(file, kPunch, offset, size);
  return code;
}

}  // namespace

MemoryFile::MemoryFile() : descriptor_(make_file()) {
  if (descriptor_ < 0) {
    const int code = errno;
    throw system_error("memfd_create", code,
                       code == EMFILE || code == ENFILE ? "no file descriptor is left (RLIMIT_NOFILE): close files or raise it"
                                                        : "the kernel must allow memory files");
  }
  // Where nothing is yet, so that it takes nothing.
  const int code = try_punch(descriptor_, 0, static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)));
  gives_back_ = code != EOPNOTSUPP && code != ENOSYS;
  try {
    close_on_fork(descriptor_);
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

MemoryFile::~MemoryFile() {
  if (!generation_.is_current()) return;  // closed at fork(); the number may be another file's by now
  forget_on_fork(descriptor_);
  ::close(descriptor_);
}

namespace {

std::uint64_t size_limit() noexcept {
  rlimit limit{};
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) {
    return static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  }
  return limit.rlim_cur;
}

}  // namespace

bool MemoryFile::may_grow_to(std::uint64_t end) const noexcept {
  return end <= end_.load(std::memory_order_relaxed) || end <= size_limit();
}

void MemoryFile::allocate(std::uint64_t offset, std::size_t size, bool may_grow) const {
  if (!may_grow && !may_grow_to(offset + size)) {
    const std::uint64_t limit = size_limit();
    throw OutOfMemoryError("create: RLIMIT_FSIZE (" + std::to_string(limit) +
                               " bytes) also bounds memory files, and this page would cross it: raise it (ulimit -f)",
                           size, offset < limit ? limit - offset : 0, limit);
  }
  std::size_t piece = std::min(size, kPiece);
  std::size_t done = 0;
  int code = 0;
  for (int tries = 0; done < size;) {
    code = try_fallocate(descriptor_, 0, offset + done, std::min(piece, size - done));
    if (code == 0) {
      done += std::min(piece, size - done);
      tries = 0;
    } else if (code == EINTR && ++tries < kMostTries) {
      piece = std::max(piece / 2, kSmallestPiece);
    } else {
      break;
    }
  }
  if (code != 0 && done != 0) static_cast<void>(try_punch(descriptor_, offset, done));
  if (code == ENOSPC || code == ENOMEM) {
    throw OutOfMemoryError("create: fallocate of " + std::to_string(size) + " bytes: the system has no memory left", size, 0,
                           0);
  }
  if (code != 0) throw system_error("fallocate", code, std::to_string(size) + " bytes");
  std::uint64_t end = end_.load(std::memory_order_relaxed);
  while (end < offset + size && !end_.compare_exchange_weak(end, offset + size, std::memory_order_relaxed)) {
  }
}

void MemoryFile::punch(std::uint64_t offset, std::size_t size) const {
  const int code = gives_back_ ? try_punch(descriptor_, offset, size) : EOPNOTSUPP;
  if (code != 0) throw system_error("fallocate(PUNCH_HOLE)", code, std::to_string(size) + " bytes");
}

void MemoryFile::empty() noexcept {
  if (::ftruncate(descriptor_, 0) == 0) end_.store(0, std::memory_order_relaxed);
}

void MemoryFile::clear(std::uint64_t offset, std::size_t size) const {
  if (gives_back_) return punch(offset, size);
  // Behind the end there is nothing to clear, and a write there could meet RLIMIT_FSIZE, whose signal ends the process.
  const std::uint64_t end = end_.load(std::memory_order_relaxed);
  size = end > offset ? static_cast<std::size_t>(std::min<std::uint64_t>(size, end - offset)) : 0;
  if (size == 0) return;
  const std::vector<char> zeros(std::min(size, kPiece));
  for (std::size_t done = 0; done < size;) {
    const std::size_t wanted = std::min(zeros.size(), size - done);
    const ssize_t got = ::pwrite(descriptor_, zeros.data(), wanted, static_cast<off_t>(offset + done));
    if (got < 0 && errno != EINTR) throw system_error("pwrite", errno, std::to_string(size) + " bytes");
    if (got > 0) done += static_cast<std::size_t>(got);
  }
}

}  // namespace vattn::host
