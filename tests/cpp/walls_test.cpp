// R12, walls: a device that has less memory than the limit says, and one that loses and gains some meanwhile (other processes
// come and go). The error is OutOfMemoryError that says so, nothing has changed, and what is given up then serves the next
// operation. The limits of a process and a cgroup are in test_walls.py.
#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr std::uint64_t kPages = 40;  // the device has

class FullDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::on_fake()) GTEST_SKIP() << "fills the device up";
    fake_cuda_reset();
    fake_cuda_set_fill(-1);
    driver_ = std::make_shared<CountingDriver>(open_cuda_driver(0));
    page_ = driver_->traits().default_page_size;
    fake_cuda_set_memory(kPages * page_);
    pool_ = PagePool::make(Device{}, driver_, page_, 100 * page_);
    config_.num_layers = 1;
    config_.num_kv_heads = 1;
    config_.head_dim = static_cast<std::int64_t>(page_ / 16);  // 16 tokens a page, 2 tensors
    config_.dtype = DType::kUInt8;
    config_.max_batch_size = 4;
    config_.max_seq_len = 16 * 64;
    config_.layout = Layout::kNHD;
    config_.lookahead_tokens = 0;
  }
  void TearDown() override {
    if (!cuda::on_fake()) return;
    pool_.reset();
    EXPECT_EQ(driver_->alive(), CountingDriver::Alive{});
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
    driver_.reset();
    fake_cuda_reset();
  }

  /// The step is refused for want of the device's memory, and nothing has changed.
  void expect_refused(KVCache& cache, std::int64_t slot, std::int64_t tokens) {
    const std::int64_t length = cache.seq_len(slot);
    const PoolStats before = pool_->stats();
    try {
      cache.step({{slot, tokens}});
      FAIL() << "the device has no memory for that";
    } catch (const OutOfMemoryError& error) {
      EXPECT_NE(std::string(error.what()).find("device"), std::string::npos) << error.what();
      EXPECT_GT(error.needed_bytes, 0U);
    }
    const PoolStats after = pool_->stats();
    EXPECT_EQ(cache.seq_len(slot), length);
    EXPECT_EQ(after.mapped_bytes - after.reclaimable_bytes, before.mapped_bytes - before.reclaimable_bytes);
    EXPECT_EQ(after.created_bytes, after.mapped_bytes + after.pooled_bytes + after.retired_bytes);
    EXPECT_LE(after.created_bytes, kPages * page_);
  }

  std::shared_ptr<CountingDriver> driver_;
  std::shared_ptr<PagePool> pool_;
  CacheConfig config_;
  std::uint64_t page_ = 0;
};

TEST_F(FullDevice, RefusesWhatItHasNotAndServesWhatFits) {
  KVCache cache(config_, pool_);
  const std::int64_t slot = cache.alloc();
  cache.step({{slot, 16 * 15}});
  expect_refused(cache, slot, 16 * 21);
  cache.step({{slot, 16 * 20}});  // the last page
  expect_refused(cache, slot, 16 * 20 + 1);
  cache.free(slot);
  cache.step({{cache.alloc(), 16 * 20}});
  cache.close();
}

TEST_F(FullDevice, WhatAnotherMemberKeepsWarmServesWhereTheDeviceHasNoMore) {
  KVCache warm(config_, pool_);
  KVCache cache(config_, pool_);
  GrowableTensor tensor({.row_shape = {static_cast<std::int64_t>(page_)}, .max_rows = 60, .dtype = DType::kUInt8}, pool_);
  warm.step({{warm.alloc(), 16 * 18}});
  warm.free(0);
  cache.step({{cache.alloc(), 16 * 20}});
  EXPECT_EQ(cache.seq_len(0), 16 * 20);
  EXPECT_THROW(tensor.resize(1), OutOfMemoryError);
  EXPECT_EQ(tensor.rows(), 0);
  cache.truncate(0, 16 * 10);
  tensor.resize(20);
  EXPECT_THROW(tensor.resize(21), OutOfMemoryError);
  EXPECT_EQ(tensor.rows(), 20);
  tensor.close();
  cache.close();
  warm.close();
}

TEST_F(FullDevice, LookAheadStopsAtTheWallAndGivesWay) {
  config_.lookahead_tokens = 16 * 64;
  KVCache cache(config_, pool_);
  cache.step({{cache.alloc(), 1}});
  cache.settle();
  EXPECT_EQ(pool_->stats().created_bytes, kPages * page_) << "as far as the device goes";
  cache.step({{cache.alloc(), 16 * 19}});
  EXPECT_EQ(cache.seq_len(1), 16 * 19);
  cache.settle();
  cache.free(1);
  cache.step({{0, 16 * 20}});
  cache.close();
}

TEST_F(FullDevice, MemoryThatOthersTookAndGaveBackIsUsed) {
  KVCache cache(config_, pool_);
  const std::int64_t slot = cache.alloc();
  cache.step({{slot, 16 * 5}});
  fake_cuda_set_memory(10 * page_);  // another process has the rest
  expect_refused(cache, slot, 16 * 6);
  cache.truncate(slot, 16 * 3);
  cache.step({{slot, 16 * 5}});
  fake_cuda_set_memory(kPages * page_);
  cache.step({{slot, 16 * 20}});
  cache.close();
}

TEST_F(FullDevice, ALimitBelowAPageGroupIsABadArgumentAndTheOldOneHolds) {
  EXPECT_THROW(pool_->set_memory_limit(static_cast<std::int64_t>(page_) - 1), std::invalid_argument);
  EXPECT_EQ(pool_->memory_limit(), 100 * page_);
  config_.page_size = static_cast<std::int64_t>(page_);
  config_.memory_limit = static_cast<std::int64_t>(2 * page_) - 1;
  EXPECT_THROW(KVCache(config_, Device{}, driver_), std::invalid_argument);
  config_.memory_limit = static_cast<std::int64_t>(2 * page_);
  KVCache cache(config_, Device{}, driver_);
  EXPECT_THROW(cache.set_memory_limit(static_cast<std::int64_t>(page_)), std::invalid_argument);
  cache.step({{cache.alloc(), 16}});
  EXPECT_THROW(cache.step({{0, 17}}), OutOfMemoryError);
}

}  // namespace
}  // namespace vattn
