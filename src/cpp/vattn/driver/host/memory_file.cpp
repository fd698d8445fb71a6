#include "vattn/driver/host/memory_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

#include "vattn/driver/host/system_error.hpp"
#include "vattn/fork.hpp"

namespace vattn::host {

MemoryFile::MemoryFile() : descriptor_(::memfd_create("vattn", MFD_CLOEXEC)) {
  if (descriptor_ < 0) {
    const int code = errno;
    throw system_error("memfd_create", code,
                       code == EMFILE || code == ENFILE ? "no file descriptor is left (RLIMIT_NOFILE): close files or raise it"
                                                        : "the kernel must allow memory files");
  }
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
  int code = 0;
  do {
    code = ::fallocate(descriptor_, 0, static_cast<off_t>(offset), static_cast<off_t>(size)) == 0 ? 0 : errno;
  } while (code == EINTR);
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
  constexpr int kMode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  if (::fallocate(descriptor_, kMode, static_cast<off_t>(offset), static_cast<off_t>(size)) != 0) {
    throw system_error("fallocate(PUNCH_HOLE)", errno, std::to_string(size) + " bytes");
  }
}

}  // namespace vattn::host
