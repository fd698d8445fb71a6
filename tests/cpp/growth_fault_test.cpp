// A step in which any single driver call fails, the k-th for every reachable k, once and for ever, with several codes, changes
// nothing: lengths, page counts and what is alive in the driver are as before, and the retry succeeds.
#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {
namespace {

struct Scenario {
  const char* name;
  Layout layout;
  bool scrub;
  std::int64_t guard;
  bool tight;  ///< the limit holds exactly what the step needs, so that warm pages must be taken back for it
};

constexpr Scenario kScenarios[] = {
    {"token-major", Layout::kNHD, false, 0, false}, {"head-major", Layout::kHND, false, 0, false},
    {"scrub", Layout::kNHD, true, 0, false},        {"guard", Layout::kNHD, false, 8, false},
    {"tight", Layout::kNHD, false, 0, true},
};

struct Code {
  int code;
  const char* name;
  bool out_of_memory;
};
constexpr Code kCodes[] = {
    {12, "ENOMEM", true}, {5, "EIO", false}, {1, "CUDA_ERROR_INVALID_VALUE", false}, {999, "CUDA_ERROR_UNKNOWN", false}};

class GrowthFault : public testing::TestWithParam<DriverUnderTest> {
 protected:
  // Thousands of caches are made here; what fresh pages hold is another suite's business, and filling them its cost.
  void SetUp() override {
    if (cuda::on_fake()) fake_cuda_set_fill(-1);
  }
  void TearDown() override {
    if (cuda::on_fake()) fake_cuda_set_fill(0xFF);
  }
};

struct Before {
  std::vector<std::int64_t> lengths;
  std::vector<std::int64_t> committed;
  CacheStats stats;
  CountingDriver::Alive alive;

  Before(const KVCache& cache, const CountingDriver& driver) : stats(cache.stats()), alive(driver.alive()) {
    for (const std::int64_t slot : cache.slots()) {
      lengths.push_back(cache.seq_len(slot));
      committed.push_back(cache.committed_len(slot));
    }
  }
};

/// Excess may be gone: taking it back is not undone, since nobody was promised it. Everything else is as it was.
void expect_same(const Before& before, const Before& after, bool excess_too, const std::string& what) {
  const auto promised = [](const CacheStats& stats) { return stats.mapped_bytes - stats.reclaimable_bytes; };
  EXPECT_EQ(before.lengths, after.lengths) << what;
  EXPECT_EQ(before.stats.created_bytes, after.stats.created_bytes) << what;
  EXPECT_EQ(promised(before.stats), promised(after.stats)) << what;
  EXPECT_EQ(before.stats.used_bytes, after.stats.used_bytes) << what;
  EXPECT_EQ(after.stats.retired_bytes, 0U) << what;
  EXPECT_EQ(after.stats.created_bytes, after.stats.mapped_bytes + after.stats.pooled_bytes) << what;
  if (excess_too) {
    EXPECT_EQ(before.committed, after.committed) << what;
    EXPECT_EQ(before.stats.mapped_bytes, after.stats.mapped_bytes) << what;
    EXPECT_EQ(before.stats.reclaimable_bytes, after.stats.reclaimable_bytes) << what;
  }
  EXPECT_EQ(before.stats.pages_created, after.stats.pages_created) << what;
  EXPECT_EQ(before.stats.pages_reused, after.stats.pages_reused) << what;
  EXPECT_EQ(before.alive, after.alive) << what;
}

/// A cache in the middle of its life: one slot in use, another warm.
struct Setting {
  Setting(const DriverUnderTest& under_test, const Scenario& scenario) : driver(under_test) {
    const DriverTraits& traits = driver.counts->traits();
    page = static_cast<std::int64_t>(traits.default_page_size);
    config.num_layers = 2;
    config.num_kv_heads = 2;
    config.head_dim = page / 64;  // 16 tokens a page token-major, 32 head-major
    config.dtype = DType::kUInt8;
    config.head_dim /= 2;
    config.max_batch_size = 3;
    config.max_seq_len = 512;
    config.layout = scenario.layout;
    config.page_size = page;
    config.scrub = scenario.scrub;
    config.guard_tokens = scenario.guard;
    config.lookahead_tokens = 0;
    if (scenario.tight) config.memory_limit = 4 * 11 * page;
    cache = std::make_unique<KVCache>(config, Device{}, driver.counts);
    for (int slot = 0; slot < 3; ++slot) cache->alloc();
    const std::int64_t tokens = page / (config.num_kv_heads * config.head_dim);
    cache->step({{0, 2 * tokens}, {1, 4 * tokens}});
    cache->free(1);
    cache->alloc();
    // Zeroing pages is what costs here, so where they are zeroed fewer grow.
    const bool zeroes = scenario.scrub || scenario.guard != 0;
    target = {2 * tokens + 1, zeroes ? 1 : 3 * tokens, zeroes ? 1 : 5 * tokens};
  }

  void step() { cache->step(std::span<const std::int64_t>(target)); }

  Instrumented driver;
  CacheConfig config;
  std::int64_t page = 0;
  std::unique_ptr<KVCache> cache;
  std::vector<std::int64_t> target;
};

TEST_P(GrowthFault, AnySingleFailureDuringStepChangesNothingAndTheRetrySucceeds) {
  for (const Scenario& scenario : kScenarios) {
    for (const Code& code : kCodes) {
      // Every code once through the plain scenario; the others differ in what they call, not in how they fail.
      if (&scenario != &kScenarios[0] && &code != &kCodes[0]) continue;
      for (const bool sticky : {false, true}) {
        std::uint64_t k = 1;
        for (;; ++k) {
          Setting setting(GetParam(), scenario);
          const Before before(*setting.cache, *setting.driver.counts);
          setting.driver.faults->arm({k, sticky, {}, code.code, code.name, code.out_of_memory});
          const std::string what =
              std::string(scenario.name) + " " + code.name + (sticky ? " sticky" : "") + " k=" + std::to_string(k);
          bool failed = false;
          try {
            setting.step();
          } catch (const OutOfMemoryError&) {
            failed = true;
          } catch (const DriverError& error) {
            EXPECT_EQ(error.code, code.code) << what;
            EXPECT_EQ(error.name, code.name) << what;
            failed = true;
          }
          const std::uint64_t fired = setting.driver.faults->failed();
          setting.driver.faults->disarm();
          if (fired == 0) {
            EXPECT_FALSE(failed) << what;
            break;
          }
          // A sticky failure fails the undoing too; what could not be undone is surplus that the next growth takes, never lost.
          if (!sticky && failed) expect_same(before, Before(*setting.cache, *setting.driver.counts), !scenario.tight, what);
          const CacheStats stats = setting.cache->stats();
          EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes) << what;
          EXPECT_EQ(setting.cache->seq_len(0), failed ? before.lengths[0] : setting.target[0]) << what;
          setting.step();
          EXPECT_EQ(setting.cache->seq_len(2), setting.target[2]) << what;
          setting.cache->close();
          EXPECT_EQ(setting.driver.counts->alive(), CountingDriver::Alive{}) << what;
        }
        EXPECT_GT(k, 8U) << "the scenario reaches only " << k << " driver calls";
      }
    }
  }
}

TEST_P(GrowthFault, FailureInTheUndoingLosesNothing) {
  for (const Verb second : {Verb::kUnmap, Verb::kRelease}) {
    Setting setting(GetParam(), kScenarios[0]);
    const Before before(*setting.cache, *setting.driver.counts);
    // set_access fails, and from then on every call does: nothing can be unmapped or released.
    setting.driver.faults->arm({1, true, Verb::kSetAccess, 5, "EIO", false});
    EXPECT_THROW(setting.step(), DriverError);
    setting.driver.faults->arm({1, true, second, 5, "EIO", false});
    const CacheStats stats = setting.cache->stats();
    EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes);
    setting.driver.faults->disarm();
    setting.step();
    setting.cache->close();
    EXPECT_EQ(setting.driver.counts->alive(), CountingDriver::Alive{});
  }
}

TEST_P(GrowthFault, PagesThatCannotBeUnmappedStayCountedAndAreTriedAgain) {
  Setting setting(GetParam(), kScenarios[0]);
  const CacheStats before = setting.cache->stats();
  setting.cache->free(0);
  setting.driver.faults->arm({1, true, Verb::kUnmap, 5, "EIO", false});
  const std::int64_t limit = 4 * setting.page;
  setting.cache->set_memory_limit(limit);
  CacheStats stats = setting.cache->stats();
  EXPECT_EQ(stats.mapped_bytes, before.mapped_bytes);
  EXPECT_EQ(stats.reclaimable_bytes, before.mapped_bytes);
  EXPECT_EQ(stats.active_slots, before.active_slots - 1);
  setting.driver.faults->disarm();
  setting.cache->set_memory_limit(limit);
  stats = setting.cache->stats();
  EXPECT_EQ(stats.created_bytes, static_cast<std::uint64_t>(limit));
  setting.cache->close();
  EXPECT_EQ(setting.driver.counts->alive(), CountingDriver::Alive{});
}

TEST_P(GrowthFault, CloseReportsWhatTheDriverWouldNotTakeAndIsClosedAllTheSame) {
  Setting setting(GetParam(), kScenarios[0]);
  setting.driver.faults->arm({1, true, Verb::kUnmap, 5, "EIO", false});
  try {
    setting.cache->close();
    FAIL() << "close must say what it could not give back";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("unmap failed: EIO (5)"), std::string::npos) << error.what();
  }
  setting.driver.faults->disarm();
  EXPECT_TRUE(setting.cache->is_closed());
  EXPECT_NO_THROW(setting.cache->close());
  EXPECT_THROW(setting.cache->alloc(), ClosedError);
}

TEST_P(GrowthFault, MakingACacheFailsCleanlyAtEveryCall) {
  for (std::uint64_t k = 1;; ++k) {
    Instrumented driver(GetParam());
    CacheConfig config{.num_layers = 3,
                       .num_kv_heads = 1,
                       .head_dim = 64,
                       .max_batch_size = 2,
                       .max_seq_len = 64,
                       .dense = true,
                       .lookahead_tokens = 0};
    driver.faults->arm({k, false, {}, 12, "ENOMEM", false});
    try {
      const KVCache cache(config, Device{}, driver.counts);
      EXPECT_EQ(driver.faults->failed(), 0U);
      EXPECT_EQ(k, 7U) << "six tensors, six reservations";
      break;
    } catch (const DriverError& error) {
      EXPECT_EQ(error.code, 12);
    }
    EXPECT_EQ(driver.counts->alive(), CountingDriver::Alive{}) << "k=" << k;
  }
}

INSTANTIATE_TEST_SUITE_P(Every, GrowthFault, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
