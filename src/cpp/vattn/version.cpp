#include "vattn/version.hpp"

namespace vattn {

const char* version() noexcept { return VATTN_VERSION; }

}  // namespace vattn
