// The driver without memory (device="meta"): every rule of the verb table holds, every count is exact, and no byte exists.
//
// For planning and simulation at any size: a terabyte costs what its page table costs. Addresses are numbers and must not be
// read. Thread: any.
#pragma once

#include <memory>

#include "vattn/driver/driver.hpp"

namespace vattn {

[[nodiscard]] VATTN_API std::shared_ptr<Driver> open_null_driver();

}  // namespace vattn
