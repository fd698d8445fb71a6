// Which slots are taken, how long each is, how far each can grow with nothing to be done, and what the last step added.
//
// Kept as arrays by slot, so that a step that grows nothing is one comparison and one maximum over plain integers. What a step
// added costs it nothing a slot: the lengths before it are the array that it leaves behind.
// Thread: none of its own; the cache locks.
#pragma once

#include <algorithm>
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
  /// Another number for every request that the slot holds, one after the other.
  [[nodiscard]] std::uint64_t generation(std::int64_t slot) const noexcept { return generations_[at(slot)]; }

  /// The lowest `count` neighbours that are free, or -1.
  [[nodiscard]] std::int64_t find_free(std::int64_t count) const noexcept;
  void take(std::int64_t slot) noexcept;
  void give(std::int64_t slot) noexcept;
  void set_quiet(std::int64_t slot, std::int64_t tokens) noexcept { quiet_[at(slot)] = tokens; }

  /// If no length of an active slot is past its quiet: raises the lengths and returns true. Else, and for any bad entry,
  /// changes nothing and returns false. `lengths` has one entry a slot; 0 leaves a slot alone, as does a length under the
  /// slot's. It is a step that names every slot, if it makes any longer.
  [[nodiscard]] bool advance(std::span<const std::int64_t> lengths) noexcept;

  /// A step that makes a slot longer, not by advance: then lengthen() for every slot that it names. `names_all`: whatever
  /// lengthen() leaves out is named too.
  void begin_step(bool names_all) noexcept;
  void lengthen(std::int64_t slot, std::int64_t tokens) noexcept;
  /// What the last step added to the slot is void.
  void shorten(std::int64_t slot, std::int64_t tokens) noexcept;

  /// The last step that named the slot, as a number that goes up; 0: none did.
  [[nodiscard]] std::uint64_t last_step(std::int64_t slot) const noexcept { return std::max(all_step_, own_step_[at(slot)]); }
  /// How long the slot was before it.
  [[nodiscard]] std::int64_t length_before(std::int64_t slot) const noexcept {
    return own_step_[at(slot)] > all_step_ ? own_before_[at(slot)] : before_[at(slot)];
  }
  /// Changes with every step that makes a slot longer, and every shorten.
  [[nodiscard]] std::uint64_t changes() const noexcept { return steps_; }

 private:
  static std::size_t at(std::int64_t slot) noexcept { return static_cast<std::size_t>(slot); }

  std::vector<std::int64_t> lengths_;  // 0 for free slots
  std::vector<std::int64_t> quiet_;    // 0 for free slots
  std::vector<std::uint8_t> active_;
  std::vector<std::uint64_t> generations_;
  std::uint64_t steps_ = 0;
  // The last step that named every slot: its number, the lengths before it, and the array that the next one writes.
  std::uint64_t all_step_ = 0;
  std::vector<std::int64_t> before_;
  std::vector<std::int64_t> next_;
  // The last step that named this slot and not all: its number, and the length before it.
  std::vector<std::uint64_t> own_step_;
  std::vector<std::int64_t> own_before_;
  bool naming_all_ = false;  // the step that lengthen() belongs to
  std::int64_t active_count_ = 0;
  std::int64_t first_free_ = 0;  // no free slot is below
};

}  // namespace vattn
