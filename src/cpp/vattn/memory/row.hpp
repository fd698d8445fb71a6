// The page table of one row: the pages behind the front of a range of addresses, first to last without a gap.
//
// A row grows only through a Transaction and shrinks only here. It holds handles for mapped pages alone: an empty row costs the
// same whatever it could grow to. Of the mapped pages a prefix is accessible; they differ only after a failed growth that could
// not be undone entirely, and the pages left over serve the next growth or go with the next shrink.
// Thread: none of its own; the cache that owns it locks.
#pragma once

#include <vector>

#include "vattn/memory/page_pool.hpp"

namespace vattn {

class Row {
 public:
  explicit Row(Address base) noexcept : base_(base) {}

  [[nodiscard]] Address base() const noexcept { return base_; }
  [[nodiscard]] std::size_t mapped_pages() const noexcept { return pages_.size(); }
  [[nodiscard]] std::size_t accessible_pages() const noexcept { return accessible_; }

  /// Unmaps everything past the first `pages` in one call and gives it to the pool. False when the driver refused: the pages
  /// then stay mapped here, counted as before, and the reason is in `losses` when given.
  bool shrink(PagePool& pool, std::size_t pages, PagePool::Losses* losses = nullptr) noexcept;

  /// For a row whose memory cannot be unmapped and whose owner ends: releases the handles all the same, so that the memory goes
  /// when the driver does.
  void abandon(PagePool& pool, PagePool::Losses& losses) noexcept;

 private:
  friend class Transaction;

  Address base_;
  std::vector<Page> pages_;
  std::size_t accessible_ = 0;
};

}  // namespace vattn
