// PagePool under pressure: who gives up what, in which order. page_pool.hpp states the order.
#include <algorithm>
#include <iterator>
#include <limits>

#include "vattn/driver/limits.hpp"
#include "vattn/memory/page_pool.hpp"

namespace vattn {

std::uint64_t PagePool::total_excess() const noexcept {
  std::uint64_t excess = 0;
  for (const Holder* holder : holders_) {
    for (std::size_t group = 0; group < holder->groups(); ++group) excess += holder->excess(group);
  }
  return excess;
}

std::uint64_t PagePool::in_use() const noexcept { return mapped_ + (transit_ - ahead_transit_ - leaving_) - total_excess(); }

std::uint64_t PagePool::obtainable() const noexcept {
  const std::uint64_t used = in_use();
  return limit_pages() > used ? limit_pages() - used : 0;
}

std::uint64_t PagePool::creatable(std::uint64_t pages) const {
  const std::uint64_t budget = limit_pages() > created_ ? limit_pages() - created_ : 0;
  const std::uint64_t wanted = std::min(pages, budget);
  // Large growth asks first: it would otherwise take all the memory there is before it finds that it is not enough.
  if (wanted * page_size_ < kAskFirstBytes) return wanted;
  return std::min(wanted, driver_->memory_info().available_bytes / page_size_);
}

bool PagePool::anyone_busy() const noexcept {
  if (ahead_transit_ + leaving_ != 0) return true;
  for (const Holder* holder : holders_) {
    for (std::size_t group = 0; group < holder->groups(); ++group) {
      if (holder->group(group).busy) return true;
    }
  }
  return false;
}

std::uint64_t PagePool::held_by_others(std::uint64_t own, std::uint64_t available) const noexcept {
  const std::uint64_t alone = limit_pages() > own ? limit_pages() - own : 0;
  const std::uint64_t promised = in_use() > own ? in_use() - own : 0;
  return std::min(promised, alone > available ? alone - available : 0);
}

std::string PagePool::words_on_waiting(std::uint64_t needed, std::uint64_t available, std::uint64_t others) {
  const std::string held = others == 0 ? "nobody else holds memory that it could have"
                                       : "others hold " + std::to_string(others) + " bytes that it could have";
  return held + ", so waiting for them " + (needed <= available + others ? "can" : "cannot") + " help";
}

void PagePool::refuse(const Need& need, std::uint64_t available, const std::string& why) const {
  const std::uint64_t needed = need.pages * page_size_;
  const std::uint64_t available_bytes = available * page_size_;
  const std::uint64_t others = held_by_others(need.own, available) * page_size_;
  throw OutOfMemoryError(std::string(need.call) + ": " + std::to_string(needed) + " bytes more are needed, " + why + "; " +
                             words_on_waiting(needed, available_bytes, others) + ". Nothing changed: " + need.way_out,
                         needed, available_bytes, limit_bytes_, others);
}

bool PagePool::make_room(std::unique_lock<std::mutex>& lock, const Need& need) {
  if (need.promised != 0 && need.pages == 0 && in_use() > limit_pages()) {
    // All of it is mapped, but the limit was lowered: what is above it is to go, not to be promised again.
    const std::uint64_t before = in_use() - need.promised;
    refuse({need.promised, need.promised, need.own - need.promised, need.may_create, need.call, need.way_out},
           limit_pages() > before ? limit_pages() - before : 0,
           "more than memory_limit=" + std::to_string(limit_bytes_) + " leaves");
  }
  if (need.pages == 0) return false;
  if (need.pages + mapped_ > kMostPages) {
    // What others give up stays mapped, and counted.
    refuse({need.pages, need.promised, limit_pages(), need.may_create, need.call, need.way_out}, kMostPages - mapped_,
           std::to_string(need.pages) + " pages, and " + std::to_string(kMostPages) +
               " are the most that can be counted: a larger page_size needs fewer");
  }
  if (const std::uint64_t allowed = obtainable(); need.pages > allowed) {
    refuse(need, allowed,
           std::to_string(allowed * page_size_) + " of memory_limit=" + std::to_string(limit_bytes_) + " are available");
  }
  const std::uint64_t pooled = pooled_.size();
  if (pooled >= need.pages) return false;
  const std::uint64_t lacking = need.pages - pooled;
  const std::uint64_t to_create = need.may_create ? creatable(lacking) : 0;
  if (to_create >= lacking) return false;
  if (const std::uint64_t all = pooled + to_create + total_excess() + ahead_transit_ + leaving_; need.pages > all) {
    refuse(
        need, all,
        "and the " + std::string(driver_->traits().name) + " driver has " + std::to_string(to_create * page_size_) + " left");
  }
  if (reclaim(lock, lacking - to_create)) return true;
  refuse(need, pooled + to_create, "and the driver would not unmap what is not in use");
}

PagePool::Candidate PagePool::coldest(const Refused& refused, bool pending, const Holder* of) noexcept {
  Candidate best;
  const RowGroup* best_group = nullptr;
  for (Holder* holder : holders_) {
    if (of != nullptr && of != holder) continue;
    for (std::size_t index = 0; index < holder->groups(); ++index) {
      RowGroup& group = holder->group(index);
      if (group.busy || holder->excess(index) == 0 || has_pending(group) != pending) continue;
      const auto is_this = [&](const Candidate& one) { return one.holder == holder && one.group == index; };
      if (std::any_of(refused.begin(), refused.end(), is_this)) continue;
      // Look-ahead goes before anything warm; of equals the coldest.
      if (best_group != nullptr &&
          (group.active < best_group->active || (group.active == best_group->active && group.stamp >= best_group->stamp))) {
        continue;
      }
      best = {holder, index};
      best_group = &group;
    }
  }
  return best;
}

std::uint64_t PagePool::take_back(std::unique_lock<std::mutex>& lock, Candidate from, std::uint64_t pages, Losses* losses) {
  struct Cut {
    Row* row;
    std::uint8_t kind;
    std::uint32_t keep;
    bool done;
  };
  RowGroup& group = from.holder->group(from.group);
  std::vector<Cut> cuts;
  from.holder->each_row(from.group, [&](Row& row, std::uint8_t kind) {
    const auto mapped = static_cast<std::uint32_t>(row.pages.size());
    if (mapped > group.held[kind]) cuts.push_back({&row, kind, group.held[kind], false});
  });
  // A page off every row at a time, the longest rows first, so that what stays is as long as it can be in every row.
  std::uint64_t excess = 0;
  for (const Cut& cut : cuts) excess += cut.row->pages.size() - cut.keep;
  if (pages < excess) {
    std::uint64_t spared = excess - pages;
    for (bool any = true; spared != 0 && any;) {
      any = false;
      std::uint32_t shortest = UINT32_MAX;
      for (const Cut& cut : cuts) {
        if (cut.keep < cut.row->pages.size()) shortest = std::min(shortest, cut.keep);
      }
      for (auto cut = cuts.begin(); cut != cuts.end() && spared != 0; ++cut) {
        if (cut->keep != shortest || cut->keep == cut->row->pages.size()) continue;
        ++cut->keep;
        --spared;
        any = true;
      }
    }
  }
  for (const Cut& cut : cuts) cut.row->accessible = std::min(cut.row->accessible, cut.keep);
  from.holder->update(from.group);
  group.busy = true;
  lock.unlock();

  for (Cut& cut : cuts) {
    const std::size_t gone = cut.row->pages.size() - cut.keep;
    if (gone == 0) continue;
    try {
      driver_->unmap(cut.row->base + cut.keep * page_size_, gone * page_size_);
      cut.done = true;
    } catch (...) {
      if (losses != nullptr) losses->note_failure(losses->mappings);
    }
  }

  lock.lock();
  std::uint64_t taken = 0;
  for (const Cut& cut : cuts) {
    if (!cut.done) continue;
    Row& row = *cut.row;
    const std::size_t gone = row.pages.size() - cut.keep;
    mapped_ -= gone;
    for (auto page = row.pages.begin() + cut.keep; page != row.pages.end(); ++page) keep(*page);
    row.pages.resize(cut.keep);
    row.used = std::min(row.used, cut.keep);
    group.mapped[cut.kind] -= gone;
    from.holder->mapped_pages -= gone;
    taken += gone;
  }
  from.holder->update(from.group);
  group.busy = false;
  idle_.notify_all();
  if (taken != 0 || losses == nullptr) wake(*from.holder);  // not the mapper that settles, of its own failure, without end
  return taken;
}

bool PagePool::reclaim(std::unique_lock<std::mutex>& lock, std::uint64_t pages) {
  Refused refused;
  std::uint64_t taken = 0;
  while (taken < pages) {
    if (const Candidate next = coldest(refused, false); next.holder != nullptr) {
      const std::uint64_t got = take_back(lock, next, pages - taken, nullptr);
      if (got == 0) refused.push_back(next);
      taken += got;
      continue;
    }
    if (taken != 0) break;  // look again before waiting for anyone
    if (const Candidate next = coldest(refused, true); next.holder != nullptr) {
      const Fences fences = next.holder->group(next.group).fences;
      lock.unlock();
      try {
        for (const auto& fence : fences) fence->wait();
      } catch (...) {
        lock.lock();
        throw;
      }
      lock.lock();
      return true;
    }
    if (coldest(refused, false).holder != nullptr) continue;  // its fences passed between the two looks
    if (!anyone_busy()) return false;
    idle_.wait(lock);
    return true;
  }
  return true;
}

bool PagePool::release_one(std::unique_lock<std::mutex>& lock, std::set<PageHandle>::iterator page, Losses* losses) noexcept {
  auto node = pooled_.extract(page);
  ++transit_;
  ++leaving_;
  lock.unlock();
  bool released = true;
  try {
    driver_->release(node.value());
  } catch (...) {
    if (losses != nullptr) losses->note_failure(losses->pages);
    released = false;
  }
  lock.lock();
  --transit_;
  --leaving_;
  idle_.notify_all();
  if (released) {
    --created_;
  } else {
    pooled_.insert(std::move(node));
  }
  return released;
}

bool PagePool::settle(std::unique_lock<std::mutex>& lock, Losses& losses) noexcept {
  // One at a time: two would each take back what one must.
  while (settling_) idle_.wait(lock);
  if (created_ <= limit_pages() || !gives_back()) return false;
  settling_ = true;
  bool any = false;
  std::set<PageHandle> refused_pages;
  PageHandle below = std::numeric_limits<PageHandle>::max();  // where to look on: those from here up were refused
  Refused refused;
  try {
    while (created_ > limit_pages()) {
      const auto last = std::find_if(std::make_reverse_iterator(pooled_.lower_bound(below)), pooled_.rend(),
                                     [&](PageHandle page) { return refused_pages.find(page) == refused_pages.end(); });
      if (last != pooled_.rend()) {
        const PageHandle page = *last;
        if (release_one(lock, std::prev(last.base()), &losses)) {
          any = true;
        } else {
          refused_pages.insert(page);
          below = page;
        }
        continue;
      }
      const Candidate next = coldest(refused, false);
      if (next.holder == nullptr) break;
      if (take_back(lock, next, created_ - limit_pages(), &losses) == 0) {
        refused.push_back(next);
      } else {
        below = std::numeric_limits<PageHandle>::max();
      }
    }
  } catch (...) {  // NOLINT(bugprone-empty-catch)
    // No memory to note what was refused: tried again with the next call.
  }
  settling_ = false;
  idle_.notify_all();
  return any;
}

void PagePool::settle() noexcept {
  std::unique_lock lock(mutex_);
  Losses losses;
  settle(lock, losses);
}

void PagePool::scrub_excess(Holder& holder, std::size_t index) {
  std::unique_lock lock(mutex_);
  RowGroup& group = holder.group(index);
  while (group.busy) idle_.wait(lock);
  std::vector<std::pair<Address, std::size_t>> dirty;
  holder.each_row(index, [&](const Row& row, std::uint8_t kind) {
    const std::uint32_t from = group.held[kind];
    const std::uint32_t to = std::min(row.used, row.accessible);
    if (from < to) dirty.emplace_back(row.base + from * page_size_, (to - from) * page_size_);
  });
  if (dirty.empty()) return;
  static_cast<void>(has_pending(group));
  const Fences fences = group.fences;
  const auto done = [&] {
    lock.lock();
    group.busy = false;
    idle_.notify_all();
    wake(holder);
  };
  group.busy = true;
  lock.unlock();
  try {
    for (const auto& fence : fences) fence->wait();
    for (const auto& [at, size] : dirty) holder.driver().fill_zero(at, size);
  } catch (...) {
    done();
    throw;
  }
  done();
  holder.each_row(index, [&](Row& row, std::uint8_t kind) {
    if (row.used <= row.accessible) row.used = std::min(row.used, group.held[kind]);
  });
}

void PagePool::release_pooled(std::uint64_t pages) noexcept {
  std::unique_lock lock(mutex_);
  if (!gives_back()) return;
  for (; pages != 0 && !pooled_.empty(); --pages) {
    if (!release_one(lock, std::prev(pooled_.end()), nullptr)) return;  // it stays, counted, and is the next growth's
  }
}

bool PagePool::give_up_excess(Holder& holder, std::size_t index) noexcept {
  std::unique_lock lock(mutex_);
  while (holder.group(index).busy) idle_.wait(lock);
  const std::uint64_t excess = holder.excess(index);
  if (excess == 0) return true;
  bool all = false;
  try {
    all = take_back(lock, {&holder, index}, excess, nullptr) == excess;
  } catch (...) {  // NOLINT(bugprone-empty-catch)
    // No memory for the list of cuts: what is not needed stays mapped, and is excess like any other.
  }
  Losses losses;
  settle(lock, losses);
  wake_lacking();
  return all;
}

}  // namespace vattn
