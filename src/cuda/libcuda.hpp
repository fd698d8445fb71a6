// The CUDA driver library: opened at run time, never linked, its entry points in one table.
//
// Promise: open() either returns a table whose required entries are all there, or throws a DriverError that says what is
// missing and what to do about it. There is no global table: each driver owns a reference to its own, so that a test may open
// the fake library and, in the same process, another one that lacks an entry. Entries are found through cuGetProcAddress, which
// takes the ABI version each was declared with; only cuGetProcAddress itself is looked up by its symbol.
//
// The library is never closed: libcuda keeps threads and exit handlers of its own, other libraries in the process (PyTorch) use
// it as well, and the loader counts references, so that a handle kept open costs nothing.
// Thread: any; a Libcuda does not change after open(), and CUDA's entry points may be called from any thread.
#pragma once

#include <memory>
#include <string>

#include "cuda/functions.hpp"
#include "vattn/driver/driver.hpp"

namespace vattn::cuda {

class Libcuda {
 public:
  /// The library that open() will open: libcuda.so.1, or what the environment variable VATTN_CUDA_LIBRARY names.
  [[nodiscard]] static std::string default_library();

  /// Opens that library and fills the table. Does not initialise CUDA.
  [[nodiscard]] static std::shared_ptr<const Libcuda> open();

  /// cuInit. May be called any number of times.
  void initialise() const;

  /// Throws unless `result` is CUDA_SUCCESS: OutOfMemoryError for CUDA_ERROR_OUT_OF_MEMORY with `needed` as its bytes and what
  /// the current context's device has, DriverError for everything else. `call` is the entry point, `what` says what was asked.
  void check(CUresult result, const char* call, const std::string& what, std::uint64_t needed = 0) const;

  /// A code's name, as CUDA_ERROR_INVALID_VALUE, and its text; a placeholder where the library knows none. Never throws for a
  /// strange code.
  [[nodiscard]] std::string name_of(CUresult result) const;
  [[nodiscard]] std::string text_of(CUresult result) const;

  /// Where tensors over this library's memory live. NVIDIA's library has no say in it: CUDA. The fake library of the tests
  /// hands out host memory and says so through a symbol of its own.
  [[nodiscard]] TensorDevice tensor_device() const noexcept { return tensor_device_; }

  /// What was opened.
  [[nodiscard]] const std::string& library() const noexcept { return library_; }

  const Functions& operator*() const noexcept { return functions_; }
  const Functions* operator->() const noexcept { return &functions_; }

 private:
  explicit Libcuda(std::string library);
  void find_entries(void* handle);

  std::string library_;
  Functions functions_;
  TensorDevice tensor_device_ = TensorDevice::kCuda;
};

}  // namespace vattn::cuda
