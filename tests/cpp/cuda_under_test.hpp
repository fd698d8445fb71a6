// The CUDA library that the tests run on: the fake one, or with VATTN_TEST_GPU=1 the machine's own.
//
// Gives tests a table of its entry points, filled without the library's own code, so that what is tested is not what tests.
// The fake's control functions (fake_cuda.h) are linked, and are of use only while on_fake().
// Thread: any, once the first test has begun.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/functions.hpp"
#include "fake_cuda.h"

namespace vattn::cuda {

/// Whether the tests run on the fake library. Decides it, once, by telling vattn what to open.
inline bool on_fake() {
  static const bool fake = [] {
    const char* gpu = std::getenv("VATTN_TEST_GPU");
    if (gpu != nullptr && std::string(gpu) == "1") {
      ::unsetenv("VATTN_CUDA_LIBRARY");
      return false;
    }
    ::setenv("VATTN_CUDA_LIBRARY", VATTN_FAKE_CUDA, 1);
    return true;
  }();
  return fake;
}

/// Every entry point of that library.
inline const Functions& table() {
  static const Functions functions = [] {
    using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
    void* library = ::dlopen(on_fake() ? VATTN_FAKE_CUDA : "libcuda.so.1", RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(::dlerror());
    const auto find = reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress_v2"));
    Functions found;
    void* entry = nullptr;
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters)            \
  find(#name, &entry, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, nullptr); \
  found.name = reinterpret_cast<CUresult(*) parameters>(entry);
#include "cuda/functions.def"
    return found;
  }();
  return functions;
}

/// The primary context of a device, current for the scope.
class InContext {
 public:
  explicit InContext(int device = 0) : device_(device) {
    require(table().cuInit(0), "cuInit");
    CUcontext context = nullptr;
    require(table().cuDevicePrimaryCtxRetain(&context, device_), "cuDevicePrimaryCtxRetain");
    require(table().cuCtxPushCurrent(context), "cuCtxPushCurrent");
  }
  InContext(const InContext&) = delete;
  InContext& operator=(const InContext&) = delete;
  ~InContext() {
    CUcontext context = nullptr;
    table().cuCtxPopCurrent(&context);
    table().cuDevicePrimaryCtxRelease(device_);
  }

  static void require(CUresult result, const char* call) {
    if (result != CUDA_SUCCESS) throw std::runtime_error(std::string(call) + ": " + std::to_string(result));
  }

 private:
  int device_;
};

/// Bytes, through the driver: the same on a GPU and on the fake.
inline void write_device(CUdeviceptr to, const void* from, std::size_t size) {
  const InContext current;
  InContext::require(table().cuMemcpyHtoD(to, from, size), "cuMemcpyHtoD");
}
inline void read_device(void* to, CUdeviceptr from, std::size_t size) {
  const InContext current;
  InContext::require(table().cuMemcpyDtoH(to, from, size), "cuMemcpyDtoH");
}

/// What the fake says is alive, in an order of its own.
inline std::vector<std::uint64_t> alive_on_fake() {
  if (!on_fake()) return {};
  fake_cuda_counts counts;
  fake_cuda_count(&counts);
  return {counts.handles,
          counts.handle_references,
          counts.mappings,
          counts.reservations,
          counts.context_references,
          counts.streams,
          counts.work,
          counts.bytes,
          counts.events,
          static_cast<std::uint64_t>(fake_cuda_context_depth())};
}

/// What alive_on_fake() says when nothing is.
inline std::vector<std::uint64_t> nothing_alive() { return std::vector<std::uint64_t>(10, 0); }

/// The last rule that was broken, or nothing.
inline std::string last_violation() {
  std::string text(256, '\0');
  text.resize(fake_cuda_last_violation(text.data(), text.size()));
  return text;
}

}  // namespace vattn::cuda
