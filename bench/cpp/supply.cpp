// How fast does memory arrive on a GPU? `KVCache::step` beside a bare loop of the same driver calls, in GB/s (10^9 bytes).
//
//   supply [--device N] [--layers N] [--slots N] [--rounds N] [--pages-a-run 1|2|4|8] [--pooled 0|1]
//
// Two tensors a layer (64), pages of 2 MiB, 8 pages a row: each slot in turn grows in all its tensors at once, `--pages-a-run`
// pages at a time. With --pooled 1 the pages exist and are mapped and made accessible; with 0 they are created too. The arms
// take turns, each with pages of its own, and unmapping is outside the clock. Prints one line of JSON. VATTN_CUDA_LIBRARY names
// another library, as for vattn. Thread: one.
#include <dlfcn.h>

#include <vector>

#include "cuda/functions.hpp"
#include "report.hpp"
#include "timing.hpp"
#include "vattn/vattn.hpp"

namespace {

using namespace vattn::cuda;  // CUDA's own names

constexpr std::int64_t kPagesARow = 8;
constexpr std::int64_t kTokensAPage = 1024;  // 8 heads x 128 x 2 bytes a token
constexpr std::size_t kPage = std::size_t{2} << 20;
constexpr std::size_t kRow = kPage * static_cast<std::size_t>(kPagesARow);

void check(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return;
  std::fprintf(stderr, "%s failed: CUresult %d\n", call, static_cast<int>(result));
  std::exit(1);
}

/// libcuda's entries, found as vattn finds them.
Functions find_functions() {
  const char* named = std::getenv("VATTN_CUDA_LIBRARY");
  void* library = ::dlopen(named != nullptr && *named != '\0' ? named : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", ::dlerror());
    std::exit(1);
  }
  using GetProcAddress = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
  const auto find = reinterpret_cast<GetProcAddress>(::dlsym(library, "cuGetProcAddress_v2"));
  if (find == nullptr) {
    std::fprintf(stderr, "no cuGetProcAddress_v2: a driver of CUDA 12 or newer is needed\n");
    std::exit(1);
  }
  Functions found;
  void* entry = nullptr;
  auto how = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters)                            \
  entry = nullptr;                                                                          \
  static_cast<void>(find(#name, &entry, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &how)); \
  found.name = reinterpret_cast<CUresult(*) parameters>(entry);
#include "cuda/functions.def"
  return found;
}

struct Shape {
  std::int64_t layers;
  std::int64_t slots;
  std::int64_t run;
  bool pooled;

  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(slots * 2 * layers); }
  [[nodiscard]] double gigabytes() const { return static_cast<double>(rows() * kRow) / 1e9; }
};

/// The driver calls of a growth, and nothing else.
class BareLoop {
 public:
  BareLoop(const Functions& cuda, int device, const Shape& shape) : cuda_(cuda), device_(device), shape_(shape) {
    check(cuda_.cuMemAddressReserve(&base_, shape_.rows() * kRow, kPage, 0, 0), "cuMemAddressReserve");
    handles_.resize(shape_.rows() * kPagesARow);
  }
  BareLoop(const BareLoop&) = delete;
  BareLoop& operator=(const BareLoop&) = delete;
  ~BareLoop() {
    release();
    check(cuda_.cuMemAddressFree(base_, shape_.rows() * kRow), "cuMemAddressFree");
  }

  /// Seconds of one filling.
  double round() {
    CUmemAllocationProp page{};
    page.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    page.location = {CU_MEM_LOCATION_TYPE_DEVICE, device_};
    const CUmemAccessDesc access{page.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    const double took = bench::seconds([&] {
      std::size_t next = 0;
      for (std::int64_t slot = 0; slot < shape_.slots; ++slot) {
        for (std::int64_t first = 0; first < kPagesARow; first += shape_.run) {
          for (std::int64_t tensor = 0; tensor < 2 * shape_.layers; ++tensor) {
            const auto row = static_cast<std::size_t>(tensor * shape_.slots + slot);
            const CUdeviceptr at = base_ + row * kRow + static_cast<std::size_t>(first) * kPage;
            for (std::int64_t number = 0; number < shape_.run; ++number, ++next) {
              if (!made_) check(cuda_.cuMemCreate(&handles_[next], kPage, &page, 0), "cuMemCreate");
              check(cuda_.cuMemMap(at + static_cast<std::size_t>(number) * kPage, kPage, 0, handles_[next], 0), "cuMemMap");
            }
            check(cuda_.cuMemSetAccess(at, static_cast<std::size_t>(shape_.run) * kPage, &access, 1), "cuMemSetAccess");
          }
        }
      }
    });
    made_ = true;
    for (std::size_t row = 0; row < shape_.rows(); ++row) check(cuda_.cuMemUnmap(base_ + row * kRow, kRow), "cuMemUnmap");
    if (!shape_.pooled) release();
    return took;
  }

 private:
  void release() {
    if (!made_) return;
    for (const CUmemGenericAllocationHandle handle : handles_) check(cuda_.cuMemRelease(handle), "cuMemRelease");
    made_ = false;
  }

  const Functions& cuda_;
  int device_;
  Shape shape_;
  CUdeviceptr base_ = 0;
  std::vector<CUmemGenericAllocationHandle> handles_;
  bool made_ = false;
};

std::shared_ptr<vattn::PagePool> make_pool(int device, const Shape& shape) {
  return vattn::PagePool::make({vattn::Device::Kind::kCuda, device}, static_cast<std::int64_t>(shape.rows() * kRow),
                               static_cast<std::int64_t>(kPage));
}

/// Seconds of one filling through a cache of `pool`, whose pages outlive it.
double round_of_steps(const std::shared_ptr<vattn::PagePool>& pool, const Shape& shape) {
  vattn::CacheConfig config{.num_layers = shape.layers, .num_kv_heads = 8, .head_dim = 128, .max_batch_size = shape.slots};
  config.max_seq_len = kPagesARow * kTokensAPage;
  config.dtype = vattn::DType::kBFloat16;
  config.dense = true;
  config.lookahead_tokens = 0;
  config.warm_tokens = 0;
  vattn::KVCache cache(config, pool);
  cache.alloc_block(shape.slots);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(shape.slots), 0);
  const double took = bench::seconds([&] {
    for (std::size_t slot = 0; slot < lengths.size(); ++slot) {
      for (std::int64_t pages = shape.run; pages <= kPagesARow; pages += shape.run) {
        lengths[slot] = pages * kTokensAPage;
        cache.step(std::span<const std::int64_t>(lengths));
      }
    }
  });
  cache.close();
  return took;
}

}  // namespace

int main(int argc, char** argv) {
  const int device = static_cast<int>(bench::number_option(argc, argv, "--device", 0, 0));
  const long rounds = bench::number_option(argc, argv, "--rounds", 9);
  const Shape shape{bench::number_option(argc, argv, "--layers", 32), bench::number_option(argc, argv, "--slots", 8),
                    bench::number_option(argc, argv, "--pages-a-run", 8),
                    bench::number_option(argc, argv, "--pooled", 1, 0) != 0};
  if (kPagesARow % shape.run != 0) {
    std::fprintf(stderr, "--pages-a-run %ld: 1, 2, 4 or 8\n", static_cast<long>(shape.run));
    return 2;
  }
  const Functions cuda = find_functions();
  check(cuda.cuInit(0), "cuInit");
  CUcontext context = nullptr;
  check(cuda.cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  check(cuda.cuCtxPushCurrent(context), "cuCtxPushCurrent");
  std::vector<double> steps;
  std::vector<double> loops;
  {
    BareLoop loop(cuda, device, shape);
    auto pool = make_pool(device, shape);
    for (long round = -1; round < rounds; ++round) {  // the first warms up, and makes the pages of the pooled ones
      const auto take_step = [&] {
        const double took = round_of_steps(pool, shape);
        if (!shape.pooled) {
          pool->close();
          pool = make_pool(device, shape);
        }
        if (round >= 0) steps.push_back(shape.gigabytes() / took);
      };
      if (round % 2 == 0) take_step();
      const double took = loop.round();
      if (round >= 0) loops.push_back(shape.gigabytes() / took);
      if (round % 2 != 0) take_step();
    }
    pool->close();
  }
  check(cuda.cuCtxPopCurrent(&context), "cuCtxPopCurrent");
  check(cuda.cuDevicePrimaryCtxRelease(device), "cuDevicePrimaryCtxRelease");
  bench::print_report({{"step, C++", "GB/s", steps}, {"driver loop, C++", "GB/s", loops}});
  return 0;
}
