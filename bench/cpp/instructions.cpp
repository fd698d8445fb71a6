// What is counted for the guard against slowdowns (make bench-check): one operation, N times, with no clock.
//
//   bench_instructions CASE N
//
//   step     256 active slots, one length each, nothing grows
//   page     a request grows by one page in each of 64 tensors
//   run      a request is admitted and grows by 64 pages in each of 64 tensors at once: runs of neighbours
//   cycle    alloc, step within what is mapped, free
//   reclaim  two requests hand 15 pages in each of 64 tensors to and fro: truncate the one, grow the other, and back
//
// The cost of the operation is the difference of two runs with different N under callgrind, so that what is around it cancels
// out. On the null driver: the library's own instructions, no system call. Without look-ahead there is no mapper thread, whose
// passes would depend on the scheduler: the same N gives the same count. Thread: one.
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "vattn/vattn.hpp"

namespace {

constexpr std::int64_t kTokensAPage = 1024;  // of 2 MiB, one layer a tensor: 8 heads x 128 x 2 bytes a token
constexpr std::int64_t kPagesARow = 64;

vattn::CacheConfig llama(std::int64_t slots) {
  vattn::CacheConfig config{.num_layers = 32, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = slots};
  config.max_seq_len = kPagesARow * kTokensAPage;
  config.dtype = vattn::DType::kBFloat16;
  config.dense = true;
  config.lookahead_tokens = 0;
  config.memory_limit = std::int64_t{1} << 46;  // more than any case takes
  return config;
}

constexpr vattn::Device kMeta{vattn::Device::Kind::kMeta, 0};

void step(std::int64_t times) {
  constexpr std::int64_t kSlots = 256;
  vattn::KVCache cache(llama(kSlots), kMeta);
  cache.alloc_block(kSlots);
  const std::vector<std::int64_t> lengths(kSlots, 700);
  cache.step(std::span<const std::int64_t>(lengths));
  for (std::int64_t i = 0; i < times; ++i) cache.step(std::span<const std::int64_t>(lengths));
}

// Slots are as many whatever N is, or making them would be part of the difference: at most 4,096 pages, 128 runs.
void page(std::int64_t times) {
  constexpr std::int64_t kSlots = 64;
  vattn::KVCache cache(llama(kSlots), kMeta);
  cache.alloc_block(kSlots);
  for (std::int64_t i = 0; i < times; ++i) cache.step({{i / kPagesARow, (i % kPagesARow + 1) * kTokensAPage}});
}

void run(std::int64_t times) {
  vattn::KVCache cache(llama(128), kMeta);
  for (std::int64_t i = 0; i < times; ++i) cache.step({{cache.alloc(), kPagesARow * kTokensAPage}});
}

void cycle(std::int64_t times) {
  vattn::KVCache cache(llama(256), kMeta);
  for (std::int64_t i = 0; i < times; ++i) {
    const std::int64_t slot = cache.alloc(700);
    cache.step({{slot, 700}});
    cache.free(slot);
  }
}

void reclaim(std::int64_t times) {
  vattn::CacheConfig config = llama(2);
  config.memory_limit = std::int64_t{17} * 64 * (2 << 20);  // 16 pages a tensor for one request, 1 for the other
  vattn::KVCache cache(config, kMeta);
  const std::int64_t a = cache.alloc();
  const std::int64_t b = cache.alloc();
  cache.step({{a, 16 * kTokensAPage}, {b, kTokensAPage}});
  for (std::int64_t i = 0; i < times; ++i) {
    cache.truncate(a, kTokensAPage);
    cache.step({{b, 16 * kTokensAPage}});
    cache.truncate(b, kTokensAPage);
    cache.step({{a, 16 * kTokensAPage}});
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view which = argc == 3 ? argv[1] : "";
  const std::int64_t times = argc == 3 ? std::atoll(argv[2]) : 0;
  if (times < 1) {
    std::fprintf(stderr, "bench_instructions step|page|run|cycle|reclaim N: N must be at least 1\n");
    return 2;
  }
  try {
    if (which == "step") return step(times), 0;
    if (which == "page") return page(times), 0;
    if (which == "run") return run(times), 0;
    if (which == "cycle") return cycle(times), 0;
    if (which == "reclaim") return reclaim(times), 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  std::fprintf(stderr, "%s is not step, page, run, cycle or reclaim\n", argv[1]);
  return 2;
}
