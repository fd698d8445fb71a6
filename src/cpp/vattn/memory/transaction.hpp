// Growth of several rows at once, all or nothing.
//
//     Transaction growth(pool, zero_fill);
//     growth.extend(row, pages);     // as often as needed; nothing happens yet
//     growth.commit();               // every page taken, mapped and accessible, or everything as before and an exception
//
// commit() takes all pages first, so that running out of memory costs no mapping, then maps them, then sets access once a
// contiguous run: on CUDA that call costs some 25 times a map. Undoing goes the other way: pages that were made for this
// transaction are released, pages that were reused go back to the pool. A run that cannot be unmapped again stays in its row as
// surplus, counted, and serves the next growth.
// Thread: none of its own; the cache that owns the rows locks.
#pragma once

#include <vector>

#include "vattn/memory/row.hpp"

namespace vattn {

class VATTN_API Transaction {
 public:
  /// With `zero_fill` every page that may hold old bits is zeroed before commit() returns.
  Transaction(PagePool& pool, bool zero_fill) noexcept : pool_(pool), zero_fill_(zero_fill) {}

  /// Plans that `row` shall have `pages` accessible pages. A row that has them is left out.
  void extend(Row& row, std::size_t pages);

  /// Pages to take from the pool.
  [[nodiscard]] std::size_t missing_pages() const noexcept { return missing_; }
  [[nodiscard]] bool empty() const noexcept { return runs_.empty(); }

  void commit();

 private:
  struct Run {
    Row* row;
    std::size_t target;
    std::vector<Page> taken;  ///< to be mapped behind the row's last page
    std::size_t mapped;       ///< how many of them are
  };

  void take_pages();
  void map_pages();
  void set_access();
  void zero_old_bits();
  void keep() noexcept;
  void roll_back() noexcept;
  [[nodiscard]] Address address(const Row& row, std::size_t page) const noexcept {
    return row.base() + page * pool_.page_size();
  }

  PagePool& pool_;
  bool zero_fill_;
  std::size_t missing_ = 0;
  std::vector<Run> runs_;
};

}  // namespace vattn
