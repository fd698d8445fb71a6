#include "vattn/driver/host/host_driver.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "vattn/driver/host/headroom.hpp"
#include "vattn/driver/host/mapping_wall.hpp"
#include "vattn/driver/host/memory_file.hpp"
#include "vattn/driver/host/reservations.hpp"
#include "vattn/driver/host/system_error.hpp"
#include "vattn/driver/mapping_table.hpp"
#include "vattn/fork.hpp"

namespace vattn {
namespace {

constexpr std::size_t kDefaultPage = std::size_t{64} << 10;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
// File offsets: [0, kFirstWindow) holds pages without a place, the rest is windows. 2^44 bytes are more than a host can hold.
constexpr std::uint64_t kFirstWindow = std::uint64_t{1} << 44;
constexpr std::uint64_t kLastOffset = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());

// A handle is the page's offset in the file, plus one because 0 is no page.
constexpr PageHandle handle_at(std::uint64_t offset) { return offset + 1; }
constexpr std::uint64_t offset_of(PageHandle page) { return page - 1; }

void* pointer(Address at) { return reinterpret_cast<void*>(at); }

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t unit) { return (value + unit - 1) / unit * unit; }

class HostDriver final : public Driver {
 public:
  explicit HostDriver(std::uint64_t window_bytes)
      : granularity_(static_cast<std::size_t>(::sysconf(_SC_PAGESIZE))), table_(granularity_) {
    traits_.name = "host";
    traits_.granularity = granularity_;
    traits_.default_page_size = std::max(kDefaultPage, granularity_);
    traits_.tensor_device = TensorDevice::kCpu;
    traits_.reads_as_zeros = true;
    traits_.fresh_pages_are_zero = true;
    traits_.has_memory = true;
    windows_end_ = last_offset_ = kFirstWindow + window_bytes;
    traits_.mapping_limit = wall_.limit();
    if (!file_.gives_back()) traits_.keeps_pages = "this kernel has no FALLOC_FL_PUNCH_HOLE";
  }

  const DriverTraits& traits() const noexcept override { return traits_; }

  MemoryInfo memory_info() override {
    generation_.check("this host driver");
    const std::lock_guard lock(mutex_);
    return headroom_.read();
  }

  Address reserve(std::size_t size, UnmappedReads reads) override;
  void release_range(Address base, std::size_t size) override;
  PageHandle create(std::size_t size, Address near) override;
  PageHandle home(Address at) const noexcept override;
  void release(PageHandle page) override;
  void map(Address at, std::size_t size, PageHandle page) override;
  void unmap(Address at, std::size_t size) override;
  void set_access(Address at, std::size_t size) override;

  void will_write(Address at, std::size_t size) noexcept override;

  void fill_zero(Address at, std::size_t size) override {
    check_accessible("fill_zero", at, size);
    std::memset(pointer(at), 0, size);
  }

  void copy(Address to, Address from, std::size_t size) override {
    check_accessible("copy", to, size);
    check_source(from, size);
    std::memcpy(pointer(to), pointer(from), size);
  }

  void synchronize() override { generation_.check("this host driver"); }

 private:
  void check_accessible(const char* verb, Address at, std::size_t size) {
    generation_.check("this host driver");
    const std::lock_guard lock(mutex_);
    table_.check_mapped(verb, at, size);
  }
  void check_source(Address from, std::size_t size) {
    const std::lock_guard lock(mutex_);
    if (table_.touches(from, size)) table_.check_mapped("copy", from, size);
  }
  std::optional<std::uint64_t> place_of(const MappingTable::Range* range, Address at, std::size_t size) const;
  std::uint64_t find_unplaced(std::size_t size) const;
  /// A kernel that takes no single page back takes them all, once none is left.
  void empty_file() noexcept {
    if (file_.gives_back()) return;
    holds_old_bytes_ = table_.has_pages();
    if (!holds_old_bytes_) file_.empty();
  }
  void forget(std::uint64_t offset) noexcept {
    if (offset < kFirstWindow) unplaced_.erase(offset);
  }
  using Mappings = std::map<Address, MappingTable::Mapping>;
  void make_window(std::size_t size);
  void unlock_reserved(Address base, std::size_t size) noexcept;
  std::int64_t extents_around(const MappingTable::Range& range, Mappings::const_iterator first, Address at,
                              std::size_t size) const;

  Generation generation_;
  std::size_t granularity_;
  DriverTraits traits_;
  mutable std::mutex mutex_;
  const host::reservations::DriverLock held_over_fork_{mutex_};
  MappingTable table_;
  host::MemoryFile file_;
  host::Headroom headroom_;
  host::MappingWall wall_;
  std::uint64_t next_window_ = kFirstWindow;  ///< from here to windows_end_ no window is, and no page
  std::uint64_t windows_end_ = kFirstWindow;
  std::uint64_t last_offset_ = kFirstWindow;       ///< the last byte of the file that a window may reach
  bool locks_ = false;                             ///< mlockall(MCL_FUTURE) was in force at the last reservation
  std::map<std::uint64_t, std::size_t> unplaced_;  ///< pages in the compact region, by offset
  bool holds_old_bytes_ = false;                   ///< somewhere in the file, where no page is
  std::int64_t extents_ = 0;                       ///< kernel mappings that this driver's reservations are made of
};

// MADV_POPULATE_WRITE, which older C libraries do not name.
constexpr int kPopulateWrite = 23;

int protection(UnmappedReads reads) { return reads == UnmappedReads::kZeros ? PROT_READ : PROT_NONE; }

// Private and read-only, so reading it costs no memory: a shared mapping of a hole would allocate pages.
constexpr int kReservedFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

Address HostDriver::reserve(std::size_t size, UnmappedReads reads) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  table_.check_size("reserve", size);
  wall_.check(extents_, 3, true);
  make_window(size);
  // On a 2 MiB boundary, in memory and in the file, so that the kernel may use huge pages. Without access at first: under
  // mlockall(MCL_FUTURE) the kernel would fill the page tables of all of it at once.
  const std::size_t slack = size >= kHugePage ? kHugePage - granularity_ : 0;
  void* got = ::mmap(nullptr, size + slack, PROT_NONE, kReservedFlags, -1, 0);
  if (got == MAP_FAILED) {
    const int code = errno;
    if (code == EAGAIN) {
      throw OutOfMemoryError(
          "reserve: mlockall(MCL_FUTURE) is in force, and " + std::to_string(size) +
              " bytes of addresses are more than RLIMIT_MEMLOCK lets this process lock: raise it (ulimit -l), "
              "or call mlockall after the cache is made, with MCL_ONFAULT",
          size, 0, 0);
    }
    if (code != ENOMEM) throw host::system_error("mmap", code, "reserve " + std::to_string(size) + " bytes");
    throw OutOfMemoryError(
        "reserve: " + std::to_string(size) +
            " bytes of addresses are not to be had (address space, RLIMIT_AS or vm.max_map_count): reserve less, "
            "or raise the limit (ulimit -v)",
        size, 0, 0);
  }
  const auto start = reinterpret_cast<Address>(got);
  const Address base = slack != 0 ? round_up(start, kHugePage) : start;
  if (base > start) ::munmap(got, base - start);
  if (start + slack > base) ::munmap(pointer(base + size), start + slack - base);
  try {
    if (::madvise(pointer(base), size, MADV_DONTFORK) != 0) {
      throw host::system_error("madvise(MADV_DONTFORK)", errno, std::to_string(size) + " bytes");
    }
    unlock_reserved(base, size);
    if (protection(reads) != PROT_NONE && ::mprotect(pointer(base), size, protection(reads)) != 0) {
      throw host::system_error("mprotect", errno, std::to_string(size) + " bytes");
    }
    host::reservations::add(base, size);
    table_.note_reserve(base, size, reads, next_window_);
  } catch (...) {
    static_cast<void>(host::reservations::unmap(base, size));
    throw;
  }
  next_window_ += round_up(size, kHugePage);
  ++extents_;
  return base;
}

/// Sees to it that a window of that size fits between next_window_ and windows_end_. When the file has come to its end, windows
/// of reservations that are gone are used again: the longest stretch in which neither a window nor a page is.
void HostDriver::make_window(std::size_t size) {
  const std::uint64_t needed = round_up(size, kHugePage);
  if (needed <= windows_end_ - next_window_) return;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> taken{{last_offset_, last_offset_}};
  table_.each_range([&](const MappingTable::Range& range) {
    taken.emplace_back(range.window, range.window + round_up(range.size, kHugePage));
  });
  table_.each_page([&](PageHandle page, std::size_t bytes) { taken.emplace_back(offset_of(page), offset_of(page) + bytes); });
  std::sort(taken.begin(), taken.end());
  std::uint64_t reached = kFirstWindow;
  std::uint64_t longest = 0;
  for (const auto& [from, to] : taken) {
    if (from > reached && from - reached > longest) {
      longest = from - reached;
      next_window_ = reached;
      windows_end_ = from;
    }
    reached = std::max(reached, round_up(to, kHugePage));
  }
  if (needed <= longest) return;
  throw OutOfMemoryError("reserve: " + std::to_string(size) + " bytes are more than its memory file can still address, " +
                             std::to_string(longest) + ": close what is not needed, or make another pool",
                         size, longest, last_offset_ - kFirstWindow);
}

/// Under mlockall(MCL_FUTURE) whatever is mapped is locked, and a locked range is filled as soon as it can be read. The kernel
/// does not say whether that is in force, but it refuses this advice for what is locked.
void HostDriver::unlock_reserved(Address base, std::size_t size) noexcept {
  locks_ = ::madvise(pointer(base), granularity_, MADV_DONTNEED) != 0 && errno == EINVAL;
  if (locks_) static_cast<void>(::munlock(pointer(base), size));
}

void HostDriver::release_range(Address base, std::size_t size) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  table_.check_release_range(base, size);
  if (!host::reservations::unmap(base, size)) throw host::system_error("munmap", errno, std::to_string(size) + " bytes");
  table_.note_release_range(base);
  --extents_;
}

std::uint64_t HostDriver::find_unplaced(std::size_t size) const {
  // First fit keeps the region compact, which is what a finite RLIMIT_FSIZE needs. Rare: pages nearly always have a place.
  std::uint64_t offset = 0;
  for (const auto& [start, bytes] : unplaced_) {
    if (start - offset >= size) break;
    offset = start + bytes;
  }
  return offset;
}

/// The place of a page of `size` bytes at `at`, if it has one. A window holds pages of one size on multiples of it, so that
/// whether a place is taken is one look-up.
std::optional<std::uint64_t> HostDriver::place_of(const MappingTable::Range* range, Address at, std::size_t size) const {
  if (range == nullptr) return std::nullopt;
  const std::uint64_t in_range = at - range->base;
  if (in_range % size != 0 || size > range->size - in_range) return std::nullopt;
  if (range->place_size != 0 && range->place_size != size) return std::nullopt;
  const std::uint64_t offset = range->window + in_range;
  return table_.page(handle_at(offset)) == nullptr ? std::optional(offset) : std::nullopt;
}

PageHandle HostDriver::home(Address at) const noexcept {
  // A page that stands in another one's place could not be given up for one that belongs there.
  if (!generation_.is_current() || !file_.gives_back()) return 0;
  const std::lock_guard lock(mutex_);
  const MappingTable::Range* range = table_.find(at);
  return range != nullptr ? handle_at(range->window + (at - range->base)) : 0;
}

PageHandle HostDriver::create(std::size_t size, Address near) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  table_.check_size("create", size);
  MappingTable::Range* range = near != 0 ? table_.find(near) : nullptr;
  const auto place = place_of(range, near, size);
  const bool placed = place && file_.may_grow_to(*place + size);
  const std::uint64_t offset = placed ? *place : find_unplaced(size);
  headroom_.take(size);
  table_.note_create(handle_at(offset), size);
  try {
    if (!placed) unplaced_.emplace(offset, size);
    if (holds_old_bytes_) file_.clear(offset, size);
    file_.allocate(offset, size, placed);
  } catch (...) {
    forget(offset);
    table_.note_release(handle_at(offset));
    throw;
  }
  if (placed) range->place_size = size;
  return handle_at(offset);
}

void HostDriver::release(PageHandle page) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  table_.check_release(page);
  const MappingTable::Page info = *table_.page(page);
  if (info.mappings == 0) {
    if (file_.gives_back()) file_.punch(offset_of(page), info.size);
    forget(offset_of(page));
  }
  table_.note_release(page);
  empty_file();
}

// The kernel's mappings between the neighbours of [at, at + size): what merges counts once. Merging with what lies outside the
// reservation is left out, so the count errs on the high side.
std::int64_t HostDriver::extents_around(const MappingTable::Range& range, Mappings::const_iterator first, Address at,
                                        std::size_t size) const {
  const auto& mapped = range.mapped;
  auto it = first;  // the first mapping at or after `at`
  if (it != mapped.begin()) --it;
  const bool has_left = it != mapped.end() && it->first < at;
  Address reached = has_left ? it->first : range.base;
  std::uint64_t file_end = kLastOffset;  // where the next page's offset would have to be to merge
  std::int64_t extents = 0;
  const Address end = at + size;
  for (; it != mapped.end() && reached <= end; ++it) {
    if (it->first > reached) {
      ++extents;  // a gap
      file_end = kLastOffset;
    }
    const std::uint64_t offset = offset_of(it->second.page);
    if (offset != file_end) ++extents;
    file_end = offset + it->second.size;
    reached = it->first + it->second.size;
  }
  if (reached <= end && reached < range.base + range.size) ++extents;  // the gap behind
  return extents;
}

void HostDriver::map(Address at, std::size_t size, PageHandle page) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  const MappingTable::Place place = table_.check_map(at, size, page);
  wall_.check(extents_, 3);
  const std::int64_t before = extents_around(*place.range, place.next, at, size);
  table_.note_map(place, at, size, page);
  void* got = ::mmap(pointer(at), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file_.descriptor(),
                     static_cast<off_t>(offset_of(page)));
  if (got == MAP_FAILED) {
    const int code = errno;
    table_.note_unmap(at, size, [](PageHandle, std::size_t) {});
    if (code == ENOMEM) {
      throw OutOfMemoryError(
          "map: mmap of " + std::to_string(size) + " bytes: no mapping (vm.max_map_count, " + std::to_string(wall_.limit()) +
              ") or no address space (RLIMIT_AS) is left: use larger pages or the " + "NHD layout, or raise the limit",
          size, 0, 0);
    }
    throw host::system_error("mmap", code, "map " + std::to_string(size) + " bytes");
  }
  extents_ += extents_around(*place.range, std::prev(place.next), at, size) - before;
}

void HostDriver::set_access(Address at, std::size_t size) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  table_.check_mapped("set_access", at, size);
  // Every mmap over a reservation loses the advice. Given once a run, it also lets the run merge with its neighbours.
  if (::madvise(pointer(at), size, MADV_DONTFORK) != 0) {
    throw host::system_error("madvise(MADV_DONTFORK)", errno, std::to_string(size) + " bytes");
  }
}

void HostDriver::will_write(Address at, std::size_t size) noexcept {
  if (!generation_.is_current()) return;
  // One walk instead of a page fault every 4 KiB, whose cost is otherwise a third of a first write. The file's pages exist, so
  // this takes page tables and no memory. Kernels before 5.14 do not know it: then the faults come as they always did.
  static_cast<void>(::madvise(pointer(at), size, kPopulateWrite));
}

void HostDriver::unmap(Address at, std::size_t size) {
  generation_.check("this host driver");
  const std::lock_guard lock(mutex_);
  const MappingTable::Range& range = table_.check_unmap(at, size);
  const std::int64_t before = extents_around(range, range.mapped.find(at), at, size);
  // One call for the whole run, mapped over rather than taken away: at the wall this works where munmap does not.
  if (::mmap(pointer(at), size, protection(range.reads), kReservedFlags | MAP_FIXED, -1, 0) == MAP_FAILED) {
    throw host::system_error("mmap", errno, "put the reservation back over " + std::to_string(size) + " bytes");
  }
  // Should this fail, a child inherits addresses that hold nothing: no reason to undo the rest.
  static_cast<void>(::madvise(pointer(at), size, MADV_DONTFORK));
  if (locks_) static_cast<void>(::munlock(pointer(at), size));  // a reservation again, and it merges with its neighbours
  table_.note_unmap(at, size, [this](PageHandle page, std::size_t bytes) {
    try {
      forget(offset_of(page));
      file_.punch(offset_of(page), bytes);
    } catch (const DriverError&) {  // NOLINT(bugprone-empty-catch)
      // The mapping is gone, which is what was asked for. The bytes go when the file is closed, or before a page is made there.
      holds_old_bytes_ = true;
    }
  });
  empty_file();
  extents_ += extents_around(range, range.mapped.lower_bound(at), at, size) - before;
}

}  // namespace

std::shared_ptr<Driver> open_host_driver() { return open_host_driver_of(kLastOffset - kFirstWindow - kHugePage); }

std::shared_ptr<Driver> open_host_driver_of(std::uint64_t window_bytes) { return std::make_shared<HostDriver>(window_bytes); }

}  // namespace vattn
