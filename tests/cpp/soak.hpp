// The long form of a test: with VATTN_SOAK_MINUTES a test repeats itself, seed after seed, for its part of that time. Without
// it a test does what it does on each change, once, with the same seed every time. A soak draws its first seed and prints it;
// VATTN_SOAK_SEED names it, and a run with that seed goes through the same programs. Where a test gets more than two minutes,
// set VATTN_TEST_TIMEOUT for the watchdog. Thread: any.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

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
  /// Of every random program of this process: VATTN_SOAK_SEED, else drawn and printed in a soak, else always the same.
  [[nodiscard]] static unsigned first_seed() {
    static const unsigned drawn = [] {
      if (const char* const given = std::getenv("VATTN_SOAK_SEED"))
        return static_cast<unsigned>(std::strtoul(given, nullptr, 10));
      if (seconds() <= 0) return 20261122U;
      const unsigned seed = std::random_device{}();
      std::fprintf(stderr, "soak: VATTN_SOAK_SEED=%u\n", seed);
      return seed;
    }();
    return drawn;
  }

 private:
  std::chrono::steady_clock::time_point end_;
};

}  // namespace vattn
