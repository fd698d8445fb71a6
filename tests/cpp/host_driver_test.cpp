// What only the host driver does: pages find their place in the file, so that mappings merge; nothing of it reaches a forked
// child.
#include "vattn/driver/host/host_driver.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "child_process.hpp"
#include "soak.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr std::size_t kPage = 64 << 10;

std::size_t mappings() {
  std::ifstream file("/proc/self/maps");
  return static_cast<std::size_t>(std::count(std::istreambuf_iterator<char>(file), {}, '\n'));
}

TEST(HostDriver, PagesMappedInAnyOrderMergeIntoOneMapping) {
  const auto driver = open_host_driver();
  constexpr std::size_t kPages = 256;
  const Address base = driver->reserve(kPages * kPage, UnmappedReads::kZeros);
  const std::size_t before = mappings();
  std::vector<std::size_t> order(kPages);
  for (std::size_t i = 0; i < kPages; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(7));
  std::vector<PageHandle> pages;
  for (const std::size_t index : order) {
    const Address at = base + index * kPage;
    pages.push_back(driver->create(kPage, at));
    driver->map(at, kPage, pages.back());
    driver->set_access(at, kPage);
  }
  EXPECT_LE(mappings(), before + 8) << "256 pages are one mapping; the rest is room for a sanitizer's own";
  driver->unmap(base, kPages * kPage);
  for (const PageHandle page : pages) driver->release(page);
  driver->release_range(base, kPages * kPage);
}

TEST(HostDriver, WindowsOfReservationsThatAreGoneAreUsedAgain) {
  constexpr std::size_t kSize = std::size_t{8} << 20;
  const auto driver = open_host_driver_of(4 * kSize);
  for (int i = 0; i < 100; ++i) driver->release_range(driver->reserve(kSize, UnmappedReads::kZeros), kSize);
  // Around what is in use: a reservation in the middle, and a page that has outlived its own.
  std::vector<Address> live;
  for (int i = 0; i < 4; ++i) live.push_back(driver->reserve(kSize, UnmappedReads::kZeros));
  const PageHandle page = driver->create(kPage, live[3]);
  for (const int gone : {1, 3}) driver->release_range(live[gone], kSize);
  try {
    static_cast<void>(driver->reserve(2 * kSize, UnmappedReads::kZeros));
    ADD_FAILURE() << "there is no such window";
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.available_bytes, kSize);
  }
  live[1] = driver->reserve(kSize, UnmappedReads::kZeros);
  EXPECT_THROW(static_cast<void>(driver->reserve(kSize, UnmappedReads::kZeros)), OutOfMemoryError);
  const PageHandle other = driver->create(kPage, live[1]);
  EXPECT_EQ(other, driver->home(live[1]));
  EXPECT_NE(other, page);
  driver->release(other);
  driver->release(page);
  live[3] = driver->reserve(kSize, UnmappedReads::kZeros);
  for (const Address at : live) driver->release_range(at, kSize);
}

/// The number after a word in /proc/self/status, in KiB.
std::size_t status_of(const std::string& name) {
  std::ifstream file("/proc/self/status");
  std::string word;
  std::size_t kilobytes = 0;
  while (file >> word) {
    if (word == name) file >> kilobytes;
  }
  return kilobytes;
}

TEST(HostDriver, AReservationCostsNothingWhereAllFutureMemoryIsLocked) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's own memory would be locked";
#endif
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (::mlockall(MCL_FUTURE) != 0) ::_exit(2);
    const auto driver = open_host_driver();
    constexpr std::size_t kSize = std::size_t{4} << 30;
    const std::size_t tables = status_of("VmPTE:");
    const std::size_t resident = status_of("VmRSS:");
    Address base = 0;
    try {
      base = driver->reserve(kSize, UnmappedReads::kZeros);
    } catch (const OutOfMemoryError&) {
      ::_exit(2);  // RLIMIT_MEMLOCK
    }
    bool good = status_of("VmPTE:") < tables + 1024 && status_of("VmRSS:") < resident + 10 * 1024;
    good = good && *reinterpret_cast<volatile unsigned char*>(base + kSize - 1) == 0;
    const std::size_t locked = status_of("VmLck:");
    for (int round = 0; round < 2; ++round) {
      const PageHandle page = driver->create(kPage, base + kPage);
      driver->map(base + kPage, kPage, page);
      driver->set_access(base + kPage, kPage);
      *reinterpret_cast<volatile unsigned char*>(base + kPage) = 1;
      driver->unmap(base + kPage, kPage);
      driver->release(page);
      good = good && *reinterpret_cast<volatile unsigned char*>(base + kPage) == 0;
    }
    good = good && status_of("VmLck:") <= locked + 64;
    driver->release_range(base, kSize);
    leave(good);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << status;
  if (WEXITSTATUS(status) == 2) GTEST_SKIP() << "locking memory is not allowed here";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(HostDriver, ReadingWhatWasNeverMappedCostsNoMemory) {
  const auto driver = open_host_driver();
  constexpr std::size_t kSize = std::size_t{256} << 20;
  const Address base = driver->reserve(kSize, UnmappedReads::kZeros);
  const auto shared = [] {
    std::ifstream file("/proc/self/status");
    std::string word;
    std::size_t kilobytes = 0;
    while (file >> word) {
      if (word == "RssShmem:") file >> kilobytes;
    }
    return kilobytes;
  };
  const std::size_t before = shared();
  unsigned sum = 0;
  for (std::size_t at = 0; at < kSize; at += 4096) sum += *reinterpret_cast<volatile unsigned char*>(base + at);
  EXPECT_EQ(sum, 0U);
  EXPECT_LE(shared(), before + 64);
  driver->release_range(base, kSize);
}

long page_faults() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt;
}

bool kernel_can_populate() {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, from Linux 5.14 on
  void* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const bool can = ::madvise(page, 4096, kPopulateWrite) == 0;
  ::munmap(page, 4096);
  return can;
}

// Faults of the test's own are few beside the 1,024 that 4 MiB take.
constexpr long kFewFaults = 256;

TEST(HostDriver, MemoryThatWillBeWrittenIsBroughtInWithoutAFaultAPage) {
  if (kSanitized) GTEST_SKIP() << "the sanitizer's own memory faults too";
  if (!kernel_can_populate()) GTEST_SKIP() << "this kernel has no MADV_POPULATE_WRITE";
  const auto driver = open_host_driver();
  constexpr std::size_t kSize = 64 * kPage;
  const Address base = driver->reserve(kSize, UnmappedReads::kZeros);
  const PageHandle page = driver->create(kSize, base);
  driver->map(base, kSize, page);
  driver->set_access(base, kSize);
  driver->will_write(base, kSize);
  const long before = page_faults();
  for (std::size_t at = 0; at < kSize; at += 4096) *reinterpret_cast<volatile unsigned char*>(base + at) = 1;
  EXPECT_LT(page_faults() - before, kFewFaults);
  driver->unmap(base, kSize);
  driver->release(page);
  driver->release_range(base, kSize);
}

TEST(HostDriver, RowsOfAGrowableTensorAreWrittenWithoutAFaultAPage) {
  if (kSanitized) GTEST_SKIP() << "the sanitizer's own memory faults too";
  if (!kernel_can_populate()) GTEST_SKIP() << "this kernel has no MADV_POPULATE_WRITE";
  GrowableTensor tensor({.row_shape = {4096}, .max_rows = 4096, .dtype = DType::kUInt8});
  tensor.resize(1024);
  auto* const bytes = reinterpret_cast<volatile unsigned char*>(tensor.view().address);
  const long before = page_faults();
  for (std::size_t row = 0; row < 1024; ++row) bytes[row * 4096] = 1;
  EXPECT_LT(page_faults() - before, kFewFaults);
}

TEST(HostDriver, AForkedChildIsRefusedAndTheParentKeepsItsBytes) {
  CacheConfig config{
      .num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .max_batch_size = 1, .max_seq_len = 4096, .lookahead_tokens = 0};
  auto cache = std::make_unique<KVCache>(config);
  cache->alloc();
  cache->step({{0, 8}});
  auto* const bytes = cache->view(0, 0).k.data<unsigned char>();
  bytes[5] = 42;
  const pid_t child = ::fork();
  if (child == 0) {
    int refused = 0;
    try {
      cache->step({{0, 9}});
    } catch (const ClosedError&) {
      ++refused;
    }
    try {
      static_cast<void>(cache->stats());
    } catch (const ClosedError&) {
      ++refused;
    }
    cache.reset();
    leave(refused == 2);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_EQ(bytes[5], 42);
  cache->step({{0, 4096}});
}

TEST(HostDriverDeathTest, WritingWhatWasNeverMappedFaults) {
  const auto driver = open_host_driver();
  const Address base = driver->reserve(kPage, UnmappedReads::kZeros);
  EXPECT_DEATH(*reinterpret_cast<volatile char*>(base) = 1, "");  // SIGSEGV, or a sanitizer's word for it
  driver->release_range(base, kPage);
}

}  // namespace
}  // namespace vattn
