// The CUDA driver while a stream is captured into a graph, by this thread or another: what it calls is let through, and the
// calling thread's capture mode is afterwards what it was. Over the fake library, which knows who was relaxed.
#include <thread>

#include "cuda_driver_fixture.hpp"

namespace vattn {
namespace {

constexpr const char* kExchange = "cuThreadExchangeStreamCaptureMode";
constexpr int kRelaxed = cuda::CU_STREAM_CAPTURE_MODE_RELAXED;
constexpr int kFails = cuda::CUDA_ERROR_INVALID_VALUE;

void set_mode(int mode) {
  const cuda::InContext current;
  auto exchanged = static_cast<cuda::CUstreamCaptureMode>(mode);
  cuda::InContext::require(cuda::table().cuThreadExchangeStreamCaptureMode(&exchanged), kExchange);
}

struct Call {
  const char* entry;  ///< the call that the verb is about
  std::function<void()> verb;
};

class CudaCapture : public CudaDriverTest {
 protected:
  void SetUp() override {
    if (!cuda::on_fake()) GTEST_SKIP() << "needs the fake library";
    CudaDriverTest::SetUp();
    captured_ = fake_cuda_stream_create(0);
    other_ = fake_cuda_stream_create(0);
  }
  void TearDown() override {
    if (!cuda::on_fake()) return;
    for (const Stream stream : {captured_, other_}) fake_cuda_stream_destroy(stream);
    CudaDriverTest::TearDown();
    fake_cuda_reset();
  }
  void capture(bool on = true) const { fake_cuda_set_capturing(captured_, on ? 1 : 0); }

  /// Every verb that a capture leaves free, once.
  void use(Driver& driver) const {
    const OnePage page(driver);
    const OnePage from(driver);
    driver.fill_zero(page.base, page.size);
    driver.copy(page.base, from.base, page.size);
    (void)driver.memory_info();
    const FenceHandle fence = driver.record(other_);
    driver.wait_on(other_, fence);
    driver.wait(fence);
    EXPECT_TRUE(driver.has_passed(fence));
    driver.drop(fence);
  }

  /// Every verb that calls CUDA, in an order in which each succeeds, any number of times over.
  std::vector<Call> calls_of(Driver& driver) {
    const std::size_t size = driver.traits().default_page_size;
    return {
        {"cuMemGetInfo", [&] { (void)driver.memory_info(); }},
        {"cuMemAddressReserve", [&, size] { base_ = driver.reserve(size, UnmappedReads::kFault); }},
        {"cuMemCreate", [&, size] { page_ = driver.create(size, 0); }},
        {"cuMemMap", [&, size] { driver.map(base_, size, page_); }},
        {"cuMemSetAccess", [&, size] { driver.set_access(base_, size); }},
        {"cuMemsetD8Async", [&, size] { driver.fill_zero(base_, size); }},
        {"cuMemcpyDtoDAsync", [&] { driver.copy(base_, base_ + 8, 8); }},
        {"cuEventRecord", [&] { fence_ = driver.record(other_); }},
        {"cuStreamWaitEvent", [&] { driver.wait_on(other_, fence_); }},
        {"cuEventSynchronize", [&] { driver.wait(fence_); }},
        {"cuEventQuery", [&] { (void)driver.has_passed(fence_); }},
        {"cuStreamIsCapturing", [&] { (void)driver.is_capturing(captured_); }},
        {"cuCtxSynchronize", [&] { driver.synchronize(); }},
        {"cuMemUnmap", [&, size] { driver.unmap(base_, size); }},
        {"cuMemRelease", [&] { driver.release(page_); }},
        {"cuMemAddressFree", [&, size] { driver.release_range(base_, size); }},
    };
  }

  Stream captured_ = 0;
  Stream other_ = 0;
  Address base_ = 0;
  PageHandle page_ = 0;
  FenceHandle fence_ = 0;
};

TEST_F(CudaCapture, ACaptureHoldsNothingUpAndIsHeldUpByNothing) {
  const auto driver = open_cuda_driver(0);
  capture();
  use(*driver);
  std::thread([&] { use(*driver); }).join();
  EXPECT_TRUE(driver->is_capturing(captured_));
  EXPECT_FALSE(driver->is_capturing(other_));
  EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
}

TEST_F(CudaCapture, ADriverIsOpenedAndClosedDuringACapture) {
  capture();
  std::thread([&] {
    auto driver = open_cuda_driver(0);
    use(*driver);
    driver.reset();
    EXPECT_EQ(fake_cuda_capture_mode(), 0);
  }).join();
}

TEST_F(CudaCapture, TheDeviceAndTheCapturedStreamAreLeftAlone) {
  const auto driver = open_cuda_driver(0);
  const FenceHandle fence = driver->record(captured_);
  capture();
  EXPECT_THROW(driver->synchronize(), DriverError);
  EXPECT_THROW((void)driver->record(captured_), DriverError);
  EXPECT_THROW(driver->wait_on(captured_, fence), DriverError);
  EXPECT_TRUE(driver->has_passed(fence)) << "it marks what came before the capture";
  driver->drop(fence);
  expected_violations_ = 3;
}

TEST_F(CudaCapture, EveryVerbLeavesTheThreadsModeAsItWas) {
  const auto driver = open_cuda_driver(0);
  for (const int mode : {0, 1, kRelaxed}) {
    set_mode(mode);
    for (const auto& [entry, verb] : calls_of(*driver)) {
      for (const char* failing : {entry, "cuCtxPushCurrent", kExchange}) {
        fake_cuda_fail(failing, 1, kFails, 0);
        EXPECT_TRUE(contains(message_of(verb), failing)) << entry;
        EXPECT_EQ(fake_cuda_capture_mode(), mode) << entry << " where " << failing << " fails";
        EXPECT_EQ(fake_cuda_context_depth(), 0) << entry << " where " << failing << " fails";
      }
      fake_cuda_fail(entry, 1, cuda::CUDA_ERROR_OUT_OF_MEMORY, 0);
      EXPECT_THROW(verb(), OutOfMemoryError) << entry;
      EXPECT_EQ(fake_cuda_capture_mode(), mode) << entry;
      const std::uint64_t exchanges = fake_cuda_calls(kExchange);
      EXPECT_NO_THROW(verb()) << entry;
      EXPECT_EQ(fake_cuda_calls(kExchange), exchanges + 2) << entry;
      EXPECT_EQ(fake_cuda_capture_mode(), mode) << entry;
    }
    driver->drop(fence_);
  }
}

TEST_F(CudaCapture, AModeThatCannotBeRestoredIsNoFailureOfTheVerb) {
  const auto driver = open_cuda_driver(0);
  fake_cuda_fail(kExchange, 2, kFails, 0);
  EXPECT_NO_THROW((void)driver->memory_info());
  EXPECT_EQ(fake_cuda_faults_fired(), 1U);
  EXPECT_EQ(fake_cuda_context_depth(), 0);
}

TEST_F(CudaCapture, TheDestructorGivesBackWithOrWithoutTheRelaxedMode) {
  for (const bool fails : {false, true}) {
    auto driver = open_cuda_driver(0);
    const Address base = driver->reserve(driver->traits().default_page_size, UnmappedReads::kFault);
    driver->map(base, driver->traits().default_page_size, driver->create(driver->traits().default_page_size, 0));
    (void)driver->record(other_);
    if (fails) fake_cuda_fail(kExchange, 1, kFails, 1);
    EXPECT_NO_THROW(driver.reset());
    EXPECT_EQ(cuda::alive_on_fake(), cuda::nothing_alive());
    EXPECT_EQ(fake_cuda_capture_mode(), 0);
    EXPECT_EQ(fake_cuda_faults_fired() != 0, fails);
  }
}

TEST_F(CudaCapture, ALibraryWithoutModesWorksAndHasNone) {
  fake_cuda_hide(kExchange);
  const auto driver = open_cuda_driver(0);
  use(*driver);
  EXPECT_EQ(fake_cuda_calls(kExchange), 0U);
  capture();
  EXPECT_THROW((void)driver->create(driver->traits().default_page_size, 0), DriverError);
  expected_violations_ = 1;
}

}  // namespace
}  // namespace vattn
