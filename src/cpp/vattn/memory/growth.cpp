#include "vattn/memory/growth.hpp"

#include <algorithm>

#include "vattn/driver/limits.hpp"

namespace vattn {

void Growth::extend(std::size_t group, const Extent& pages, const Extent& ahead) {
  entries_.push_back({group, pages, ahead, {}});
}

Growth::Outcome Growth::commit(const char* call, const char* way_out) {
  auto lock = pool_.lock();
  promise();
  bool may_create = true;
  for (;;) {
    try {
      obtain(lock, may_create, call, way_out);
    } catch (...) {
      withdraw(lock);
      throw;
    }
    if (runs_.empty() && dirty_.empty()) break;
    outcome_.waited = true;
    take_pages();
    set_busy(true);
    lock.unlock();
    try {
      work();
      lock.lock();
      break;
    } catch (const OutOfMemoryError& error) {
      // The device has less than the budget allows: once more, with what others can spare in place of new pages.
      const bool again = may_create && creating_;
      const bool is_memory = creating_;  // else mappings, which what others hold does not bring back
      undo(lock, again);
      if (!again || missing_ > pool_.pooled_.size() + pool_.total_excess() + pool_.ahead_transit_) {
        const std::uint64_t page = pool_.page_size();
        const std::uint64_t needed = missing_ * page;
        const std::uint64_t spare = is_memory ? pool_.pooled_.size() + pool_.total_excess() + pool_.ahead_transit_ : 0;
        const std::uint64_t available = spare * page + error.available_bytes;
        const std::uint64_t others = is_memory ? pool_.held_by_others(own_, available / page) * page : 0;
        withdraw(lock);
        throw OutOfMemoryError(std::string(call) + ": " + std::to_string(needed) +
                                   " bytes more are needed and were not to be had; " +
                                   PagePool::words_on_waiting(needed, available, others) + "; nothing changed. " + error.what(),
                               needed, available, pool_.limit_bytes_, others);
      }
      may_create = false;
    } catch (...) {
      undo(lock, false);
      withdraw(lock);
      throw;
    }
  }
  publish();
  release_spare();
  return outcome_;
}

Growth::Ahead Growth::commit_ahead(std::unique_lock<std::mutex>& lock) {
  ahead_only_ = true;
  for (const Entry& entry : entries_) {
    if (holder_.group(entry.group).busy) return Ahead::kBusy;
  }
  plan();
  dirty_.clear();
  if (runs_.empty()) return Ahead::kDone;
  const auto no_room = [&] {
    pool_.note_lacking(holder_, missing_);
    return Ahead::kNoRoom;
  };
  if (pool_.pressed_ != 0) {
    pool_.turned_away_ = true;
    return no_room();
  }
  if (pool_.created_ > pool_.limit_pages()) return no_room();  // what is pooled is on its way out
  if (missing_ + pool_.mapped_ > kMostPages) return no_room();
  if (missing_ > pool_.pooled_.size() + pool_.creatable(missing_)) return no_room();
  reserve_room();
  take_pages();
  set_busy(true);
  lock.unlock();
  try {
    work();
  } catch (...) {
    undo(lock, false);
    throw;
  }
  lock.lock();
  publish();
  return Ahead::kDone;
}

void Growth::promise() noexcept {
  for (Entry& entry : entries_) {
    RowGroup& group = holder_.group(entry.group);
    entry.held_before = group.held;
    promised_ -= holder_.pages_in(group.held);
    for (std::size_t kind = 0; kind < group.held.size(); ++kind) {
      group.held[kind] = std::max(group.held[kind], entry.pages[kind]);
    }
    promised_ += holder_.pages_in(group.held);
    holder_.update(entry.group);
    if (group.held != entry.held_before) own_ += holder_.pages_in(group.held) - group.owed;
  }
}

void Growth::unpromise() noexcept {
  for (const Entry& entry : entries_) {
    holder_.group(entry.group).held = entry.held_before;
    holder_.update(entry.group);
  }
}

void Growth::withdraw(std::unique_lock<std::mutex>& lock) noexcept {
  unpromise();
  release_spare();
  // What it counted on is anybody's again. Above a limit that was lowered meanwhile it goes now, or once its fences have
  // passed.
  PagePool::Losses losses;
  pool_.settle(lock, losses);
  if (pool_.created_ > pool_.limit_pages()) PagePool::wake(holder_);
}

void Growth::plan() {
  runs_.clear();
  dirty_.clear();
  fences_.clear();
  missing_ = 0;
  for (const Entry& entry : entries_) {
    RowGroup& group = holder_.group(entry.group);
    bool zeroes = false;
    holder_.each_row(entry.group, [&](Row& row, std::uint8_t kind) {
      const std::uint32_t target = entry.pages[kind];
      if (zero_fill_ && !ahead_only_) {
        const std::uint32_t from = entry.held_before[kind];
        const std::uint32_t to = std::min({target, row.used, row.accessible});
        if (from < to) dirty_.push_back({address(row, from), (to - from) * pool_.page_size()});
        zeroes = zeroes || from < to;
      }
      if (target <= row.accessible) return;
      const auto have = static_cast<std::uint32_t>(row.pages.size());
      runs_.push_back({&row, kind, entry.group, row.accessible, have, target, {}});
      if (target <= have) return;
      missing_ += target - have;
    });
    if (zeroes && PagePool::has_pending(group)) fences_.insert(fences_.end(), group.fences.begin(), group.fences.end());
  }
}

bool Growth::any_busy() const noexcept {
  return std::any_of(runs_.begin(), runs_.end(), [&](const Run& run) { return holder_.group(run.group).busy; });
}

void Growth::obtain(std::unique_lock<std::mutex>& lock, bool may_create, const char* call, const char* way_out) {
  const PagePool::Pressure pressure(pool_);  // what is taken back for this growth is not for look-ahead
  for (;;) {
    plan();
    if (any_busy()) {  // the mapper is at it, or somebody takes back what is beyond the promise
      outcome_.waited = true;
      pool_.idle_.wait(lock);
      continue;
    }
    if (!pool_.make_room(lock, {missing_, promised_, own_, may_create, call, way_out})) break;
    outcome_.waited = true;
  }
  reserve_room();
}

void Growth::reserve_room() {
  for (Run& run : runs_) {
    if (run.target <= run.have) continue;
    run.taken.reserve(run.target - run.have);
    // Twice as much at least: a row that grows page by page must not be copied at every page.
    if (run.row->pages.capacity() < run.target) {
      run.row->pages.reserve(std::max<std::size_t>(run.target, 2 * run.row->pages.capacity()));
    }
  }
}

void Growth::take_pages() noexcept {
  Driver& driver = holder_.driver();
  for (Run& run : runs_) {
    for (std::uint32_t page = run.have; page < run.target; ++page) {
      const PageHandle home = driver.home(address(*run.row, page));
      const auto found = pool_.pooled_.empty() ? pool_.pooled_.end()
                         : home == 0           ? std::prev(pool_.pooled_.end())
                                               : pool_.pooled_.find(home);
      const bool has_home = found != pool_.pooled_.end();
      run.taken.push_back({has_home ? *found : 0, 0, has_home ? Taken::Origin::kReused : Taken::Origin::kCreated});
      if (has_home) pool_.pooled_.erase(found);
    }
  }
  // Pooled pages that are at home elsewhere are exchanged, once every page that is at home here has been found.
  for (Run& run : runs_) {
    for (Taken& taken : run.taken) {
      ++pool_.transit_;
      if (taken.page != 0) continue;
      if (pool_.pooled_.empty()) {
        ++pool_.created_;
        continue;
      }
      const auto last = std::prev(pool_.pooled_.end());
      taken.victim = *last;
      taken.origin = Taken::Origin::kExchanged;
      pool_.pooled_.erase(last);
    }
    if (ahead_only_) pool_.ahead_transit_ += run.taken.size();
  }
}

void Growth::set_busy(bool busy) noexcept {
  for (const Run& run : runs_) holder_.group(run.group).busy = busy;
  if (!busy) pool_.idle_.notify_all();
}

void Growth::work() {
  create_pages();
  map_pages();
  set_access();
  if (!zero_fill_) return;
  for (const auto& fence : fences_) fence->wait();
  filling_ = true;
  for (const Range& range : dirty_) holder_.driver().fill_zero(range.at, range.size);
  zero_old_bits();
}

void Growth::check_stopping() const {
  if (ahead_only_ && holder_.stopping.load(std::memory_order_relaxed)) throw Error("the mapper was stopped");
}

void Growth::create_pages() {
  creating_ = true;
  for (Run& run : runs_) {
    for (std::size_t i = 0; i < run.taken.size(); ++i) {
      if (run.taken[i].page != 0) continue;
      check_stopping();
      create(run.taken[i], address(*run.row, run.have + i));
    }
  }
  creating_ = false;
}

void Growth::create(Taken& taken, Address at) {
  Driver& driver = holder_.driver();
  if (taken.victim == 0) {
    taken.page = driver.create(pool_.page_size(), at);
    return;
  }
  const auto use_victim = [&] {
    taken.page = std::exchange(taken.victim, 0);
    taken.origin = Taken::Origin::kReused;
  };
  try {
    taken.page = driver.create(pool_.page_size(), at);
  } catch (const OutOfMemoryError&) {
    use_victim();  // no room for one page more, even for a moment: a page that merges less works as well
    return;
  }
  try {
    driver.release(taken.victim);
    taken.victim = 0;
  } catch (...) {
    // The old page cannot go, so the new one must. If that fails too there is a page more than the budget, and it is counted.
    try {
      driver.release(taken.page);
      use_victim();
    } catch (...) {  // NOLINT(bugprone-empty-catch)
    }
  }
}

void Growth::map_pages() {
  for (Run& run : runs_) {
    for (const Taken& taken : run.taken) {
      check_stopping();
      holder_.driver().map(address(*run.row, run.have + run.mapped), pool_.page_size(), taken.page);
      ++run.mapped;
    }
  }
}

void Growth::set_access() {
  for (const Run& run : runs_) {
    check_stopping();
    holder_.driver().set_access(address(*run.row, run.from), (run.target - run.from) * pool_.page_size());
  }
}

void Growth::zero_old_bits() {
  const bool fresh_is_zero = holder_.driver().traits().fresh_pages_are_zero;
  for (const Run& run : runs_) {
    const auto is_clean = [&](std::uint32_t page) {
      return page >= run.have && fresh_is_zero && run.taken[page - run.have].origin != Taken::Origin::kReused;
    };
    for (std::uint32_t page = run.from; page < run.target;) {
      if (is_clean(page)) {
        ++page;
        continue;
      }
      std::uint32_t end = page + 1;
      while (end < run.target && !is_clean(end)) ++end;
      holder_.driver().fill_zero(address(*run.row, page), (end - page) * pool_.page_size());
      page = end;
    }
  }
}

void Growth::publish() noexcept {
  std::uint64_t created = 0;
  std::uint64_t reused = 0;
  for (Run& run : runs_) {
    for (const Taken& taken : run.taken) {
      ++(taken.origin == Taken::Origin::kReused ? reused : created);
      run.row->pages.push_back(taken.page);
      if (taken.victim != 0) {
        ++pool_.created_;
        pool_.keep(taken.victim);
      }
    }
    run.row->accessible = run.target;
    holder_.group(run.group).mapped[run.kind] += run.taken.size();
    if (ahead_only_) pool_.ahead_transit_ -= run.taken.size();
  }
  pool_.transit_ -= created + reused;
  pool_.mapped_ += created + reused;
  holder_.mapped_pages += created + reused;
  outcome_.created = created;
  holder_.pages_created += created;
  holder_.pages_reused += reused;
  for (const Entry& entry : entries_) {
    RowGroup& group = holder_.group(entry.group);
    if (!ahead_only_ || !group.active) group.stamp = ++pool_.clock_;
    if (ahead_only_) continue;
    for (std::size_t kind = 0; kind < group.ahead.size(); ++kind) {
      group.ahead[kind] = std::max(group.ahead[kind], entry.ahead[kind]);
      group.shown[kind] = std::max({group.shown[kind], group.held[kind], group.ahead[kind]});
    }
  }
  std::size_t last = SIZE_MAX;
  for (const Run& run : runs_) {
    if (run.group != last) holder_.update(run.group);
    last = run.group;
  }
  if (!runs_.empty()) set_busy(false);
  if (!ahead_only_) PagePool::wake(holder_);
}

void Growth::undo(std::unique_lock<std::mutex>& lock, bool keep_created) noexcept {
  unmap_and_release(keep_created);
  lock.lock();
  undo_counts(keep_created);
}

void Growth::unmap_and_release(bool keep_created) noexcept {
  // The failed call may be the wait for a fill: nothing is unmapped under work that still runs. Where that cannot be known,
  // what was mapped stays, as surplus.
  bool idle = true;
  if (filling_) {
    try {
      holder_.driver().synchronize();
    } catch (...) {
      idle = false;
    }
  }
  filling_ = false;
  keep_created = keep_created || holder_.driver().traits().keeps_pages != nullptr;  // they stay, pooled and counted
  for (auto run = runs_.rbegin(); run != runs_.rend(); ++run) {
    if (run->mapped != 0 && !idle) {
      run->stuck = true;
    } else if (run->mapped != 0) {
      try {
        holder_.driver().unmap(address(*run->row, run->have), run->mapped * pool_.page_size());
      } catch (...) {
        run->stuck = true;
      }
    }
    for (std::size_t i = run->stuck ? run->mapped : 0; i < run->taken.size(); ++i) {
      Taken& taken = run->taken[i];
      if (taken.origin != Taken::Origin::kCreated || taken.page == 0 || keep_created) continue;
      try {
        holder_.driver().release(taken.page);
        taken.page = 0;
      } catch (...) {  // NOLINT(bugprone-empty-catch)
        // Stays, pooled and counted.
      }
    }
  }
}

void Growth::undo_counts(bool keep_created) noexcept {
  if (keep_created) {
    try {
      spare_.reserve(missing_);
    } catch (...) {  // NOLINT(bugprone-empty-catch)
      // Then they stay pooled, and counted.
    }
  }
  for (Run& run : runs_) {
    if (ahead_only_) pool_.ahead_transit_ -= run.taken.size();
    for (std::size_t i = 0; i < run.taken.size(); ++i) {
      Taken& taken = run.taken[i];
      --pool_.transit_;
      if (run.stuck && i < run.mapped) {
        // Still mapped, so the row says so. Not accessible, so no length may count on it.
        run.row->pages.push_back(taken.page);
        ++pool_.mapped_;
        ++holder_.mapped_pages;
        ++holder_.group(run.group).mapped[run.kind];
      } else if (taken.page != 0) {
        if (spare_.size() < spare_.capacity() && taken.origin == Taken::Origin::kCreated) spare_.push_back(taken.page);
        pool_.keep(taken.page);
      } else if (taken.origin == Taken::Origin::kCreated) {
        --pool_.created_;  // never made, or released again
      }
      if (taken.victim != 0) {
        if (taken.page != 0) ++pool_.created_;  // both exist: neither could be released
        pool_.keep(taken.victim);
      }
    }
  }
  for (const Run& run : runs_) {
    if (run.stuck) holder_.update(run.group);
  }
  set_busy(false);
  runs_.clear();
  pool_.wake_lacking();  // pages came back
  // What was at work here is not any more, and pages that could not be released are to go when they are above the limit.
  if (!ahead_only_ || pool_.created_ > pool_.limit_pages()) PagePool::wake(holder_);
}

void Growth::release_spare() noexcept {
  if (!pool_.gives_back()) spare_.clear();
  for (const PageHandle page : std::exchange(spare_, {})) {
    if (pool_.pooled_.erase(page) == 0) continue;  // the second attempt used it, or somebody else did
    try {
      holder_.driver().release(page);
      --pool_.created_;
    } catch (...) {
      pool_.keep(page);
    }
  }
}

}  // namespace vattn
