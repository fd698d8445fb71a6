// The fake CUDA library's streams and events: what comes after what, by name, by time and across streams; captures; latency.
#include <atomic>
#include <chrono>
#include <functional>
#include <iterator>
#include <thread>

#include "fake_cuda_fixture.hpp"

namespace vattn::cuda {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr std::int64_t kUntilEnded = -1;

class FakeCudaStream : public FakeCuda {
 protected:
  void SetUp() override {
    FakeCuda::SetUp();
    if (IsSkipped()) return;
    base_ = reserve(2 * kPage);
    place(base_);
    place(base_ + kPage);
  }

  CUstream make_stream(unsigned flags = CU_STREAM_NON_BLOCKING) {
    CUstream stream = nullptr;
    EXPECT_EQ(cu.cuStreamCreate(&stream, flags), CUDA_SUCCESS);
    return stream;
  }
  CUevent record(CUstream stream) {
    CUevent event = nullptr;
    EXPECT_EQ(cu.cuEventCreate(&event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC), CUDA_SUCCESS);
    EXPECT_EQ(cu.cuEventRecord(event, stream), CUDA_SUCCESS);
    return event;
  }
  std::uint64_t kernel_on(CUstream stream, std::int64_t duration_us = kUntilEnded) {
    const std::uint64_t kernel = fake_cuda_kernel_begin_on(reinterpret_cast<std::uint64_t>(stream), base_, 64, duration_us);
    EXPECT_NE(kernel, 0U);
    return kernel;
  }

  CUdeviceptr base_ = 0;
};

// ---- order --------------------------------------------------------------------------------------------------------------

TEST_F(FakeCudaStream, WorkOfOneStreamRunsInItsOrder) {
  const CUstream stream = make_stream();
  const CUevent before = record(stream);
  const std::uint64_t first = kernel_on(stream);
  const CUevent middle = record(stream);
  const std::uint64_t second = kernel_on(stream);
  kernel_on(stream, 0);
  const CUevent last = record(stream);
  EXPECT_EQ(cu.cuEventQuery(before), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuEventQuery(middle), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(fake_cuda_kernel_end(second), 1) << "it has not even started: over as soon as it could start";
  EXPECT_EQ(cu.cuEventQuery(last), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(alive().work, 3U);
  EXPECT_EQ(fake_cuda_kernel_end(first), 1);
  EXPECT_EQ(cu.cuEventQuery(middle), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuEventQuery(last), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_kernel_end(second), 0);
  EXPECT_EQ(alive().work, 0U);
}

TEST_F(FakeCudaStream, StreamsDoNotWaitForEachOtherUnlessTold) {
  const CUstream one = make_stream();
  const CUstream other = make_stream();
  const std::uint64_t kernel = kernel_on(one);
  const CUevent event = record(one);
  kernel_on(other, 0);
  EXPECT_EQ(cu.cuEventQuery(record(other)), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuStreamSynchronize(other), CUDA_SUCCESS);
  ASSERT_EQ(cu.cuStreamWaitEvent(other, event, 0), CUDA_SUCCESS);
  ASSERT_EQ(cu.cuEventRecord(event, other), CUDA_SUCCESS);  // what the stream waits for was fixed when it was told
  kernel_on(other, 0);
  const CUevent behind = record(other);
  EXPECT_EQ(cu.cuEventQuery(behind), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  EXPECT_EQ(cu.cuEventQuery(behind), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_SUCCESS);
}

TEST_F(FakeCudaStream, TheNullStreamWaitsForBlockingStreamsAndTheyForIt) {
  const CUstream blocking = make_stream(0);
  const CUstream apart = make_stream();
  const std::uint64_t first = kernel_on(blocking);
  const std::uint64_t separate = kernel_on(apart);
  const CUevent null_event = record(nullptr);
  EXPECT_EQ(cu.cuEventQuery(null_event), CUDA_ERROR_NOT_READY);
  const std::uint64_t second = kernel_on(nullptr);
  const CUstream another = make_stream(0);
  const CUevent behind = record(another);
  EXPECT_EQ(fake_cuda_kernel_end(first), 1);
  EXPECT_EQ(cu.cuEventQuery(null_event), CUDA_SUCCESS) << "the non-blocking stream is not its affair";
  EXPECT_EQ(cu.cuEventQuery(behind), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(fake_cuda_kernel_end(second), 1);
  EXPECT_EQ(cu.cuEventQuery(behind), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_kernel_end(separate), 1);
}

TEST_F(FakeCudaStream, AFillBehindAKernelHappensAfterIt) {
  const CUstream stream = make_stream();
  const std::uint64_t kernel = kernel_on(stream);
  ASSERT_EQ(cu.cuMemsetD8Async(base_, 7, 64, stream), CUDA_SUCCESS);
  const CUevent event = record(stream);
  std::thread ends([&] {
    std::this_thread::sleep_for(milliseconds(10));
    EXPECT_EQ(pointer(base_)[0], 0xFF);
    EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  });
  EXPECT_EQ(cu.cuEventSynchronize(event), CUDA_SUCCESS);
  ends.join();
  EXPECT_EQ(pointer(base_)[0], 7);
}

TEST_F(FakeCudaStream, UnmappingUnderAKernelThatIsStillToRunIsAViolation) {
  const CUstream stream = make_stream();
  const std::uint64_t running = fake_cuda_kernel_begin_on(reinterpret_cast<std::uint64_t>(stream), base_ + kPage, 1, -1);
  kernel_on(stream, 0);
  EXPECT_EQ(cu.cuMemUnmap(base_, kPage), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(fake_cuda_violations(), 1U);
  EXPECT_EQ(fake_cuda_kernel_end(running), 1);
  EXPECT_EQ(cu.cuMemUnmap(base_, kPage), CUDA_SUCCESS);
}

// ---- time ---------------------------------------------------------------------------------------------------------------

TEST_F(FakeCudaStream, KernelsTakeTheirTimeOneAfterTheOther) {
  const CUstream one = make_stream();
  const CUstream other = make_stream();
  const auto begun = Clock::now();
  kernel_on(one, 20'000);
  kernel_on(one, 20'000);
  kernel_on(other, 20'000);
  const CUevent first = record(other);
  EXPECT_EQ(cu.cuEventQuery(first), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(cu.cuEventSynchronize(first), CUDA_SUCCESS);
  EXPECT_GE(Clock::now() - begun, milliseconds(20));
  EXPECT_EQ(cu.cuStreamSynchronize(one), CUDA_SUCCESS);
  EXPECT_GE(Clock::now() - begun, milliseconds(40));
  EXPECT_EQ(alive().work, 0U);
}

TEST_F(FakeCudaStream, AKernelIsOverWhenItsTimeIsWhetherOrNotAnybodyWaits) {
  const CUstream stream = make_stream();
  kernel_on(stream, 1000);
  const CUevent event = record(stream);
  std::this_thread::sleep_for(milliseconds(2));
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_SUCCESS);
  kernel_on(stream, 3'600'000'000);
  EXPECT_EQ(cu.cuMemUnmap(base_, kPage), CUDA_ERROR_ILLEGAL_ADDRESS);
}

TEST_F(FakeCudaStream, TheContextWaitsForAllStreamsOfItsDevice) {
  const CUstream stream = make_stream();
  const std::uint64_t kernel = kernel_on(stream);
  std::atomic<bool> ended{false};
  std::thread ends([&] {
    std::this_thread::sleep_for(milliseconds(10));
    ended = true;
    EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  });
  {
    const InContext elsewhere(1);
    EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_SUCCESS);
  }
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_TRUE(ended.load());
  ends.join();
}

TEST_F(FakeCudaStream, ResetEndsAllWaiting) {
  kernel_on(nullptr);
  std::thread waits([&] {
    EXPECT_EQ(cu.cuCtxPushCurrent(context_), CUDA_SUCCESS);
    EXPECT_EQ(cu.cuStreamSynchronize(nullptr), CUDA_SUCCESS);
  });
  while (fake_cuda_calls("cuStreamSynchronize") == 0) std::this_thread::yield();
  fake_cuda_reset();
  waits.join();
}

// ---- streams and events as things ---------------------------------------------------------------------------------------

TEST_F(FakeCudaStream, AnEventThatWasNeverRecordedHasPassed) {
  CUevent event = nullptr;
  EXPECT_EQ(cu.cuEventCreate(&event, 64), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(cu.cuEventCreate(&event, 0), CUDA_SUCCESS);
  EXPECT_EQ(alive().events, 1U);
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuEventSynchronize(event), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuEventDestroy(event), CUDA_SUCCESS);
  EXPECT_EQ(alive().events, 0U);
  EXPECT_EQ(cu.cuEventDestroy(event), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(cu.cuEventRecord(event, nullptr), CUDA_ERROR_INVALID_HANDLE);
}

TEST_F(FakeCudaStream, AnEventIsRecordedOnStreamsOfItsOwnDevice) {
  const auto foreign = reinterpret_cast<CUstream>(fake_cuda_stream_create(1));
  const CUevent event = record(nullptr);
  EXPECT_EQ(cu.cuEventRecord(event, foreign), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(cu.cuStreamWaitEvent(foreign, event, 0), CUDA_SUCCESS) << "and awaited on any";
  EXPECT_EQ(cu.cuStreamWaitEvent(foreign, event, 1), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(FakeCudaStream, StreamsOfATestNeedNoContextAndOutliveThem) {
  fake_cuda_reset();
  const std::uint64_t stream = fake_cuda_stream_create(0);
  ASSERT_NE(stream, 0U);
  EXPECT_EQ(fake_cuda_stream_create(2), 0U);
  EXPECT_EQ(alive().streams, 0U) << "not the program's";
  {
    const InContext current;
    EXPECT_EQ(cu.cuStreamSynchronize(reinterpret_cast<CUstream>(stream)), CUDA_SUCCESS);
  }
  const InContext current;
  EXPECT_EQ(cu.cuStreamSynchronize(reinterpret_cast<CUstream>(stream)), CUDA_SUCCESS);
  fake_cuda_stream_destroy(stream);
  EXPECT_EQ(cu.cuStreamSynchronize(reinterpret_cast<CUstream>(stream)), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_EQ(fake_cuda_kernel_begin_on(stream, base_, 1, 0), 0U);
  EXPECT_EQ(fake_cuda_violations(), 1U);
}

TEST_F(FakeCudaStream, WorkOfADestroyedStreamGoesOn) {
  const CUstream stream = make_stream();
  const std::uint64_t kernel = kernel_on(stream);
  const CUevent event = record(stream);
  EXPECT_EQ(cu.cuStreamDestroy(stream), CUDA_SUCCESS);
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(fake_cuda_kernel_end(kernel), 1);
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_SUCCESS);
}

// ---- capture and latency ------------------------------------------------------------------------------------------------

TEST_F(FakeCudaStream, ChangingMemoryDuringACaptureIsAViolation) {
  const CUstream stream = make_stream();
  auto status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
  EXPECT_EQ(cu.cuStreamIsCapturing(stream, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_NONE);
  fake_cuda_set_capturing(reinterpret_cast<std::uint64_t>(stream), 1);
  EXPECT_EQ(cu.cuStreamIsCapturing(stream, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
  EXPECT_EQ(cu.cuStreamIsCapturing(nullptr, &status), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  CUmemGenericAllocationHandle handle = 0;
  const auto properties = on_device(0);
  EXPECT_EQ(cu.cuMemCreate(&handle, kPage, &properties, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuMemMap(base_, kPage, 0, 1, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuMemUnmap(base_, kPage), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(allow(base_, kPage), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(fake_cuda_violations(), 5U);
  fake_cuda_set_capturing(reinterpret_cast<std::uint64_t>(stream), 0);
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_SUCCESS);
  fake_cuda_set_capturing(0, 1);
  EXPECT_EQ(cu.cuStreamIsCapturing(nullptr, &status), CUDA_SUCCESS);
  EXPECT_EQ(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
}

TEST_F(FakeCudaStream, OnlyARelaxedThreadMayDoMoreThanAskDuringACapture) {
  const CUstream other = make_stream();
  const CUevent event = record(other);
  const CUdeviceptr free = reserve(kPage);
  const CUstream captured = make_stream();
  fake_cuda_set_capturing(reinterpret_cast<std::uint64_t>(captured), 1);
  const auto properties = on_device(0);
  CUmemGenericAllocationHandle page = 0;
  CUdeviceptr reserved = 0;
  const std::function<CUresult()> calls[] = {
      [&] { return cu.cuMemAddressReserve(&reserved, kPage, kPage, 0, 0); },
      [&] { return cu.cuMemAddressFree(reserved, kPage); },
      [&] { return cu.cuMemCreate(&page, kPage, &properties, 0); },
      [&] { return cu.cuMemMap(free, kPage, 0, page, 0); },
      [&] { return allow(free, kPage); },
      [&] { return cu.cuMemUnmap(free, kPage); },
      [&] { return cu.cuMemRelease(page); },
      [&] { return cu.cuEventRecord(event, other); },
      [&] { return cu.cuEventQuery(event); },
      [&] { return cu.cuEventSynchronize(event); },
      [&] { return cu.cuStreamSynchronize(other); },
  };
  std::uint64_t violations = 0;
  const auto expect_all = [&](CUresult expected) {
    for (const auto& call : calls) EXPECT_EQ(call(), expected);
    violations += expected != CUDA_SUCCESS ? std::size(calls) : 0;
    EXPECT_EQ(fake_cuda_violations(), violations);
  };
  expect_all(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  auto mode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
  ASSERT_EQ(cu.cuThreadExchangeStreamCaptureMode(&mode), CUDA_SUCCESS);
  EXPECT_EQ(mode, CU_STREAM_CAPTURE_MODE_GLOBAL);
  expect_all(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ASSERT_EQ(cu.cuThreadExchangeStreamCaptureMode(&mode), CUDA_SUCCESS);
  EXPECT_EQ(mode, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
  expect_all(CUDA_SUCCESS);
  EXPECT_EQ(cu.cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(fake_cuda_violations(), violations + 1);
  std::thread([] { EXPECT_EQ(fake_cuda_capture_mode(), CU_STREAM_CAPTURE_MODE_GLOBAL); }).join();
}

TEST_F(FakeCudaStream, ACapturedStreamMayOnlyBeAskedWhetherItIs) {
  const CUstream captured = make_stream();
  const CUevent event = record(captured);
  auto mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  ASSERT_EQ(cu.cuThreadExchangeStreamCaptureMode(&mode), CUDA_SUCCESS);
  fake_cuda_set_capturing(reinterpret_cast<std::uint64_t>(captured), 1);
  EXPECT_EQ(cu.cuEventRecord(event, captured), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuStreamWaitEvent(captured, event, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuStreamSynchronize(captured), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuMemsetD8Async(base_, 0, 8, captured), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuMemcpyDtoDAsync(base_, base_ + 8, 8, captured), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuStreamDestroy(captured), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(fake_cuda_violations(), 6U);
  unsigned char byte = 0;
  fake_cuda_set_capturing(0, 1);
  EXPECT_EQ(cu.cuMemcpyHtoD(base_, &byte, 1), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cu.cuMemcpyDtoH(&byte, base_, 1), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(fake_cuda_violations(), 8U);
  kernel_on(captured, 0);
  EXPECT_EQ(cu.cuEventQuery(event), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_violations(), 8U);
}

TEST_F(FakeCudaStream, AThreadsCaptureModeIsOneOfThree) {
  EXPECT_EQ(cu.cuThreadExchangeStreamCaptureMode(nullptr), CUDA_ERROR_INVALID_VALUE);
  auto mode = static_cast<CUstreamCaptureMode>(3);
  EXPECT_EQ(cu.cuThreadExchangeStreamCaptureMode(&mode), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(fake_cuda_capture_mode(), CU_STREAM_CAPTURE_MODE_GLOBAL);
  mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  EXPECT_EQ(cu.cuThreadExchangeStreamCaptureMode(&mode), CUDA_SUCCESS);
  EXPECT_EQ(fake_cuda_capture_mode(), CU_STREAM_CAPTURE_MODE_RELAXED);
  fake_cuda_reset();
  EXPECT_EQ(fake_cuda_capture_mode(), CU_STREAM_CAPTURE_MODE_GLOBAL);
}

TEST_F(FakeCudaStream, CallsTakeTheTimeTheyAreGiven) {
  const auto time_of_a_call = [&] {
    const auto begun = Clock::now();
    EXPECT_EQ(allow(base_, kPage), CUDA_SUCCESS);
    return Clock::now() - begun;
  };
  fake_cuda_set_latency("cuMemSetAccess", 5'000'000);
  fake_cuda_set_latency("cuMemUnmap", 60'000'000'000);
  EXPECT_GE(time_of_a_call(), milliseconds(5));
  fake_cuda_set_latency("cuMemSetAccess", 20'000);
  EXPECT_GE(time_of_a_call(), std::chrono::microseconds(20));
  fake_cuda_set_latency(nullptr, 3'000'000);
  EXPECT_GE(time_of_a_call(), milliseconds(3));
  fake_cuda_set_latency(nullptr, 0);
  EXPECT_EQ(cu.cuMemUnmap(base_, kPage), CUDA_SUCCESS) << "at once, or the test takes a minute";
}

TEST_F(FakeCudaStream, OtherThreadsGoOnDuringASlowCall) {
  fake_cuda_set_latency("cuMemUnmap", 200'000'000);
  std::thread slow([&] {
    EXPECT_EQ(cu.cuCtxPushCurrent(context_), CUDA_SUCCESS);
    EXPECT_EQ(cu.cuMemUnmap(base_, kPage), CUDA_SUCCESS);
  });
  std::this_thread::sleep_for(milliseconds(10));
  EXPECT_EQ(allow(base_, 2 * kPage), CUDA_SUCCESS) << "the slow call has changed nothing yet";
  slow.join();
  EXPECT_EQ(alive().mappings, 1U);
}

}  // namespace
}  // namespace vattn::cuda
