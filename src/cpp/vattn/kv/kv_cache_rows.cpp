// KVCache: rows, which are slots named once, what the last step added to them, and writing new tokens.
#include <algorithm>
#include <cstring>

#include "vattn/checked.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {

Rows KVCache::rows(std::span<const std::int64_t> slots) const {
  const auto held = lock();
  if (slots.empty()) throw std::invalid_argument("slots is empty: name at least one");
  std::vector<std::uint64_t> generations;
  for (const std::int64_t slot : slots) {
    check_active("slots", slot);
    generations.push_back(slots_.generation(slot));
  }
  std::vector<std::int64_t> sorted(slots.begin(), slots.end());
  std::sort(sorted.begin(), sorted.end());
  if (const auto twice = std::adjacent_find(sorted.begin(), sorted.end()); twice != sorted.end()) {
    throw std::invalid_argument("slots names " + std::to_string(*twice) + " twice: give each slot once");
  }
  return {this, {slots.begin(), slots.end()}, std::move(generations)};
}

void KVCache::check_rows(const Rows& rows) const {
  const auto is_here = [this](std::int64_t slot) { return slot < slots_.size(); };
  if (rows.cache_ != this || !std::all_of(rows.slots_.begin(), rows.slots_.end(), is_here))
    throw std::invalid_argument("rows were made by another cache: use cache.rows(slots) of this one");
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (rows.generations_[i] == slots_.generation(rows.slots_[i])) continue;
    throw std::invalid_argument("rows: slot " + std::to_string(rows.slots_[i]) +
                                " was freed since these rows were made: make them anew, with the slots that are in use");
  }
}

LastStep KVCache::last_step(const Rows& rows) const {
  const auto held = lock();
  return last_step_of(rows);
}

std::uint64_t KVCache::changes(const Rows& rows) const {
  const auto held = lock();
  check_rows(rows);
  return slots_.changes();
}

LastStep KVCache::last_step_of(const Rows& rows) const {
  check_rows(rows);
  LastStep last{slots_.changes(), {}};
  std::uint64_t step = 0;
  for (const std::int64_t slot : rows.slots_) step = std::max(step, slots_.last_step(slot));
  last.added.reserve(rows.size());
  for (const std::int64_t slot : rows.slots_) {
    const std::int64_t length = slots_.length(slot);
    last.added.push_back({slot, slots_.last_step(slot) == step ? slots_.length_before(slot) : length, length});
  }
  return last;
}

std::vector<KVView<3>> KVCache::views(std::int64_t layer, const Rows& rows) const {
  const auto held = lock();
  check_index("layer", layer, geometry_.config().num_layers);
  check_rows(rows);
  std::vector<KVView<3>> views;
  views.reserve(rows.size());
  for (const std::int64_t slot : rows.slots_) views.push_back(make_view_of(layer, slot));
  return views;
}

void KVCache::write(std::int64_t layer, std::span<const std::int64_t> slots, std::span<const std::int64_t> positions, Address k,
                    Address v, std::int64_t tokens) {
  const auto held = lock();
  check_index("layer", layer, geometry_.config().num_layers);
  if (slots.size() != positions.size()) {
    throw std::invalid_argument("positions has " + std::to_string(positions.size()) + " entries, slots has " +
                                std::to_string(slots.size()) + ": one position a slot");
  }
  check_between("tokens", tokens, 0, geometry_.config().max_seq_len);
  std::vector<TokenSpan> spans;
  spans.reserve(slots.size());
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check_active("slot", slots[i]);
    const std::int64_t length = slots_.length(slots[i]);
    if (positions[i] < 0 || positions[i] > length - std::max<std::int64_t>(tokens, 1)) {
      const std::string more = tokens <= 1 ? std::string() : ", with " + std::to_string(tokens) + " tokens from there,";
      throw std::out_of_range("positions: " + std::to_string(positions[i]) + " of slot " + std::to_string(slots[i]) + more +
                              " is outside its length, " + std::to_string(length) + ": step it first");
    }
    spans.push_back({slots[i], positions[i], positions[i] + tokens});
  }
  write_spans(layer, spans, k, v);
}

void KVCache::write(std::int64_t layer, const Rows& rows, std::int64_t tokens, Address k, Address v,
                    std::optional<std::int64_t> each) {
  const auto held = lock();
  check_index("layer", layer, geometry_.config().num_layers);
  const LastStep last = last_step_of(rows);
  std::int64_t added = 0;
  for (const TokenSpan& span : last.added) {
    added += span.stop - span.start;
    if (!each || *each == span.stop - span.start) continue;
    throw std::invalid_argument("k has " + std::to_string(*each) + " tokens a slot, and the last step added " +
                                std::to_string(span.stop - span.start) + " to slot " + std::to_string(span.slot) +
                                ": where slots differ, write (tokens added, heads, dim), slot after slot");
  }
  if (added != tokens) {
    throw std::invalid_argument("k has " + std::to_string(tokens) + " tokens, and the last step added " +
                                std::to_string(added) + " to these rows: write what it added, slot after slot");
  }
  write_spans(layer, last.added, k, v);
}

void KVCache::write_spans(std::int64_t layer, std::span<const TokenSpan> spans, Address k, Address v) {
  const auto [k_tensor, v_tensor] = tensors_of(layer);
  const bool any = std::any_of(spans.begin(), spans.end(), [](const TokenSpan& span) { return span.stop > span.start; });
  if ((k == 0 && any) || (v_tensor != nullptr && v == 0 && any) || (v_tensor == nullptr && v != 0)) {
    throw std::invalid_argument(v_tensor == nullptr ? "v must be null in a cache of keys only, k must not"
                                                    : "k and v must not be null");
  }
  driver_->synchronize();  // k and v may come from work that still runs, and copies do not wait for it
  // The host's memory is the process's own: no driver is asked.
  const bool is_plain = driver_->traits().tensor_device == TensorDevice::kCpu && !driver_->traits().has_streams;
  const auto copy = [&](Address to, Address from, std::size_t size) {
    if (is_plain) {
      std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size);
    } else {
      driver_->copy(to, from, size);
    }
  };
  const auto element = static_cast<std::int64_t>(size_of(geometry_.config().dtype));
  const std::int64_t heads = geometry_.config().num_kv_heads;
  const auto copy_all = [&](const Tensor& tensor, Address from) {
    const Geometry::Strides strides = geometry_.strides(*tensor.geometry);
    const std::int64_t dim = tensor.geometry->head_dim;
    // Token-major keeps a token's heads together, and with one layer a tensor its tokens too: those go in one copy.
    const std::int64_t pieces = strides.head == dim ? 1 : heads;
    const bool is_dense = pieces == 1 && strides.token == heads * dim;
    const std::int64_t token_bytes = heads * dim * element;
    for (const TokenSpan& span : spans) {
      const Address row = tensor.buffer->base() + static_cast<Address>(geometry_.offset(*tensor.geometry, layer, span.slot));
      const std::int64_t step = is_dense ? span.stop - span.start : 1;
      const auto size = static_cast<std::size_t>(token_bytes / pieces * step);
      for (std::int64_t token = span.start; token < span.stop; token += step) {
        const Address to = row + static_cast<Address>(token * strides.token * element);
        for (std::int64_t piece = 0; piece < pieces; ++piece, from += size) {
          copy(to + static_cast<Address>(piece * strides.head * element), from, size);
        }
      }
    }
  };
  copy_all(*k_tensor, k);
  if (v_tensor != nullptr) copy_all(*v_tensor, v);
}

}  // namespace vattn
