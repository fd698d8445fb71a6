// The host driver when the kernel refuses: every system call it makes fails in turn. The error names the call and the code,
// nothing has changed, and the same verb succeeds when the kernel does as it is asked again.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "system_calls.hpp"
#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/kv/kv_cache.hpp"

namespace vattn {
namespace {

using system_calls::Call;
using system_calls::Failing;

constexpr std::size_t kPage = 64 << 10;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }
/// The last memory file that was opened.
int memory_file() {
  int found = -1;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code none;
    const std::string target = std::filesystem::read_symlink(entry.path(), none).string();
    if (contains(target, "memfd:vattn")) found = std::max(found, std::stoi(entry.path().filename().string()));
  }
  return found;
}

unsigned char& byte_at(Address at) { return *reinterpret_cast<unsigned char*>(at); }

/// A host driver with room for four pages, which read as zeros.
class HostSystemCalls : public testing::Test {
 protected:
  void SetUp() override {
    if (VATTN_SYSTEM_CALLS_FAIL == 0) GTEST_SKIP() << "a sanitizer makes these calls itself";
    base_ = driver_->reserve(4 * kPage, UnmappedReads::kZeros);
  }
  void TearDown() override {
    if (base_ != 0) driver_->release_range(base_, 4 * kPage);
  }
  PageHandle open_page(Address at) {
    const PageHandle page = driver_->create(kPage, at);
    driver_->map(at, kPage, page);
    driver_->set_access(at, kPage);
    return page;
  }
  void close_page(Address at, PageHandle page) {
    driver_->unmap(at, kPage);
    driver_->release(page);
  }

  /// The verb throws a DriverError with the call's name and code when its system call fails.
  static void expect_refused(Call call, int code, const std::string& call_name, const std::string& code_name,
                             const std::function<void()>& verb) {
    const Failing failing(call, code);
    try {
      verb();
      ADD_FAILURE() << call_name << " failed, and nothing was thrown";
    } catch (const DriverError& error) {
      EXPECT_EQ(error.call, call_name);
      EXPECT_EQ(error.code, code);
      EXPECT_EQ(error.name, code_name);
    }
    EXPECT_EQ(failing.failed(), 1);
  }
  /// As above, of a code that means that memory, or something like it, is out.
  static std::string out_of_memory(Call call, int code, const std::function<void()>& verb) {
    const Failing failing(call, code);
    try {
      verb();
    } catch (const OutOfMemoryError& error) {
      EXPECT_EQ(error.needed_bytes, kPage);
      EXPECT_EQ(failing.failed(), 1);
      return error.what();
    }
    return "";
  }

  std::shared_ptr<Driver> driver_ = open_host_driver();
  Address base_ = 0;
};

TEST_F(HostSystemCalls, WithoutAMemoryFileThereIsNoDriver) {
  expect_refused(Call::kMemfdCreate, ENOSYS, "memfd_create", "ENOSYS", [] { static_cast<void>(open_host_driver()); });
  expect_refused(Call::kMemfdCreate, ENFILE, "memfd_create", "ENFILE", [] { static_cast<void>(open_host_driver()); });
  const Failing failing(Call::kMemfdCreate, ENOSYS);
  try {
    static_cast<void>(open_host_driver());
    FAIL() << "there is no memory file";
  } catch (const DriverError& error) {
    EXPECT_TRUE(contains(error.what(), "the kernel must allow memory files")) << error.what();
  }
}

TEST_F(HostSystemCalls, AReservationIsMadeWholeOrNotAtAll) {
  const auto reserve = [&] { static_cast<void>(driver_->reserve(kPage, UnmappedReads::kFault)); };
  expect_refused(Call::kMmap, EPERM, "mmap", "EPERM", reserve);
  EXPECT_TRUE(contains(out_of_memory(Call::kMmap, ENOMEM, reserve), "addresses are not to be had"));
  const int given_back = system_calls::made(Call::kMunmap);
  expect_refused(Call::kMadvise, EINVAL, "madvise(MADV_DONTFORK)", "EINVAL", reserve);
  EXPECT_EQ(system_calls::made(Call::kMunmap), given_back + 1) << "addresses that a child would inherit are given back";
  driver_->release_range(driver_->reserve(kPage, UnmappedReads::kFault), kPage);
}

TEST_F(HostSystemCalls, AReservationThatCannotBeGivenBackIsStillThere) {
  expect_refused(Call::kMunmap, EINVAL, "munmap", "EINVAL", [&] { driver_->release_range(base_, 4 * kPage); });
  EXPECT_EQ(byte_at(base_), 0);
  close_page(base_, open_page(base_));
}

TEST_F(HostSystemCalls, APageThatCannotBeMadeLeavesItsPlaceFree) {
  for (const Address near : {base_, Address{0}}) {
    const auto create = [&] { static_cast<void>(driver_->create(kPage, near)); };
    const PageHandle before = driver_->create(kPage, near);
    driver_->release(before);
    EXPECT_TRUE(contains(out_of_memory(Call::kFallocate, ENOSPC, create), "fallocate of " + std::to_string(kPage)));
    EXPECT_TRUE(contains(out_of_memory(Call::kFallocate, ENOMEM, create), "no memory left"));
    expect_refused(Call::kFallocate, EIO, "fallocate", "EIO", create);
    const PageHandle after = driver_->create(kPage, near);
    EXPECT_EQ(after, before) << "the same place in the file";
    driver_->release(after);
  }
}

TEST_F(HostSystemCalls, ASignalWhileAPageIsMadeIsNoFailure) {
  const Failing failing(Call::kFallocate, EINTR, 3);
  const PageHandle page = driver_->create(kPage, base_);
  EXPECT_EQ(failing.failed(), 3);
  driver_->release(page);
}

// A kernel that undoes a fallocate when a signal comes, and a profiler whose every tick comes before a piece above a size is
// done.
TEST_F(HostSystemCalls, APageThatASignalAlwaysInterruptsIsMadeInSmallerPieces) {
  constexpr std::size_t kLarge = std::size_t{64} << 20;
  const Address at = driver_->reserve(kLarge, UnmappedReads::kFault);
  for (const std::size_t longest : {std::size_t{2} << 20, std::size_t{256} << 10}) {
    Failing failing(Call::kFallocate, EINTR, 1'000'000);
    failing.above(longest).of(0);
    const PageHandle page = driver_->create(kLarge, at);
    EXPECT_LE(failing.failed(), 8) << "a tick that strikes once makes the pieces smaller";
    driver_->map(at, kLarge, page);
    driver_->set_access(at, kLarge);
    byte_at(at) = byte_at(at + kLarge - 1) = 1;  // committed to the end
    driver_->unmap(at, kLarge);
    driver_->release(page);
  }
  driver_->release_range(at, kLarge);
}

TEST_F(HostSystemCalls, APageThatIsNeverDoneIsGivenUp) {
  Failing failing(Call::kFallocate, EINTR, 1'000'000);
  failing.of(0);
  try {
    static_cast<void>(driver_->create(kPage, base_));
    FAIL() << "every try was interrupted";
  } catch (const DriverError& error) {
    EXPECT_EQ(error.name, "EINTR");
  }
  EXPECT_LE(failing.failed(), 1000);
}

TEST_F(HostSystemCalls, APageThatStopsHalfWayLeavesNothingCommitted) {
  constexpr std::size_t kLarge = std::size_t{16} << 20;
  const auto blocks = [] {
    struct stat status{};
    return ::fstat(memory_file(), &status) == 0 ? status.st_blocks : -1;
  };
  const auto before = blocks();
  {
    const Failing failing(Call::kFallocate, ENOSPC, 1, 5);
    EXPECT_THROW(static_cast<void>(driver_->create(kLarge, 0)), OutOfMemoryError);
    EXPECT_EQ(failing.failed(), 1);
  }
  EXPECT_EQ(blocks(), before);
}

TEST_F(HostSystemCalls, ASignalWhileAPageIsFreedIsNoFailure) {
  const PageHandle page = driver_->create(kPage, base_);
  const Failing failing(Call::kFallocate, EINTR, 3);
  driver_->release(page);
  EXPECT_EQ(failing.failed(), 3);
}

TEST_F(HostSystemCalls, AKernelThatKnowsNoFlagAgainstExecutionGetsNone) {
  const Failing failing(Call::kMemfdCreate, EINVAL);
  EXPECT_NE(open_host_driver(), nullptr);
  EXPECT_EQ(failing.failed(), 1);
}

/// A kernel without FALLOC_FL_PUNCH_HOLE, as gVisor is one, for the scope.
struct NoPunching {
  NoPunching() { failing.of(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE); }
  Failing failing{Call::kFallocate, EOPNOTSUPP, 1'000'000};
};

TEST_F(HostSystemCalls, WithoutPunchingMemoryGoesBackWithTheLastPage) {
  const NoPunching kernel;
  const auto driver = open_host_driver();
  EXPECT_STREQ(driver->traits().keeps_pages, "this kernel has no FALLOC_FL_PUNCH_HOLE");
  const int file = memory_file();
  const auto bytes = [&] {
    struct stat status{};
    return ::fstat(file, &status) == 0 ? static_cast<std::size_t>(status.st_blocks) * 512 : 0;
  };
  const Address at = driver->reserve(4 * kPage, UnmappedReads::kZeros);
  const PageHandle first = driver->create(kPage, at);
  const PageHandle second = driver->create(kPage, at + kPage);
  EXPECT_EQ(bytes(), 2 * kPage);
  driver->map(at, kPage, first);
  driver->set_access(at, kPage);
  byte_at(at) = 42;
  driver->release(first);
  driver->unmap(at, kPage);
  EXPECT_EQ(bytes(), 2 * kPage) << "one page alone does not go";
  const PageHandle again = driver->create(kPage, at);
  EXPECT_EQ(again, first) << "its place is used again";
  driver->map(at, kPage, again);
  driver->set_access(at, kPage);
  EXPECT_EQ(byte_at(at), 0) << "with zeros";
  driver->unmap(at, kPage);
  driver->release(again);
  driver->release(second);
  EXPECT_EQ(bytes(), 0U);
  driver->release_range(at, 4 * kPage);
}

TEST_F(HostSystemCalls, WithoutPunchingACacheClosesQuietlyAndALimitUnderWhatExistsIsRefused) {
  const NoPunching kernel;
  constexpr std::int64_t kTokens = kPage / 64;
  CacheConfig config{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .max_batch_size = 2, .max_seq_len = 8 * kTokens};
  config.dtype = DType::kUInt8;
  config.page_size = kPage;
  config.memory_limit = 32 * kPage;
  config.lookahead_tokens = 0;
  const auto counts = std::make_shared<CountingDriver>(open_host_driver());
  {
    KVCache cache(config, Device{}, counts);
    cache.alloc();
    cache.step({{0, 8 * kTokens}});
    cache.free(0);
    EXPECT_EQ(cache.stats().created_bytes, 16 * kPage);
    try {
      cache.set_memory_limit(4 * kPage);
      ADD_FAILURE() << "nothing can be given back";
    } catch (const DriverError& error) {
      EXPECT_EQ(error.name, "EOPNOTSUPP");
      EXPECT_TRUE(contains(error.what(), "FALLOC_FL_PUNCH_HOLE")) << error.what();
    }
    EXPECT_EQ(cache.stats().limit_bytes, 32 * kPage) << "refused, so nothing changed";
    EXPECT_EQ(cache.stats().created_bytes, 16 * kPage);
    cache.set_memory_limit(16 * kPage);
    // The other slot lives on what this one has left.
    EXPECT_EQ(cache.alloc(), 0);
    EXPECT_EQ(cache.alloc(), 1);
    cache.step({{1, 8 * kTokens}});
    EXPECT_EQ(cache.stats().created_bytes, 16 * kPage);
    EXPECT_NO_THROW(cache.close());
  }
  EXPECT_EQ(counts->alive(), CountingDriver::Alive{});
}

TEST_F(HostSystemCalls, WithoutPunchingAFailedStepLeavesItsPagesPooledAndCounted) {
  const NoPunching kernel;
  constexpr std::int64_t kTokens = kPage / 64;
  CacheConfig config{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64, .max_batch_size = 1, .max_seq_len = 8 * kTokens};
  config.dtype = DType::kUInt8;
  config.page_size = kPage;
  config.memory_limit = 32 * kPage;
  config.lookahead_tokens = 0;
  KVCache cache(config, Device{}, open_host_driver());
  cache.alloc();
  {
    const Failing failing(Call::kMmap, EACCES);
    EXPECT_THROW(cache.step({{0, kTokens}}), DriverError);
  }
  EXPECT_EQ(cache.stats().pooled_bytes, 2 * kPage);
  EXPECT_EQ(cache.seq_len(0), 0);
  cache.step({{0, kTokens}});
  EXPECT_EQ(cache.stats().created_bytes, 2 * kPage);
  cache.close();
}

TEST_F(HostSystemCalls, APageThatCannotBeFreedIsStillThere) {
  const PageHandle page = driver_->create(kPage, base_);
  expect_refused(Call::kFallocate, EIO, "fallocate(PUNCH_HOLE)", "EIO", [&] { driver_->release(page); });
  driver_->map(base_, kPage, page);
  driver_->set_access(base_, kPage);
  byte_at(base_) = 42;
  EXPECT_EQ(byte_at(base_), 42);
  close_page(base_, page);
}

TEST_F(HostSystemCalls, APageThatCannotBeMappedCanBeMappedLater) {
  const PageHandle page = driver_->create(kPage, base_);
  const auto map = [&] { driver_->map(base_, kPage, page); };
  EXPECT_TRUE(contains(out_of_memory(Call::kMmap, ENOMEM, map), "vm.max_map_count"));
  expect_refused(Call::kMmap, EACCES, "mmap", "EACCES", map);
  EXPECT_EQ(byte_at(base_), 0) << "the reservation is behind it";
  map();
  expect_refused(Call::kMadvise, ENOMEM, "madvise(MADV_DONTFORK)", "ENOMEM", [&] { driver_->set_access(base_, kPage); });
  driver_->set_access(base_, kPage);
  close_page(base_, page);
}

TEST_F(HostSystemCalls, AMappingThatCannotBeTakenAwayKeepsItsBytes) {
  const PageHandle page = open_page(base_);
  byte_at(base_) = 42;
  expect_refused(Call::kMmap, ENOMEM, "mmap", "ENOMEM", [&] { driver_->unmap(base_, kPage); });
  EXPECT_EQ(byte_at(base_), 42);
  driver_->unmap(base_, kPage);
  EXPECT_EQ(byte_at(base_), 0);
  driver_->release(page);
}

TEST_F(HostSystemCalls, AnUnmappingThatAChildWouldInheritIsDoneAllTheSame) {
  const PageHandle page = open_page(base_);
  const Failing failing(Call::kMadvise, EINVAL);
  driver_->unmap(base_, kPage);
  EXPECT_EQ(failing.failed(), 1);
  driver_->release(page);
}

TEST_F(HostSystemCalls, BytesThatCouldNotBeFreedAreInNoFreshPage) {
  const PageHandle page = open_page(base_);
  byte_at(base_ + kPage - 1) = 0x5A;
  driver_->release(page);  // the memory goes with the mapping
  {
    const Failing failing(Call::kFallocate, EIO);
    driver_->unmap(base_, kPage);
    EXPECT_EQ(failing.failed(), 1);
  }
  expect_refused(Call::kFallocate, EIO, "fallocate(PUNCH_HOLE)", "EIO", [&] { (void)driver_->create(kPage, base_); });
  const PageHandle fresh = open_page(base_);
  EXPECT_EQ(byte_at(base_ + kPage - 1), 0) << "a page that was just made holds zeros";
  close_page(base_, fresh);
}

TEST_F(HostSystemCalls, AStepSucceedsOrChangesNothingWhicheverCallFails) {
  const auto counts = std::make_shared<CountingDriver>(driver_);
  const CountingDriver::Alive before = counts->alive();
  constexpr std::int64_t kTokens = kPage / 64;
  const CacheConfig config{.num_layers = 2,
                           .num_kv_heads = 1,
                           .head_dim = 64,
                           .max_batch_size = 2,
                           .max_seq_len = 8 * kTokens,
                           .dtype = DType::kUInt8,
                           .page_size = kPage,
                           .memory_limit = 64 * kPage,
                           .lookahead_tokens = 0};
  for (const auto& [call, code] : {std::pair{Call::kMmap, ENOMEM},
                                   {Call::kMmap, EACCES},
                                   {Call::kMadvise, ENOMEM},
                                   {Call::kFallocate, ENOSPC},
                                   {Call::kFallocate, EIO}}) {
    bool struck = true;
    for (int first = 1; struck; ++first) {
      KVCache cache(config, Device{}, counts);
      cache.alloc();
      cache.step({{0, 1}});
      bool failed = false;
      {
        const Failing failing(call, code, 1, first);
        try {
          cache.step({{0, 3 * kTokens}});
        } catch (const Error&) {
          failed = true;
        }
        struck = failing.failed() != 0;
      }
      EXPECT_EQ(failed, struck);
      EXPECT_EQ(cache.seq_len(0), failed ? 1 : 3 * kTokens);
      cache.step({{0, 4 * kTokens}});
      cache.close();
      EXPECT_EQ(counts->alive(), before);
      ASSERT_LT(first, 1000);
    }
  }
}

}  // namespace
}  // namespace vattn
