#include "vattn/c/call.hpp"

#include <new>

namespace vattn::c {
namespace {

/// vattn_error_info, with the strings.
struct Failure {
  vattn_status status = VATTN_OK;
  std::string message;
  std::string driver_call;
  std::string driver_code_name;
  int driver_code = 0;
  std::uint64_t needed_bytes = 0;
  std::uint64_t available_bytes = 0;
  std::uint64_t limit_bytes = 0;
  std::uint64_t held_by_others_bytes = 0;
};

thread_local Failure last;  // NOLINT: the C interface's errno; each thread has its own

vattn_status keep(Failure&& failure, const char* message) noexcept {
  last = std::move(failure);
  try {
    last.message = message;
  } catch (...) {
    last.message.clear();  // no memory for it; the status says what it was
  }
  return last.status;
}

Failure of_status(vattn_status status) noexcept {
  Failure failure;
  failure.status = status;
  return failure;
}

Failure of_memory(const OutOfMemoryError& error) noexcept {
  Failure failure = of_status(VATTN_OUT_OF_MEMORY);
  failure.needed_bytes = error.needed_bytes;
  failure.available_bytes = error.available_bytes;
  failure.limit_bytes = error.limit_bytes;
  failure.held_by_others_bytes = error.held_by_others_bytes;
  return failure;
}

Failure of_driver(const DriverError& error) noexcept {
  Failure failure = of_status(VATTN_DRIVER_ERROR);
  failure.driver_code = error.code;
  try {
    failure.driver_call = error.call;
    failure.driver_code_name = error.name;
  } catch (...) {  // NOLINT(bugprone-empty-catch)
    // No memory for the words; the code is there.
  }
  return failure;
}

}  // namespace

vattn_status note_failure() noexcept {
  try {
    throw;
  } catch (const OutOfMemoryError& error) {
    return keep(of_memory(error), error.what());
  } catch (const NoFreeSlotError& error) {
    return keep(of_status(VATTN_NO_FREE_SLOT), error.what());
  } catch (const DriverError& error) {
    return keep(of_driver(error), error.what());
  } catch (const ClosedError& error) {
    return keep(of_status(VATTN_CLOSED), error.what());
  } catch (const InUseError& error) {
    return keep(of_status(VATTN_IN_USE), error.what());
  } catch (const std::invalid_argument& error) {
    return keep(of_status(VATTN_INVALID_ARGUMENT), error.what());
  } catch (const std::out_of_range& error) {
    return keep(of_status(VATTN_OUT_OF_RANGE), error.what());
  } catch (const std::overflow_error& error) {
    return keep(of_status(VATTN_OVERFLOW), error.what());
  } catch (const std::bad_alloc&) {
    return keep(of_status(VATTN_OUT_OF_MEMORY), "the process is out of memory for vattn's own bookkeeping");
  } catch (const std::exception& error) {
    return keep(of_status(VATTN_ERROR), error.what());
  } catch (...) {
    return keep(of_status(VATTN_ERROR), "an exception of an unknown type");
  }
}

void need(const void* pointer, const char* parameter) {
  if (pointer == nullptr) throw std::invalid_argument(std::string(parameter) + " must not be NULL");
}

void check_size(std::size_t size, std::size_t own, const char* parameter, const char* type) {
  if (size == own) return;
  const std::string said = std::string(parameter) + ".struct_size=" + std::to_string(size);
  if (size == 0) throw std::invalid_argument(said + ": call VATTN_INIT on every " + type + " before its first use");
  throw std::invalid_argument(said + ", but a " + type + " of vattn " + version() + ", the library that is loaded, has " +
                              std::to_string(own) + " bytes: the program was compiled with " +
                              (size < own ? "an older" : "a newer") +
                              " vattn.h, or the struct was not made ready with VATTN_INIT. Compile it with the vattn.h of "
                              "this library");
}

DType parse_dtype(const char* name) {
  need(name, "dtype");
  const auto dtype = dtype_named(name);
  if (!dtype) throw std::invalid_argument("dtype=\"" + std::string(name) + "\" is not a type vattn knows");
  return *dtype;
}

Device parse_device_or_cpu(const char* name) { return name == nullptr ? Device{} : parse_device(name); }

}  // namespace vattn::c

using vattn::c::last;

const char* vattn_version(void) { return vattn::version(); }
const char* vattn_last_error(void) { return last.message.c_str(); }

vattn_status vattn_last_error_info(vattn_error_info* info) {
  return vattn::c::guarded([&] {
    vattn::c::need_struct(info, "info", "vattn_error_info");
    *info = {sizeof *info,
             last.status,
             last.driver_code,
             last.message.c_str(),
             last.driver_call.c_str(),
             last.driver_code_name.c_str(),
             last.needed_bytes,
             last.available_bytes,
             last.limit_bytes,
             last.held_by_others_bytes};
  });
}
