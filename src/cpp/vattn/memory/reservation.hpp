// A range of virtual addresses, owned: reserved when made, given back when destroyed.
//
// Unmap everything in it first. The destructor does not throw; release() is for those who want to hear why it failed.
// Thread: none of its own.
#pragma once

#include <exception>
#include <utility>

#include "vattn/driver/driver.hpp"

namespace vattn {

class Reservation {
 public:
  Reservation(Driver& driver, std::size_t size, UnmappedReads reads)
      : driver_(&driver), base_(driver.reserve(size, reads)), size_(size) {}
  Reservation(Reservation&& other) noexcept
      : driver_(std::exchange(other.driver_, nullptr)), base_(other.base_), size_(other.size_) {}
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  Reservation& operator=(Reservation&&) = delete;
  ~Reservation() {
    try {
      release();
    } catch (...) {  // NOLINT(bugprone-empty-catch)
      // Nobody is left to tell; whoever wants to know called release().
    }
  }

  [[nodiscard]] Address base() const noexcept { return base_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  /// Gives the addresses back now. Throws what the driver throws, and the addresses are then lost to the process.
  void release() {
    if (driver_ == nullptr) return;
    std::exchange(driver_, nullptr)->release_range(base_, size_);
  }

  /// Whether there are addresses to give back.
  [[nodiscard]] bool is_held() const noexcept { return driver_ != nullptr; }

  /// Leaves the addresses as they are, for ever: something in them could not be unmapped, or they are another process's.
  void abandon() noexcept { driver_ = nullptr; }

 private:
  Driver* driver_;
  Address base_;
  std::size_t size_;
};

}  // namespace vattn
