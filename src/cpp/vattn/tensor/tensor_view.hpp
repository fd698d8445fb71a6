// A strided view of memory that vattn manages: what a kernel needs to know, and the reference that keeps it valid.
//
// Thread: a value; copy it freely.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "vattn/driver/open.hpp"
#include "vattn/dtype.hpp"

namespace vattn {

class Buffer;

template <std::size_t Rank>
struct TensorView {
  Address address = 0;
  std::array<std::int64_t, Rank> shape{};
  std::array<std::int64_t, Rank> strides{};  ///< in elements
  DType dtype = DType::kFloat32;
  TensorDevice device = TensorDevice::kMeta;
  int device_index = 0;
  std::shared_ptr<Buffer> owner;  ///< addresses and contents live as long as this does

  /// The first element, for a kernel; null on meta. The address is the device's: a host may read it only where device is kCpu.
  template <typename T = void>
  [[nodiscard]] T* data() const noexcept {
    if (device == TensorDevice::kMeta) return nullptr;
    return reinterpret_cast<T*>(address);
  }
};

}  // namespace vattn
