// One budget for several caches and tensors, on every driver.
#include "vattn/memory/page_pool.hpp"

#include <atomic>
#include <random>
#include <thread>

#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

class SharedPool : public testing::TestWithParam<DriverUnderTest> {
 protected:
  SharedPool() : driver_(GetParam()), page_(driver_.counts->traits().default_page_size) {
    config_.num_layers = 1;
    config_.num_kv_heads = 1;
    config_.head_dim = static_cast<std::int64_t>(page_ / 16);  // 16 tokens a page, 2 tensors
    config_.dtype = DType::kUInt8;
    config_.max_batch_size = 4;
    config_.max_seq_len = 16 * 256;
    config_.layout = Layout::kNHD;
    config_.lookahead_tokens = 0;
  }
  void SetUp() override {
    if (cuda::on_fake()) fake_cuda_set_fill(-1);
  }
  void TearDown() override {
    if (cuda::on_fake()) fake_cuda_set_fill(0xFF);
    EXPECT_EQ(driver_.counts->alive(), CountingDriver::Alive{});
  }
  [[nodiscard]] std::shared_ptr<PagePool> pool_of(std::uint64_t pages) const {
    return PagePool::make(Device{}, driver_.counts, page_, pages * page_);
  }
  [[nodiscard]] GrowableTensor::Config rows_of_a_page(std::int64_t rows) const {
    return {.row_shape = {static_cast<std::int64_t>(page_)}, .max_rows = rows, .dtype = DType::kUInt8};
  }

  Instrumented driver_;
  std::uint64_t page_;
  CacheConfig config_;
};

TEST_P(SharedPool, WhatOneGivesUpServesAnotherWithinOneStep) {
  const auto pool = pool_of(40);
  KVCache a(config_, pool);
  KVCache b(config_, pool);
  GrowableTensor t(rows_of_a_page(40), pool);
  a.alloc();
  a.step({{0, 16 * 20}});
  EXPECT_EQ(pool->stats().available_bytes, 0U);
  b.alloc();
  EXPECT_THROW(b.step({{0, 1}}), OutOfMemoryError);
  a.free(0);
  b.step({{0, 16 * 10}});
  EXPECT_EQ(a.stats().warm_bytes, 20 * page_) << "only as many as needed were taken";
  t.resize(20);
  EXPECT_EQ(a.stats().mapped_bytes, 0U);
  EXPECT_EQ(pool->stats().created_bytes, 40 * page_);
  EXPECT_THROW(t.resize(21), OutOfMemoryError);
  t.resize(0);
  a.alloc();
  a.step({{0, 16 * 10}});
}

TEST_P(SharedPool, AnIdleMemberIsTakenFromUpToTheLastPage) {
  const auto pool = pool_of(200);
  KVCache idle(config_, pool);
  KVCache busy(config_, pool);
  idle.alloc();
  idle.step({{0, 16 * 90}});
  idle.free(0);
  EXPECT_EQ(pool->stats().reclaimable_bytes, 180 * page_);
  busy.alloc();
  busy.alloc();
  busy.step({{0, 16 * 90}});
  EXPECT_EQ(busy.stats().mapped_bytes, 180 * page_);
  EXPECT_EQ(idle.stats().mapped_bytes, 20 * page_);
  try {
    busy.step({{0, 16 * 101}});
    FAIL();
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, 22 * page_);
    EXPECT_EQ(error.available_bytes, 20 * page_);
    EXPECT_EQ(error.limit_bytes, 200 * page_);
  }
  EXPECT_EQ(idle.stats().mapped_bytes, 20 * page_) << "what cannot succeed takes nothing";
}

TEST_P(SharedPool, TheColdestGoesFirstWhoeverHoldsIt) {
  const auto pool = pool_of(12);
  KVCache a(config_, pool);
  KVCache b(config_, pool);
  for (int i = 0; i < 2; ++i) {
    a.alloc();
    b.alloc();
  }
  a.step({{0, 16}, {1, 16}});
  b.step({{0, 16}, {1, 16}});
  a.free(1);
  b.free(1);
  a.free(0);
  GrowableTensor t(rows_of_a_page(8), pool);
  t.resize(4);  // new pages, while there are any
  EXPECT_EQ(a.stats().warm_slots, 2U);
  t.resize(6);
  EXPECT_EQ(a.stats().warm_slots, 1U) << "slot 1 of a was given up first";
  EXPECT_EQ(b.stats().warm_slots, 1U);
  t.resize(8);
  EXPECT_EQ(a.stats().warm_slots, 1U);
  EXPECT_EQ(b.stats().warm_slots, 0U);
}

TEST_P(SharedPool, StatsSayWhoHoldsWhat) {
  const auto pool = pool_of(40);
  KVCache a(config_, pool);
  auto t = std::make_unique<GrowableTensor>(rows_of_a_page(8), pool);
  a.alloc();
  a.step({{0, 17}});
  a.truncate(0, 1);
  t->resize(3);
  PoolStats stats = pool->stats();
  ASSERT_EQ(stats.members.size(), 2U);
  EXPECT_EQ(stats.members[0].name, "KVCache-1");
  EXPECT_EQ(stats.members[0].mapped_bytes, 4 * page_);
  EXPECT_EQ(stats.members[0].reclaimable_bytes, 2 * page_);
  EXPECT_EQ(stats.members[1].name, "GrowableTensor-2");
  EXPECT_EQ(stats.members[1].mapped_bytes, 3 * page_);
  EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
  const auto view = t->view();
  t.reset();
  stats = pool->stats();
  EXPECT_EQ(stats.members.size(), 1U);
  EXPECT_EQ(stats.mapped_bytes, 7 * page_) << "the view keeps its memory, and it counts";
}

TEST_P(SharedPool, ClosesOnlyWithoutMembers) {
  const auto pool = pool_of(4);
  {
    KVCache a(config_, pool);
    EXPECT_THROW(pool->close(), InUseError);
    a.alloc();
    a.step({{0, 1}});
    a.close();
  }
  EXPECT_EQ(pool->stats().pooled_bytes, 2 * page_);
  pool->close();
  pool->close();
  EXPECT_TRUE(pool->is_closed());
  EXPECT_THROW(pool->stats(), ClosedError);
  EXPECT_THROW(KVCache(config_, pool), ClosedError);
  EXPECT_THROW(GrowableTensor(rows_of_a_page(8), pool), ClosedError);
}

TEST_P(SharedPool, BadArgumentsAreNamed) {
  EXPECT_THROW(KVCache(config_, pool_of(1)), std::invalid_argument) << "a page group is two";
  EXPECT_THROW(KVCache(config_, nullptr), std::invalid_argument);
  const auto pool = pool_of(4);
  EXPECT_THROW(pool->set_memory_limit(static_cast<std::int64_t>(page_) - 1), std::invalid_argument);
  config_.memory_limit = static_cast<std::int64_t>(4 * page_);
  EXPECT_THROW(KVCache(config_, pool), std::invalid_argument);
  config_.memory_limit = {};
  config_.page_size = static_cast<std::int64_t>(page_);
  EXPECT_THROW(KVCache(config_, pool), std::invalid_argument);
  config_.page_size = {};
  KVCache cache(config_, pool);
  EXPECT_THROW(cache.set_memory_limit(static_cast<std::int64_t>(4 * page_)), std::invalid_argument);
}

TEST_P(SharedPool, LimitsMoveLive) {
  const auto pool = pool_of(20);
  KVCache a(config_, pool);
  KVCache b(config_, pool);
  a.alloc();
  b.alloc();
  a.step({{0, 16 * 5}});
  b.step({{0, 16 * 5}});
  pool->set_memory_limit(static_cast<std::int64_t>(12 * page_));
  EXPECT_EQ(pool->stats().created_bytes, 20 * page_) << "nothing is taken from slots in use";
  EXPECT_THROW(a.step({{0, 16 * 5 + 1}}), OutOfMemoryError);
  b.free(0);
  EXPECT_EQ(pool->stats().created_bytes, 12 * page_);
  a.step({{0, 16 * 6}});
  pool->set_memory_limit(static_cast<std::int64_t>(40 * page_));
  a.step({{0, 16 * 20}});
}

TEST_P(SharedPool, ALoweredLimitReleasesPooledPagesDownToItAndNoFurther) {
  const auto pool = pool_of(20);
  {
    KVCache gone(config_, pool);
    gone.alloc();
    gone.step({{0, 16 * 10}});
  }
  EXPECT_EQ(pool->stats().created_bytes, 20 * page_) << "a closed cache's pages are the pool's";
  pool->set_memory_limit(static_cast<std::int64_t>(7 * page_));
  EXPECT_EQ(pool->stats().created_bytes, 7 * page_);
}

TEST_P(SharedPool, WhatIsAboveALoweredLimitIsNotPromisedAgain) {
  const auto pool = pool_of(20);
  KVCache a(config_, pool);
  a.alloc();
  a.step({{0, 16 * 8}});
  a.truncate(0, 16 * 2);
  driver_.faults->arm({1, true, Verb::kUnmap, 5, "EIO", false});  // so that the excess stays
  pool->set_memory_limit(static_cast<std::int64_t>(6 * page_));
  EXPECT_FALSE(a.fits(std::vector<SlotLength>{{0, 16 * 8}}));
  try {
    a.step({{0, 16 * 8}});
    FAIL();
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, 12 * page_);
    EXPECT_EQ(error.available_bytes, 2 * page_);
  }
  a.step({{0, 16 * 3}});
  driver_.faults->disarm();
}

/// Threads step, free, truncate, ask and move the limit, on two caches and a tensor of one pool, with mappers at work.
TEST_P(SharedPool, ThreadsOfManyCallersAndTwoMappersKeepTheCounts) {
  const auto pool = pool_of(64);
  config_.lookahead_tokens = 24;
  config_.max_batch_size = 8;
  KVCache a(config_, pool);
  KVCache b(config_, pool);
  GrowableTensor t(rows_of_a_page(32), pool);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> steps{0};
  const auto user = [&](KVCache& cache, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::pair<std::int64_t, std::int64_t>> mine;
    while (!stop) {
      try {
        const auto what = random() % 8;
        if (what < 2 && mine.size() < 3) {
          mine.emplace_back(cache.alloc(static_cast<std::int64_t>(random() % 64)), 0);
        } else if (mine.empty()) {
          continue;
        } else if (what < 6) {
          auto& [slot, length] = mine[random() % mine.size()];
          const std::int64_t longer = length + static_cast<std::int64_t>(random() % 24);
          cache.step({{slot, longer}});
          length = std::max(length, longer);
          ++steps;
        } else if (what == 6) {
          auto& [slot, length] = mine[random() % mine.size()];
          cache.truncate(slot, length / 2);
          length /= 2;
        } else {
          cache.free(mine.back().first);
          mine.pop_back();
        }
      } catch (const OutOfMemoryError&) {
        if (!mine.empty()) {
          cache.free(mine.back().first);
          mine.pop_back();
        }
      } catch (const NoFreeSlotError&) {
      }
    }
    for (const auto& [slot, length] : mine) cache.free(slot);
  };
  std::vector<std::thread> threads;
  threads.emplace_back(user, std::ref(a), 1);
  threads.emplace_back(user, std::ref(a), 2);
  threads.emplace_back(user, std::ref(b), 3);
  threads.emplace_back([&] {
    std::mt19937 random(4);
    while (!stop) {
      try {
        t.resize(static_cast<std::int64_t>(random() % 16));
        pool->set_memory_limit(static_cast<std::int64_t>((40 + random() % 24) * page_));
      } catch (const OutOfMemoryError&) {
      }
      const PoolStats stats = pool->stats();
      EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
      static_cast<void>(a.stats());
    }
  });
  std::this_thread::sleep_for(std::chrono::seconds(2));
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(steps, 100U);
  t.resize(0);
  const PoolStats stats = pool->stats();
  EXPECT_EQ(stats.available_bytes, stats.limit_bytes);
  EXPECT_EQ(stats.mapped_bytes, stats.reclaimable_bytes);
}

INSTANTIATE_TEST_SUITE_P(Every, SharedPool, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
