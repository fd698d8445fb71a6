// The long form of a test: with VATTN_SOAK_MINUTES a test repeats itself, seed after seed, for its part of that time. Without
// it a test does what it does on each change, once. Where a test gets more than two minutes, set VATTN_TEST_TIMEOUT for the
// watchdog. Thread: any.
#pragma once

#include <chrono>
#include <cstdlib>

#if defined(__has_feature)
#define VATTN_HAS_FEATURE(name) __has_feature(name)
#else
#define VATTN_HAS_FEATURE(name) 0
#endif

namespace vattn {

/// With a sanitizer a test takes many times as long, and the runtime keeps memory and mappings of its own.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || VATTN_HAS_FEATURE(address_sanitizer) || \
    VATTN_HAS_FEATURE(thread_sanitizer)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// Repeats until a `part` (0 to 1) of the soak is over.
class Soak {
 public:
  explicit Soak(double part)
      : end_(std::chrono::steady_clock::now() +
             std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(part * seconds()))) {
  }

  /// Whether there is time for another round.
  [[nodiscard]] bool goes_on() const { return std::chrono::steady_clock::now() < end_; }
  /// Of the whole soak; 0 without one.
  [[nodiscard]] static double seconds() {
    const char* const minutes = std::getenv("VATTN_SOAK_MINUTES");
    return minutes == nullptr ? 0 : 60 * std::strtod(minutes, nullptr);
  }

 private:
  std::chrono::steady_clock::time_point end_;
};

}  // namespace vattn
