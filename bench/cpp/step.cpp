// What does a step cost that grows nothing? 256 active slots, one length each, with the mapper thread there and done: medians
// of many rounds, as JSON. instructions.cpp has the same step without a clock.
#include <cstdio>

#include "timing.hpp"
#include "vattn/vattn.hpp"

int main() {
  constexpr std::int64_t kSlots = 256;
  constexpr int kSteps = 1000;
  constexpr int kRounds = 201;
  vattn::CacheConfig config{
      .num_layers = 32, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = kSlots, .max_seq_len = 8192};
  config.dtype = vattn::DType::kBFloat16;
  config.lookahead_tokens = 1024;  // a page, the default where there is memory
  vattn::KVCache cache(config, {vattn::Device::Kind::kMeta, 0});
  cache.alloc_block(kSlots);
  std::vector<std::int64_t> lengths(kSlots, 700);
  cache.step(std::span<const std::int64_t>(lengths));
  cache.settle();
  const std::uint64_t calls = cache.stats().driver_calls;
  const auto steps = [&] {
    for (int i = 0; i < kSteps; ++i) cache.step(std::span<const std::int64_t>(lengths));
  };
  std::vector<double> rounds;
  for (int round = 0; round < kRounds; ++round) rounds.push_back(bench::seconds(steps) / kSteps * 1e9);
  std::printf("{\"bench\": \"step\", \"slots\": %ld, \"median_ns\": %.1f, \"min_ns\": %.1f, \"driver_calls\": %llu}\n",
              static_cast<long>(kSlots), bench::median(rounds), *std::min_element(rounds.begin(), rounds.end()),
              static_cast<unsigned long long>(cache.stats().driver_calls - calls));
}
