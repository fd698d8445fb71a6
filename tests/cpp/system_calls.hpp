// System calls that fail on purpose, beneath the host driver. The tests' executable defines the C library's wrappers itself
// (system_calls.cpp), so that libvattn calls those; they make the system call unless the calling thread asked for a failure.
// Not under a sanitizer, which needs these names for itself.
// Thread: any; what is asked for holds for the thread that asks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define VATTN_SYSTEM_CALLS_FAIL 0
#else
#define VATTN_SYSTEM_CALLS_FAIL 1
#endif
#ifdef __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#undef VATTN_SYSTEM_CALLS_FAIL
#define VATTN_SYSTEM_CALLS_FAIL 0
#endif
#endif

namespace vattn::system_calls {

enum class Call : std::uint8_t { kMmap, kMunmap, kMadvise, kFallocate, kMemfdCreate };
constexpr int kCalls = 5;

/// Calls of this thread so far, failed ones included.
[[nodiscard]] int made(Call call);

/// For the scope, calls of one kind fail with an errno: from the k-th on, so many of them.
class Failing {
 public:
  Failing(Call call, int code, int times = 1, int first = 1);
  Failing(const Failing&) = delete;
  Failing& operator=(const Failing&) = delete;
  ~Failing();

  [[nodiscard]] int failed() const { return failed_; }
  /// Only calls on more bytes than that, as of a system call that lasts the longer the more it has to do.
  Failing& above(std::size_t bytes) {
    above_ = bytes;
    return *this;
  }
  /// Only calls with that mode or advice.
  Failing& of(int argument) {
    argument_ = argument;
    return *this;
  }
  /// Whether a call that is being made fails, with errno set.
  [[nodiscard]] bool strikes(Call call, std::size_t bytes, int argument) noexcept;

 private:
  Call call_;
  int code_;
  int left_;
  int until_first_;
  int failed_ = 0;
  std::size_t above_ = 0;
  int argument_ = -1;
  Failing* outer_;
};

}  // namespace vattn::system_calls
