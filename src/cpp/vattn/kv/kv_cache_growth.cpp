// KVCache: step, fits and truncate. One plan for all slots, committed by one Growth.
#include <algorithm>
#include <chrono>

#include "vattn/checked.hpp"
#include "vattn/driver/limits.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {

void KVCache::check_length(std::int64_t slot, std::int64_t tokens) const {
  const std::int64_t most = geometry_.config().max_seq_len;
  if (tokens >= 0 && tokens <= most) return;
  throw std::invalid_argument("lengths: slot " + std::to_string(slot) + " asks for " + std::to_string(tokens) +
                              " tokens; a length is between 0 and max_seq_len=" + std::to_string(most));
}

std::vector<SlotLength> KVCache::named(std::span<const std::int64_t> lengths) const {
  if (static_cast<std::int64_t>(lengths.size()) != slots_.size()) {
    throw std::invalid_argument("lengths has " + std::to_string(lengths.size()) +
                                " entries; it needs one a slot, max_batch_size=" + std::to_string(slots_.size()) +
                                ", with 0 for slots to leave alone");
  }
  std::vector<SlotLength> pairs;
  for (std::size_t slot = 0; slot < lengths.size(); ++slot) {
    if (lengths[slot] != 0) pairs.push_back({static_cast<std::int64_t>(slot), lengths[slot]});
  }
  return pairs;
}

void KVCache::check_named(std::span<const SlotLength> lengths) const {
  for (const auto& [slot, tokens] : lengths) {
    check_active("slot", slot);
    check_length(slot, tokens);
  }
  std::vector<std::int64_t> named_slots;
  named_slots.reserve(lengths.size());
  for (const SlotLength& entry : lengths) named_slots.push_back(entry.slot);
  std::sort(named_slots.begin(), named_slots.end());
  const auto twice = std::adjacent_find(named_slots.begin(), named_slots.end());
  if (twice != named_slots.end()) {
    throw std::invalid_argument("lengths names slot " + std::to_string(*twice) + " twice: give each slot one length");
  }
}

bool KVCache::try_step(std::span<const std::int64_t> lengths) noexcept {
  if (!generation_.is_current()) return false;
  const std::unique_lock held(mutex_, std::try_to_lock);
  if (!held || closed_ || static_cast<std::int64_t>(lengths.size()) != slots_.size()) return false;
  return slots_.advance(lengths);
}

void KVCache::step(std::span<const std::int64_t> lengths, std::optional<Stream> stream) {
  const auto held = lock();
  if (static_cast<std::int64_t>(lengths.size()) == slots_.size() && slots_.advance(lengths)) return;
  const std::vector<SlotLength> pairs = named(lengths);
  check_named(pairs);
  grow(pairs, stream, true);
}

void KVCache::step(std::span<const SlotLength> lengths, std::optional<Stream> stream) {
  const auto held = lock();
  check_named(lengths);
  grow(lengths, stream, false);
}

bool KVCache::fits(std::span<const std::int64_t> lengths, std::span<const std::int64_t> fresh) const {
  const auto held = lock();
  const std::vector<SlotLength> pairs = named(lengths);
  check_named(pairs);
  return has_room_for(pairs, fresh);
}

bool KVCache::fits(std::span<const SlotLength> lengths, std::span<const std::int64_t> fresh) const {
  const auto held = lock();
  check_named(lengths);
  return has_room_for(lengths, fresh);
}

Extent KVCache::extent(std::int64_t tokens) const noexcept {
  // More pages than a row can count are more than there are books for, and refused as such.
  const auto pages = [&](const TensorGeometry& tensor) {
    return static_cast<std::uint32_t>(std::min<std::int64_t>(geometry_.pages_for(tensor, tokens), UINT32_MAX));
  };
  return {pages(geometry_.k()), geometry_.has_v() ? pages(geometry_.v()) : 0};
}

std::int64_t KVCache::tokens_in(const Extent& pages) const noexcept {
  const std::int64_t in_k = geometry_.tokens_in(geometry_.k(), pages[0]);
  return geometry_.has_v() ? std::min(in_k, geometry_.tokens_in(geometry_.v(), pages[1])) : in_k;
}

bool KVCache::has_room_for(std::span<const SlotLength> lengths, std::span<const std::int64_t> fresh) const {
  for (const std::int64_t tokens : fresh) check_between("new", tokens, 0, geometry_.config().max_seq_len);
  if (static_cast<std::int64_t>(fresh.size()) > slots_.size() - slots_.active()) return false;
  std::uint64_t promised = 0;
  std::uint64_t missing = 0;
  {
    const auto ledger = pool_->lock();
    for (const auto& [slot, tokens] : lengths) {
      const Extent wanted = extent(tokens);
      const auto beyond = [&](const Extent& have) {
        return holder_->pages_in({wanted[0] - std::min(wanted[0], have[0]), wanted[1] - std::min(wanted[1], have[1])});
      };
      const RowGroup& memory = group(slot);
      promised += beyond(memory.held);
      missing += beyond({std::max(memory.held[0], memory.ready[0]), std::max(memory.held[1], memory.ready[1])});
    }
    // What a free slot still has mapped is counted as what anybody may take, so it need not be known which slot it will be.
    for (const std::int64_t tokens : fresh) {
      promised += holder_->pages_in(extent(tokens));
      missing += holder_->pages_in(extent(tokens));
    }
  }
  return pool_->has_room(promised, missing);
}

Extent KVCache::ahead_of(std::int64_t tokens) const noexcept {
  const std::int64_t longest = geometry_.config().max_seq_len;
  const std::int64_t lookahead = geometry_.lookahead_tokens();
  return lookahead == 0 ? Extent{} : extent(tokens + std::min(lookahead, longest - tokens));
}

void KVCache::grow(std::span<const SlotLength> lengths, std::optional<Stream> stream, bool names_all) {
  Growth growth(*pool_, *holder_, zero_fill());
  for (const auto& [slot, tokens] : lengths) {
    if (tokens <= slots_.quiet(slot)) continue;
    growth.extend(static_cast<std::size_t>(slot), extent(tokens), ahead_of(tokens));
  }
  Growth::Outcome outcome;
  if (!growth.empty()) {
    check_not_capturing("step", stream);
    const auto start = std::chrono::steady_clock::now();
    outcome = growth.commit("step", "free or truncate slots, or raise memory_limit");
    if (outcome.waited) {
      map_wait_ns_ += static_cast<std::uint64_t>(
          std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count());
      ++steps_waited_;
    }
  }
  const auto is_longer = [&](const SlotLength& entry) { return entry.tokens > slots_.length(entry.slot); };
  const bool any_longer = std::any_of(lengths.begin(), lengths.end(), is_longer);
  if (any_longer) slots_.begin_step(names_all);
  for (const auto& [slot, tokens] : lengths) {
    const bool past = tokens > slots_.quiet(slot);
    if (any_longer) slots_.lengthen(slot, tokens);
    if (past) update_quiet(slot);
    auto& fresh = fresh_[static_cast<std::size_t>(slot)];
    if (fresh == 0 || tokens == 0) continue;
    fresh = 0;
    ++prompts_;
    if (!outcome.waited) ++warm_prompts_;
    if (outcome.created == 0) ++reused_prompts_;
  }
  check_counts();
}

void KVCache::promise(std::span<const std::int64_t> slots, std::int64_t tokens) {
  Growth growth(*pool_, *holder_, zero_fill());
  for (const std::int64_t slot : slots) {
    if (tokens > slots_.quiet(slot)) growth.extend(static_cast<std::size_t>(slot), extent(tokens));
  }
  if (growth.empty()) return;
  growth.commit("batch", "free or truncate slots, or raise memory_limit");
  for (const std::int64_t slot : slots) update_quiet(slot);
}

void KVCache::update_quiet(std::int64_t slot) noexcept {
  const auto ledger = pool_->lock();
  const RowGroup& memory = group(slot);
  std::int64_t quiet = tokens_in(memory.held);
  const std::int64_t lookahead = geometry_.lookahead_tokens();
  const std::int64_t ahead = lookahead == 0 ? quiet : tokens_in(memory.ahead);
  // The mapper is to be told when a length comes within the look-ahead of where it was told to go.
  if (lookahead != 0 && ahead < geometry_.config().max_seq_len) quiet = std::min(quiet, ahead - lookahead);
  slots_.set_quiet(slot, std::max(quiet, slots_.length(slot)));
}

bool KVCache::holds_more_than(std::int64_t slot, const Extent& kept) const {
  const auto ledger = pool_->lock();
  return group(slot).held[0] > kept[0] || group(slot).held[1] > kept[1];
}

void KVCache::truncate(std::int64_t slot, std::int64_t tokens, std::optional<Stream> stream) {
  const auto held = lock();
  check_active("slot", slot);
  const std::int64_t length = slots_.length(slot);
  if (tokens < 0 || tokens > length) {
    throw std::invalid_argument("n=" + std::to_string(tokens) + " must be between 0 and the slot's length, " +
                                std::to_string(length) + ": truncate only shortens");
  }
  if (tokens == length) return;
  check_not_capturing("truncate", stream);
  const Extent kept = extent(tokens);
  const bool has_guard = geometry_.config().guard_tokens != 0;
  const bool gives_up = holds_more_than(slot, kept);
  Fences fences;
  if (gives_up || has_guard) fences = fence_work(stream);
  if (has_guard) {
    for (const auto& fence : fences) fence->wait();
    // The tokens given up enter the guard, or stay mapped behind it: zeros, as everything behind a length with a guard.
    const auto zero = [&](const Row& row, std::uint8_t kind) {
      const TensorGeometry& tensor = kind == 0 ? geometry_.k() : geometry_.v();
      const std::int64_t from = tokens * tensor.token_bytes;
      const std::int64_t to = std::min(kept[kind] * geometry_.page_size(), length * tensor.token_bytes);
      if (to > from) driver_->fill_zero(row.base + static_cast<Address>(from), static_cast<std::size_t>(to - from));
    };
    holder_->each_row(static_cast<std::size_t>(slot), zero);
  }
  if (gives_up) retire(slot, {kept, ahead_of(tokens), true}, fences);
  slots_.shorten(slot, tokens);
  update_quiet(slot);
  check_counts();
}

}  // namespace vattn
