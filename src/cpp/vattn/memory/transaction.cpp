#include "vattn/memory/transaction.hpp"

#include <algorithm>
#include <iterator>

namespace vattn {

void Transaction::extend(Row& row, std::size_t pages) {
  if (pages <= row.accessible_pages()) return;
  runs_.push_back({&row, pages, {}, 0});
  if (pages > row.mapped_pages()) missing_ += pages - row.mapped_pages();
}

void Transaction::commit() {
  try {
    take_pages();
    map_pages();
    set_access();
    if (zero_fill_) zero_old_bits();
  } catch (...) {
    roll_back();
    throw;
  }
  keep();
}

void Transaction::take_pages() {
  for (Run& run : runs_) {
    const std::size_t have = run.row->mapped_pages();
    if (run.target <= have) continue;
    // Room for all of them now, so that nothing after the driver calls can fail for want of it.
    run.taken.reserve(run.target - have);
    if (run.row->pages_.capacity() < run.target) {
      // Twice as much at least: a row that grows page by page must not be copied at every page.
      run.row->pages_.reserve(std::max(run.target, 2 * run.row->pages_.capacity()));
    }
    for (std::size_t page = have; page < run.target; ++page) run.taken.push_back(pool_.take(address(*run.row, page)));
  }
}

void Transaction::map_pages() {
  for (Run& run : runs_) {
    const std::size_t have = run.row->mapped_pages();
    for (const Page& page : run.taken) {
      pool_.driver().map(address(*run.row, have + run.mapped), pool_.page_size(), page.handle());
      ++run.mapped;
    }
  }
}

void Transaction::set_access() {
  for (const Run& run : runs_) {
    const std::size_t from = run.row->accessible_pages();
    pool_.driver().set_access(address(*run.row, from), (run.target - from) * pool_.page_size());
  }
}

void Transaction::zero_old_bits() {
  const bool fresh_is_zero = pool_.driver().traits().fresh_pages_are_zero;
  for (const Run& run : runs_) {
    const std::size_t have = run.row->mapped_pages();
    const auto is_clean = [&](std::size_t page) {
      return page >= have && fresh_is_zero && run.taken[page - have].origin() != Page::Origin::kReused;
    };
    for (std::size_t page = run.row->accessible_pages(); page < run.target;) {
      if (is_clean(page)) {
        ++page;
        continue;
      }
      std::size_t end = page + 1;
      while (end < run.target && !is_clean(end)) ++end;
      pool_.driver().fill_zero(address(*run.row, page), (end - page) * pool_.page_size());
      page = end;
    }
  }
}

void Transaction::keep() noexcept {
  std::uint64_t created = 0;
  std::uint64_t reused = 0;
  for (Run& run : runs_) {
    for (const Page& page : run.taken) ++(page.origin() == Page::Origin::kReused ? reused : created);
    run.row->pages_.insert(run.row->pages_.end(), std::make_move_iterator(run.taken.begin()),
                           std::make_move_iterator(run.taken.end()));
    run.row->accessible_ = run.target;
  }
  pool_.note_mapped(created + reused);
  pool_.note_growth(created, reused);
  runs_.clear();
  missing_ = 0;
}

void Transaction::roll_back() noexcept {
  if (zero_fill_) {
    // The failed call may be the wait for a fill: nothing is unmapped under work that still runs.
    try_synchronize(pool_.driver());
  }
  for (auto run = runs_.rbegin(); run != runs_.rend(); ++run) {
    Row& row = *run->row;
    if (run->mapped != 0) {
      const std::size_t have = row.mapped_pages();
      try {
        pool_.driver().unmap(address(row, have), run->mapped * pool_.page_size());
      } catch (const std::exception&) {
        // Still mapped, so the row must say so. Not accessible, so no length may count on it.
        const auto first = run->taken.begin();
        const auto last = first + static_cast<std::ptrdiff_t>(run->mapped);
        row.pages_.insert(row.pages_.end(), std::make_move_iterator(first), std::make_move_iterator(last));
        run->taken.erase(first, last);
        pool_.note_mapped(run->mapped);
      }
    }
    for (Page& page : run->taken) {
      // What this transaction made is unmade; the rest, exchanged pages included, was pooled before and is pooled again.
      if (page.origin() == Page::Origin::kCreated) pool_.discard(page.detach());
    }
  }
  runs_.clear();
  missing_ = 0;
}

}  // namespace vattn
