// Hands a view to any framework that speaks DLPack (https://dmlc.github.io/dlpack): torch, JAX, CuPy, a pybind11 engine.
//
// The result owns a reference to the memory; its deleter drops it, on whatever thread and however late that is. 8-bit floats
// are exported as unsigned bytes, since not every consumer knows their codes: reinterpret them there. Thread: any.
#pragma once

#include <span>

#include "vattn/tensor/growable_tensor.hpp"
#include "vattn/tensor/tensor_view.hpp"

/// DLPack's managed tensor, as its ABI has it (version 0.x, the one that a capsule named "dltensor" holds).
struct DLManagedTensor;

namespace vattn {

/// Resets the reference, where more is to be done than that: the last one calls the driver.
using OwnerDropper = void (*)(std::shared_ptr<Buffer>&) noexcept;

/// A new DLManagedTensor; call its `deleter` once. std::invalid_argument for a view on meta, which has no memory to hand over.
[[nodiscard]] VATTN_API DLManagedTensor* to_dlpack(Address address, std::span<const std::int64_t> shape,
                                                   std::span<const std::int64_t> strides, DType dtype, TensorDevice device,
                                                   int device_index, std::shared_ptr<Buffer> owner,
                                                   OwnerDropper drop = nullptr);

template <std::size_t Rank>
[[nodiscard]] DLManagedTensor* to_dlpack(const TensorView<Rank>& view) {
  return to_dlpack(view.address, view.shape, view.strides, view.dtype, view.device, view.device_index, view.owner);
}

/// For a capsule's destructor: calls the tensor's deleter.
VATTN_API void delete_dlpack(DLManagedTensor* tensor) noexcept;

}  // namespace vattn
