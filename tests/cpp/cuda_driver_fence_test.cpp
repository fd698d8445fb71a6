// When the CUDA driver's fences pass, what they are made of, and what is left of them when a call fails. Over the fake library,
// whose kernels run for as long as a test wants; fences that any driver has are tested in driver_contract_fence_test.cpp.
#include <atomic>
#include <chrono>
#include <thread>

#include "cuda_driver_fixture.hpp"
#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/decorators/fault_driver.hpp"

namespace vattn {
namespace {

using std::chrono::milliseconds;

constexpr std::int64_t kUntilEnded = -1;

class CudaFence : public CudaDriverTest {
 protected:
  void SetUp() override {
    if (!cuda::on_fake()) GTEST_SKIP() << "needs the fake library";
    CudaDriverTest::SetUp();
  }
  void TearDown() override {
    for (const Stream stream : streams_) fake_cuda_stream_destroy(stream);
    CudaDriverTest::TearDown();
  }

  Stream stream(int device = 0) { return streams_.emplace_back(fake_cuda_stream_create(device)); }
  static std::uint64_t kernel_on(Stream stream, const OnePage& page, std::int64_t duration_us = kUntilEnded) {
    const std::uint64_t kernel = fake_cuda_kernel_begin_on(stream, page.base, page.size, duration_us);
    EXPECT_NE(kernel, 0U);
    return kernel;
  }
  static std::uint64_t events() {
    fake_cuda_counts counts;
    fake_cuda_count(&counts);
    return counts.events;
  }

  std::vector<Stream> streams_;
};

// ---- when they pass -----------------------------------------------------------------------------------------------------

TEST_F(CudaFence, AFencePassesWhenTheKernelsBeforeItAreOver) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  for (const Stream on : {Stream{0}, stream()}) {
    const std::uint64_t kernel = kernel_on(on, page);
    const FenceHandle fence = driver->record(on);
    const std::uint64_t later = kernel_on(on, page);
    EXPECT_FALSE(driver->has_passed(fence));
    EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
    EXPECT_TRUE(driver->has_passed(fence)) << "what came later does not matter";
    driver->wait(fence);
    driver->drop(fence);
    EXPECT_EQ(fake_cuda_kernel_end(later), 1);
  }
}

TEST_F(CudaFence, WaitBlocksUntilTheKernelEndsAndHoldsUpNobody) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  const Stream on = stream();
  const std::uint64_t kernel = kernel_on(on, page);
  const FenceHandle fence = driver->record(on);
  std::atomic<bool> ended{false};
  std::atomic<bool> came_back{false};
  std::thread waiter([&] {
    driver->wait(fence);
    EXPECT_TRUE(ended.load());
    came_back = true;
  });
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_FALSE(came_back.load());
  {
    const OnePage other(*driver);  // every other verb goes on meanwhile
    driver->fill_zero(other.base, other.size);
  }
  const Stream idle = stream();
  const FenceHandle another = driver->record(idle);
  driver->wait(another);
  driver->drop(another);
  EXPECT_FALSE(driver->has_passed(fence));
  ended = true;
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  waiter.join();
  EXPECT_TRUE(came_back.load());
  driver->drop(fence);
}

TEST_F(CudaFence, WaitSleepsForTheKernelsTime) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  const Stream on = stream();
  const auto begun = std::chrono::steady_clock::now();
  kernel_on(on, page, 30'000);
  const FenceHandle fence = driver->record(on);
  EXPECT_FALSE(driver->has_passed(fence));
  driver->wait(fence);
  EXPECT_GE(std::chrono::steady_clock::now() - begun, milliseconds(30));
  EXPECT_TRUE(driver->has_passed(fence));
  driver->drop(fence);
}

TEST_F(CudaFence, WaitOnOrdersAnotherStreamAndReturnsAtOnce) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  const Stream first = stream();
  const Stream second = stream();
  const std::uint64_t kernel = kernel_on(first, page);
  const FenceHandle fence = driver->record(first);
  driver->wait_on(second, fence);
  driver->drop(fence);  // dropped, and its event used again: the second stream waits all the same
  const FenceHandle behind = driver->record(second);
  kernel_on(second, page, 0);
  const FenceHandle last = driver->record(second);
  EXPECT_FALSE(driver->has_passed(behind));
  EXPECT_FALSE(driver->has_passed(last));
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  EXPECT_TRUE(driver->has_passed(behind));
  EXPECT_TRUE(driver->has_passed(last));
  driver->drop(behind);
  driver->drop(last);
}

TEST_F(CudaFence, UnmapAfterTheFenceBreaksNoRuleAndBeforeItDoes) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  const Stream on = stream();
  const std::uint64_t kernel = kernel_on(on, page);
  kernel_on(on, page, 0);  // still to run
  const FenceHandle fence = driver->record(on);
  EXPECT_THROW(driver->unmap(page.base, page.size), DriverError);
  expected_violations_ = 1;
  fake_cuda_kernel_end(kernel);
  driver->wait(fence);
  driver->drop(fence);
}

TEST_F(CudaFence, AFenceDroppedWhileItIsWaitedForIsNotUsedAgain) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  const Stream on = stream();
  const std::uint64_t kernel = kernel_on(on, page);
  const FenceHandle fence = driver->record(on);
  std::thread waiter([&] { driver->wait(fence); });
  while (fake_cuda_calls("cuEventSynchronize") == 0) std::this_thread::yield();
  driver->drop(fence);
  EXPECT_THROW((void)driver->has_passed(fence), std::invalid_argument);
  const FenceHandle another = driver->record(on);
  EXPECT_EQ(events(), 2U);
  fake_cuda_kernel_end(kernel);
  waiter.join();
  driver->drop(another);
  driver->drop(driver->record(on));
  EXPECT_EQ(events(), 2U);
}

// ---- capture ------------------------------------------------------------------------------------------------------------

TEST_F(CudaFence, SaysWhetherAStreamIsBeingCaptured) {
  const auto driver = open_cuda_driver(0);
  const Stream one = stream();
  const Stream other = stream();
  EXPECT_FALSE(driver->is_capturing(one));
  EXPECT_FALSE(driver->is_capturing(0));
  fake_cuda_set_capturing(one, 1);
  EXPECT_TRUE(driver->is_capturing(one));
  EXPECT_FALSE(driver->is_capturing(other));
  EXPECT_TRUE(driver->is_capturing(0)) << "it cannot be used meanwhile";
  fake_cuda_set_capturing(one, 0);
  EXPECT_FALSE(driver->is_capturing(one));
  EXPECT_FALSE(driver->is_capturing(0));
}

// ---- what they are made of ----------------------------------------------------------------------------------------------

TEST_F(CudaFence, EventsAreUsedAgain) {
  const auto driver = open_cuda_driver(0);
  for (int i = 0; i < 100; ++i) {
    const FenceHandle one = driver->record(0);
    const FenceHandle two = driver->record(0);
    driver->drop(one);
    driver->drop(two);
  }
  EXPECT_EQ(fake_cuda_calls("cuEventCreate"), 2U);
  EXPECT_EQ(events(), 2U);
}

TEST_F(CudaFence, TheCallersContextIsRestored) {
  const auto driver = open_cuda_driver(0);
  const Stream on = stream();
  const cuda::InContext current(1);
  const FenceHandle fence = driver->record(on);
  driver->wait_on(on, fence);
  driver->wait(fence);
  EXPECT_TRUE(driver->has_passed(fence));
  EXPECT_FALSE(driver->is_capturing(on));
  driver->drop(fence);
  EXPECT_EQ(fake_cuda_context_depth(), 1);
}

// ---- what fails ---------------------------------------------------------------------------------------------------------

TEST_F(CudaFence, ACallThatFailsIsNamedAndLeavesNothing) {
  const auto driver = open_cuda_driver(0);
  const Stream on = stream();
  const FenceHandle fence = driver->record(on);
  struct Failing {
    const char* entry;
    std::function<void()> verb;
  };
  const Failing failing[] = {
      {"cuEventCreate", [&] { (void)driver->record(on); }},
      {"cuEventRecord", [&] { (void)driver->record(on); }},
      {"cuEventQuery", [&] { (void)driver->has_passed(fence); }},
      {"cuEventSynchronize", [&] { driver->wait(fence); }},
      {"cuStreamWaitEvent", [&] { driver->wait_on(on, fence); }},
      {"cuStreamIsCapturing", [&] { (void)driver->is_capturing(on); }},
  };
  for (const auto& [entry, verb] : failing) {
    for (const char* call : {entry, "cuCtxPushCurrent"}) {
      fake_cuda_fail(call, 1, cuda::CUDA_ERROR_ILLEGAL_ADDRESS, 0);
      try {
        verb();
        ADD_FAILURE() << call << " failed and nothing was thrown";
      } catch (const DriverError& error) {
        EXPECT_EQ(error.call, call);
        EXPECT_EQ(error.code, cuda::CUDA_ERROR_ILLEGAL_ADDRESS);
      }
      fake_cuda_clear_faults();
      fake_cuda_fail(call, 1, cuda::CUDA_ERROR_OUT_OF_MEMORY, 0);
      EXPECT_THROW(verb(), OutOfMemoryError) << call;
      fake_cuda_clear_faults();
      EXPECT_EQ(fake_cuda_context_depth(), 0) << call;
    }
  }
  EXPECT_EQ(events(), 2U) << "the fence's, and the one that could not be recorded";
  EXPECT_TRUE(driver->has_passed(fence));
  driver->drop(driver->record(on));
  EXPECT_EQ(events(), 2U) << "which is used again";
  driver->drop(fence);
}

TEST_F(CudaFence, AnyCallMayFailWithoutALeak) {
  const auto use = [](Driver& driver, Stream on) {
    const FenceHandle fence = driver.record(on);
    try {
      driver.wait_on(on, fence);
      driver.wait(fence);
      (void)driver.has_passed(fence);
      (void)driver.is_capturing(on);
    } catch (const Error&) {
      driver.drop(fence);
      throw;
    }
    driver.drop(fence);
  };
  const Stream on = stream();
  for (const bool sticky : {false, true}) {
    for (std::uint64_t k = 1; k <= 30; ++k) {  // more calls than are made
      auto driver = open_cuda_driver(0);
      fake_cuda_fail(nullptr, k, cuda::CUDA_ERROR_ILLEGAL_ADDRESS, sticky ? 1 : 0);
      try {
        use(*driver, on);
      } catch (const Error&) {
      }
      fake_cuda_clear_faults();
      cuda::CUcontext left = nullptr;  // by a pop that failed: there is no other way to take it off
      while (fake_cuda_context_depth() != 0) cuda::table().cuCtxPopCurrent(&left);
      use(*driver, on);
      EXPECT_LE(events(), 1U) << k;
      driver.reset();
      EXPECT_EQ(cuda::alive_on_fake(), cuda::nothing_alive()) << k;
    }
  }
}

TEST_F(CudaFence, TheDestructorGivesTheEventsBackAndNeverThrows) {
  for (const char* entry : {"cuEventDestroy", "cuCtxPushCurrent", "cuCtxPopCurrent", static_cast<const char*>(nullptr)}) {
    auto driver = open_cuda_driver(0);
    (void)driver->record(0);
    driver->drop(driver->record(0));
    if (entry != nullptr) fake_cuda_fail(entry, 1, cuda::CUDA_ERROR_DEINITIALIZED, 1);
    EXPECT_NO_THROW(driver.reset());
    if (entry == nullptr) {
      EXPECT_EQ(cuda::alive_on_fake(), cuda::nothing_alive());
    }
    fake_cuda_reset();
  }
}

// ---- decorators ---------------------------------------------------------------------------------------------------------

TEST_F(CudaFence, DecoratorsForwardCountAndFail) {
  const auto faults = std::make_shared<FaultDriver>(open_cuda_driver(0));
  CountingDriver driver(faults);
  const Stream on = stream();
  const std::uint64_t calls = driver.calls();
  const FenceHandle fence = driver.record(on);
  EXPECT_EQ(driver.alive().fences, 1);
  driver.wait_on(on, fence);
  driver.wait(fence);
  EXPECT_TRUE(driver.has_passed(fence));
  EXPECT_FALSE(driver.is_capturing(on));
  driver.synchronize();
  const std::pair<Verb, std::function<void()>> verbs[] = {
      {Verb::kRecord, [&] { (void)driver.record(on); }},
      {Verb::kHasPassed, [&] { (void)driver.has_passed(fence); }},
      {Verb::kWait, [&] { driver.wait(fence); }},
      {Verb::kWaitOn, [&] { driver.wait_on(on, fence); }},
      {Verb::kIsCapturing, [&] { (void)driver.is_capturing(on); }},
  };
  for (const auto& [verb, call] : verbs) {
    EXPECT_EQ(driver.calls(verb), 1U);
    faults->arm({.verb = verb});
    EXPECT_TRUE(contains(message_of(call), name_of(verb)));
    EXPECT_EQ(driver.calls(verb), 2U);
  }
  faults->disarm();
  EXPECT_EQ(driver.alive().fences, 1);
  driver.drop(fence);
  EXPECT_EQ(driver.alive(), CountingDriver::Alive{});
  EXPECT_EQ(driver.calls(), calls) << "none of this asks for memory";
  EXPECT_THROW(driver.wait(fence), std::invalid_argument);
}

}  // namespace
}  // namespace vattn
