// Counts the calls of each verb, and what is alive because of them.
//
// Every cache wraps its driver in one: stats().driver_calls is its total. Tests compare alive() before and after.
// Thread: any; the counters are relaxed atomics, exact once the threads that call have finished.
#pragma once

#include <array>
#include <atomic>

#include "vattn/driver/decorators/decorator.hpp"

namespace vattn {

class VATTN_API CountingDriver final : public Decorator {
 public:
  using Decorator::Decorator;

  /// Calls begun of one verb, those that failed included.
  [[nodiscard]] std::uint64_t calls(Verb verb) const noexcept { return begun_[index(verb)].load(std::memory_order_relaxed); }

  /// Calls begun of all verbs but synchronize and those of fences, which ask for no memory.
  [[nodiscard]] std::uint64_t calls() const noexcept {
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < kVerbs; ++i) {
      if (!is_about_work(static_cast<Verb>(i))) total += begun_[i].load(std::memory_order_relaxed);
    }
    return total;
  }

  struct Alive {
    std::int64_t pages = 0;         ///< created and not released
    std::int64_t reservations = 0;  ///< reserved and not released
    std::int64_t fences = 0;        ///< recorded and not dropped
    bool operator==(const Alive&) const = default;
  };
  [[nodiscard]] Alive alive() const noexcept {
    return {done(Verb::kCreate) - done(Verb::kRelease), done(Verb::kReserve) - done(Verb::kReleaseRange),
            done(Verb::kRecord) - dropped_.load(std::memory_order_relaxed)};
  }

  void drop(FenceHandle fence) noexcept override {
    dropped_.fetch_add(1, std::memory_order_relaxed);
    Decorator::drop(fence);
  }

 protected:
  void before(Verb verb) override { begun_[index(verb)].fetch_add(1, std::memory_order_relaxed); }
  void after(Verb verb) noexcept override { done_[index(verb)].fetch_add(1, std::memory_order_relaxed); }

 private:
  static constexpr std::size_t index(Verb verb) noexcept { return static_cast<std::size_t>(verb); }
  [[nodiscard]] std::int64_t done(Verb verb) const noexcept { return done_[index(verb)].load(std::memory_order_relaxed); }

  std::array<std::atomic<std::uint64_t>, kVerbs> begun_{};
  std::array<std::atomic<std::int64_t>, kVerbs> done_{};
  std::atomic<std::int64_t> dropped_{0};
};

}  // namespace vattn
