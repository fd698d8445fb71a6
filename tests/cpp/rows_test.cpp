// Rows: slots named once, what the last step added to them, and writing it; spans; admission of requests without a slot.
#include <gtest/gtest.h>

#include <vector>

#include "vattn/kv/kv_cache.hpp"

namespace vattn {
namespace {

constexpr std::int64_t kHeads = 2;
constexpr std::int64_t kDim = 4;
using Numbers = std::vector<std::int64_t>;

CacheConfig config(Layout layout) {
  CacheConfig made{.num_layers = 2, .num_kv_heads = kHeads, .head_dim = kDim, .max_batch_size = 4, .max_seq_len = 64};
  made.dtype = DType::kFloat32;
  made.layout = layout;
  made.lookahead_tokens = 0;
  return made;
}

Numbers added(const KVCache& cache, const Rows& rows) {
  Numbers tokens;
  for (const TokenSpan& span : cache.last_step(rows).added) tokens.push_back(span.stop - span.start);
  return tokens;
}

std::vector<float> numbered(std::int64_t tokens, float first) {
  std::vector<float> values(static_cast<std::size_t>(tokens * kHeads * kDim));
  for (float& value : values) value = first++;
  return values;
}

float at(const TensorView<3>& view, std::int64_t token, std::int64_t head, std::int64_t element) {
  return view.data<float>()[token * view.strides[0] + head * view.strides[1] + element];
}

/// Whether tokens start.. of a view are those of `packed` from `from` on.
bool holds(const TensorView<3>& view, std::int64_t start, const std::vector<float>& packed, std::int64_t from,
           std::int64_t count) {
  for (std::int64_t token = 0; token < count; ++token) {
    for (std::int64_t head = 0; head < kHeads; ++head) {
      for (std::int64_t element = 0; element < kDim; ++element) {
        const auto index = static_cast<std::size_t>(((from + token) * kHeads + head) * kDim + element);
        if (at(view, start + token, head, element) != packed[index]) return false;
      }
    }
  }
  return true;
}

class RowsTest : public ::testing::TestWithParam<Layout> {
 protected:
  KVCache cache_{config(GetParam())};
};

TEST_P(RowsTest, WriteWhatTheLastStepAddedSlotAfterSlot) {
  cache_.alloc_batch(3);
  cache_.step({{0, 3}, {2, 1}});
  const Rows rows = cache_.rows(Numbers{2, 0});
  const std::vector<float> k = numbered(4, 1);
  const std::vector<float> v = numbered(4, 100);
  const auto address = [](const std::vector<float>& values) { return reinterpret_cast<Address>(values.data()); };
  cache_.write(1, rows, 4, address(k), address(v));
  EXPECT_TRUE(holds(cache_.view(1, 2).k, 0, k, 0, 1));
  EXPECT_TRUE(holds(cache_.view(1, 0).k, 0, k, 1, 3));
  EXPECT_TRUE(holds(*cache_.view(1, 0).v, 0, v, 1, 3));
  EXPECT_EQ(cache_.views(1, rows).size(), 2U);
  EXPECT_EQ(cache_.views(1, rows)[0].k.address, cache_.view(1, 2).k.address);
  EXPECT_THROW(cache_.write(1, rows, 3, address(k), address(v)), std::invalid_argument);
  EXPECT_THROW(cache_.write(1, rows, 4, address(k), address(v), 2), std::invalid_argument) << "1 and 3, not 2 each";
  const std::vector<float> span = numbered(2, 500);
  cache_.write(0, Numbers{0}, Numbers{1}, address(span), address(span), 2);
  EXPECT_TRUE(holds(cache_.view(0, 0).k, 1, span, 0, 2));
  EXPECT_THROW(cache_.write(0, Numbers{0}, Numbers{2}, address(span), address(span), 2), std::out_of_range);
}

INSTANTIATE_TEST_SUITE_P(Layouts, RowsTest, ::testing::Values(Layout::kNHD, Layout::kHND));

TEST(Rows, TheLastStepIsTheLastThatNamedAnyOfThemAndMadeASlotLonger) {
  KVCache cache(config(Layout::kNHD), {Device::Kind::kMeta});
  cache.alloc_batch(3);
  const Rows first = cache.rows(Numbers{0});
  const Rows both = cache.rows(Numbers{0, 1});
  EXPECT_EQ(added(cache, both), (Numbers{0, 0}));
  cache.step({{0, 5}, {1, 2}});
  EXPECT_EQ(added(cache, both), (Numbers{5, 2}));
  cache.step({{1, 3}});
  EXPECT_EQ(added(cache, both), (Numbers{0, 1}));
  EXPECT_EQ(added(cache, first), Numbers{5}) << "the last that named it";
  cache.step(Numbers{6, 3, 0, 0});
  EXPECT_EQ(added(cache, both), (Numbers{1, 0}));
  const std::uint64_t number = cache.last_step(both).number;
  cache.step(Numbers{6, 3, 0, 0});
  cache.step({{0, 1}, {1, 1}});
  EXPECT_EQ(added(cache, both), (Numbers{1, 0})) << "steps that lengthen nothing count as none";
  EXPECT_EQ(cache.last_step(both).number, number);
  cache.step(Numbers{8, 5, 0, 0});
  EXPECT_EQ(added(cache, both), (Numbers{2, 2}));
  cache.truncate(0, 7);
  EXPECT_EQ(added(cache, both), (Numbers{0, 2}));
  EXPECT_NE(cache.last_step(both).number, number);
  EXPECT_THROW(cache.step(Numbers{65, 6, 0, 0}), std::invalid_argument);
  EXPECT_EQ(added(cache, both), (Numbers{0, 2})) << "a refused step is none";
}

TEST(Rows, AFreedSlotIsRefusedAlsoWhenItsNumberIsInUseAgain) {
  KVCache cache(config(Layout::kNHD), {Device::Kind::kMeta});
  KVCache other(config(Layout::kNHD), {Device::Kind::kMeta});
  cache.alloc_batch(2);
  other.alloc_batch(2);
  const Rows rows = cache.rows(Numbers{0, 1});
  EXPECT_THROW(static_cast<void>(other.views(0, rows)), std::invalid_argument);
  cache.free(1);
  EXPECT_THROW(static_cast<void>(cache.last_step(rows)), std::invalid_argument);
  EXPECT_EQ(cache.alloc(), 1);
  EXPECT_THROW(static_cast<void>(cache.last_step(rows)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(cache.views(0, rows)), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(cache.changes(rows)), std::invalid_argument);
  EXPECT_NO_THROW(static_cast<void>(cache.last_step(cache.rows(Numbers{1, 0}))));
  EXPECT_THROW(static_cast<void>(cache.rows(Numbers{})), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(cache.rows(Numbers{0, 0})), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(cache.rows(Numbers{0, 2})), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(cache.rows(Numbers{4})), std::out_of_range);
}

TEST(Rows, AdmissionCountsMemoryAndFreeSlots) {
  CacheConfig small = config(Layout::kNHD);
  small.page_size = 2 << 20;
  small.head_dim = (1 << 20) / (4 * kHeads);  // two tokens a page
  small.memory_limit = 4 * 4 * *small.page_size;
  KVCache cache(small, {Device::Kind::kMeta});
  cache.alloc();
  cache.step({{0, 2}});
  EXPECT_EQ(cache.slot_bytes(0), static_cast<std::uint64_t>(4 * *small.page_size));
  EXPECT_TRUE(cache.fits(std::vector<SlotLength>{}, Numbers{6}));
  EXPECT_FALSE(cache.fits(std::vector<SlotLength>{}, Numbers{7}));
  EXPECT_TRUE(cache.fits(std::vector<SlotLength>{{0, 4}}, Numbers{2, 2}));
  EXPECT_FALSE(cache.fits(Numbers{4, 0, 0, 0}, Numbers{2, 4}));
  EXPECT_FALSE(cache.fits(std::vector<SlotLength>{}, Numbers{0, 0, 0, 0})) << "three slots are free";
  EXPECT_THROW(static_cast<void>(cache.fits(std::vector<SlotLength>{}, Numbers{65})), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(cache.slot_bytes(1)), std::invalid_argument);
}

}  // namespace
}  // namespace vattn
