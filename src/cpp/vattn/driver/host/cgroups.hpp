// The memory cgroups above this process, version 1 and 2, and how much each of them still lets it take.
//
// Every group on the way up counts. Of version 2 the lower of memory.max and memory.high is the bound: past the one the kernel
// kills, past the other it slows every allocation to a crawl. File pages and reclaimable kernel memory of a group are dropped
// before anyone is killed, so most of them count as free, as MemAvailable does it for the whole system.
// A process may be moved at any time, so /proc/self/cgroup is read anew at each reading, and the folders are looked for again
// when it has changed. Thread: none of its own; Headroom's owner locks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "vattn/export.hpp"

namespace vattn::host {

/// The part of every bound that stays untouched: page tables, the kernel and everybody else need some too.
[[nodiscard]] std::uint64_t reserve_of(std::uint64_t bound) noexcept;

class Cgroups {
 public:
  /// `root` is where /proc and /sys are looked for: "" but in tests.
  explicit Cgroups(std::string root) : root_(std::move(root)) {}

  struct Bound {
    std::string file;          ///< that names the limit
    std::uint64_t limit = 0;   ///< bytes
    std::uint64_t cached = 0;  ///< of the bytes in use, file pages and kernel memory that can be dropped
    std::uint64_t left = 0;    ///< what can still be taken, the reserve not touched
  };

  /// Every bound under `total`, as it is now.
  [[nodiscard]] std::vector<Bound> read(std::uint64_t total);

 private:
  struct Group {
    std::string folder;
    bool unified;
  };
  void find();
  [[nodiscard]] Bound read(const Group& group) const;

  std::string root_;
  std::string membership_;  ///< /proc/self/cgroup, as it was when the groups were looked for
  std::vector<Group> groups_;
};

}  // namespace vattn::host
