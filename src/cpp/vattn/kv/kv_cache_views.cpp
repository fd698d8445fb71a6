// KVCache: the views that kernels read and write. Fresh each time, over exactly the extent asked for, each with a reference
// that keeps the memory.
#include <algorithm>

#include "vattn/checked.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {

std::pair<const KVCache::Tensor*, const KVCache::Tensor*> KVCache::tensors_of(std::int64_t layer) const {
  check_index("layer", layer, geometry_.config().num_layers);
  const auto group = static_cast<std::size_t>(layer / geometry_.layers_per_tensor());
  if (!geometry_.has_v()) return {&tensors_[group], nullptr};
  return {&tensors_[2 * group], &tensors_[2 * group + 1]};
}

TensorView<4> KVCache::make_view(const Tensor& tensor, std::int64_t layer, const SlotRange& range) const {
  const TensorGeometry& geometry = *tensor.geometry;
  const Geometry::Strides strides = geometry_.strides(geometry);
  const DriverTraits& traits = driver_->traits();
  TensorView<4> view;
  view.address = tensor.buffer->base() + static_cast<Address>(geometry_.offset(geometry, layer, range.first));
  view.shape = {range.count, range.tokens, geometry_.config().num_kv_heads, geometry.head_dim};
  view.strides = {strides.slot * range.distance, strides.token, strides.head, 1};
  view.dtype = geometry_.config().dtype;
  view.device = traits.tensor_device;
  view.device_index = traits.tensor_device_index;
  view.owner = tensor.buffer;
  return view;
}

KVView<4> KVCache::make_views(std::int64_t layer, const SlotRange& range) const {
  const auto [k, v] = tensors_of(layer);
  KVView<4> views{make_view(*k, layer, range), std::nullopt};
  if (v != nullptr) views.v = make_view(*v, layer, range);
  return views;
}

namespace {

TensorView<3> without_slot(TensorView<4>&& view) {
  TensorView<3> one;
  one.address = view.address;
  std::copy(view.shape.begin() + 1, view.shape.end(), one.shape.begin());
  std::copy(view.strides.begin() + 1, view.strides.end(), one.strides.begin());
  one.dtype = view.dtype;
  one.device = view.device;
  one.device_index = view.device_index;
  one.owner = std::move(view.owner);
  return one;
}

}  // namespace

KVView<3> KVCache::make_view_of(std::int64_t layer, std::int64_t slot) const {
  KVView<4> views = make_views(layer, {slot, 1, 1, slots_.length(slot)});
  KVView<3> one{without_slot(std::move(views.k)), std::nullopt};
  if (views.v) one.v = without_slot(std::move(*views.v));
  return one;
}

KVView<3> KVCache::view(std::int64_t layer, std::int64_t slot) const {
  const auto held = lock();
  check_index("layer", layer, geometry_.config().num_layers);
  check_active("slot", slot);
  return make_view_of(layer, slot);
}

KVView<4> KVCache::batch(std::int64_t layer, std::span<const std::int64_t> slots, std::int64_t length) {
  const auto held = lock();
  check_index("layer", layer, geometry_.config().num_layers);
  if (slots.empty()) throw std::invalid_argument("slots is empty: name at least one");
  check_between("length", length, 0, geometry_.config().max_seq_len);
  const bool must_be_there = geometry_.unmapped_reads() != UnmappedReads::kZeros;
  const std::int64_t distance = slots.size() == 1 ? 1 : slots[1] - slots[0];
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check_active("slot", slots[i]);
    if (i != 0 && (distance <= 0 || slots[i] - slots[i - 1] != distance)) {
      throw std::invalid_argument("slots: " + std::to_string(slots[i - 1]) + ", " + std::to_string(slots[i]) + " at position " +
                                  std::to_string(i) +
                                  " breaks equal ascending steps: one strided batch needs them; "
                                  "alloc_batch gives neighbours");
    }
    if (const std::int64_t committed = committed_tokens(slots[i]); must_be_there && committed < length) {
      throw std::invalid_argument("length=" + std::to_string(length) + ": slot " + std::to_string(slots[i]) +
                                  " has memory for " + std::to_string(committed) +
                                  " tokens, and reading past it would fault: step it first");
    }
  }
  if (must_be_there) {
    promise(slots, length);
  } else if (geometry_.config().scrub) {
    // What lies behind a length is no promise, but it must not be another request's.
    for (const std::int64_t slot : slots) {
      if (length > slots_.quiet(slot)) pool_->scrub_excess(*holder_, static_cast<std::size_t>(slot));
    }
  }
  return make_views(layer, {slots.front(), static_cast<std::int64_t>(slots.size()), distance, length});
}

KVView<4> KVCache::layer(std::int64_t layer) const {
  const auto held = lock();
  return make_views(layer, {0, slots_.size(), 1, geometry_.config().max_seq_len});
}

}  // namespace vattn
