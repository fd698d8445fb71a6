// The C interface as a C program uses it: what each function does, which status each kind of error becomes, and what NULL gets.
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_under_test.hpp"
#include "vattn/c/vattn.h"
#include "vattn/tensor/buffer.hpp"

namespace vattn {
namespace {

constexpr std::int64_t kPage = 64 << 10;
constexpr std::int64_t kPageTokens = 1024;  // of 2 heads of 16 float16, token-major
constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();

/// A struct as a C program makes it.
template <typename Struct>
Struct ready() {
  Struct made;
  VATTN_INIT(&made);
  return made;
}

std::string last_error() { return vattn_last_error(); }

bool last_error_has(const std::string& part) { return last_error().find(part) != std::string::npos; }

/// Two layers, four slots of four pages a tensor; a page group is four pages.
vattn_cache_config small_config(const char* device) {
  vattn_cache_config config;
  vattn_cache_config_init(&config);
  config.num_layers = 2;
  config.layers_per_tensor = 1;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.max_batch_size = 4;
  config.max_seq_len = 4 * kPageTokens;
  config.dtype = "float16";
  config.device = device;
  config.layout = "NHD";
  config.page_size = kPage;
  config.memory_limit = 64 * kPage;
  config.lookahead_tokens = VATTN_NONE;
  return config;
}

/// A cache, destroyed at the end; the test fails where it cannot be made.
struct Cache {
  explicit Cache(const vattn_cache_config& config) {
    EXPECT_EQ(vattn_cache_create(&config, &handle), VATTN_OK) << vattn_last_error();
  }
  explicit Cache(const char* device = "cpu") : Cache(small_config(device)) {}
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;
  ~Cache() { vattn_cache_destroy(handle); }

  [[nodiscard]] std::int64_t alloc() const {
    std::int64_t slot = -1;
    EXPECT_EQ(vattn_cache_alloc(handle, &slot), VATTN_OK) << vattn_last_error();
    return slot;
  }
  [[nodiscard]] vattn_status step(std::int64_t slot, std::int64_t tokens) const {
    return vattn_cache_step_slots(handle, &slot, &tokens, 1);
  }
  [[nodiscard]] vattn_stats stats() const {
    auto stats = ready<vattn_stats>();
    EXPECT_EQ(vattn_cache_stats(handle, &stats), VATTN_OK) << vattn_last_error();
    return stats;
  }
  [[nodiscard]] std::int64_t seq_len(std::int64_t slot) const {
    std::int64_t tokens = -1;
    EXPECT_EQ(vattn_cache_seq_len(handle, slot, &tokens), VATTN_OK) << vattn_last_error();
    return tokens;
  }

  vattn_cache* handle = nullptr;
};

struct Pool {
  explicit Pool(const char* device = "meta") {
    EXPECT_EQ(vattn_pool_create(device, kPage, 64 * kPage, &handle), VATTN_OK) << vattn_last_error();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool() { vattn_pool_destroy(handle); }

  [[nodiscard]] vattn_pool_stats stats() const {
    auto stats = ready<vattn_pool_stats>();
    EXPECT_EQ(vattn_pool_stats_now(handle, &stats), VATTN_OK) << vattn_last_error();
    return stats;
  }

  vattn_pool* handle = nullptr;
};

/// Rows of four float32.
struct Tensor {
  explicit Tensor(const char* device = "cpu") {
    const std::int64_t shape = 4;
    EXPECT_EQ(vattn_tensor_create(&shape, 1, 1 << 20, "float32", device, kPage, 64 * kPage, &handle), VATTN_OK)
        << vattn_last_error();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { vattn_tensor_destroy(handle); }

  [[nodiscard]] std::int64_t rows() const {
    std::int64_t rows = -1;
    EXPECT_EQ(vattn_tensor_rows(handle, &rows), VATTN_OK) << vattn_last_error();
    return rows;
  }

  vattn_tensor* handle = nullptr;
};

// ---- caches -------------------------------------------------------------------------------------------------------------

TEST(CInterface, SaysItsVersion) {
  EXPECT_EQ(std::string(vattn_version()).find_first_not_of("0123456789."), std::string::npos);
}

TEST(CInterface, AConfigStartsAsZeros) {
  vattn_cache_config config;
  std::memset(&config, 0x7F, sizeof config);
  vattn_cache_config_init(&config);
  EXPECT_EQ(config.struct_size, sizeof config);
  config.struct_size = 0;
  const vattn_cache_config zeros{};
  EXPECT_EQ(std::memcmp(&config, &zeros, sizeof config), 0);
  vattn_cache_config_init(nullptr);
}

TEST(CInterface, WhatAConfigLeavesOutIsChosen) {
  vattn_cache_config config;
  vattn_cache_config_init(&config);
  config.num_layers = config.num_kv_heads = config.max_batch_size = 1;
  config.head_dim = 64;
  config.max_seq_len = 4096;
  config.dtype = "bfloat16";
  const Cache cache(config);
  EXPECT_EQ(cache.alloc(), 0);
  EXPECT_EQ(cache.step(0, 10), VATTN_OK);
  EXPECT_EQ(vattn_cache_settle(cache.handle), VATTN_OK);
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  ASSERT_EQ(vattn_cache_view(cache.handle, 0, 0, &k, &v), VATTN_OK);
  EXPECT_NE(k.data, nullptr) << "no device is the cpu";
  EXPECT_EQ(v.shape[2], 64) << "as head_dim";
  EXPECT_GT(cache.stats().limit_bytes, 0U);
}

TEST(CInterface, EveryFieldOfAConfigArrives) {
  vattn_cache_config config = small_config("cpu");
  config.v_head_dim = 8;
  config.layers_per_tensor = 2;
  config.unmapped_reads = "fault";
  config.guard_tokens = 1;
  config.scrub = 1;
  config.lookahead_tokens = 16;
  config.warm_tokens = 16;
  const Cache sliced(config);
  std::int64_t value = 0;
  EXPECT_EQ(vattn_cache_page_size(sliced.handle, &value), VATTN_OK);
  EXPECT_EQ(value, kPage);
  EXPECT_EQ(vattn_cache_tokens_per_page(sliced.handle, &value), VATTN_OK);
  EXPECT_EQ(value, kPageTokens / 2) << "two layers in a tensor";
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  ASSERT_EQ(vattn_cache_layer(sliced.handle, 1, &k, &v), VATTN_OK);
  EXPECT_EQ(k.shape[3], 16);
  EXPECT_EQ(v.shape[3], 8);

  config = small_config("cpu");
  config.layout = "HND";
  config.unmapped_reads = "zeros";
  const Cache head_major(config);
  ASSERT_EQ(vattn_cache_layer(head_major.handle, 0, &k, &v), VATTN_OK);
  EXPECT_GT(k.strides[2], k.strides[1]) << "heads are further apart than tokens";
}

TEST(CInterface, SlotsAreTakenSteppedTruncatedAndFreed) {
  const Cache cache;
  std::int64_t first = -1;
  ASSERT_EQ(vattn_cache_alloc_block(cache.handle, 2, &first), VATTN_OK);
  EXPECT_EQ(first, 0);
  EXPECT_EQ(cache.alloc(), 2);
  const std::vector<std::int64_t> lengths{5, 0, kPageTokens + 1, 0};
  ASSERT_EQ(vattn_cache_step(cache.handle, lengths.data(), 4), VATTN_OK);
  EXPECT_EQ(cache.seq_len(0), 5);
  EXPECT_EQ(cache.seq_len(1), 0);
  EXPECT_EQ(cache.seq_len(2), kPageTokens + 1);
  std::int64_t committed = -1;
  ASSERT_EQ(vattn_cache_committed_len(cache.handle, 2, &committed), VATTN_OK);
  EXPECT_EQ(committed, 2 * kPageTokens);
  ASSERT_EQ(vattn_cache_truncate(cache.handle, 2, 3), VATTN_OK);
  EXPECT_EQ(cache.seq_len(2), 3);
  ASSERT_EQ(vattn_cache_free(cache.handle, 2), VATTN_OK);
  const vattn_stats stats = cache.stats();
  EXPECT_EQ(stats.active_slots, 2U);
  EXPECT_EQ(stats.warm_slots, 1U);
  EXPECT_EQ(stats.mapped_bytes, 12U * kPage);
  EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
  EXPECT_EQ(stats.limit_bytes, 64U * kPage);
  EXPECT_EQ(stats.prompts, 2U);
}

TEST(CInterface, TheSlotThatFitsBestIsHandedOut) {
  const Cache cache;
  for (std::int64_t slot = 0; slot < 4; ++slot) EXPECT_EQ(cache.alloc(), slot);
  ASSERT_EQ(cache.step(1, kPageTokens), VATTN_OK);
  ASSERT_EQ(cache.step(3, 3 * kPageTokens), VATTN_OK);
  for (std::int64_t slot = 0; slot < 4; ++slot) ASSERT_EQ(vattn_cache_free(cache.handle, slot), VATTN_OK);
  std::int64_t slot = -1;
  ASSERT_EQ(vattn_cache_alloc_for(cache.handle, 2 * kPageTokens, nullptr, &slot), VATTN_OK);
  EXPECT_EQ(slot, 3);
  const vattn_stream stream = 0;
  ASSERT_EQ(vattn_cache_alloc_for(cache.handle, kPageTokens, &stream, &slot), VATTN_OK);
  EXPECT_EQ(slot, 1);
}

TEST(CInterface, FitsSaysWhatAStepWouldGet) {
  const Cache cache;
  ASSERT_EQ(vattn_cache_set_memory_limit(cache.handle, 4 * kPage), VATTN_OK);
  std::uint64_t limit = 0;
  ASSERT_EQ(vattn_cache_memory_limit(cache.handle, &limit), VATTN_OK);
  EXPECT_EQ(limit, 4U * kPage);
  const std::int64_t slot = cache.alloc();
  for (const std::int64_t tokens : {kPageTokens, kPageTokens + 1}) {
    std::int32_t fits = -1;
    ASSERT_EQ(vattn_cache_fits(cache.handle, &slot, &tokens, 1, &fits), VATTN_OK);
    EXPECT_EQ(fits, tokens == kPageTokens ? 1 : 0);
    EXPECT_EQ(cache.step(slot, tokens), fits == 1 ? VATTN_OK : VATTN_OUT_OF_MEMORY);
  }
}

TEST(CInterface, FitsCountsRequestsThatHaveNoSlotYet) {
  const Cache cache;
  ASSERT_EQ(vattn_cache_set_memory_limit(cache.handle, 8 * kPage), VATTN_OK);
  const std::int64_t slot = cache.alloc();
  const std::int64_t length = 1;
  const auto fits = [&](const std::vector<std::int64_t>& fresh) {
    std::int32_t answer = -1;
    const auto count = static_cast<std::int64_t>(fresh.size());
    EXPECT_EQ(vattn_cache_fits_new(cache.handle, &slot, &length, 1, fresh.data(), count, &answer), VATTN_OK) << last_error();
    return answer;
  };
  EXPECT_EQ(fits({}), 1);
  EXPECT_EQ(fits({kPageTokens}), 1);
  EXPECT_EQ(fits({kPageTokens + 1}), 0) << "two page groups there are";
  EXPECT_EQ(fits({1, 1, 1, 1}), 0) << "three free slots there are";
  std::int32_t answer = 7;
  const std::int64_t negative = -1;
  EXPECT_EQ(vattn_cache_fits_new(cache.handle, nullptr, nullptr, 0, &negative, 1, &answer), VATTN_INVALID_ARGUMENT);
  EXPECT_EQ(answer, 7);
}

TEST(CInterface, SlotBytesAreWhatFreeingGives) {
  const Cache cache;
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, kPageTokens + 1), VATTN_OK);
  std::uint64_t bytes = 0;
  ASSERT_EQ(vattn_cache_slot_bytes(cache.handle, slot, &bytes), VATTN_OK);
  EXPECT_EQ(bytes, 8U * kPage);
  const std::uint64_t before = cache.stats().available_bytes;
  ASSERT_EQ(vattn_cache_free(cache.handle, slot), VATTN_OK);
  EXPECT_EQ(cache.stats().available_bytes, before + bytes);
}

TEST(CInterface, SpansOfTokensAreWritten) {
  const Cache cache;
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, 5), VATTN_OK);
  std::vector<std::uint16_t> rows(std::size_t{3} * 2 * 16);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::uint16_t>(i / 32 + 1);  // a token's number
  const std::int64_t position = 2;
  ASSERT_EQ(vattn_cache_write_spans(cache.handle, 0, &slot, &position, 1, 3, rows.data(), rows.data()), VATTN_OK)
      << last_error();
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  ASSERT_EQ(vattn_cache_view(cache.handle, 0, slot, &k, &v), VATTN_OK);
  const auto at = [&](std::int64_t token) { return static_cast<std::uint16_t*>(k.data)[token * k.strides[0] + 17]; };
  EXPECT_EQ(at(1), 0);
  EXPECT_EQ(at(2), 1);
  EXPECT_EQ(at(4), 3);
  const std::int64_t late = 3;
  EXPECT_EQ(vattn_cache_write_spans(cache.handle, 0, &slot, &late, 1, 3, rows.data(), rows.data()), VATTN_OUT_OF_RANGE);
}

TEST(CInterface, WhatIsWrittenIsReadThroughEveryView) {
  const Cache cache;
  std::int64_t first = -1;
  ASSERT_EQ(vattn_cache_alloc_block(cache.handle, 2, &first), VATTN_OK);
  const std::vector<std::int64_t> slots{0, 1};
  const std::vector<std::int64_t> positions{2, 3};
  const std::vector<std::int64_t> lengths{4, 4};
  ASSERT_EQ(vattn_cache_step_slots(cache.handle, slots.data(), lengths.data(), 2), VATTN_OK);
  std::vector<std::uint16_t> k_rows(std::size_t{2} * 2 * 16, 7);
  std::vector<std::uint16_t> v_rows(std::size_t{2} * 2 * 16, 9);
  k_rows[32] = 8;  // the second slot's first element
  ASSERT_EQ(vattn_cache_write(cache.handle, 1, slots.data(), positions.data(), 2, k_rows.data(), v_rows.data()), VATTN_OK);

  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  ASSERT_EQ(vattn_cache_view(cache.handle, 1, 1, &k, &v), VATTN_OK);
  EXPECT_EQ(k.ndim, 3);
  EXPECT_EQ(std::vector<std::int64_t>(k.shape, k.shape + 4), (std::vector<std::int64_t>{4, 2, 16, 0}));
  EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[3 * k.strides[0]], 8);
  EXPECT_EQ(static_cast<std::uint16_t*>(v.data)[3 * v.strides[0]], 9);

  ASSERT_EQ(vattn_cache_batch(cache.handle, 1, slots.data(), 2, 4, &k, &v), VATTN_OK);
  EXPECT_EQ(k.ndim, 4);
  EXPECT_EQ(std::vector<std::int64_t>(k.shape, k.shape + 4), (std::vector<std::int64_t>{2, 4, 2, 16}));
  EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[2 * k.strides[1]], 7);
  EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[k.strides[0] + 3 * k.strides[1]], 8);

  ASSERT_EQ(vattn_cache_layer(cache.handle, 1, &k, &v), VATTN_OK);
  EXPECT_EQ(std::vector<std::int64_t>(k.shape, k.shape + 4), (std::vector<std::int64_t>{4, 4 * kPageTokens, 2, 16}));
  EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[k.strides[0] + 3 * k.strides[1]], 8);
}

TEST(CInterface, ACacheOfKeysOnlyHasNoV) {
  vattn_cache_config config = small_config("cpu");
  config.v_head_dim = VATTN_NONE;
  const Cache cache(config);
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
  const std::int64_t position = 0;
  const std::vector<std::uint16_t> row(std::size_t{2} * 16, 5);
  ASSERT_EQ(vattn_cache_write(cache.handle, 0, &slot, &position, 1, row.data(), nullptr), VATTN_OK);
  EXPECT_EQ(vattn_cache_write(cache.handle, 0, &slot, &position, 1, row.data(), row.data()), VATTN_INVALID_ARGUMENT);
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  v.ndim = 3;
  ASSERT_EQ(vattn_cache_view(cache.handle, 0, slot, &k, &v), VATTN_OK);
  EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[0], 5);
  EXPECT_EQ(v.data, nullptr);
  EXPECT_EQ(v.ndim, 0);
}

TEST(CInterface, AccountingHasNoAddresses) {
  const Cache cache("meta");
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  ASSERT_EQ(vattn_cache_view(cache.handle, 0, slot, &k, &v), VATTN_OK);
  EXPECT_EQ(k.data, nullptr);
  EXPECT_EQ(k.shape[0], 1);
  const Tensor tensor("meta");
  void* data = &k;
  ASSERT_EQ(vattn_tensor_data(tensor.handle, &data), VATTN_OK);
  EXPECT_EQ(data, nullptr);
}

TEST(CInterface, StreamsChangeNothingOnTheHost) {
  const Cache cache;
  std::int64_t slot = -1;
  ASSERT_EQ(vattn_cache_alloc_on_stream(cache.handle, 7, &slot), VATTN_OK);
  EXPECT_EQ(slot, 0);
  ASSERT_EQ(vattn_cache_alloc_block_on_stream(cache.handle, 2, 7, &slot), VATTN_OK);
  EXPECT_EQ(slot, 1);
  ASSERT_EQ(vattn_cache_record_stream(cache.handle, 8), VATTN_OK);
  const std::vector<std::int64_t> lengths{4, 0, 0, 0};
  ASSERT_EQ(vattn_cache_step_on_stream(cache.handle, lengths.data(), 4, 7), VATTN_OK);
  EXPECT_EQ(cache.seq_len(0), 4);
  ASSERT_EQ(vattn_cache_truncate_on_stream(cache.handle, 0, 1, 7), VATTN_OK);
  EXPECT_EQ(cache.seq_len(0), 1);
  ASSERT_EQ(vattn_cache_free_on_stream(cache.handle, 0, 7), VATTN_OK);
  EXPECT_EQ(cache.stats().active_slots, 2U);
}

TEST(CInterface, WhatAStreamStillUsesIsRetiredUntilItHasFinished) {
  if (!cuda::on_fake()) GTEST_SKIP() << "steers the fake library";
  fake_cuda_reset();
  const vattn_stream stream = fake_cuda_stream_create(0);
  {
    vattn_cache_config config = small_config("cuda:0");
    config.page_size = 0;
    config.memory_limit = 0;
    const Cache cache(config);
    std::int64_t slot = -1;
    ASSERT_EQ(vattn_cache_alloc_on_stream(cache.handle, stream, &slot), VATTN_OK);
    ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
    auto k = ready<vattn_view>();
    auto v = ready<vattn_view>();
    ASSERT_EQ(vattn_cache_view(cache.handle, 0, slot, &k, &v), VATTN_OK);
    const std::uint64_t kernel = fake_cuda_kernel_begin_on(stream, reinterpret_cast<std::uint64_t>(k.data), 64, -1);
    ASSERT_NE(kernel, 0U);
    ASSERT_EQ(vattn_cache_free_on_stream(cache.handle, slot, stream), VATTN_OK);
    EXPECT_GT(cache.stats().retired_bytes, 0U);
    EXPECT_EQ(cache.stats().mapped_bytes, 0U);
    EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
    EXPECT_EQ(cache.stats().retired_bytes, 0U);
    EXPECT_GT(cache.stats().warm_bytes, 0U);
  }
  fake_cuda_stream_destroy(stream);
  EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
}

// ---- structs ------------------------------------------------------------------------------------------------------------

/// Runs `call` on a struct of every size but the library's, the bytes behind it watched.
template <typename Struct>
void expect_other_sizes_refused(const std::string& parameter, const std::function<vattn_status(Struct*)>& call) {
  struct Watched {
    Struct value;
    std::array<unsigned char, 64> behind;
  };
  for (const std::size_t size :
       {std::size_t{0}, std::size_t{1}, sizeof(Struct) - 8, sizeof(Struct) + 8, std::size_t{1} << 40}) {
    Watched watched;
    std::memset(&watched, 0x5A, sizeof watched);
    watched.value.struct_size = size;
    const Watched before = watched;
    EXPECT_EQ(call(&watched.value), VATTN_INVALID_ARGUMENT) << size;
    EXPECT_TRUE(last_error_has(parameter + ".struct_size=" + std::to_string(size))) << last_error();
    const char* const hint = size == 0 ? "VATTN_INIT" : size < sizeof(Struct) ? "an older vattn.h" : "a newer vattn.h";
    EXPECT_TRUE(last_error_has(hint)) << last_error();
    EXPECT_EQ(std::memcmp(&watched, &before, sizeof watched), 0) << "written to: " << parameter << " of " << size;
  }
}

TEST(CInterface, AStructOfAnotherHeaderIsRefusedByItsSizeAndLeftAlone) {
  const Cache cache("meta");
  const Pool pool;
  const Tensor tensor("meta");
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
  vattn_cache* made = nullptr;
  auto other = ready<vattn_view>();
  const auto untouched = other;
  expect_other_sizes_refused<vattn_cache_config>("config", [&](auto* it) { return vattn_cache_create(it, &made); });
  expect_other_sizes_refused<vattn_stats>("stats", [&](auto* it) { return vattn_cache_stats(cache.handle, it); });
  expect_other_sizes_refused<vattn_pool_stats>("stats", [&](auto* it) { return vattn_pool_stats_now(pool.handle, it); });
  expect_other_sizes_refused<vattn_error_info>("info", [&](auto* it) { return vattn_last_error_info(it); });
  expect_other_sizes_refused<vattn_view>("k", [&](auto* it) { return vattn_cache_view(cache.handle, 0, slot, it, &other); });
  expect_other_sizes_refused<vattn_view>("v", [&](auto* it) { return vattn_cache_view(cache.handle, 0, slot, &other, it); });
  expect_other_sizes_refused<vattn_view>("k", [&](auto* it) { return vattn_cache_layer(cache.handle, 0, it, &other); });
  expect_other_sizes_refused<vattn_view>("v",
                                         [&](auto* it) { return vattn_cache_batch(cache.handle, 0, &slot, 1, 1, &other, it); });
  expect_other_sizes_refused<vattn_view>("view", [&](auto* it) { return vattn_tensor_view(tensor.handle, it); });
  expect_other_sizes_refused<vattn_view>("view", [&](auto* it) { return vattn_view_retain(it); });
  expect_other_sizes_refused<vattn_view>("view", [&](auto* it) { return vattn_view_release(it); });
  EXPECT_EQ(std::memcmp(&other, &untouched, sizeof other), 0) << "refused, so the other view is untouched as well";
  EXPECT_EQ(made, nullptr);
}

TEST(CInterface, NoneIsAskedForByName) {
  vattn_cache_config config = small_config("meta");
  config.v_head_dim = config.warm_tokens = config.lookahead_tokens = VATTN_NONE;
  const Cache none(config);
  std::int64_t slot = none.alloc();
  ASSERT_EQ(none.step(slot, 1), VATTN_OK);
  EXPECT_EQ(vattn_cache_settle(none.handle), VATTN_OK);
  EXPECT_EQ(none.stats().mapped_bytes, 2U * kPage) << "keys of two layers: no values, nothing ahead, nothing warm";
  config.v_head_dim = config.warm_tokens = config.lookahead_tokens = -2;
  vattn_cache* made = nullptr;
  EXPECT_EQ(vattn_cache_create(&config, &made), VATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("-2")) << last_error();
}

// ---- views --------------------------------------------------------------------------------------------------------------

TEST(CInterface, AViewSaysWhatItIsOfAndWhere) {
  for (const auto& [name, bytes] : {std::pair{"bfloat16", 2}, {"float32", 4}, {"float8_e4m3fn", 1}}) {
    for (const auto& [device, kind] : {std::pair{"cpu", VATTN_CPU}, {"meta", VATTN_META}}) {
      vattn_cache_config config = small_config(device);
      config.dtype = name;
      const Cache cache(config);
      auto k = ready<vattn_view>();
      auto v = ready<vattn_view>();
      ASSERT_EQ(vattn_cache_layer(cache.handle, 0, &k, &v), VATTN_OK);
      EXPECT_EQ(std::string(k.dtype), name);
      EXPECT_EQ(std::string(v.dtype), name);
      EXPECT_EQ(k.element_size, bytes);
      EXPECT_EQ(k.device_kind, kind);
      EXPECT_EQ(k.device_index, 0);
      EXPECT_EQ(k.owner, nullptr);
    }
  }
}

TEST(CInterface, ATensorsViewIsItsRows) {
  const Tensor tensor;
  ASSERT_EQ(vattn_tensor_resize(tensor.handle, 3), VATTN_OK);
  void* data = nullptr;
  ASSERT_EQ(vattn_tensor_data(tensor.handle, &data), VATTN_OK);
  auto view = ready<vattn_view>();
  ASSERT_EQ(vattn_tensor_view(tensor.handle, &view), VATTN_OK);
  EXPECT_EQ(view.data, data);
  EXPECT_EQ(view.ndim, 2);
  EXPECT_EQ(view.shape[0], 3);
  EXPECT_EQ(view.shape[1], 4);
  EXPECT_EQ(view.strides[0], 4);
  EXPECT_EQ(std::string(view.dtype), "float32");

  const std::vector<std::int64_t> shape(VATTN_MAX_DIMS, 1);
  vattn_tensor* deep = nullptr;
  ASSERT_EQ(vattn_tensor_create(shape.data(), VATTN_MAX_DIMS, 4, "int8", "meta", 0, 0, &deep), VATTN_OK) << last_error();
  EXPECT_EQ(vattn_tensor_view(deep, &view), VATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("9 dimensions")) << last_error();
  vattn_tensor_destroy(deep);
}

TEST(CInterface, ARetainedViewOutlivesItsCache) {
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  {
    const Cache cache;
    const std::int64_t slot = cache.alloc();
    ASSERT_EQ(cache.step(slot, 2), VATTN_OK);
    ASSERT_EQ(vattn_cache_view(cache.handle, 1, slot, &k, &v), VATTN_OK);
    static_cast<std::uint16_t*>(k.data)[k.strides[0]] = 77;
    ASSERT_EQ(vattn_view_retain(&k), VATTN_OK) << last_error();
    EXPECT_NE(k.owner, nullptr);
    EXPECT_EQ(vattn_view_retain(&k), VATTN_INVALID_ARGUMENT) << "one owner a view";
    EXPECT_EQ(vattn_cache_view(cache.handle, 1, slot, &k, &v), VATTN_INVALID_ARGUMENT) << "its owner would be lost";
    EXPECT_TRUE(last_error_has("vattn_view_release")) << last_error();
  }
  EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[k.strides[0]], 77);
  static_cast<std::uint16_t*>(k.data)[0] = 78;
  const auto address = reinterpret_cast<Address>(k.data);
  EXPECT_TRUE(is_in_a_buffer(address));
  EXPECT_FALSE(is_in_a_buffer(reinterpret_cast<Address>(v.data))) << "nobody kept V";
  EXPECT_EQ(vattn_view_retain(&v), VATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("while its cache or tensor is open")) << last_error();
  EXPECT_EQ(vattn_view_release(&k), VATTN_OK);
  EXPECT_EQ(k.owner, nullptr);
  EXPECT_EQ(k.data, nullptr);
  EXPECT_FALSE(is_in_a_buffer(address));
  EXPECT_EQ(vattn_view_release(&k), VATTN_OK) << "nothing to let go of";
}

TEST(CInterface, ARetainedTensorOutlivesItsTensorAndItsPool) {
  vattn_pool* pool = nullptr;
  ASSERT_EQ(vattn_pool_create("cpu", kPage, 4 * kPage, &pool), VATTN_OK) << last_error();
  const std::int64_t shape = 4;
  vattn_tensor* tensor = nullptr;
  ASSERT_EQ(vattn_tensor_create_in_pool(&shape, 1, 100, "float32", pool, &tensor), VATTN_OK) << last_error();
  ASSERT_EQ(vattn_tensor_resize(tensor, 10), VATTN_OK);
  auto view = ready<vattn_view>();
  ASSERT_EQ(vattn_tensor_view(tensor, &view), VATTN_OK);
  static_cast<float*>(view.data)[39] = 5;
  ASSERT_EQ(vattn_view_retain(&view), VATTN_OK) << last_error();
  vattn_tensor_destroy(tensor);
  vattn_pool_destroy(pool);
  EXPECT_EQ(static_cast<float*>(view.data)[39], 5);
  EXPECT_EQ(vattn_view_release(&view), VATTN_OK);
}

TEST(CInterface, AViewIsRetainedOrRefusedWhileAnotherThreadCloses) {
  for (int round = 0; round < 100; ++round) {
    const Cache cache;
    const std::int64_t slot = cache.alloc();
    ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
    auto k = ready<vattn_view>();
    auto v = ready<vattn_view>();
    ASSERT_EQ(vattn_cache_view(cache.handle, 0, slot, &k, &v), VATTN_OK);
    static_cast<std::uint16_t*>(k.data)[0] = 9;
    std::thread closer([&] { EXPECT_EQ(vattn_cache_close(cache.handle), VATTN_OK); });
    const vattn_status status = vattn_view_retain(&k);
    closer.join();
    if (status == VATTN_OK) {
      EXPECT_EQ(static_cast<std::uint16_t*>(k.data)[0], 9) << "what is kept is whole";
      EXPECT_EQ(vattn_view_release(&k), VATTN_OK);
    } else {
      EXPECT_EQ(status, VATTN_INVALID_ARGUMENT);
      EXPECT_EQ(k.owner, nullptr);
    }
    EXPECT_FALSE(is_in_a_buffer(reinterpret_cast<Address>(v.data)));
  }
}

TEST(CInterface, AViewWithoutMemoryNeedsNoOwner) {
  const Cache cache("meta");
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  ASSERT_EQ(vattn_cache_layer(cache.handle, 0, &k, &v), VATTN_OK);
  EXPECT_EQ(vattn_view_retain(&k), VATTN_OK);
  EXPECT_EQ(k.owner, nullptr);
}

// ---- pools and tensors --------------------------------------------------------------------------------------------------

TEST(CInterface, APoolIsOneBudgetForItsMembers) {
  const Pool pool;
  vattn_cache_config config = small_config(nullptr);
  config.page_size = config.memory_limit = 0;
  config.pool = pool.handle;
  const Cache cache(config);
  config.device = "meta";
  const Cache same_device(config);
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
  const std::int64_t shape = kPage;
  vattn_tensor* tensor = nullptr;
  ASSERT_EQ(vattn_tensor_create_in_pool(&shape, 1, 100, "uint8", pool.handle, &tensor), VATTN_OK) << last_error();
  EXPECT_EQ(pool.stats().members, 3U);
  EXPECT_EQ(vattn_tensor_resize(tensor, 60), VATTN_OK);
  EXPECT_EQ(vattn_tensor_resize(tensor, 61), VATTN_OUT_OF_MEMORY);
  vattn_pool_stats stats = pool.stats();
  EXPECT_EQ(stats.mapped_bytes, 64U * kPage);
  EXPECT_EQ(stats.available_bytes, 0U);
  EXPECT_EQ(stats.created_bytes, stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
  EXPECT_EQ(stats.limit_bytes, 64U * kPage);
  ASSERT_EQ(vattn_pool_set_memory_limit(pool.handle, 65 * kPage), VATTN_OK);
  std::uint64_t limit = 0;
  ASSERT_EQ(vattn_pool_memory_limit(pool.handle, &limit), VATTN_OK);
  EXPECT_EQ(limit, 65U * kPage);
  EXPECT_EQ(vattn_tensor_resize(tensor, 61), VATTN_OK);
  std::int64_t page_size = 0;
  ASSERT_EQ(vattn_pool_page_size(pool.handle, &page_size), VATTN_OK);
  EXPECT_EQ(page_size, kPage);
  vattn_tensor_destroy(tensor);
  stats = pool.stats();
  EXPECT_EQ(stats.members, 2U);
  EXPECT_EQ(stats.pooled_bytes, 61U * kPage);
}

TEST(CInterface, APoolClosesOnlyWithoutMembers) {
  const Pool pool;
  const std::int64_t shape = 4;
  vattn_tensor* tensor = nullptr;
  ASSERT_EQ(vattn_tensor_create_in_pool(&shape, 1, 100, "float32", pool.handle, &tensor), VATTN_OK) << last_error();
  EXPECT_EQ(vattn_pool_close(pool.handle), VATTN_IN_USE);
  EXPECT_TRUE(last_error_has("GrowableTensor-1")) << last_error();
  EXPECT_EQ(vattn_tensor_close(tensor), VATTN_OK);
  EXPECT_EQ(vattn_pool_close(pool.handle), VATTN_OK);
  std::uint64_t limit = 0;
  EXPECT_EQ(vattn_pool_memory_limit(pool.handle, &limit), VATTN_CLOSED);
  EXPECT_EQ(vattn_pool_set_memory_limit(pool.handle, kPage), VATTN_CLOSED);
  auto stats = ready<vattn_pool_stats>();
  EXPECT_EQ(vattn_pool_stats_now(pool.handle, &stats), VATTN_CLOSED);
  vattn_tensor_destroy(tensor);
}

TEST(CInterface, WhatWasMadeInAPoolOutlivesItsHandle) {
  vattn_pool* pool = nullptr;
  ASSERT_EQ(vattn_pool_create(nullptr, 0, 0, &pool), VATTN_OK) << last_error();
  const std::int64_t shape = 4;
  vattn_tensor* tensor = nullptr;
  ASSERT_EQ(vattn_tensor_create_in_pool(&shape, 1, 100, "float32", pool, &tensor), VATTN_OK) << last_error();
  vattn_pool_destroy(pool);
  EXPECT_EQ(vattn_tensor_resize(tensor, 10), VATTN_OK);
  void* data = nullptr;
  EXPECT_EQ(vattn_tensor_data(tensor, &data), VATTN_OK);
  static_cast<float*>(data)[39] = 1;
  vattn_tensor_destroy(tensor);
}

TEST(CInterface, RowsArriveInATensorThatStays) {
  const Tensor tensor;
  void* data = nullptr;
  ASSERT_EQ(vattn_tensor_data(tensor.handle, &data), VATTN_OK);
  ASSERT_EQ(vattn_tensor_resize(tensor.handle, 1), VATTN_OK);
  const std::vector<float> rows{1, 2, 3, 4, 5, 6, 7, 8};
  ASSERT_EQ(vattn_tensor_append(tensor.handle, rows.data(), 2), VATTN_OK);
  EXPECT_EQ(tensor.rows(), 3);
  EXPECT_EQ(static_cast<float*>(data)[0], 0);
  EXPECT_EQ(static_cast<float*>(data)[11], 8);
  std::uint64_t mapped = 0;
  ASSERT_EQ(vattn_tensor_mapped_bytes(tensor.handle, &mapped), VATTN_OK);
  EXPECT_EQ(mapped, static_cast<std::uint64_t>(kPage));
  ASSERT_EQ(vattn_tensor_resize(tensor.handle, 100'000), VATTN_OK);
  void* later = nullptr;
  ASSERT_EQ(vattn_tensor_data(tensor.handle, &later), VATTN_OK);
  EXPECT_EQ(later, data);
}

TEST(CInterface, RowsMayBeSingleElements) {
  vattn_tensor* tensor = nullptr;
  ASSERT_EQ(vattn_tensor_create(nullptr, 0, 100, "int8", "meta", 0, 0, &tensor), VATTN_OK) << last_error();
  EXPECT_EQ(vattn_tensor_resize(tensor, 100), VATTN_OK);
  EXPECT_EQ(vattn_tensor_resize(tensor, 101), VATTN_INVALID_ARGUMENT);
  vattn_tensor_destroy(tensor);
}

// ---- errors -------------------------------------------------------------------------------------------------------------

TEST(CInterface, AMessageStaysUntilTheNextFailureOfThisThread) {
  EXPECT_EQ(vattn_cache_close(nullptr), VATTN_INVALID_ARGUMENT);
  const std::string message = last_error();
  EXPECT_NE(message, "");
  const Tensor tensor("meta");
  EXPECT_EQ(tensor.rows(), 0);
  EXPECT_EQ(last_error(), message) << "success leaves it";
  std::string elsewhere = "unset";
  std::thread([&] { elsewhere = vattn_last_error(); }).join();
  EXPECT_EQ(elsewhere, "");
  EXPECT_EQ(vattn_tensor_resize(tensor.handle, -1), VATTN_INVALID_ARGUMENT);
  EXPECT_NE(last_error(), message);
}

TEST(CInterface, AnErrorCarriesItsBytes) {
  const Cache cache("meta");
  ASSERT_EQ(vattn_cache_set_memory_limit(cache.handle, 4 * kPage), VATTN_OK);
  const std::int64_t slot = cache.alloc();
  ASSERT_EQ(cache.step(slot, kPageTokens + 1), VATTN_OUT_OF_MEMORY);
  auto info = ready<vattn_error_info>();
  ASSERT_EQ(vattn_last_error_info(&info), VATTN_OK);
  EXPECT_EQ(info.status, VATTN_OUT_OF_MEMORY);
  EXPECT_EQ(std::string(info.message), last_error());
  EXPECT_EQ(info.needed_bytes, 8U * kPage);
  EXPECT_EQ(info.available_bytes, 4U * kPage);
  EXPECT_EQ(info.limit_bytes, 4U * kPage);
  EXPECT_EQ(info.held_by_others_bytes, 0U) << "nobody else has any: waiting cannot help";
  EXPECT_EQ(std::string(info.driver_call), "");
  EXPECT_EQ(std::string(info.driver_code_name), "");
  EXPECT_EQ(info.driver_code, 0);

  ASSERT_EQ(cache.step(slot, 1), VATTN_OK);
  const std::int64_t second = cache.alloc();
  ASSERT_EQ(cache.step(second, 1), VATTN_OUT_OF_MEMORY);
  ASSERT_EQ(vattn_last_error_info(&info), VATTN_OK);
  EXPECT_EQ(info.needed_bytes, 4U * kPage);
  EXPECT_EQ(info.held_by_others_bytes, 4U * kPage) << "the first slot's";

  ASSERT_EQ(vattn_cache_free(cache.handle, 99), VATTN_OUT_OF_RANGE);
  ASSERT_EQ(vattn_last_error_info(&info), VATTN_OK);
  EXPECT_EQ(info.status, VATTN_OUT_OF_RANGE);
  EXPECT_EQ(info.needed_bytes, 0U) << "nothing is left of the failure before";
  std::thread([] {
    auto elsewhere = ready<vattn_error_info>();
    EXPECT_EQ(vattn_last_error_info(&elsewhere), VATTN_OK);
    EXPECT_EQ(elsewhere.status, VATTN_OK);
    EXPECT_EQ(std::string(elsewhere.message), "");
  }).join();
}

TEST(CInterface, AnErrorCarriesTheDriversCallAndCode) {
  if (!cuda::on_fake()) GTEST_SKIP() << "steers the fake library";
  fake_cuda_reset();
  fake_cuda_fail("cuDeviceGet", 1, 101, 1);
  vattn_pool* pool = nullptr;
  EXPECT_EQ(vattn_pool_create("cuda:0", 0, 0, &pool), VATTN_DRIVER_ERROR);
  auto info = ready<vattn_error_info>();
  ASSERT_EQ(vattn_last_error_info(&info), VATTN_OK);
  EXPECT_EQ(info.status, VATTN_DRIVER_ERROR);
  EXPECT_EQ(std::string(info.driver_call), "cuDeviceGet");
  EXPECT_EQ(info.driver_code, 101);
  EXPECT_EQ(std::string(info.driver_code_name), "CUDA_ERROR_INVALID_DEVICE");
  EXPECT_EQ(info.needed_bytes, 0U);
  fake_cuda_reset();
}

TEST(CInterface, AnIndexOutOfRangeIsItsOwnStatus) {
  const Cache cache("meta");
  std::int64_t tokens = 77;
  EXPECT_EQ(vattn_cache_seq_len(cache.handle, 4, &tokens), VATTN_OUT_OF_RANGE);
  EXPECT_TRUE(last_error_has("slot=4")) << last_error();
  EXPECT_EQ(tokens, 77) << "the result is untouched";
  EXPECT_EQ(vattn_cache_committed_len(cache.handle, -1, &tokens), VATTN_OUT_OF_RANGE);
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  EXPECT_EQ(vattn_cache_layer(cache.handle, 2, &k, &v), VATTN_OUT_OF_RANGE);
  EXPECT_EQ(vattn_cache_view(cache.handle, 0, 0, &k, &v), VATTN_INVALID_ARGUMENT) << "a slot not in use is a value";
}

TEST(CInterface, AProductBeyond64BitsIsItsOwnStatus) {
  vattn_cache_config config = small_config("meta");
  config.head_dim = kLargest;
  vattn_cache* cache = nullptr;
  EXPECT_EQ(vattn_cache_create(&config, &cache), VATTN_OVERFLOW);
  EXPECT_TRUE(last_error_has("head_dim")) << last_error();
  EXPECT_EQ(cache, nullptr);
  const std::int64_t shape = 2;
  vattn_tensor* tensor = nullptr;
  EXPECT_EQ(vattn_tensor_create(&shape, 1, kLargest, "int8", "meta", 0, 0, &tensor), VATTN_OVERFLOW);
  EXPECT_EQ(tensor, nullptr);
}

TEST(CInterface, NoFreeSlotIsItsOwnStatus) {
  const Cache cache("meta");
  std::int64_t first = -1;
  ASSERT_EQ(vattn_cache_alloc_block(cache.handle, 4, &first), VATTN_OK);
  EXPECT_EQ(vattn_cache_alloc(cache.handle, &first), VATTN_NO_FREE_SLOT);
  EXPECT_EQ(vattn_cache_alloc_block_on_stream(cache.handle, 2, 0, &first), VATTN_NO_FREE_SLOT);
  EXPECT_EQ(first, 0) << "the result is untouched";
}

TEST(CInterface, ADriverThatCannotBeOpenedIsItsOwnStatus) {
  static_cast<void>(cuda::on_fake());  // settles what the variable is for everyone else
  const char* const set = std::getenv("VATTN_CUDA_LIBRARY");
  const std::string before = set != nullptr ? set : "";
  ::setenv("VATTN_CUDA_LIBRARY", "/nowhere/libcuda.so.1", 1);
  vattn_pool* pool = nullptr;
  EXPECT_EQ(vattn_pool_create("cuda:0", 0, 0, &pool), VATTN_DRIVER_ERROR);
  if (set != nullptr) {
    ::setenv("VATTN_CUDA_LIBRARY", before.c_str(), 1);
  } else {
    ::unsetenv("VATTN_CUDA_LIBRARY");
  }
  EXPECT_TRUE(last_error_has("/nowhere/libcuda.so.1")) << last_error();
  EXPECT_EQ(pool, nullptr);
}

TEST(CInterface, AClosedCacheSaysSoWhateverIsAsked) {
  const Cache cache("meta");
  ASSERT_EQ(vattn_cache_close(cache.handle), VATTN_OK);
  EXPECT_EQ(vattn_cache_close(cache.handle), VATTN_OK) << "twice is fine";
  const std::int64_t zero = 0;
  std::int64_t out = 0;
  EXPECT_EQ(vattn_cache_alloc(cache.handle, &out), VATTN_CLOSED);
  EXPECT_EQ(vattn_cache_free(cache.handle, 0), VATTN_CLOSED);
  EXPECT_EQ(vattn_cache_step_slots(cache.handle, &zero, &zero, 1), VATTN_CLOSED);
  EXPECT_EQ(vattn_cache_settle(cache.handle), VATTN_CLOSED);
  EXPECT_EQ(vattn_cache_set_memory_limit(cache.handle, 64 * kPage), VATTN_CLOSED);
  EXPECT_TRUE(last_error_has("closed")) << last_error();
  const Tensor tensor("meta");
  ASSERT_EQ(vattn_tensor_close(tensor.handle), VATTN_OK);
  EXPECT_EQ(vattn_tensor_resize(tensor.handle, 1), VATTN_CLOSED);
  EXPECT_EQ(vattn_tensor_rows(tensor.handle, &out), VATTN_CLOSED);
}

TEST(CInterface, MovingMemoryOfACapturedStreamIsAnError) {
  if (!cuda::on_fake()) GTEST_SKIP() << "steers the fake library";
  fake_cuda_reset();
  const vattn_stream stream = fake_cuda_stream_create(0);
  {
    vattn_cache_config config = small_config("cuda");
    config.page_size = config.memory_limit = 0;
    const Cache cache(config);
    const std::int64_t slot = cache.alloc();
    fake_cuda_set_capturing(stream, 1);
    EXPECT_EQ(vattn_cache_free_on_stream(cache.handle, slot, stream), VATTN_ERROR);
    EXPECT_TRUE(last_error_has("captured")) << last_error();
    fake_cuda_set_capturing(stream, 0);
    EXPECT_EQ(vattn_cache_free_on_stream(cache.handle, slot, stream), VATTN_OK);
  }
  fake_cuda_stream_destroy(stream);
}

TEST(CInterface, AListTooLongForTheProcessIsRefused) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer ends the program instead";
#endif
  const Cache cache("meta");
  const std::int64_t zero = 0;
  // Neither reads past the one element: the copy of the list cannot be made in the first place.
  EXPECT_EQ(vattn_cache_step_slots(cache.handle, &zero, &zero, std::int64_t{1} << 58), VATTN_OUT_OF_MEMORY);
  EXPECT_TRUE(last_error_has("bookkeeping")) << last_error();
  EXPECT_EQ(vattn_cache_step_slots(cache.handle, &zero, &zero, std::int64_t{1} << 62), VATTN_ERROR);
}

TEST(CInterface, WordsItDoesNotKnowAreNamed) {
  struct Case {
    const char* word;
    std::function<void(vattn_cache_config&, const char*)> set;
  };
  const std::vector<Case> cases{
      {"int128", [](vattn_cache_config& config, const char* word) { config.dtype = word; }},
      {"tpu:0", [](vattn_cache_config& config, const char* word) { config.device = word; }},
      {"DNH", [](vattn_cache_config& config, const char* word) { config.layout = word; }},
      {"ones", [](vattn_cache_config& config, const char* word) { config.unmapped_reads = word; }},
  };
  for (const Case& each : cases) {
    vattn_cache_config config = small_config("meta");
    each.set(config, each.word);
    vattn_cache* cache = nullptr;
    EXPECT_EQ(vattn_cache_create(&config, &cache), VATTN_INVALID_ARGUMENT) << each.word;
    EXPECT_TRUE(last_error_has("=\"" + std::string(each.word) + "\"")) << last_error();
    EXPECT_EQ(cache, nullptr);
  }
}

TEST(CInterface, AnotherDeviceThanThePoolsIsRefused) {
  const Pool pool("meta");
  vattn_cache_config config = small_config("cpu");
  config.page_size = config.memory_limit = 0;
  config.pool = pool.handle;
  vattn_cache* cache = nullptr;
  EXPECT_EQ(vattn_cache_create(&config, &cache), VATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("device=\"cpu\"") && last_error_has("\"meta\"")) << last_error();
  EXPECT_EQ(pool.stats().members, 0U);
}

TEST(CInterface, ANegativeCountIsRefused) {
  const Cache cache("meta");
  const std::int64_t zero = 0;
  EXPECT_EQ(vattn_cache_step(cache.handle, &zero, -1), VATTN_INVALID_ARGUMENT);
  EXPECT_TRUE(last_error_has("count=-1")) << last_error();
  EXPECT_EQ(vattn_cache_step_slots(cache.handle, nullptr, nullptr, 0), VATTN_OK) << "nothing needs no pointer";
}

TEST(CInterface, DestroyingNothingIsFine) {
  const std::string before = last_error();
  vattn_cache_destroy(nullptr);
  vattn_pool_destroy(nullptr);
  vattn_tensor_destroy(nullptr);
  EXPECT_EQ(last_error(), before);
}

/// A call with NULL for one parameter, and that parameter's name.
struct NullCase {
  std::string parameter;
  std::function<vattn_status()> call;
};

void expect_all_refused(const std::vector<NullCase>& cases) {
  for (std::size_t i = 0; i < cases.size(); ++i) {
    EXPECT_EQ(cases[i].call(), VATTN_INVALID_ARGUMENT) << "case " << i << ": " << cases[i].parameter;
    EXPECT_EQ(last_error(), cases[i].parameter + " must not be NULL") << "case " << i;
  }
}

TEST(CInterface, ANullCacheIsRefusedByEveryFunction) {
  std::int64_t n = 0;
  std::uint64_t bytes = 0;
  std::int32_t fits = 0;
  auto k = ready<vattn_view>();
  auto v = ready<vattn_view>();
  auto stats = ready<vattn_stats>();
  expect_all_refused({
      {"cache", [] { return vattn_cache_close(nullptr); }},
      {"cache", [&] { return vattn_cache_alloc(nullptr, &n); }},
      {"cache", [&] { return vattn_cache_alloc_block(nullptr, 1, &n); }},
      {"cache", [&] { return vattn_cache_alloc_for(nullptr, 1, nullptr, &n); }},
      {"cache", [&] { return vattn_cache_alloc_on_stream(nullptr, 0, &n); }},
      {"cache", [&] { return vattn_cache_alloc_block_on_stream(nullptr, 1, 0, &n); }},
      {"cache", [] { return vattn_cache_free(nullptr, 0); }},
      {"cache", [] { return vattn_cache_free_on_stream(nullptr, 0, 0); }},
      {"cache", [] { return vattn_cache_truncate(nullptr, 0, 0); }},
      {"cache", [] { return vattn_cache_truncate_on_stream(nullptr, 0, 0, 0); }},
      {"cache", [] { return vattn_cache_record_stream(nullptr, 0); }},
      {"cache", [] { return vattn_cache_settle(nullptr); }},
      {"cache", [&] { return vattn_cache_step(nullptr, &n, 1); }},
      {"cache", [&] { return vattn_cache_step_on_stream(nullptr, &n, 1, 0); }},
      {"cache", [&] { return vattn_cache_step_slots(nullptr, &n, &n, 1); }},
      {"cache", [&] { return vattn_cache_fits(nullptr, &n, &n, 1, &fits); }},
      {"cache", [&] { return vattn_cache_fits_new(nullptr, &n, &n, 1, &n, 1, &fits); }},
      {"cache", [&] { return vattn_cache_slot_bytes(nullptr, 0, &bytes); }},
      {"cache", [&] { return vattn_cache_write_spans(nullptr, 0, &n, &n, 1, 1, &n, &n); }},
      {"cache", [&] { return vattn_cache_seq_len(nullptr, 0, &n); }},
      {"cache", [&] { return vattn_cache_committed_len(nullptr, 0, &n); }},
      {"cache", [&] { return vattn_cache_view(nullptr, 0, 0, &k, &v); }},
      {"cache", [&] { return vattn_cache_batch(nullptr, 0, &n, 1, 1, &k, &v); }},
      {"cache", [&] { return vattn_cache_layer(nullptr, 0, &k, &v); }},
      {"cache", [&] { return vattn_cache_write(nullptr, 0, &n, &n, 1, &n, &n); }},
      {"cache", [&] { return vattn_cache_memory_limit(nullptr, &bytes); }},
      {"cache", [] { return vattn_cache_set_memory_limit(nullptr, kPage); }},
      {"cache", [&] { return vattn_cache_stats(nullptr, &stats); }},
      {"cache", [&] { return vattn_cache_page_size(nullptr, &n); }},
      {"cache", [&] { return vattn_cache_tokens_per_page(nullptr, &n); }},
  });
}

TEST(CInterface, ANullResultOrListOfACacheIsRefusedAndNothingIsTaken) {
  const Cache cache("meta");
  vattn_cache* const it = cache.handle;
  vattn_cache_config config = small_config("meta");
  vattn_cache_config untyped = small_config("meta");
  untyped.dtype = nullptr;
  vattn_cache* made = nullptr;
  std::int64_t n = 0;
  std::int32_t fits = 0;
  auto view = ready<vattn_view>();
  expect_all_refused({
      {"config", [&] { return vattn_cache_create(nullptr, &made); }},
      {"cache", [&] { return vattn_cache_create(&config, nullptr); }},
      {"dtype", [&] { return vattn_cache_create(&untyped, &made); }},
      {"slot", [&] { return vattn_cache_alloc(it, nullptr); }},
      {"first", [&] { return vattn_cache_alloc_block(it, 1, nullptr); }},
      {"slot", [&] { return vattn_cache_alloc_for(it, 1, nullptr, nullptr); }},
      {"slot", [&] { return vattn_cache_alloc_on_stream(it, 0, nullptr); }},
      {"first", [&] { return vattn_cache_alloc_block_on_stream(it, 1, 0, nullptr); }},
      {"lengths", [&] { return vattn_cache_step(it, nullptr, 4); }},
      {"lengths", [&] { return vattn_cache_step_on_stream(it, nullptr, 4, 0); }},
      {"slots", [&] { return vattn_cache_step_slots(it, nullptr, &n, 1); }},
      {"lengths", [&] { return vattn_cache_step_slots(it, &n, nullptr, 1); }},
      {"slots", [&] { return vattn_cache_fits(it, nullptr, &n, 1, &fits); }},
      {"fits", [&] { return vattn_cache_fits(it, &n, &n, 1, nullptr); }},
      {"fits", [&] { return vattn_cache_fits_new(it, &n, &n, 1, &n, 1, nullptr); }},
      {"fresh", [&] { return vattn_cache_fits_new(it, &n, &n, 1, nullptr, 1, &fits); }},
      {"bytes", [&] { return vattn_cache_slot_bytes(it, 0, nullptr); }},
      {"slots", [&] { return vattn_cache_write_spans(it, 0, nullptr, &n, 1, 1, &n, &n); }},
      {"positions", [&] { return vattn_cache_write_spans(it, 0, &n, nullptr, 1, 1, &n, &n); }},
      {"tokens", [&] { return vattn_cache_seq_len(it, 0, nullptr); }},
      {"tokens", [&] { return vattn_cache_committed_len(it, 0, nullptr); }},
      {"k", [&] { return vattn_cache_view(it, 0, 0, nullptr, &view); }},
      {"v", [&] { return vattn_cache_view(it, 0, 0, &view, nullptr); }},
      {"k", [&] { return vattn_cache_batch(it, 0, &n, 1, 1, nullptr, &view); }},
      {"v", [&] { return vattn_cache_batch(it, 0, &n, 1, 1, &view, nullptr); }},
      {"slots", [&] { return vattn_cache_batch(it, 0, nullptr, 1, 1, &view, &view); }},
      {"k", [&] { return vattn_cache_layer(it, 0, nullptr, &view); }},
      {"v", [&] { return vattn_cache_layer(it, 0, &view, nullptr); }},
      {"slots", [&] { return vattn_cache_write(it, 0, nullptr, &n, 1, &n, &n); }},
      {"positions", [&] { return vattn_cache_write(it, 0, &n, nullptr, 1, &n, &n); }},
      {"bytes", [&] { return vattn_cache_memory_limit(it, nullptr); }},
      {"stats", [&] { return vattn_cache_stats(it, nullptr); }},
      {"bytes", [&] { return vattn_cache_page_size(it, nullptr); }},
      {"tokens", [&] { return vattn_cache_tokens_per_page(it, nullptr); }},
  });
  EXPECT_EQ(made, nullptr);
  EXPECT_EQ(cache.stats().active_slots, 0U);
}

TEST(CInterface, ANullPoolOrTensorOrResultOfOneIsRefused) {
  const Pool pool;
  const Tensor tensor("meta");
  std::int64_t n = 4;
  std::uint64_t bytes = 0;
  void* data = nullptr;
  auto stats = ready<vattn_pool_stats>();
  auto view = ready<vattn_view>();
  vattn_tensor* made = nullptr;
  expect_all_refused({
      {"pool", [] { return vattn_pool_create("meta", 0, 0, nullptr); }},
      {"pool", [] { return vattn_pool_close(nullptr); }},
      {"pool", [&] { return vattn_pool_memory_limit(nullptr, &bytes); }},
      {"bytes", [&] { return vattn_pool_memory_limit(pool.handle, nullptr); }},
      {"pool", [] { return vattn_pool_set_memory_limit(nullptr, kPage); }},
      {"pool", [&] { return vattn_pool_page_size(nullptr, &n); }},
      {"bytes", [&] { return vattn_pool_page_size(pool.handle, nullptr); }},
      {"pool", [&] { return vattn_pool_stats_now(nullptr, &stats); }},
      {"stats", [&] { return vattn_pool_stats_now(pool.handle, nullptr); }},
      {"tensor", [&] { return vattn_tensor_create(&n, 1, 1, "int8", "meta", 0, 0, nullptr); }},
      {"row_shape", [&] { return vattn_tensor_create(nullptr, 1, 1, "int8", "meta", 0, 0, &made); }},
      {"dtype", [&] { return vattn_tensor_create(&n, 1, 1, nullptr, "meta", 0, 0, &made); }},
      {"pool", [&] { return vattn_tensor_create_in_pool(&n, 1, 1, "int8", nullptr, &made); }},
      {"tensor", [&] { return vattn_tensor_create_in_pool(&n, 1, 1, "int8", pool.handle, nullptr); }},
      {"tensor", [] { return vattn_tensor_resize(nullptr, 1); }},
      {"tensor", [&] { return vattn_tensor_append(nullptr, &n, 1); }},
      {"tensor", [] { return vattn_tensor_close(nullptr); }},
      {"tensor", [&] { return vattn_tensor_rows(nullptr, &n); }},
      {"rows", [&] { return vattn_tensor_rows(tensor.handle, nullptr); }},
      {"tensor", [&] { return vattn_tensor_view(nullptr, &view); }},
      {"view", [&] { return vattn_tensor_view(tensor.handle, nullptr); }},
      {"view", [] { return vattn_view_retain(nullptr); }},
      {"view", [] { return vattn_view_release(nullptr); }},
      {"info", [] { return vattn_last_error_info(nullptr); }},
      {"tensor", [&] { return vattn_tensor_data(nullptr, &data); }},
      {"data", [&] { return vattn_tensor_data(tensor.handle, nullptr); }},
      {"tensor", [&] { return vattn_tensor_mapped_bytes(nullptr, &bytes); }},
      {"bytes", [&] { return vattn_tensor_mapped_bytes(tensor.handle, nullptr); }},
  });
  EXPECT_EQ(made, nullptr);
  EXPECT_EQ(vattn_tensor_append(tensor.handle, nullptr, 1), VATTN_INVALID_ARGUMENT);
  EXPECT_EQ(tensor.rows(), 0);
}

}  // namespace
}  // namespace vattn
