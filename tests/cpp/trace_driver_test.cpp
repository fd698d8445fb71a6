// TraceDriver and what replays its traces: a cache's life, written down on one driver, is played again on every other; a trace
// that is hostile, truncated or of another driver is refused with the line, and the driver left as it was.
#include "vattn/driver/decorators/trace_driver.hpp"

#include <sstream>

#include "../fuzz/trace_replay.hpp"
#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {
namespace {

using fuzz::replay_trace;

constexpr std::int64_t kPage = std::int64_t{2} << 20;  // every driver has pages of this size

CacheConfig config_of(Layout layout) {
  return {.num_layers = 2,
          .num_kv_heads = 2,
          .head_dim = kPage / 32,  // 16 tokens a page
          .max_batch_size = 3,
          .max_seq_len = 64,
          .dtype = DType::kUInt8,
          .layout = layout,
          .page_size = kPage,
          .memory_limit = 40 * kPage,
          .scrub = true,
          .lookahead_tokens = 0};
}

/// Growth, reuse, pressure, a failure and its undoing, close.
void live(const CacheConfig& config, const std::shared_ptr<Driver>& driver, FaultDriver& faults) {
  KVCache cache(config, Device{}, driver);
  for (int slot = 0; slot < 3; ++slot) cache.alloc();
  cache.step({{0, 20}, {1, 33}});
  cache.truncate(1, 4);
  cache.free(0);
  faults.arm({.call = 5});
  EXPECT_THROW(cache.step({{1, 20}, {2, 64}}), DriverError);
  faults.disarm();
  cache.step({{1, 20}, {2, 48}});
  cache.set_memory_limit(24 * kPage);
  cache.free(1);
  cache.close();
}

std::string trace_of(const DriverUnderTest& under_test, Layout layout) {
  const auto faults = std::make_shared<FaultDriver>(under_test.open());
  const auto traced = std::make_shared<TraceDriver>(faults);
  live(config_of(layout), traced, *faults);
  EXPECT_EQ(traced->dropped(), 0U);
  return traced->text();
}

class Trace : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void SetUp() override {
    if (cuda::on_fake()) fake_cuda_set_fill(-1);
  }
  void TearDown() override {
    if (cuda::on_fake()) fake_cuda_set_fill(0xFF);
  }
};

TEST_P(Trace, OfACachesLifeReplaysOnEveryDriver) {
  for (const Layout layout : {Layout::kNHD, Layout::kHND}) {
    const std::string text = trace_of(GetParam(), layout);
    EXPECT_NE(text.find(" ! DriverError 5 EIO\n"), std::string::npos);
    for (const DriverUnderTest& other : every_driver()) {
      CountingDriver driver(other.open());
      std::istringstream trace(text);
      const fuzz::Replayed done = replay_trace(trace, driver);
      EXPECT_GT(done.calls, 60U) << other.name;
      EXPECT_EQ(done.left_pages, 0U) << other.name;
      EXPECT_EQ(done.left_ranges, 0U) << other.name;
      EXPECT_EQ(driver.alive(), CountingDriver::Alive{}) << other.name;
    }
  }
}

TEST_P(Trace, ThatEndsEarlyIsPlayedSoFarAndLeavesNothing) {
  const std::string text = trace_of(GetParam(), Layout::kNHD);
  for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', end + 1)) {
    CountingDriver driver(open_null_driver());
    std::istringstream whole_lines(text.substr(0, end + 1));
    EXPECT_NO_THROW(replay_trace(whole_lines, driver));
    std::istringstream half_a_line(text.substr(0, end));
    EXPECT_THROW(replay_trace(half_a_line, driver), std::invalid_argument);
    EXPECT_EQ(driver.alive(), CountingDriver::Alive{});
  }
}

TEST_P(Trace, WithALineMissingOrTwiceIsPlayedOrRefusedButReachesNoDriverWrongly) {
  const std::string text = trace_of(GetParam(), Layout::kNHD);
  std::vector<std::string> lines;
  std::istringstream all(text);
  for (std::string line; std::getline(all, line);) lines.push_back(line + "\n");
  for (std::size_t at = 1; at < lines.size(); ++at) {
    for (const bool twice : {false, true}) {
      std::string changed;
      for (std::size_t i = 0; i < lines.size(); ++i) {
        if (i != at || twice) changed += lines[i];
        if (i == at && twice) changed += lines[i];
      }
      CountingDriver driver(open_null_driver());
      std::istringstream trace(changed);
      try {
        replay_trace(trace, driver);
      } catch (const std::invalid_argument& error) {
        EXPECT_EQ(std::string(error.what()).rfind("trace, line ", 0), 0U) << error.what();
      }
      EXPECT_EQ(driver.alive(), CountingDriver::Alive{});
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Every, Trace, testing::ValuesIn(every_driver()), name_of_driver);

void expect_refused(const std::string& text, const std::string& words) {
  CountingDriver driver(open_null_driver());
  std::istringstream trace(text);
  try {
    replay_trace(trace, driver);
    ADD_FAILURE() << "not refused: " << text;
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
  EXPECT_EQ(driver.alive(), CountingDriver::Alive{}) << text;
}

TEST(TraceReplay, HostileTracesAreRefusedWithTheLine) {
  const std::string header = "vattn-trace 1 dropped=0\n";
  const std::string range = header + "reserve 8192 fault = 10000\n";
  const std::string page = range + "create 4096 10000 = 1\n";
  const std::string mapped = page + "map 10000 4096 1\n";
  expect_refused("", "line 1: the trace is empty");
  expect_refused("vattn-trace 2\n", "line 1: the header");
  expect_refused("vattn-trace 1 dropped=7\n", "line 1: 7 lines were dropped");
  expect_refused("vattn-trace 1 dropped=\n", "line 1: ''");
  expect_refused(header + "sing 1\n", "line 2: no verb is called 'sing'");
  expect_refused(header + "\n", "line 2: no verb is called ''");
  expect_refused(header + "reserve\n", "line 2: truncated");
  expect_refused(header + "reserve 4096 fault\n", "line 2: truncated");
  expect_refused(header + "reserve 4096 maybe = 1\n", "line 2: 'maybe' is neither");
  expect_refused(header + "reserve 4096 fault > 1\n", "line 2: '= result'");
  expect_refused(header + "reserve 0 fault = 1\n", "line 2: size 0");
  expect_refused(header + "reserve 18446744073709551616 fault = 1\n", "line 2: '18446744073709551616' is no number");
  expect_refused(header + "reserve -1 fault = 1\n", "line 2: '-1' is no number");
  expect_refused(header + "reserve 18446744073709547520 fault = 1\n", "line 2: more addresses");
  expect_refused(header + "reserve 8192 fault = fffffffffffff000\n", "line 2: a reservation that overlaps");
  expect_refused(header + "synchronize now\n", "line 2: more than synchronize takes: 'now'");
  expect_refused(header + "synchronize \n", "line 2: more than synchronize takes: ''");
  expect_refused(header + "synchronize\r\n", "line 2: a byte that is no text, 13");
  expect_refused(header + "synchronize", "line 2: truncated");
  expect_refused(header + std::string(300, 'x') + "\n", "line 2: longer than");
  expect_refused(header + "drop 1 ! DriverError\n", "line 2: more than drop takes");
  expect_refused(range + "reserve 4096 fault = 11000\n", "line 3: a reservation that overlaps");
  expect_refused(range + "release_range 10000 4096\n", "line 3: no reservation");
  expect_refused(range + "create 4095 0 = 1\n", "line 3: size 4095");
  expect_refused(range + "create 1099511627776 0 = 1\n", "line 3: more memory than");
  expect_refused(range + "map 10000 4096 1\n", "line 3: a page that the trace did not create");
  expect_refused(page + "create 4096 0 = 1\n", "line 4: a page that exists");
  expect_refused(page + "map 11001 4096 1\n", "line 4: 4096 bytes at an address that is not inside");
  expect_refused(page + "map 10001 4096 1\n", "line 4: an address that is not on the granularity");
  expect_refused(page + "map 10000 8192 1\n", "line 4: the page has another size");
  expect_refused(page + "unmap 10000 4096\n", "line 4: nothing is mapped");
  expect_refused(mapped + "map 10000 4096 1\n", "line 5: mapped already");
  expect_refused(mapped + "unmap 10000 8192\n", "line 5: not all of it is mapped");
  expect_refused(mapped + "unmap 10000 100\n", "line 5: a mapping is cut");
  expect_refused(mapped + "unmap 10000 0\n", "line 5: size 0");
  expect_refused(mapped + "fill_zero 10000 1\n", "line 5: memory without access");
  expect_refused(mapped + "set_access 10000 4096\ncopy 10000 10001 8\n", "line 6: the two overlap");
  expect_refused(mapped + "release_range 10000 8192\n", "line 5: no reservation");
  expect_refused(mapped + "release 1\nrelease 1\n", "line 6: a page that the trace did not create");
  expect_refused(header + "wait 1\n", "line 2: a fence");
  expect_refused(header + "record 0 = 1\nrecord 0 = 1\n", "line 3: a fence that exists");
  expect_refused(header + "record 0 = 1\ndrop 1\ndrop 1\n", "line 4: a fence");
}

TEST(TraceReplay, WhatTheDriverThrowsGoesThroughWithItsLine) {
  FaultDriver driver(open_null_driver());
  driver.arm({.call = 2});
  std::istringstream trace("vattn-trace 1 dropped=0\nreserve 4096 fault = 10000\ncreate 4096 0 = 1\nrelease 1\n");
  std::uint64_t line = 0;
  EXPECT_THROW(replay_trace(trace, driver, {}, &line), DriverError);
  EXPECT_EQ(line, 3U);
}

TEST(TraceDriverTest, KeepsTheLastLinesAndSaysHowManyItDropped) {
  TraceDriver driver(open_null_driver(), 2);
  const Address base = driver.reserve(4096, UnmappedReads::kFault);
  const PageHandle page = driver.create(4096, base);
  driver.map(base, 4096, page);
  EXPECT_THROW(driver.release(99), std::invalid_argument);
  EXPECT_EQ(driver.dropped(), 2U);
  EXPECT_EQ(driver.text(),
            "vattn-trace 1 dropped=2\n"
            "map 100000000 4096 1\n"
            "release 63 ! invalid_argument\n");
  driver.unmap(base, 4096);
}

TEST(TraceDriverTest, WritesToAStreamAtOnce) {
  std::ostringstream out;
  TraceDriver driver(open_null_driver(), out);
  static_cast<void>(driver.reserve(4096, UnmappedReads::kFault));
  driver.synchronize();
  EXPECT_EQ(out.str(), "vattn-trace 1 dropped=0\nreserve 4096 fault = 100000000\nsynchronize\n");
}

/// Fails the next call with an error of the test's choosing.
class Refusing final : public Decorator {
 public:
  Refusing() : Decorator(open_null_driver()) {}
  std::function<void()> refuse{};

 protected:
  void before(Verb /*verb*/) override {
    if (refuse) std::exchange(refuse, nullptr)();
  }
};

TEST(TraceDriverTest, NamesWhatWasThrown) {
  const auto refusing = std::make_shared<Refusing>();
  TraceDriver driver(refusing);
  refusing->refuse = [] { throw OutOfMemoryError("full", 1, 0, 0); };
  EXPECT_THROW(driver.synchronize(), OutOfMemoryError);
  refusing->refuse = [] { throw ClosedError("closed"); };
  EXPECT_THROW(driver.synchronize(), ClosedError);
  refusing->refuse = [] { throw std::runtime_error("anything else"); };
  EXPECT_THROW((void)driver.create(4096, 0), std::runtime_error);
  EXPECT_EQ(driver.text(),
            "vattn-trace 1 dropped=0\n"
            "synchronize ! OutOfMemoryError\n"
            "synchronize ! ClosedError\n"
            "create 4096 0 ! other\n");
}

TEST(TraceDriverTest, WritesDownFencesAndCopies) {
  if (!cuda::on_fake()) GTEST_SKIP() << "runs on streams of the fake";
  fake_cuda_reset();
  const Stream stream = fake_cuda_stream_create(0);
  const Stream other = fake_cuda_stream_create(0);
  {
    std::ostringstream out;
    TraceDriver driver(open_cuda_driver(0), out);
    const std::size_t size = driver.traits().default_page_size;
    const Address base = driver.reserve(size, UnmappedReads::kFault);
    const PageHandle page = driver.create(size, 0);
    driver.map(base, size, page);
    driver.set_access(base, size);
    out.str("");
    const FenceHandle fence = driver.record(stream);
    driver.wait_on(other, fence);
    driver.wait(fence);
    EXPECT_TRUE(driver.has_passed(fence));
    EXPECT_FALSE(driver.is_capturing(stream));
    driver.drop(fence);
    driver.copy(base, base + 64, 32);
    std::ostringstream expected;
    expected << std::hex << "record " << stream << " = " << fence << "\nwait_on " << other << " " << fence << "\nwait " << fence
             << "\nhas_passed " << fence << " = 1\nis_capturing " << stream << " = 0\ndrop " << fence << "\ncopy " << base
             << " " << base + 64 << " 32\n";
    EXPECT_EQ(out.str(), expected.str());
    driver.unmap(base, size);
    driver.release(page);
    driver.release_range(base, size);
  }
  fake_cuda_stream_destroy(stream);
  fake_cuda_stream_destroy(other);
}

}  // namespace
}  // namespace vattn
