// How many more mappings the kernel allows this process (vm.max_map_count, 65,530 by default).
//
// At the wall even putting a page back fails, so the host driver stops 1,000 short of it. The whole process shares the wall:
// the driver counts its own mappings exactly and reads /proc/self/maps again whenever it used an eighth of what was left, or as
// many as the reserve, so that several drivers and other libraries cannot run into it together unseen.
// Thread: none of its own; the driver that owns it locks.
#pragma once

#include <cstdint>

#include "vattn/export.hpp"

namespace vattn::host {

class MappingWall {
 public:
  MappingWall();

  /// Throws OutOfMemoryError when up to `more` new mappings do not fit under the wall. `own`: the driver's mappings now.
  void check(std::int64_t own, std::int64_t more);

  /// The kernel's limit for one process.
  [[nodiscard]] std::uint64_t limit() const noexcept { return limit_; }

  /// Mappings this process has now, from /proc/self/maps.
  [[nodiscard]] static std::uint64_t count_now();

 private:
  std::uint64_t limit_;
  std::int64_t own_at_reading_ = 0;
  std::int64_t allowance_ = 0;  ///< growth of the driver's own that needs no new reading
};

}  // namespace vattn::host
