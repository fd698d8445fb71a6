// The fake CUDA library keeps the rules of work on a device (kernels, fills, copies), and its own tools do what they say.
#include <sys/wait.h>

#include "fake_cuda_fixture.hpp"

namespace vattn::cuda {
namespace {

// ---- work ---------------------------------------------------------------------------------------------------------------

TEST_F(FakeCuda, UnmappingUnderARunningKernelIsAViolation) {
  const CUdeviceptr base = reserve(3 * kPage);
  place(base);
  place(base + kPage);
  const std::uint64_t kernel = fake_cuda_kernel_begin(base + 64, 64);
  ASSERT_NE(kernel, 0U);
  EXPECT_EQ(cu.cuMemUnmap(base + kPage, kPage), CUDA_SUCCESS) << "another page";
  EXPECT_EQ(fake_cuda_violations(), 0U);
  EXPECT_EQ(cu.cuMemUnmap(base, kPage), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(allow(base, kPage, CU_MEM_ACCESS_FLAGS_PROT_NONE), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(fake_cuda_violations(), 2U);
  EXPECT_EQ(alive().mappings, 1U) << "refused, so still there";
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 0);
  EXPECT_EQ(cu.cuMemUnmap(base, kPage), CUDA_SUCCESS);
}

TEST_F(FakeCuda, OnlyTheOwningContextWaitsForAKernel) {
  const CUdeviceptr base = reserve(kPage);
  place(base);
  ASSERT_NE(fake_cuda_kernel_begin(base, kPage), 0U);
  {
    const InContext other(1);
    EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_SUCCESS);
    EXPECT_EQ(alive().work, 1U);
  }
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(alive().work, 0U);
}

TEST_F(FakeCuda, AKernelThatTouchesMemoryWithoutAccessIsAViolation) {
  const CUdeviceptr base = reserve(2 * kPage);
  EXPECT_EQ(fake_cuda_kernel_begin(base, kPage), 0U);
  place(base);
  EXPECT_EQ(fake_cuda_kernel_begin(base, kPage + 1), 0U);
  ASSERT_EQ(cu.cuMemMap(base + kPage, kPage, 0, create(), 0), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_kernel_begin(base + kPage, 1), 0U);
  EXPECT_EQ(fake_cuda_violations(), 3U);
}

TEST_F(FakeCuda, FillsAndCopiesHappenWhenTheyAreWaitedFor) {
  const CUdeviceptr base = reserve(2 * kPage);
  place(base);
  place(base + kPage);
  CUstream stream = nullptr;
  ASSERT_EQ(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cu.cuMemsetD8Async(base, 7, kPage, stream), CUDA_SUCCESS);
  ASSERT_EQ(cu.cuMemcpyDtoDAsync(base + kPage, base, kPage, stream), CUDA_SUCCESS);
  EXPECT_EQ(pointer(base)[0], 0xFF) << "nobody waited";
  EXPECT_EQ(cu.cuMemUnmap(base, kPage), CUDA_ERROR_ILLEGAL_ADDRESS) << "under a fill";
  ASSERT_EQ(cu.cuStreamSynchronize(nullptr), CUDA_SUCCESS);
  EXPECT_EQ(pointer(base)[0], 0xFF) << "another stream";
  ASSERT_EQ(cu.cuStreamSynchronize(stream), CUDA_SUCCESS);
  EXPECT_EQ(pointer(base + kPage)[kPage - 1], 7);
  EXPECT_EQ(cu.cuStreamDestroy(stream), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuStreamSynchronize(stream), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(cu.cuMemsetD8Async(base, 7, 1, stream), CUDA_ERROR_INVALID_HANDLE);
}

TEST_F(FakeCuda, FillsAndCopiesNeedAccess) {
  const CUdeviceptr base = reserve(2 * kPage);
  place(base);
  EXPECT_EQ(cu.cuMemsetD8Async(base + kPage, 0, 1, nullptr), CUDA_ERROR_INVALID_VALUE) << "not mapped";
  EXPECT_EQ(fake_cuda_violations(), 0U);
  ASSERT_EQ(cu.cuMemMap(base + kPage, kPage, 0, create(), 0), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemsetD8Async(base + kPage, 0, 1, nullptr), CUDA_ERROR_ILLEGAL_ADDRESS) << "no access";
  EXPECT_EQ(cu.cuMemcpyDtoDAsync(base, base + kPage, 1, nullptr), CUDA_ERROR_ILLEGAL_ADDRESS);
  ASSERT_EQ(allow(base + kPage, kPage, CU_MEM_ACCESS_FLAGS_PROT_READ), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemsetD8Async(base + kPage, 0, 1, nullptr), CUDA_ERROR_ILLEGAL_ADDRESS) << "only to read";
  EXPECT_EQ(cu.cuMemcpyDtoDAsync(base, base + kPage, 1, nullptr), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_violations(), 3U);
  EXPECT_EQ(alive().null_stream_work, 1U);
}

// ---- the tool itself ----------------------------------------------------------------------------------------------------

TEST_F(FakeCuda, FaultsStrikeTheCallTheyAreArmedFor) {
  int count = 0;
  fake_cuda_fail("cuDeviceGetCount", 2, CUDA_ERROR_UNKNOWN, 0);
  EXPECT_EQ(cu.cuDeviceGetCount(&count), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuDeviceGetCount(&count), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(cu.cuDeviceGetCount(&count), CUDA_SUCCESS);
  fake_cuda_fail(nullptr, 1, CUDA_ERROR_NOT_PERMITTED, 1);
  EXPECT_EQ(cu.cuDeviceGetCount(&count), CUDA_ERROR_NOT_PERMITTED);
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_ERROR_NOT_PERMITTED);
  EXPECT_EQ(fake_cuda_faults_fired(), 3U);
  fake_cuda_clear_faults();
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_calls("cuCtxSynchronize"), 2U);
}

TEST_F(FakeCuda, EntriesAreFoundFromTheirVersionOn) {
  using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  const auto find = reinterpret_cast<GetProcAddress>(::dlsym(::dlopen(VATTN_FAKE_CUDA, RTLD_NOW), "cuGetProcAddress_v2"));
  void* entry = nullptr;
  auto status = CU_GET_PROC_ADDRESS_SUCCESS;
  EXPECT_EQ(find("cuMemMap", &entry, 10010, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
  EXPECT_EQ(entry, nullptr);
  EXPECT_EQ(find("cuNoSuchThing", &entry, 12000, 0, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
  EXPECT_EQ(find("cuMemMap", &entry, 99000, 0, &status), CUDA_ERROR_INVALID_VALUE) << "newer than the driver";
  EXPECT_EQ(find("cuMemMap", &entry, 12000, 0, &status), CUDA_SUCCESS);
  EXPECT_NE(entry, nullptr);
}

TEST_F(FakeCuda, AChildHasNeitherCudaNorItsMemory) {
  const CUdeviceptr base = reserve(kPage);
  place(base);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    bool good = cu.cuInit(0) == CUDA_ERROR_NOT_INITIALIZED && fake_cuda_violations() == 0;
    good = good && cu.cuCtxSynchronize() == CUDA_ERROR_NOT_INITIALIZED && fake_cuda_violations() == 1;
    ::_exit(good && !is_readable(base) ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_TRUE(is_readable(base));
}

}  // namespace
}  // namespace vattn::cuda
