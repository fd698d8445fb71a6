#include "vattn/driver/host/cgroups.hpp"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <sstream>

namespace vattn::host {
namespace {

constexpr std::uint64_t kUnlimited = std::numeric_limits<std::uint64_t>::max();
/// Version 1 has no word for "none": it says the largest signed number, rounded down to a page.
constexpr std::uint64_t kNoLimitOfVersion1 = std::uint64_t{1} << 62;
constexpr std::uint64_t kMaxReserve = std::uint64_t{256} << 20;

/// The number in a file that holds one; the largest for "max" or when there is no such file.
std::uint64_t read_limit(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  return file >> value ? value : kUnlimited;
}

std::string limit_file(const std::string& folder, bool unified) {
  return folder + (unified ? "/memory.max" : "/memory.limit_in_bytes");
}

/// What memory.stat says of memory that the kernel takes back before it kills.
struct Cache {
  std::uint64_t inactive_file = 0;
  std::uint64_t active_file = 0;
  std::uint64_t slab_reclaimable = 0;
};

Cache read_cache(const std::string& path) {
  std::ifstream file(path);
  std::map<std::string, std::uint64_t> found;
  std::string name;
  std::uint64_t value = 0;
  while (file >> name >> value) {
    if (name.find("active_file") != std::string::npos || name == "slab_reclaimable") found[name] = value;
  }
  // Version 1 counts the groups below under names of their own, and its usage_in_bytes counts them too.
  const auto of = [&](const std::string& key) {
    const auto total = found.find("total_" + key);
    if (total != found.end()) return total->second;
    const auto own = found.find(key);
    return own != found.end() ? own->second : 0;
  };
  return {of("inactive_file"), of("active_file"), of("slab_reclaimable")};
}

}  // namespace

std::uint64_t reserve_of(std::uint64_t bound) noexcept { return std::min(kMaxReserve, bound / 16); }

void Cgroups::find() {
  groups_.clear();
  std::istringstream lines(membership_);
  std::string line;
  while (std::getline(lines, line)) {
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
      if (std::ifstream(limit_file(folder, unified)).good()) groups_.push_back({folder, unified});
      if (path.size() <= 1) break;
      path.resize(std::max<std::size_t>(path.rfind('/'), 1));
    }
  }
}

Cgroups::Bound Cgroups::read(const Group& group) const {
  Bound bound;
  bound.file = limit_file(group.folder, group.unified);
  bound.limit = read_limit(bound.file);
  if (group.unified) {
    const std::string high_file = group.folder + "/memory.high";
    if (const std::uint64_t high = read_limit(high_file); high < bound.limit) {
      bound.file = high_file;
      bound.limit = high;
    }
  }
  if (bound.limit >= kNoLimitOfVersion1) bound.limit = kUnlimited;
  if (bound.limit == kUnlimited) return bound;
  const std::uint64_t usage = read_limit(group.folder + (group.unified ? "/memory.current" : "/memory.usage_in_bytes"));
  const std::uint64_t used = usage == kUnlimited ? 0 : usage;
  const Cache cache = read_cache(group.folder + "/memory.stat");
  const std::uint64_t reserve = reserve_of(bound.limit);
  // Not all of what is in active use will go: half of it stays, or as much as the reserve, whichever is less.
  const auto most_of = [&](std::uint64_t bytes) { return bytes - std::min(bytes / 2, reserve); };
  bound.cached = std::min(used, cache.inactive_file + cache.active_file + cache.slab_reclaimable);
  const std::uint64_t droppable = cache.inactive_file + most_of(cache.active_file) + most_of(cache.slab_reclaimable);
  const std::uint64_t held = used - std::min(used, droppable) + reserve;
  bound.left = bound.limit - std::min(bound.limit, held);
  return bound;
}

std::vector<Cgroups::Bound> Cgroups::read(std::uint64_t total) {
  std::ifstream file(root_ + "/proc/self/cgroup");
  std::string membership{std::istreambuf_iterator<char>(file), {}};
  if (membership != membership_) {
    membership_ = std::move(membership);
    find();
  }
  std::vector<Bound> bounds;
  for (const Group& group : groups_) {
    Bound bound = read(group);
    if (bound.limit < total) bounds.push_back(std::move(bound));
  }
  return bounds;
}

}  // namespace vattn::host
