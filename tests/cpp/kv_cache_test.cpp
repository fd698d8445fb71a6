// KVCache as a C++ program uses it, on every driver.
#include "vattn/kv/kv_cache.hpp"

#include <algorithm>
#include <cstring>
#include <thread>

#include "drivers_under_test.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

/// Two new tokens in the device's memory: heads filled with 1, 2 and 3, 4.
struct Source {
  Source(const std::shared_ptr<Driver>& driver, const DriverUnderTest& hooks)
      : rows(GrowableTensor::Config{.row_shape = {2, 2, 16}, .max_rows = 1, .dtype = DType::kFloat16}, Device{}, driver) {
    rows.resize(1);
    k = v = rows.view().address;
    std::vector<unsigned char> bytes;
    for (unsigned char head = 1; head <= 4; ++head) bytes.insert(bytes.end(), 32, head);
    if (driver->traits().has_memory) hooks.write(k, bytes.data(), bytes.size());
  }

  GrowableTensor rows;
  Address k = 0;
  Address v = 0;
};

class KVCacheTest : public testing::TestWithParam<DriverUnderTest> {
 protected:
  KVCacheTest() : driver_(std::make_shared<CountingDriver>(GetParam().open())) {
    config_.num_layers = 2;
    config_.layers_per_tensor = 1;
    config_.num_kv_heads = 2;
    config_.head_dim = 16;
    config_.max_batch_size = 4;
    config_.max_seq_len = 1 << 20;
    config_.dtype = DType::kFloat16;
    config_.lookahead_tokens = 0;  // counts are exact; the mapper has tests of its own
  }

  std::unique_ptr<KVCache> make() { return std::make_unique<KVCache>(config_, Device{}, driver_); }
  [[nodiscard]] bool has_memory() const { return driver_->traits().has_memory; }
  void write(Address to, unsigned char byte, std::size_t size) {
    if (!has_memory()) return;
    const std::vector<unsigned char> bytes(size, byte);
    GetParam().write(to, bytes.data(), size);
  }
  void expect(Address from, unsigned char byte, std::size_t size) {
    if (!has_memory()) return;
    std::vector<unsigned char> bytes(size);
    GetParam().read(bytes.data(), from, size);
    EXPECT_TRUE(std::all_of(bytes.begin(), bytes.end(), [byte](unsigned char each) { return each == byte; }));
  }
  void TearDown() override { EXPECT_EQ(driver_->alive(), CountingDriver::Alive{}); }

  std::shared_ptr<CountingDriver> driver_;
  CacheConfig config_;
};

TEST_P(KVCacheTest, AFreshCacheHandsOutSlotsInOrderAndReusesTheLowest) {
  const auto cache = make();
  EXPECT_EQ(cache->alloc(), 0);
  EXPECT_EQ(cache->alloc(), 1);
  EXPECT_EQ(cache->alloc_block(2), (std::vector<std::int64_t>{2, 3}));
  EXPECT_THROW(cache->alloc(), NoFreeSlotError);
  cache->free(1);
  cache->free(3);
  EXPECT_THROW(cache->alloc_block(2), NoFreeSlotError);
  EXPECT_EQ(cache->alloc(), 1);
  EXPECT_EQ(cache->slots(), (std::vector<std::int64_t>{0, 1, 2}));
}

TEST_P(KVCacheTest, AStepThatGrowsNothingCallsNoDriver) {
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 10}});
  const std::uint64_t calls = driver_->calls();
  const std::vector<std::int64_t> lengths{11, 0, 0, 0};
  EXPECT_TRUE(cache->try_step(lengths));
  cache->step({{0, 12}});
  EXPECT_EQ(driver_->calls(), calls);
  EXPECT_EQ(cache->seq_len(0), 12);
}

TEST_P(KVCacheTest, GrowthSetsAccessOnceARunAndCreatesNothingThePoolHolds) {
  config_.layout = Layout::kNHD;
  const auto cache = make();
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  cache->alloc();
  cache->step({{0, 4 * page_tokens}});
  EXPECT_EQ(driver_->calls(Verb::kMap), 16U);
  EXPECT_EQ(driver_->calls(Verb::kSetAccess), 4U);
}

TEST_P(KVCacheTest, GrowthCreatesNothingThatThePoolHolds) {
  config_.layout = Layout::kNHD;
  const auto pool = PagePool::make(Device{}, driver_, driver_->traits().default_page_size, UINT64_MAX);
  KVCache cache(config_, pool);
  GrowableTensor tensor({.row_shape = {static_cast<std::int64_t>(pool->page_size())}, .max_rows = 16, .dtype = DType::kUInt8},
                        pool);
  tensor.resize(16);
  tensor.resize(0);
  EXPECT_EQ(pool->stats().pooled_bytes, 16 * pool->page_size());
  cache.alloc();
  cache.step({{0, 4 * cache.geometry().tokens_per_page()}});
  EXPECT_EQ(pool->stats().created_bytes, 16 * pool->page_size());
  EXPECT_EQ(pool->stats().pooled_bytes, 0U);
  // Where an address has a page of its own, a pooled one is made anew in its place.
  const bool any_page_will_do = driver_->home(cache.view(0, 0).k.address) == 0;
  EXPECT_EQ(cache.stats().pages_reused, any_page_will_do ? 16U : 0U);
}

TEST_P(KVCacheTest, AWarmSlotServesTheNextRequestWithNoDriverCall) {
  const auto cache = make();
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  cache->alloc();
  cache->step({{0, 4 * page_tokens}});
  cache->free(0);
  EXPECT_EQ(cache->stats().warm_slots, 1U);
  EXPECT_EQ(cache->stats().warm_bytes, cache->stats().mapped_bytes);
  const std::uint64_t calls = driver_->calls();
  EXPECT_EQ(cache->alloc(), 0);
  cache->step({{0, 4 * page_tokens}});
  EXPECT_EQ(driver_->calls(), calls);
  EXPECT_EQ(cache->stats().warm_prompts, 1U);
  EXPECT_EQ(cache->stats().prompts, 2U);
  EXPECT_EQ(cache->stats().reclaimable_bytes, 0U);
}

TEST_P(KVCacheTest, OutOfMemorySaysWhatWasMissingAndTakesNothing) {
  config_.layout = Layout::kNHD;
  config_.memory_limit = static_cast<std::int64_t>(4 * driver_->traits().default_page_size);
  const auto cache = make();
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  cache->alloc();
  cache->alloc();
  cache->step({{0, page_tokens}});
  EXPECT_FALSE(cache->fits(std::vector<SlotLength>{{0, page_tokens + 1}}));
  try {
    cache->step({{0, page_tokens + 1}, {1, 1}});
    FAIL();
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, 8 * driver_->traits().default_page_size);
    EXPECT_EQ(error.available_bytes, 0U);
    EXPECT_EQ(error.limit_bytes, 4 * driver_->traits().default_page_size);
    EXPECT_EQ(error.held_by_others_bytes, 0U) << "both slots grow, so neither is another";
    EXPECT_FALSE(error.waiting_can_help());
  }
  try {
    cache->step({{1, 1}});
    FAIL();
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.held_by_others_bytes, 4 * driver_->traits().default_page_size) << "what slot 0 holds";
    EXPECT_TRUE(error.waiting_can_help());
  }
  EXPECT_EQ(cache->seq_len(0), page_tokens);
  EXPECT_EQ(cache->seq_len(1), 0);
}

TEST_P(KVCacheTest, TheLimitMovesWhileTheCacheLives) {
  config_.layout = Layout::kNHD;
  const auto page = static_cast<std::int64_t>(driver_->traits().default_page_size);
  config_.memory_limit = 16 * page;
  const auto cache = make();
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  cache->alloc();
  cache->alloc();
  cache->step({{0, 2 * page_tokens}, {1, 2 * page_tokens}});
  cache->set_memory_limit(8 * page);  // under active use: holds for growth, takes nothing
  EXPECT_EQ(cache->stats().created_bytes, static_cast<std::uint64_t>(16 * page));
  EXPECT_THROW(cache->step({{0, 2 * page_tokens + 1}}), OutOfMemoryError);
  cache->free(1);
  EXPECT_EQ(cache->stats().created_bytes, static_cast<std::uint64_t>(8 * page));
  EXPECT_THROW(cache->step({{0, 2 * page_tokens + 1}}), OutOfMemoryError);
  EXPECT_THROW(cache->set_memory_limit(4 * page - 1), std::invalid_argument);
  cache->set_memory_limit(12 * page);
  cache->step({{0, 3 * page_tokens}});
  EXPECT_EQ(cache->stats().mapped_bytes, static_cast<std::uint64_t>(12 * page));
}

TEST_P(KVCacheTest, TruncateGivesUpWholePagesAndKeepsTheRest) {
  config_.layout = Layout::kNHD;
  const auto cache = make();
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  cache->alloc();
  cache->step({{0, 3 * page_tokens}});
  const auto k = cache->view(0, 0).k;
  write(k.address, 7, driver_->traits().default_page_size);
  cache->truncate(0, page_tokens / 2);
  EXPECT_EQ(cache->seq_len(0), page_tokens / 2);
  EXPECT_EQ(cache->committed_len(0), page_tokens);
  EXPECT_EQ(cache->stats().reclaimable_bytes, 8 * driver_->traits().default_page_size);
  expect(k.address, 7, driver_->traits().default_page_size);
  EXPECT_THROW(cache->truncate(0, page_tokens), std::invalid_argument);
}

TEST_P(KVCacheTest, ScrubbedPagesAreZeroBeforeAnotherRequestSeesThem) {
  config_.scrub = true;
  config_.layout = Layout::kNHD;
  const auto cache = make();
  const std::size_t page = driver_->traits().default_page_size;
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  for (int owner = 1; owner <= 5; ++owner) {
    cache->alloc();
    cache->step({{0, 2 * page_tokens}});
    const auto k = cache->view(1, 0).k;
    expect(k.address, 0, 2 * page);
    write(k.address, 0xFF, 2 * page);
    cache->free(0);
  }
}

TEST_P(KVCacheTest, TokensPastALengthStayZeroInTheGuard) {
  config_.guard_tokens = 5;
  config_.layout = Layout::kNHD;
  const auto cache = make();
  const std::size_t token = 2 * 16 * 2;
  for (int owner = 1; owner <= 3; ++owner) {
    cache->alloc();
    cache->step({{0, 40}});
    const auto k = cache->view(0, 0).k;
    expect(k.address + 40 * token, 0, 5 * token);
    write(k.address, 0xFF, 40 * token);
    cache->truncate(0, 20);
    expect(k.address, 0xFF, 20 * token);
    expect(k.address + 20 * token, 0, 5 * token);
    cache->step({{0, 30}});
    expect(k.address + 30 * token, 0, 5 * token);
    cache->free(0);
  }
}

TEST_P(KVCacheTest, ViewsHaveTheShapeOfTheTokensInUseInEitherLayout) {
  for (const Layout layout : {Layout::kNHD, Layout::kHND}) {
    config_.layout = layout;
    const auto cache = make();
    cache->alloc_block(3);
    cache->step({{0, 5}, {1, 6}, {2, 7}});
    const auto view = cache->view(1, 1);
    EXPECT_EQ(view.k.shape, (std::array<std::int64_t, 3>{6, 2, 16}));
    const auto row = static_cast<std::int64_t>(cache->geometry().k().row_bytes / 2);
    const auto expected =
        layout == Layout::kNHD ? std::array<std::int64_t, 3>{32, 16, 1} : std::array<std::int64_t, 3>{16, row, 1};
    EXPECT_EQ(view.k.strides, expected);
    const std::vector<std::int64_t> slots{0, 2};
    const auto batch = cache->batch(1, slots, 5);
    EXPECT_EQ(batch.k.shape, (std::array<std::int64_t, 4>{2, 5, 2, 16}));
    EXPECT_EQ(batch.k.address + 2 * static_cast<Address>(batch.k.strides[0]), cache->view(1, 2).k.address);
    EXPECT_EQ(cache->layer(1).v->shape, (std::array<std::int64_t, 4>{4, 1 << 20, 2, 16}));
    const std::vector<std::int64_t> uneven{0, 2, 1};
    EXPECT_THROW(static_cast<void>(cache->batch(0, uneven, 1)), std::invalid_argument);
    EXPECT_THROW(static_cast<void>(cache->view(2, 0)), std::out_of_range);
    EXPECT_THROW(static_cast<void>(cache->view(0, 3)), std::invalid_argument);
  }
}

TEST_P(KVCacheTest, SlicedLayersShareATensorAndItsPages) {
  config_.num_layers = 4;
  config_.layers_per_tensor = 2;
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 1}});
  EXPECT_EQ(cache->stats().mapped_bytes, 4 * driver_->traits().default_page_size);
  EXPECT_EQ(cache->view(1, 0).k.address - cache->view(0, 0).k.address, 64U);
  EXPECT_EQ(cache->view(0, 0).k.strides[0], 2 * 2 * 16);
}

TEST_P(KVCacheTest, ACacheOfKeysOnlyHasNoValues) {
  config_.v_head_dim = 0;
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 1}});
  EXPECT_FALSE(cache->view(0, 0).v.has_value());
  EXPECT_EQ(cache->stats().used_bytes, 2U * 2 * 16 * 2);
}

TEST_P(KVCacheTest, AViewKeepsItsMemoryWhenTheCacheIsGone) {
  auto cache = make();
  cache->alloc();
  cache->step({{0, 3}});
  auto k = std::make_unique<TensorView<3>>(cache->view(0, 0).k);
  write(k->address, 0x5A, 64);
  cache->close();
  cache.reset();
  expect(k->address, 0x5A, 64);
  EXPECT_GT(driver_->alive().pages, 0);
  k.reset();
  EXPECT_EQ(driver_->alive(), CountingDriver::Alive{});
}

TEST_P(KVCacheTest, WriteCopiesTokensToTheirPlaces) {
  for (const Layout layout : {Layout::kNHD, Layout::kHND}) {
    config_.layout = layout;
    const auto cache = make();
    cache->alloc_block(2);
    cache->step({{0, 4}, {1, 4}});
    const Source source(driver_, GetParam());
    const std::vector<std::int64_t> slots{0, 1};
    const std::vector<std::int64_t> positions{3, 1};
    if (has_memory()) cache->write(1, slots, positions, source.k, source.v);
    const auto at = [&](const TensorView<3>& view, std::int64_t token, std::int64_t head) {
      return view.address + static_cast<Address>(2 * (token * view.strides[0] + head * view.strides[1]));
    };
    for (int head = 0; head < 2; ++head) {
      expect(at(cache->view(1, 0).k, 3, head), static_cast<unsigned char>(1 + head), 32);
      expect(at(cache->view(1, 1).k, 1, head), static_cast<unsigned char>(3 + head), 32);
      expect(at(*cache->view(1, 1).v, 1, head), static_cast<unsigned char>(3 + head), 32);
    }
    const std::vector<std::int64_t> past{4, 0};
    EXPECT_THROW(cache->write(1, slots, past, source.k, source.v), std::out_of_range);
  }
}

TEST_P(KVCacheTest, WriteTakesTokensFromMemoryThatIsNotVattns) {
  if (driver_->traits().name != std::string("host"))
    GTEST_SKIP() << "an ordinary buffer of the device's memory: the host's is any";
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 1}});
  const std::vector<unsigned char> ordinary(2 * 16 * 2, 9);
  const auto from = reinterpret_cast<Address>(ordinary.data());
  const std::vector<std::int64_t> zero{0};
  cache->write(0, zero, zero, from, from);
  expect(cache->view(0, 0).v->address, 9, 32);
}

TEST_P(KVCacheTest, ThreadsMayCallAnythingAtOnce) {
  config_.max_batch_size = 8;
  const auto cache = make();
  const std::int64_t page_tokens = cache->geometry().tokens_per_page();
  std::vector<std::thread> threads;
  for (int worker = 0; worker < 4; ++worker) {
    threads.emplace_back([&, worker] {
      for (int round = 0; round < 30; ++round) {
        const std::int64_t slot = cache->alloc();
        for (std::int64_t pages = 1; pages <= 3; ++pages) cache->step({{slot, pages * page_tokens}});
        cache->truncate(slot, page_tokens + worker);
        const CacheStats stats = cache->stats();
        EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes);
        cache->free(slot);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(cache->active_slots(), 0);
}

TEST_P(KVCacheTest, BadArgumentsNameTheParameterAndTheValue) {
  const auto message = [&](auto&& call) -> std::string {
    try {
      call();
    } catch (const std::logic_error& error) {
      return error.what();
    } catch (const std::overflow_error& error) {
      return error.what();
    }
    return "";
  };
  const auto with = [&](auto&& change) {
    CacheConfig config = config_;
    change(config);
    return message([&] { KVCache(config, Device{}, driver_); });
  };
  EXPECT_NE(with([](auto& c) { c.num_layers = 0; }).find("num_layers=0"), std::string::npos);
  EXPECT_NE(with([](auto& c) { c.head_dim = -1; }).find("head_dim=-1"), std::string::npos);
  EXPECT_NE(with([](auto& c) { c.layers_per_tensor = 3; }).find("layers_per_tensor=3"), std::string::npos);
  EXPECT_NE(with([](auto& c) { c.page_size = 1000; }).find("page_size=1000"), std::string::npos);
  EXPECT_NE(with([](auto& c) { c.memory_limit = 1; }).find("memory_limit=1"), std::string::npos);
  EXPECT_NE(with([](auto& c) { c.max_seq_len = INT64_MAX; }).find("max_seq_len"), std::string::npos);
  const auto cache = make();
  cache->alloc();
  EXPECT_NE(message([&] { cache->step({{0, -1}}); }).find("-1"), std::string::npos);
  EXPECT_NE(message([&] { cache->step({{0, 1 << 21}}); }).find("max_seq_len"), std::string::npos);
  EXPECT_NE(message([&] { cache->step({{0, 1}, {0, 2}}); }).find("twice"), std::string::npos);
  EXPECT_NE(message([&] { cache->step({{2, 1}}); }).find("slot=2"), std::string::npos);
  EXPECT_NE(message([&] { cache->free(7); }).find("slot=7"), std::string::npos);
  const std::vector<std::int64_t> three(3, 0);
  EXPECT_NE(message([&] { cache->step(std::span<const std::int64_t>(three)); }).find("3 entries"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Every, KVCacheTest, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
