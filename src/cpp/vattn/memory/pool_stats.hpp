// What a pool has, and who holds it: plain numbers, taken under the pool's lock.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "vattn/export.hpp"

namespace vattn {

struct MemberStats {
  std::string name;                     ///< "KVCache-1": the kind, and the order of joining
  std::uint64_t mapped_bytes = 0;       ///< retired ones not counted
  std::uint64_t retired_bytes = 0;      ///< given up, and not yet known to be out of use
  std::uint64_t reclaimable_bytes = 0;  ///< of the mapped ones: warm and look-ahead, given up under pressure
};

struct PoolStats {
  std::uint64_t created_bytes = 0;  ///< always mapped + pooled + retired
  std::uint64_t mapped_bytes = 0;
  std::uint64_t pooled_bytes = 0;
  std::uint64_t retired_bytes = 0;
  std::uint64_t limit_bytes = 0;
  std::uint64_t available_bytes = 0;  ///< what a growth could still have, by the budget
  std::uint64_t reclaimable_bytes = 0;
  std::vector<MemberStats> members;  ///< open ones; memory that only views of closed ones keep is in mapped_bytes alone
};

}  // namespace vattn
