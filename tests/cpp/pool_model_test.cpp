// R3 and R4: two caches and a tensor on one pool, driven at random and compared with a model: what each was promised. A million
// operations on each change, 0 divergences; VATTN_MODEL_SEED, or a soak, sets the first seed.
//
// The model is the promises alone: lengths, and the pages they need. After every operation the lengths are the model's, the
// counts add up, promised bytes are there and hold what was written, and a step fails for want of memory exactly when the
// promises would exceed the limit. In a scrubbed cache with a guard everything behind a length is zero. Driver calls fail on
// purpose now and then; what fails changes nothing.
#include <cstring>
#include <map>
#include <random>

#include "drivers_under_test.hpp"
#include "soak.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr std::int64_t kPage = 4096;
constexpr std::int64_t kStride = 1024;  // every byte that ends as many is looked at, so every page's last is

struct Slot {
  std::int64_t length = 0;
  std::int64_t promised = 0;  // tokens: a batch may have been shown more than the length
  unsigned tag = 0;           // of the request, so that no two requests write the same
};

/// A cache and what it was asked for.
struct Member {
  Member(const CacheConfig& config, const std::shared_ptr<PagePool>& pool)
      : cache(std::make_unique<KVCache>(config, pool)), has_memory(pool->driver()->traits().has_memory) {
    for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
      const auto views = cache->layer(layer);
      bases.push_back(views.k);
      if (views.v) bases.push_back(*views.v);
    }
  }

  [[nodiscard]] const Geometry& geometry() const { return cache->geometry(); }
  [[nodiscard]] std::int64_t pages_for(std::int64_t tokens) const {
    const std::int64_t k = geometry().pages_for(geometry().k(), tokens);
    const std::int64_t v = geometry().has_v() ? geometry().pages_for(geometry().v(), tokens) : 0;
    return (k + v) * geometry().groups() * geometry().rows_per_slot();
  }
  [[nodiscard]] std::int64_t promised_pages() const {
    std::int64_t pages = 0;
    for (const auto& [slot, state] : slots) pages += pages_for(state.promised);
    return pages;
  }

  /// Calls `visit(byte, tag)` for the bytes looked at in tokens [from, to) of a slot, `tag` being what should be written there.
  template <typename Visit>
  void each_byte(std::int64_t slot, unsigned tag, std::int64_t from, std::int64_t to, Visit&& visit) {
    if (!has_memory) return;
    unsigned row = 0;
    for (const auto& base : bases) {
      const bool head_major = geometry().layout() == Layout::kHND;
      const std::int64_t rows = head_major ? base.shape[2] : 1;
      const std::int64_t token_bytes = head_major ? base.shape[3] : base.strides[1];
      for (std::int64_t head = 0; head < rows; ++head, ++row) {
        const Address start = base.address + static_cast<Address>(slot * base.strides[0] + head * base.strides[2]);
        auto* const bytes = reinterpret_cast<unsigned char*>(start);  // NOLINT(performance-no-int-to-ptr)
        for (std::int64_t at = (from * token_bytes) / kStride * kStride + kStride - 1; at < to * token_bytes; at += kStride) {
          visit(bytes[at], static_cast<unsigned char>(1 + (tag + 7 * row + static_cast<unsigned>(at / kStride)) % 251));
        }
      }
    }
  }
  void write(std::int64_t slot, std::int64_t from, std::int64_t to) {
    each_byte(slot, slots.at(slot).tag, from, to, [](unsigned char& byte, unsigned char tag) { byte = tag; });
  }
  [[nodiscard]] std::size_t wrong(std::int64_t slot) {
    std::size_t count = 0;
    const Slot& state = slots.at(slot);
    each_byte(slot, state.tag, 0, state.length, [&](unsigned char byte, unsigned char tag) { count += byte != tag ? 1 : 0; });
    return count;
  }
  /// Bytes behind the length that are not zero, as far as they are promised: none in a cache with a guard.
  [[nodiscard]] std::size_t not_zero(std::int64_t slot, std::int64_t from) {
    const std::int64_t guard = geometry().config().guard_tokens;
    if (guard == 0 || slots.at(slot).promised == 0) return 0;
    std::size_t count = 0;
    each_byte(slot, 0, from, slots.at(slot).promised + guard,
              [&](unsigned char byte, unsigned char) { count += byte != 0 ? 1 : 0; });
    return count;
  }

  std::unique_ptr<KVCache> cache;
  bool has_memory;
  std::vector<TensorView<4>> bases{};
  std::map<std::int64_t, Slot> slots{};
};

class Model {
 public:
  Model(const DriverUnderTest& driver, unsigned seed, bool ahead) : driver_(driver), random_(seed) {
    pool_ = PagePool::make(Device{}, driver_.counts, kPage, limit_ * kPage);
    CacheConfig config{.num_layers = 2, .num_kv_heads = 1, .head_dim = 700, .max_batch_size = 5, .max_seq_len = 60};
    config.dtype = DType::kUInt8;
    config.layout = Layout::kNHD;
    config.v_head_dim = 2100;  // rows of K and V of different pages, tokens that span pages
    config.lookahead_tokens = ahead ? 9 : 0;
    members_.push_back(std::make_unique<Member>(config, pool_));
    config = {.num_layers = 1, .num_kv_heads = 2, .head_dim = 512, .max_batch_size = 4, .max_seq_len = 100};
    config.dtype = DType::kUInt8;
    config.layout = Layout::kHND;
    config.scrub = true;
    config.guard_tokens = 3;
    config.lookahead_tokens = ahead ? 200 : 0;  // more than a request can have
    members_.push_back(std::make_unique<Member>(config, pool_));
    tensor_ = std::make_unique<GrowableTensor>(
        GrowableTensor::Config{.row_shape = {1500}, .max_rows = 40, .dtype = DType::kUInt8}, pool_);
  }

  void run(int operations) {
    for (int i = 0; i < operations && !testing::Test::HasFailure(); ++i) {
      if (pick(200) == 0) arm();
      if (armed_ && pick(6) == 0) disarm();
      operation_ = i;
      operate();
      verify(i % 64 == 0);
    }
    if (testing::Test::HasFailure()) return;
    disarm();
    members_.clear();
    tensor_.reset();
    pool_->close();
    EXPECT_EQ(driver_.counts->alive(), CountingDriver::Alive{});
  }

  [[nodiscard]] std::uint64_t refusals() const { return refusals_; }
  [[nodiscard]] std::uint64_t failures() const { return failures_; }
  [[nodiscard]] int operation() const { return operation_; }

 private:
  [[nodiscard]] std::int64_t pick(std::int64_t count) {
    return static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(count));
  }

  void arm() {
    FaultDriver::Fault fault;
    fault.call = static_cast<std::uint64_t>(1 + pick(30));
    fault.sticky = pick(3) == 0;
    fault.out_of_memory = pick(3) == 0;
    constexpr Verb kVerbs[] = {Verb::kCreate,    Verb::kRelease,  Verb::kMap,        Verb::kUnmap,
                               Verb::kSetAccess, Verb::kFillZero, Verb::kSynchronize};
    if (const std::int64_t which = pick(8); which < 7) fault.verb = kVerbs[which];
    driver_.faults->arm(fault);
    armed_ = true;
    clean_ = false;
  }
  void disarm() {
    driver_.faults->disarm();
    armed_ = false;
  }

  [[nodiscard]] std::int64_t promised() const {
    std::int64_t pages = (rows_ * 1500 + kPage - 1) / kPage;
    for (const auto& member : members_) pages += member->promised_pages();
    return pages;
  }

  /// True if it succeeded. Only what the model says has no room, or what meets a fault, may fail.
  template <typename Call>
  bool attempt(const char* what, bool has_room, Call&& call) {
    try {
      call();
      EXPECT_TRUE(has_room) << what << " should not have had memory: " << promised() << " pages of " << limit_;
      return true;
    } catch (const OutOfMemoryError& error) {
      EXPECT_TRUE(!has_room || armed_) << what << ": " << error.what();
      ++(has_room ? failures_ : refusals_);
    } catch (const DriverError& error) {
      EXPECT_TRUE(armed_) << what << ": " << error.what();
      ++failures_;
    }
    return false;
  }

  void operate() {
    Member& member = *members_[static_cast<std::size_t>(pick(2))];
    switch (const std::int64_t what = pick(100); what) {
      case 0:
        return lower_or_raise();
      case 1:
        return member.cache->settle();
      case 2:
      case 3:
      case 4:
      case 5:
        return resize();
      default:
        if (what < 20) return alloc(member);
        if (member.slots.empty()) return;
        if (what < 30) return free(member);
        if (what < 45) return truncate(member);
        if (what < 50) return batch(member);
        return step(member);
    }
  }

  std::int64_t any_slot(Member& member) {
    return std::next(member.slots.begin(), pick(static_cast<std::int64_t>(member.slots.size())))->first;
  }

  void lower_or_raise() {
    limit_ = static_cast<std::uint64_t>(20 + pick(140));
    pool_->set_memory_limit(static_cast<std::int64_t>(limit_ * kPage));
    clean_ = !armed_;
  }

  void resize() {
    const std::int64_t rows = pick(41);
    const auto before = rows_;
    rows_ = rows;
    const bool has_room = rows <= before || (rows * 1500 + kPage - 1) / kPage == (before * 1500 + kPage - 1) / kPage ||
                          promised() <= static_cast<std::int64_t>(limit_);
    if (!attempt("resize", has_room, [&] { tensor_->resize(rows); })) {
      rows_ = before;
      return;
    }
    if (!driver_.counts->traits().has_memory) return;
    auto* const bytes = reinterpret_cast<unsigned char*>(tensor_->view().address);  // NOLINT(performance-no-int-to-ptr)
    for (std::int64_t row = before; row < rows; ++row) bytes[row * 1500 + 1499] = static_cast<unsigned char>(row + 1);
  }

  void alloc(Member& member) {
    const auto count = member.geometry().config().max_batch_size;
    if (static_cast<std::int64_t>(member.slots.size()) == count) return;
    std::int64_t slot = -1;
    if (!attempt("alloc", true, [&] { slot = member.cache->alloc(pick(50)); })) return;
    ASSERT_EQ(member.slots.count(slot), 0U);
    member.slots[slot] = {0, 0, ++tag_ * 13};
  }

  void free(Member& member) {
    const std::int64_t slot = any_slot(member);
    if (attempt("free", true, [&] { member.cache->free(slot); })) member.slots.erase(slot);
  }

  void truncate(Member& member) {
    const std::int64_t slot = any_slot(member);
    Slot& state = member.slots.at(slot);
    const std::int64_t tokens = pick(state.length + 1);
    if (!attempt("truncate", true, [&] { member.cache->truncate(slot, tokens); })) {
      member.write(slot, tokens, state.length);  // its tail may have been zeroed
      return;
    }
    if (tokens != state.length) state.promised = tokens;
    state.length = tokens;
    EXPECT_EQ(member.not_zero(slot, tokens), 0U) << "behind a truncated length";
  }

  void batch(Member& member) {
    const std::int64_t slot = any_slot(member);
    Slot& state = member.slots.at(slot);
    const std::int64_t committed = member.cache->committed_len(slot);
    EXPECT_GE(committed, state.length);
    if (member.geometry().unmapped_reads() == UnmappedReads::kZeros) return;
    const auto length = std::max(state.promised, pick(committed + 1));
    const std::vector<std::int64_t> slots{slot};
    try {  // a mapper's look-ahead may have been taken back since
      static_cast<void>(member.cache->batch(0, slots, length));
      state.promised = length;
    } catch (const std::invalid_argument&) {
    } catch (const Error&) {
      EXPECT_TRUE(armed_ || promised() + 100 > static_cast<std::int64_t>(limit_));
    }
  }

  void step(Member& member) {
    const std::int64_t most = member.geometry().config().max_seq_len;
    std::vector<std::int64_t> lengths(static_cast<std::size_t>(member.geometry().config().max_batch_size), 0);
    std::map<std::int64_t, Slot> before = member.slots;
    const bool all = pick(3) == 0;
    const std::int64_t one = any_slot(member);
    bool grows = false;
    for (auto& [slot, state] : member.slots) {
      if (!all && slot != one) continue;
      const std::int64_t length = std::min(most, state.length + (pick(4) == 0 ? pick(most) : 1 + pick(4)));
      lengths[static_cast<std::size_t>(slot)] = length;
      grows = grows || member.pages_for(length) > member.pages_for(state.promised);
      state.length = std::max(state.length, length);
      state.promised = std::max(state.promised, length);
    }
    const bool has_room = !grows || promised() <= static_cast<std::int64_t>(limit_);
    if (!grows || !armed_) {
      std::vector<SlotLength> named;
      for (const auto& [slot, state] : member.slots) {
        if (lengths[static_cast<std::size_t>(slot)] != 0) named.push_back({slot, state.length});
      }
      EXPECT_EQ(member.cache->fits(named), has_room) << "fits";
    }
    if (!attempt("step", has_room, [&] { member.cache->step(lengths); })) {
      member.slots = before;
      return;
    }
    for (const auto& [slot, state] : member.slots) {
      EXPECT_EQ(member.not_zero(slot, before.at(slot).length), 0U) << "what a step gave";
      member.write(slot, before.at(slot).length, state.length);
    }
  }

  void verify(bool everything) {
    if (everything && clean_) {
      for (const auto& member : members_) member->cache->settle();  // what a mapper was at when the limit fell
    }
    const PoolStats stats = pool_->stats();
    EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
    EXPECT_EQ(stats.retired_bytes, 0U);
    EXPECT_GE(stats.created_bytes, static_cast<std::uint64_t>(promised() * kPage));
    if (clean_ && everything) {
      EXPECT_LE(stats.created_bytes, std::max(limit_, static_cast<std::uint64_t>(promised())) * kPage);
    }
    if (!everything) return;
    for (const auto& member : members_) {
      EXPECT_EQ(member->cache->slots().size(), member->slots.size());
      for (const auto& [slot, state] : member->slots) {
        EXPECT_EQ(member->cache->seq_len(slot), state.length);
        EXPECT_GE(member->cache->committed_len(slot), state.promised);
        EXPECT_EQ(member->wrong(slot), 0U) << "slot " << slot;
        EXPECT_EQ(member->not_zero(slot, state.length), 0U) << "slot " << slot;
      }
      const CacheStats cache = member->cache->stats();
      EXPECT_GE(cache.mapped_bytes - cache.reclaimable_bytes, static_cast<std::uint64_t>(member->promised_pages() * kPage));
    }
    EXPECT_EQ(tensor_->rows(), rows_);
    if (!driver_.counts->traits().has_memory) return;
    const auto* const bytes =
        reinterpret_cast<const unsigned char*>(tensor_->view().address);  // NOLINT(performance-no-int-to-ptr)
    for (std::int64_t row = 0; row < rows_; ++row) ASSERT_EQ(bytes[row * 1500 + 1499], static_cast<unsigned char>(row + 1));
  }

  Instrumented driver_;
  std::mt19937 random_;
  std::uint64_t limit_ = 100;
  std::shared_ptr<PagePool> pool_;
  std::vector<std::unique_ptr<Member>> members_;
  std::unique_ptr<GrowableTensor> tensor_;
  std::int64_t rows_ = 0;
  unsigned tag_ = 0;
  bool armed_ = false;
  bool clean_ = true;  // no fault since the limit was last seen to
  int operation_ = 0;
  std::uint64_t refusals_ = 0;
  std::uint64_t failures_ = 0;
};

class PoolModel : public testing::TestWithParam<DriverUnderTest> {};

TEST_P(PoolModel, KeepsEveryPromiseWhateverFails) {
  const bool counts_only = !GetParam().open()->traits().has_memory;
  const char* const given = std::getenv("VATTN_MODEL_SEED");
  const unsigned first = given != nullptr ? static_cast<unsigned>(std::strtoul(given, nullptr, 10)) : Soak::first_seed();
  const int operations = (counts_only ? 94000 : 6000) / (kSanitized ? 5 : 1);  // 10 rounds of both: a million
  std::uint64_t refusals = 0;
  std::uint64_t failures = 0;
  unsigned round = 0;
  const Soak soak(counts_only ? 0.04 : 0.08);
  for (; round < 10 || soak.goes_on(); ++round) {
    Model model(GetParam(), first + round, round % 2 != 0);
    model.run(operations);
    refusals += model.refusals();
    failures += model.failures();
    ASSERT_FALSE(HasFailure()) << "VATTN_MODEL_SEED=" << first + round - round % 2
                               << (round % 2 != 0 ? ", second round, with" : ", without") << " mappers, operation "
                               << model.operation();
  }
  EXPECT_GT(refusals, 100U);
  EXPECT_GT(failures, 20U);
  RecordProperty("operations_" + GetParam().name,
                 std::to_string(static_cast<std::uint64_t>(round) * static_cast<unsigned>(operations)));
  RecordProperty("first_seed_" + GetParam().name, std::to_string(first));
}

INSTANTIATE_TEST_SUITE_P(Every, PoolModel,
                         testing::Values(DriverUnderTest{.name = "host", .open = open_host_driver},
                                         DriverUnderTest{.name = "null", .open = open_null_driver}),
                         name_of_driver);

}  // namespace
}  // namespace vattn
