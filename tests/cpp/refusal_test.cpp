// What caches, tensors and pools refuse, and what they say when the driver will not take back what they give: the arguments and
// the failures that the tests of their work do not meet. Nothing changes where they refuse.
#include <functional>
#include <memory>

#include "cuda_driver_fixture.hpp"
#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/memory/reservation.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr std::int64_t kPage = 64 << 10;
constexpr std::int64_t kPageTokens = 1024;  // of 64 bytes

/// Four slots of one head of 64 bytes a token, one layer, K and V: a page group is two pages.
CacheConfig small_config() {
  return {.num_layers = 1,
          .num_kv_heads = 1,
          .head_dim = 64,
          .max_batch_size = 4,
          .max_seq_len = 8 * kPageTokens,
          .dtype = DType::kUInt8,
          .layout = Layout::kNHD,
          .page_size = kPage,
          .memory_limit = 64 * kPage,
          .lookahead_tokens = 0};
}

GrowableTensor::Config pages(std::int64_t rows) {
  return {.row_shape = {kPage}, .max_rows = rows, .dtype = DType::kUInt8, .page_size = kPage, .memory_limit = 16 * kPage};
}

/// On the host: what is refused before any driver is asked is the same everywhere.
class Refusal : public testing::Test {
 protected:
  Refusal() : driver_({.name = "host", .open = open_host_driver}) {}
  void fail_every(std::optional<Verb> verb) { driver_.faults->arm({1, true, verb, 5, "EIO", false}); }
  std::unique_ptr<KVCache> make(const CacheConfig& config = small_config()) {
    return std::make_unique<KVCache>(config, Device{}, driver_.counts);
  }
  std::unique_ptr<GrowableTensor> make_tensor(const GrowableTensor::Config& config) {
    return std::make_unique<GrowableTensor>(config, Device{}, driver_.counts);
  }

  Instrumented driver_;
};

// ---- arguments ----------------------------------------------------------------------------------------------------------

TEST_F(Refusal, ABatchIsOfSlotsInUseAtEqualAscendingSteps) {
  const auto cache = make();
  static_cast<void>(cache->alloc_block(4));
  const auto refused = [&](const std::vector<std::int64_t>& slots, std::int64_t length) {
    return message_of([&] { static_cast<void>(cache->batch(0, slots, length)); });
  };
  EXPECT_TRUE(contains(refused({}, 1), "slots is empty"));
  EXPECT_TRUE(contains(refused({0, 1, 3}, 1), "1, 3 at position 2"));
  EXPECT_TRUE(contains(refused({1, 0}, 1), "1, 0 at position 1"));
  EXPECT_TRUE(contains(refused({2, 2}, 1), "2, 2 at position 1"));
  EXPECT_TRUE(contains(refused({0, 4}, 1), "slot=4"));
  EXPECT_TRUE(contains(refused({0}, -1), "length=-1"));
  EXPECT_EQ(cache->batch(0, std::vector<std::int64_t>{1, 3}, 5).k.strides[0], 2 * 8 * kPageTokens * 64);
}

TEST_F(Refusal, ABatchPastTheMemoryIsRefusedWhereReadingThereWouldFault) {
  CacheConfig config = small_config();
  config.unmapped_reads = UnmappedReads::kFault;
  const auto cache = make(config);
  cache->alloc();
  cache->step({{0, 1}});
  const std::vector<std::int64_t> slot{0};
  EXPECT_EQ(cache->batch(0, slot, kPageTokens).k.shape[1], kPageTokens);
  const std::string message = message_of([&] { static_cast<void>(cache->batch(0, slot, kPageTokens + 1)); });
  EXPECT_TRUE(contains(message, "length=1025") && contains(message, "memory for 1024")) << message;
}

TEST_F(Refusal, AWriteNeedsPositionsInsideTheLengthsAndItsSources) {
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 2}});
  const std::vector<unsigned char> row(64, 3);
  const auto from = reinterpret_cast<Address>(row.data());
  const std::vector<std::int64_t> slot{0};
  const auto refused = [&](const std::vector<std::int64_t>& positions, Address k, Address v) {
    return message_of([&] { cache->write(0, slot, positions, k, v); });
  };
  EXPECT_TRUE(contains(refused({0, 1}, from, from), "positions has 2 entries, slots has 1"));
  EXPECT_TRUE(contains(refused({0}, 0, from), "k and v must not be null"));
  EXPECT_TRUE(contains(refused({0}, from, 0), "k and v must not be null"));
  EXPECT_TRUE(contains(refused({2}, from, from), "2 of slot 0"));
  EXPECT_TRUE(contains(refused({-1}, from, from), "-1 of slot 0"));
  cache->write(0, {}, {}, 0, 0);
  cache->write(0, slot, std::vector<std::int64_t>{1}, from, from);
  EXPECT_EQ(cache->view(0, 0).v->data<unsigned char>()[64], 3);

  CacheConfig config = small_config();
  config.v_head_dim = 0;
  const auto keys = make(config);
  keys->alloc();
  keys->step({{0, 1}});
  const std::string message = message_of([&] { keys->write(0, slot, slot, from, from); });
  EXPECT_TRUE(contains(message, "keys only")) << message;
}

TEST_F(Refusal, FitsTakesALengthForEverySlot) {
  const auto cache = make();
  cache->alloc();
  EXPECT_TRUE(cache->fits(std::vector<std::int64_t>{100, 0, 0, 0}));
  cache->set_memory_limit(2 * kPage);
  EXPECT_FALSE(cache->fits(std::vector<std::int64_t>{kPageTokens + 1, 0, 0, 0}));
  EXPECT_THROW(static_cast<void>(cache->fits(std::vector<std::int64_t>{1, 0})), std::invalid_argument);
  EXPECT_EQ(cache->memory_limit(), 2U * kPage);
  EXPECT_EQ(cache->active_slots(), 1);
}

TEST_F(Refusal, ATruncateOnlyShortens) {
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 5}});
  for (const std::int64_t tokens : {std::int64_t{-1}, std::int64_t{6}}) {
    const std::string message = message_of([&] { cache->truncate(0, tokens); });
    EXPECT_TRUE(contains(message, "n=" + std::to_string(tokens))) << message;
  }
  cache->truncate(0, 5);
  EXPECT_EQ(cache->seq_len(0), 5);
}

TEST_F(Refusal, TryStepSaysNoAndThrowsNothing) {
  const auto cache = make();
  cache->alloc();
  EXPECT_FALSE(cache->try_step(std::vector<std::int64_t>{1, 0})) << "of another length";
  EXPECT_FALSE(cache->try_step(std::vector<std::int64_t>{1, 0, 0, 0})) << "needs memory";
  cache->step({{0, 1}});
  EXPECT_TRUE(cache->try_step(std::vector<std::int64_t>{2, 0, 0, 0}));
  cache->close();
  EXPECT_FALSE(cache->try_step(std::vector<std::int64_t>{2, 0, 0, 0})) << "closed";
}

TEST_F(Refusal, ATensorNamesItsBadArguments) {
  const auto refused = [&](GrowableTensor::Config config) {
    return message_of([&] { static_cast<void>(make_tensor(config)); });
  };
  EXPECT_TRUE(contains(refused({.row_shape = {4}, .max_rows = 0}), "max_rows=0"));
  EXPECT_TRUE(contains(refused({.row_shape = {4, 0}, .max_rows = 1}), "row_shape=0"));
  EXPECT_TRUE(contains(refused({.row_shape = {INT64_MAX}, .max_rows = 1}), "row_shape x dtype"));
  EXPECT_TRUE(contains(refused({.row_shape = {1 << 30}, .max_rows = 1 << 30}), "bytes of addresses"));
  EXPECT_TRUE(contains(refused({.max_rows = 1, .memory_limit = kPage - 1}), "memory_limit=" + std::to_string(kPage - 1)));
  const auto tensor = make_tensor(pages(8));
  EXPECT_TRUE(contains(message_of([&] { tensor->resize(9); }), "n=9"));
  EXPECT_TRUE(contains(message_of([&] { tensor->append(0, 1); }), "rows must not be null"));
  EXPECT_TRUE(contains(message_of([&] { tensor->append(1, -1); }), "count=-1"));
  EXPECT_EQ(tensor->rows(), 0);
}

TEST_F(Refusal, ATensorsLimitMovesAndATensorInAPoolHasNone) {
  const auto tensor = make_tensor(pages(8));
  EXPECT_EQ(tensor->memory_limit(), 16U * kPage);
  tensor->set_memory_limit(2 * kPage);
  EXPECT_EQ(tensor->memory_limit(), 2U * kPage);
  tensor->resize(2);
  EXPECT_THROW(tensor->resize(3), OutOfMemoryError);
  EXPECT_THROW(tensor->set_memory_limit(kPage - 1), std::invalid_argument);

  const auto pool = PagePool::make(Device{}, driver_.counts, kPage, 16 * kPage);
  EXPECT_THROW(GrowableTensor({.max_rows = 1}, nullptr), std::invalid_argument);
  EXPECT_THROW(GrowableTensor({.max_rows = 1, .page_size = kPage}, pool), std::invalid_argument);
  EXPECT_THROW(GrowableTensor({.max_rows = 1, .memory_limit = kPage}, pool), std::invalid_argument);
  GrowableTensor member({.max_rows = 1}, pool);
  EXPECT_EQ(member.memory_limit(), 16U * kPage);
  EXPECT_EQ(member.page_size(), kPage);
  EXPECT_THROW(member.set_memory_limit(8 * kPage), std::invalid_argument);
  EXPECT_EQ(pool->memory_limit(), 16U * kPage);
}

TEST_F(Refusal, AClosedTensorAndPoolSaySo) {
  const auto tensor = make_tensor(pages(8));
  tensor->resize(2);
  EXPECT_FALSE(tensor->is_closed());
  tensor->close();
  tensor->close();
  EXPECT_TRUE(tensor->is_closed());
  EXPECT_THROW(tensor->resize(1), ClosedError);
  EXPECT_EQ(driver_.counts->alive(), CountingDriver::Alive{});
  const auto pool = PagePool::make(Device{}, driver_.counts, kPage, 16 * kPage);
  EXPECT_FALSE(pool->is_closed());
  pool->close();
  EXPECT_THROW(static_cast<void>(pool->memory_limit()), ClosedError);
  EXPECT_THROW(pool->set_memory_limit(kPage), ClosedError);
}

TEST_F(Refusal, MorePagesThanCanBeCountedAreRefusedWhateverTheLimit) {
  constexpr std::int64_t kSmall = 4096;
  GrowableTensor tensor({.row_shape = {kSmall},
                         .max_rows = std::int64_t{1} << 33,
                         .dtype = DType::kUInt8,
                         .page_size = kSmall,
                         .memory_limit = INT64_MAX},
                        {Device::Kind::kMeta, 0}, open_null_driver());
  for (const std::int64_t rows : {(std::int64_t{1} << 24) + 1, std::int64_t{1} << 33}) {
    const std::string message = message_of([&] { tensor.resize(rows); });
    EXPECT_TRUE(contains(message, "16777216 are the most that can be counted")) << message;
  }
  EXPECT_EQ(tensor.rows(), 0);
  CacheConfig config = small_config();
  config.max_seq_len = std::int64_t{1} << 30;
  config.page_size = kSmall;
  config.memory_limit = INT64_MAX;
  KVCache cache(config, {Device::Kind::kMeta, 0}, open_null_driver());
  cache.alloc();
  EXPECT_FALSE(cache.fits(std::vector<SlotLength>{{0, std::int64_t{1} << 30}}));
  EXPECT_TRUE(cache.fits(std::vector<SlotLength>{{0, std::int64_t{1} << 20}}));
}

// ---- a driver that fails ------------------------------------------------------------------------------------------------

TEST_F(Refusal, WhatADriverTakesBackInNoWayIsReportedOnceAndTheCacheIsClosed) {
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 1}});
  fail_every(std::nullopt);
  const std::string message = message_of([&] { cache->close(); });
  EXPECT_TRUE(contains(message, "2 mappings, 2 pages and 2 address ranges")) << message;
  EXPECT_TRUE(contains(message, "unmap failed: EIO (5)")) << message;
  EXPECT_TRUE(cache->is_closed());
  EXPECT_EQ(message_of([&] { cache->close(); }), "");
}

TEST_F(Refusal, AddressesThatADriverWillNotTakeBackAreReported) {
  const auto tensor = make_tensor(pages(8));
  tensor->resize(2);
  fail_every(Verb::kReleaseRange);
  const std::string message = message_of([&] { tensor->close(); });
  EXPECT_TRUE(contains(message, "release_range failed: EIO (5)")) << message;
  EXPECT_TRUE(tensor->is_closed());
  EXPECT_EQ(driver_.counts->alive(), (CountingDriver::Alive{.reservations = 1})) << "the pages went back";
}

TEST_F(Refusal, AReservationGivesUpQuietlyWhatItsDriverWillNotTake) {
  {
    Reservation made(*driver_.counts, kPage, UnmappedReads::kZeros);
    const Reservation held(std::move(made));
    EXPECT_FALSE(made.is_held());  // NOLINT(bugprone-use-after-move): what a move leaves is the subject
    EXPECT_TRUE(held.is_held());
    EXPECT_EQ(held.size(), static_cast<std::size_t>(kPage));
    fail_every(Verb::kReleaseRange);
  }
  EXPECT_EQ(driver_.faults->failed(), 1U) << "tried, once";
}

TEST_F(Refusal, PagesThatADriverWillNotReleaseAreReportedByTheirPool) {
  const auto pool = PagePool::make(Device{}, driver_.counts, kPage, 16 * kPage);
  {
    GrowableTensor member({.row_shape = {kPage}, .max_rows = 4, .dtype = DType::kUInt8}, pool);
    member.resize(3);
  }
  EXPECT_EQ(pool->stats().pooled_bytes, 3U * kPage);
  fail_every(Verb::kRelease);
  const std::string message = message_of([&] { pool->close(); });
  EXPECT_TRUE(contains(message, "would not take back 3 pages") && contains(message, "release failed: EIO")) << message;
  EXPECT_TRUE(pool->is_closed());
}

TEST_F(Refusal, ScrubbingThatFailsIsTheBatchsErrorAndIsTriedAgain) {
  CacheConfig config = small_config();
  config.scrub = true;
  const auto cache = make(config);
  cache->alloc();
  cache->step({{0, kPageTokens}});
  cache->view(0, 0).k.data<unsigned char>()[7] = 42;
  cache->free(0);
  cache->alloc();
  const std::vector<std::int64_t> slot{0};
  fail_every(Verb::kFillZero);
  EXPECT_THROW(static_cast<void>(cache->batch(0, slot, kPageTokens)), DriverError);
  driver_.faults->disarm();
  EXPECT_EQ(cache->batch(0, slot, kPageTokens).k.data<unsigned char>()[7], 0);
}

/// On the fake, with a slot that a kernel still reads when it is given up.
class StreamRefusal : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::on_fake()) GTEST_SKIP() << "steers the fake library";
    fake_cuda_reset();
    driver_ = std::make_unique<Instrumented>(DriverUnderTest{.name = "cuda", .open = [] { return open_cuda_driver(0); }});
    stream_ = fake_cuda_stream_create(0);
    page_ = static_cast<std::int64_t>(driver_->counts->traits().default_page_size);
    CacheConfig config = small_config();
    config.head_dim = page_ / 16;
    config.max_seq_len = 64;
    config.page_size = page_;
    config.memory_limit = 2 * 4 * page_;  // as much as one slot
    cache_ = std::make_unique<KVCache>(config, Device{}, driver_->counts);
    cache_->alloc();
    cache_->alloc();
    cache_->step({{0, 64}});
    kernel_ = fake_cuda_kernel_begin_on(stream_, cache_->view(0, 0).k.address, 64, -1);
    cache_->free(0, stream_);
  }
  void TearDown() override {
    if (!cuda::on_fake()) return;
    cache_.reset();
    EXPECT_EQ(driver_->counts->alive(), CountingDriver::Alive{});
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
    driver_.reset();
    fake_cuda_stream_destroy(stream_);
    fake_cuda_reset();
  }

  std::unique_ptr<Instrumented> driver_;
  std::unique_ptr<KVCache> cache_;
  std::int64_t page_ = 0;
  Stream stream_ = 0;
  std::uint64_t kernel_ = 0;
};

TEST_F(StreamRefusal, MemoryStaysRetiredWhileTheDeviceCannotBeAsked) {
  fake_cuda_kernel_end(kernel_);
  driver_->faults->arm({1, true, Verb::kHasPassed, 999, "CUDA_ERROR_UNKNOWN", false});
  EXPECT_EQ(cache_->stats().retired_bytes, static_cast<std::uint64_t>(8 * page_)) << "it has not said so";
  driver_->faults->disarm();
  EXPECT_EQ(cache_->stats().retired_bytes, 0U);
}

TEST_F(StreamRefusal, AStepThatCannotWaitForRetiredPagesFailsAndChangesNothing) {
  driver_->faults->arm({1, true, Verb::kWait, 999, "CUDA_ERROR_UNKNOWN", false});
  EXPECT_THROW(cache_->step({{1, 1}}), DriverError);
  driver_->faults->disarm();
  EXPECT_EQ(cache_->seq_len(1), 0);
  EXPECT_EQ(cache_->stats().retired_bytes, static_cast<std::uint64_t>(8 * page_));
  fake_cuda_kernel_end(kernel_);
  cache_->step({{1, 64}});
  EXPECT_EQ(cache_->seq_len(1), 64);
}

// ---- what is told about CUDA --------------------------------------------------------------------------------------------

TEST_F(CudaDriverTest, ADeviceThatCannotBeAskedHasAReasonAndTheOthersAreListed) {
  FAKE_ONLY();
  fake_cuda_fail("cuDeviceGetName", 1, cuda::CUDA_ERROR_INVALID_VALUE, 0);
  fake_cuda_fail("cuMemGetAllocationGranularity", 1, cuda::CUDA_ERROR_INVALID_VALUE, 0);
  fake_cuda_fail("cuDriverGetVersion", 1, cuda::CUDA_ERROR_INVALID_VALUE, 0);
  const CudaInfo info = probe_cuda();
  EXPECT_EQ(info.reason, "");
  EXPECT_EQ(info.driver_version, 0);
  ASSERT_EQ(info.devices.size(), 2U);
  EXPECT_TRUE(contains(info.devices[0].reason, "cuDeviceGetName")) << info.devices[0].reason;
  EXPECT_EQ(info.devices[1].reason, "");
  EXPECT_EQ(info.devices[1].granularity, 0U) << "not told without a context";
  EXPECT_GT(probe_cuda().devices.at(1).granularity, 0U);
}

}  // namespace
}  // namespace vattn
