// What does a `step` cost that finds its memory mapped? Every slot active.
//
//   decode_step [--slots N] [--rounds N] [--steps N]            every length one token further, a step at a time
//   decode_step --unchanged [--slots N] ...                     every length as it was
//   decode_step --unchanged --count N                           N steps and no clock, to be counted by callgrind
//
// On `meta`, so that only the library's own work is timed. Advancing lengths start staggered, as requests do, and stay inside
// one page of 64 MiB (32,768 tokens): growth as the length has it, no page to be mapped. Unchanged lengths are those of 2 MiB
// pages with the mapper thread there and done. Prints one line of JSON: nanoseconds a step, a sample a round.
#include "report.hpp"
#include "timing.hpp"
#include "vattn/vattn.hpp"

namespace {

vattn::CacheConfig config_of(long slots, bool unchanged) {
  vattn::CacheConfig config{.num_layers = 32, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = slots};
  config.max_seq_len = unchanged ? 8192 : 32768;
  config.dtype = vattn::DType::kBFloat16;
  config.dense = true;  // 64 tensors: the most a step has to look at
  config.page_size = unchanged ? std::int64_t{2} << 20 : std::int64_t{64} << 20;
  config.lookahead_tokens = unchanged ? 1024 : 0;
  return config;
}

}  // namespace

int main(int argc, char** argv) {
  const long slots = bench::number_option(argc, argv, "--slots", 256);
  const long rounds = bench::number_option(argc, argv, "--rounds", 51);
  const long steps = bench::number_option(argc, argv, "--steps", 200);
  const long count = bench::number_option(argc, argv, "--count", 0);
  const bool unchanged = bench::has_option(argc, argv, "--unchanged");
  if (!unchanged && (rounds + 1) * steps > 31000) {
    std::fprintf(stderr, "--rounds %ld --steps %ld: more tokens than a page holds\n", rounds, steps);
    return 2;
  }
  vattn::KVCache cache(config_of(slots, unchanged), {vattn::Device::Kind::kMeta, 0});
  cache.alloc_block(slots);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(slots), 700);
  for (std::size_t slot = 0; !unchanged && slot < lengths.size(); ++slot) {
    lengths[slot] = 100 + static_cast<std::int64_t>(slot * 37 % 1000);
  }
  cache.step(std::span<const std::int64_t>(lengths));
  cache.settle();
  const std::uint64_t calls = cache.stats().driver_calls;
  const auto step = [&] {
    if (!unchanged) {
      for (std::int64_t& length : lengths) ++length;
    }
    cache.step(std::span<const std::int64_t>(lengths));
  };
  if (count > 0) {
    for (long i = 0; i < count; ++i) step();
    return 0;
  }
  std::vector<double> samples;
  for (long round = -1; round < rounds; ++round) {
    const double took = bench::seconds([&] {
      for (long i = 0; i < steps; ++i) step();
    });
    if (round >= 0) samples.push_back(took / static_cast<double>(steps) * 1e9);
  }
  bench::print_report({{"vattn, C++", "ns", samples}},
                      {{"driver_calls", static_cast<long>(cache.stats().driver_calls - calls)}});
}
