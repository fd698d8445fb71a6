#include "system_calls.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstddef>

namespace vattn::system_calls {
namespace {

thread_local Failing* innermost = nullptr;        // NOLINT: read by the wrappers below, which have no other way to it
thread_local std::array<int, kCalls> made_calls;  // NOLINT: likewise

}  // namespace

int made(Call call) { return made_calls[static_cast<std::size_t>(call)]; }

Failing::Failing(Call call, int code, int times, int first)
    : call_(call), code_(code), left_(times), until_first_(first), outer_(innermost) {
  innermost = this;
}

Failing::~Failing() { innermost = outer_; }

bool Failing::strikes(Call call, std::size_t bytes, int argument) noexcept {
  const bool meant = call == call_ && (above_ == 0 || bytes > above_) && (argument_ < 0 || argument == argument_);
  if (!meant) return outer_ != nullptr && outer_->strikes(call, bytes, argument);
  if (until_first_ > 1) {
    --until_first_;
    return false;
  }
  if (left_ == 0) return false;
  --left_;
  ++failed_;
  errno = code_;
  return true;
}

}  // namespace vattn::system_calls

#if VATTN_SYSTEM_CALLS_FAIL

namespace {

using vattn::system_calls::Call;

bool strikes(Call call, std::size_t bytes, int argument) noexcept {
  ++vattn::system_calls::made_calls[static_cast<std::size_t>(call)];
  return vattn::system_calls::innermost != nullptr && vattn::system_calls::innermost->strikes(call, bytes, argument);
}

}  // namespace

#define VATTN_WRAPPER extern "C" __attribute__((visibility("default")))

VATTN_WRAPPER void* mmap(void* at, std::size_t size, int protection, int flags, int file, off_t offset) noexcept {
  if (strikes(Call::kMmap, size, protection)) return MAP_FAILED;
  return reinterpret_cast<void*>(::syscall(SYS_mmap, at, size, protection, flags, file, offset));
}

VATTN_WRAPPER int munmap(void* at, std::size_t size) noexcept {
  return strikes(Call::kMunmap, size, 0) ? -1 : static_cast<int>(::syscall(SYS_munmap, at, size));
}

VATTN_WRAPPER int madvise(void* at, std::size_t size, int advice) noexcept {
  return strikes(Call::kMadvise, size, advice) ? -1 : static_cast<int>(::syscall(SYS_madvise, at, size, advice));
}

VATTN_WRAPPER int fallocate(int file, int mode, off_t offset, off_t size) {
  return strikes(Call::kFallocate, static_cast<std::size_t>(size), mode)
             ? -1
             : static_cast<int>(::syscall(SYS_fallocate, file, mode, offset, size));
}

VATTN_WRAPPER int memfd_create(const char* name, unsigned flags) noexcept {
  return strikes(Call::kMemfdCreate, 0, static_cast<int>(flags)) ? -1
                                                                 : static_cast<int>(::syscall(SYS_memfd_create, name, flags));
}

#endif
