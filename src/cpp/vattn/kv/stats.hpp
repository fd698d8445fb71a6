// What a cache has, in bytes and counts: plain numbers, taken under the cache's lock and its pool's.
#pragma once

#include <cstdint>

#include "vattn/export.hpp"

namespace vattn {

struct CacheStats {
  std::uint64_t reserved_bytes = 0;     ///< addresses
  std::uint64_t created_bytes = 0;      ///< physical memory; always mapped + pooled + retired
  std::uint64_t mapped_bytes = 0;       ///< a page mapped at several places counts once
  std::uint64_t pooled_bytes = 0;       ///< mapped nowhere; of the whole pool, where it is shared
  std::uint64_t retired_bytes = 0;      ///< given up, and not yet known to be out of use
  std::uint64_t limit_bytes = 0;        ///< of the whole pool
  std::uint64_t used_bytes = 0;         ///< bytes that hold tokens
  std::uint64_t available_bytes = 0;    ///< what a step could still have, by the budget, whoever holds it now
  std::uint64_t reclaimable_bytes = 0;  ///< of the mapped ones: warm and look-ahead, given up under pressure
  std::uint64_t active_slots = 0;
  std::uint64_t warm_slots = 0;      ///< free slots with memory
  std::uint64_t driver_calls = 0;    ///< calls that asked the driver for memory or addresses, since the cache was made
  std::uint64_t pages_created = 0;   ///< since the cache was made
  std::uint64_t pages_reused = 0;    ///< taken from the pool instead of created
  std::uint64_t map_wait_ns = 0;     ///< time that step waited for pages that were not there yet
  std::uint64_t warm_bytes = 0;      ///< of the reclaimable ones: in free slots
  std::uint64_t prompts = 0;         ///< first steps of a request
  std::uint64_t warm_prompts = 0;    ///< of these, found all their memory mapped
  std::uint64_t reused_prompts = 0;  ///< had no page created for them
  std::uint64_t steps_waited = 0;    ///< steps, of prompts or not, that had to wait for a page
};

}  // namespace vattn
