// What a cache's configuration becomes on a driver with given traits, and which ones are refused: arithmetic, no memory.
#include "vattn/kv/geometry.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace vattn {
namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();

/// A driver with pages of 4 KiB: one that only counts, or one with memory behind it.
DriverTraits accounting() { return {.name = "null", .granularity = 4096, .default_page_size = 4096}; }
DriverTraits memory() {
  DriverTraits traits = accounting();
  traits.name = "host";
  traits.has_memory = true;
  traits.reads_as_zeros = true;
  return traits;
}
DriverTraits walled(std::uint64_t mappings) {
  DriverTraits traits = memory();
  traits.mapping_limit = mappings;
  return traits;
}

CacheConfig small_config() {
  return {.num_layers = 4, .num_kv_heads = 2, .head_dim = 16, .max_batch_size = 2, .max_seq_len = 256};
}

struct Refused {
  std::string part;  ///< of the message
  std::function<void(CacheConfig&)> change;
};

template <typename Exception>
void expect_refused(const std::vector<Refused>& cases, const DriverTraits& traits) {
  for (const Refused& each : cases) {
    CacheConfig config = small_config();
    each.change(config);
    try {
      const Geometry geometry(config, traits);
      ADD_FAILURE() << each.part << " was let through";
    } catch (const Exception& error) {
      EXPECT_NE(std::string(error.what()).find(each.part), std::string::npos) << error.what();
    }
  }
}

TEST(Geometry, ValuesOutOfRangeAreNamed) {
  expect_refused<std::invalid_argument>(
      {
          {"num_layers=0", [](CacheConfig& config) { config.num_layers = 0; }},
          {"num_layers=65537", [](CacheConfig& config) { config.num_layers = 65537; }},
          {"num_kv_heads=0", [](CacheConfig& config) { config.num_kv_heads = 0; }},
          {"head_dim=-1", [](CacheConfig& config) { config.head_dim = -1; }},
          {"v_head_dim=-1", [](CacheConfig& config) { config.v_head_dim = -1; }},
          {"max_batch_size=0", [](CacheConfig& config) { config.max_batch_size = 0; }},
          {"max_seq_len=0", [](CacheConfig& config) { config.max_seq_len = 0; }},
          {"guard_tokens=-1", [](CacheConfig& config) { config.guard_tokens = -1; }},
          {"lookahead_tokens=-1", [](CacheConfig& config) { config.lookahead_tokens = -1; }},
          {"warm_tokens=-1", [](CacheConfig& config) { config.warm_tokens = -1; }},
          {"layers_per_tensor=5", [](CacheConfig& config) { config.layers_per_tensor = 5; }},
          {"layers_per_tensor=3 must divide num_layers=4", [](CacheConfig& config) { config.layers_per_tensor = 3; }},
          {"dtype=10", [](CacheConfig& config) { config.dtype = static_cast<DType>(10); }},
          {"page_size=0", [](CacheConfig& config) { config.page_size = 0; }},
          {"page_size=6144", [](CacheConfig& config) { config.page_size = 6144; }},
      },
      memory());
}

TEST(Geometry, ProductsThatLeave64BitsAreNamed) {
  expect_refused<std::overflow_error>(
      {
          {"head_dim", [](CacheConfig& config) { config.head_dim = kLargest; }},
          {"max_seq_len", [](CacheConfig& config) { config.max_seq_len = kLargest; }},
          {"max_seq_len + guard_tokens",
           [](CacheConfig& config) {
             config.max_seq_len = 2;
             config.guard_tokens = kLargest - 1;
           }},
          {"num_kv_heads", [](CacheConfig& config) { config.num_kv_heads = kLargest; }},
          {"num_layers x max_batch_size", [](CacheConfig& config) { config.max_seq_len = kLargest >> 7; }},
      },
      accounting());
}

TEST(Geometry, MoreAddressesThanAProcessHasAreRefusedWhereThereIsMemory) {
  const std::vector<Refused> too_long{
      {"bytes of addresses", [](CacheConfig& config) { config.max_seq_len = std::int64_t{1} << 40; }}};
  expect_refused<std::overflow_error>(too_long, memory());
  CacheConfig config = small_config();
  too_long[0].change(config);
  EXPECT_EQ(Geometry(config, accounting()).reserved_bytes(), std::int64_t{16} << 46) << "accounting has no such bound";
}

TEST(Geometry, OnlyADriverThatCanReadsUnmappedMemoryAsZeros) {
  CacheConfig config = small_config();
  EXPECT_EQ(Geometry(config, memory()).unmapped_reads(), UnmappedReads::kZeros);
  EXPECT_EQ(Geometry(config, accounting()).unmapped_reads(), UnmappedReads::kFault);
  config.unmapped_reads = UnmappedReads::kFault;
  EXPECT_EQ(Geometry(config, memory()).unmapped_reads(), UnmappedReads::kFault);
  expect_refused<std::invalid_argument>(
      {{"unmapped_reads=\"zeros\"", [](CacheConfig& each) { each.unmapped_reads = UnmappedReads::kZeros; }}}, accounting());
}

TEST(Geometry, HeadMajorIsChosenWhereTheMappingsAllowIt) {
  CacheConfig config = small_config();  // 4 layers x K and V x 2 slots x 2 heads: 32 rows
  EXPECT_EQ(Geometry(config, walled(128)).layout(), Layout::kHND);
  EXPECT_EQ(Geometry(config, walled(127)).layout(), Layout::kNHD) << "half of the mappings, two a row";
  EXPECT_EQ(Geometry(config, walled(0)).layout(), Layout::kNHD) << "where mappings cost nothing, pages are saved";
  config.layers_per_tensor = 2;
  EXPECT_EQ(Geometry(config, walled(128)).layout(), Layout::kNHD) << "slices are token-major";
  config.layers_per_tensor = 1;
  config.v_head_dim = 0;
  EXPECT_EQ(Geometry(config, walled(64)).layout(), Layout::kHND) << "half the rows";
  config.max_batch_size = 1 << 20;
  config.num_kv_heads = 8;
  EXPECT_EQ(Geometry(config, walled(std::uint64_t{1} << 40)).layout(), Layout::kNHD) << "more rows than there are books for";
}

TEST(Geometry, HeadMajorThatCannotBeIsRefused) {
  const auto head_major = [](CacheConfig& config) { config.layout = Layout::kHND; };
  CacheConfig config = small_config();
  head_major(config);
  EXPECT_EQ(Geometry(config, memory()).rows_per_slot(), 2);
  expect_refused<std::invalid_argument>({{"at most 31 are possible", head_major}}, walled(127));
  expect_refused<std::invalid_argument>({{"layers_per_tensor=2",
                                          [&](CacheConfig& each) {
                                            head_major(each);
                                            each.layers_per_tensor = 2;
                                          }},
                                         {"at most 16777216 are possible",
                                          [&](CacheConfig& each) {
                                            head_major(each);
                                            each.max_batch_size = 1 << 20;
                                            each.num_kv_heads = 4;
                                          }}},
                                        memory());
}

/// Llama-3-8B's 2 KiB a token, layer and tensor, where pages are of 2 MiB.
CacheConfig large_config() {
  CacheConfig config{.num_layers = 32, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = 2, .max_seq_len = 4096};
  config.page_size = 2 << 20;
  return config;
}

std::int64_t chosen(const CacheConfig& config, const DriverTraits& traits) {
  return Geometry(config, traits).layers_per_tensor();
}

TEST(Geometry, LayersShareATensorUntilAPageHoldsAtMost64TokensOfEveryTensor) {
  CacheConfig config = large_config();  // 1,024 tokens of one layer a page
  EXPECT_EQ(chosen(config, accounting()), 16);
  EXPECT_EQ(Geometry(config, accounting()).tokens_per_page(), 64);
  EXPECT_EQ(Geometry(config, accounting()).layout(), Layout::kNHD);
  config.num_layers = 60;
  EXPECT_EQ(chosen(config, accounting()), 20) << "15 would leave 68 tokens, and 16 does not divide 60";
  config.num_layers = 31;
  EXPECT_EQ(chosen(config, accounting()), 31) << "a prime: all of them";
  config.num_layers = 8;
  EXPECT_EQ(chosen(config, accounting()), 8) << "as few tokens as there are layers for";
  config.page_size = 64 << 10;
  EXPECT_EQ(chosen(config, accounting()), 1) << "32 tokens a page";
  config.head_dim = kLargest >> 3;
  config.num_kv_heads = 1;
  config.max_seq_len = 1;
  config.dtype = DType::kUInt8;
  config.num_layers = config.max_batch_size = 1;
  EXPECT_EQ(chosen(config, accounting()), 1) << "a token spans pages";
}

TEST(Geometry, TheTensorWhosePagesHoldMostTokensDecides) {
  CacheConfig config = large_config();
  config.v_head_dim = 64;
  EXPECT_EQ(chosen(config, accounting()), 32) << "64 tokens of V";
  EXPECT_EQ(Geometry(config, accounting()).tokens_per_page(), 32) << "and 32 of K: the smallest over all tensors";
  config.v_head_dim = 256;
  EXPECT_EQ(chosen(config, accounting()), 16);
  config.v_head_dim = 0;
  EXPECT_EQ(chosen(config, accounting()), 16) << "there is no V to look at";
}

TEST(Geometry, OneLayerATensorOnTheHostForHeadMajorAndForDenseRows) {
  CacheConfig config = large_config();
  EXPECT_EQ(chosen(config, memory()), 1) << "the host";
  config.dense = true;
  EXPECT_EQ(chosen(config, accounting()), 1);
  config.layers_per_tensor = 1;
  EXPECT_EQ(chosen(config, accounting()), 1);
  config.dense = false;
  config.layers_per_tensor.reset();
  config.layout = Layout::kHND;
  EXPECT_EQ(chosen(config, accounting()), 1);
  expect_refused<std::invalid_argument>({{"layers_per_tensor=2 puts several layers between the tokens of one, and dense",
                                          [](CacheConfig& each) {
                                            each.dense = true;
                                            each.layers_per_tensor = 2;
                                          }}},
                                        accounting());
}

TEST(Geometry, MoreRowsThanThereAreBooksForAreRefused) {
  const auto many = [](CacheConfig& config) {
    config.num_layers = 16;
    config.max_batch_size = 1 << 20;
    config.max_seq_len = 1;
  };
  expect_refused<std::invalid_argument>({{"33554432 rows", many}}, accounting());
  CacheConfig config = small_config();
  many(config);
  config.layers_per_tensor = 2;
  EXPECT_EQ(Geometry(config, accounting()).groups(), 8) << "as the message advises";
}

TEST(Geometry, LookAheadIsAPageAndAtLeast64TokensWhereThereIsMemory) {
  CacheConfig config = small_config();
  config.layout = Layout::kNHD;  // 64 bytes a token, 64 tokens a page
  EXPECT_EQ(Geometry(config, memory()).lookahead_tokens(), 64);
  EXPECT_EQ(Geometry(config, memory()).warm_tokens(), 1);
  EXPECT_EQ(Geometry(config, accounting()).lookahead_tokens(), 0);
  EXPECT_EQ(Geometry(config, accounting()).warm_tokens(), 0);
  config.page_size = 8192;
  EXPECT_EQ(Geometry(config, memory()).lookahead_tokens(), 128);
  config.lookahead_tokens = kLargest;
  config.warm_tokens = kLargest;
  EXPECT_EQ(Geometry(config, memory()).lookahead_tokens(), 256) << "no further than max_seq_len";
  EXPECT_EQ(Geometry(config, memory()).warm_tokens(), 256);
}

TEST(Geometry, PagesAndTokensAgreeWithTheGuard) {
  CacheConfig config = small_config();
  config.layout = Layout::kNHD;
  config.guard_tokens = 4;
  const Geometry geometry(config, memory());
  EXPECT_EQ(geometry.pages_for(geometry.k(), 0), 0);
  EXPECT_EQ(geometry.pages_for(geometry.k(), 60), 1);
  EXPECT_EQ(geometry.pages_for(geometry.k(), 61), 2);
  EXPECT_EQ(geometry.tokens_in(geometry.k(), 0), 0);
  EXPECT_EQ(geometry.tokens_in(geometry.k(), 1), 60);
  EXPECT_EQ(geometry.tokens_in(geometry.k(), 100), 256) << "no more than max_seq_len";
  EXPECT_EQ(geometry.pages_per_group(), 8);
  EXPECT_EQ(geometry.bytes_per_token(), 4 * 2 * 2 * 16 * 2);
}

}  // namespace
}  // namespace vattn
