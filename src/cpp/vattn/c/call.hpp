// What every function of the C interface goes through: exceptions become status codes and this thread's last error, parameters
// are checked, and nothing crosses the boundary.
//
// Thread: any; each has a last error of its own.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "vattn/c/vattn.h"
#include "vattn/vattn.hpp"

struct vattn_cache {
  static constexpr const char* kParameter = "cache";
  vattn::KVCache object;
};
struct vattn_tensor {
  static constexpr const char* kParameter = "tensor";
  vattn::GrowableTensor object;
};
struct vattn_pool {
  static constexpr const char* kParameter = "pool";
  std::shared_ptr<vattn::PagePool> object;
};
struct vattn_memory {
  std::shared_ptr<vattn::Buffer> buffer;
};

namespace vattn::c {

/// Keeps the exception that is being handled as this thread's last error, and says which status it is.
vattn_status note_failure() noexcept;

template <typename Call>
vattn_status guarded(Call&& call) noexcept {
  try {
    call();
    return VATTN_OK;
  } catch (...) {
    return note_failure();
  }
}

void need(const void* pointer, const char* parameter);

/// Throws where `size`, of the caller's struct, is not that of this library's.
void check_size(std::size_t size, std::size_t own, const char* parameter, const char* type);

template <typename Struct>
void need_struct(const Struct* value, const char* parameter, const char* type) {
  need(value, parameter);
  check_size(value->struct_size, sizeof(Struct), parameter, type);
}

/// Calls `call(object)` with what the handle holds.
template <typename Handle, typename Call>
vattn_status on(Handle* handle, Call&& call) noexcept {
  return guarded([&] {
    need(handle, Handle::kParameter);
    call(handle->object);
  });
}

/// The same for a call whose value goes to `*result`, the parameter named.
template <typename Handle, typename Result, typename Call>
vattn_status on(Handle* handle, Result* result, const char* parameter, Call&& call) noexcept {
  return guarded([&] {
    need(handle, Handle::kParameter);
    need(result, parameter);
    *result = static_cast<Result>(call(handle->object));
  });
}

// Parameters as C has them, turned into the library's.

/// 0 is none: the default.
inline std::optional<std::int64_t> unless_zero(std::int64_t value) {
  return value == 0 ? std::nullopt : std::optional<std::int64_t>(value);
}

DType parse_dtype(const char* name);
/// NULL is the cpu.
Device parse_device_or_cpu(const char* name);

inline std::span<const std::int64_t> span_of(const std::int64_t* values, std::int64_t count, const char* parameter) {
  if (count < 0) throw std::invalid_argument("count=" + std::to_string(count) + " must not be negative");
  if (count != 0) need(values, parameter);
  return {values, static_cast<std::size_t>(count)};
}

}  // namespace vattn::c
