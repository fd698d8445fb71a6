// Fences: what a kernel may still use is not unmapped, is not handed out unordered, and comes back with no driver call. On the
// fake CUDA, where a kernel runs until the test ends it, and unmapping under one is a violation.
#include <chrono>
#include <random>
#include <thread>

#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

using namespace std::chrono_literals;

class Retirement : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::on_fake()) GTEST_SKIP() << "steers kernels that only the fake has";
    fake_cuda_reset();
    fake_cuda_set_fill(-1);
    driver_ = std::make_shared<CountingDriver>(open_cuda_driver(0));
    stream_ = fake_cuda_stream_create(0);
    page_ = static_cast<std::int64_t>(driver_->traits().default_page_size);
    config_.num_layers = 1;
    config_.num_kv_heads = 1;
    config_.head_dim = page_ / 16;  // 16 tokens a page
    config_.dtype = DType::kUInt8;
    config_.max_batch_size = 4;
    config_.max_seq_len = 1024;
    config_.lookahead_tokens = 0;
  }
  void TearDown() override {
    if (!cuda::on_fake()) return;
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
    EXPECT_EQ(driver_->alive(), CountingDriver::Alive{});
    driver_.reset();
    fake_cuda_stream_destroy(stream_);
    fake_cuda_reset();
  }

  /// A kernel that reads all of a slot's keys, until it is ended.
  std::uint64_t read_slot(KVCache& cache, std::int64_t slot, std::int64_t duration_us = -1) {
    const auto k = cache.view(0, slot).k;
    return fake_cuda_kernel_begin_on(stream_, k.address, static_cast<std::size_t>(k.shape[0] * page_ / 16), duration_us);
  }
  [[nodiscard]] std::uint64_t pages(std::uint64_t count) const { return count * static_cast<std::uint64_t>(page_); }

  std::shared_ptr<CountingDriver> driver_;
  CacheConfig config_;
  std::int64_t page_ = 0;
  Stream stream_ = 0;
};

TEST_F(Retirement, WhatWasGivenUpIsRetiredUntilItsKernelEnds) {
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 64}});
  const std::uint64_t kernel = read_slot(cache, 0);
  cache.truncate(0, 16, stream_);
  EXPECT_EQ(cache.stats().retired_bytes, pages(2 * 3));
  EXPECT_EQ(cache.stats().mapped_bytes, pages(2));
  cache.free(0, stream_);
  CacheStats stats = cache.stats();
  EXPECT_EQ(stats.retired_bytes, pages(2 * 4));
  EXPECT_EQ(stats.reclaimable_bytes, 0U);
  EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
  fake_cuda_kernel_end(kernel);
  stats = cache.stats();
  EXPECT_EQ(stats.retired_bytes, 0U);
  EXPECT_EQ(stats.reclaimable_bytes, pages(2 * 4));
}

TEST_F(Retirement, GrowingBackTakesRetiredPagesWithNoDriverCall) {
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 64}});
  const std::uint64_t kernel = read_slot(cache, 0);
  cache.truncate(0, 10, stream_);
  const std::uint64_t calls = driver_->calls();
  cache.step({{0, 64}});
  EXPECT_EQ(driver_->calls(), calls);
  EXPECT_EQ(cache.stats().retired_bytes, 0U);
  fake_cuda_kernel_end(kernel);
}

TEST_F(Retirement, ALoweredLimitTakesRetiredPagesOnlyWhenTheirKernelsHaveEnded) {
  config_.lookahead_tokens = 1;  // a mapper, which does it then
  config_.warm_tokens = 0;
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 16}});
  cache.alloc();
  cache.step({{1, 64}});
  cache.settle();
  const std::uint64_t kernel = read_slot(cache, 1);
  cache.free(1, stream_);
  cache.set_memory_limit(2 * page_);
  std::this_thread::sleep_for(20ms);
  EXPECT_GE(cache.stats().retired_bytes, pages(2 * 4));
  EXPECT_GE(cache.stats().created_bytes, pages(2 * 5));
  fake_cuda_kernel_end(kernel);
  while (cache.stats().created_bytes > pages(2)) std::this_thread::yield();
  EXPECT_EQ(cache.stats().retired_bytes, 0U);
  EXPECT_EQ(cache.seq_len(0), 16);
}

TEST_F(Retirement, AStepThatNeedsRetiredPagesWaitsForTheirKernels) {
  config_.memory_limit = 2 * 4 * page_;
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.alloc();
  cache.step({{0, 64}});
  const std::uint64_t kernel = read_slot(cache, 0);
  cache.free(0, stream_);
  std::atomic<bool> done{false};
  std::thread step([&] {
    cache.step({{1, 64}});
    done = true;
  });
  std::this_thread::sleep_for(20ms);
  EXPECT_FALSE(done);
  fake_cuda_kernel_end(kernel);
  step.join();
  EXPECT_EQ(cache.seq_len(1), 64);
  EXPECT_EQ(cache.stats().created_bytes, pages(2 * 4));
}

TEST_F(Retirement, TheNextOwnersStreamWaitsForTheLastOnesKernels) {
  KVCache cache(config_, Device{}, driver_);
  const Stream other = fake_cuda_stream_create(0);
  cache.alloc();
  cache.step({{0, 64}});
  const std::uint64_t first = read_slot(cache, 0);
  cache.free(0, stream_);
  EXPECT_EQ(cache.alloc({}, other), 0);
  cache.step({{0, 64}});
  const auto k = cache.view(0, 0).k;
  const std::uint64_t second = fake_cuda_kernel_begin_on(other, k.address, static_cast<std::size_t>(page_), 0);
  const FenceHandle after = driver_->record(other);
  std::this_thread::sleep_for(5ms);
  EXPECT_FALSE(driver_->has_passed(after)) << "the second kernel would take no time, but for the first";
  fake_cuda_kernel_end(first);
  driver_->wait(after);
  driver_->drop(after);
  EXPECT_EQ(fake_cuda_kernel_end(second), 0);
  fake_cuda_stream_destroy(other);
}

TEST_F(Retirement, RecordedStreamsAreWaitedForToo) {
  KVCache cache(config_, Device{}, driver_);
  const Stream copies = fake_cuda_stream_create(0);
  cache.record_stream(copies);
  cache.alloc();
  cache.step({{0, 64}});
  const auto k = cache.view(0, 0).k;
  const std::uint64_t copy = fake_cuda_kernel_begin_on(copies, k.address, static_cast<std::size_t>(page_), -1);
  cache.free(0, stream_);
  EXPECT_EQ(cache.stats().retired_bytes, pages(2 * 4));
  fake_cuda_kernel_end(copy);
  EXPECT_EQ(cache.stats().retired_bytes, 0U);
  fake_cuda_stream_destroy(copies);
}

TEST_F(Retirement, TwoRecordedStreamsOneOfThemTwiceAreWaitedForOnce) {
  KVCache cache(config_, Device{}, driver_);
  const Stream copies = fake_cuda_stream_create(0);
  cache.record_stream(stream_);
  cache.record_stream(copies);
  cache.record_stream(stream_);
  cache.alloc();
  cache.step({{0, 64}});
  const auto k = cache.view(0, 0).k;
  const std::uint64_t kernel = read_slot(cache, 0);
  const std::uint64_t copy = fake_cuda_kernel_begin_on(copies, k.address, static_cast<std::size_t>(page_), -1);
  cache.free(0, stream_);
  EXPECT_EQ(driver_->alive().fences, 2) << "one a stream";
  fake_cuda_kernel_end(kernel);
  EXPECT_EQ(cache.stats().retired_bytes, pages(2 * 4)) << "the copies still run";
  EXPECT_EQ(cache.alloc(), 0) << "both streams were told to wait";
  const std::uint64_t next = fake_cuda_kernel_begin_on(stream_, k.address, static_cast<std::size_t>(page_), 0);
  EXPECT_EQ(fake_cuda_kernel_end(next), 1) << "it is behind the copies";
  fake_cuda_kernel_end(copy);
  EXPECT_EQ(cache.stats().retired_bytes, 0U);
  fake_cuda_set_capturing(copies, 1);
  EXPECT_THROW(cache.free(0, stream_), Error) << "a recorded stream is being captured";
  fake_cuda_set_capturing(copies, 0);
  fake_cuda_set_capturing(stream_, 1);
  EXPECT_THROW(cache.free(0), Error);
  fake_cuda_set_capturing(stream_, 0);
  cache.free(0);
  fake_cuda_stream_destroy(copies);
}

TEST_F(Retirement, WithoutAStreamTheDeviceIsWaitedFor) {
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 64}});
  static_cast<void>(read_slot(cache, 0, 2000));
  cache.free(0);
  EXPECT_EQ(cache.stats().retired_bytes, 0U);
}

TEST_F(Retirement, ATensorThatShrinksWaitsForTheDeviceFirst) {
  const auto pool = PagePool::make(Device{Device::Kind::kCuda, 0}, driver_, static_cast<std::size_t>(page_), pages(8));
  GrowableTensor shrinks({.row_shape = {page_}, .max_rows = 8, .dtype = DType::kUInt8}, pool);
  GrowableTensor grows({.row_shape = {page_}, .max_rows = 8, .dtype = DType::kUInt8}, pool);
  shrinks.resize(8);
  static_cast<void>(fake_cuda_kernel_begin_on(stream_, shrinks.view().address, pages(8), 20'000));
  shrinks.resize(0);
  grows.resize(8);  // unmaps the pages; under the kernel that is a violation
}

TEST_F(Retirement, ALimitBelowWhatIsRetiredIsNotExceededByAPage) {
  const auto pool = PagePool::make(Device{Device::Kind::kCuda, 0}, driver_, static_cast<std::size_t>(page_), pages(40));
  KVCache cache(config_, pool);
  GrowableTensor tensor({.row_shape = {page_}, .max_rows = 8, .dtype = DType::kUInt8}, pool);
  cache.alloc();
  cache.step({{0, 16 * 8}});
  const auto kernel = read_slot(cache, 0);
  cache.truncate(0, 16 * 2, stream_);
  pool->set_memory_limit(6 * page_);
  EXPECT_EQ(pool->stats().created_bytes, pages(16)) << "the kernel keeps them";
  std::thread end([&] {
    std::this_thread::sleep_for(50ms);
    fake_cuda_kernel_end(kernel);
  });
  EXPECT_THROW(tensor.resize(3), OutOfMemoryError) << "four are held, two are left";
  end.join();
  tensor.resize(2);
}

TEST_F(Retirement, ScrubbedMemoryIsZeroedOnlyAfterTheLastKernelReadIt) {
  config_.scrub = true;
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 64}});
  const auto k = cache.view(0, 0).k;
  const std::vector<unsigned char> secret(static_cast<std::size_t>(4 * page_), 0x5A);
  cuda::write_device(k.address, secret.data(), secret.size());
  const std::uint64_t kernel = read_slot(cache, 0);
  cache.free(0, stream_);
  EXPECT_EQ(cache.alloc({}, stream_), 0);
  std::atomic<bool> done{false};
  std::thread step([&] {
    cache.step({{0, 64}});
    done = true;
  });
  std::this_thread::sleep_for(20ms);
  EXPECT_FALSE(done) << "zeroing waits";
  fake_cuda_kernel_end(kernel);
  step.join();
  std::vector<unsigned char> bytes(secret.size());
  cuda::read_device(bytes.data(), k.address, bytes.size());
  EXPECT_EQ(bytes, std::vector<unsigned char>(bytes.size(), 0));
}

TEST_F(Retirement, NothingMovesWhileAStreamIsCaptured) {
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 10}}, stream_);
  fake_cuda_set_capturing(stream_, 1);
  EXPECT_THROW(cache.free(0, stream_), Error);
  EXPECT_THROW(cache.truncate(0, 5, stream_), Error);
  const std::vector<SlotLength> within{{0, 16}};
  const std::vector<SlotLength> beyond{{0, 17}};
  EXPECT_THROW(cache.step(beyond, stream_), Error);
  cache.step(within, stream_);
  EXPECT_EQ(cache.seq_len(0), 16);
  fake_cuda_set_capturing(stream_, 0);
  cache.step(beyond, stream_);
}

TEST_F(Retirement, ManyCyclesWithRandomFencesUnmapNothingEarlyAndLoseNothing) {
  constexpr int kSlots = 64;
  constexpr int kCycles = 10000;
  config_.max_batch_size = kSlots;
  config_.memory_limit = 2 * 96 * page_;  // 64 slots of up to 4 pages a row: always under pressure
  config_.lookahead_tokens = 16;
  KVCache cache(config_, Device{}, driver_);
  std::vector<Stream> streams{stream_, fake_cuda_stream_create(0), fake_cuda_stream_create(0)};
  std::mt19937 random(20261122);
  std::vector<std::int64_t> active;
  std::uint64_t refused = 0;
  for (int cycle = 0; cycle < kCycles; ++cycle) {
    const Stream stream = streams[random() % streams.size()];
    if (static_cast<int>(active.size()) == kSlots || (!active.empty() && random() % 2 == 0)) {
      const std::size_t which = random() % active.size();
      const std::int64_t slot = active[which];
      if (const auto k = cache.view(0, slot).k; k.shape[0] != 0) {
        // Work that takes up to 200 us, and most often is not over when the slot is given up.
        fake_cuda_kernel_begin_on(stream, k.address, static_cast<std::size_t>(k.shape[0] * page_ / 16),
                                  static_cast<std::int64_t>(random() % 200));
      }
      cache.free(slot, stream);
      active.erase(active.begin() + static_cast<std::ptrdiff_t>(which));
      continue;
    }
    const auto tokens = static_cast<std::int64_t>(1 + random() % 64);
    const std::int64_t slot = cache.alloc(tokens, stream);
    active.push_back(slot);
    try {
      cache.step({{slot, tokens}});
    } catch (const OutOfMemoryError&) {
      ++refused;
    }
  }
  EXPECT_LT(refused, static_cast<std::uint64_t>(kCycles / 2));
  for (const std::int64_t slot : active) cache.free(slot, stream_);
  driver_->synchronize();
  const CacheStats stats = cache.stats();
  EXPECT_EQ(stats.retired_bytes, 0U);
  EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes);
  EXPECT_EQ(stats.available_bytes, stats.limit_bytes);
  EXPECT_EQ(fake_cuda_violations(), 0U);
  cache.close();
  fake_cuda_stream_destroy(streams[1]);
  fake_cuda_stream_destroy(streams[2]);
}

TEST_F(Retirement, KernelsReadWhileNeighboursAreMappedAndRetiredOnesUnmapped) {
  config_.memory_limit = 2 * 24 * page_;
  config_.lookahead_tokens = 32;
  KVCache cache(config_, Device{}, driver_);
  cache.alloc();
  cache.step({{0, 128}});
  const auto k = cache.view(0, 0).k;
  std::vector<unsigned char> pattern(static_cast<std::size_t>(8 * page_));
  for (std::size_t i = 0; i < pattern.size(); ++i) pattern[i] = static_cast<unsigned char>(i * 31 >> 3);
  cuda::write_device(k.address, pattern.data(), pattern.size());
  const Stream readers = fake_cuda_stream_create(0);
  const std::uint64_t reader = fake_cuda_kernel_begin_on(readers, k.address, pattern.size(), -1);
  for (int round = 0; round < 200; ++round) {
    const std::int64_t slot = cache.alloc();
    cache.step({{slot, 16 * (1 + round % 14)}});
    static_cast<void>(read_slot(cache, slot, 50));
    cache.free(slot, stream_);
  }
  std::vector<unsigned char> bytes(pattern.size());
  cuda::read_device(bytes.data(), k.address, bytes.size());
  EXPECT_EQ(bytes, pattern);
  EXPECT_EQ(fake_cuda_kernel_end(reader), 1) << "it read all the time";
  fake_cuda_stream_destroy(readers);
}

}  // namespace
}  // namespace vattn
