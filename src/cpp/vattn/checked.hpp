// Arithmetic that says when it leaves 64 bits, and range checks that name the parameter and the value.
//
// Thread: any; pure functions.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "vattn/export.hpp"

namespace vattn {

/// a * b, or std::overflow_error naming what was computed.
[[nodiscard]] inline std::int64_t checked_mul(std::int64_t a, std::int64_t b, const char* what) {
  std::int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) {
    throw std::overflow_error(std::string(what) + ": " + std::to_string(a) + " x " + std::to_string(b) + " leaves 64 bits");
  }
  return result;
}

[[nodiscard]] inline std::int64_t checked_add(std::int64_t a, std::int64_t b, const char* what) {
  std::int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) {
    throw std::overflow_error(std::string(what) + ": " + std::to_string(a) + " + " + std::to_string(b) + " leaves 64 bits");
  }
  return result;
}

/// Throws std::invalid_argument unless low <= value <= high.
inline void check_between(const char* parameter, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(parameter) + "=" + std::to_string(value) + " must be between " +
                                std::to_string(low) + " and " + std::to_string(high));
  }
}

/// Throws std::out_of_range unless 0 <= index < count.
inline void check_index(const char* parameter, std::int64_t index, std::int64_t count) {
  if (index < 0 || index >= count) {
    throw std::out_of_range(std::string(parameter) + "=" + std::to_string(index) + " is out of range: 0 to " +
                            std::to_string(count - 1));
  }
}

[[nodiscard]] constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) noexcept { return a / b + (a % b != 0 ? 1 : 0); }

}  // namespace vattn
