// libfake_cuda_v1.so: the fake as a driver from before CUDA 12.0 would be. Of cuGetProcAddress it has the first ABI only, and
// it does not say where tensors live, as no real driver does.
//
// Everything behind it is the one libfake_cuda.so of the process, so that the tests' control functions steer it.
// Thread: any.
#include <dlfcn.h>

#include "cuda/cuda_types.hpp"

using vattn::cuda::CUresult;
using vattn::cuda::cuuint64_t;

extern "C" __attribute__((visibility("default"))) CUresult cuGetProcAddress(const char* symbol, void** entry, int version,
                                                                            cuuint64_t flags) {
  using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t);
  static const auto inner = [] {
    void* const library = ::dlopen(VATTN_FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
    return library == nullptr ? nullptr : reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress"));
  }();
  return inner == nullptr ? vattn::cuda::CUDA_ERROR_NOT_FOUND : inner(symbol, entry, version, flags);
}
