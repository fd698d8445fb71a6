// The state's start, its reset, and the opening of every entry point.
#include "state.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <thread>

#include "work.hpp"

namespace fake_cuda {
namespace {

/// A whole positive number from the environment, or `otherwise`.
std::uint64_t number(const char* variable, std::uint64_t otherwise, bool may_be_zero = false) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text < '0' || *text > '9') return otherwise;
  char* end = nullptr;
  const std::uint64_t value = std::strtoull(text, &end, 10);
  return *end == '\0' && (value != 0 || may_be_zero) ? value : otherwise;
}

Settings default_settings() {
  Settings settings;
  const std::uint64_t devices = number("VATTN_FAKE_CUDA_DEVICES", 2, true);
  if (devices <= kMaxDevices) settings.devices = static_cast<int>(devices);
  settings.memory = number("VATTN_FAKE_CUDA_MEMORY", settings.memory);
  const std::uint64_t granularity = number("VATTN_FAKE_CUDA_GRANULARITY", settings.granularity);
  if (granularity >= kHostPage && (granularity & (granularity - 1)) == 0) {
    settings.granularity = settings.recommended = granularity;
  }
  return settings;
}

}  // namespace

State& state() {
  static auto* made = [] {
    auto* fresh = new State;
    // A child forked while another thread was in a call would find the mutex locked for ever.
    ::pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); }, [] { state().mutex.unlock(); });
    return fresh;
  }();
  return *made;
}

std::vector<Device*>& context_stack() {
  thread_local std::vector<Device*> stack;
  return stack;
}

CUstreamCaptureMode& capture_mode() {
  thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  return mode;
}

State::State() : settings(default_settings()) {
  for (int ordinal = 0; ordinal < kMaxDevices; ++ordinal) devices[static_cast<std::size_t>(ordinal)].ordinal = ordinal;
}

void State::reset() {
  for (const auto& [base, size] : reservations) ::munmap(reinterpret_cast<void*>(base), size);
  for (Device& device : devices) {
    if (device.file >= 0) ::close(device.file);
    device = Device{device.ordinal};
  }
  for (StreamState* stream : streams) delete stream;
  for (EventState* event : events) delete event;
  reservations.clear();
  mappings.clear();
  allocations.clear();
  streams.clear();
  events.clear();
  work.clear();
  changed.notify_all();  // whoever waited for that work
  calls.clear();
  violations.clear();
  faults = Faults();
  settings = default_settings();
  null_stream_work = 0;
  initialised_in = 0;  // the numbers of handles and work go on: an old one is never a new one
  context_stack().clear();
  capture_mode() = CU_STREAM_CAPTURE_MODE_GLOBAL;
}

/// Lets the time of a call pass. Short times are spun away: a sleep takes tens of microseconds more than it is asked for.
void pass(std::chrono::nanoseconds time) {
  constexpr std::chrono::microseconds kSpun{100};
  const Clock::time_point end = Clock::now() + time;
  if (time > kSpun) std::this_thread::sleep_for(time - kSpun);
  while (Clock::now() < end) {
  }
}

Entry::Entry(const char* name, Needs needs) : state_(state()), lock_(state_.mutex) {
  const auto own = state_.settings.latency.find(name);
  const auto latency = own != state_.settings.latency.end() ? own->second : state_.settings.latency_of_all;
  if (latency.count() > 0) {
    lock_.unlock();
    pass(latency);
    lock_.lock();
  }
  advance(state_);
  refusal_ = check(name, needs);
}

CUresult Entry::check(const char* name, Needs needs) {
  ++state_.calls[name];
  if (const CUresult injected = state_.faults.strike(name); injected != CUDA_SUCCESS) return injected;
  if (needs == Needs::kNothing) return CUDA_SUCCESS;
  if (state_.initialised_in == 0) return CUDA_ERROR_NOT_INITIALIZED;
  if (state_.initialised_in != ::getpid()) {
    state_.violate(std::string(name) + " in a forked child");
    return CUDA_ERROR_NOT_INITIALIZED;
  }
  if (needs == Needs::kInit) return CUDA_SUCCESS;
  const auto& stack = context_stack();
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  device_ = stack.back();
  if (device_->context_references == 0) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  const bool is_relaxed = capture_mode() == CU_STREAM_CAPTURE_MODE_RELAXED;
  if (needs == Needs::kContext || (needs == Needs::kRelaxed && is_relaxed) || !is_any_captured(state_)) return CUDA_SUCCESS;
  state_.violate(std::string(name) + " while a stream is being captured");
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

}  // namespace fake_cuda
