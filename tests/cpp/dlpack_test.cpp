// What a consumer of DLPack finds in a tensor that vattn hands over, and for how long the memory behind it stays.
#include "vattn/tensor/dlpack.hpp"

#include <gtest/gtest.h>

#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/driver/null/null_driver.hpp"
#include "vattn/kv/kv_cache.hpp"

// The ABI of DLPack 0.x as its specification has it: a consumer's declaration, made without vattn's.
struct DLManagedTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t ndim;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

namespace vattn {
namespace {

CacheConfig small_config() {
  return {.num_layers = 1, .num_kv_heads = 2, .head_dim = 16, .max_batch_size = 2, .max_seq_len = 256, .lookahead_tokens = 0};
}

/// A view of no memory, for what the export says of it.
DLManagedTensor* exported(DType dtype, TensorDevice device, int index) {
  const std::vector<std::int64_t> shape{3, 2};
  const std::vector<std::int64_t> strides{2, 1};
  return to_dlpack(0x1000, shape, strides, dtype, device, index, nullptr);
}

TEST(Dlpack, AViewArrivesWithItsAddressShapeAndStrides) {
  KVCache cache(small_config());
  cache.alloc();
  cache.step({{0, 5}});
  const TensorView<3> view = cache.view(0, 0).k;
  DLManagedTensor* const tensor = to_dlpack(view);
  EXPECT_EQ(tensor->data, view.data());
  EXPECT_EQ(tensor->byte_offset, 0U);
  EXPECT_EQ(tensor->device_type, 1) << "kDLCPU";
  EXPECT_EQ(tensor->device_id, 0);
  ASSERT_EQ(tensor->ndim, 3);
  EXPECT_EQ(std::vector<std::int64_t>(tensor->shape, tensor->shape + 3), (std::vector<std::int64_t>{5, 2, 16}));
  EXPECT_EQ(std::vector<std::int64_t>(tensor->strides, tensor->strides + 3),
            std::vector<std::int64_t>(view.strides.begin(), view.strides.end()));
  delete_dlpack(tensor);
}

TEST(Dlpack, TheMemoryStaysUntilTheDeleterIsCalled) {
  const auto driver = std::make_shared<CountingDriver>(open_host_driver());
  DLManagedTensor* tensor = nullptr;
  {
    KVCache cache(small_config(), Device{}, driver);
    cache.alloc();
    cache.step({{0, 5}});
    tensor = to_dlpack(cache.view(0, 0).k);
    static_cast<unsigned char*>(tensor->data)[0] = 42;
  }
  EXPECT_EQ(driver->alive().reservations, 1) << "of K; that of V is gone";
  EXPECT_EQ(static_cast<unsigned char*>(tensor->data)[0], 42);
  tensor->deleter(tensor);
  EXPECT_EQ(driver->alive(), CountingDriver::Alive{});
}

TEST(Dlpack, EveryTypeHasItsCodeAndSizeAndNarrowFloatsAreBytes) {
  struct Expected {
    DType dtype;
    int code;  // DLPack's: 0 int, 1 unsigned, 2 float, 4 bfloat
    int bits;
  };
  const std::vector<Expected> all{{DType::kFloat16, 2, 16},     {DType::kBFloat16, 4, 16},      {DType::kFloat32, 2, 32},
                                  {DType::kInt8, 0, 8},         {DType::kUInt8, 1, 8},          {DType::kFloat8E4M3FN, 1, 8},
                                  {DType::kFloat8E5M2, 1, 8},   {DType::kFloat8E4M3FNUZ, 1, 8}, {DType::kFloat8E5M2FNUZ, 1, 8},
                                  {DType::kFloat8E8M0FNU, 1, 8}};
  EXPECT_EQ(all.size(), kDTypes.size());
  for (const Expected& expected : all) {
    DLManagedTensor* const tensor = exported(expected.dtype, TensorDevice::kCpu, 0);
    EXPECT_EQ(int{tensor->type_code}, expected.code) << info_of(expected.dtype).name;
    EXPECT_EQ(int{tensor->type_bits}, expected.bits) << info_of(expected.dtype).name;
    EXPECT_EQ(tensor->type_lanes, 1);
    EXPECT_EQ(dtype_named(info_of(expected.dtype).name), expected.dtype);
    delete_dlpack(tensor);
  }
}

TEST(Dlpack, AGpuIsNamedWithItsIndex) {
  DLManagedTensor* const tensor = exported(DType::kFloat16, TensorDevice::kCuda, 3);
  EXPECT_EQ(tensor->device_type, 2) << "kDLCUDA";
  EXPECT_EQ(tensor->device_id, 3);
  delete_dlpack(tensor);
}

TEST(Dlpack, AViewOnMetaIsRefused) {
  KVCache cache(small_config(), {Device::Kind::kMeta, 0}, open_null_driver());
  cache.alloc();
  EXPECT_THROW(static_cast<void>(to_dlpack(cache.view(0, 0).k)), std::invalid_argument);
}

TEST(Dlpack, DeletingTakesNoTensorAndATensorWithoutADeleter) {
  delete_dlpack(nullptr);
  DLManagedTensor nobodys{};
  nobodys.ndim = 7;
  delete_dlpack(&nobodys);
  EXPECT_EQ(nobodys.ndim, 7) << "another library's, which wants no call";
}

}  // namespace
}  // namespace vattn
