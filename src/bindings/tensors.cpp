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

/// Before the first tensor leaves: what it shows is what may be pickled. ModuleNotFoundError where there is no torch.
void prepare_torch() {
  static bool done = false;  // guarded by the GIL; twice does no harm
  if (done) return;
  nb::module_::import_("vattn._pickling").attr("install")();
  done = true;
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
  if (shape.size() > extents.size()) {
    throw std::invalid_argument("a tensor of " + std::to_string(shape.size()) + " dimensions: at most " +
                                std::to_string(extents.size()) + " can be handed to torch");
  }
  prepare_torch();
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

void bind_tensors(nb::module_& module) {
  module.def(
      "owns", &vattn::is_in_a_buffer, nb::arg("address"),
      "Whether the byte at an address is in memory of vattn's: of an open cache or tensor, or of one that a tensor keeps.");
}
