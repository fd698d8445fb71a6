// Which slots are taken, how long each is, and how far each can grow with nothing to be done.
//
// Kept as arrays by slot, so that a step that grows nothing is one comparison and one maximum over plain integers.
// Thread: none of its own; the cache locks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "vattn/export.hpp"

namespace vattn {

class VATTN_API SlotTable {
 public:
  explicit SlotTable(std::int64_t slots);

  [[nodiscard]] std::int64_t size() const noexcept { return static_cast<std::int64_t>(lengths_.size()); }
  [[nodiscard]] std::int64_t active() const noexcept { return active_count_; }
  [[nodiscard]] bool is_active(std::int64_t slot) const noexcept { return active_[at(slot)] != 0; }
  [[nodiscard]] std::int64_t length(std::int64_t slot) const noexcept { return lengths_[at(slot)]; }
  /// Tokens up to which a step of this slot has nothing to do: it has memory, and the mapper need not be told.
  [[nodiscard]] std::int64_t quiet(std::int64_t slot) const noexcept { return quiet_[at(slot)]; }
  [[nodiscard]] std::int64_t total_tokens() const noexcept;
  [[nodiscard]] std::vector<std::int64_t> active_slots() const;

  /// The lowest `count` neighbours that are free, or -1.
  [[nodiscard]] std::int64_t find_free(std::int64_t count) const noexcept;
  void take(std::int64_t slot) noexcept;
  void give(std::int64_t slot) noexcept;
  void set_length(std::int64_t slot, std::int64_t tokens) noexcept { lengths_[at(slot)] = tokens; }
  void set_quiet(std::int64_t slot, std::int64_t tokens) noexcept { quiet_[at(slot)] = tokens; }

  /// If no length of an active slot is past its quiet: raises the lengths and returns true. Else, and for any bad entry,
  /// changes nothing and returns false. `lengths` has one entry a slot; 0 leaves a slot alone, as does a length under the
  /// slot's.
  [[nodiscard]] bool advance(std::span<const std::int64_t> lengths) noexcept;

 private:
  static std::size_t at(std::int64_t slot) noexcept { return static_cast<std::size_t>(slot); }

  std::vector<std::int64_t> lengths_;  // 0 for free slots
  std::vector<std::int64_t> quiet_;    // 0 for free slots
  std::vector<std::uint8_t> active_;
  std::int64_t active_count_ = 0;
  std::int64_t first_free_ = 0;  // no free slot is below
};

}  // namespace vattn
