// What a forked child finds where its parent's tensors were: nothing that can be touched, whatever it has allocated since.
#include "vattn/driver/host/reservations.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <csignal>
#include <functional>
#include <thread>
#include <vector>

#include "child_process.hpp"
#include "system_calls.hpp"
#include "vattn/driver/host/host_driver.hpp"

namespace vattn::host {
namespace {

constexpr std::size_t kPage = 64 << 10;
constexpr std::size_t kLarge = std::size_t{64} << 20;

volatile unsigned char& byte_at(Address at) { return *reinterpret_cast<volatile unsigned char*>(at); }

/// How a child ends that does this: the signal that killed it, or 0 where it said true, or -1.
int end_of_child(const std::function<bool()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit none{};
    ::setrlimit(RLIMIT_CORE, &none);
    ::signal(SIGSEGV, SIG_DFL);
    leave(body());
  }
  int status = 0;
  if (child < 0 || ::waitpid(child, &status, 0) != child) return -1;
  if (WIFSIGNALED(status)) return WTERMSIG(status);
  return WEXITSTATUS(status) == 0 ? 0 : -1;
}

int end_of_read(Address at) {
  return end_of_child([at] { return byte_at(at) != 1; });
}
int end_of_write(Address at) {
  return end_of_child([at] {
    byte_at(at) = 1;
    return true;
  });
}

/// Fills the largest holes of this process. True when none of it came to lie in the range.
bool allocate_around(Address base, std::size_t size) {
  bool outside = true;
  for (int i = 0; i < 32; ++i) {
    void* const got = ::mmap(nullptr, kLarge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) return false;
    const auto at = reinterpret_cast<Address>(got);
    byte_at(at) = 42;
    outside = outside && (at + kLarge <= base || at >= base + size);
  }
  return outside;
}

class ReservationsTest : public testing::Test {
 protected:
  ReservationsTest() : base_(driver_->reserve(4 * kLarge, UnmappedReads::kZeros)) {}
  ~ReservationsTest() override {
    for (const auto& [at, page] : pages_) {
      driver_->unmap(at, kPage);
      driver_->release(page);
    }
    driver_->release_range(base_, 4 * kLarge);
  }
  void map(Address at) {
    pages_.emplace_back(at, driver_->create(kPage, at));
    driver_->map(at, kPage, pages_.back().second);
  }
  void open(Address at) {
    map(at);
    driver_->set_access(at, kPage);
    byte_at(at) = 7;
  }

  std::shared_ptr<Driver> driver_ = open_host_driver();
  std::vector<std::pair<Address, PageHandle>> pages_;
  Address base_;
};

TEST_F(ReservationsTest, ARangeIsKnownFromItsReservationToItsRelease) {
  const std::size_t before = reservations::count();
  const Address at = driver_->reserve(2 * kPage, UnmappedReads::kFault);
  EXPECT_EQ(reservations::count(), before + 1);
  EXPECT_TRUE(reservations::contains(at));
  EXPECT_TRUE(reservations::contains(at + 2 * kPage - 1));
  EXPECT_FALSE(reservations::contains(reinterpret_cast<Address>(&before)));
  EXPECT_FALSE(reservations::contains(0));
  driver_->release_range(at, 2 * kPage);
  EXPECT_EQ(reservations::count(), before);
  EXPECT_FALSE(reservations::contains(at));
}

TEST_F(ReservationsTest, TouchingAnInheritedRangeFaultsWhateverTheChildHasAllocated) {
  open(base_);
  for (const Address at : {base_, base_ + kLarge, base_ + 4 * kLarge - 1}) {
    EXPECT_EQ(end_of_read(at), SIGSEGV);
    EXPECT_EQ(end_of_write(at), SIGSEGV);
    EXPECT_EQ(end_of_child([&] { return allocate_around(base_, 4 * kLarge); }), 0);
    EXPECT_EQ(end_of_child([&] { return allocate_around(base_, 4 * kLarge) && byte_at(at) != 1; }), SIGSEGV);
  }
  EXPECT_EQ(byte_at(base_), 7);
}

TEST_F(ReservationsTest, AChildOfAChildFindsTheAddressesTakenToo) {
  open(base_);
  EXPECT_EQ(end_of_child([&] {
              if (!reservations::contains(base_)) return false;
              const auto own = open_host_driver();
              const Address mine = own->reserve(kLarge, UnmappedReads::kZeros);
              const bool faults = end_of_read(base_) == SIGSEGV && end_of_write(mine) == SIGSEGV &&
                                  end_of_child([&] { return allocate_around(base_, 4 * kLarge); }) == 0;
              own->release_range(mine, kLarge);
              return faults && !reservations::contains(mine) && reservations::contains(base_);
            }),
            0);
}

TEST_F(ReservationsTest, APageThatIsMappedAndNotYetAccessibleIsNotInherited) {
  map(base_);
  map(base_ + kLarge);
  byte_at(base_) = 7;
  EXPECT_EQ(end_of_read(base_), SIGSEGV);
  EXPECT_EQ(end_of_write(base_ + kLarge), SIGSEGV);
  EXPECT_EQ(end_of_read(base_ + 2 * kLarge), SIGSEGV);
  EXPECT_EQ(byte_at(base_), 7);
}

TEST_F(ReservationsTest, AnUnmappedPageWhoseAdviceTheKernelRefusedIsNotInherited) {
  if (VATTN_SYSTEM_CALLS_FAIL == 0) GTEST_SKIP() << "a sanitizer makes these calls itself";
  open(base_ + kPage);
  {
    const system_calls::Failing failing(system_calls::Call::kMadvise, EINVAL);
    driver_->unmap(base_ + kPage, kPage);
    EXPECT_EQ(failing.failed(), 1);
  }
  driver_->release(pages_.back().second);
  pages_.pop_back();
  EXPECT_EQ(end_of_read(base_ + kPage), SIGSEGV);
}

// A handler that runs in the child before the library's, since it was registered before main().
std::atomic<Address> taken_by_others{0};  // NOLINT: a handler has no argument
const int kRegistered = ::pthread_atfork(nullptr, nullptr, [] {
  const Address at = taken_by_others;
  if (at == 0) return;
  ::mmap(reinterpret_cast<void*>(at), kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  byte_at(at) = 3;
});

TEST_F(ReservationsTest, WhatAnotherHandlerPutThereStaysAndTheRestIsTaken) {
  ASSERT_EQ(kRegistered, 0);
  const Address theirs = base_ + kLarge + kPage;
  taken_by_others = theirs;
  EXPECT_EQ(end_of_child([&] { return byte_at(theirs) == 3 && byte_at(theirs + kPage - 1) == 0; }), 0);
  for (const Address at : {base_, theirs - 1, theirs + kPage, base_ + 4 * kLarge - 1}) EXPECT_EQ(end_of_read(at), SIGSEGV);
  taken_by_others = 0;
}

TEST_F(ReservationsTest, AForkWhileOtherThreadsMapAndReserveGivesTheChildNothing) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&stop, shared = i == 0 ? driver_ : open_host_driver()] {
      while (!stop) {
        const Address at = shared->reserve(kLarge, UnmappedReads::kZeros);
        std::vector<PageHandle> pages;
        for (int page = 0; page < 8; ++page) {
          pages.push_back(shared->create(kPage, at + page * kPage));
          shared->map(at + page * kPage, kPage, pages.back());
        }
        shared->set_access(at, 8 * kPage);
        shared->unmap(at, 8 * kPage);
        for (const PageHandle page : pages) shared->release(page);
        shared->release_range(at, kLarge);
      }
    });
  }
  open(base_);
  for (int round = 0; round < 50; ++round) {
    EXPECT_EQ(end_of_child([&] {  // the child's own driver works: no lock of it is held
                const auto own = open_host_driver();
                const Address at = own->reserve(kLarge, UnmappedReads::kZeros);
                own->release_range(at, kLarge);
                return byte_at(base_) != 7;
              }),
              SIGSEGV);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

TEST_F(ReservationsTest, AProgramThatIsStartedWithoutAForkIsAsItEverWas) {
  open(base_);
  std::array<char*, 2> arguments{const_cast<char*>("true"), nullptr};
  pid_t child = 0;
  ASSERT_EQ(::posix_spawnp(&child, "true", nullptr, nullptr, arguments.data(), environ), 0);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(byte_at(base_), 7);
}

}  // namespace
}  // namespace vattn::host
