// The mapper: one thread a cache, which maps pages before a step needs them (vAttention's overlap of allocation with compute).
//
// It keeps every group in use mapped up to its `ahead`, the most urgent first, one group at a time. When all are, it keeps one
// free group mapped up to the holder's `warm_target` for the next request, and gives up what is above a lowered limit as its
// fences pass. It takes only pages that nobody has: pooled ones, and new ones within the budget. A failure leaves everything as
// it was and is tried again, after 10 ms at first and at most a second; no room is tried again when something changed. It never
// runs Python, never spins, and sleeps until it is woken.
// Thread: made, stopped and destroyed by the holder's owner, with the pool's lock free. In a forked child there is no such
// thread: the object must be left alone, not destroyed.
#pragma once

#include <chrono>
#include <thread>

#include "vattn/memory/page_pool.hpp"

namespace vattn {

class VATTN_API Mapper {
 public:
  /// Error where the system has no thread to give.
  Mapper(PagePool& pool, Holder& holder, bool zero_fill);
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;
  Mapper(Mapper&&) = delete;
  Mapper& operator=(Mapper&&) = delete;
  ~Mapper() { stop(); }

  /// Ends the thread after the call of the driver it is in.
  void stop() noexcept;

  /// Waits until the mapper has done what it can for now.
  static void settle(PagePool& pool, Holder& holder);

 private:
  struct Task {
    bool any = false;
    std::size_t group = 0;
    Extent target{};
  };

  void run() noexcept;
  [[nodiscard]] Task most_urgent() const noexcept;
  [[nodiscard]] Task next_to_warm() const noexcept;
  /// True: something was done, look again.
  bool work(std::unique_lock<std::mutex>& lock);
  bool grow(std::unique_lock<std::mutex>& lock, std::size_t group, const Extent& target);
  bool shrink_to_limit(std::unique_lock<std::mutex>& lock);

  PagePool& pool_;
  Holder& holder_;
  bool zero_fill_;
  bool failed_ = false;
  std::chrono::milliseconds pause_{0};
  std::thread thread_;
};

}  // namespace vattn
