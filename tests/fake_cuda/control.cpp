// The functions of fake_cuda.h: each takes the mutex and does one thing to the state.
#include <algorithm>
#include <cstring>
#include <mutex>

#include "address_space.hpp"
#include "fake_cuda.h"
#include "state.hpp"
#include "work.hpp"

namespace {

using fake_cuda::State;

/// The state, locked for the scope.
struct Locked {
  State& state = fake_cuda::state();
  std::lock_guard<std::mutex> lock{state.mutex};
  State* operator->() const { return &state; }
  Locked() { fake_cuda::advance(state); }
};

bool is_granularity(std::uint64_t value) { return value >= fake_cuda::kHostPage && (value & (value - 1)) == 0; }

/// Whether every byte is mapped with full access for the device; -1: for the one that owns the first page, and which that is.
bool can_run(State& state, std::uint64_t address, std::uint64_t size, int& device) {
  const auto mappings = fake_cuda::covering(state, address, size);
  if (mappings.empty()) return false;
  if (device < 0) device = state.allocations.find(mappings.front()->second.handle)->second.device;
  return std::all_of(mappings.begin(), mappings.end(), [&](const auto& mapping) {
    return mapping->second.access[static_cast<std::size_t>(device)] == vattn::cuda::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  });
}

}  // namespace

extern "C" {

void fake_cuda_reset(void) { Locked()->reset(); }

void fake_cuda_set_devices(int count) { Locked()->settings.devices = std::clamp(count, 0, fake_cuda::kMaxDevices); }
void fake_cuda_set_memory(uint64_t bytes_per_device) { Locked()->settings.memory = bytes_per_device; }
void fake_cuda_set_granularity(uint64_t minimum, uint64_t recommended) {
  const Locked locked;
  if (!is_granularity(minimum) || !is_granularity(recommended)) return;
  locked->settings.granularity = minimum;
  locked->settings.recommended = recommended;
}
void fake_cuda_set_default_alignment(uint64_t bytes) {
  const Locked locked;
  if (bytes == 0 || is_granularity(bytes)) locked->settings.default_alignment = bytes;
}
void fake_cuda_set_fill(int byte) { Locked()->settings.fill = byte; }
void fake_cuda_set_vmm(int supported) { Locked()->settings.vmm = supported != 0; }
void fake_cuda_set_latency(const char* entry, uint64_t nanoseconds) {
  const Locked locked;
  const std::chrono::nanoseconds latency(nanoseconds);
  if (entry == nullptr) {
    locked->settings.latency.clear();
    locked->settings.latency_of_all = latency;
  } else {
    locked->settings.latency[entry] = latency;
  }
}
void fake_cuda_hide(const char* entry) {
  const Locked locked;
  if (entry == nullptr) {
    locked->settings.hidden.clear();
  } else {
    locked->settings.hidden.insert(entry);
  }
}

void fake_cuda_fail(const char* entry, uint64_t kth, int code, int sticky) {
  Locked()->faults.arm(entry != nullptr ? entry : "", kth, static_cast<vattn::cuda::CUresult>(code), sticky != 0);
}
void fake_cuda_clear_faults(void) { Locked()->faults.clear(); }
uint64_t fake_cuda_faults_fired(void) { return Locked()->faults.fired(); }

void fake_cuda_count(fake_cuda_counts* counts) {
  const Locked locked;
  *counts = {};
  for (const auto& [handle, allocation] : locked->allocations) {
    counts->handles += allocation.references != 0 ? 1 : 0;
    counts->handle_references += allocation.references;
    counts->bytes += allocation.size;
  }
  for (const auto& device : locked->devices) counts->context_references += device.context_references;
  counts->mappings = locked->mappings.size();
  counts->reservations = locked->reservations.size();
  counts->streams = static_cast<uint64_t>(
      std::count_if(locked->streams.begin(), locked->streams.end(), [](const auto* stream) { return stream->is_of_program; }));
  counts->work = locked->work.size();
  counts->null_stream_work = locked->null_stream_work;
  counts->events = locked->events.size();
}

int fake_cuda_context_depth(void) { return static_cast<int>(fake_cuda::context_stack().size()); }

int fake_cuda_capture_mode(void) { return static_cast<int>(fake_cuda::capture_mode()); }

uint64_t fake_cuda_calls(const char* entry) {
  const Locked locked;
  uint64_t calls = 0;
  for (const auto& [name, count] : locked->calls) {
    if (entry == nullptr || name == entry) calls += count;
  }
  return calls;
}
void fake_cuda_clear_calls(void) { Locked()->calls.clear(); }

uint64_t fake_cuda_kernel_begin(uint64_t address, uint64_t size) {
  const Locked locked;
  fake_cuda::Work work;
  work.device = -1;
  work.uses = {{address, size}};
  if (!can_run(locked.state, address, size, work.device)) {
    locked->violate("a kernel touches memory that is not mapped, or has no access");
    return 0;
  }
  return fake_cuda::start(locked.state, std::move(work));
}
uint64_t fake_cuda_kernel_begin_on(uint64_t stream, uint64_t address, uint64_t size, int64_t duration_us) {
  const Locked locked;
  const auto on = reinterpret_cast<vattn::cuda::CUstream>(stream);
  if (!fake_cuda::is_stream(locked.state, on)) {
    locked->violate("a kernel on a stream that there is not");
    return 0;
  }
  fake_cuda::Work work;
  work.device = on != nullptr ? reinterpret_cast<fake_cuda::StreamState*>(on)->device : -1;
  work.uses = {{address, size}};
  work.ends = duration_us < 0 ? fake_cuda::Ends::kByName : fake_cuda::Ends::kByTime;
  work.duration = std::chrono::microseconds(std::max<int64_t>(duration_us, 0));
  if (!can_run(locked.state, address, size, work.device)) {
    locked->violate("a kernel touches memory that is not mapped, or has no access");
    return 0;
  }
  return fake_cuda::enqueue(locked.state, on, std::move(work));
}
int fake_cuda_kernel_end(uint64_t kernel) {
  const Locked locked;
  return fake_cuda::end(locked.state, kernel) ? 1 : 0;
}

uint64_t fake_cuda_stream_create(int device) {
  const Locked locked;
  if (!locked->has_device(device)) return 0;
  auto* stream = new fake_cuda::StreamState{device, false, false, {}};
  locked->streams.insert(stream);
  return reinterpret_cast<uint64_t>(stream);
}
void fake_cuda_stream_destroy(uint64_t stream) {
  const Locked locked;
  auto* destroyed = reinterpret_cast<fake_cuda::StreamState*>(stream);
  if (locked->streams.erase(destroyed) != 0) delete destroyed;
}
void fake_cuda_set_capturing(uint64_t stream, int on) {
  const Locked locked;
  if (stream == 0) {
    for (auto& device : locked->devices) device.null_stream.capturing = on != 0;
  } else if (auto* captured = reinterpret_cast<fake_cuda::StreamState*>(stream); locked->streams.count(captured) != 0) {
    captured->queue.capturing = on != 0;
  }
}

uint64_t fake_cuda_violations(void) { return Locked()->violations.size(); }
void fake_cuda_forget_violations(void) { Locked()->violations.clear(); }
size_t fake_cuda_last_violation(char* text, size_t size) {
  const Locked locked;
  const std::string last = locked->violations.empty() ? std::string() : locked->violations.back();
  if (text != nullptr && size != 0) {
    const size_t kept = std::min(size - 1, last.size());
    std::memcpy(text, last.data(), kept);
    text[kept] = '\0';
  }
  return last.size();
}
}
