// The CUDA driver in a forked child: CUDA does not survive fork(), so everything there is closed and nothing is called.
#include <sys/wait.h>
#include <unistd.h>

#include "child_process.hpp"
#include "cuda_driver_fixture.hpp"

namespace vattn {
namespace {

TEST_F(CudaDriverTest, AForkedChildGetsClosedErrorAndCallsNothing) {
  auto driver = open_cuda_driver(0);
  const std::size_t size = driver->traits().default_page_size;
  const Address base = driver->reserve(size, UnmappedReads::kFault);
  const PageHandle page = driver->create(size, 0);
  driver->map(base, size, page);
  driver->set_access(base, size);
  const FenceHandle fence = driver->record(0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto closed = [](const std::function<void()>& call) {
      try {
        call();
      } catch (const ClosedError&) {
        return true;
      } catch (...) {
      }
      return false;
    };
    bool good = closed([&] { (void)driver->reserve(size, UnmappedReads::kFault); });
    good = good && closed([&] { driver->release_range(base, size); });
    good = good && closed([&] { (void)driver->create(size, 0); });
    good = good && closed([&] { driver->release(page); });
    good = good && closed([&] { driver->map(base, size, page); });
    good = good && closed([&] { driver->unmap(base, size); });
    good = good && closed([&] { driver->set_access(base, size); });
    good = good && closed([&] { driver->fill_zero(base, size); });
    good = good && closed([&] { driver->copy(base, base + 1, 1); });
    good = good && closed([&] { driver->synchronize(); });
    good = good && closed([&] { (void)driver->memory_info(); });
    good = good && closed([&] { (void)driver->record(0); });
    good = good && closed([&] { (void)driver->has_passed(fence); });
    good = good && closed([&] { driver->wait(fence); });
    good = good && closed([&] { driver->wait_on(0, fence); });
    good = good && closed([&] { (void)driver->is_capturing(0); });
    driver->drop(fence);
    good = good && driver->home(base) == 0;
    driver.reset();
    if (cuda::on_fake()) good = good && fake_cuda_violations() == 0;
    leave(good);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  driver->fill_zero(base, size);  // the parent is unharmed
  driver->wait(fence);
  driver->drop(fence);
  driver->unmap(base, size);
  driver->release(page);
  driver->release_range(base, size);
}

TEST_F(CudaDriverTest, AForkedChildThatOpensCudaIsToldWhy) {
  FAKE_ONLY();
  const auto driver = open_cuda_driver(0);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const std::string message = message_of([] { (void)open_cuda_driver(0); });
    leave(contains(message, "CUDA_ERROR_NOT_INITIALIZED") && contains(message, "spawn"));
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace vattn
