#include "vattn/kv/slot_table.hpp"

#include <algorithm>
#include <numeric>

namespace vattn {

SlotTable::SlotTable(std::int64_t slots) : lengths_(at(slots), 0), quiet_(at(slots), 0), active_(at(slots), 0) {}

std::int64_t SlotTable::total_tokens() const noexcept { return std::reduce(lengths_.begin(), lengths_.end()); }

std::vector<std::int64_t> SlotTable::active_slots() const {
  std::vector<std::int64_t> slots;
  for (std::int64_t slot = 0; slot < size(); ++slot) {
    if (is_active(slot)) slots.push_back(slot);
  }
  return slots;
}

std::int64_t SlotTable::find_free(std::int64_t count) const noexcept {
  std::int64_t run = 0;
  for (std::int64_t slot = first_free_; slot < size(); ++slot) {
    run = is_active(slot) ? 0 : run + 1;
    if (run == count) return slot - count + 1;
  }
  return -1;
}

void SlotTable::take(std::int64_t slot) noexcept {
  active_[at(slot)] = 1;
  ++active_count_;
  if (slot == first_free_) ++first_free_;
}

void SlotTable::give(std::int64_t slot) noexcept {
  active_[at(slot)] = 0;
  lengths_[at(slot)] = 0;
  quiet_[at(slot)] = 0;
  --active_count_;
  first_free_ = std::min(first_free_, slot);
}

bool SlotTable::advance(std::span<const std::int64_t> lengths) noexcept {
  // The sign bit of quiet - length says that a length is past it, that of length itself that it is negative. A free
  // slot has 0, so any length is past it. No early exit and no branch: the common answer is that nothing grows.
  std::uint64_t past = 0;
  const std::int64_t* const quiet = quiet_.data();
  const std::size_t count = lengths.size();
  for (std::size_t slot = 0; slot < count; ++slot) {
    const auto length = static_cast<std::uint64_t>(lengths[slot]);
    past |= (static_cast<std::uint64_t>(quiet[slot]) - length) | length;
  }
  if (past >> 63 != 0) return false;
  std::int64_t* const current = lengths_.data();
  for (std::size_t slot = 0; slot < count; ++slot) {
    // Bounded again: `lengths` is the caller's, and another thread of theirs may have written it since.
    current[slot] = std::max(current[slot], std::min(lengths[slot], quiet[slot]));
  }
  return true;
}

}  // namespace vattn
