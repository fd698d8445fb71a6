// The host driver when the kernel refuses: every system call it makes fails in turn. The error names the call and the code,
// nothing has changed, and the same verb succeeds when the kernel does as it is asked again.
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
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
