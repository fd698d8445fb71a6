// R11, leaks: 10,000 times a cache, a pool with members or a tensor is made, used and closed or dropped, on each driver.
// File descriptors, mappings and threads are as many as before, and resident memory has no slope.
#include <dirent.h>
#include <unistd.h>

#include <fstream>

#include "drivers_under_test.hpp"
#include "soak.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr int kCycles = kSanitized ? 1000 : 10000;
constexpr double kSlope = 8;  // bytes of resident memory a cycle: half of the smallest allocation

int entries(const char* folder) {
  DIR* const listing = ::opendir(folder);
  int count = 0;
  while (::readdir(listing) != nullptr) ++count;
  ::closedir(listing);
  return count;
}

/// What the process holds.
struct Process {
  int descriptors = entries("/proc/self/fd");
  int threads = entries("/proc/self/task");
  int mappings = 0;
  double resident = 0;

  Process() {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) ++mappings;
    std::ifstream statm("/proc/self/statm");
    double pages = 0;
    statm >> pages >> pages;
    resident = pages * static_cast<double>(::sysconf(_SC_PAGESIZE));
  }
};

class Leaks : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void SetUp() override {
    if (GetParam().name != "cuda" || !cuda::on_fake()) return;
    fake_cuda_reset();
    fake_cuda_set_granularity(4096, 4096);
    fake_cuda_set_fill(-1);
  }
  void TearDown() override {
    if (GetParam().name == "cuda" && cuda::on_fake()) fake_cuda_reset();
  }

  static CacheConfig shape(bool ahead) {
    CacheConfig config{.num_layers = 2, .num_kv_heads = 2, .head_dim = 64, .max_batch_size = 4, .max_seq_len = 256};
    config.dtype = DType::kUInt8;
    config.lookahead_tokens = ahead ? 64 : 0;
    return config;
  }
  static void use(KVCache& cache) {
    cache.alloc_block(2);
    cache.step({{0, 100}, {1, 3}});
    cache.truncate(0, 10);
    cache.free(1);
    cache.step({{cache.alloc(20), 130}});
  }

  static void cycle(int turn) {
    const auto driver = GetParam().open();
    const std::size_t page = driver->traits().granularity;
    const bool ahead = turn % 4 == 0;  // a thread of its own
    if (turn % 3 == 0) {               // a pool, members of which are closed, dropped, and outlived by a view
      const auto pool = PagePool::make(Device{}, driver, page, 200 * page);
      KVCache closed(shape(ahead), pool);
      use(closed);
      auto dropped = std::make_unique<KVCache>(shape(false), pool);
      use(*dropped);
      const auto view = dropped->view(1, 0);
      dropped.reset();
      GrowableTensor tensor({.row_shape = {300}, .max_rows = 100, .dtype = DType::kUInt8}, pool);
      tensor.resize(50);
      if (turn % 2 == 0) closed.close();
      return;
    }
    CacheConfig config = shape(ahead);
    config.page_size = static_cast<std::int64_t>(page);
    config.memory_limit = static_cast<std::int64_t>((turn % 5 == 0 ? 8 : 200) * page);
    KVCache cache(config, Device{}, driver);
    try {
      use(cache);
    } catch (const OutOfMemoryError&) {  // the small one: an error leaves nothing behind either
    }
    if (turn % 3 == 1) cache.close();
  }
};

TEST_P(Leaks, MakingUsingAndClosingLeavesNothingBehind) {
  int done = 0;
  for (; done < kCycles / 5; ++done) cycle(done);
  std::vector<Process> samples;
  samples.reserve(1000000 / 100);
  const Soak soak(0.02);
  const Process before;
  for (; done < kCycles + kCycles / 5 || soak.goes_on(); ++done) {
    if (done % 100 == 0) samples.emplace_back();
    cycle(done);
  }
  const Process after;
  EXPECT_EQ(after.descriptors, before.descriptors);
  EXPECT_EQ(after.threads, before.threads);
  EXPECT_LE(after.mappings, before.mappings + (kSanitized ? 50 : 4)) << "the allocator's own come and go";
  // Least squares.
  double mean_at = 0;
  double mean = 0;
  const auto count = static_cast<double>(samples.size());
  for (std::size_t i = 0; i < samples.size(); ++i) {
    mean_at += 100 * static_cast<double>(i) / count;
    mean += samples[i].resident / count;
  }
  double covariance = 0;
  double variance = 0;
  for (std::size_t i = 0; i < samples.size(); ++i) {
    const double at = 100 * static_cast<double>(i) - mean_at;
    covariance += at * (samples[i].resident - mean);
    variance += at * at;
  }
  const double slope = covariance / variance;
  EXPECT_LT(slope, kSanitized ? 1e9 : kSlope) << "bytes a cycle, over " << done << " cycles";
  RecordProperty("cycles_" + GetParam().name, done);
  RecordProperty("resident_bytes_a_cycle_" + GetParam().name, std::to_string(slope));
  RecordProperty("descriptors_mappings_threads_more_" + GetParam().name,
                 std::to_string(after.descriptors - before.descriptors) + " " +
                     std::to_string(after.mappings - before.mappings) + " " + std::to_string(after.threads - before.threads));
}

INSTANTIATE_TEST_SUITE_P(Every, Leaks, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
