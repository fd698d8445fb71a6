#include "vattn/driver/host/mapping_wall.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>
#include <string>

#include "vattn/driver/host/system_error.hpp"

namespace vattn::host {
namespace {

constexpr std::uint64_t kDefaultLimit = 65530;
constexpr std::int64_t kReserve = 1000;

}  // namespace

MappingWall::MappingWall() : limit_(kDefaultLimit) {
  std::ifstream file("/proc/sys/vm/max_map_count");
  std::uint64_t value = 0;
  if (file >> value) limit_ = value;
}

std::uint64_t MappingWall::count_now() {
  const int file = ::open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (file < 0) throw system_error("open", errno, "/proc/self/maps tells how many mappings are left");
  std::uint64_t lines = 0;
  std::array<char, 16384> buffer{};
  ssize_t got = 0;
  while ((got = ::read(file, buffer.data(), buffer.size())) > 0) {
    lines += static_cast<std::uint64_t>(std::count(buffer.data(), buffer.data() + got, '\n'));
  }
  ::close(file);
  return lines;
}

void MappingWall::check(std::int64_t own, std::int64_t more) {
  if (own - own_at_reading_ + more <= allowance_) return;
  const auto used = static_cast<std::int64_t>(count_now());
  const std::int64_t left = static_cast<std::int64_t>(limit_) - kReserve - used;
  if (more > left) {
    throw OutOfMemoryError("map: this process has " + std::to_string(used) + " of the " + std::to_string(limit_) +
                               " mappings that vm.max_map_count allows, and " + std::to_string(kReserve) +
                               " are kept in reserve: use larger pages or the NHD layout, or raise vm.max_map_count",
                           0, 0, 0);
  }
  own_at_reading_ = own;
  // Never more than the reserve, so that mappings of others, unseen until the next reading, cannot bring the wall itself near.
  allowance_ = std::max(std::min(left / 8, kReserve), more);
}

}  // namespace vattn::host
