// How many more mappings the kernel allows this process (vm.max_map_count, 65,530 by default).
//
// At the wall even putting a page back fails, so the host driver stops 1,000 short of it. The whole process shares the wall,
// and so its drivers share one count of their own mappings, an upper bound. /proc/self/maps is read again whenever that count
// has grown by an eighth of what was left, or by as many as the reserve, so that other libraries cannot run into it unseen;
// and for a reservation, when the last reading is twenty times as old as it took. Reading takes the longer the more mappings
// there are, so a thousand drivers must not each do it for themselves.
// Thread: check() and settle() as the driver that owns it locks; the shared count is atomic.
#pragma once

#include <cstdint>

#include "vattn/export.hpp"
#include "vattn/fork.hpp"

namespace vattn::host {

class MappingWall {
 public:
  MappingWall();
  MappingWall(const MappingWall&) = delete;
  MappingWall& operator=(const MappingWall&) = delete;
  MappingWall(MappingWall&&) = delete;
  MappingWall& operator=(MappingWall&&) = delete;
  ~MappingWall() { settle(0); }

  /// Throws OutOfMemoryError when up to `more` new mappings do not fit under the wall. `own`: the driver's mappings now.
  /// `reserving`: rare enough to look at the clock.
  void check(std::int64_t own, std::int64_t more, bool reserving = false);

  /// What the driver has is exactly this. Counted as gone with the wall, whatever the driver could not give back.
  void settle(std::int64_t own) noexcept;

  /// The kernel's limit for one process.
  [[nodiscard]] std::uint64_t limit() const noexcept { return limit_; }

  /// Mappings this process has now, from /proc/self/maps.
  [[nodiscard]] static std::uint64_t count_now();

  /// How often it was read for check().
  [[nodiscard]] static std::uint64_t readings() noexcept;

 private:
  Generation generation_;
  std::uint64_t limit_;
  std::int64_t counted_ = 0;  ///< this driver's part of the shared count
};

}  // namespace vattn::host
