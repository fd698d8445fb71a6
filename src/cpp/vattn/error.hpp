// The errors of vattn: one base class, one type for each thing that can go wrong.
//
// Promise: whatever is thrown, the call changed nothing that its documentation does not name. Every message carries the
// parameter or the call, the value, and the way out. Bad arguments are the standard library's std::invalid_argument (a value),
// std::out_of_range (an index) and std::overflow_error (a product that leaves 64 bits), so that a C++ caller can catch them
// without vattn's types; the bindings turn them into ValueError, IndexError and OverflowError.
// Thread: any; the types are immutable once thrown.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "vattn/export.hpp"

namespace vattn {

/// Base of everything vattn throws for reasons other than a bad argument.
class VATTN_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Memory, or another resource that memory needs (mappings, file size, cgroup), is not there. Nothing was taken.
class VATTN_API OutOfMemoryError : public Error {
 public:
  OutOfMemoryError(const std::string& what, std::uint64_t needed, std::uint64_t available, std::uint64_t limit,
                   std::uint64_t held_by_others = 0)
      : Error(what),
        needed_bytes(needed),
        available_bytes(available),
        limit_bytes(limit),
        held_by_others_bytes(held_by_others) {}

  std::uint64_t needed_bytes;     ///< what the call had to create
  std::uint64_t available_bytes;  ///< what it could have had
  std::uint64_t limit_bytes;      ///< the bound that said no
  /// What the call could have besides, once every slot that it does not grow and every other member of the pool gave its memory
  /// up. 0 where another resource than the budget's memory is missing.
  std::uint64_t held_by_others_bytes;

  /// False: not even all of the others' memory would do, so the call has to ask for less, or the limit has to rise.
  [[nodiscard]] bool waiting_can_help() const noexcept {
    return needed_bytes != 0 && needed_bytes <= available_bytes + held_by_others_bytes;
  }
};

/// Every slot is taken.
class VATTN_API NoFreeSlotError : public Error {
 public:
  using Error::Error;
};

/// A driver call failed: the call's name, its numeric code (errno on a host, CUresult on CUDA) and the code's name.
class VATTN_API DriverError : public Error {
 public:
  DriverError(std::string call_name, int error_code, std::string code_name, const std::string& detail)
      : Error(call_name + " failed: " + code_name + " (" + std::to_string(error_code) + ")" +
              (detail.empty() ? std::string() : ": " + detail)),
        call(std::move(call_name)),
        code(error_code),
        name(std::move(code_name)) {}

  std::string call;
  int code;
  std::string name;
};

/// The object was closed, or belongs to the process that forked this one.
class VATTN_API ClosedError : public Error {
 public:
  using Error::Error;
};

/// The object is still used by others, named in the message.
class VATTN_API InUseError : public Error {
 public:
  using Error::Error;
};

}  // namespace vattn
