#include "vattn/driver/host/headroom.hpp"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <limits>
#include <optional>

#include "vattn/driver/host/system_error.hpp"

namespace vattn::host {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint64_t kMaxReserve = std::uint64_t{256} << 20;
constexpr std::uint64_t kMaxCredit = std::uint64_t{256} << 20;
constexpr auto kReadingLasts = std::chrono::milliseconds(100);

// A part of every bound stays untouched: page tables, the kernel and everybody else need some too.
std::uint64_t reserve_of(std::uint64_t bound) { return std::min(kMaxReserve, bound / 16); }

/// The number in a file that holds one; nothing for "max" or when there is no such file.
std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

/// The number after `key` in a file of "key number" lines.
std::optional<std::uint64_t> read_field(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  std::uint64_t value = 0;
  std::string rest;
  while (file >> name >> value) {
    if (name == key) return value;
    std::getline(file, rest);
  }
  return std::nullopt;
}

}  // namespace

Headroom::Headroom(std::string root) : root_(std::move(root)) { find_cgroups(); }

void Headroom::find_cgroups() {
  std::ifstream file(root_ + "/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    const bool unified = controllers.empty();
    if (!unified && ("," + controllers + ",").find(",memory,") == std::string::npos) continue;
    const std::string mount = root_ + (unified ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory");
    // A limit anywhere above counts. Inside a container the path may not exist; its mount's root is then the container's own.
    while (true) {
      const std::string folder = mount + (path == "/" ? "" : path);
      cgroups_.push_back({folder + (unified ? "/memory.max" : "/memory.limit_in_bytes"),
                          folder + (unified ? "/memory.current" : "/memory.usage_in_bytes"), folder + "/memory.stat"});
      if (path.size() <= 1) break;
      path.resize(std::max<std::size_t>(path.rfind('/'), 1));
    }
  }
  std::erase_if(cgroups_, [](const Cgroup& group) { return !std::ifstream(group.limit_file).good(); });
}

MemoryInfo Headroom::read() {
  const std::string meminfo = root_ + "/proc/meminfo";
  const std::uint64_t total = read_field(meminfo, "MemTotal:").value_or(0) << 10;
  const std::optional<std::uint64_t> free_now = read_field(meminfo, "MemAvailable:");
  if (!free_now) {
    throw system_error(
        "open", errno,
        meminfo + " says how much memory is left: where no file descriptor is, close files or raise RLIMIT_NOFILE");
  }
  std::uint64_t available = *free_now << 10;
  available -= std::min(available, reserve_of(total));
  std::uint64_t bound = total;
  tightest_ = "MemAvailable";
  for (const Cgroup& group : cgroups_) {
    const std::uint64_t limit = read_number(group.limit_file).value_or(kUnlimited);
    if (limit >= total) continue;
    bound = std::min(bound, limit);
    const std::uint64_t used = read_number(group.usage_file).value_or(0);
    // File pages that nobody touched of late are dropped before anyone is killed.
    const std::uint64_t droppable = read_field(group.stat_file, "inactive_file").value_or(0);
    const std::uint64_t held = used - std::min(used, droppable) + reserve_of(limit);
    const std::uint64_t left = limit - std::min(limit, held);
    if (left < available) {
      available = left;
      tightest_ = group.limit_file;
    }
  }
  read_at_ = std::chrono::steady_clock::now();
  credit_ = std::min(available / 4, kMaxCredit);
  return {bound, available};
}

void Headroom::take(std::size_t size) {
  if (size > credit_ || std::chrono::steady_clock::now() - read_at_ > kReadingLasts) {
    const MemoryInfo now = read();
    if (size > now.available_bytes) {
      throw OutOfMemoryError("create: " + std::to_string(size) + " bytes asked for, " + std::to_string(now.available_bytes) +
                                 " left before the reserve (bound: " + tightest_ +
                                 "): free memory, or lower what this process asks for",
                             size, now.available_bytes, now.total_bytes);
    }
    credit_ = std::max<std::uint64_t>(credit_, size);
  }
  credit_ -= size;
}

}  // namespace vattn::host
