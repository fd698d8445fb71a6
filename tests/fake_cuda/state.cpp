// The state's start, its reset, and the opening of every entry point.
#include "state.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

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
  reservations.clear();
  mappings.clear();
  allocations.clear();
  streams.clear();
  work.clear();
  calls.clear();
  violations.clear();
  faults = Faults();
  settings = default_settings();
  null_stream_work = 0;
  initialised_in = 0;  // the numbers of handles and work go on: an old one is never a new one
  context_stack().clear();
}

Entry::Entry(const char* name, Needs needs) : state_(state()), lock_(state_.mutex), refusal_(check(name, needs)) {}

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
  return device_->context_references != 0 ? CUDA_SUCCESS : CUDA_ERROR_CONTEXT_IS_DESTROYED;
}

}  // namespace fake_cuda
