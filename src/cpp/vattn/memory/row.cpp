#include "vattn/memory/row.hpp"

#include <algorithm>

namespace vattn {

bool Row::shrink(PagePool& pool, std::size_t pages, PagePool::Losses* losses) noexcept {
  if (pages >= pages_.size()) return true;
  const std::size_t gone = pages_.size() - pages;
  try {
    pool.driver().unmap(base_ + pages * pool.page_size(), gone * pool.page_size());
  } catch (const std::exception& error) {
    if (losses != nullptr) losses->note(losses->mappings, error);
    accessible_ = std::min(accessible_, pages);  // so that the next growth zeroes them, where pages are zeroed
    return false;
  }
  // Noted first: between the two the books hold more pooled pages than exist in rows, never a page twice.
  pool.note_unmapped(gone);
  pages_.erase(pages_.begin() + static_cast<std::ptrdiff_t>(pages), pages_.end());
  accessible_ = std::min(accessible_, pages);
  return true;
}

void Row::abandon(PagePool& pool, PagePool::Losses& losses) noexcept {
  for (Page& page : pages_) {
    const PageHandle handle = page.detach();
    ++losses.pages;
    pool.forget(handle);
  }
  pool.note_unmapped(pages_.size());
  pages_.clear();
  accessible_ = 0;
}

}  // namespace vattn
