// R5, isolation: in a cache with scrub a slot is read whole before it is written, over 10,000 changes of owner on one pool:
// 0 bytes of anybody else. Slots change hands warm and cold, ahead of their length and not; pages come from the other cache,
// from a cache without scrub, from a tensor, left behind by a growth that failed, and fresh (the fake hands out fresh pages
// full of 0xFF).
#include <cstring>
#include <random>

#include "drivers_under_test.hpp"
#include "soak.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr int kSwitches = kSanitized ? 1000 : 10000;
constexpr std::uint64_t kNobody = 0xABABABABABABABAB;  // what is written where nothing is scrubbed

/// A request, and how far it has been: behind that it may see nothing but zeros, before it its own words.
struct Request {
  std::int64_t slot;
  std::uint64_t owner;
  std::int64_t length = 0;
  std::int64_t reached = 0;
};

class Isolation : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void SetUp() override {
    if (GetParam().name == "cuda" && cuda::on_fake()) {
      fake_cuda_reset();
      fake_cuda_set_granularity(4096, 4096);
    }
    const Instrumented made(GetParam());
    faults_ = made.faults;
    driver_ = made.counts;
    page_ = driver_->traits().granularity;
  }
  void TearDown() override {
    EXPECT_EQ(driver_->alive(), CountingDriver::Alive{});
    driver_.reset();
    faults_.reset();
    if (GetParam().name != "cuda" || !cuda::on_fake()) return;
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
    fake_cuda_reset();
  }

  /// Four tokens a page where keys and heads lie together.
  [[nodiscard]] CacheConfig shape(Layout layout) const {
    CacheConfig config{.num_layers = 2, .num_kv_heads = 2, .head_dim = 0, .max_batch_size = 4, .max_seq_len = 40};
    config.head_dim = static_cast<std::int64_t>(page_ / 8);
    config.dtype = DType::kUInt8;
    config.layout = layout;
    config.lookahead_tokens = 0;
    return config;
  }

  /// Calls `visit(address, bytes)` for tokens [from, to) of a slot: every run of neighbouring bytes of every layer, K and V.
  template <typename Visit>
  static void each_run(const KVCache& cache, std::int64_t slot, std::int64_t from, std::int64_t to, Visit&& visit) {
    if (from >= to) return;
    const bool head_major = cache.geometry().layout() == Layout::kHND;
    for (std::int64_t layer = 0; layer < cache.geometry().config().num_layers; ++layer) {
      const auto views = cache.layer(layer);
      for (const auto& view : {views.k, *views.v}) {
        const std::int64_t token = head_major ? view.shape[3] : view.strides[1];
        for (std::int64_t head = 0; head < (head_major ? view.shape[2] : 1); ++head) {
          const auto start = view.address + static_cast<Address>(slot * view.strides[0] + head * view.strides[2]);
          visit(start + static_cast<Address>(from * token), static_cast<std::size_t>((to - from) * token));
        }
      }
    }
  }
  /// Bytes of tokens [from, to) that are neither zero nor, where the owner may have left some, the owner's.
  std::uint64_t foreign(const KVCache& cache, std::int64_t slot, std::int64_t from, std::int64_t to, std::uint64_t owner) {
    std::uint64_t count = 0;
    each_run(cache, slot, from, to, [&](Address at, std::size_t size) {
      words_.resize(size / 8);
      GetParam().read(words_.data(), at, size);
      for (const std::uint64_t word : words_) count += word != 0 && word != owner ? 8 : 0;
      read_bytes_ += size;
    });
    return count;
  }
  void write(const KVCache& cache, std::int64_t slot, std::int64_t from, std::int64_t to, std::uint64_t owner) {
    each_run(cache, slot, from, to, [&](Address at, std::size_t size) {
      words_.assign(size / 8, owner);
      GetParam().write(at, words_.data(), size);
    });
  }

  std::shared_ptr<FaultDriver> faults_;
  std::shared_ptr<CountingDriver> driver_;
  std::uint64_t page_ = 0;
  std::vector<std::uint64_t> words_;
  std::uint64_t read_bytes_ = 0;
};

TEST_P(Isolation, ARequestOfAScrubbedCacheSeesNobodyElsesBytesWhereverItsPagesComeFrom) {
  const bool on_fake = GetParam().name == "cuda" && cuda::on_fake();
  const int switches =
      GetParam().name == "cuda" && !on_fake ? kSwitches / 20 : kSwitches;  // a GPU's pages are 512 times as large
  const auto pool = PagePool::make(Device{}, driver_, page_, 150 * page_);
  CacheConfig first = shape(Layout::kNHD);
  first.scrub = true;
  first.lookahead_tokens = 8;  // a mapper, that also warms
  CacheConfig second = shape(Layout::kHND);
  second.scrub = true;
  second.guard_tokens = 1;
  KVCache one(first, pool);
  KVCache other(second, pool);
  KVCache careless(shape(Layout::kNHD), pool);
  GrowableTensor tensor({.row_shape = {static_cast<std::int64_t>(page_)}, .max_rows = 60, .dtype = DType::kUInt8}, pool);
  const Stream stream = on_fake ? fake_cuda_stream_create(0) : 0;
  const std::optional<Stream> named = on_fake ? std::optional(stream) : std::nullopt;
  std::array<std::vector<Request>, 2> requests;
  const std::array<KVCache*, 2> caches{&one, &other};
  std::mt19937 random(Soak::first_seed());
  const auto pick = [&](std::int64_t count) { return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(count)); };
  std::uint64_t owner = 0;
  std::uint64_t seen = 0;
  std::uint64_t refused = 0;
  int done = 0;
  const Soak soak(GetParam().name == "host" ? 0.06 : 0.04);
  const auto grow = [&](KVCache& cache, Request& request) {
    const std::int64_t longer = std::min<std::int64_t>(40, request.length + 1 + pick(pick(3) == 0 ? 40 : 6));
    if (pick(8) == 0) {  // where no page can be made, the pages of others serve as they are
      faults_->arm(
          {static_cast<std::uint64_t>(1 + pick(6)), pick(2) == 0, pick(3) == 0 ? Verb::kMap : Verb::kCreate, 5, "EIO", true});
    }
    try {
      cache.step({{request.slot, longer}});
    } catch (const OutOfMemoryError&) {
      ++refused;
      faults_->disarm();
      return;
    }
    faults_->disarm();
    const std::int64_t known = std::min(longer, request.reached);
    seen += foreign(cache, request.slot, request.length, known, request.owner);
    seen += foreign(cache, request.slot, std::max(known, request.length), longer, 0);
    write(cache, request.slot, request.length, longer, request.owner);
    request.length = longer;
    request.reached = std::max(request.reached, longer);
  };
  const auto drop = [&](KVCache& cache, std::vector<Request>& of, std::size_t which) {
    const Request& request = of[which];
    EXPECT_EQ(foreign(cache, request.slot, 0, request.length, request.owner), 0U);
    if (on_fake && request.length != 0 && pick(4) == 0) {
      each_run(cache, request.slot, 0, request.length,
               [&](Address at, std::size_t size) { fake_cuda_kernel_begin_on(stream, at, size, pick(100)); });
    }
    cache.free(request.slot, named);
    of.erase(of.begin() + static_cast<std::ptrdiff_t>(which));
  };
  while ((done < switches || soak.goes_on()) && !HasFailure()) {
    const auto which = static_cast<std::size_t>(pick(2));
    KVCache& cache = *caches[which];
    std::vector<Request>& mine = requests[which];
    switch (pick(12)) {
      case 0: {  // somebody who scrubs nothing uses the pages
        const std::int64_t slot = careless.alloc({}, named);
        const std::int64_t tokens = 1 + pick(40);
        try {
          careless.step({{slot, tokens}});
          write(careless, slot, 0, tokens, kNobody);
        } catch (const OutOfMemoryError&) {
          ++refused;
        }
        careless.free(slot, named);
        break;
      }
      case 1:
        try {
          tensor.resize(pick(40));
          words_.assign(page_ / 8, kNobody);
          for (std::int64_t row = 0; row < tensor.rows(); ++row) {
            GetParam().write(tensor.view().address + static_cast<Address>(row) * page_, words_.data(), page_);
          }
        } catch (const OutOfMemoryError&) {
          ++refused;
        }
        tensor.resize(0);
        break;
      case 2:
        pool->set_memory_limit(static_cast<std::int64_t>((60 + static_cast<std::uint64_t>(pick(100))) * page_));
        break;
      case 3:
        if (mine.empty()) break;
        if (Request& request = mine[static_cast<std::size_t>(pick(static_cast<std::int64_t>(mine.size())))];
            request.length != 0) {
          request.length = pick(request.length);
          cache.truncate(request.slot, request.length, named);
        }
        break;
      case 4:  // what batch shows behind a length
        if (mine.empty()) break;
        if (Request& request = mine.front(); request.length != 0) {
          const std::vector<std::int64_t> slots{request.slot};
          const std::int64_t shown = std::max(request.length, cache.committed_len(request.slot));
          try {
            static_cast<void>(cache.batch(0, slots, shown));
            seen += foreign(cache, request.slot, request.length, std::min(shown, request.reached), request.owner);
            seen += foreign(cache, request.slot, std::max(request.length, request.reached), shown, 0);
          } catch (const std::invalid_argument&) {  // look-ahead was taken back meanwhile
          } catch (const OutOfMemoryError&) {
            ++refused;
          }
        }
        break;
      case 5:
      case 6:
        if (mine.size() == 4) {
          drop(cache, mine, static_cast<std::size_t>(pick(4)));
          break;
        }
        [[fallthrough]];
      case 7:
        if (mine.size() < 4) {
          mine.push_back({cache.alloc(pick(40), named), ++owner});
          ++done;
          grow(cache, mine.back());
        }
        break;
      case 8:
        if (!mine.empty()) drop(cache, mine, static_cast<std::size_t>(pick(static_cast<std::int64_t>(mine.size()))));
        break;
      default:
        if (!mine.empty()) grow(cache, mine[static_cast<std::size_t>(pick(static_cast<std::int64_t>(mine.size())))]);
    }
    ASSERT_EQ(seen, 0U) << "bytes of others, after " << done << " requests";
  }
  EXPECT_GT(refused, 10U) << "the pool was never short of pages, so they hardly moved";
  RecordProperty("owner_switches_" + GetParam().name, done);
  RecordProperty("foreign_bytes_" + GetParam().name, static_cast<int>(seen));
  RecordProperty("MiB_read_before_written_" + GetParam().name, static_cast<int>(read_bytes_ >> 20));
  one.close();
  other.close();
  careless.close();
  tensor.close();
  pool->close();
  if (on_fake) fake_cuda_stream_destroy(stream);
}

/// That the test above can see what it looks for.
TEST_P(Isolation, WithoutScrubTheNextRequestOfASlotSeesTheLastOnesBytes) {
  KVCache cache(
      [&] {
        CacheConfig config = shape(Layout::kNHD);
        config.page_size = static_cast<std::int64_t>(page_);
        config.memory_limit = static_cast<std::int64_t>(40 * page_);
        return config;
      }(),
      Device{}, driver_);
  const std::int64_t slot = cache.alloc();
  cache.step({{slot, 8}});
  write(cache, slot, 0, 8, 7);
  cache.free(slot);
  EXPECT_EQ(cache.alloc(8), slot);
  cache.step({{slot, 8}});
  EXPECT_GT(foreign(cache, slot, 0, 8, 0), 0U);
}

INSTANTIATE_TEST_SUITE_P(Every, Isolation, testing::Values(every_driver()[0], every_driver()[1]), name_of_driver);

}  // namespace
}  // namespace vattn
