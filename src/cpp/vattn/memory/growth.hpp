// Growth of several groups of rows at once, all or nothing.
//
//     Growth growth(pool, holder, zero_fill);
//     growth.extend(group, pages, ahead);      // as often as needed; nothing happens yet
//     growth.commit("step", "way out");        // every page promised, mapped and accessible, or everything as before
//
// First the promise: what a group has mapped beyond it (its look-ahead, its warm or retired pages) is claimed with no driver
// call. Then room is made for the rest, before anything is taken, so that running out costs no mapping. Then pages are taken,
// created where the pool has none, mapped, and made accessible with one call a contiguous run: on CUDA that call costs some 25
// times a map. Undoing goes the other way: pages made for this growth are released, others go back to the pool. A run that
// cannot be unmapped again stays in its row as surplus, counted, and serves the next growth.
//
// The same class grows look-ahead for the mapper (commit_ahead): without a promise, and only from pages that nobody has.
// Thread: one at a time a holder for commit(), whose owner locks; commit_ahead() beside it on another. Groups that are at work
// are marked busy, since the pool's lock is not held across the driver's calls.
#pragma once

#include <vector>

#include "vattn/memory/page_pool.hpp"

namespace vattn {

class VATTN_API Growth {
 public:
  /// With `zero_fill` every page that may hold old bits is zeroed before it is promised.
  Growth(PagePool& pool, Holder& holder, bool zero_fill) noexcept : pool_(pool), holder_(holder), zero_fill_(zero_fill) {}

  /// Plans that the rows of `group` shall have `pages` accessible pages, and that the mapper goes on to `ahead`.
  void extend(std::size_t group, const Extent& pages, const Extent& ahead = {});

  [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }

  struct Outcome {
    bool waited = false;        ///< it had to call the driver, or to wait; else the pages were there
    std::uint64_t created = 0;  ///< pages that had to be made
  };
  /// OutOfMemoryError, or what the driver throws; then promises, mappings and counts are as before, but for excess that was
  /// taken back.
  Outcome commit(const char* call, const char* way_out);

  enum class Ahead : std::uint8_t { kDone, kBusy, kNoRoom };
  /// Maps ahead of need, with the pool's lock held; released meanwhile. Throws what the driver throws, everything undone.
  Ahead commit_ahead(std::unique_lock<std::mutex>& lock);

 private:
  struct Entry {
    std::size_t group;
    Extent pages;
    Extent ahead;
    Extent held_before;
  };
  struct Taken {
    PageHandle page;    ///< 0: still to be created
    PageHandle victim;  ///< a pooled page that the new one replaces (Driver::home), so that memory stays the same
    enum class Origin : std::uint8_t { kReused, kExchanged, kCreated } origin;
  };
  struct Run {
    Row* row;
    std::uint8_t kind;
    std::size_t group;
    std::uint32_t from;  ///< the first page to make accessible
    std::uint32_t have;  ///< pages mapped before
    std::uint32_t target;
    std::vector<Taken> taken;
    std::uint32_t mapped = 0;  ///< of `taken`
    bool stuck = false;        ///< could not be unmapped again
  };
  struct Range {
    Address at;
    std::size_t size;
  };

  // With the pool's lock.
  void promise() noexcept;
  void unpromise() noexcept;
  /// Of a growth that failed: nothing is promised that was not before.
  void withdraw(std::unique_lock<std::mutex>& lock) noexcept;
  void plan();
  [[nodiscard]] bool any_busy() const noexcept;
  void obtain(std::unique_lock<std::mutex>& lock, bool may_create, const char* call, const char* way_out);
  /// So that nothing after the driver's calls can fail for want of memory.
  void reserve_room();
  void take_pages() noexcept;
  void set_busy(bool busy) noexcept;
  void publish() noexcept;
  void undo_counts(bool keep_created) noexcept;
  void release_spare() noexcept;

  // Without it.
  void work();
  /// Look-ahead that nobody will need any more is not finished.
  void check_stopping() const;
  void create_pages();
  void create(Taken& taken, Address at);
  void map_pages();
  void set_access();
  void zero_old_bits();
  /// What work() did, with the lock free before and held after.
  void undo(std::unique_lock<std::mutex>& lock, bool keep_created) noexcept;
  void unmap_and_release(bool keep_created) noexcept;

  [[nodiscard]] Address address(const Row& row, std::size_t page) const noexcept { return row.base + page * pool_.page_size(); }

  PagePool& pool_;
  Holder& holder_;
  bool zero_fill_;
  bool ahead_only_ = false;
  Outcome outcome_;
  bool creating_ = false;
  bool filling_ = false;  ///< zeroing has begun, and may still run when waiting for it fails
  std::uint64_t missing_ = 0;
  std::uint64_t promised_ = 0;
  std::uint64_t own_ = 0;  ///< pages mapped and promised to the groups whose promise this growth raises
  std::vector<Entry> entries_;
  std::vector<Run> runs_;
  std::vector<Range> dirty_;       ///< claimed pages to zero
  Fences fences_;                  ///< to wait for before that
  std::vector<PageHandle> spare_;  ///< made by an attempt that ran out of device memory
};

}  // namespace vattn
