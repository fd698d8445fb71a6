// From a device to its driver.
//
// Thread: any. Each call makes a driver of its own: nothing is shared between them.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "vattn/driver/driver.hpp"

namespace vattn {

struct Device {
  enum class Kind : std::uint8_t { kCpu, kCuda, kMeta };
  Kind kind = Kind::kCpu;
  int index = 0;

  bool operator==(const Device&) const = default;
};

/// "cpu", "cuda", "cuda:1" or "meta"; std::invalid_argument for anything else.
[[nodiscard]] VATTN_API Device parse_device(std::string_view text);
[[nodiscard]] VATTN_API std::string to_string(Device device);

/// The host driver, the CUDA driver (libcuda is opened here, at first use) or the null driver.
[[nodiscard]] VATTN_API std::shared_ptr<Driver> open_driver(Device device);

/// What a cache may take where the user names no limit: a share of what is free now, the rest being for everybody else.
[[nodiscard]] VATTN_API std::uint64_t default_memory_limit(Driver& driver);

}  // namespace vattn
