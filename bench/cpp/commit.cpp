// How fast does memory arrive on the host? 4 GiB of a Llama-3-8B cache, token-major, 64 KiB pages, against two loops:
//
//   same    the system calls vattn makes, and nothing else: fallocate and mmap a page, madvise a run
//   plain   one fallocate and one mmap a page
//
// The arms take turns within one run, so a noisy machine is noisy for all; the figure is the ratio of medians. Nobody touches
// the pages. `--pages N` grows by N pages a row at a time (default: all at once).
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "timing.hpp"
#include "vattn/vattn.hpp"

namespace {

constexpr std::int64_t kLayers = 32;
constexpr std::int64_t kTensors = 2 * kLayers;
constexpr std::int64_t kSlots = 16;
constexpr std::size_t kPage = 64 << 10;
constexpr std::int64_t kTokensAPage = 32;  // 8 heads x 128 x 2 bytes a token
constexpr std::int64_t kPagesARow = 64;    // 64 tensors x 16 slots x 64 pages x 64 KiB = 4 GiB
constexpr std::size_t kRow = std::size_t{16} << 20;

double with_vattn(std::int64_t pages_a_step) {
  vattn::CacheConfig config{.num_layers = kLayers, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = kSlots};
  config.lookahead_tokens = 0;  // the step's own calls are what is measured
  config.max_seq_len = static_cast<std::int64_t>(kRow / kPage) * kTokensAPage;
  config.dtype = vattn::DType::kBFloat16;
  config.layout = vattn::Layout::kNHD;
  config.page_size = static_cast<std::int64_t>(kPage);
  vattn::KVCache cache(config);
  cache.alloc_block(kSlots);
  std::vector<std::int64_t> lengths(kSlots, 0);
  return bench::seconds([&] {
    for (std::int64_t pages = pages_a_step; pages <= kPagesARow; pages += pages_a_step) {
      std::fill(lengths.begin(), lengths.end(), pages * kTokensAPage);
      cache.step(std::span<const std::int64_t>(lengths));
    }
  });
}

void fail(const char* call) {
  std::perror(call);
  std::exit(1);
}

double with_loop(std::int64_t pages_a_step, bool advise) {
  const int file = ::memfd_create("bench", MFD_CLOEXEC);
  if (file < 0) fail("memfd_create");
  std::vector<char*> tensors;
  for (std::int64_t tensor = 0; tensor < kTensors; ++tensor) {
    void* got = ::mmap(nullptr, kRow * kSlots, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) fail("mmap");
    ::madvise(got, kRow * kSlots, MADV_DONTFORK);
    tensors.push_back(static_cast<char*>(got));
  }
  const double took = bench::seconds([&] {
    for (std::int64_t from = 0; from < kPagesARow; from += pages_a_step) {
      for (std::int64_t slot = 0; slot < kSlots; ++slot) {
        for (std::size_t tensor = 0; tensor < tensors.size(); ++tensor) {
          const std::size_t row = static_cast<std::size_t>(slot) * kRow;
          for (std::int64_t page = from; page < from + pages_a_step; ++page) {
            const std::size_t in_tensor = row + static_cast<std::size_t>(page) * kPage;
            const auto offset = static_cast<off_t>(tensor * kRow * kSlots + in_tensor);
            if (::fallocate(file, 0, offset, kPage) != 0) fail("fallocate");
            if (::mmap(tensors[tensor] + in_tensor, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, offset) ==
                MAP_FAILED) {
              fail("mmap");
            }
          }
          const std::size_t start = row + static_cast<std::size_t>(from) * kPage;
          if (advise &&
              ::madvise(tensors[tensor] + start, static_cast<std::size_t>(pages_a_step) * kPage, MADV_DONTFORK) != 0) {
            fail("madvise");
          }
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
  std::int64_t pages = kPagesARow;
  int rounds = 5;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--pages") == 0) pages = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::atoi(argv[i + 1]);
  }
  if (pages < 1 || kPagesARow % pages != 0 || rounds < 1) {
    std::fprintf(stderr, "--pages must divide %ld, --rounds be at least 1\n", static_cast<long>(kPagesARow));
    return 2;
  }
  std::vector<double> vattn_s;
  std::vector<double> same_s;
  std::vector<double> plain_s;
  for (int round = 0; round < rounds; ++round) {
    vattn_s.push_back(with_vattn(pages));
    same_s.push_back(with_loop(pages, true));
    plain_s.push_back(with_loop(pages, false));
  }
  const double gib = 4.0;
  std::printf(
      "{\"bench\": \"commit\", \"pages_a_step\": %ld, \"rounds\": %d, \"vattn_gib_s\": %.2f, \"same_gib_s\": %.2f, "
      "\"plain_gib_s\": %.2f, "
      "\"of_same_calls\": %.3f, \"of_plain_loop\": %.3f}\n",
      static_cast<long>(pages), rounds, gib / bench::median(vattn_s), gib / bench::median(same_s), gib / bench::median(plain_s),
      bench::median(same_s) / bench::median(vattn_s), bench::median(plain_s) / bench::median(vattn_s));
}
