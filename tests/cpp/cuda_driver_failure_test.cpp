// What the CUDA driver does when CUDA is not there, or fails: over the fake library, since a real one does not fail on demand.
#include <cstdlib>

#include "cuda_driver_fixture.hpp"

namespace vattn {
namespace {

constexpr int kInvalidValue = cuda::CUDA_ERROR_INVALID_VALUE;
constexpr int kOutOfMemory = cuda::CUDA_ERROR_OUT_OF_MEMORY;
constexpr std::size_t kPage = std::size_t{2} << 20;

class CudaFailure : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::on_fake()) GTEST_SKIP() << "needs the fake library";
    fake_cuda_reset();
  }
  void TearDown() override {
    if (!cuda::on_fake()) return;
    ::setenv("VATTN_CUDA_LIBRARY", VATTN_FAKE_CUDA, 1);
    EXPECT_EQ(cuda::alive_on_fake(), cuda::nothing_alive()) << "something is left";
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
  }
};

/// The DriverError that a call throws; a failure and an empty one if it throws none.
DriverError error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const DriverError& error) {
    return error;
  }
  ADD_FAILURE() << "no DriverError";
  return {"", 0, "", ""};
}

// ---- CUDA is not there --------------------------------------------------------------------------------------------------

TEST_F(CudaFailure, AMissingLibraryIsNamedWithAWayOut) {
  ::setenv("VATTN_CUDA_LIBRARY", "/nowhere/libcuda.so.1", 1);
  const DriverError error = error_of([] { (void)open_cuda_driver(0); });
  EXPECT_EQ(error.call, "dlopen");
  EXPECT_TRUE(contains(error.what(), "/nowhere/libcuda.so.1")) << error.what();
  EXPECT_TRUE(contains(error.what(), "device=\"cpu\"")) << error.what();
  EXPECT_EQ(cuda_device_count(), 0);
  const CudaInfo info = probe_cuda();
  EXPECT_EQ(info.library, "/nowhere/libcuda.so.1");
  EXPECT_TRUE(contains(info.reason, "/nowhere/libcuda.so.1")) << info.reason;
  EXPECT_TRUE(info.devices.empty());
}

TEST_F(CudaFailure, ALibraryThatIsNotCudaIsRefused) {
  ::setenv("VATTN_CUDA_LIBRARY", "libm.so.6", 1);
  const DriverError error = error_of([] { (void)open_cuda_driver(0); });
  EXPECT_TRUE(contains(error.what(), "libm.so.6") && contains(error.what(), "cuGetProcAddress")) << error.what();
}

TEST_F(CudaFailure, ADriverFromBeforeCuda12IsAskedInTheFirstAbi) {
  ::setenv("VATTN_CUDA_LIBRARY", VATTN_FAKE_CUDA_V1, 1);
  const auto driver = open_cuda_driver(1);
  EXPECT_EQ(driver->traits().tensor_device, TensorDevice::kCuda);
  EXPECT_EQ(driver->traits().tensor_device_index, 1);
  driver->release(driver->create(kPage, 0));
  fake_cuda_hide("cuMemSetAccess");
  EXPECT_EQ(error_of([] { (void)open_cuda_driver(0); }).call, "cuGetProcAddress");
}

TEST_F(CudaFailure, TheSystemsLibraryIsOpenedWhereNoneIsNamed) {
  ::setenv("VATTN_CUDA_LIBRARY", "", 1);
  EXPECT_EQ(probe_cuda().library, "libcuda.so.1");
  ::unsetenv("VATTN_CUDA_LIBRARY");
  EXPECT_EQ(probe_cuda().library, "libcuda.so.1");
}

TEST_F(CudaFailure, ADeviceBeyondTheLastIsRefusedWithTheirNumber) {
  for (const auto& [devices, words] : {std::pair{1, "sees 1 device"}, {2, "sees 2 devices"}}) {
    fake_cuda_set_devices(devices);
    const std::string message = message_of([] { (void)open_cuda_driver(7); });
    EXPECT_TRUE(contains(message, "cuda:7") && message.ends_with(words)) << message;
  }
}

TEST_F(CudaFailure, ACodeWithoutANameIsReportedByItsNumber) {
  const auto driver = open_cuda_driver(0);
  fake_cuda_fail("cuMemCreate", 1, 12345, 0);
  const DriverError error = error_of([&] { (void)driver->create(kPage, 0); });
  EXPECT_EQ(error.code, 12345);
  EXPECT_EQ(error.name, "unrecognised CUresult");
  EXPECT_TRUE(contains(error.what(), "no text for this code")) << error.what();
}

TEST_F(CudaFailure, AMissingRequiredEntryIsNamed) {
  fake_cuda_hide("cuMemSetAccess");
  const DriverError error = error_of([] { (void)open_cuda_driver(0); });
  EXPECT_EQ(error.call, "cuGetProcAddress");
  EXPECT_EQ(error.code, cuda::CUDA_ERROR_NOT_FOUND);
  EXPECT_TRUE(contains(error.what(), "cuMemSetAccess") && contains(error.what(), "10.2")) << error.what();
  EXPECT_TRUE(contains(probe_cuda().reason, "cuMemSetAccess"));
}

TEST_F(CudaFailure, AMissingOptionalEntryIsNoMatter) {
  fake_cuda_hide("cuMemRetainAllocationHandle");
  fake_cuda_hide("cuMemcpyHtoD");
  EXPECT_NO_THROW((void)open_cuda_driver(0));
}

TEST_F(CudaFailure, AMachineWithoutDevicesSaysSo) {
  fake_cuda_set_devices(0);
  const DriverError error = error_of([] { (void)open_cuda_driver(0); });
  EXPECT_EQ(error.call, "cuInit");
  EXPECT_EQ(error.name, "CUDA_ERROR_NO_DEVICE");
  EXPECT_EQ(cuda_device_count(), 0);
  EXPECT_TRUE(contains(probe_cuda().reason, "CUDA_ERROR_NO_DEVICE"));
  EXPECT_EQ(probe_cuda().driver_version, 13000) << "the driver is there all the same";
}

TEST_F(CudaFailure, ADeviceWithoutVirtualMemorySaysSo) {
  fake_cuda_set_vmm(0);
  const DriverError error = error_of([] { (void)open_cuda_driver(0); });
  EXPECT_EQ(error.name, "CUDA_ERROR_NOT_SUPPORTED");
  EXPECT_TRUE(contains(probe_cuda().devices.at(0).reason, "virtual memory"));
}

TEST_F(CudaFailure, ABrokenDeviceIsAReasonAndTheOthersAreFound) {
  fake_cuda_fail("cuDeviceTotalMem", 1, cuda::CUDA_ERROR_UNKNOWN, 0);
  const CudaInfo info = probe_cuda();
  ASSERT_EQ(info.devices.size(), 2U);
  EXPECT_TRUE(contains(info.devices[0].reason, "CUDA_ERROR_UNKNOWN")) << info.devices[0].reason;
  EXPECT_EQ(info.devices[1].reason, "");
}

// ---- CUDA fails ---------------------------------------------------------------------------------------------------------

TEST_F(CudaFailure, OpeningFailsAtAnyCallWithoutALeak) {
  auto counted = open_cuda_driver(0);
  const std::uint64_t calls = fake_cuda_calls(nullptr);
  counted.reset();
  ASSERT_GT(calls, 30U);
  for (const int code : {kInvalidValue, kOutOfMemory}) {
    for (std::uint64_t k = 1; k <= calls; ++k) {
      fake_cuda_reset();
      fake_cuda_fail(nullptr, k, code, 0);
      try {
        (void)open_cuda_driver(0);
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()), "");
      }
      EXPECT_EQ(fake_cuda_faults_fired(), 1U);
      auto alive = cuda::alive_on_fake();
      alive.back() = 0;  // a context that cannot be popped stays on the stack: there is no other way to take it off
      EXPECT_EQ(alive, cuda::nothing_alive()) << "call " << k << " of " << calls;
    }
  }
  fake_cuda_reset();
}

TEST_F(CudaFailure, OpeningSurvivesThatAllFailsFromAnyCallOn) {
  for (std::uint64_t k = 1; k <= 75; ++k) {
    fake_cuda_fail(nullptr, k, kInvalidValue, 1);
    try {
      (void)open_cuda_driver(0);
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()), "");
    }
    fake_cuda_reset();  // what could not be given back is still there
  }
}

/// Every verb with each of the calls it makes: the one that fails is named, and nothing has changed.
struct Failing {
  const char* entry;
  std::function<void(Driver&, Address, PageHandle mapped, PageHandle free)> verb;
};

TEST_F(CudaFailure, AVerbThatFailsNamesTheCallAndChangesNothing) {
  const std::vector<Failing> failing{
      {"cuMemGetInfo", [](Driver& d, Address, PageHandle, PageHandle) { (void)d.memory_info(); }},
      {"cuMemAddressReserve",
       [](Driver& d, Address, PageHandle, PageHandle) { (void)d.reserve(kPage, UnmappedReads::kFault); }},
      {"cuMemCreate", [](Driver& d, Address, PageHandle, PageHandle) { (void)d.create(kPage, 0); }},
      {"cuMemMap", [](Driver& d, Address at, PageHandle, PageHandle page) { d.map(at + kPage, kPage, page); }},
      {"cuMemSetAccess", [](Driver& d, Address at, PageHandle, PageHandle) { d.set_access(at, kPage); }},
      {"cuMemsetD8Async", [](Driver& d, Address at, PageHandle, PageHandle) { d.fill_zero(at, kPage); }},
      {"cuMemcpyDtoDAsync", [](Driver& d, Address at, PageHandle, PageHandle) { d.copy(at, at + 8, 8); }},
      {"cuCtxSynchronize", [](Driver& d, Address, PageHandle, PageHandle) { d.synchronize(); }},
      {"cuMemUnmap", [](Driver& d, Address at, PageHandle, PageHandle) { d.unmap(at, kPage); }},
      {"cuMemRelease", [](Driver& d, Address, PageHandle, PageHandle page) { d.release(page); }},
  };
  const auto driver = open_cuda_driver(0);
  const Address base = driver->reserve(2 * kPage, UnmappedReads::kFault);
  const Address empty = driver->reserve(kPage, UnmappedReads::kFault);
  const PageHandle mapped = driver->create(kPage, 0);
  const PageHandle free = driver->create(kPage, 0);
  driver->map(base, kPage, mapped);
  driver->set_access(base, kPage);
  const auto before = cuda::alive_on_fake();
  const auto expect_failure = [&](const char* entry, const std::function<void()>& verb) {
    for (const char* call : {entry, "cuCtxPushCurrent"}) {
      for (const int code : {kInvalidValue, int{cuda::CUDA_ERROR_ILLEGAL_ADDRESS}, 12345}) {
        fake_cuda_fail(call, 1, code, 0);
        const DriverError error = error_of(verb);
        EXPECT_EQ(error.call, call);
        EXPECT_EQ(error.code, code);
        EXPECT_NE(error.name, "");
        EXPECT_EQ(cuda::alive_on_fake(), before) << call;
        fake_cuda_clear_faults();
      }
      fake_cuda_fail(call, 1, kOutOfMemory, 0);
      EXPECT_THROW(verb(), OutOfMemoryError) << call;
      EXPECT_EQ(cuda::alive_on_fake(), before) << call;
      fake_cuda_clear_faults();
    }
  };
  for (const Failing& one : failing) expect_failure(one.entry, [&] { one.verb(*driver, base, mapped, free); });
  expect_failure("cuMemAddressFree", [&] { driver->release_range(empty, kPage); });
  // And all of it works once CUDA does.
  driver->map(base + kPage, kPage, free);
  driver->set_access(base + kPage, kPage);
  driver->copy(base, base + kPage, kPage);
  driver->unmap(base, 2 * kPage);
  driver->release(mapped);
  driver->release(free);
  driver->release_range(base, 2 * kPage);
  driver->release_range(empty, kPage);
}

TEST_F(CudaFailure, AFillThatCannotBeWaitedForIsReported) {
  const auto driver = open_cuda_driver(0);
  const Address base = driver->reserve(kPage, UnmappedReads::kFault);
  const PageHandle page = driver->create(kPage, 0);
  driver->map(base, kPage, page);
  driver->set_access(base, kPage);
  fake_cuda_fail("cuStreamSynchronize", 1, cuda::CUDA_ERROR_ILLEGAL_ADDRESS, 0);
  EXPECT_EQ(error_of([&] { driver->fill_zero(base, kPage); }).call, "cuStreamSynchronize");
  fake_cuda_clear_faults();
  driver->synchronize();
  driver->unmap(base, kPage);
  driver->release(page);
  driver->release_range(base, kPage);
}

TEST_F(CudaFailure, OutOfMemoryCarriesTheBytes) {
  fake_cuda_set_memory(3 * kPage);
  const auto driver = open_cuda_driver(0);
  const PageHandle first = driver->create(kPage, 0);
  const PageHandle second = driver->create(kPage, 0);
  try {
    (void)driver->create(2 * kPage, 0);
    ADD_FAILURE() << "there was no room";
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, 2 * kPage);
    EXPECT_EQ(error.available_bytes, kPage);
    EXPECT_EQ(error.limit_bytes, 3 * kPage);
    EXPECT_TRUE(contains(error.what(), "cuMemCreate")) << error.what();
  }
  EXPECT_EQ(driver->memory_info().available_bytes, kPage);
  driver->release(first);
  driver->release(driver->create(2 * kPage, 0));
  driver->release(second);
}

// ---- what is left when a driver goes ------------------------------------------------------------------------------------

/// Leaves two reservations, a mapping without a handle, one with, and a page, as a close that failed half way does.
void leave_a_mess(Driver& driver) {
  const Address base = driver.reserve(4 * kPage, UnmappedReads::kFault);
  (void)driver.reserve(kPage, UnmappedReads::kFault);
  const PageHandle released = driver.create(kPage, 0);
  driver.map(base, kPage, released);
  driver.set_access(base, kPage);
  driver.release(released);
  driver.map(base + 2 * kPage, kPage, driver.create(kPage, 0));
  (void)driver.create(kPage, 0);
  ASSERT_NE(fake_cuda_kernel_begin(base, kPage), 0U);
}

TEST_F(CudaFailure, TheDestructorGivesBackWhatIsLeftOnceTheDeviceIsIdle) {
  auto driver = open_cuda_driver(0);
  leave_a_mess(*driver);
  driver.reset();  // TearDown sees that nothing is left and no rule was broken, though a kernel was running
}

TEST_F(CudaFailure, TheDestructorNeverThrows) {
  for (const char* entry :
       {"cuCtxPushCurrent", "cuCtxSynchronize", "cuMemUnmap", "cuMemAddressFree", "cuMemRelease", "cuCtxPopCurrent",
        "cuStreamDestroy", "cuDevicePrimaryCtxRelease", static_cast<const char*>(nullptr)}) {
    auto driver = open_cuda_driver(0);
    leave_a_mess(*driver);
    fake_cuda_fail(entry, 1, cuda::CUDA_ERROR_DEINITIALIZED, 1);
    EXPECT_NO_THROW(driver.reset());
    EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
    fake_cuda_reset();
  }
}

}  // namespace
}  // namespace vattn
