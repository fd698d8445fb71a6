// One budget of physical pages, and the ledger of who holds them. A cache makes a pool of its own, or several caches and
// growable tensors are given one.
//
//     auto pool = vattn::PagePool::make({vattn::Device::Kind::kCuda, 0}, memory_limit, page_size);
//     vattn::KVCache a(config, pool), b(other, pool);        // what a gives up, b can have within one step
//
// A page is pooled (mapped nowhere), in transit (taken by a growth that is at work) or mapped (in a holder's row). Every page
// counts against the limit from create to release. Under pressure the ledger gives up, in this order: pooled pages, new ones
// while the budget allows, look-ahead, warm pages from the coldest on, and retired ones, for whose fences it waits.
//
// Promise: created == pooled + in transit + mapped at every moment; a broken count is an Error, never an abort. What the driver
// will not release stays pooled, what it will not unmap stays mapped; both are counted and tried again.
// Thread: any. One lock, under the lock of at most one holder, and never held across a driver call that maps, unmaps, creates
// or waits. No thread holds the locks of two holders: what a holder has beyond its promises is the ledger's, not the holder's.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "vattn/driver/open.hpp"
#include "vattn/fork.hpp"
#include "vattn/memory/holder.hpp"
#include "vattn/memory/pool_stats.hpp"

namespace vattn {

class VATTN_API PagePool {
 public:
  /// What could not be given back to the driver, and why (the first reason).
  struct Losses {
    std::uint64_t pages = 0;
    std::uint64_t mappings = 0;
    std::uint64_t ranges = 0;
    std::string reason;

    [[nodiscard]] bool any() const noexcept { return pages + mappings + ranges != 0; }
    /// In a catch clause: one more, for the reason that was caught.
    void note_failure(std::uint64_t& count) noexcept;
  };

  /// A pool to share. `memory_limit` in bytes, at least one page; none: 90 % of what is free now. std::invalid_argument.
  [[nodiscard]] static std::shared_ptr<PagePool> make(Device device, std::optional<std::int64_t> memory_limit = {},
                                                      std::optional<std::int64_t> page_size = {});
  /// A pool on a driver of the caller's making.
  [[nodiscard]] static std::shared_ptr<PagePool> make(Device device, std::shared_ptr<Driver> driver, std::size_t page_size,
                                                      std::uint64_t limit_bytes);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;
  PagePool(PagePool&&) = delete;
  PagePool& operator=(PagePool&&) = delete;

  [[nodiscard]] Device device() const noexcept { return device_; }
  [[nodiscard]] std::size_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] const std::shared_ptr<Driver>& driver() const noexcept { return driver_; }

  [[nodiscard]] std::uint64_t memory_limit() const;
  /// Holds at once for growth. Gives up what nobody was promised, down to the new limit: now, or once its fences have passed.
  void set_memory_limit(std::int64_t bytes);
  [[nodiscard]] PoolStats stats();
  /// Gives every pooled page back; pages of views that still live follow with them. InUseError while it has members. Error
  /// naming what the driver would not take; closed all the same.
  void close();
  [[nodiscard]] bool is_closed() const noexcept;

  // For holders.

  /// ClosedError, before any lock, where the pool is closed or belongs to the process that forked this one.
  void check_open() const;
  /// Enters a holder. ClosedError when the pool is closed.
  void join(Holder& holder);
  /// Takes it out again; its rows are then its owner's alone. Waits for whoever is changing them.
  void leave(Holder& holder) noexcept;

  /// A group is taken by a request, or given up: what is beyond `kept.held` is then excess, guarded by `fences`.
  void take_group(Holder& holder, std::size_t group) noexcept;
  struct Kept {
    Extent held{};
    Extent ahead{};
    bool active = false;
  };
  void retire(Holder& holder, std::size_t group, const Kept& kept, const Fences& fences);
  /// Unmaps what a group has beyond its promise, fences or not; false where the driver refused some of it.
  bool give_up_excess(Holder& holder, std::size_t group) noexcept;
  /// Zeroes what requests left in the excess of a group, once its fences have passed.
  void scrub_excess(Holder& holder, std::size_t group);
  /// Gives up to `pages` pooled pages back to the driver: what a failed operation had made.
  void release_pooled(std::uint64_t pages) noexcept;
  /// Unmaps rows whose holder has left and takes their pages; counts what could not be unmapped, and lets go of it.
  void empty(std::span<Row> rows, Losses& losses) noexcept;

  /// Gives up what is above the limit, as far as no fence has to be waited for.
  void settle() noexcept;
  /// settle(), with the lock held; released while pages are given back. True if anything was.
  bool settle(std::unique_lock<std::mutex>& lock, Losses& losses) noexcept;

  struct HolderUsage {
    std::uint64_t mapped_pages = 0;  ///< retired ones not counted
    std::uint64_t retired_pages = 0;
    std::uint64_t warm_pages = 0;
    std::uint64_t ahead_pages = 0;
    std::uint64_t warm_groups = 0;
    std::uint64_t pages_created = 0;  ///< since it joined
    std::uint64_t pages_reused = 0;
    // Of the whole pool:
    std::uint64_t pooled_pages = 0;
    std::uint64_t available_pages = 0;
    std::uint64_t limit_bytes = 0;
  };
  [[nodiscard]] HolderUsage usage(Holder& holder);
  /// Whether a growth that promises `promised` pages more, of which `missing` are not mapped yet, could have them now.
  [[nodiscard]] bool has_room(std::uint64_t promised, std::uint64_t missing) const;

  /// The fences of a group that have not passed.
  [[nodiscard]] Fences pending(Holder& holder, std::size_t group);

  /// Throws Error if the counts do not add up.
  void check() const;

  /// No more growth and no limit but 0: for the pool of a single holder that has left.
  void shut(Losses& losses) noexcept;

  [[nodiscard]] std::unique_lock<std::mutex> lock() const { return std::unique_lock(mutex_); }
  /// With the lock held: a holder's mapper may have something to do.
  static void wake(Holder& holder) noexcept;

 private:
  friend class Growth;
  friend class Mapper;

  PagePool(Device device, std::shared_ptr<Driver> driver, std::size_t page_size, std::uint64_t limit_bytes);

  /// What a growth lacks.
  struct Need {
    std::uint64_t pages;     ///< not mapped yet
    std::uint64_t promised;  ///< these, and what is mapped of its own excess
    std::uint64_t own;       ///< mapped and promised to the groups that grow, by this growth too
    bool may_create;         ///< false once the device has said that it has no more
    const char* call;
    const char* way_out;
  };

  // All of these want the lock.
  [[nodiscard]] static HolderUsage usage_of(Holder& holder) noexcept;
  [[nodiscard]] std::uint64_t limit_pages() const noexcept { return limit_bytes_ / page_size_; }
  [[nodiscard]] std::uint64_t total_excess() const noexcept;
  /// Promised to somebody, or on the way to be.
  [[nodiscard]] std::uint64_t in_use() const noexcept;
  [[nodiscard]] std::uint64_t obtainable() const noexcept;
  [[nodiscard]] std::uint64_t creatable(std::uint64_t pages) const;
  [[nodiscard]] bool anyone_busy() const noexcept;
  /// Whether a released page's memory goes back. Where the driver keeps it until the last page, pages stay pooled, and so
  /// counted, until the pool is closed.
  [[nodiscard]] bool gives_back() const noexcept { return closed_ || driver_->traits().keeps_pages == nullptr; }
  static bool has_pending(RowGroup& group) noexcept;

  /// Sees to it that `need` can be had at once. True: the lock was released meanwhile, so look again. OutOfMemoryError.
  bool make_room(std::unique_lock<std::mutex>& lock, const Need& need);
  /// Pages that a growth could have besides `available`, once everybody else gave up what was promised; `own` as in Need.
  [[nodiscard]] std::uint64_t held_by_others(std::uint64_t own, std::uint64_t available) const noexcept;
  /// For OutOfMemoryError: whether to wait for them.
  [[nodiscard]] static std::string words_on_waiting(std::uint64_t needed, std::uint64_t available, std::uint64_t others);
  [[noreturn]] void refuse(const Need& need, std::uint64_t available, const std::string& why) const;

  /// While a growth that was asked for looks for pages, mappers take none.
  class Pressure {
   public:
    explicit Pressure(PagePool& pool) noexcept : pool_(pool) { ++pool_.pressed_; }
    Pressure(const Pressure&) = delete;
    Pressure& operator=(const Pressure&) = delete;
    ~Pressure() {
      if (--pool_.pressed_ != 0 || !std::exchange(pool_.turned_away_, false)) return;
      pool_.wake_lacking();
    }

   private:
    PagePool& pool_;
  };

  struct Candidate {
    Holder* holder = nullptr;
    std::size_t group = 0;
  };
  using Refused = std::vector<Candidate>;
  [[nodiscard]] Candidate coldest(const Refused& refused, bool pending, const Holder* of = nullptr) noexcept;
  /// Unmaps `pages` pages (at most) of a group's excess and pools them. The lock is released meanwhile. How many it got.
  std::uint64_t take_back(std::unique_lock<std::mutex>& lock, Candidate from, std::uint64_t pages, Losses* losses);
  /// Gives one pooled page to the driver. The lock is released meanwhile. False: the driver refused, and the page is pooled as
  /// before.
  bool release_one(std::unique_lock<std::mutex>& lock, std::set<PageHandle>::iterator page, Losses* losses) noexcept;
  /// Takes back up to `pages` pages, waiting for others and for fences if need be. False: there is nothing to take.
  bool reclaim(std::unique_lock<std::mutex>& lock, std::uint64_t pages);

  /// Into the pool, with the lock held. Without memory to remember it by, the page is given to the driver.
  void keep(PageHandle page) noexcept;
  /// Pages came back: wakes the mappers that found too few, as many as now find enough. Whoever lacks nothing sleeps on: with
  /// a thousand members, waking all of them for each that closes is what takes the time.
  void wake_lacking() noexcept;
  /// A mapper found fewer than that.
  void note_lacking(Holder& holder, std::uint64_t pages) noexcept;

  Generation generation_;
  Device device_;
  std::shared_ptr<Driver> driver_;
  std::size_t page_size_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;  ///< a group is busy no more, or a mapper rests
  std::uint64_t limit_bytes_;
  std::set<PageHandle> pooled_;  // ordered, so that a page with a home is found and an exchange empties the file from its end
  std::uint64_t created_ = 0;
  std::uint64_t transit_ = 0;
  std::uint64_t ahead_transit_ = 0;  ///< of these, taken by mappers: soon look-ahead
  std::uint64_t leaving_ = 0;        ///< of these, on their way to the driver: above the limit
  std::uint64_t mapped_ = 0;
  std::uint64_t pressed_ = 0;
  bool turned_away_ = false;  ///< a mapper, meanwhile
  std::uint64_t clock_ = 0;
  std::uint64_t joined_ = 0;
  std::vector<Holder*> holders_;
  std::vector<Holder*> lacking_;              ///< holders whose mapper found too few pages, and some that lack none any more
  std::uint64_t least_lacking_ = UINT64_MAX;  ///< none of them lacks fewer: spares looking through the list in vain
  bool settling_ = false;
  bool closed_ = false;
};

}  // namespace vattn
