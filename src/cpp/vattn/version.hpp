// Which vattn this is: of the library that is loaded, which may differ from the headers it was built against.
#pragma once

#include "vattn/export.hpp"

namespace vattn {

/// "0.1.0"
[[nodiscard]] VATTN_API const char* version() noexcept;

}  // namespace vattn
