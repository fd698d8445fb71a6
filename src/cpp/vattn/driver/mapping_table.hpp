// What is reserved, what exists and what is mapped where: the bookkeeping that the host and the null driver share.
//
// Pure accounting, no system call. A check_* function validates a verb's arguments and changes nothing; the note_* function of
// the same name records that it happened. A driver checks, does the work, then notes, so that a refusal leaves no trace.
// Wrong arguments are std::invalid_argument naming the verb and the value.
// Thread: none of its own; the driver that owns it locks.
#pragma once

#include <cstdint>
#include <map>

#include "vattn/driver/driver.hpp"

namespace vattn {

class MappingTable {
 public:
  struct Mapping {
    std::size_t size;
    PageHandle page;
  };
  struct Range {
    Address base;
    std::size_t size;
    UnmappedReads reads;
    std::uint64_t window;               ///< the driver's own: where in its memory file this range has its place
    std::map<Address, Mapping> mapped;  ///< by first address; never overlapping
  };
  struct Page {
    std::size_t size;
    std::uint32_t mappings;
    bool referenced;  ///< release() was not called yet
  };

  explicit MappingTable(std::size_t granularity) : granularity_(granularity) {}

  void check_size(const char* verb, std::size_t size) const;
  void note_reserve(Address base, std::size_t size, UnmappedReads reads, std::uint64_t window);
  void check_release_range(Address base, std::size_t size) const;
  void note_release_range(Address base);

  void note_create(PageHandle page, std::size_t size);
  void check_release(PageHandle page) const;
  /// True when the page's memory goes with this: nothing maps it.
  bool note_release(PageHandle page);

  /// The range that will hold the mapping.
  [[nodiscard]] const Range& check_map(Address at, std::size_t size, PageHandle page) const;
  void note_map(Address at, std::size_t size, PageHandle page);

  [[nodiscard]] const Range& check_unmap(Address at, std::size_t size) const;
  /// Calls `gone(page, size)` for each page whose last mapping this was and whose handle was released before.
  template <typename Gone>
  void note_unmap(Address at, std::size_t size, Gone&& gone);

  /// Throws unless every byte of the range is mapped.
  void check_mapped(const char* verb, Address at, std::size_t size) const;

  /// The range around `at`, or nullptr.
  [[nodiscard]] const Range* find(Address at) const noexcept;
  /// Pages that exist with a handle at or after `page`, for a driver whose handles are ordered.
  [[nodiscard]] const std::map<PageHandle, Page>& pages() const noexcept { return pages_; }

 private:
  Range& range_of(Address at);
  void forget(PageHandle page) { pages_.erase(page); }

  std::size_t granularity_;
  std::map<Address, Range> ranges_;
  std::map<PageHandle, Page> pages_;
};

template <typename Gone>
void MappingTable::note_unmap(Address at, std::size_t size, Gone&& gone) {
  auto& mapped = range_of(at).mapped;
  const auto first = mapped.lower_bound(at);
  const auto last = mapped.lower_bound(at + size);
  for (auto it = first; it != last; ++it) {
    const auto found = pages_.find(it->second.page);
    if (--found->second.mappings == 0 && !found->second.referenced) {
      gone(found->first, found->second.size);
      pages_.erase(found);
    }
  }
  mapped.erase(first, last);
}

}  // namespace vattn
