#include "vattn/memory/page_pool.hpp"

#include <string>

#include "vattn/driver/limits.hpp"

namespace vattn {

void PagePool::Losses::note(std::uint64_t& count, const std::exception& error) noexcept {
  ++count;
  if (!reason.empty()) return;
  try {
    reason = error.what();
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    // No memory for the words; the count stands.
  }
}

PagePool::PagePool(std::shared_ptr<Driver> driver, std::size_t page_size, std::uint64_t limit_bytes)
    : driver_(std::move(driver)), page_size_(page_size), limit_bytes_(limit_bytes) {}

PagePool::~PagePool() {
  if (!generation_.is_current()) return;
  Losses losses;  // nobody is left to hear of them; close() is where they are reported
  trim(0, losses);
}

Page PagePool::take(Address near) {
  const std::lock_guard lock(mutex_);
  if (created_ - pooled_.size() >= limit_pages()) {
    throw OutOfMemoryError("create: all " + std::to_string(limit_pages()) +
                               " pages of memory_limit are in use: raise it, free a " + "slot, or ask for fewer tokens",
                           page_size_, 0, limit_bytes_);
  }
  const PageHandle home = driver_->home(near);
  if (!pooled_.empty()) {
    const auto found = home == 0 ? std::prev(pooled_.end()) : pooled_.find(home);
    if (found != pooled_.end()) {
      const PageHandle page = *found;
      pooled_.erase(found);
      return {*this, page, Page::Origin::kReused};
    }
    PageHandle page = 0;
    try {
      page = driver_->create(page_size_, near);
    } catch (const OutOfMemoryError&) {
      // No room for one page more, even for a moment: a page that merges less works as well.
      const auto last = std::prev(pooled_.end());
      Page old(*this, *last, Page::Origin::kReused);
      pooled_.erase(last);
      return old;
    }
    ++created_;
    Page made(*this, page, Page::Origin::kExchanged);
    try {
      release_one_of(std::prev(pooled_.end()));
    } catch (const std::exception&) {
      // The old page cannot go, so the new one must: the caller gets the old one, which merges less and works as well.
      try {
        driver_->release(page);
        --created_;
        made.detach();
      } catch (const std::exception&) {
        return made;  // one page above the budget, and counted
      }
      const auto last = std::prev(pooled_.end());
      Page old(*this, *last, Page::Origin::kReused);
      pooled_.erase(last);
      return old;
    }
    return made;
  }
  const PageHandle page = driver_->create(page_size_, near);
  ++created_;
  return {*this, page, Page::Origin::kCreated};
}

void PagePool::release_one_of(std::set<PageHandle>::iterator pooled) {
  driver_->release(*pooled);
  pooled_.erase(pooled);
  --created_;
}

bool PagePool::keep(PageHandle page) noexcept {
  try {
    pooled_.insert(page);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void PagePool::give(PageHandle page) noexcept {
  if (!generation_.is_current()) return;
  const std::lock_guard lock(mutex_);
  if (keep(page)) return;
  // No memory to remember the page by: give it back instead.
  try {
    driver_->release(page);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    // Lost to this pool; it goes with the driver. The count below keeps the books true.
  }
  --created_;
}

void PagePool::discard(PageHandle page) noexcept {
  if (!generation_.is_current()) return;
  const std::lock_guard lock(mutex_);
  try {
    driver_->release(page);
    --created_;
  } catch (const std::exception&) {
    if (!keep(page)) --created_;
  }
}

void PagePool::forget(PageHandle page) noexcept {
  const std::lock_guard lock(mutex_);
  try {
    driver_->release(page);
  } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    // Neither unmapped nor released: it goes with the driver, and the caller reports it.
  }
  --created_;
}

void PagePool::note_mapped(std::uint64_t pages) noexcept {
  const std::lock_guard lock(mutex_);
  mapped_ += pages;
}

void PagePool::note_unmapped(std::uint64_t pages) noexcept {
  const std::lock_guard lock(mutex_);
  mapped_ -= pages;
}

void PagePool::note_growth(std::uint64_t created, std::uint64_t reused) noexcept {
  const std::lock_guard lock(mutex_);
  total_created_ += created;
  total_reused_ += reused;
}

PagePool::Usage PagePool::usage() const noexcept {
  const std::lock_guard lock(mutex_);
  return {created_, pooled_.size(), mapped_, limit_bytes_, total_created_, total_reused_};
}

std::uint64_t PagePool::available_pages() const noexcept {
  const std::lock_guard lock(mutex_);
  const std::uint64_t in_use = created_ - pooled_.size();
  return limit_pages() > in_use ? limit_pages() - in_use : 0;
}

void PagePool::check_room(const char* call, std::uint64_t missing, const char* way_out) const {
  const Usage now = usage();
  const std::uint64_t needed = missing * page_size_;
  const auto refuse = [&](const std::string& why, std::uint64_t available) {
    throw OutOfMemoryError(
        std::string(call) + ": " + std::to_string(needed) + " bytes more are needed, " + why + ". Nothing changed: " + way_out,
        needed, available, now.limit_bytes);
  };
  const std::uint64_t available = available_pages();
  if (missing > available) {
    const std::uint64_t bytes = available * page_size_;
    refuse(std::to_string(bytes) + " of memory_limit=" + std::to_string(now.limit_bytes) + " are available", bytes);
  }
  if (missing + now.mapped_pages > kMostPages) {
    refuse(std::to_string(missing) + " pages, and " + std::to_string(kMostPages) +
               " are the most that can be counted: a larger " + "page_size needs fewer",
           kMostPages * page_size_);
  }
  if (needed < kAskFirstBytes || missing <= now.pooled_pages) return;
  const std::uint64_t left = driver_->memory_info().available_bytes;
  if ((missing - now.pooled_pages) * page_size_ > left) {
    refuse("and the " + std::string(driver_->traits().name) + " driver has " + std::to_string(left) + " left", left);
  }
}

void PagePool::set_limit(std::uint64_t limit_bytes) noexcept {
  const std::lock_guard lock(mutex_);
  limit_bytes_ = limit_bytes;
}

void PagePool::trim(std::uint64_t keep_pages, Losses& losses) noexcept {
  const std::lock_guard lock(mutex_);
  auto it = pooled_.end();
  while (created_ > keep_pages && it != pooled_.begin()) {
    const auto candidate = std::prev(it);
    try {
      driver_->release(*candidate);
      it = pooled_.erase(candidate);
      --created_;
    } catch (const std::exception& error) {
      losses.note(losses.pages, error);
      it = candidate;
    }
  }
}

void PagePool::trim_to_limit(Losses& losses) noexcept {
  std::uint64_t keep_pages = 0;
  {
    const std::lock_guard lock(mutex_);
    keep_pages = limit_pages();
    if (created_ <= keep_pages) return;
  }
  trim(keep_pages, losses);
}

void PagePool::close(Losses& losses) noexcept {
  set_limit(0);
  trim(0, losses);
}

void PagePool::check() const {
  const std::lock_guard lock(mutex_);
  if (created_ == mapped_ + pooled_.size()) return;
  throw Error("broken count: " + std::to_string(created_) + " pages exist, but " + std::to_string(mapped_) +
              " are mapped and " + std::to_string(pooled_.size()) + " pooled. This is a bug in vattn; the cache is closed");
}

}  // namespace vattn
