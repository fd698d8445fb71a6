// What bounds a page of the host driver, beyond the plain cases of headroom_test and host_driver_test: odd and missing files of
// the kernel, and pages that cannot have the place that their address would give them.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "vattn/driver/host/headroom.hpp"
#include "vattn/driver/host/host_driver.hpp"

namespace vattn {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr std::size_t kPage = 64 << 10;

class HostBounds : public testing::Test {
 protected:
  HostBounds() : root_(testing::TempDir() + "vattn_bounds_" + std::to_string(::getpid())) {
    write("/proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n");
    write("/proc/self/cgroup", "0::/here\n");
  }
  ~HostBounds() override { std::filesystem::remove_all(root_); }

  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }
  [[nodiscard]] MemoryInfo read() const { return host::Headroom(root_).read(); }

  std::string root_;
};

TEST_F(HostBounds, ACgroupWithMoreRoomThanTheHostDoesNotBound) {
  write("/sys/fs/cgroup/here/memory.max", std::to_string(1000 * kMiB));
  write("/sys/fs/cgroup/here/memory.current", "0");
  EXPECT_EQ(read().available_bytes, (512 - 64) * kMiB);
  EXPECT_EQ(read().total_bytes, 1000 * kMiB);
  write("/sys/fs/cgroup/here/memory.max", std::to_string(2000 * kMiB));
  EXPECT_EQ(read().total_bytes, 1024 * kMiB) << "more than the host has is no bound at all";
}

TEST_F(HostBounds, ACgroupThatDoesNotSayWhatItUsesUsesNothing) {
  write("/sys/fs/cgroup/here/memory.max", std::to_string(160 * kMiB));
  EXPECT_EQ(read().available_bytes, 150 * kMiB);
}

TEST_F(HostBounds, FilePagesThatCanBeDroppedDoNotMakeRoomBeyondTheLimit) {
  write("/sys/fs/cgroup/here/memory.max", std::to_string(160 * kMiB));
  write("/sys/fs/cgroup/here/memory.current", std::to_string(100 * kMiB));
  write("/sys/fs/cgroup/here/memory.stat", "inactive_file " + std::to_string(120 * kMiB) + "\n");
  EXPECT_EQ(read().available_bytes, 150 * kMiB);
}

TEST_F(HostBounds, TheTightestOfSeveralCgroupsHolds) {
  write("/proc/self/cgroup", "0::/here/below\n");
  write("/sys/fs/cgroup/here/memory.max", std::to_string(320 * kMiB));
  write("/sys/fs/cgroup/here/memory.current", "0");
  write("/sys/fs/cgroup/here/below/memory.max", std::to_string(160 * kMiB));
  write("/sys/fs/cgroup/here/below/memory.current", "0");
  EXPECT_EQ(read().available_bytes, 150 * kMiB);
  EXPECT_EQ(read().total_bytes, 160 * kMiB);
}

TEST_F(HostBounds, LinesThatAreNoCgroupsAreSkipped) {
  write("/proc/self/cgroup", "nonsense\n3:only one colon\n\n4:memory,hugetlb:/\n");
  write("/sys/fs/cgroup/memory/memory.limit_in_bytes", std::to_string(160 * kMiB));
  write("/sys/fs/cgroup/memory/memory.usage_in_bytes", "0");
  EXPECT_EQ(read().available_bytes, 150 * kMiB);
}

TEST_F(HostBounds, AHostWithLessThanItsReserveHasNothing) {
  write("/proc/meminfo", "MemTotal: 1048576 kB\nMemAvailable: 1024 kB\n");
  EXPECT_EQ(read().available_bytes, 0U);
}

TEST_F(HostBounds, WithoutALineMemAvailableNobodyCanSayWhatIsLeftAndAPageIsMadeAllTheSame) {
  write("/proc/meminfo", "MemTotal: 1048576 kB\n");
  const MemoryInfo info = read();
  ASSERT_NE(info.unknown, nullptr);
  EXPECT_STREQ(info.unknown, "/proc/meminfo has no line MemAvailable");
  EXPECT_GT(info.available_bytes, std::uint64_t{1} << 60);
  EXPECT_NO_THROW(host::Headroom(root_).take(std::size_t{1} << 40));
}

TEST_F(HostBounds, WithoutProcNobodyCanSayWhatIsLeft) {
  std::filesystem::remove_all(root_ + "/proc");
  ASSERT_NE(read().unknown, nullptr);
  EXPECT_STREQ(read().unknown, "/proc/meminfo does not exist (/proc is not mounted)");
}

TEST_F(HostBounds, ACgroupBoundsAHostThatDoesNotSayWhatIsLeft) {
  write("/proc/meminfo", "MemTotal: 1048576 kB\n");
  write("/sys/fs/cgroup/here/memory.max", std::to_string(160 * kMiB));
  write("/sys/fs/cgroup/here/memory.current", "0");
  EXPECT_EQ(read().unknown, nullptr);
  EXPECT_EQ(read().available_bytes, 150 * kMiB);
}

TEST(HostPlaces, APageThatFitsNoPlaceIsMadeAndMappedAllTheSame) {
  const auto driver = open_host_driver();
  const Address base = driver->reserve(8 * kPage, UnmappedReads::kZeros);
  const auto place = [&](std::size_t at, std::size_t size) {
    const PageHandle page = driver->create(size, base + at);
    driver->map(base + at, size, page);
    driver->set_access(base + at, size);
    *reinterpret_cast<unsigned char*>(base + at) = static_cast<unsigned char>(at / 4096);
    return page;
  };
  std::vector<PageHandle> pages;
  pages.push_back(place(0, kPage));
  EXPECT_EQ(pages.back(), driver->home(base)) << "the first has its place, and decides the size of all";
  pages.push_back(place(2 * kPage, 2 * kPage));
  EXPECT_NE(pages.back(), driver->home(base + 2 * kPage)) << "of another size";
  pages.push_back(place(5 * kPage + 4096, kPage));
  EXPECT_NE(pages.back(), driver->home(base + 5 * kPage + 4096)) << "not on a multiple of its size";
  const PageHandle larger = driver->create(16 * kPage, base);
  EXPECT_NE(larger, driver->home(base)) << "larger than the reservation";
  driver->release(larger);
  const PageHandle nowhere = driver->create(kPage, base + 100 * kPage);
  EXPECT_EQ(driver->home(base + 100 * kPage), 0U);
  driver->release(nowhere);
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(base + 2 * kPage), 32);
  EXPECT_EQ(*reinterpret_cast<unsigned char*>(base + 5 * kPage + 4096), 81);
  driver->unmap(base, kPage);
  driver->unmap(base + 2 * kPage, 2 * kPage);
  driver->unmap(base + 5 * kPage + 4096, kPage);
  for (const PageHandle page : pages) driver->release(page);
  driver->release_range(base, 8 * kPage);
}

}  // namespace
}  // namespace vattn
