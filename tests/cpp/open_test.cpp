// From a device's name to its driver, and what is taken where the user names no limit, page size or driver.
#include "vattn/driver/open.hpp"

#include "cuda_driver_fixture.hpp"
#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr Device kMeta{Device::Kind::kMeta, 0};

/// A host with so many bytes free.
class Scarce final : public Decorator {
 public:
  explicit Scarce(std::uint64_t available) : Decorator(open_host_driver()), available_(available) {}
  [[nodiscard]] MemoryInfo memory_info() override { return {available_, available_}; }

 private:
  std::uint64_t available_;
};

TEST(OpenDevice, NamesGoThereAndBack) {
  for (const std::string name : {"cpu", "meta", "cuda:0", "cuda:1", "cuda:17"}) {
    EXPECT_EQ(to_string(parse_device(name)), name);
  }
  EXPECT_EQ(parse_device("cuda"), (Device{Device::Kind::kCuda, 0}));
  EXPECT_EQ(parse_device("cpu:0"), Device{});
  EXPECT_EQ(parse_device("meta:0"), kMeta);
}

TEST(OpenDevice, DevicesAreEqualInKindAndNumber) {
  EXPECT_NE(parse_device("cuda:0"), parse_device("cuda:1"));
  EXPECT_NE(parse_device("cpu"), kMeta);
  EXPECT_EQ(parse_device("cuda:1"), (Device{Device::Kind::kCuda, 1}));
}

TEST(OpenDevice, WhatIsAliveIsEqualInEveryCount) {
  const CountingDriver::Alive some{.pages = 1, .reservations = 2, .fences = 3};
  EXPECT_EQ(some, (CountingDriver::Alive{.pages = 1, .reservations = 2, .fences = 3}));
  EXPECT_NE(some, (CountingDriver::Alive{.pages = 0, .reservations = 2, .fences = 3}));
  EXPECT_NE(some, (CountingDriver::Alive{.pages = 1, .reservations = 0, .fences = 3}));
  EXPECT_NE(some, (CountingDriver::Alive{.pages = 1, .reservations = 2, .fences = 0}));
}

TEST(OpenDevice, WhatIsNoDeviceIsNamed) {
  for (const std::string name :
       {"", "gpu", "cuda:", "cuda:x", "cuda:1x", "cuda:-1", "cuda:99999999999", "cpu:1", "meta:2", "CPU"}) {
    const std::string message = message_of([&] { static_cast<void>(parse_device(name)); });
    EXPECT_TRUE(contains(message, "device=\"" + name + "\"")) << message;
  }
}

TEST(OpenDevice, EachDeviceHasItsDriver) {
  EXPECT_STREQ(open_driver(parse_device("cpu"))->traits().name, "host");
  EXPECT_STREQ(open_driver(parse_device("meta"))->traits().name, "null");
}

TEST_F(CudaDriverTest, ADeviceOfCudaHasTheCudaDriver) {
  EXPECT_STREQ(open_driver(parse_device("cuda"))->traits().name, "cuda");
}

TEST(OpenDevice, TheDefaultLimitLeavesAShareForEverybodyElse) {
  Scarce host(1000);
  EXPECT_EQ(default_memory_limit(host), 900U);
  const auto meta = open_driver(kMeta);
  EXPECT_EQ(default_memory_limit(*meta), meta->memory_info().available_bytes) << "accounting takes nothing from anybody";
}

TEST(OpenDevice, ACacheThatTheDefaultLimitCannotHoldIsRefused) {
  CacheConfig config{.num_layers = 4, .num_kv_heads = 1, .head_dim = 64, .max_batch_size = 1, .max_seq_len = 64};
  config.lookahead_tokens = 0;
  config.page_size = 64 << 10;
  try {
    const KVCache cache(config, Device{}, std::make_shared<Scarce>(8 * (64 << 10)));
    FAIL() << "a page group is eight pages";
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, 8U * (64 << 10));
    EXPECT_TRUE(contains(error.what(), "memory_limit=None")) << error.what();
  }
  EXPECT_EQ(KVCache(config, Device{}, std::make_shared<Scarce>(9 * (64 << 10))).memory_limit(), 9U * (64 << 10) / 10 * 9);
}

TEST(OpenDevice, CachesTensorsAndPoolsOpenTheirOwnDriver) {
  CacheConfig config{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .max_batch_size = 1, .max_seq_len = 64};
  const KVCache cache(config, kMeta);
  EXPECT_EQ(cache.device(), kMeta);
  const GrowableTensor tensor({.row_shape = {4}, .max_rows = 8}, kMeta);
  EXPECT_EQ(tensor.device(), kMeta);
  EXPECT_GT(tensor.memory_limit(), std::uint64_t{1} << 60);
  const auto pool = PagePool::make(kMeta);
  EXPECT_EQ(pool->device(), kMeta);
  EXPECT_EQ(pool->page_size(), pool->driver()->traits().default_page_size);
  EXPECT_EQ(pool->memory_limit(), tensor.memory_limit());
}

TEST(OpenDevice, APoolTakesTheLimitAndThePageSizeItIsGiven) {
  const auto pool = PagePool::make(kMeta, 10 * 4096, 4096);
  EXPECT_EQ(pool->page_size(), 4096U);
  EXPECT_EQ(pool->memory_limit(), 40960U);
  for (const std::int64_t bad : {0, -4096, 4095, 4097}) {
    const std::string message = message_of([&] { static_cast<void>(PagePool::make(kMeta, {}, bad)); });
    EXPECT_TRUE(contains(message, "page_size=" + std::to_string(bad))) << message;
  }
  const std::string message = message_of([] { static_cast<void>(PagePool::make(kMeta, 4095, 4096)); });
  EXPECT_TRUE(contains(message, "memory_limit=4095") && contains(message, "4096")) << message;
}

}  // namespace
}  // namespace vattn
