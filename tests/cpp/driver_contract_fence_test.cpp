// The driver contract: fences, of drivers with streams and of those without. See driver_contract.hpp. When a fence passes is
// tested where work can be held up: in cuda_driver_fence_test.cpp.
#include <limits>
#include <thread>

#include "driver_contract.hpp"

namespace vattn {
namespace {

TEST_P(DriverContract, FencesAreRefusedWhereThereAreNoStreams) {
  if (driver_->traits().has_streams) GTEST_SKIP() << "has streams";
  EXPECT_THROW((void)driver_->record(0), std::invalid_argument);
  EXPECT_THROW((void)driver_->has_passed(1), std::invalid_argument);
  EXPECT_THROW(driver_->wait(1), std::invalid_argument);
  EXPECT_THROW(driver_->wait_on(0, 1), std::invalid_argument);
  driver_->drop(1);
  EXPECT_FALSE(driver_->is_capturing(0));
  expect_refused("record", [&] { (void)driver_->record(0); });
}

TEST_P(DriverContract, AFencePassesOnceItsWorkIsDone) {
  if (!driver_->traits().has_streams) GTEST_SKIP() << "has no streams";
  const FenceHandle fence = driver_->record(0);
  EXPECT_NE(fence, 0U);
  driver_->wait_on(0, fence);
  driver_->wait(fence);
  EXPECT_TRUE(driver_->has_passed(fence));
  EXPECT_FALSE(driver_->is_capturing(0));
  driver_->drop(fence);
}

TEST_P(DriverContract, AFenceThatWasDroppedIsRefused) {
  if (!driver_->traits().has_streams) GTEST_SKIP() << "has no streams";
  const FenceHandle stale = driver_->record(0);
  const FenceHandle other = driver_->record(0);
  EXPECT_NE(stale, other);
  driver_->drop(stale);
  const FenceHandle fresh = driver_->record(0);  // with what the stale one was made of
  EXPECT_NE(fresh, stale);
  for (const FenceHandle bad : {stale, FenceHandle{0}, std::numeric_limits<FenceHandle>::max()}) {
    EXPECT_THROW((void)driver_->has_passed(bad), std::invalid_argument);
    EXPECT_THROW(driver_->wait(bad), std::invalid_argument);
    EXPECT_THROW(driver_->wait_on(0, bad), std::invalid_argument);
    expect_refused("a fence that is none", [&] { driver_->wait(bad); });
    driver_->drop(bad);
  }
  driver_->wait(fresh);
  driver_->wait(other);
  driver_->drop(fresh);
  driver_->drop(other);
}

TEST_P(DriverContract, FencesLeftBehindGoWithTheDriver) {
  if (!driver_->traits().has_streams) GTEST_SKIP() << "has no streams";
  for (int i = 0; i < 3; ++i) (void)driver_->record(0);
}

TEST_P(DriverContract, ThreadsUseFencesAtOnce) {
  if (!driver_->traits().has_streams) GTEST_SKIP() << "has no streams";
  std::vector<std::string> failures(4);
  std::vector<std::thread> threads;
  for (std::string& failure : failures) {
    threads.emplace_back([&] {
      try {
        for (int round = 0; round < 50; ++round) {
          const FenceHandle fence = driver_->record(0);
          driver_->wait_on(0, fence);
          driver_->wait(fence);
          if (!driver_->has_passed(fence)) failure = "waited for, and not passed";
          driver_->drop(fence);
        }
      } catch (const std::exception& error) {
        failure = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
}

}  // namespace
}  // namespace vattn
