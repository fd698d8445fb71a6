// Writes down every call as a line of text, so that a failure can be read, and replayed (tests/fuzz/trace_replay.hpp).
//
//     vattn-trace 1 dropped=0
//     reserve 8192 zeros = 7f0000000000
//     create 4096 7f0000000000 = 100000000
//     map 7f0000000000 4096 100000000
//     set_access 7f0000000000 4096 ! DriverError 12 ENOMEM
//
// A verb, its arguments in the order of driver.hpp, then "= result" or "! what was thrown". Sizes are decimal; addresses,
// pages, streams and fences are hexadecimal. home() and memory_info() change nothing and are left out. Kept are the last `most`
// lines, and the header says how many were dropped; with a stream each line goes there at once, none is kept. Promise: a line
// stands behind those of all calls that it depends on. For that, calls are made one at a time, but for those that may wait for
// the device: a driver for finding bugs, not for measuring. A call whose line cannot be kept for want of memory succeeds all
// the same, and counts as dropped. Thread: any; one mutex. Read the stream when no call is under way.
#pragma once

#include <cstdio>
#include <deque>
#include <mutex>
#include <ostream>
#include <string>

#include "vattn/driver/decorators/decorator.hpp"

namespace vattn {

class VATTN_API TraceDriver final : public Decorator {
 public:
  static constexpr std::size_t kMostLines = std::size_t{1} << 20;

  /// Keeps the last `most` lines.
  explicit TraceDriver(std::shared_ptr<Driver> inner, std::size_t most = kMostLines)
      : Decorator(std::move(inner)), most_(most) {}
  /// Writes to `out`, which outlives this driver.
  TraceDriver(std::shared_ptr<Driver> inner, std::ostream& out) : Decorator(std::move(inner)), out_(&out) {
    out << header(0) << std::flush;
  }

  /// What is kept, with its header.
  [[nodiscard]] std::string text() const {
    const std::lock_guard lock(mutex_);
    std::string all = header(dropped_);
    for (const std::string& line : lines_) all += line;
    return all;
  }
  /// Lines that are not kept any more.
  [[nodiscard]] std::uint64_t dropped() const {
    const std::lock_guard lock(mutex_);
    return dropped_;
  }

  [[nodiscard]] Address reserve(std::size_t size, UnmappedReads reads) override {
    const char* const what = reads == UnmappedReads::kZeros ? " zeros" : " fault";
    return noted(Verb::kReserve, [&] { return decimal(size) + what; }, [&] { return Decorator::reserve(size, reads); });
  }
  void release_range(Address base, std::size_t size) override {
    noted(Verb::kReleaseRange, [&] { return hex(base) + decimal(size); }, [&] { Decorator::release_range(base, size); });
  }
  [[nodiscard]] PageHandle create(std::size_t size, Address near) override {
    return noted(Verb::kCreate, [&] { return decimal(size) + hex(near); }, [&] { return Decorator::create(size, near); });
  }
  void release(PageHandle page) override {
    noted(Verb::kRelease, [&] { return hex(page); }, [&] { Decorator::release(page); });
  }
  void map(Address at, std::size_t size, PageHandle page) override {
    noted(Verb::kMap, [&] { return hex(at) + decimal(size) + hex(page); }, [&] { Decorator::map(at, size, page); });
  }
  void unmap(Address at, std::size_t size) override {
    noted(Verb::kUnmap, [&] { return hex(at) + decimal(size); }, [&] { Decorator::unmap(at, size); });
  }
  void set_access(Address at, std::size_t size) override {
    noted(Verb::kSetAccess, [&] { return hex(at) + decimal(size); }, [&] { Decorator::set_access(at, size); });
  }
  void fill_zero(Address at, std::size_t size) override {
    noted(Verb::kFillZero, [&] { return hex(at) + decimal(size); }, [&] { Decorator::fill_zero(at, size); });
  }
  void copy(Address to, Address from, std::size_t size) override {
    noted(Verb::kCopy, [&] { return hex(to) + hex(from) + decimal(size); }, [&] { Decorator::copy(to, from, size); });
  }
  void synchronize() override {
    noted(Verb::kSynchronize, [] { return std::string(); }, [&] { Decorator::synchronize(); });
  }
  [[nodiscard]] FenceHandle record(Stream stream) override {
    return noted(Verb::kRecord, [&] { return hex(stream); }, [&] { return Decorator::record(stream); });
  }
  [[nodiscard]] bool has_passed(FenceHandle fence) override {
    return noted(Verb::kHasPassed, [&] { return hex(fence); }, [&] { return Decorator::has_passed(fence); });
  }
  void wait(FenceHandle fence) override {
    noted(Verb::kWait, [&] { return hex(fence); }, [&] { Decorator::wait(fence); });
  }
  void wait_on(Stream stream, FenceHandle fence) override {
    noted(Verb::kWaitOn, [&] { return hex(stream) + hex(fence); }, [&] { Decorator::wait_on(stream, fence); });
  }
  void drop(FenceHandle fence) noexcept override {
    const std::lock_guard lock(mutex_);
    Decorator::drop(fence);
    keep([&] { return "drop" + hex(fence) + "\n"; });
  }
  [[nodiscard]] bool is_capturing(Stream stream) override {
    return noted(Verb::kIsCapturing, [&] { return hex(stream); }, [&] { return Decorator::is_capturing(stream); });
  }

 private:
  static std::string header(std::uint64_t dropped) { return "vattn-trace 1 dropped=" + std::to_string(dropped) + "\n"; }
  static std::string decimal(std::uint64_t value) { return " " + std::to_string(value); }
  static std::string hex(std::uint64_t value) {
    char text[24];
    std::snprintf(text, sizeof text, " %llx", static_cast<unsigned long long>(value));
    return text;
  }
  /// Those that wait for work, which another thread may have to end, through this driver.
  static constexpr bool may_wait(Verb verb) noexcept { return verb == Verb::kSynchronize || verb == Verb::kWait; }

  static std::string thrown(const std::exception& error) {
    if (const auto* failed = dynamic_cast<const DriverError*>(&error)) {
      return " ! DriverError " + std::to_string(failed->code) + " " + failed->name;
    }
    if (dynamic_cast<const OutOfMemoryError*>(&error) != nullptr) return " ! OutOfMemoryError";
    if (dynamic_cast<const ClosedError*>(&error) != nullptr) return " ! ClosedError";
    return dynamic_cast<const std::invalid_argument*>(&error) != nullptr ? " ! invalid_argument" : " ! other";
  }

  template <typename Arguments, typename Call>
  auto noted(Verb verb, Arguments&& arguments, Call&& call) -> decltype(call()) {
    std::unique_lock lock(mutex_, std::defer_lock);
    if (!may_wait(verb)) lock.lock();
    const auto line = [&](auto&& end) {
      if (!lock.owns_lock()) lock.lock();
      keep([&] { return name_of(verb) + arguments() + end() + "\n"; });
    };
    try {
      if constexpr (std::is_void_v<decltype(call())>) {
        call();
        line([] { return ""; });
      } else {
        const auto result = call();
        line([&] { return " =" + hex(result); });
        return result;
      }
    } catch (const std::exception& error) {
      line([&] { return thrown(error); });
      throw;
    }
  }

  /// With the lock. Nothing that goes wrong here is the caller's.
  template <typename Make>
  void keep(Make&& make) noexcept {
    try {
      const std::string line = make();
      if (out_ != nullptr) {
        *out_ << line << std::flush;
        return;
      }
      lines_.push_back(line);
      if (lines_.size() <= most_) return;
      lines_.pop_front();
    } catch (...) {  // NOLINT(bugprone-empty-catch): counted below
    }
    ++dropped_;
  }

  mutable std::mutex mutex_;
  std::ostream* out_ = nullptr;
  std::size_t most_ = 0;
  std::deque<std::string> lines_;
  std::uint64_t dropped_ = 0;
};

}  // namespace vattn
