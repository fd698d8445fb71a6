// The physical pages of a cache: creation, reuse and the budget they count against.
//
// A page is in one of three states: pooled (here, mapped nowhere), mapped (in a Row) or in transit (held by a transaction).
// take() prefers a pooled page to a new one, because creating is the dearest call there is. Where the driver gives each address
// a page of its own (Driver::home) and that page is not pooled, another pooled page is exchanged for it: made anew in its
// place, then the old one released, so memory stays the same and mappings merge.
//
// Promise: created == mapped + pooled whenever no call is in progress, checked by check(). give() never throws: what cannot be
// kept is released, what cannot be released is kept. Every page counts against the limit from create to release; an exchange
// holds one page more for the moment between its two calls.
// Thread: any; one mutex, held over the driver calls of take() and trim().
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "vattn/driver/driver.hpp"
#include "vattn/fork.hpp"

namespace vattn {

class PagePool;

/// A page out of the pool, owned: gives itself back. Unmap it first.
class Page {
 public:
  enum class Origin : std::uint8_t { kReused, kExchanged, kCreated };

  Page(PagePool& pool, PageHandle handle, Origin origin) noexcept : pool_(&pool), handle_(handle), origin_(origin) {}
  Page(Page&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), handle_(other.handle_), origin_(other.origin_) {}
  Page& operator=(Page&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(handle_, other.handle_);
    std::swap(origin_, other.origin_);
    return *this;
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  inline ~Page();

  [[nodiscard]] PageHandle handle() const noexcept { return handle_; }
  [[nodiscard]] Origin origin() const noexcept { return origin_; }

  /// The page leaves this object, which then gives nothing back.
  PageHandle detach() noexcept {
    pool_ = nullptr;
    return handle_;
  }

 private:
  PagePool* pool_;
  PageHandle handle_;
  Origin origin_;
};

class VATTN_API PagePool {
 public:
  struct Usage {
    std::uint64_t created_pages = 0;  ///< exist now
    std::uint64_t pooled_pages = 0;
    std::uint64_t mapped_pages = 0;
    std::uint64_t limit_bytes = 0;
    std::uint64_t total_created = 0;  ///< create calls that a finished growth used
    std::uint64_t total_reused = 0;   ///< pages that a finished growth took from the pool instead
  };

  /// What could not be given back to the driver, and why (the first reason).
  struct Losses {
    std::uint64_t pages = 0;
    std::uint64_t mappings = 0;
    std::uint64_t ranges = 0;
    std::string reason;

    [[nodiscard]] bool any() const noexcept { return pages + mappings + ranges != 0; }
    void note(std::uint64_t& count, const std::exception& error) noexcept;
  };

  PagePool(std::shared_ptr<Driver> driver, std::size_t page_size, std::uint64_t limit_bytes);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;
  PagePool(PagePool&&) = delete;
  PagePool& operator=(PagePool&&) = delete;

  [[nodiscard]] std::size_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] Driver& driver() const noexcept { return *driver_; }

  /// A page to map first at `near`. OutOfMemoryError at the limit, or what the driver throws; the pool is then as before.
  [[nodiscard]] Page take(Address near);

  /// Back into the pool.
  void give(PageHandle page) noexcept;

  /// Back to the driver: the undoing of a create. A page the driver refuses to take stays pooled.
  void discard(PageHandle page) noexcept;

  /// For a page that is still mapped and whose owner ends: drops the handle and the count; its memory goes with the mapping.
  void forget(PageHandle page) noexcept;

  /// Pages went into a Row, or left one.
  void note_mapped(std::uint64_t pages) noexcept;
  void note_unmapped(std::uint64_t pages) noexcept;
  /// A growth finished with pages of these origins.
  void note_growth(std::uint64_t created, std::uint64_t reused) noexcept;

  [[nodiscard]] Usage usage() const noexcept;

  /// Pages that take() can still hand out by the budget, pooled ones included.
  [[nodiscard]] std::uint64_t available_pages() const noexcept;

  /// Throws OutOfMemoryError where taking `missing` pages cannot end well: by the budget, by the most pages there are books
  /// for, and, for large growth, by what the driver has. Asked before anything is taken, so that a growth that must fail does
  /// not first take all the memory there is. `call` and `way_out` are for the message.
  void check_room(const char* call, std::uint64_t missing, const char* way_out) const;

  void set_limit(std::uint64_t limit_bytes) noexcept;

  /// Releases pooled pages until at most `keep` pages exist. Pages the driver refuses to take stay pooled.
  void trim(std::uint64_t keep, Losses& losses) noexcept;

  /// Releases pooled pages above the limit: after the limit was lowered, or pages came back while it was exceeded.
  void trim_to_limit(Losses& losses) noexcept;

  /// No more growth, and every pooled page goes back; pages still mapped follow as their last users let go.
  void close(Losses& losses) noexcept;

  /// Throws Error if the counts do not add up. Call it with no growth in progress.
  void check() const;

 private:
  [[nodiscard]] std::uint64_t limit_pages() const noexcept { return limit_bytes_ / page_size_; }
  bool keep(PageHandle page) noexcept;
  void release_one_of(std::set<PageHandle>::iterator pooled);

  Generation generation_;
  std::shared_ptr<Driver> driver_;
  std::size_t page_size_;
  mutable std::mutex mutex_;
  std::uint64_t limit_bytes_;
  std::set<PageHandle> pooled_;  // ordered, so that a page with a home is found and an exchange empties the file from its end
  std::uint64_t created_ = 0;
  std::uint64_t mapped_ = 0;
  std::uint64_t total_created_ = 0;
  std::uint64_t total_reused_ = 0;
};

Page::~Page() {
  if (pool_ != nullptr) pool_->give(handle_);
}

}  // namespace vattn
