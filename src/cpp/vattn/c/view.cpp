#include "vattn/c/view.hpp"

#include <algorithm>

namespace vattn::c {
namespace {

std::int32_t kind_of(TensorDevice device) noexcept {
  if (device == TensorDevice::kCpu) return VATTN_CPU;
  return device == TensorDevice::kCuda ? VATTN_CUDA : VATTN_META;
}

}  // namespace

void need_empty(const vattn_view* view, const char* parameter) {
  need_struct(view, parameter, "vattn_view");
  if (view->owner == nullptr) return;
  throw std::invalid_argument(std::string(parameter) +
                              ".owner keeps the memory of another view: call vattn_view_release first");
}

void fill(vattn_view& view, Address address, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
          DType dtype, TensorDevice device, int device_index) noexcept {
  VATTN_INIT(&view);
  if (device != TensorDevice::kMeta) view.data = reinterpret_cast<void*>(address);
  view.dtype = info_of(dtype).name.data();  // of a literal, so it ends in a 0
  view.element_size = info_of(dtype).bytes;
  view.device_kind = kind_of(device);
  view.device_index = device_index;
  view.ndim = static_cast<std::int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), view.shape);
  std::copy(strides.begin(), strides.end(), view.strides);
}

}  // namespace vattn::c

namespace c = vattn::c;

vattn_status vattn_cache_view(vattn_cache* cache, int64_t layer, int64_t slot, vattn_view* k, vattn_view* v) {
  return c::hand_out(cache, k, v, [&](vattn::KVCache& it) { return it.view(layer, slot); });
}

vattn_status vattn_cache_batch(vattn_cache* cache, int64_t layer, const int64_t* slots, int64_t count, int64_t length,
                               vattn_view* k, vattn_view* v) {
  return c::hand_out(cache, k, v,
                     [&](vattn::KVCache& it) { return it.batch(layer, c::span_of(slots, count, "slots"), length); });
}

vattn_status vattn_cache_layer(vattn_cache* cache, int64_t layer, vattn_view* k, vattn_view* v) {
  return c::hand_out(cache, k, v, [&](vattn::KVCache& it) { return it.layer(layer); });
}

vattn_status vattn_tensor_view(vattn_tensor* tensor, vattn_view* view) {
  return c::on(tensor, [&](vattn::GrowableTensor& it) {
    c::need_empty(view, "view");
    const vattn::GrowableTensor::View from = it.view();
    if (from.shape.size() > VATTN_MAX_DIMS) {
      throw std::invalid_argument("view: the tensor has " + std::to_string(from.shape.size()) +
                                  " dimensions, and a vattn_view has room for " + std::to_string(VATTN_MAX_DIMS) +
                                  ": use vattn_tensor_data, whose rows are dense");
    }
    c::fill(*view, from.address, from.shape, from.strides, from.dtype, from.device, from.device_index);
  });
}

vattn_status vattn_view_retain(vattn_view* view) {
  return c::guarded([&] {
    c::need_empty(view, "view");
    if (view->data == nullptr) return;
    std::shared_ptr<vattn::Buffer> buffer = vattn::buffer_at(reinterpret_cast<vattn::Address>(view->data));
    if (buffer == nullptr) {
      throw std::invalid_argument("view.data is in no memory of vattn's: retain a view while its cache or tensor is open");
    }
    view->owner = new vattn_memory{std::move(buffer)};
  });
}

vattn_status vattn_view_release(vattn_view* view) {
  return c::guarded([&] {
    c::need_struct(view, "view", "vattn_view");
    if (view->owner == nullptr) return;
    view->data = nullptr;
    delete std::exchange(view->owner, nullptr);
  });
}
