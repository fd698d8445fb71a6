// KVCache: step, fits and truncate. One plan for all slots, committed by one Transaction.
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

void KVCache::step(std::span<const std::int64_t> lengths) {
  const auto held = lock();
  if (static_cast<std::int64_t>(lengths.size()) == slots_.size() && slots_.advance(lengths)) return;
  const std::vector<SlotLength> pairs = named(lengths);
  check_named(pairs);
  grow(pairs);
}

void KVCache::step(std::span<const SlotLength> lengths) {
  const auto held = lock();
  check_named(lengths);
  grow(lengths);
}

bool KVCache::fits(std::span<const std::int64_t> lengths) const {
  const auto held = lock();
  const std::vector<SlotLength> pairs = named(lengths);
  check_named(pairs);
  return has_room_for(missing_pages(pairs));
}

bool KVCache::fits(std::span<const SlotLength> lengths) const {
  const auto held = lock();
  check_named(lengths);
  return has_room_for(missing_pages(lengths));
}

bool KVCache::has_room_for(std::uint64_t missing) const {
  if (missing == 0) return true;
  if (missing + pool_->usage().mapped_pages > kMostPages) return false;
  if (missing > pool_->available_pages() + surplus_pages()) return false;
  const std::uint64_t pooled = pool_->usage().pooled_pages;
  const std::uint64_t to_create = missing > pooled ? missing - pooled : 0;
  return to_create == 0 || to_create * pool_->page_size() <= driver_->memory_info().available_bytes;
}

std::uint64_t KVCache::missing_pages(std::span<const SlotLength> lengths) const {
  std::uint64_t missing = 0;
  for (const auto& [slot, tokens] : lengths) {
    if (tokens <= slots_.committed(slot)) continue;
    each_row(slot, [&, count = tokens](const Tensor& tensor, const Row& row) {
      const auto needed = static_cast<std::uint64_t>(geometry_.pages_for(*tensor.geometry, count));
      if (needed > row.mapped_pages()) missing += needed - row.mapped_pages();
    });
  }
  return missing;
}

std::uint64_t KVCache::surplus_pages() const {
  std::int64_t needed = 0;
  for (std::int64_t slot = 0; slot < slots_.size(); ++slot) {
    const std::int64_t tokens = slots_.length(slot);
    if (tokens == 0) continue;
    needed += geometry_.pages_for(geometry_.k(), tokens);
    if (geometry_.has_v()) needed += geometry_.pages_for(geometry_.v(), tokens);
  }
  needed *= geometry_.groups() * geometry_.rows_per_slot();
  return pool_->usage().mapped_pages - static_cast<std::uint64_t>(needed);
}

void KVCache::release_surplus() noexcept {
  for (std::int64_t slot = 0; slot < slots_.size(); ++slot) {
    bool emptied = true;
    each_row(slot, [&](const Tensor& tensor, Row& row) {
      const auto needed = static_cast<std::size_t>(geometry_.pages_for(*tensor.geometry, slots_.length(slot)));
      emptied = row.shrink(*pool_, needed) && emptied;
    });
    if (slots_.is_active(slot)) {
      update_committed(slot);
    } else if (emptied) {
      dirty_[static_cast<std::size_t>(slot)] = 0;
    }
  }
}

void KVCache::grow(std::span<const SlotLength> lengths) {
  std::uint64_t missing = missing_pages(lengths);
  if (missing > pool_->available_pages() && surplus_pages() != 0) {
    driver_->synchronize();
    release_surplus();
    missing = missing_pages(lengths);
  }
  pool_->check_room("step", missing, "free or truncate slots, or raise memory_limit");

  Transaction growth(*pool_, zero_fill());
  for (const auto& [slot, tokens] : lengths) {
    if (tokens <= slots_.committed(slot)) continue;
    each_row(slot, [&, count = tokens](const Tensor& tensor, Row& row) {
      growth.extend(row, static_cast<std::size_t>(geometry_.pages_for(*tensor.geometry, count)));
    });
  }
  if (!growth.empty()) {
    const auto start = std::chrono::steady_clock::now();
    try {
      growth.commit();
    } catch (const OutOfMemoryError& error) {
      const std::uint64_t needed = missing * pool_->page_size();
      throw OutOfMemoryError(
          "step: " + std::to_string(needed) + " bytes more are needed and were not to be had; nothing changed. " + error.what(),
          needed, error.available_bytes, pool_->usage().limit_bytes);
    }
    map_wait_ns_ += static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count());
  }
  for (const auto& [slot, tokens] : lengths) {
    if (tokens > slots_.committed(slot)) update_committed(slot);
    slots_.set_length(slot, std::max(slots_.length(slot), tokens));
  }
  check_counts();
}

void KVCache::update_committed(std::int64_t slot) noexcept {
  std::int64_t committed = geometry_.config().max_seq_len;
  each_row(slot, [&](const Tensor& tensor, const Row& row) {
    committed = std::min(committed, geometry_.tokens_in(*tensor.geometry, static_cast<std::int64_t>(row.accessible_pages())));
  });
  slots_.set_committed(slot, committed);
}

void KVCache::truncate(std::int64_t slot, std::int64_t tokens) {
  const auto held = lock();
  check_active("slot", slot);
  const std::int64_t length = slots_.length(slot);
  if (tokens < 0 || tokens > length) {
    throw std::invalid_argument("n=" + std::to_string(tokens) + " must be between 0 and the slot's length, " +
                                std::to_string(length) + ": truncate only shortens");
  }
  if (tokens == length) return;
  driver_->synchronize();
  if (geometry_.config().guard_tokens != 0) {
    // The tokens given up enter the guard, or stay mapped behind it: zeros, as everything behind a length with a guard.
    each_row(slot, [&](const Tensor& tensor, const Row& row) {
      const std::int64_t token = tensor.geometry->token_bytes;
      const std::int64_t kept_pages = geometry_.pages_for(*tensor.geometry, tokens) * geometry_.page_size();
      const std::int64_t from = tokens * token;
      const std::int64_t to = std::min(kept_pages, length * token);
      if (to > from) driver_->fill_zero(row.base() + static_cast<Address>(from), static_cast<std::size_t>(to - from));
    });
  }
  each_row(slot, [&](const Tensor& tensor, Row& row) {
    static_cast<void>(row.shrink(*pool_, static_cast<std::size_t>(geometry_.pages_for(*tensor.geometry, tokens))));
  });
  slots_.set_length(slot, tokens);
  update_committed(slot);
  PagePool::Losses losses;
  pool_->trim_to_limit(losses);
  check_counts();
}

}  // namespace vattn
