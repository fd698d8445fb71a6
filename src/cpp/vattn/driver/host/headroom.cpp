#include "vattn/driver/host/headroom.hpp"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <limits>
#include <optional>

#include "vattn/driver/host/system_error.hpp"

namespace vattn::host {
namespace {

constexpr std::uint64_t kUnlimited = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
constexpr std::uint64_t kMaxCredit = std::uint64_t{256} << 20;
constexpr auto kReadingLasts = std::chrono::milliseconds(100);

struct Meminfo {
  std::optional<std::uint64_t> total{};
  std::optional<std::uint64_t> available{};
  const char* unknown = nullptr;
};

Meminfo read_meminfo(const std::string& path) {
  errno = 0;
  std::ifstream file(path);
  const int code = errno;
  if (!file.is_open()) {
    if (code == EMFILE || code == ENFILE) {
      throw system_error("open", code, path + " says how much memory is left: close files, or raise RLIMIT_NOFILE (ulimit -n)");
    }
    return {.unknown =
                code == ENOENT ? "/proc/meminfo does not exist (/proc is not mounted)" : "/proc/meminfo cannot be opened"};
  }
  Meminfo found;
  std::string name;
  std::string rest;
  std::uint64_t value = 0;
  while (!(found.total && found.available) && file >> name >> value) {
    if (name == "MemTotal:") found.total = value << 10;
    if (name == "MemAvailable:") found.available = value << 10;
    std::getline(file, rest);
  }
  if (!found.available) found.unknown = "/proc/meminfo has no line MemAvailable";
  return found;
}

std::string words(const Cgroups::Bound& bound) {
  std::string text = bound.file + ", " + std::to_string(bound.limit) + " bytes";
  if (bound.cached != 0)
    text += ", of which " + std::to_string(bound.cached) + " are file cache and most of that counts as left";
  return text;
}

}  // namespace

MemoryInfo Headroom::read() {
  const Meminfo meminfo = read_meminfo(root_ + "/proc/meminfo");
  MemoryInfo info{meminfo.total.value_or(kUnlimited), kUnlimited, meminfo.unknown};
  tightest_ = "none";
  if (meminfo.available) {
    tightest_ = "MemAvailable";
    info.available_bytes = *meminfo.available - std::min(*meminfo.available, reserve_of(info.total_bytes));
  }
  for (const Cgroups::Bound& bound : cgroups_.read(info.total_bytes)) {
    info.total_bytes = std::min(info.total_bytes, bound.limit);
    if (bound.left >= info.available_bytes) continue;
    info.available_bytes = bound.left;
    info.unknown = nullptr;
    tightest_ = words(bound);
  }
  read_at_ = std::chrono::steady_clock::now();
  credit_ = std::min(info.available_bytes / 4, kMaxCredit);
  return info;
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
