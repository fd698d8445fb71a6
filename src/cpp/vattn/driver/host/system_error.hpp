// Turns errno into a DriverError: the call, the code, its name.
// Thread: any.
#pragma once

#include <cstring>
#include <string>

#include "vattn/error.hpp"

namespace vattn::host {

[[nodiscard]] inline DriverError system_error(const char* call, int code, const std::string& detail) {
  const char* name = ::strerrorname_np(code);
  return DriverError(call, code, name != nullptr ? name : "errno", detail);
}

}  // namespace vattn::host
