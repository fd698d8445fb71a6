// How much memory this process can still take before the kernel would kill it.
//
// fallocate does not fail in a full memory cgroup or on a full host: the kernel kills instead. So the host driver asks here
// first, and keeps a reserve. The smallest of MemAvailable and what each memory cgroup above the process has left counts.
// Reading the files costs some 50 us, so one reading is good for a fraction of what it found and for a tenth of a second; near
// the end every page is checked. Others can take memory in between: the kernel's killer cannot be ruled out. Where no file says
// what is left (no /proc), only the bounds that can be read hold.
// Thread: none of its own; the driver that owns it locks.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

#include "vattn/driver/driver.hpp"
#include "vattn/driver/host/cgroups.hpp"

namespace vattn::host {

class Headroom {
 public:
  /// `root` is where /proc and /sys are looked for: "" but in tests.
  explicit Headroom(std::string root = "") : root_(std::move(root)), cgroups_(root_) {}

  /// Throws OutOfMemoryError when `size` more bytes would go into the reserve; else counts them as taken.
  void take(std::size_t size);

  /// A fresh reading, reserve taken off. Where nothing bounds it and /proc/meminfo does not say, `unknown` says why.
  /// DriverError where no file descriptor is left to read with.
  [[nodiscard]] MemoryInfo read();

 private:
  std::string root_;
  Cgroups cgroups_;
  std::string tightest_;      ///< which bound the last reading found, for the message
  std::uint64_t credit_ = 0;  ///< bytes that may still be taken on the last reading
  std::chrono::steady_clock::time_point read_at_{};
};

}  // namespace vattn::host
