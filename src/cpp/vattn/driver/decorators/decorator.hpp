// A driver around a driver: forwards every verb, with a word before and after each.
//
// before() may throw, and the verb is then not called; after() is called only when the verb succeeded.
// Thread: any, if the two hooks allow it.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>

#include "vattn/driver/driver.hpp"

namespace vattn {

/// The verbs that change something, make a caller wait, or can fail when asked; drop cannot.
enum class Verb : std::uint8_t {
  kReserve,
  kReleaseRange,
  kCreate,
  kRelease,
  kMap,
  kUnmap,
  kSetAccess,
  kFillZero,
  kCopy,
  kSynchronize,
  kRecord,
  kHasPassed,
  kWait,
  kWaitOn,
  kIsCapturing
};
constexpr std::size_t kVerbs = 15;

/// Whether a verb only watches or orders work on the device, and asks for no memory.
[[nodiscard]] constexpr bool is_about_work(Verb verb) noexcept { return verb >= Verb::kSynchronize; }

[[nodiscard]] constexpr const char* name_of(Verb verb) noexcept {
  constexpr const char* kNames[kVerbs] = {"reserve", "release_range", "create",    "release", "map",
                                          "unmap",   "set_access",    "fill_zero", "copy",    "synchronize",
                                          "record",  "has_passed",    "wait",      "wait_on", "is_capturing"};
  return kNames[static_cast<std::size_t>(verb)];
}

class VATTN_API Decorator : public Driver {
 public:
  explicit Decorator(std::shared_ptr<Driver> inner) : inner_(std::move(inner)) {}

  [[nodiscard]] const DriverTraits& traits() const noexcept override { return inner_->traits(); }
  [[nodiscard]] MemoryInfo memory_info() override { return inner_->memory_info(); }
  [[nodiscard]] PageHandle home(Address at) const noexcept override { return inner_->home(at); }

  [[nodiscard]] Address reserve(std::size_t size, UnmappedReads reads) override {
    return around(Verb::kReserve, [&] { return inner_->reserve(size, reads); });
  }
  void release_range(Address base, std::size_t size) override {
    around(Verb::kReleaseRange, [&] { inner_->release_range(base, size); });
  }
  [[nodiscard]] PageHandle create(std::size_t size, Address near) override {
    return around(Verb::kCreate, [&] { return inner_->create(size, near); });
  }
  void release(PageHandle page) override {
    around(Verb::kRelease, [&] { inner_->release(page); });
  }
  void map(Address at, std::size_t size, PageHandle page) override {
    around(Verb::kMap, [&] { inner_->map(at, size, page); });
  }
  void unmap(Address at, std::size_t size) override {
    around(Verb::kUnmap, [&] { inner_->unmap(at, size); });
  }
  void set_access(Address at, std::size_t size) override {
    around(Verb::kSetAccess, [&] { inner_->set_access(at, size); });
  }
  void will_write(Address at, std::size_t size) noexcept override { inner_->will_write(at, size); }
  void fill_zero(Address at, std::size_t size) override {
    around(Verb::kFillZero, [&] { inner_->fill_zero(at, size); });
  }
  void copy(Address to, Address from, std::size_t size) override {
    around(Verb::kCopy, [&] { inner_->copy(to, from, size); });
  }
  void synchronize() override {
    around(Verb::kSynchronize, [&] { inner_->synchronize(); });
  }
  [[nodiscard]] FenceHandle record(Stream stream) override {
    return around(Verb::kRecord, [&] { return inner_->record(stream); });
  }
  [[nodiscard]] bool has_passed(FenceHandle fence) override {
    return around(Verb::kHasPassed, [&] { return inner_->has_passed(fence); });
  }
  void wait(FenceHandle fence) override {
    around(Verb::kWait, [&] { inner_->wait(fence); });
  }
  void wait_on(Stream stream, FenceHandle fence) override {
    around(Verb::kWaitOn, [&] { inner_->wait_on(stream, fence); });
  }
  void drop(FenceHandle fence) noexcept override { inner_->drop(fence); }
  [[nodiscard]] bool is_capturing(Stream stream) override {
    return around(Verb::kIsCapturing, [&] { return inner_->is_capturing(stream); });
  }

 protected:
  virtual void before(Verb /*verb*/) {}
  virtual void after(Verb /*verb*/) noexcept {}

 private:
  template <typename Call>
  auto around(Verb verb, Call&& call) -> decltype(call()) {
    before(verb);
    if constexpr (std::is_void_v<decltype(call())>) {
      call();
      after(verb);
    } else {
      auto result = call();
      after(verb);
      return result;
    }
  }

  std::shared_ptr<Driver> inner_;
};

}  // namespace vattn
