// How fast does memory arrive on the host? 4 GiB of a Llama-3-8B cache, token-major, 64 KiB pages, against two loops:
//
//   same    the system calls vattn makes, and nothing else: fallocate and mmap a page, madvise a run
//   plain   one fallocate and one mmap a page
//
// The arms take turns within one run, so a noisy machine is noisy for all; the figure is the ratio of medians. Nobody touches
// the pages. `--pages N` grows by N pages a row at a time (default: all at once), up to `--pages-a-row N` (64: 4 GiB). Prints
// one line of JSON: GiB a second of CPU time (all of it is work of this one thread), a sample a round.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "report.hpp"
#include "timing.hpp"
#include "vattn/vattn.hpp"

namespace {

constexpr std::int64_t kLayers = 32;
constexpr std::int64_t kTensors = 2 * kLayers;
constexpr std::int64_t kSlots = 16;
constexpr std::size_t kPage = 64 << 10;
constexpr std::int64_t kTokensAPage = 32;  // 8 heads x 128 x 2 bytes a token
constexpr std::size_t kRow = std::size_t{16} << 20;

struct Work {
  std::int64_t pages_a_row;  // 64 tensors x 16 slots x 64 pages x 64 KiB = 4 GiB
  std::int64_t pages_a_step;
};

double with_vattn(const Work& work) {
  vattn::CacheConfig config{.num_layers = kLayers, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = kSlots};
  config.lookahead_tokens = 0;  // the step's own calls are what is measured
  config.max_seq_len = static_cast<std::int64_t>(kRow / kPage) * kTokensAPage;
  config.dtype = vattn::DType::kBFloat16;
  config.layout = vattn::Layout::kNHD;
  config.page_size = static_cast<std::int64_t>(kPage);
  vattn::KVCache cache(config);
  cache.alloc_block(kSlots);
  std::vector<std::int64_t> lengths(kSlots, 0);
  return bench::cpu_seconds([&] {
    for (std::int64_t pages = work.pages_a_step; pages <= work.pages_a_row; pages += work.pages_a_step) {
      std::fill(lengths.begin(), lengths.end(), pages * kTokensAPage);
      cache.step(std::span<const std::int64_t>(lengths));
    }
  });
}

double with_loop(const Work& work, bool advise) {
  const int file = ::memfd_create("bench", MFD_CLOEXEC);
  bench::require(file >= 0, "memfd_create");
  std::vector<char*> tensors;
  for (std::int64_t tensor = 0; tensor < kTensors; ++tensor) {
    void* got = ::mmap(nullptr, kRow * kSlots, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    bench::require(got != MAP_FAILED, "mmap");
    ::madvise(got, kRow * kSlots, MADV_DONTFORK);
    tensors.push_back(static_cast<char*>(got));
  }
  const double took = bench::cpu_seconds([&] {
    for (std::int64_t from = 0; from < work.pages_a_row; from += work.pages_a_step) {
      for (std::int64_t slot = 0; slot < kSlots; ++slot) {
        for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
          const std::size_t row = static_cast<std::size_t>(slot) * kRow;
          for (std::int64_t page = from; page < from + work.pages_a_step; ++page) {
            const std::size_t in_tensor = row + static_cast<std::size_t>(page) * kPage;
            const auto offset = static_cast<off_t>(tensor * kRow * kSlots + in_tensor);
            bench::require(::fallocate(file, 0, offset, kPage) == 0, "fallocate");
            void* got =
                ::mmap(tensors[tensor] + in_tensor, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset);
            bench::require(got != MAP_FAILED, "mmap");
          }
          const std::size_t start = row + static_cast<std::size_t>(from) * kPage;
          if (!advise) continue;
          const std::size_t run = static_cast<std::size_t>(work.pages_a_step) * kPage;
          bench::require(::madvise(tensors[tensor] + start, run, MADV_DONTFORK) == 0, "madvise");
        }
      }
    }
  });
  for (char* tensor : tensors) ::munmap(tensor, kRow * kSlots);
  ::close(file);
  return took;
}

}  // namespace

int main(int argc, char** argv) {
  Work work{};
  work.pages_a_row = bench::number_option(argc, argv, "--pages-a-row", 64);
  work.pages_a_step = bench::number_option(argc, argv, "--pages", work.pages_a_row);
  const long rounds = bench::number_option(argc, argv, "--rounds", 5);
  if (work.pages_a_row > 256 || work.pages_a_row % work.pages_a_step != 0) {
    std::fprintf(stderr, "--pages-a-row must be at most 256, and --pages divide it\n");
    return 2;
  }
  const double gib = static_cast<double>(kTensors * kSlots * work.pages_a_row) * kPage / (std::size_t{1} << 30);
  std::vector<double> vattn_gib_s;
  std::vector<double> same_gib_s;
  std::vector<double> plain_gib_s;
  for (long round = 0; round < rounds; ++round) {
    vattn_gib_s.push_back(gib / with_vattn(work));
    same_gib_s.push_back(gib / with_loop(work, true));
    plain_gib_s.push_back(gib / with_loop(work, false));
  }
  bench::print_report(
      {{"vattn", "GiB/s", vattn_gib_s}, {"loop of the same calls", "GiB/s", same_gib_s}, {"plain loop", "GiB/s", plain_gib_s}});
}
