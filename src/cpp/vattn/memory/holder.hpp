// Who holds pages of a pool: one cache or one growable tensor, as the pool's ledger sees it.
//
// A holder's rows grow in groups: a group is the rows of one slot in all tensors. The owner is promised `held` pages a row;
// what is mapped beyond that is *excess*, and the pool may give it to whoever needs it. Excess is
//   look-ahead   of a group in use: mapped before it is needed
//   warm         of a group that is free: left by its last request, or mapped for the next one
//   retired      either of the two, while work that may still use it has not finished (its fences have not passed)
// Growing into one's own excess costs no driver call.
// Thread: everything here is guarded by the pool's lock.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "vattn/memory/fence.hpp"
#include "vattn/memory/row.hpp"

namespace vattn {

/// Pages a row, by kind of tensor: a cache has K and V, which may differ; a growable tensor has the first kind only.
using Extent = std::array<std::uint32_t, 2>;

struct RowGroup {
  Extent held{};                          ///< promised to the owner
  Extent ahead{};                         ///< how far the mapper shall go
  Extent ready{};                         ///< accessible in every row of the kind
  Extent shown{};                         ///< of these, what counts as the owner's: not what it truncated
  std::array<std::uint64_t, 2> mapped{};  ///< in all rows of the kind
  std::uint64_t owed = 0;                 ///< promised and not mapped, in all rows: while a growth is at it
  std::uint64_t stamp = 0;                ///< when it was last used, on the pool's clock: the coldest has the lowest
  Fences fences{};                        ///< of the work that may still use the excess
  bool active = false;                    ///< in use by a request
  bool busy = false;                      ///< somebody changes what is mapped, and does not hold the lock
};

class Holder {
 public:
  /// The rows of one tensor; group g has `rows_per_group` of them from `first + g * rows_per_group`.
  struct Table {
    Row* first;
    std::uint8_t kind;
  };

  Holder(std::string kind, std::shared_ptr<Driver> driver, std::vector<Table> tables, std::size_t groups,
         std::size_t rows_per_group)
      : name_(std::move(kind)),
        driver_(std::move(driver)),
        tables_(std::move(tables)),
        rows_per_group_(rows_per_group),
        groups_(groups) {
    for (const Table& table : tables_) rows_of_kind_[table.kind] += rows_per_group;
  }

  /// The kind of holder and the order of joining: "KVCache-1".
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  void set_number(std::uint64_t number) { name_ += "-" + std::to_string(number); }
  [[nodiscard]] Driver& driver() const noexcept { return *driver_; }
  [[nodiscard]] std::size_t groups() const noexcept { return groups_.size(); }
  [[nodiscard]] RowGroup& group(std::size_t index) noexcept { return groups_[index]; }
  [[nodiscard]] const RowGroup& group(std::size_t index) const noexcept { return groups_[index]; }

  /// Calls `visit(row, kind)` for every row of a group.
  template <typename Visit>
  void each_row(std::size_t group, Visit&& visit) const {
    for (const Table& table : tables_) {
      Row* const first = table.first + group * rows_per_group_;
      for (std::size_t row = 0; row < rows_per_group_; ++row) visit(first[row], table.kind);
    }
  }

  /// Pages in all rows of a group of that extent.
  [[nodiscard]] std::uint64_t pages_in(const Extent& extent) const noexcept {
    return rows_of_kind_[0] * extent[0] + rows_of_kind_[1] * extent[1];
  }

  /// Pages of a group that its owner was not promised.
  [[nodiscard]] std::uint64_t excess(std::size_t group) const noexcept {
    // Row by row: what one has too much is no help where another has too little.
    return groups_[group].mapped[0] + groups_[group].mapped[1] + groups_[group].owed - pages_in(groups_[group].held);
  }

  /// After rows of a group, or what they are promised, changed.
  void update(std::size_t group) noexcept {
    Extent ready{UINT32_MAX, UINT32_MAX};
    std::uint64_t owed = 0;
    each_row(group, [&](const Row& row, std::uint8_t kind) {
      ready[kind] = std::min(ready[kind], row.accessible);
      const std::uint32_t held = groups_[group].held[kind];
      if (row.pages.size() < held) owed += held - row.pages.size();
    });
    groups_[group].owed = owed;
    for (std::size_t kind = 0; kind < ready.size(); ++kind) {
      if (rows_of_kind_[kind] == 0) ready[kind] = 0;
    }
    groups_[group].ready = ready;
  }

  // Counts, since the holder joined.
  std::uint64_t mapped_pages = 0;  ///< now, of all its groups
  std::uint64_t pages_created = 0;
  std::uint64_t pages_reused = 0;

  // The mapper thread, where there is one; wake() is PagePool's.
  std::condition_variable wake{};
  bool has_mapper = false;
  bool woken = false;                 ///< there may be something to do
  bool listed = false;                ///< among those that the pool looks through when pages come back
  std::uint64_t lacks = 0;            ///< pages that the mapper wanted and did not find: woken when so many come back
  bool resting = false;               ///< the mapper has done what it could, and waits
  std::atomic<bool> stopping{false};  ///< read between driver calls, without the lock
  Extent warm_target{};               ///< how far one free group is kept mapped for the next request; zeros: none

 private:
  std::string name_;
  std::shared_ptr<Driver> driver_;
  std::vector<Table> tables_;
  std::size_t rows_per_group_;
  std::array<std::uint64_t, 2> rows_of_kind_{};
  std::vector<RowGroup> groups_;
};

}  // namespace vattn
