// R8, concurrency: threads step, truncate, free, ask, move the limit, make and close members and fail driver calls, all at
// once, on two caches (one scrubbed) and a tensor of one pool, with mappers at work. Twenty seconds a driver on each change, a
// minute in all, and as long as VATTN_SOAK_MINUTES gives; every token keeps what its thread wrote, the counts add up, nobody
// hangs (the watchdog) and, under ThreadSanitizer, nothing races.
#include <atomic>
#include <mutex>
#include <random>
#include <thread>

#include "drivers_under_test.hpp"
#include "soak.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr double kSeconds = 20;
constexpr std::int64_t kTokens = 16;  // a page holds

/// A request of one thread.
struct Mine {
  std::int64_t slot;
  std::int64_t length;
  unsigned tag;
};

class Threads : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void SetUp() override {
    if (GetParam().name != "cuda" || !cuda::on_fake()) return;
    fake_cuda_reset();
    fake_cuda_set_granularity(4096, 4096);
  }
  void TearDown() override {
    if (GetParam().name != "cuda" || !cuda::on_fake()) return;
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
    fake_cuda_reset();
  }

  [[nodiscard]] static CacheConfig shape(std::size_t page, bool scrub) {
    CacheConfig config{.num_layers = 1, .num_kv_heads = 1, .head_dim = 0, .max_batch_size = 8, .max_seq_len = kTokens * 12};
    config.head_dim = static_cast<std::int64_t>(page) / kTokens;
    config.dtype = DType::kUInt8;
    config.layout = Layout::kNHD;
    config.lookahead_tokens = 24;
    config.scrub = scrub;
    return config;
  }

  static unsigned char mark(const Mine& mine, std::int64_t token) {
    return static_cast<unsigned char>(1 + (mine.tag * 31 + static_cast<unsigned>(mine.slot * 7 + token)) % 255);
  }
  /// The last byte of a token, of K and of V.
  static std::array<Address, 2> places(KVCache& cache, std::int64_t slot, std::int64_t token) {
    const auto views = cache.layer(0);
    const auto at = [&](const TensorView<4>& view) {
      return view.address + static_cast<Address>(slot * view.strides[0] + (token + 1) * view.strides[1] - 1);
    };
    return {at(views.k), at(*views.v)};
  }
  void write(KVCache& cache, const Mine& mine, std::int64_t from) const {
    if (!GetParam().write) return;
    for (std::int64_t token = from; token < mine.length; ++token) {
      const unsigned char byte = mark(mine, token);
      for (const Address at : places(cache, mine.slot, token)) GetParam().write(at, &byte, 1);
    }
  }
  [[nodiscard]] std::uint64_t wrong(KVCache& cache, const Mine& mine) const {
    if (!GetParam().read) return 0;
    std::uint64_t count = 0;
    for (std::int64_t token = 0; token < mine.length; ++token) {
      for (const Address at : places(cache, mine.slot, token)) {
        unsigned char byte = 0;
        GetParam().read(&byte, at, 1);
        count += byte != mark(mine, token) ? 1 : 0;
      }
    }
    return count;
  }

  /// One thread's requests, until told to stop; then all are freed.
  void decode(KVCache& cache, unsigned seed) {
    std::mt19937 random(Soak::first_seed() + seed);
    const auto pick = [&](std::int64_t count) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(count));
    };
    std::vector<Mine> mine;
    while (!stop_ || !mine.empty()) {
      ++operations_;
      Mine* const one = mine.empty() ? nullptr : &mine[static_cast<std::size_t>(pick(static_cast<std::int64_t>(mine.size())))];
      try {
        const std::int64_t what = stop_ ? 9 : pick(10);
        if (what < 2 || one == nullptr) {
          if (mine.size() < 3) mine.push_back({cache.alloc(pick(64)), 0, static_cast<unsigned>(random())});
        } else if (what < 6) {
          const std::int64_t before = one->length;
          const std::int64_t longer = std::min(kTokens * 12, before + pick(24));
          cache.step({{one->slot, longer}});
          one->length = longer;
          write(cache, *one, before);
        } else if (what == 6) {
          const std::int64_t shorter = pick(one->length + 1);
          cache.truncate(one->slot, shorter);
          one->length = shorter;
        } else if (what == 7) {
          const CacheStats stats = cache.stats();
          if (stats.created_bytes != stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes) ++broken_;
        } else if (what == 8) {
          if (wrong(cache, *one) != 0 || cache.seq_len(one->slot) != one->length) ++broken_;
        } else {
          if (wrong(cache, *one) != 0) ++broken_;
          cache.free(one->slot);
          *one = mine.back();
          mine.pop_back();
        }
      } catch (const OutOfMemoryError&) {
        ++refused_;
        if (one != nullptr && wrong(cache, *one) != 0) ++broken_;
      } catch (const DriverError&) {
        ++failed_;
      } catch (const NoFreeSlotError&) {
      }
    }
  }

  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> operations_{0};
  std::atomic<std::uint64_t> refused_{0};
  std::atomic<std::uint64_t> failed_{0};
  std::atomic<std::uint64_t> broken_{0};
};

TEST_P(Threads, DoWhateverTheyLikeAtOnceAndEveryTokenKeepsItsBytes) {
  const Instrumented driver(GetParam());
  const std::size_t page = driver.counts->traits().granularity;
  const auto pool = PagePool::make(Device{}, driver.counts, page, 64 * page);
  auto one = std::make_unique<KVCache>(shape(page, false), pool);
  auto other = std::make_unique<KVCache>(shape(page, true), pool);
  auto tensor = std::make_unique<GrowableTensor>(
      GrowableTensor::Config{.row_shape = {static_cast<std::int64_t>(page)}, .max_rows = 32, .dtype = DType::kUInt8}, pool);
  std::mutex arming;
  std::vector<std::thread> threads;
  for (unsigned seed = 1; seed <= 4; ++seed) {
    threads.emplace_back([&, seed] { decode(seed % 2 == 0 ? *one : *other, seed); });
  }
  threads.emplace_back([&] {  // the operator: limits, figures, a tensor
    std::mt19937 random(5);
    while (!stop_) {
      ++operations_;
      try {
        tensor->resize(static_cast<std::int64_t>(random() % 16));
        pool->set_memory_limit(static_cast<std::int64_t>((40 + random() % 24) * page));
        one->settle();
      } catch (const OutOfMemoryError&) {
        ++refused_;
      } catch (const DriverError&) {
        ++failed_;
      }
      const PoolStats stats = pool->stats();
      if (stats.created_bytes != stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes) ++broken_;
    }
  });
  threads.emplace_back([&] {  // members that come and go
    std::mt19937 random(6);
    while (!stop_) {
      ++operations_;
      std::unique_ptr<KVCache> guest;
      const auto quietly = [&](auto&& call) {  // what a close cannot give back is lost and reported: another test's subject
        const std::lock_guard lock(arming);
        driver.faults->disarm();
        call();
      };
      quietly([&] { guest = std::make_unique<KVCache>(shape(page, random() % 2 == 0), pool); });
      try {
        guest->step({{guest->alloc(), static_cast<std::int64_t>(random() % 40)}});
      } catch (const OutOfMemoryError&) {
        ++refused_;
      } catch (const DriverError&) {
        ++failed_;
      }
      quietly([&] { guest->close(); });
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  });
  std::mt19937 random(7);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::max(kSeconds, 0.05 * Soak::seconds()));
  while (std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    constexpr std::array kVerbs{Verb::kCreate, Verb::kMap, Verb::kUnmap, Verb::kSetAccess};
    const std::lock_guard lock(arming);
    driver.faults->arm({1 + random() % 20, false, kVerbs[random() % kVerbs.size()], 5, "EIO", random() % 2 == 0});
    if (broken_ != 0) break;
  }
  driver.faults->disarm();
  stop_ = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(broken_, 0U);
  EXPECT_GT(operations_, 1000U);
  RecordProperty("operations_" + GetParam().name, std::to_string(operations_));
  RecordProperty("refused_for_memory_" + GetParam().name, std::to_string(refused_));
  RecordProperty("met_a_failure_" + GetParam().name, std::to_string(failed_));
  tensor->resize(0);
  const PoolStats stats = pool->stats();
  EXPECT_EQ(stats.available_bytes, stats.limit_bytes);
  EXPECT_EQ(stats.mapped_bytes, stats.reclaimable_bytes);
  one.reset();
  other.reset();
  tensor.reset();
  pool->close();
  EXPECT_EQ(driver.counts->alive(), CountingDriver::Alive{});
}

INSTANTIATE_TEST_SUITE_P(Every, Threads, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
