// How much memory the host driver thinks is left, from files a test wrote: MemAvailable, cgroup v1 and v2, limits above.
#include "vattn/driver/host/headroom.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace vattn::host {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

class HeadroomTest : public testing::Test {
 protected:
  HeadroomTest() : root_(testing::TempDir() + "vattn_headroom_" + std::to_string(::getpid())) {
    write("/proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: 4194304 kB\n");
    write("/proc/self/cgroup", "");
  }
  ~HeadroomTest() override { std::filesystem::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

TEST_F(HeadroomTest, WithoutACgroupItIsMemAvailableLessAReserve) {
  const MemoryInfo info = Headroom(root_).read();
  EXPECT_EQ(info.total_bytes, 8192 * kMiB);
  EXPECT_EQ(info.available_bytes, (4096 - 256) * kMiB);
}

TEST_F(HeadroomTest, AUnifiedCgroupBoundsItWhereItsFilePagesDoNotCount) {
  write("/proc/self/cgroup", "0::/service\n");
  write("/sys/fs/cgroup/service/memory.max", std::to_string(1024 * kMiB));
  write("/sys/fs/cgroup/service/memory.current", std::to_string(500 * kMiB));
  write("/sys/fs/cgroup/service/memory.stat", "anon 1\ninactive_file " + std::to_string(100 * kMiB) + "\n");
  EXPECT_EQ(Headroom(root_).read().available_bytes, (1024 - 400 - 64) * kMiB);
}

TEST_F(HeadroomTest, ALimitAboveTheProcesssOwnCgroupCountsToo) {
  write("/proc/self/cgroup", "0::/pod/container\n");
  write("/sys/fs/cgroup/pod/container/memory.max", "max\n");
  write("/sys/fs/cgroup/pod/container/memory.current", "0\n");
  write("/sys/fs/cgroup/pod/memory.max", std::to_string(512 * kMiB));
  write("/sys/fs/cgroup/pod/memory.current", std::to_string(512 * kMiB));
  EXPECT_EQ(Headroom(root_).read().available_bytes, 0U);
}

TEST_F(HeadroomTest, TheFirstCgroupVersionIsReadWhereItIsMounted) {
  write("/proc/self/cgroup", "7:cpu,cpuacct:/x\n5:memory:/job\n");
  write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", std::to_string(256 * kMiB));
  write("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", std::to_string(56 * kMiB));
  EXPECT_EQ(Headroom(root_).read().available_bytes, (256 - 56 - 16) * kMiB);
}

TEST_F(HeadroomTest, TheFirstCgroupVersionsWordForNoneIsNoLimit) {
  write("/proc/meminfo", "MemFree: 1 kB\n");
  write("/proc/self/cgroup", "5:memory:/job\n");
  write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", "9223372036854771712\n");
  write("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", "1000\n");
  EXPECT_NE(Headroom(root_).read().unknown, nullptr);
}

TEST_F(HeadroomTest, WhatWouldGoIntoTheReserveIsRefusedNamingTheBound) {
  write("/proc/self/cgroup", "0::/small\n");
  write("/sys/fs/cgroup/small/memory.max", std::to_string(200 * kMiB));
  write("/sys/fs/cgroup/small/memory.current", std::to_string(150 * kMiB));
  Headroom headroom(root_);
  headroom.take(20 * kMiB);
  try {
    headroom.take(64 * kMiB);
    FAIL() << "the kernel would kill here";
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, 64 * kMiB);
    EXPECT_NE(std::string(error.what()).find("memory.max"), std::string::npos) << error.what();
  }
}

TEST_F(HeadroomTest, FilePagesInActiveUseCountAsFreeButForAReserve) {
  write("/proc/self/cgroup", "0::/service\n");
  write("/sys/fs/cgroup/service/memory.max", std::to_string(1024 * kMiB));
  write("/sys/fs/cgroup/service/memory.current", std::to_string(900 * kMiB));
  write("/sys/fs/cgroup/service/memory.stat", "anon 1\ninactive_file " + std::to_string(10 * kMiB) + "\nactive_file " +
                                                  std::to_string(800 * kMiB) + "\nslab_reclaimable " +
                                                  std::to_string(20 * kMiB) + "\n");
  // In use for good: 900 - 10 - (800 - 64) - (20 - 10) = 144; and the reserve of a sixteenth.
  EXPECT_EQ(Headroom(root_).read().available_bytes, (1024 - 144 - 64) * kMiB);
}

TEST_F(HeadroomTest, TheFirstVersionCountsTheGroupsBelowUnderNamesOfTheirOwn) {
  write("/proc/self/cgroup", "5:memory:/job\n");
  write("/sys/fs/cgroup/memory/job/memory.limit_in_bytes", std::to_string(1024 * kMiB));
  write("/sys/fs/cgroup/memory/job/memory.usage_in_bytes", std::to_string(900 * kMiB));
  write("/sys/fs/cgroup/memory/job/memory.stat", "inactive_file 0\nactive_file 0\ntotal_inactive_file " +
                                                     std::to_string(100 * kMiB) + "\ntotal_active_file " +
                                                     std::to_string(600 * kMiB) + "\n");
  EXPECT_EQ(Headroom(root_).read().available_bytes, (1024 - (900 - 100 - 536) - 64) * kMiB);
}

TEST_F(HeadroomTest, PastMemoryHighAllocationsCrawlSoItIsABoundToo) {
  write("/proc/self/cgroup", "0::/service\n");
  write("/sys/fs/cgroup/service/memory.max", "max\n");
  write("/sys/fs/cgroup/service/memory.high", std::to_string(512 * kMiB));
  write("/sys/fs/cgroup/service/memory.current", std::to_string(100 * kMiB));
  EXPECT_EQ(Headroom(root_).read().available_bytes, (512 - 100 - 32) * kMiB);
  write("/sys/fs/cgroup/service/memory.max", std::to_string(256 * kMiB));
  EXPECT_EQ(Headroom(root_).read().available_bytes, (256 - 100 - 16) * kMiB) << "the lower one holds";
}

TEST_F(HeadroomTest, ARefusalSaysHowMuchOfTheBoundIsFileCache) {
  write("/proc/self/cgroup", "0::/small\n");
  write("/sys/fs/cgroup/small/memory.high", std::to_string(200 * kMiB));
  write("/sys/fs/cgroup/small/memory.max", "max\n");
  write("/sys/fs/cgroup/small/memory.current", std::to_string(150 * kMiB));
  write("/sys/fs/cgroup/small/memory.stat", "active_file " + std::to_string(30 * kMiB) + "\n");
  try {
    Headroom(root_).take(128 * kMiB);
    FAIL() << "the kernel would crawl here";
  } catch (const OutOfMemoryError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("small/memory.high, " + std::to_string(200 * kMiB) + " bytes"), std::string::npos) << text;
    EXPECT_NE(text.find(std::to_string(30 * kMiB) + " are file cache"), std::string::npos) << text;
  }
}

TEST_F(HeadroomTest, AProcessThatIsMovedIntoATighterCgroupIsBoundByItAtTheNextReading) {
  write("/proc/self/cgroup", "0::/wide\n");
  write("/sys/fs/cgroup/wide/memory.max", std::to_string(2048 * kMiB));
  write("/sys/fs/cgroup/wide/memory.current", "0");
  write("/sys/fs/cgroup/tight/memory.max", std::to_string(256 * kMiB));
  write("/sys/fs/cgroup/tight/memory.current", "0");
  Headroom headroom(root_);
  headroom.take(kMiB);
  EXPECT_EQ(headroom.read().total_bytes, 2048 * kMiB);
  write("/proc/self/cgroup", "0::/tight\n");
  EXPECT_EQ(headroom.read().total_bytes, 256 * kMiB);
  EXPECT_THROW(headroom.take(512 * kMiB), OutOfMemoryError);
}

}  // namespace
}  // namespace vattn::host
