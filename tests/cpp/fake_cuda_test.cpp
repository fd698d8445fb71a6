// The fake CUDA library keeps the rules of devices, contexts, addresses, pages and mappings: each one, broken on purpose, is
// refused with the code of the real driver where that is documented, and changes nothing. tests/fake_cuda has the rules.
#include <thread>

#include "fake_cuda_fixture.hpp"

namespace vattn::cuda {
namespace {

// ---- initialisation, devices, contexts ----------------------------------------------------------------------------------

TEST_F(FakeCuda, NothingWorksBeforeCuInit) {
  fake_cuda_reset();
  int count = 0;
  EXPECT_EQ(cu.cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(cu.cuDevicePrimaryCtxRetain(&context_, 0), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(cu.cuMemUnmap(0, kPage), CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(cu.cuInit(1), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(FakeCuda, DevicesAreCounted) {
  int count = 0;
  CUdevice device = 0;
  ASSERT_EQ(cu.cuDeviceGetCount(&count), CUDA_SUCCESS);
  EXPECT_EQ(count, 2);
  EXPECT_EQ(cu.cuDeviceGet(&device, 2), CUDA_ERROR_INVALID_DEVICE);
  EXPECT_EQ(cu.cuDevicePrimaryCtxRetain(&context_, -1), CUDA_ERROR_INVALID_DEVICE);
  const auto properties = on_device(2);
  CUmemGenericAllocationHandle handle = 0;
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &properties, 0), CUDA_ERROR_INVALID_DEVICE);
}

TEST_F(FakeCuda, AContextIsCurrentOnOneThreadAndWhileItIsRetained) {
  std::size_t available = 0;
  std::size_t total = 0;
  std::thread([&] {
    EXPECT_EQ(cu.cuMemGetInfo(&available, &total), CUDA_ERROR_INVALID_CONTEXT);
    CUcontext none = nullptr;
    EXPECT_EQ(cu.cuCtxPopCurrent(&none), CUDA_ERROR_INVALID_CONTEXT);
  }).join();
  EXPECT_EQ(cu.cuMemGetInfo(&available, &total), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuDevicePrimaryCtxRelease(0), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemGetInfo(&available, &total), CUDA_ERROR_CONTEXT_IS_DESTROYED);
  EXPECT_EQ(cu.cuDevicePrimaryCtxRelease(0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuCtxPushCurrent(context_), CUDA_ERROR_INVALID_CONTEXT);
}

TEST_F(FakeCuda, EveryMemoryCallNeedsAContext) {
  CUcontext popped = nullptr;
  ASSERT_EQ(cu.cuCtxPopCurrent(&popped), CUDA_SUCCESS);
  CUdeviceptr base = 0;
  CUmemGenericAllocationHandle handle = 0;
  const auto properties = on_device(0);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, kPage, 0, 0, 0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuMemAddressFree(kPage, kPage), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &properties, 0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuMemRelease(1), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuMemMap(kPage, kPage, 0, 1, 0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuMemUnmap(kPage, kPage), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(allow(kPage, kPage), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_ERROR_INVALID_CONTEXT);
}

// ---- addresses and pages ------------------------------------------------------------------------------------------------

TEST_F(FakeCuda, ReservationsAreOnTheHostPage) {
  CUdeviceptr base = 0;
  EXPECT_EQ(cu.cuMemAddressReserve(&base, 0, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, kHostPage + 1, 0, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, kPage, 3, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, kPage, 0, 7, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, kPage, 0, 0, 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, std::size_t{1} << 63, 0, 0, 0), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(cu.cuMemAddressReserve(&base, kPage, 8 * kPage, 0, 0), CUDA_SUCCESS);
  EXPECT_EQ(base % (8 * kPage), 0U);
}

TEST_F(FakeCuda, AReservationIsFreedWholeAndEmpty) {
  const CUdeviceptr base = reserve(4 * kPage);
  place(base + kPage);
  EXPECT_EQ(cu.cuMemAddressFree(base, 2 * kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressFree(base + kPage, 4 * kPage), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemAddressFree(base, 4 * kPage), CUDA_ERROR_INVALID_VALUE) << "something is mapped";
  EXPECT_EQ(cu.cuMemUnmap(base + kPage, kPage), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemAddressFree(base, 4 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemAddressFree(base, 4 * kPage), CUDA_ERROR_INVALID_VALUE) << "twice";
}

TEST_F(FakeCuda, PagesAreOnTheGranularityAndWithinTheMemory) {
  std::size_t granularity = 0;
  const auto properties = on_device(0);
  fake_cuda_set_granularity(kPage, 2 * kPage);
  EXPECT_EQ(cu.cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM), CUDA_SUCCESS);
  EXPECT_EQ(granularity, kPage);
  EXPECT_EQ(cu.cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), CUDA_SUCCESS);
  EXPECT_EQ(granularity, 2 * kPage);
  CUmemGenericAllocationHandle handle = 0;
  EXPECT_EQ(cu.cuMemCreate(&handle, 0, &properties, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage / 2, &properties, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &properties, 1), CUDA_ERROR_INVALID_VALUE);
  const CUmemAllocationProp nothing{};
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &nothing, 0), CUDA_ERROR_INVALID_VALUE);
  fake_cuda_set_memory(3 * kPage);
  create(2 * kPage);
  EXPECT_EQ(cu.cuMemCreate(&handle, 2 * kPage, &properties, 0), CUDA_ERROR_OUT_OF_MEMORY);
  create();
  create(3 * kPage, 1);  // the other device has memory of its own
  EXPECT_EQ(alive().bytes, 6 * kPage);
}

TEST_F(FakeCuda, MemoryGoesWithTheLastMappingAndTheLastReference) {
  const CUdeviceptr base = reserve(2 * kPage);
  const auto handle = place(base);
  ASSERT_EQ(cu.cuMemMap(base + kPage, kPage, 0, handle, 0), CUDA_SUCCESS);
  CUmemGenericAllocationHandle retained = 0;
  ASSERT_EQ(cu.cuMemRetainAllocationHandle(&retained, pointer(base + 5)), CUDA_SUCCESS);
  EXPECT_EQ(retained, handle);
  EXPECT_EQ(alive().handle_references, 2U);
  EXPECT_EQ(cu.cuMemRelease(handle), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemRelease(handle), CUDA_SUCCESS) << "the retained reference";
  EXPECT_EQ(cu.cuMemRelease(handle), CUDA_ERROR_INVALID_VALUE) << "once too often";
  EXPECT_EQ(fake_cuda_violations(), 1U);
  EXPECT_EQ(alive().bytes, kPage) << "still mapped";
  EXPECT_EQ(cu.cuMemUnmap(base, kPage), CUDA_SUCCESS);
  EXPECT_EQ(alive().bytes, kPage) << "still mapped once";
  EXPECT_EQ(cu.cuMemUnmap(base + kPage, kPage), CUDA_SUCCESS);
  EXPECT_EQ(alive().bytes, 0U);
  EXPECT_EQ(cu.cuMemRetainAllocationHandle(&retained, pointer(base)), CUDA_ERROR_INVALID_VALUE) << "nothing is mapped";
}

TEST_F(FakeCuda, FreshMemoryHoldsJunk) {
  const CUdeviceptr base = reserve(2 * kPage);
  place(base);
  EXPECT_EQ(pointer(base)[0], 0xFF);
  EXPECT_EQ(pointer(base)[kPage - 1], 0xFF);
  fake_cuda_set_fill(-1);
  place(base + kPage);
  EXPECT_EQ(pointer(base)[kPage], 0);
}

// ---- mappings -----------------------------------------------------------------------------------------------------------

TEST_F(FakeCuda, MapTakesWholePagesOntoFreeAddressesOfOneReservation) {
  const CUdeviceptr base = reserve(4 * kPage);
  const auto handle = create(2 * kPage);
  EXPECT_EQ(cu.cuMemMap(base, 2 * kPage, kPage, handle, 0), CUDA_ERROR_INVALID_VALUE) << "an offset";
  EXPECT_EQ(cu.cuMemMap(base, kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "a part";
  EXPECT_EQ(cu.cuMemMap(base, 4 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "too much";
  EXPECT_EQ(cu.cuMemMap(base, 2 * kPage, 0, handle, 1), CUDA_ERROR_INVALID_VALUE) << "flags";
  EXPECT_EQ(cu.cuMemMap(base + kHostPage, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "off the granularity";
  EXPECT_EQ(cu.cuMemMap(base + 3 * kPage, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "over the end";
  EXPECT_EQ(cu.cuMemMap(kPage, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "not reserved";
  EXPECT_EQ(cu.cuMemMap(base, 2 * kPage, 0, handle + 100, 0), CUDA_ERROR_INVALID_VALUE) << "no handle";
  EXPECT_EQ(cu.cuMemMap(base + kPage, 2 * kPage, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuMemMap(base, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "mapped at its end";
  EXPECT_EQ(cu.cuMemMap(base + 2 * kPage, 2 * kPage, 0, handle, 0), CUDA_ERROR_INVALID_VALUE) << "mapped at its start";
  EXPECT_EQ(alive().mappings, 1U);
}

TEST_F(FakeCuda, AMappingHasNoAccessUntilItIsSet) {
  const CUdeviceptr base = reserve(kPage);
  EXPECT_FALSE(is_readable(base));
  const auto handle = create();
  ASSERT_EQ(cu.cuMemMap(base, kPage, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_FALSE(is_readable(base));
  EXPECT_EQ(allow(base, kPage), CUDA_SUCCESS);
  EXPECT_TRUE(is_readable(base));
  pointer(base)[0] = 1;
  ASSERT_EQ(cu.cuMemUnmap(base, kPage), CUDA_SUCCESS);
  EXPECT_FALSE(is_readable(base));
  ASSERT_EQ(cu.cuMemMap(base, kPage, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_FALSE(is_readable(base)) << "access goes with the mapping";
  EXPECT_EQ(allow(base, kPage), CUDA_SUCCESS);
  EXPECT_EQ(pointer(base)[0], 1) << "the bytes stay with the page";
}

TEST_F(FakeCuda, AccessIsSetOnFullyMappedRanges) {
  const CUdeviceptr base = reserve(4 * kPage);
  place(base);
  place(base + kPage);
  place(base + 3 * kPage);
  EXPECT_EQ(allow(base, 2 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(allow(base, 4 * kPage), CUDA_ERROR_INVALID_VALUE) << "a gap";
  EXPECT_EQ(allow(base, kPage / 2), CUDA_ERROR_INVALID_VALUE) << "half a mapping";
  EXPECT_EQ(allow(base + 2 * kPage, kPage), CUDA_ERROR_INVALID_VALUE) << "nothing there";
  EXPECT_EQ(allow(base, kPage, static_cast<CUmemAccess_flags>(2)), CUDA_ERROR_INVALID_VALUE) << "no such access";
  const CUmemAccessDesc elsewhere{{CU_MEM_LOCATION_TYPE_DEVICE, 7}, CU_MEM_ACCESS_FLAGS_PROT_READ};
  EXPECT_EQ(cu.cuMemSetAccess(base, kPage, &elsewhere, 1), CUDA_ERROR_INVALID_DEVICE);
  EXPECT_EQ(cu.cuMemSetAccess(base, kPage, &elsewhere, 0), CUDA_ERROR_INVALID_VALUE);
  unsigned long long flags = 0;
  const CUmemLocation first{CU_MEM_LOCATION_TYPE_DEVICE, 0};
  const CUmemLocation second{CU_MEM_LOCATION_TYPE_DEVICE, 1};
  EXPECT_EQ(cu.cuMemGetAccess(&flags, &first, base), CUDA_SUCCESS);
  EXPECT_EQ(flags, unsigned{CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  EXPECT_EQ(cu.cuMemGetAccess(&flags, &second, base), CUDA_SUCCESS);
  EXPECT_EQ(flags, unsigned{CU_MEM_ACCESS_FLAGS_PROT_NONE}) << "access is each device's own";
}

TEST_F(FakeCuda, UnmapTakesWholeMappings) {
  const CUdeviceptr base = reserve(6 * kPage);
  place(base, 2 * kPage);
  place(base + 2 * kPage);
  place(base + 4 * kPage);
  EXPECT_EQ(cu.cuMemUnmap(base, kPage), CUDA_ERROR_INVALID_VALUE) << "half of one";
  EXPECT_EQ(cu.cuMemUnmap(base + kPage, kPage), CUDA_ERROR_INVALID_VALUE) << "the other half";
  EXPECT_EQ(cu.cuMemUnmap(base + kPage, 2 * kPage), CUDA_ERROR_INVALID_VALUE) << "half of one and another";
  EXPECT_EQ(cu.cuMemUnmap(base, 5 * kPage), CUDA_ERROR_INVALID_VALUE) << "a gap";
  EXPECT_EQ(cu.cuMemUnmap(base + 3 * kPage, kPage), CUDA_ERROR_INVALID_VALUE) << "nothing there";
  EXPECT_EQ(cu.cuMemUnmap(base, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(alive().mappings, 3U);
  EXPECT_EQ(cu.cuMemUnmap(base, 3 * kPage), CUDA_SUCCESS) << "two neighbours at once";
  EXPECT_EQ(alive().mappings, 1U);
}

}  // namespace
}  // namespace vattn::cuda
