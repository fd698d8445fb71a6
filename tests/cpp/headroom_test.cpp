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

}  // namespace
}  // namespace vattn::host
