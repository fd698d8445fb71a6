// What the fake CUDA library has for programs other than vattn: a context set as current, a fill of the NULL stream, questions
// about addresses, the default alignment. Each is found as those programs find it, with cuGetProcAddress.
#include <dlfcn.h>

#include <algorithm>
#include <thread>

#include "client_types.hpp"
#include "fake_cuda_fixture.hpp"

namespace vattn::cuda {
namespace {

/// The entries of client_functions.def.
struct Client {
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) CUresult(*name) parameters = nullptr;
#include "client_functions.def"
};

Client client_table() {
  using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  void* const library = ::dlopen(VATTN_FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
  const auto look_up = reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress_v2"));
  Client found;
  auto status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters)                                                        \
  EXPECT_EQ(look_up(#name, reinterpret_cast<void**>(&found.name), version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &status), \
            CUDA_SUCCESS);                                                                                              \
  EXPECT_NE(found.name, nullptr) << #name;
#include "client_functions.def"
  return found;
}

class FakeCudaClient : public FakeCuda {
 protected:
  /// The answer to a question of 8 bytes, or less of them; `otherwise` where it is refused as an invalid value.
  std::uint64_t ask(CUpointer_attribute attribute, CUdeviceptr at, std::uint64_t otherwise) {
    std::uint64_t value = 0;
    const CUresult code = client.cuPointerGetAttribute(&value, attribute, at);
    if (code == CUDA_SUCCESS) return value;
    EXPECT_EQ(code, CUDA_ERROR_INVALID_VALUE);
    return otherwise;
  }
  static constexpr std::uint64_t kRefused = ~std::uint64_t{0};

  const Client client = on_fake() ? client_table() : Client();
};

TEST_F(FakeCudaClient, SettingAContextTakesThePlaceOfTheLastOnePushed) {
  CUcontext other = nullptr;
  CUcontext current = nullptr;
  ASSERT_EQ(cu.cuDevicePrimaryCtxRetain(&other, 1), CUDA_SUCCESS);
  ASSERT_EQ(client.cuCtxSetCurrent(other), CUDA_SUCCESS);
  CUdevice device = -1;
  EXPECT_EQ(client.cuCtxGetDevice(&device), CUDA_SUCCESS);
  EXPECT_EQ(device, 1);
  EXPECT_EQ(fake_cuda_context_depth(), 1);
  EXPECT_EQ(client.cuCtxSetCurrent(nullptr), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_context_depth(), 0);
  EXPECT_EQ(client.cuCtxSetCurrent(nullptr), CUDA_SUCCESS) << "nothing to take away";
  EXPECT_EQ(cu.cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(current, nullptr);
  ASSERT_EQ(client.cuCtxSetCurrent(context_), CUDA_SUCCESS) << "with nothing pushed it is the first";
  ASSERT_EQ(cu.cuDevicePrimaryCtxRelease(1), CUDA_SUCCESS);
  EXPECT_EQ(client.cuCtxSetCurrent(other), CUDA_ERROR_INVALID_CONTEXT) << "destroyed";
  EXPECT_EQ(cu.cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(current, context_) << "what is refused changes nothing";
}

TEST_F(FakeCudaClient, APrimaryContextIsActiveWhileItIsRetained) {
  unsigned flags = 7;
  int active = -1;
  EXPECT_EQ(client.cuDevicePrimaryCtxGetState(0, &flags, &active), CUDA_SUCCESS);
  EXPECT_EQ(active, 1);
  EXPECT_EQ(client.cuDevicePrimaryCtxGetState(1, &flags, &active), CUDA_SUCCESS);
  EXPECT_EQ(active, 0);
  EXPECT_EQ(client.cuDevicePrimaryCtxGetState(2, &flags, &active), CUDA_ERROR_INVALID_DEVICE);
}

TEST_F(FakeCudaClient, AFillHasTakenEffectForWhoeverWaitsForTheNullStream) {
  const CUdeviceptr base = reserve(2 * kPage);
  place(base);
  ASSERT_EQ(client.cuMemsetD8(base, 5, kPage), CUDA_SUCCESS);
  EXPECT_EQ(*pointer(base), 0xFF) << "nobody has waited";
  EXPECT_EQ(client.cuStreamQuery(nullptr), CUDA_ERROR_NOT_READY);
  unsigned char last = 0;
  ASSERT_EQ(cu.cuMemcpyDtoH(&last, base + kPage - 1, 1), CUDA_SUCCESS);
  EXPECT_EQ(last, 5);
  EXPECT_EQ(client.cuStreamQuery(nullptr), CUDA_SUCCESS);
  EXPECT_EQ(client.cuMemsetD8(base + kPage, 5, kPage), CUDA_ERROR_INVALID_VALUE) << "not mapped";
  ASSERT_EQ(allow(base, kPage, CU_MEM_ACCESS_FLAGS_PROT_READ), CUDA_SUCCESS);
  EXPECT_EQ(client.cuMemsetD8(base, 5, kPage), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(fake_cuda_violations(), 1U);
  fake_cuda_forget_violations();
}

TEST_F(FakeCudaClient, AnAddressIsAskedForItsReservationItsMappingAndItsPage) {
  const CUdeviceptr base = reserve(4 * kPage);
  const auto handle = create(2 * kPage);
  const CUdeviceptr at = base + kPage;
  ASSERT_EQ(cu.cuMemMap(at, 2 * kPage, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_DEVICE_POINTER, at + 5, kRefused), kRefused) << "no kernel may read it";
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, at, kRefused), 0U);
  ASSERT_EQ(allow(at, 2 * kPage), CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_DEVICE_POINTER, at + 5, kRefused), at + 5);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, at, kRefused), 3U);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at, kRefused), CU_MEMORYTYPE_DEVICE);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at, kRefused), 0U);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, at + kPage, kRefused), handle);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, at + 5, kRefused), base);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_RANGE_SIZE, at + 5, kRefused), 4 * kPage);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, at + kPage, kRefused), at);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, at + kPage, kRefused), 2 * kPage);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MAPPED, at, kRefused), 1U);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_HOST_POINTER, at, kRefused), kRefused) << "the host cannot reach a page of a GPU";

  CUdeviceptr start = 0;
  std::size_t size = 0;
  EXPECT_EQ(client.cuMemGetAddressRange(&start, &size, at + kPage + 7), CUDA_SUCCESS);
  EXPECT_EQ(start, at);
  EXPECT_EQ(size, 2 * kPage);
  EXPECT_EQ(client.cuMemGetAddressRange(nullptr, nullptr, at), CUDA_SUCCESS) << "either may be left out";
}

TEST_F(FakeCudaClient, OfReservedAddressesOnlyTheRangeIsKnownAndOfOthersNothing) {
  const CUdeviceptr base = reserve(4 * kPage);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, base + 5, kRefused), base);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MAPPED, base, kRefused), 0U);
  for (const auto attribute :
       {CU_POINTER_ATTRIBUTE_DEVICE_POINTER, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_CONTEXT}) {
    EXPECT_EQ(ask(attribute, base, kRefused), kRefused) << attribute;
  }
  EXPECT_EQ(client.cuMemGetAddressRange(nullptr, nullptr, base), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MAPPED, reinterpret_cast<CUdeviceptr>(&base), kRefused), kRefused) << "not the driver's";
  EXPECT_EQ(ask(static_cast<CUpointer_attribute>(5), base, kRefused), kRefused) << "an attribute that the fake does not know";
}

TEST_F(FakeCudaClient, AskedForSeveralAttributesWhatThereIsNotIsNull) {
  const CUdeviceptr base = reserve(2 * kPage);
  CUpointer_attribute attributes[] = {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, CU_POINTER_ATTRIBUTE_MAPPED,
                                      CU_POINTER_ATTRIBUTE_DEVICE_POINTER, CU_POINTER_ATTRIBUTE_MEMORY_TYPE};
  CUdeviceptr start = 1;
  bool is_mapped = true;
  CUdeviceptr device_pointer = 1;
  unsigned type = 1;
  void* data[] = {&start, &is_mapped, &device_pointer, &type};
  EXPECT_EQ(client.cuPointerGetAttributes(4, attributes, data, base + 9), CUDA_SUCCESS);
  EXPECT_EQ(start, base);
  EXPECT_FALSE(is_mapped);
  EXPECT_EQ(device_pointer, 0U);
  EXPECT_EQ(type, 0U);
  place(base);
  EXPECT_EQ(client.cuPointerGetAttributes(4, attributes, data, base + 9), CUDA_SUCCESS);
  EXPECT_TRUE(is_mapped);
  EXPECT_EQ(device_pointer, base + 9);
  EXPECT_EQ(type, CU_MEMORYTYPE_DEVICE);
  EXPECT_EQ(client.cuPointerGetAttributes(4, attributes, data, reinterpret_cast<CUdeviceptr>(&start)), CUDA_SUCCESS);
  EXPECT_EQ(start, 0U) << "no pointer of CUDA's";
  attributes[1] = static_cast<CUpointer_attribute>(99);
  EXPECT_EQ(client.cuPointerGetAttributes(4, attributes, data, base), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(FakeCudaClient, AlignmentZeroIsTheDefaultAlignmentAndALesserOneIsKeptToTheLetter) {
  CUdeviceptr base = 0;
  ASSERT_EQ(cu.cuMemAddressReserve(&base, kPage, 0, 0, 0), CUDA_SUCCESS);
  EXPECT_EQ(base % kPage, 0U);
  ASSERT_EQ(cu.cuMemAddressReserve(&base, kPage, kHostPage, 0, 0), CUDA_SUCCESS);
  EXPECT_NE(base % kPage, 0U) << "nobody asked for the granularity";
  fake_cuda_set_default_alignment(kHostPage);
  ASSERT_EQ(cu.cuMemAddressReserve(&base, kPage, 0, 0, 0), CUDA_SUCCESS);
  EXPECT_NE(base % kPage, 0U) << "the least that is documented";
  fake_cuda_set_default_alignment(3);  // means nothing, changes nothing
  ASSERT_EQ(cu.cuMemAddressReserve(&base, kPage, 0, 0, 0), CUDA_SUCCESS);
  EXPECT_NE(base % kPage, 0U);
}

TEST_F(FakeCudaClient, PagesToExportOrForRdmaAreNotSupportedAsTheDeviceSays) {
  int supported = -1;
  EXPECT_EQ(cu.cuDeviceGetAttribute(&supported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 0),
            CUDA_SUCCESS);
  EXPECT_EQ(supported, 0);
  CUmemGenericAllocationHandle handle = 0;
  auto properties = on_device(0);
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &properties, 0), CUDA_ERROR_NOT_SUPPORTED);
  properties = on_device(0);
  properties.allocFlags.gpuDirectRDMACapable = 1;
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &properties, 0), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(alive().bytes, 0U);
}

TEST_F(FakeCudaClient, StreamsSayWhoseTheyAreAndWhetherTheyAreDone) {
  int least = 1;
  int greatest = 1;
  EXPECT_EQ(client.cuCtxGetStreamPriorityRange(&least, &greatest), CUDA_SUCCESS);
  EXPECT_EQ(least, greatest) << "one priority";
  CUstream stream = nullptr;
  ASSERT_EQ(client.cuStreamCreateWithPriority(&stream, CU_STREAM_NON_BLOCKING, -5), CUDA_SUCCESS);
  CUcontext owner = nullptr;
  EXPECT_EQ(client.cuStreamGetCtx(stream, &owner), CUDA_SUCCESS);
  EXPECT_EQ(owner, context_);
  const CUdeviceptr base = reserve(kPage);
  place(base);
  EXPECT_EQ(client.cuStreamQuery(stream), CUDA_SUCCESS);
  ASSERT_EQ(cu.cuMemsetD8Async(base, 1, kPage, stream), CUDA_SUCCESS);
  EXPECT_EQ(client.cuStreamQuery(stream), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(cu.cuStreamSynchronize(stream), CUDA_SUCCESS);
  EXPECT_EQ(client.cuStreamQuery(stream), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuStreamDestroy(stream), CUDA_SUCCESS);
  EXPECT_EQ(client.cuStreamQuery(stream), CUDA_ERROR_INVALID_HANDLE);
  CUuuid first{};
  CUuuid second{};
  EXPECT_EQ(client.cuDeviceGetUuid(&first, 0), CUDA_SUCCESS);
  EXPECT_EQ(client.cuDeviceGetUuid(&second, 1), CUDA_SUCCESS);
  EXPECT_FALSE(std::equal(std::begin(first.bytes), std::end(first.bytes), std::begin(second.bytes)));
}

}  // namespace
}  // namespace vattn::cuda
