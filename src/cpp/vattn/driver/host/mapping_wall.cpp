#include "vattn/driver/host/mapping_wall.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <string>

#include "vattn/driver/host/system_error.hpp"

namespace vattn::host {
namespace {

constexpr std::uint64_t kDefaultLimit = 65530;
constexpr std::int64_t kReserve = 1000;
constexpr std::uint64_t kOthers = 5000;

// Of all drivers of the process. Two that read at once store two readings of the same moment.
struct Shared {
  std::atomic<std::int64_t> own{0};
  std::atomic<std::int64_t> own_at_reading{0};
  std::atomic<std::int64_t> allowance{-1};  ///< growth that needs no new reading; none before the first
  std::atomic<std::int64_t> good_until_ns{0};
  std::atomic<std::uint64_t> readings{0};
};
std::int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }
Shared shared;  // NOLINT: the process has one wall

}  // namespace

MappingWall::MappingWall() : limit_(kDefaultLimit) {
  std::ifstream file("/proc/sys/vm/max_map_count");
  std::uint64_t value = 0;
  if (file >> value) limit_ = value;
}

std::uint64_t MappingWall::count_now() {
  const int file = ::open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (file < 0) {
    const int code = errno;
    const std::string detail = "/proc/self/maps tells how many mappings are left";
    if (code == EMFILE || code == ENFILE) throw system_error("open", code, detail + ": close files, or raise RLIMIT_NOFILE");
    if (code != ENOENT && code != EACCES) throw system_error("open", code, detail);
    // No /proc: our own, and as many more as an interpreter with its libraries has.
    return static_cast<std::uint64_t>(std::max<std::int64_t>(shared.own.load(std::memory_order_relaxed), 0)) + kOthers;
  }
  std::uint64_t lines = 0;
  std::array<char, 16384> buffer{};
  ssize_t got = 0;
  while ((got = ::read(file, buffer.data(), buffer.size())) > 0) {
    lines += static_cast<std::uint64_t>(std::count(buffer.data(), buffer.data() + got, '\n'));
  }
  ::close(file);
  return lines;
}

void MappingWall::settle(std::int64_t own) noexcept {
  if (own == counted_ || !generation_.is_current()) return;
  shared.own.fetch_add(own - counted_, std::memory_order_relaxed);
  counted_ = own;
}

std::uint64_t MappingWall::readings() noexcept { return shared.readings.load(std::memory_order_relaxed); }

void MappingWall::check(std::int64_t own, std::int64_t more, bool reserving) {
  settle(own + more);  // as if they were made, so that what is counted is never too few
  const std::int64_t all = shared.own.load(std::memory_order_relaxed);
  const bool fits =
      all - shared.own_at_reading.load(std::memory_order_relaxed) <= shared.allowance.load(std::memory_order_relaxed);
  if (fits && !(reserving && now_ns() > shared.good_until_ns.load(std::memory_order_relaxed))) return;
  const std::int64_t begun = now_ns();
  shared.readings.fetch_add(1, std::memory_order_relaxed);
  const auto used = static_cast<std::int64_t>(count_now());
  const std::int64_t left = static_cast<std::int64_t>(limit_) - kReserve - used;
  if (more > left) {
    throw OutOfMemoryError("map: this process has " + std::to_string(used) + " of the " + std::to_string(limit_) +
                               " mappings that vm.max_map_count allows, and " + std::to_string(kReserve) +
                               " are kept in reserve: use larger pages or the NHD layout, or raise vm.max_map_count",
                           0, 0, 0);
  }
  const std::int64_t ended = now_ns();
  shared.good_until_ns.store(ended + 20 * (ended - begun), std::memory_order_relaxed);
  // Never more than the reserve, so that mappings of others, unseen until the next reading, cannot bring the wall itself near.
  shared.own_at_reading.store(all, std::memory_order_relaxed);
  shared.allowance.store(std::max<std::int64_t>(std::min(left / 8, kReserve), 0), std::memory_order_relaxed);
}

}  // namespace vattn::host
