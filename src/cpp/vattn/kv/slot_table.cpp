#include "vattn/kv/slot_table.hpp"

#include <algorithm>
#include <numeric>

namespace vattn {

SlotTable::SlotTable(std::int64_t slots)
    : lengths_(at(slots), 0),
      quiet_(at(slots), 0),
      active_(at(slots), 0),
      generations_(at(slots), 0),
      before_(at(slots), 0),
      next_(at(slots), 0),
      own_step_(at(slots), 0),
      own_before_(at(slots), 0) {}

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
  lengths_[at(slot)] = before_[at(slot)] = own_before_[at(slot)] = 0;
  quiet_[at(slot)] = 0;
  ++generations_[at(slot)];
  --active_count_;
  first_free_ = std::min(first_free_, slot);
}

bool SlotTable::advance(std::span<const std::int64_t> lengths) noexcept {
  // The sign bit of quiet - length says that a length is past it, that of length itself that it is negative, that of
  // current - length that the slot grows. A free slot has 0, so any length is past it. No early exit and no branch: the common
  // answer is that there is memory. Each length is read once: it is the caller's, and another thread may be writing it.
  std::uint64_t past = 0;
  std::uint64_t grows = 0;
  const std::int64_t* const quiet = quiet_.data();
  const std::int64_t* const current = lengths_.data();
  std::int64_t* const next = next_.data();
  const std::size_t count = lengths.size();
  for (std::size_t slot = 0; slot < count; ++slot) {
    const std::int64_t wanted = lengths[slot];
    const auto length = static_cast<std::uint64_t>(wanted);
    past |= (static_cast<std::uint64_t>(quiet[slot]) - length) | length;
    grows |= static_cast<std::uint64_t>(current[slot]) - length;
    next[slot] = std::max(current[slot], wanted);
  }
  if (past >> 63 != 0) return false;
  if (grows >> 63 == 0) return true;
  before_.swap(lengths_);
  lengths_.swap(next_);
  all_step_ = ++steps_;
  return true;
}

void SlotTable::begin_step(bool names_all) noexcept {
  ++steps_;
  naming_all_ = names_all;
  if (!names_all) return;
  std::copy(lengths_.begin(), lengths_.end(), before_.begin());
  all_step_ = steps_;
}

void SlotTable::lengthen(std::int64_t slot, std::int64_t tokens) noexcept {
  if (!naming_all_) {
    own_step_[at(slot)] = steps_;
    own_before_[at(slot)] = lengths_[at(slot)];
  }
  lengths_[at(slot)] = std::max(lengths_[at(slot)], tokens);
}

void SlotTable::shorten(std::int64_t slot, std::int64_t tokens) noexcept {
  ++steps_;
  lengths_[at(slot)] = before_[at(slot)] = own_before_[at(slot)] = tokens;
}

}  // namespace vattn
