// The mapper thread: look-ahead is there when a step needs it, is given up when another step needs it more, and fails in
// silence.
#include "vattn/memory/mapper.hpp"

#include <dirent.h>
#include <sys/resource.h>

#include <condition_variable>
#include <cstring>
#include <fstream>
#include <mutex>
#include <thread>

#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {
namespace {

int mapper_threads() {
  int count = 0;
  DIR* const tasks = ::opendir("/proc/self/task");
  while (const dirent* const task = ::readdir(tasks)) {
    std::ifstream comm(std::string("/proc/self/task/") + task->d_name + "/comm");
    std::string name;
    if (std::getline(comm, name) && name == "vattn-mapper") ++count;
  }
  ::closedir(tasks);
  return count;
}

class MapperTest : public testing::TestWithParam<DriverUnderTest> {
 protected:
  MapperTest() : driver_(GetParam()) {
    const auto page = static_cast<std::int64_t>(driver_.counts->traits().default_page_size);
    config_.num_layers = 2;
    config_.num_kv_heads = 1;
    config_.head_dim = page / 64;  // 64 tokens a page
    config_.dtype = DType::kUInt8;
    config_.max_batch_size = 4;
    config_.max_seq_len = 64 * 64;
    config_.layout = Layout::kNHD;
    config_.lookahead_tokens = 100;
    config_.warm_tokens = 0;
  }
  void SetUp() override {
    if (cuda::on_fake()) fake_cuda_set_fill(-1);
  }
  void TearDown() override {
    if (cuda::on_fake()) fake_cuda_set_fill(0xFF);
    EXPECT_EQ(driver_.counts->alive(), CountingDriver::Alive{});
    EXPECT_EQ(mapper_threads(), 0);
  }
  std::unique_ptr<KVCache> make() { return std::make_unique<KVCache>(config_, Device{}, driver_.counts); }
  [[nodiscard]] std::uint64_t pages(std::uint64_t count) const { return count * driver_.counts->traits().default_page_size; }

  static constexpr std::uint64_t kTensors = 4;
  Instrumented driver_;
  CacheConfig config_;
};

TEST_P(MapperTest, KeepsASlotInUseAheadOfItsLength) {
  const auto cache = make();
  cache->alloc();
  for (const std::int64_t length : {1, 27, 28, 29, 64, 65, 1000}) {
    cache->step({{0, length}});
    cache->settle();
    const std::int64_t whole_pages = (length + 100 + 63) / 64 * 64;
    EXPECT_EQ(cache->committed_len(0), whole_pages) << "length " << length;
  }
  cache->step({{0, config_.max_seq_len - 5}});
  cache->settle();
  EXPECT_EQ(cache->committed_len(0), config_.max_seq_len);
}

TEST_P(MapperTest, AStepIntoLookAheadCallsNoDriver) {
  const auto cache = make();
  cache->alloc();
  cache->step({{0, 10}});
  EXPECT_EQ(cache->stats().steps_waited, 1U);
  for (std::int64_t length = 11; length < 500; ++length) {
    cache->settle();
    cache->step({{0, length}});
  }
  EXPECT_EQ(cache->stats().steps_waited, 1U);
}

TEST_P(MapperTest, TheFirstStepOfTheNextRequestFindsItsMemoryMapped) {
  config_.warm_tokens = 64;
  const auto cache = make();
  for (std::int64_t request = 0; request < 4; ++request) {
    cache->settle();
    EXPECT_EQ(cache->stats().warm_slots, 1U);
    EXPECT_EQ(cache->alloc(), request);
    cache->step({{request, 64}});
  }
  EXPECT_EQ(cache->stats().prompts, 4U);
  EXPECT_EQ(cache->stats().warm_prompts, 4U);
  cache->settle();
  EXPECT_EQ(cache->stats().warm_slots, 0U);
}

TEST_P(MapperTest, LookAheadIsGivenUpForAStepAndTakesNoWarmPages) {
  config_.memory_limit = static_cast<std::int64_t>(pages(kTensors * 8));
  const auto cache = make();
  cache->alloc();
  cache->alloc();
  cache->step({{0, 1}});
  cache->settle();
  cache->step({{1, 3 * 64}});
  cache->settle();
  cache->free(1);
  // One page a row in use and one ahead, three warm that were used and two that were ahead of them.
  CacheStats stats = cache->stats();
  EXPECT_EQ(cache->committed_len(0), 2 * 64);
  EXPECT_EQ(stats.warm_bytes, pages(kTensors * 5)) << "what was ahead of the freed slot is warm as well";
  cache->set_memory_limit(static_cast<std::int64_t>(pages(kTensors * 4)));
  cache->settle();
  stats = cache->stats();
  EXPECT_EQ(stats.created_bytes, pages(kTensors * 4));
  EXPECT_EQ(cache->committed_len(0), 64) << "look-ahead went first, and is not mapped again at the cost of warm pages";
  EXPECT_EQ(stats.warm_bytes, pages(kTensors * 3));
  cache->step({{0, 4 * 64}});
  EXPECT_EQ(cache->stats().warm_bytes, 0U);
  EXPECT_THROW(cache->step({{0, 4 * 64 + 1}}), OutOfMemoryError);
}

TEST_P(MapperTest, AFailureInTheThreadChangesNothingAndIsTriedAgain) {
  for (const Verb verb : {Verb::kCreate, Verb::kMap, Verb::kSetAccess}) {
    const auto cache = make();
    cache->alloc();
    cache->step({{0, 1}});
    cache->settle();
    driver_.faults->arm({1, true, verb, 999, "CUDA_ERROR_UNKNOWN", false});
    cache->step({{0, 64}});  // needs nothing new; the mapper does
    while (driver_.faults->failed() < 2) std::this_thread::yield();
    CacheStats stats = cache->stats();
    EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
    EXPECT_EQ(cache->seq_len(0), 64);
    cache->step({{0, 128}});  // mapped before it failed
    EXPECT_THROW(cache->step({{0, 129}}), DriverError) << "cannot do without";
    EXPECT_EQ(cache->seq_len(0), 128);
    driver_.faults->disarm();
    while (cache->committed_len(0) < 128 + 100) std::this_thread::yield();  // with no step to wake it
    cache->step({{0, 129}});
    cache->close();
  }
}

/// Holds the next map until it is let go. Then it succeeds, or fails with every release of the same attempt.
class HeldMap final : public Decorator {
 public:
  using Decorator::Decorator;

  void arm() {
    const std::lock_guard lock(mutex_);
    state_ = State::kArmed;
  }
  void await_map() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return state_ == State::kHeld; });
  }
  void let_go() { change(State::kDone); }
  void let_fail() { change(State::kFailing); }

 protected:
  void before(Verb verb) override {
    std::unique_lock lock(mutex_);
    if (verb == Verb::kMap && state_ == State::kArmed) {
      state_ = State::kHeld;
      changed_.notify_all();
      changed_.wait(lock, [&] { return state_ != State::kHeld; });
      mapper_ = std::this_thread::get_id();
      if (state_ == State::kFailing) throw DriverError("map", 999, "CUDA_ERROR_UNKNOWN", "failed on purpose");
    }
    if (verb != Verb::kRelease || state_ != State::kFailing || std::this_thread::get_id() != mapper_) return;
    if (++refused_ == kPages) state_ = State::kDone;
    throw DriverError("release", 999, "CUDA_ERROR_UNKNOWN", "failed on purpose");
  }

 private:
  static constexpr int kPages = 4;  // of one page a tensor
  enum class State { kDone, kArmed, kHeld, kFailing };

  void change(State state) {
    const std::lock_guard lock(mutex_);
    state_ = state;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  State state_ = State::kDone;
  std::thread::id mapper_;
  int refused_ = 0;
};

TEST_P(MapperTest, ALimitLoweredDuringAnAttemptThatFailsHoldsOnceItHasSettled) {
  const auto held = std::make_shared<HeldMap>(driver_.counts);
  KVCache cache(config_, Device{}, held);
  cache.alloc();
  cache.step({{0, 1}});
  cache.settle();
  held->arm();
  cache.step({{0, 64}});  // needs nothing new; the mapper does
  held->await_map();
  cache.set_memory_limit(static_cast<std::int64_t>(pages(kTensors)));
  held->let_fail();
  cache.settle();
  EXPECT_EQ(cache.stats().created_bytes, pages(kTensors)) << "what could not be released at first";
}

TEST_P(MapperTest, ALimitLoweredWhileAStepWaitsThatIsThenRefusedHoldsOnceItHasSettled) {
  const auto held = std::make_shared<HeldMap>(driver_.counts);
  const auto pool = PagePool::make(Device{}, held, driver_.counts->traits().default_page_size, pages(64));
  KVCache cache(config_, pool);
  cache.alloc();
  cache.step({{0, 1}});
  cache.settle();
  held->arm();
  cache.step({{0, 64}});
  held->await_map();
  std::thread refused([&] { EXPECT_THROW(cache.step({{0, 10 * 64}}), OutOfMemoryError); });
  while (pool->stats().reclaimable_bytes != 0) std::this_thread::yield();  // it counts on the look-ahead, and waits for the map
  pool->set_memory_limit(static_cast<std::int64_t>(pages(kTensors)));
  held->let_go();
  refused.join();
  cache.settle();
  EXPECT_EQ(pool->stats().created_bytes, pages(kTensors)) << "what the step did not get is look-ahead again";
}

TEST_P(MapperTest, WithoutLookAheadThereIsNoThread) {
  config_.lookahead_tokens = 0;
  const auto without = make();
  EXPECT_EQ(mapper_threads(), 0);
  config_.lookahead_tokens = 1;
  {
    const auto with = make();
    EXPECT_EQ(mapper_threads(), 1);
  }
  EXPECT_EQ(mapper_threads(), 0);
  without->settle();  // at once
}

TEST_P(MapperTest, ClosingEndsTheThreadWhateverItDoes) {
  for (int round = 0; round < 50; ++round) {
    const auto cache = make();
    cache->alloc();
    cache->step({{0, 1 + 64 * (round % 3)}});
    if (round % 2 != 0) cache->close();
  }
}

INSTANTIATE_TEST_SUITE_P(Every, MapperTest, testing::ValuesIn(every_driver()), name_of_driver);

/// 32 requests of Llama-3-8B's geometry, one tensor a layer, pages of 2 MiB; accounting, so that it is counted and not timed.
struct Decode {
  explicit Decode(std::int64_t lookahead) : driver(std::make_shared<CountingDriver>(open_null_driver())) {
    CacheConfig config{.num_layers = 32, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = 32, .max_seq_len = 8192};
    config.dense = true;
    config.dtype = DType::kBFloat16;
    config.lookahead_tokens = lookahead;
    cache = std::make_unique<KVCache>(config, Device{}, driver);
    cache->alloc_block(32);
  }
  void run() {
    for (std::int64_t length = 512; length < 512 + 2000; ++length) {
      const std::vector<std::int64_t> lengths(32, length);
      cache->step(lengths);
      cache->settle();
    }
  }

  std::shared_ptr<CountingDriver> driver;
  std::unique_ptr<KVCache> cache;
};

/// Voluntary context switches of the whole process: a thread that is woken for nothing and sleeps again is one.
long sleeps() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_nvcsw;
}

TEST_P(MapperTest, ClosingAMemberOfAPoolWakesNoMapperThatLacksNothing) {
  constexpr std::size_t kMembers = 200;
  const auto page = driver_.counts->traits().default_page_size;
  const auto pool = PagePool::make(Device{}, driver_.counts, page, pages(kMembers * 16));
  std::vector<std::unique_ptr<KVCache>> members(kMembers);
  for (auto& member : members) {
    member = std::make_unique<KVCache>(config_, pool);
    member->alloc();
    member->step({{0, 1}});
  }
  for (auto& member : members) member->settle();
  const long before = sleeps();
  for (auto& member : members) member.reset();
  EXPECT_LT(sleeps() - before, 50L * kMembers) << "waking all that are left takes half the square";
  pool->close();
}

TEST_P(MapperTest, PagesThatComeBackWakeAMapperThatLacksThemAndNoMore) {
  constexpr std::size_t kMembers = 20;
  const auto page = driver_.counts->traits().default_page_size;
  // Room for what each is promised, and for the look-ahead of none but one.
  const auto pool = PagePool::make(Device{}, driver_.counts, page, pages((kMembers + 1) * kTensors));
  std::vector<std::unique_ptr<KVCache>> members(kMembers);
  config_.lookahead_tokens = 64;
  for (auto& member : members) {
    member = std::make_unique<KVCache>(config_, pool);
    member->alloc();
    member->step({{0, 1}});
    member->settle();
  }
  for (std::size_t closed = 0; closed + 1 < kMembers; ++closed) {
    members[closed].reset();
    std::size_t ahead = 0;
    for (std::size_t i = closed + 1; i < kMembers; ++i) {
      members[i]->settle();
      if (members[i]->committed_len(0) > 64) ++ahead;
    }
    EXPECT_EQ(ahead, std::min(closed + 2, kMembers - closed - 1)) << "after closing " << closed + 1;
  }
  members.clear();
  pool->close();
}

TEST(MapperDecode, NoStepAfterTheFirstWaitsForAPage) {
  Decode with(1024);
  with.run();
  EXPECT_EQ(with.cache->stats().steps_waited, 1U);
}

TEST(MapperDecode, WithoutItEachPageBoundaryCostsAllOfItsCalls) {
  Decode without(0);
  without.run();
  EXPECT_EQ(without.cache->stats().steps_waited, 3U) << "at 512, 1025 and 2049 tokens";
  EXPECT_EQ(without.driver->calls(Verb::kMap), 3U * 32 * 64);
  EXPECT_EQ(without.driver->calls(Verb::kSetAccess), 3U * 32 * 64);
}

TEST(GrowthInRuns, SetsAccessOnceARunAndCreatesNothingThatThePoolHolds) {
  const auto driver = std::make_shared<CountingDriver>(open_null_driver());
  const auto pool = PagePool::make({Device::Kind::kMeta}, driver, std::size_t{2} << 20, UINT64_MAX);
  CacheConfig config{.num_layers = 32, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = 16, .max_seq_len = 8192};
  config.dense = true;
  config.dtype = DType::kBFloat16;
  config.lookahead_tokens = 0;
  {
    // Another member leaves its pages to the pool.
    KVCache other(config, pool);
    const std::vector<std::int64_t> lengths(16, 4096);
    other.alloc_block(16);
    other.step(lengths);
  }
  const std::uint64_t created = driver->calls(Verb::kCreate);
  const std::uint64_t accesses = driver->calls(Verb::kSetAccess);
  EXPECT_EQ(created, 4096U);
  EXPECT_EQ(accesses, 1024U);
  KVCache cache(config, pool);
  cache.alloc_block(16);
  const std::vector<std::int64_t> lengths(16, 4096);
  cache.step(lengths);
  EXPECT_EQ(driver->calls(Verb::kCreate), created);
  EXPECT_EQ(driver->calls(Verb::kSetAccess) - accesses, 1024U);
}

}  // namespace
}  // namespace vattn
