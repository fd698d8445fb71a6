// The tests themselves hold the primary context on a GPU (main.cpp), so that closing the only driver does not destroy it.
#include <gtest/gtest.h>

#include <memory>

#include "cuda/cuda_driver.hpp"
#include "cuda_under_test.hpp"

namespace vattn::cuda {
namespace {

/// Whether the primary context of device 0 exists.
bool is_active() {
  using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  using GetState = CUresult (*)(CUdevice, unsigned*, int*);
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(::dlerror());
  void* entry = nullptr;
  const auto find = reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress_v2"));
  InContext::require(find("cuDevicePrimaryCtxGetState", &entry, 7000, CU_GET_PROC_ADDRESS_LEGACY_STREAM, nullptr),
                     "cuGetProcAddress(cuDevicePrimaryCtxGetState)");
  unsigned flags = 0;
  int active = 0;
  InContext::require(reinterpret_cast<GetState>(entry)(0, &flags, &active), "cuDevicePrimaryCtxGetState");
  return active != 0;
}

TEST(CudaHeldContext, OutlivesTheOnlyDriverOnAGpu) {
  if (on_fake()) GTEST_SKIP() << "the fake begins anew with each test";
  if (const std::string reason = probe_cuda().reason; !reason.empty()) GTEST_SKIP() << reason;
  EXPECT_TRUE(is_active()) << "before";
  open_cuda_driver(0).reset();
  EXPECT_TRUE(is_active()) << "after";
}

}  // namespace
}  // namespace vattn::cuda
