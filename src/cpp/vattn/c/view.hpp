// Views as the C interface hands them out: into structs of the caller's, which own nothing until they are retained.
#pragma once

#include "vattn/c/call.hpp"

namespace vattn::c {

/// Throws unless `view` can take a view: of the right size, and without memory that it keeps.
void need_empty(const vattn_view* view, const char* parameter);

void fill(vattn_view& view, Address address, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
          DType dtype, TensorDevice device, int device_index) noexcept;

template <std::size_t Rank>
void fill(vattn_view& view, const TensorView<Rank>& from) noexcept {
  fill(view, from.address, from.shape, from.strides, from.dtype, from.device, from.device_index);
}

/// Both views of a layer, or, where one of the structs cannot take it, neither.
template <typename Call>
vattn_status hand_out(vattn_cache* cache, vattn_view* k, vattn_view* v, Call&& call) noexcept {
  return on(cache, [&](KVCache& object) {
    need_empty(k, "k");
    need_empty(v, "v");
    const auto views = call(object);
    fill(*k, views.k);
    if (views.v) {
      fill(*v, *views.v);
    } else {
      VATTN_INIT(v);
    }
  });
}

}  // namespace vattn::c
