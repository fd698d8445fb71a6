// Views become torch tensors: DLPack underneath, with an owner that keeps the memory.
#include <array>
#include <memory>

#include "bindings/bindings.hpp"

namespace {

// Runs with the GIL, on whatever thread dropped the tensor.
void drop_owner(void* owner) noexcept {
  auto* buffer = static_cast<std::shared_ptr<vattn::Buffer>*>(owner);
  drop(*buffer);
  delete buffer;
}

nb::tuple to_tuple(std::span<const std::int64_t> values) {
  nb::list list;
  for (const std::int64_t value : values) list.append(value);
  return nb::tuple(list);
}

}  // namespace

vattn::DType dtype_of(const std::string& name) {
  const auto dtype = vattn::dtype_named(name);
  if (!dtype) {
    std::string known;
    for (const auto& info : vattn::kDTypes) known += (known.empty() ? "" : ", ") + std::string(info.name);
    throw std::invalid_argument("dtype=" + name + " is not supported: use one of " + known);
  }
  return *dtype;
}

nb::object to_torch(vattn::Address address, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                    vattn::DType dtype, vattn::TensorDevice device, int device_index,
                    const std::shared_ptr<vattn::Buffer>& owner) {
  if (device == vattn::TensorDevice::kMeta) return nb::make_tuple(to_tuple(shape), to_tuple(strides));
  std::array<std::size_t, 8> extents{};
  std::copy(shape.begin(), shape.end(), extents.begin());
  const vattn::DTypeInfo& info = vattn::info_of(dtype);
  const nb::dlpack::dtype element{info.dlpack_code, static_cast<std::uint8_t>(info.bytes * 8), 1};
  auto reference = std::make_unique<std::shared_ptr<vattn::Buffer>>(owner);
  const nb::capsule keeper(reference.get(), drop_owner);
  static_cast<void>(reference.release());
  const int device_type = device == vattn::TensorDevice::kCuda ? nb::device::cuda::value : nb::device::cpu::value;
  nb::ndarray<nb::pytorch> array(reinterpret_cast<void*>(address), shape.size(), extents.data(), keeper, strides.data(),
                                 element, device_type, device_index);
  return array.cast();
}
