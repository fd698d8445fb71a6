// PagePool: making and closing it, its holders, its limit and its statistics. Pressure is in reclaim.cpp, growth in growth.cpp.
#include "vattn/memory/page_pool.hpp"

#include <algorithm>
#include <cerrno>

#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/limits.hpp"

namespace vattn {

void PagePool::Losses::note_failure(std::uint64_t& count) noexcept {
  ++count;
  if (!reason.empty()) return;
  try {
    throw;
  } catch (const std::exception& error) {
    try {
      reason = error.what();
    } catch (...) {  // NOLINT(bugprone-empty-catch)
      // No memory for the words; the count stands.
    }
  } catch (...) {  // NOLINT(bugprone-empty-catch)
    // A driver of somebody's own that throws what has no words.
  }
}

PagePool::PagePool(Device device, std::shared_ptr<Driver> driver, std::size_t page_size, std::uint64_t limit_bytes)
    : device_(device), driver_(std::move(driver)), page_size_(page_size), limit_bytes_(limit_bytes) {}

PagePool::~PagePool() {
  Losses losses;  // nobody is left to hear of them; close() is where they are reported
  shut(losses);
}

std::shared_ptr<PagePool> PagePool::make(Device device, std::shared_ptr<Driver> driver, std::size_t page_size,
                                         std::uint64_t limit_bytes) {
  // In a forked child the pool is left alone: its lock may be held, and its condition have waiters, that do not exist there.
  const auto destroy = [](PagePool* pool) {
    if (pool->generation_.is_current()) delete pool;
  };
  return {new PagePool(device, std::move(driver), page_size, limit_bytes), destroy};
}

std::shared_ptr<PagePool> PagePool::make(Device device, std::optional<std::int64_t> memory_limit,
                                         std::optional<std::int64_t> page_size) {
  auto driver = std::make_shared<CountingDriver>(open_driver(device));
  const std::int64_t page = choose_page_size(page_size, driver->traits());
  if (memory_limit && *memory_limit < page) {
    throw std::invalid_argument("memory_limit=" + std::to_string(*memory_limit) + " must be at least one page, " +
                                std::to_string(page) + " bytes: raise it, or use a smaller page_size");
  }
  const std::uint64_t limit = memory_limit ? static_cast<std::uint64_t>(*memory_limit) : default_memory_limit(*driver);
  return make(device, std::move(driver), static_cast<std::size_t>(page), limit);
}

std::uint64_t PagePool::memory_limit() const {
  generation_.check("this PagePool");
  const std::lock_guard lock(mutex_);
  if (closed_) throw ClosedError("this PagePool is closed: make a new one");
  return limit_bytes_;
}

void PagePool::set_memory_limit(std::int64_t bytes) {
  generation_.check("this PagePool");
  if (bytes < static_cast<std::int64_t>(page_size_)) {
    throw std::invalid_argument("memory_limit=" + std::to_string(bytes) + " must be at least one page, " +
                                std::to_string(page_size_) + " bytes: raise it, or use a smaller page_size");
  }
  std::unique_lock lock(mutex_);
  if (closed_) throw ClosedError("this PagePool is closed: make a new one");
  if (!gives_back() && static_cast<std::uint64_t>(bytes) < created_ * page_size_) {
    throw DriverError("release", EOPNOTSUPP, "EOPNOTSUPP",
                      "memory_limit=" + std::to_string(bytes) + " is under the " + std::to_string(created_ * page_size_) +
                          " bytes that exist, and none of them can be given back before all are, since " +
                          driver_->traits().keeps_pages + ". Close the caches and the pool to give it all back");
  }
  limit_bytes_ = static_cast<std::uint64_t>(bytes);
  Losses losses;  // what the driver would not take is counted, and stats() shows it above the limit
  settle(lock, losses);
  if (created_ > limit_pages()) {
    for (Holder* holder : holders_) wake(*holder);  // retired pages above the limit are to be waited for
  } else {
    wake_lacking();
  }
}

void PagePool::check_open() const {
  generation_.check("pool: this PagePool");
  const std::lock_guard lock(mutex_);
  if (closed_) throw ClosedError("pool: this PagePool is closed: make a new one");
}

void PagePool::join(Holder& holder) {
  generation_.check("pool: this PagePool");
  const std::lock_guard lock(mutex_);
  if (closed_) throw ClosedError("pool: this PagePool is closed: make a new one");
  holder.set_number(++joined_);  // may throw, and then it has not joined
  if (lacking_.capacity() <= holders_.size()) lacking_.reserve(2 * holders_.size() + 1);
  holders_.push_back(&holder);
}

void PagePool::leave(Holder& holder) noexcept {
  std::unique_lock lock(mutex_);
  const auto busy = [&] {
    for (std::size_t group = 0; group < holder.groups(); ++group) {
      if (holder.group(group).busy) return true;
    }
    return false;
  };
  while (busy()) idle_.wait(lock);
  // Its owner waits for the device before anything is unmapped; nobody asks about these any more.
  for (std::size_t group = 0; group < holder.groups(); ++group) holder.group(group).fences.clear();
  holders_.erase(std::remove(holders_.begin(), holders_.end(), &holder), holders_.end());
  if (holder.listed) std::erase(lacking_, &holder);
  idle_.notify_all();
}

void PagePool::take_group(Holder& holder, std::size_t group) noexcept {
  const std::lock_guard lock(mutex_);
  holder.group(group).active = true;
  holder.group(group).shown = {UINT32_MAX, UINT32_MAX};
  holder.group(group).stamp = ++clock_;
  wake(holder);  // another group is the next one to keep warm
}

void PagePool::retire(Holder& holder, std::size_t index, const Kept& kept, const Fences& fences) {
  const std::lock_guard lock(mutex_);
  RowGroup& group = holder.group(index);
  static_cast<void>(has_pending(group));
  group.fences.insert(group.fences.end(), fences.begin(), fences.end());  // all that can throw, before anything changes
  holder.each_row(index, [&](Row& row, std::uint8_t kind) { row.used = std::max(row.used, group.held[kind]); });
  group.held = kept.held;
  group.ahead = {std::min(group.ahead[0], kept.ahead[0]), std::min(group.ahead[1], kept.ahead[1])};
  group.shown = {std::max(group.held[0], group.ahead[0]), std::max(group.held[1], group.ahead[1])};
  group.active = kept.active;
  group.stamp = ++clock_;
  wake(holder);
}

Fences PagePool::pending(Holder& holder, std::size_t group) {
  const std::lock_guard lock(mutex_);
  static_cast<void>(has_pending(holder.group(group)));
  return holder.group(group).fences;
}

bool PagePool::has_pending(RowGroup& group) noexcept {
  std::erase_if(group.fences, [](const std::shared_ptr<Fence>& fence) { return fence->has_passed(); });
  return !group.fences.empty();
}

void PagePool::wake(Holder& holder) noexcept {
  if (!holder.has_mapper) return;
  holder.woken = true;
  holder.resting = false;
  holder.wake.notify_one();
}

void PagePool::wake_lacking() noexcept {
  const std::uint64_t budget = limit_pages() > created_ ? limit_pages() - created_ : 0;
  std::uint64_t room = pooled_.size() + budget;
  if (room < least_lacking_) return;
  // As far as there is room; what was served on the way leaves the list.
  std::uint64_t least = UINT64_MAX;
  const auto has_left = [&](Holder* holder) {
    if (holder->lacks > room) {
      least = std::min(least, holder->lacks);
      return false;
    }
    if (holder->lacks != 0) {
      room -= std::exchange(holder->lacks, 0);
      wake(*holder);
    }
    holder->listed = false;
    return true;
  };
  auto stop = lacking_.begin();
  auto kept = lacking_.begin();
  for (; stop != lacking_.end() && room != 0; ++stop) {
    if (!has_left(*stop)) *kept++ = *stop;
  }
  least_lacking_ = stop == lacking_.end() ? least : 1;
  lacking_.erase(kept, stop);
}

void PagePool::note_lacking(Holder& holder, std::uint64_t pages) noexcept {
  holder.lacks = pages;
  least_lacking_ = std::min(least_lacking_, pages);
  if (std::exchange(holder.listed, true)) return;
  lacking_.push_back(&holder);  // there is room for every holder since it joined
}

PagePool::HolderUsage PagePool::usage(Holder& holder) {
  const std::lock_guard lock(mutex_);
  HolderUsage usage = usage_of(holder);
  usage.pages_created = holder.pages_created;
  usage.pages_reused = holder.pages_reused;
  usage.pooled_pages = pooled_.size() + transit_;
  usage.available_pages = obtainable();
  usage.limit_bytes = limit_bytes_;
  return usage;
}

PagePool::HolderUsage PagePool::usage_of(Holder& holder) noexcept {
  HolderUsage usage;
  for (std::size_t index = 0; index < holder.groups(); ++index) {
    RowGroup& group = holder.group(index);
    const std::uint64_t excess = holder.excess(index);
    if (excess == 0) continue;
    if (has_pending(group)) {
      usage.retired_pages += excess;
    } else {
      (group.active ? usage.ahead_pages : usage.warm_pages) += excess;
    }
    if (!group.active) ++usage.warm_groups;
  }
  usage.mapped_pages = holder.mapped_pages - usage.retired_pages;
  return usage;
}

PoolStats PagePool::stats() {
  generation_.check("this PagePool");
  const std::lock_guard lock(mutex_);
  if (closed_) throw ClosedError("this PagePool is closed: make a new one");
  PoolStats stats;
  for (Holder* holder : holders_) {
    const HolderUsage held = usage_of(*holder);
    const std::uint64_t reclaimable = held.warm_pages + held.ahead_pages;
    stats.members.push_back(
        {holder->name(), held.mapped_pages * page_size_, held.retired_pages * page_size_, reclaimable * page_size_});
    stats.retired_bytes += held.retired_pages * page_size_;
    stats.reclaimable_bytes += reclaimable * page_size_;
  }
  stats.created_bytes = created_ * page_size_;
  stats.pooled_bytes = (pooled_.size() + transit_) * page_size_;
  stats.mapped_bytes = mapped_ * page_size_ - stats.retired_bytes;
  stats.limit_bytes = limit_bytes_;
  stats.available_bytes = obtainable() * page_size_;
  return stats;
}

bool PagePool::has_room(std::uint64_t promised, std::uint64_t missing) const {
  const std::lock_guard lock(mutex_);
  if (promised == 0) return true;
  if (missing + mapped_ > kMostPages || promised > obtainable()) return false;
  const std::uint64_t spare = pooled_.size() + total_excess() + ahead_transit_ - (promised - missing);
  if (missing <= spare) return true;
  return (missing - spare) * page_size_ <= driver_->memory_info().available_bytes;
}

void PagePool::keep(PageHandle page) noexcept {
  try {
    pooled_.insert(page);
    return;
  } catch (...) {  // NOLINT(bugprone-empty-catch)
    // No memory to remember the page by: give it back instead.
  }
  try {
    driver_->release(page);
  } catch (...) {  // NOLINT(bugprone-empty-catch)
    // Lost to this pool; it goes with the driver. The count below keeps the books true.
  }
  --created_;
}

void PagePool::empty(std::span<Row> rows, Losses& losses) noexcept {
  for (Row& row : rows) {
    if (row.pages.empty()) continue;
    bool unmapped = true;
    try {
      driver_->unmap(row.base, row.pages.size() * page_size_);
    } catch (...) {
      losses.note_failure(losses.mappings);
      unmapped = false;
    }
    const std::lock_guard lock(mutex_);
    mapped_ -= row.pages.size();
    for (const PageHandle page : row.pages) {
      if (unmapped) {
        keep(page);
        continue;
      }
      // Its owner ends: the handle goes all the same, so that the memory goes when the mapping does.
      ++losses.pages;
      --created_;
      try {
        driver_->release(page);
      } catch (...) {  // NOLINT(bugprone-empty-catch)
        // Neither unmapped nor released: it goes with the driver, and the caller reports it.
      }
    }
    row.pages.clear();
    row.accessible = row.used = 0;
  }
  std::unique_lock lock(mutex_);
  settle(lock, losses);
  wake_lacking();  // pages came back, which look-ahead may use
}

void PagePool::shut(Losses& losses) noexcept {
  std::unique_lock lock(mutex_);
  limit_bytes_ = 0;
  closed_ = true;
  settle(lock, losses);
}

void PagePool::close() {
  generation_.check("this PagePool");
  Losses losses;
  {
    std::unique_lock lock(mutex_);
    if (closed_) return;
    if (!holders_.empty()) {
      std::string names;
      for (const Holder* holder : holders_) names += (names.empty() ? "" : ", ") + holder->name();
      throw InUseError("close: this PagePool still has members: " + names + ". Close them first");
    }
    limit_bytes_ = 0;
    closed_ = true;
    settle(lock, losses);
  }
  if (!losses.any()) return;
  throw Error("close: closed, but the driver would not take back " + std::to_string(losses.pages) +
              " pages (first: " + losses.reason + "). What is left goes when the process ends");
}

bool PagePool::is_closed() const noexcept {
  if (!generation_.is_current()) return true;
  const std::lock_guard lock(mutex_);
  return closed_;
}

void PagePool::check() const {
  const std::lock_guard lock(mutex_);
  if (created_ == mapped_ + pooled_.size() + transit_) return;
  throw Error("broken count: " + std::to_string(created_) + " pages exist, but " + std::to_string(mapped_) + " are mapped, " +
              std::to_string(pooled_.size()) + " pooled and " + std::to_string(transit_) +
              " in transit. This is a bug in vattn; the cache is closed");
}

}  // namespace vattn
