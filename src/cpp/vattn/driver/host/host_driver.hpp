// The driver of a plain Linux host (device="cpu"): pages of one memory file, mapped where they are wanted.
//
// A page is a range of the file; committing it is fallocate, mapping it is mmap(MAP_SHARED | MAP_FIXED). Every reservation has
// a window of its own in the file, as long as itself: a page made for an address takes the offset that mirrors it, so
// neighbours in memory are neighbours in the file and the kernel merges their mappings into one, whatever the order they came
// in (facts and figures: docs/host.md). Pages without a place, or whose place is taken, come from a compact region at the
// file's start. A mapping is never taken away but mapped over, with what was there before: private memory that reads as zeros,
// or none. Neither reservations nor mappings are inherited by a forked child. Thread: any; one mutex a driver.
#pragma once

#include <cstdint>
#include <memory>

#include "vattn/driver/driver.hpp"

namespace vattn {

[[nodiscard]] VATTN_API std::shared_ptr<Driver> open_host_driver();
/// Over a memory file of at most so many bytes for the windows of all reservations that live at a time: for tests, since a real
/// file's 2^63 are not easily used up.
[[nodiscard]] VATTN_API std::shared_ptr<Driver> open_host_driver_of(std::uint64_t window_bytes);

}  // namespace vattn
