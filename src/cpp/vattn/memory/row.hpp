// The page table of one row: the pages behind the front of a range of addresses, first to last without a gap.
//
// A row holds handles for mapped pages alone: an empty row costs the same whatever it could grow to. Of the mapped pages a
// prefix is accessible; they differ while somebody takes the tail away, and after a driver refused to undo a growth or to
// unmap. Thread: guarded by the lock of the pool; once its holder has left the pool, by whoever owns it.
#pragma once

#include <cstdint>
#include <vector>

#include "vattn/driver/driver.hpp"

namespace vattn {

struct Row {
  explicit Row(Address at) noexcept : base(at) {}

  Address base;
  std::vector<PageHandle> pages{};
  std::uint32_t accessible = 0;  ///< so many of them, from the front
  std::uint32_t used = 0;        ///< so many may hold what a request wrote before it gave them up
};

}  // namespace vattn
