// The host driver at the limits of its process: file descriptors, file sizes, addresses, mappings, threads. Each is an error
// that names the limit, changes nothing, and is gone when the limit is.
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {
namespace {

constexpr std::size_t kPage = 64 << 10;

/// Lowers a soft limit for the scope. Nothing may be printed meanwhile: a log is a file too.
class Lowered {
 public:
  Lowered(__rlimit_resource_t resource, rlim_t to) : resource_(resource) {
    ::getrlimit(resource_, &before_);
    const rlimit lower{to, before_.rlim_max};
    ::setrlimit(resource_, &lower);
  }
  Lowered(const Lowered&) = delete;
  Lowered& operator=(const Lowered&) = delete;
  ~Lowered() { ::setrlimit(resource_, &before_); }

 private:
  __rlimit_resource_t resource_;
  rlimit before_{};
};

/// The message of the error a call throws while the limit is lowered; "" if it throws none of that type.
template <typename Expected>
std::string message_under(__rlimit_resource_t resource, rlim_t limit, const std::function<void()>& call) {
  const Lowered lowered(resource, limit);
  try {
    call();
  } catch (const Expected& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(HostLimits, WithoutAFileDescriptorThereIsNoDriver) {
  const std::string message = message_under<DriverError>(RLIMIT_NOFILE, 0, [] { static_cast<void>(open_host_driver()); });
  EXPECT_TRUE(contains(message, "memfd_create") && contains(message, "EMFILE") && contains(message, "RLIMIT_NOFILE"))
      << message;
  EXPECT_NE(open_host_driver(), nullptr);
}

TEST(HostLimits, WithoutAFileDescriptorNobodyCanSayWhatIsLeft) {
  const auto driver = open_host_driver();
  std::string message = message_under<DriverError>(RLIMIT_NOFILE, 0, [&] { static_cast<void>(driver->memory_info()); });
  EXPECT_TRUE(contains(message, "/proc/meminfo") && contains(message, "RLIMIT_NOFILE")) << message;
  message = message_under<DriverError>(RLIMIT_NOFILE, 0, [&] { (void)driver->create(kPage, 0); });
  EXPECT_TRUE(contains(message, "/proc/meminfo")) << message;
  EXPECT_GT(driver->memory_info().available_bytes, 0U);
  const PageHandle page = driver->create(kPage, 0);
  driver->release(page);
}

TEST(HostLimits, PagesStayBelowAFileSizeLimitAndRefillItsHoles) {
  const auto driver = open_host_driver();
  const Address base = driver->reserve(8 * kPage, UnmappedReads::kZeros);
  std::vector<PageHandle> pages;
  std::string message;
  {
    const Lowered lowered(RLIMIT_FSIZE, 4 * kPage);
    for (std::size_t i = 0; i < 4; ++i) pages.push_back(driver->create(kPage, base + i * kPage));
    message = message_under<OutOfMemoryError>(RLIMIT_FSIZE, 4 * kPage, [&] { (void)driver->create(kPage, base + 4 * kPage); });
    driver->release(pages[1]);
    pages[1] = driver->create(kPage, 0);
  }
  EXPECT_TRUE(contains(message, "RLIMIT_FSIZE") && contains(message, std::to_string(4 * kPage))) << message;
  for (std::size_t i = 0; i < 4; ++i) {
    driver->map(base + i * kPage, kPage, pages[i]);
    driver->set_access(base + i * kPage, kPage);
    *reinterpret_cast<unsigned char*>(base + i * kPage) = static_cast<unsigned char>(i + 1);
  }
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(*reinterpret_cast<unsigned char*>(base + i * kPage), i + 1);
  driver->unmap(base, 4 * kPage);
  for (const PageHandle page : pages) driver->release(page);
  driver->release_range(base, 8 * kPage);
}

TEST(HostLimits, AReservationBeyondTheAddressesOfAProcessIsOutOfMemory) {
  const auto driver = open_host_driver();
  for (const std::size_t size : {std::size_t{1} << 47, std::size_t{1} << 62, (std::size_t{1} << 63) - 4096}) {
    try {
      const Address got = driver->reserve(size, UnmappedReads::kZeros);
      ADD_FAILURE() << size << " bytes at " << got;
    } catch (const OutOfMemoryError& error) {
      EXPECT_EQ(error.needed_bytes, size);
      EXPECT_TRUE(contains(error.what(), "reserve: " + std::to_string(size) + " bytes")) << error.what();
    }
  }
  const Address base = driver->reserve(kPage, UnmappedReads::kZeros);
  driver->release_range(base, kPage);
}

TEST(HostLimits, APageBeyondTheMemoryThatIsLeftIsOutOfMemory) {
  const auto driver = open_host_driver();
  try {
    (void)driver->create(std::size_t{1} << 50, 0);
    FAIL() << "no host has a pebibyte";
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, std::uint64_t{1} << 50);
    EXPECT_LT(error.available_bytes, error.needed_bytes);
  }
}

TEST(HostLimits, NearTheMostMappingsAProcessMayHaveNothingMoreIsMapped) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer needs mappings of its own";
#endif
  const auto driver = open_host_driver();
  const std::uint64_t limit = driver->traits().mapping_limit;
  if (limit > 200'000) GTEST_SKIP() << "too many to make";
  const auto small = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::ifstream maps("/proc/self/maps");
  const auto used = static_cast<std::size_t>(std::count(std::istreambuf_iterator<char>(maps), {}, '\n'));
  ASSERT_LT(used + 1000, limit);
  // Every other page readable: a mapping a page. 500 short of the limit, where a thousand are kept in reserve.
  const std::size_t size = (limit - 500 - used) * small;
  void* const others = ::mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(others, MAP_FAILED);
  for (std::size_t at = 0; at < size; at += 2 * small) ::mprotect(static_cast<char*>(others) + at, small, PROT_READ);
  std::string message;
  try {
    (void)driver->reserve(kPage, UnmappedReads::kZeros);
  } catch (const OutOfMemoryError& error) {
    message = error.what();
  }
  ::munmap(others, size);
  EXPECT_TRUE(contains(message, "vm.max_map_count") && contains(message, std::to_string(limit))) << message;
  const Address base = driver->reserve(kPage, UnmappedReads::kZeros);
  driver->release_range(base, kPage);
}

TEST(HostLimits, ACacheWhoseThreadCannotBeStartedTakesNothing) {
  const auto driver = std::make_shared<CountingDriver>(open_host_driver());
  CacheConfig config{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .max_batch_size = 1, .max_seq_len = 4096};
  pthread_attr_t before;
  ASSERT_EQ(::pthread_getattr_default_np(&before), 0);
  pthread_attr_t enormous;
  ASSERT_EQ(::pthread_getattr_default_np(&enormous), 0);
  ASSERT_EQ(::pthread_attr_setstacksize(&enormous, std::size_t{1} << 47), 0);  // more than a process has addresses
  ASSERT_EQ(::pthread_setattr_default_np(&enormous), 0);
  std::string message;
  try {
    const KVCache cache(config, Device{}, driver);
  } catch (const Error& error) {
    message = error.what();
  }
  ASSERT_EQ(::pthread_setattr_default_np(&before), 0);
  ::pthread_attr_destroy(&enormous);
  ::pthread_attr_destroy(&before);
  EXPECT_TRUE(contains(message, "mapper thread") && contains(message, "lookahead_tokens=0")) << message;
  EXPECT_EQ(driver->alive(), CountingDriver::Alive{});
  KVCache(config, Device{}, driver).settle();
}

}  // namespace
}  // namespace vattn
