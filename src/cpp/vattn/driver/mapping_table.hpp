// What is reserved, what exists and what is mapped where: the bookkeeping that the host and the null driver share.
//
// Pure accounting, no system call. A check_* function validates a verb's arguments and changes nothing; the note_* function of
// the same name records that it happened. A driver checks, does the work, then notes, so that a refusal leaves no trace.
// Wrong arguments are std::invalid_argument naming the verb and the value.
// Thread: none of its own; the driver that owns it locks.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>

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
    std::size_t place_size;             ///< the driver's own: size of the pages that have a place there; 0: none yet
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

  /// Where a mapping will go, so that noting it looks nothing up again. Good until the table changes.
  struct Place {
    Range* range;
    std::map<Address, Mapping>::const_iterator next;
    Page* page;
  };
  [[nodiscard]] Place check_map(Address at, std::size_t size, PageHandle page);
  void note_map(const Place& place, Address at, std::size_t size, PageHandle page);

  [[nodiscard]] const Range& check_unmap(Address at, std::size_t size) const;
  /// Calls `gone(page, size)` for each page whose last mapping this was and whose handle was released before.
  template <typename Gone>
  void note_unmap(Address at, std::size_t size, Gone&& gone);

  /// Throws unless every byte of the range is mapped.
  void check_mapped(const char* verb, Address at, std::size_t size) const;

  /// Whether any byte of it lies in a reservation.
  [[nodiscard]] bool touches(Address at, std::size_t size) const noexcept;

  /// Calls `visit(range)` for every reservation, `visit(page, size)` for every page.
  template <typename Visit>
  void each_range(Visit&& visit) const {
    for (const auto& [base, range] : ranges_) visit(range);
  }
  template <typename Visit>
  void each_page(Visit&& visit) const {
    for (const auto& [page, info] : pages_) visit(page, info.size);
  }

  [[nodiscard]] bool has_pages() const noexcept { return !pages_.empty(); }

  /// The range around `at`, or nullptr.
  [[nodiscard]] const Range* find(Address at) const noexcept;
  [[nodiscard]] Range* find(Address at) noexcept;
  /// The page, or nullptr.
  [[nodiscard]] const Page* page(PageHandle page) const noexcept;

 private:
  std::size_t granularity_;
  std::map<Address, Range> ranges_;
  std::unordered_map<PageHandle, Page> pages_;
};

template <typename Gone>
void MappingTable::note_unmap(Address at, std::size_t size, Gone&& gone) {
  auto& mapped = find(at)->mapped;
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
