// Bugs that were found by attacking the pool, its mappers and who uses them: each test failed before its fix.
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

using namespace std::chrono_literals;

/// Calls a hook before every verb.
class HookDriver final : public Decorator {
 public:
  using Decorator::Decorator;
  std::function<void(Verb)> hook{};

 protected:
  void before(Verb verb) override {
    if (hook) hook(verb);
  }
};

/// 16 tokens a page, one row of K and one of V a slot.
CacheConfig small(std::int64_t page) {
  CacheConfig config{.num_layers = 1, .num_kv_heads = 1, .head_dim = page / 16, .max_batch_size = 4, .max_seq_len = 1024};
  config.dtype = DType::kUInt8;
  config.layout = Layout::kNHD;
  config.page_size = page;
  config.lookahead_tokens = 0;
  return config;
}

TEST(PoolRegression, AWarmSlotWithMoreKeysThanValuesDoesNotCauseOutOfMemory) {
  // V is four times as wide as K: 4 tokens a page of V, 16 of K.
  const std::int64_t page = 4096;
  CacheConfig config = small(page);
  config.v_head_dim = 4 * config.head_dim;
  config.memory_limit = 20 * page;
  KVCache cache(config, Device{}, open_null_driver());
  cache.alloc();
  cache.step({{0, 64}});  // 4 pages of K, 16 of V: everything
  cache.free(0);
  cache.alloc();  // 0 again
  const std::int64_t other = cache.alloc();
  cache.step({{other, 32}});                      // 2 + 8, from the other's
  const std::vector<SlotLength> wanted{{0, 32}};  // the other 2 + 8; slot 0 was left with 4 + 6
  ASSERT_TRUE(cache.fits(wanted));
  EXPECT_NO_THROW(cache.step(wanted));
}

TEST(PoolRegression, ARowThatKeptMoreThanItsNeighbourDoesNotCauseOutOfMemory) {
  const std::int64_t page = 4096;
  CacheConfig config = small(page);
  config.num_layers = 2;
  config.v_head_dim = 0;  // two rows a slot
  config.memory_limit = 8 * page;
  const auto faults = std::make_shared<FaultDriver>(open_null_driver());
  KVCache cache(config, Device{}, faults);
  cache.alloc();
  cache.step({{0, 64}});  // 4 + 4: everything
  cache.free(0);
  cache.alloc_block(2);
  faults->arm({2, true, Verb::kUnmap, 5, "EIO", false});
  EXPECT_THROW(cache.step({{1, 48}}), Error);  // the first row gives 3 pages, the second cannot
  faults->disarm();
  cache.step({{1, 16}});
  const std::vector<SlotLength> wanted{{0, 48}};
  ASSERT_TRUE(cache.fits(wanted));
  EXPECT_NO_THROW(cache.step(wanted)) << "1 + 4 pages, to become 3 + 3";
}

TEST(PoolRegression, EveryMapperSeesToALoweredLimit) {
  if (!cuda::on_fake()) GTEST_SKIP();
  fake_cuda_reset();
  fake_cuda_set_fill(-1);
  const auto driver = std::make_shared<CountingDriver>(open_cuda_driver(0));
  const auto page = static_cast<std::int64_t>(driver->traits().default_page_size);
  const Stream stream_a = fake_cuda_stream_create(0);
  const Stream stream_b = fake_cuda_stream_create(0);
  {
    const auto pool = PagePool::make(Device{}, driver, static_cast<std::size_t>(page), static_cast<std::uint64_t>(40 * page));
    CacheConfig config = small(page);
    config.page_size = {};
    config.lookahead_tokens = 1;
    config.warm_tokens = 0;
    KVCache a(config, pool);
    KVCache b(config, pool);
    a.alloc();
    b.alloc();
    a.step({{0, 64}});
    b.step({{0, 64}});
    a.settle();
    b.settle();
    const std::uint64_t ka = fake_cuda_kernel_begin_on(stream_a, a.view(0, 0).k.address, static_cast<std::size_t>(page), -1);
    const std::uint64_t kb = fake_cuda_kernel_begin_on(stream_b, b.view(0, 0).k.address, static_cast<std::size_t>(page), -1);
    a.free(0, stream_a);
    b.free(0, stream_b);
    pool->set_memory_limit(2 * page);
    std::this_thread::sleep_for(20ms);
    fake_cuda_kernel_end(ka);
    std::this_thread::sleep_for(20ms);
    fake_cuda_kernel_end(kb);
    const auto end = std::chrono::steady_clock::now() + 2s;
    while (pool->stats().created_bytes > static_cast<std::uint64_t>(2 * page) && std::chrono::steady_clock::now() < end) {
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_LE(pool->stats().created_bytes, static_cast<std::uint64_t>(2 * page));
  }
  fake_cuda_stream_destroy(stream_a);
  fake_cuda_stream_destroy(stream_b);
  fake_cuda_reset();
}

TEST(PoolRegression, AMapperTurnedAwayWhileAStepLooksForPagesComesBack) {
  const std::int64_t page = 4096;
  const auto hook = std::make_shared<HookDriver>(open_null_driver());
  const auto pool =
      PagePool::make({Device::Kind::kMeta}, hook, static_cast<std::size_t>(page), static_cast<std::uint64_t>(400 * page));
  CacheConfig config = small(page);
  config.page_size = {};
  config.lookahead_tokens = 16;
  config.warm_tokens = 0;
  KVCache a(config, pool);
  KVCache b(config, pool);
  a.alloc();
  b.alloc();
  a.step({{0, 16}});
  b.step({{0, 16}});
  a.settle();
  b.settle();
  // a's mapper is slow to make the page that a's next step needs; b is told to go on meanwhile.
  std::atomic<bool> hold{true};
  std::atomic<bool> inside{false};
  std::thread::id slow{};
  std::atomic<bool> first{true};
  hook->hook = [&](Verb verb) {
    if (verb != Verb::kCreate || !first.exchange(false)) return;
    inside = true;
    while (hold) std::this_thread::sleep_for(1ms);
  };
  a.step({{0, 17}});  // its mapper begins the third page
  while (!inside) std::this_thread::sleep_for(1ms);
  std::thread step([&] { a.step({{0, 33}}); });  // waits for it
  std::this_thread::sleep_for(30ms);
  b.step({{0, 17}});
  b.settle();
  hold = false;
  step.join();
  a.settle();
  b.settle();
  EXPECT_EQ(b.committed_len(0), 48) << "there was room all the time";
}

TEST(PoolRegression, AMapperLeavesThePagesThatAStepIsTakingBack) {
  const std::int64_t page = 4096;
  const auto hook = std::make_shared<HookDriver>(open_null_driver());
  const auto pool =
      PagePool::make({Device::Kind::kMeta}, hook, static_cast<std::size_t>(page), static_cast<std::uint64_t>(16 * page));
  CacheConfig config = small(page);
  config.page_size = {};
  KVCache idle(config, pool);
  KVCache grows(config, pool);
  config.lookahead_tokens = 16;
  config.warm_tokens = 0;
  KVCache ahead(config, pool);
  ahead.alloc();
  ahead.step({{0, 16}});
  ahead.settle();  // a page ahead in both rows: four pages
  for (const std::int64_t slot : {0, 1, 2}) {
    idle.alloc();
    idle.step({{slot, 32}});
  }
  for (const std::int64_t slot : {0, 1, 2}) idle.free(slot);  // twelve warm pages: all that is left
  grows.alloc();
  int unmaps = 0;
  std::atomic<int> maps{0};
  hook->hook = [&](Verb verb) {
    if (verb == Verb::kMap) ++maps;
    if (verb != Verb::kUnmap || ++unmaps != 5) return;
    // The look-ahead is gone and its mapper awake, one slot's pages are pooled, and the step goes on to the next slot's.
    std::this_thread::sleep_for(50ms);
    EXPECT_EQ(maps, 0) << "the mapper took what a step is looking for";
  };
  grows.step({{0, 16 * 6}});
  hook->hook = nullptr;
  EXPECT_GE(unmaps, 5);
}

TEST(PoolRegression, LoweringTheLimitDoesNotTakeWhatAStepMayHave) {
  const std::int64_t page = 4096;
  const auto hook = std::make_shared<HookDriver>(open_null_driver());
  const auto pool =
      PagePool::make({Device::Kind::kMeta}, hook, static_cast<std::size_t>(page), static_cast<std::uint64_t>(100 * page));
  CacheConfig config = small(page);
  config.page_size = {};
  KVCache a(config, pool);
  {
    KVCache b(config, pool);
    b.alloc();
    b.step({{0, 160}});  // 20 pages, which the pool keeps
  }
  a.alloc();
  std::atomic<bool> inside{false};
  std::atomic<bool> hold{true};
  hook->hook = [&](Verb verb) {
    if (verb != Verb::kRelease) return;
    inside = true;
    while (hold) std::this_thread::sleep_for(1ms);
  };
  std::thread lower([&] { pool->set_memory_limit(10 * page); });
  while (!inside) std::this_thread::sleep_for(1ms);
  EXPECT_NO_THROW(a.step({{0, 80}})) << "ten pages, the limit";
  hold = false;
  lower.join();
}

TEST(PoolRegression, AMapperDoesNotSpinWhenTheDriverReleasesNothing) {
  const std::int64_t page = 4096;
  const auto faults = std::make_shared<FaultDriver>(open_null_driver());
  const auto counts = std::make_shared<CountingDriver>(faults);
  CacheConfig config = small(page);
  config.memory_limit = 20 * page;
  config.lookahead_tokens = 16;
  config.warm_tokens = 0;
  KVCache cache(config, Device{}, counts);
  cache.alloc();
  cache.step({{0, 16}});
  cache.settle();
  faults->arm({1, true, Verb::kRelease, 5, "EIO", false});
  cache.set_memory_limit(2 * page);
  std::this_thread::sleep_for(20ms);
  const std::uint64_t before = counts->calls();
  std::this_thread::sleep_for(100ms);
  EXPECT_LT(counts->calls() - before, 100U);
  faults->disarm();
}

TEST(PoolRegression, ClosingAPoolWhoseDriverReleasesNothingTakesNoMinutes) {
  const std::int64_t page = 4096;
  const auto faults = std::make_shared<FaultDriver>(open_null_driver());
  CacheConfig config = small(page);
  config.max_seq_len = 1 << 20;
  KVCache cache(config, Device{}, faults);
  cache.alloc();
  cache.step({{0, 16 * 10000}});  // 20,000 pages, 40 GiB of 2 MiB
  faults->arm({1, true, Verb::kRelease, 999, "CUDA_ERROR_ILLEGAL_ADDRESS", false});
  EXPECT_THROW(cache.close(), Error);  // quadratic in the pages it was refused, it took minutes: the watchdog's business
  faults->disarm();
}

TEST(PoolRegression, AppendChangesNothingWhenTheDeviceFailsForGood) {
  const auto faults = std::make_shared<FaultDriver>(open_host_driver());
  const std::int64_t page = 4096;
  GrowableTensor tensor({.row_shape = {page}, .max_rows = 8, .dtype = DType::kUInt8, .page_size = page}, Device{}, faults);
  const std::vector<unsigned char> row(static_cast<std::size_t>(page), 7);
  tensor.append(reinterpret_cast<Address>(row.data()), 1);
  faults->arm({1, true, Verb::kSynchronize, 700, "CUDA_ERROR_ILLEGAL_ADDRESS", false});
  EXPECT_THROW(tensor.append(reinterpret_cast<Address>(row.data()), 1), DriverError);
  EXPECT_EQ(tensor.rows(), 1);
  faults->disarm();
}

TEST(PoolRegression, ABatchOfAScrubbedCacheShowsNothingOfTheLastRequest) {
  const std::int64_t page = 4096;
  CacheConfig config = small(page);
  config.scrub = true;
  KVCache cache(config, Device{}, open_host_driver());
  cache.alloc_block(2);
  cache.step({{0, 64}, {1, 64}});
  std::memset(reinterpret_cast<void*>(cache.view(0, 1).k.address), 0x5A, static_cast<std::size_t>(4 * page));
  cache.free(1);
  ASSERT_EQ(cache.alloc(), 1);
  cache.step({{1, 10}});
  const std::vector<std::int64_t> both{0, 1};
  const auto k = cache.batch(0, both, 64).k;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(k.address) + k.strides[0];
  std::size_t stale = 0;
  for (std::int64_t i = 0; i < 4 * page; ++i) stale += bytes[i] != 0 ? 1 : 0;
  EXPECT_EQ(stale, 0U);
}

TEST(PoolRegression, ABatchOfAGuardedCacheOfANewRequest) {
  // The same before any step, with a guard.
  const std::int64_t page = 4096;
  CacheConfig config = small(page);
  config.scrub = true;
  KVCache cache(config, Device{}, open_host_driver());
  cache.alloc();
  cache.step({{0, 64}});
  std::memset(reinterpret_cast<void*>(cache.view(0, 0).k.address), 0x5A, static_cast<std::size_t>(4 * page));
  cache.free(0);
  cache.alloc();
  const std::vector<std::int64_t> one{0};
  const auto k = cache.batch(0, one, 64).k;
  EXPECT_EQ(*reinterpret_cast<const unsigned char*>(k.address), 0);
}

TEST(PoolRegression, AMapperDoesNotSpinWhenTheDriverUnmapsNothing) {
  const std::int64_t page = 4096;
  const auto faults = std::make_shared<FaultDriver>(open_null_driver());
  const auto counts = std::make_shared<CountingDriver>(faults);
  CacheConfig config = small(page);
  config.memory_limit = 40 * page;
  config.lookahead_tokens = 16;
  config.warm_tokens = 0;
  KVCache cache(config, Device{}, counts);
  cache.alloc_block(2);
  cache.step({{0, 64}, {1, 64}});
  cache.free(0);
  cache.settle();
  faults->arm({1, true, Verb::kUnmap, 5, "EIO", false});
  cache.set_memory_limit(2 * page);
  std::this_thread::sleep_for(20ms);
  const std::uint64_t before = counts->calls();
  std::this_thread::sleep_for(100ms);
  EXPECT_LT(counts->calls() - before, 100U);
  faults->disarm();
}

}  // namespace
}  // namespace vattn
