// A test of the fake CUDA library itself: a fresh fake, the context of device 0 current, and short names for the usual calls.
// Thread: the test's own.
#pragma once

#include <unistd.h>

#include "cuda_under_test.hpp"
#include "gtest/gtest.h"

namespace vattn::cuda {

inline constexpr std::size_t kPage = std::size_t{2} << 20;
inline constexpr std::size_t kHostPage = 4096;

inline unsigned char* pointer(CUdeviceptr at) { return reinterpret_cast<unsigned char*>(at); }

inline CUmemAllocationProp on_device(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return properties;
}

/// A test on a fresh fake, with the context of device 0 current.
class FakeCuda : public testing::Test {
 protected:
  void SetUp() override {
    if (!on_fake()) GTEST_SKIP() << "is about the fake library";
    fake_cuda_reset();
    ASSERT_EQ(cu.cuInit(0), CUDA_SUCCESS);
    ASSERT_EQ(cu.cuDevicePrimaryCtxRetain(&context_, 0), CUDA_SUCCESS);
    ASSERT_EQ(cu.cuCtxPushCurrent(context_), CUDA_SUCCESS);
  }
  void TearDown() override {
    if (on_fake()) fake_cuda_reset();
  }

  CUdeviceptr reserve(std::size_t size) {
    CUdeviceptr base = 0;
    EXPECT_EQ(cu.cuMemAddressReserve(&base, size, kPage, 0, 0), CUDA_SUCCESS);
    return base;
  }
  CUmemGenericAllocationHandle create(std::size_t size = kPage, int device = 0) {
    CUmemGenericAllocationHandle handle = 0;
    const auto properties = on_device(device);
    EXPECT_EQ(cu.cuMemCreate(&handle, size, &properties, 0), CUDA_SUCCESS);
    return handle;
  }
  CUresult allow(CUdeviceptr at, std::size_t size, CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, flags};
    return cu.cuMemSetAccess(at, size, &access, 1);
  }
  /// A page at `at`, accessible.
  CUmemGenericAllocationHandle place(CUdeviceptr at, std::size_t size = kPage) {
    const auto handle = create(size);
    EXPECT_EQ(cu.cuMemMap(at, size, 0, handle, 0), CUDA_SUCCESS);
    EXPECT_EQ(allow(at, size), CUDA_SUCCESS);
    return handle;
  }
  static fake_cuda_counts alive() {
    fake_cuda_counts counts;
    fake_cuda_count(&counts);
    return counts;
  }
  /// Whether touching the byte would not fault: the kernel is asked to read it for us, which fails where we would die.
  static bool is_readable(CUdeviceptr at) {
    int ends[2];
    EXPECT_EQ(::pipe(ends), 0);
    const bool readable = ::write(ends[1], pointer(at), 1) == 1;  // EFAULT rather than SIGSEGV
    ::close(ends[0]);
    ::close(ends[1]);
    return readable;
  }

  const Functions cu = on_fake() ? table() : Functions();
  CUcontext context_ = nullptr;
};

}  // namespace vattn::cuda
