// A fence, owned: a mark in a stream that is forgotten with its last reference.
//
// Shared, because one who waits for it holds no lock, and the page group it guards may meanwhile be given to another request.
// Thread: any.
#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <vector>

#include "vattn/driver/driver.hpp"

namespace vattn {

class Fence {
 public:
  Fence(std::shared_ptr<Driver> driver, Stream stream) : driver_(std::move(driver)), handle_(driver_->record(stream)) {}
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;
  Fence(Fence&&) = delete;
  Fence& operator=(Fence&&) = delete;
  ~Fence() { driver_->drop(handle_); }

  /// Whether the work before it has finished. A device that cannot be asked has not said so.
  [[nodiscard]] bool has_passed() noexcept {
    if (passed_.load(std::memory_order_acquire)) return true;
    try {
      if (!driver_->has_passed(handle_)) return false;
    } catch (...) {
      return false;
    }
    passed_.store(true, std::memory_order_release);
    return true;
  }

  /// Waits on the host.
  void wait() {
    if (passed_.load(std::memory_order_acquire)) return;
    driver_->wait(handle_);
    passed_.store(true, std::memory_order_release);
  }

  /// What is started on `stream` from now on waits, on the device.
  void hold_back(Stream stream) { driver_->wait_on(stream, handle_); }

 private:
  std::shared_ptr<Driver> driver_;
  FenceHandle handle_;
  std::atomic<bool> passed_{false};
};

using Fences = std::vector<std::shared_ptr<Fence>>;

}  // namespace vattn
