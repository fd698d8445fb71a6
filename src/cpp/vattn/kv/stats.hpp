// What a cache has, in bytes and counts: plain numbers, taken under the cache's lock.
#pragma once

#include <cstdint>

namespace vattn {

struct CacheStats {
  std::uint64_t reserved_bytes = 0;  ///< addresses
  std::uint64_t created_bytes = 0;   ///< physical memory; always mapped + pooled + retired
  std::uint64_t mapped_bytes = 0;    ///< a page mapped at several places counts once
  std::uint64_t pooled_bytes = 0;
  std::uint64_t retired_bytes = 0;
  std::uint64_t limit_bytes = 0;
  std::uint64_t used_bytes = 0;         ///< bytes that hold tokens
  std::uint64_t available_bytes = 0;    ///< what a step could still map, by the budget
  std::uint64_t reclaimable_bytes = 0;  ///< mapped beyond need, given up under pressure
  std::uint64_t active_slots = 0;
  std::uint64_t warm_slots = 0;
  std::uint64_t driver_calls = 0;   ///< calls of the driver that ask for something, since the cache was made
  std::uint64_t pages_created = 0;  ///< since the cache was made
  std::uint64_t pages_reused = 0;   ///< taken from the pool instead of created
  std::uint64_t map_wait_ns = 0;    ///< time that step waited for pages that were not there yet
};

}  // namespace vattn
