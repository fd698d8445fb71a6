// Slots that are named once and used for many calls, as the loop of a server does: their numbers, and which request each held.
//
// A slot has a generation, which changes when its request is freed: a Rows whose slot was freed since is refused, also when the
// number is in use again. The tokens that the last step added are a TokenSpan a slot. Thread: values; copy them freely.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "vattn/export.hpp"

namespace vattn {

/// Tokens start .. stop of one slot.
struct TokenSpan {
  std::int64_t slot;
  std::int64_t start;
  std::int64_t stop;
};

/// Made by KVCache::rows, and of use to that cache only.
class Rows {
 public:
  [[nodiscard]] const std::vector<std::int64_t>& slots() const noexcept { return slots_; }
  [[nodiscard]] std::size_t size() const noexcept { return slots_.size(); }

 private:
  friend class KVCache;
  Rows(const void* cache, std::vector<std::int64_t> slots, std::vector<std::uint64_t> generations) noexcept
      : cache_(cache), slots_(std::move(slots)), generations_(std::move(generations)) {}

  const void* cache_;  ///< only compared
  std::vector<std::int64_t> slots_;
  std::vector<std::uint64_t> generations_;
};

/// What the last step did to the slots of a Rows: the last one that named any of them and made a slot longer.
struct LastStep {
  std::uint64_t number = 0;      ///< of steps that made a slot longer, and of truncates; the same number, the same `added`
  std::vector<TokenSpan> added;  ///< a span a slot, in order; its stop is the slot's length
};

}  // namespace vattn
