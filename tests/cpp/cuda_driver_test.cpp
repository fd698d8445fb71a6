// What the CUDA driver does beyond the contract: opening, contexts, streams, waiting. Over the fake library by default; with
// VATTN_TEST_GPU=1 over a GPU, where the tests that look inside the fake are skipped.
#include <thread>

#include "cuda_driver_fixture.hpp"

namespace vattn {
namespace {

using cuda::table;

// ---- opening ------------------------------------------------------------------------------------------------------------

TEST_F(CudaDriverTest, HasTheTraitsOfItsDevice) {
  const auto driver = open_cuda_driver(0);
  const DriverTraits& traits = driver->traits();
  EXPECT_STREQ(traits.name, "cuda");
  EXPECT_GE(traits.default_page_size, std::size_t{2} << 20);
  EXPECT_TRUE(traits.has_memory);
  EXPECT_TRUE(traits.has_streams);
  EXPECT_FALSE(traits.reads_as_zeros);
  EXPECT_FALSE(traits.fresh_pages_are_zero);
  EXPECT_EQ(traits.mapping_limit, 0U);
  EXPECT_EQ(traits.tensor_device, cuda::on_fake() ? TensorDevice::kCpu : TensorDevice::kCuda);
}

TEST_F(CudaDriverTest, AsksForTheGranularity) {
  FAKE_ONLY();
  fake_cuda_set_granularity(64 << 10, 2 << 20);
  EXPECT_EQ(open_cuda_driver(0)->traits().granularity, std::size_t{64} << 10);
  EXPECT_EQ(open_cuda_driver(0)->traits().default_page_size, std::size_t{2} << 20);
  fake_cuda_set_granularity(16 << 20, 16 << 20);
  EXPECT_EQ(open_cuda_driver(0)->traits().granularity, std::size_t{16} << 20);
  EXPECT_EQ(open_cuda_driver(0)->traits().default_page_size, std::size_t{16} << 20);
}

TEST_F(CudaDriverTest, ReservationsAreOnTheGranularityWhateverTheDefaultAlignmentIs) {
  FAKE_ONLY();
  fake_cuda_set_default_alignment(4096);
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  EXPECT_EQ(page.base % driver->traits().granularity, 0U);
}

TEST_F(CudaDriverTest, RefusesADeviceThatIsNotThere) {
  const int count = cuda_device_count();
  ASSERT_GT(count, 0);
  EXPECT_THROW((void)open_cuda_driver(count), std::invalid_argument);
  EXPECT_THROW((void)open_cuda_driver(-1), std::invalid_argument);
  EXPECT_TRUE(contains(message_of([] { (void)open_cuda_driver(-1); }), "-1"));
  const std::string message = message_of([] { (void)open_cuda_driver(99); });
  EXPECT_TRUE(contains(message, "99") && contains(message, std::to_string(count))) << message;
}

TEST_F(CudaDriverTest, ProbingFindsTheDevicesAndMakesNoContext) {
  const CudaInfo info = probe_cuda();
  EXPECT_EQ(info.reason, "");
  EXPECT_GE(info.driver_version, 11030);
  ASSERT_EQ(info.devices.size(), static_cast<std::size_t>(cuda_device_count()));
  for (const CudaDeviceInfo& device : info.devices) {
    EXPECT_NE(device.name, "");
    EXPECT_GT(device.total_bytes, 0U);
    EXPECT_GT(device.granularity, 0U) << device.reason;
  }
  if (cuda::on_fake()) {
    EXPECT_EQ(fake_cuda_calls("cuDevicePrimaryCtxRetain"), 0U);
  }
}

TEST_F(CudaDriverTest, DevicesAreApart) {
  FAKE_ONLY();
  const auto first = open_cuda_driver(0);
  const auto second = open_cuda_driver(1);
  const std::uint64_t before = first->memory_info().available_bytes;
  const OnePage page(*second);
  EXPECT_EQ(first->memory_info().available_bytes, before);
  EXPECT_EQ(second->memory_info().available_bytes, before - page.size);
}

// ---- contexts and streams -----------------------------------------------------------------------------------------------

TEST_F(CudaDriverTest, RestoresTheCallersContext) {
  const int others = cuda_device_count() - 1;  // another device's, where there is one
  const auto driver = open_cuda_driver(0);
  const cuda::InContext current(others);
  cuda::CUcontext before = nullptr;
  table().cuCtxGetCurrent(&before);
  const auto expect_restored = [&](const char* verb) {
    cuda::CUcontext after = nullptr;
    table().cuCtxGetCurrent(&after);
    EXPECT_EQ(after, before) << verb;
    if (cuda::on_fake()) {
      EXPECT_EQ(fake_cuda_context_depth(), 1) << verb;
    }
  };
  {
    const OnePage page(*driver);
    expect_restored("reserve, create, map, set_access");
    driver->fill_zero(page.base, page.size);
    driver->copy(page.base, page.base + page.size / 2, page.size / 2);
    driver->synchronize();
    (void)driver->memory_info();
    expect_restored("fill_zero, copy, synchronize, memory_info");
    EXPECT_THROW(driver->map(page.base, page.size, page.page), std::invalid_argument);
    EXPECT_THROW((void)driver->create(std::size_t{1} << 50, 0), OutOfMemoryError);
    expect_restored("a verb that failed");
  }
  expect_restored("unmap, release, release_range");
}

TEST_F(CudaDriverTest, NeedsNoCurrentContext) {
  const auto driver = open_cuda_driver(0);
  std::thread([&] {
    const OnePage page(*driver);
    driver->fill_zero(page.base, page.size);
    cuda::CUcontext current = nullptr;
    table().cuCtxGetCurrent(&current);
    EXPECT_EQ(current, nullptr);
  }).join();
}

TEST_F(CudaDriverTest, FillsAndCopiesOnAStreamOfItsOwnAndWaitsForIt) {
  FAKE_ONLY();
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  driver->fill_zero(page.base, page.size);
  driver->copy(page.base, page.base + page.size / 2, page.size / 2);
  fake_cuda_counts counts;
  fake_cuda_count(&counts);
  EXPECT_EQ(counts.null_stream_work, 0U);
  EXPECT_EQ(counts.work, 0U);
  EXPECT_EQ(counts.streams, 1U);
}

TEST_F(CudaDriverTest, ADriverThatGoesTakesItsStreamAlong) {
  FAKE_ONLY();
  const auto stays = open_cuda_driver(0);
  const auto before = cuda::alive_on_fake();
  (void)open_cuda_driver(0);
  EXPECT_EQ(cuda::alive_on_fake(), before);
}

TEST_F(CudaDriverTest, RefusesToTouchMemoryThatHasNoAccess) {
  const auto driver = open_cuda_driver(0);
  const std::size_t size = driver->traits().default_page_size;
  const OnePage good(*driver);
  const Address base = driver->reserve(2 * size, UnmappedReads::kFault);
  const PageHandle page = driver->create(size, 0);
  driver->map(base, size, good.page);
  driver->set_access(base, size);
  driver->map(base + size, size, page);
  // On a GPU the call would go through and the context be lost.
  EXPECT_THROW(driver->fill_zero(base + size, size), std::invalid_argument);
  EXPECT_THROW(driver->fill_zero(base + size - 1, 2), std::invalid_argument);
  EXPECT_THROW(driver->fill_zero(base + size + 5, 1), std::invalid_argument);
  EXPECT_THROW(driver->copy(good.base, base + size, size), std::invalid_argument);
  EXPECT_THROW(driver->copy(base + size, good.base, size), std::invalid_argument);
  driver->fill_zero(base, size);
  driver->set_access(base + size, size);
  driver->fill_zero(base, 2 * size);
  driver->unmap(base, 2 * size);
  driver->release(page);
  driver->release_range(base, 2 * size);
}

TEST_F(CudaDriverTest, CopyRefusesOverlap) {
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  EXPECT_THROW(driver->copy(page.base, page.base, 1), std::invalid_argument);
  EXPECT_THROW(driver->copy(page.base + 4, page.base, 5), std::invalid_argument);
  EXPECT_THROW(driver->copy(page.base, page.base + 4, 5), std::invalid_argument);
  driver->copy(page.base + 4, page.base, 4);
}

TEST_F(CudaDriverTest, SetAccessTakesWholeMappings) {
  const auto driver = open_cuda_driver(0);
  const std::size_t size = driver->traits().granularity;
  const Address base = driver->reserve(2 * size, UnmappedReads::kFault);
  const PageHandle page = driver->create(2 * size, 0);
  driver->map(base, 2 * size, page);
  EXPECT_THROW(driver->set_access(base, size), std::invalid_argument);
  EXPECT_THROW(driver->set_access(base + size, size), std::invalid_argument);
  driver->set_access(base, 2 * size);
  driver->unmap(base, 2 * size);
  driver->release(page);
  driver->release_range(base, 2 * size);
}

// ---- waiting ------------------------------------------------------------------------------------------------------------

TEST_F(CudaDriverTest, SynchronizeWaitsForTheDeviceThatOwnsThePages) {
  FAKE_ONLY();
  const auto driver = open_cuda_driver(0);
  const auto other = open_cuda_driver(1);
  const OnePage page(*driver);
  const OnePage others(*other);
  const std::uint64_t kernel = fake_cuda_kernel_begin(page.base, page.size);
  const std::uint64_t elsewhere = fake_cuda_kernel_begin(others.base, others.size);
  const cuda::InContext current(1);  // the caller's device is the other one
  driver->synchronize();
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 0) << "still running";
  EXPECT_EQ(fake_cuda_kernel_end(elsewhere), 1) << "nobody's to wait for";
}

TEST_F(CudaDriverTest, UnmapDoesNotWaitForKernels) {
  FAKE_ONLY();
  const auto driver = open_cuda_driver(0);
  const OnePage page(*driver);
  ASSERT_NE(fake_cuda_kernel_begin(page.base, page.size), 0U);
  EXPECT_THROW(driver->unmap(page.base, page.size), DriverError);
  expected_violations_ = 1;  // that is what the fake is for: on a GPU the kernel would fault
  driver->synchronize();
}

}  // namespace
}  // namespace vattn
