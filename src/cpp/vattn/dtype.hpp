// The element types a tensor may have: their names, sizes and DLPack codes.
//
// Names are torch's. Nothing here computes: vattn moves memory, kernels interpret it.
// Thread: any; pure functions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "vattn/export.hpp"

namespace vattn {

enum class DType : std::uint8_t {
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat8E4M3FN,
  kFloat8E5M2,
  kFloat8E4M3FNUZ,
  kFloat8E5M2FNUZ,
  kFloat8E8M0FNU,
  kInt8,
  kUInt8,
};

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  std::uint8_t bytes;
  std::uint8_t dlpack_code;  ///< the 8-bit float types are exported as bytes: not every consumer knows their codes
};

constexpr std::uint8_t kDlpackInt = 0;
constexpr std::uint8_t kDlpackUInt = 1;
constexpr std::uint8_t kDlpackFloat = 2;
constexpr std::uint8_t kDlpackBFloat = 4;

constexpr std::array<DTypeInfo, 10> kDTypes{{
    {DType::kFloat16, "float16", 2, kDlpackFloat},
    {DType::kBFloat16, "bfloat16", 2, kDlpackBFloat},
    {DType::kFloat32, "float32", 4, kDlpackFloat},
    {DType::kFloat8E4M3FN, "float8_e4m3fn", 1, kDlpackUInt},
    {DType::kFloat8E5M2, "float8_e5m2", 1, kDlpackUInt},
    {DType::kFloat8E4M3FNUZ, "float8_e4m3fnuz", 1, kDlpackUInt},
    {DType::kFloat8E5M2FNUZ, "float8_e5m2fnuz", 1, kDlpackUInt},
    {DType::kFloat8E8M0FNU, "float8_e8m0fnu", 1, kDlpackUInt},
    {DType::kInt8, "int8", 1, kDlpackInt},
    {DType::kUInt8, "uint8", 1, kDlpackUInt},
}};

[[nodiscard]] constexpr const DTypeInfo& info_of(DType dtype) noexcept { return kDTypes[static_cast<std::size_t>(dtype)]; }
[[nodiscard]] constexpr std::size_t size_of(DType dtype) noexcept { return info_of(dtype).bytes; }

[[nodiscard]] constexpr std::optional<DType> dtype_named(std::string_view name) noexcept {
  for (const DTypeInfo& info : kDTypes) {
    if (info.name == name) return info.dtype;
  }
  return std::nullopt;
}

}  // namespace vattn
