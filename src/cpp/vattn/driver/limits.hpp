// What a driver allows, checked for whoever makes tensors on it: page sizes and how many addresses there are.
//
// Promise: std::invalid_argument or std::overflow_error naming the parameter and the value, before anything is made.
// Thread: any; pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "vattn/driver/driver.hpp"

namespace vattn {

/// Every mapped page costs the process some 200 bytes of its own. Only accounting can come near this many.
constexpr std::uint64_t kMostPages = std::uint64_t{1} << 24;

/// From here on asking what is free costs little beside the growth, and spares a long growth that could only be undone again.
constexpr std::uint64_t kAskFirstBytes = std::uint64_t{64} << 20;

/// The page size asked for, or the driver's default.
[[nodiscard]] inline std::int64_t choose_page_size(const std::optional<std::int64_t>& wanted, const DriverTraits& driver) {
  const auto granularity = static_cast<std::int64_t>(driver.granularity);
  const std::int64_t size = wanted.value_or(static_cast<std::int64_t>(driver.default_page_size));
  if (size >= granularity && size % granularity == 0) return size;
  throw std::invalid_argument("page_size=" + std::to_string(size) + " must be a multiple of the " + driver.name +
                              " driver's granularity, " + std::to_string(granularity));
}

/// Processes address 2^47 bytes; accounting has no such bound. `what` names the parameters whose product `bytes` is.
inline void check_address_space(const char* what, std::int64_t bytes, const DriverTraits& driver) {
  constexpr std::int64_t kAddressSpace = std::int64_t{1} << 47;
  if (!driver.has_memory || bytes <= kAddressSpace) return;
  throw std::overflow_error(std::string(what) + " comes to " + std::to_string(bytes) + " bytes of addresses, more than the " +
                            std::to_string(kAddressSpace) + " there are: ask for less");
}

}  // namespace vattn
