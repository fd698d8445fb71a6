// Everything the fake driver knows: devices and their contexts, pages, reservations, mappings, work in flight.
//
// One State a process, behind one mutex, as the real driver has one. An entry point opens with an Entry, which takes the mutex,
// takes its latency, counts the call, lets an injected fault have its turn, and checks what the entry needs (cuInit, a current
// context). Thread: any, while holding the mutex; the stack of current contexts and the capture mode are each
// thread's own.
#pragma once

#include <sys/types.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "entry_points.hpp"
#include "faults.hpp"

namespace fake_cuda {

using Address = CUdeviceptr;
using Handle = CUmemGenericAllocationHandle;

using Clock = std::chrono::steady_clock;
using WorkId = std::uint64_t;
using WorkIds = std::set<WorkId>;

constexpr int kMaxDevices = 16;
constexpr std::size_t kHostPage = 4096;

struct Settings {
  int devices = 2;
  std::uint64_t memory = std::uint64_t{4} << 30;
  std::size_t granularity = std::size_t{2} << 20;
  std::size_t recommended = std::size_t{2} << 20;
  std::size_t default_alignment = 0;  ///< of reservations; 0: the granularity
  int fill = 0xFF;
  bool vmm = true;
  std::set<std::string> hidden;
  std::map<std::string, std::chrono::nanoseconds> latency;  ///< of single entries
  std::chrono::nanoseconds latency_of_all{0};               ///< of the others
};

/// Where the next work of a stream will stand.
struct Queue {
  WorkId last = 0;  ///< the work that was put in last, over or not; 0: none was
  WorkIds awaited;  ///< what the stream was told to wait for since
  bool capturing = false;
};

/// A device and its primary context. The context's handle is the address of the device.
struct Device {
  int ordinal = 0;
  std::uint64_t context_references = 0;
  std::uint64_t used = 0;      ///< bytes of its pages
  int file = -1;               ///< the memory file that holds them; opened at the first cuMemCreate
  std::uint64_t file_end = 0;  ///< places in the file are used once: it is sparse, and freed ones are punched out
  Queue null_stream{};
};

/// A page. It lives while it has a reference or a mapping.
struct Allocation {
  int device;
  std::size_t size;
  std::uint64_t offset;  ///< in the device's file
  std::uint64_t references;
  std::uint64_t mappings;
};

struct Mapping {
  std::size_t size;
  Handle handle;
  std::array<CUmemAccess_flags, kMaxDevices> access;
};

struct Range {
  Address address;
  std::size_t size;
};

/// A stream; its handle is its address.
struct StreamState {
  int device;
  bool is_blocking;    ///< waits for the NULL stream, and makes it wait
  bool is_of_program;  ///< cuStreamCreate made it, not a test: it goes with its context
  Queue queue;
};

/// An event; its handle is its address. What it marks is fixed when it is recorded; before, it marks nothing and has passed.
struct EventState {
  int device;
  WorkIds marked;
};

/// When work that runs is over.
enum class Ends : std::uint8_t { kWhenWaitedFor, kByTime, kByName };

/// A kernel, a fill or a copy that was given to the device and is not over. It runs once what it comes after is over. What a
/// fill or a copy does to memory happens when it is waited for, so that whoever does not wait sees that he did not.
struct Work {
  int device = 0;
  std::vector<Range> uses{};
  std::function<void()> effect{};  ///< may be empty
  Ends ends = Ends::kWhenWaitedFor;
  std::chrono::nanoseconds duration{0};  ///< of work that ends by time
  bool holds_null_stream = false;        ///< on a stream that the NULL stream waits for, or on that one
  WorkIds after{};                       ///< what must be over first; work that is over is taken out
  Clock::time_point ready{};             ///< when the last of these was over, or the work was given
};

struct State {
  State();

  std::mutex mutex;
  Settings settings;
  Faults faults;
  std::array<Device, kMaxDevices> devices;
  std::map<Handle, Allocation> allocations;
  std::map<Address, std::size_t> reservations;
  std::map<Address, Mapping> mappings;
  std::set<StreamState*> streams;
  std::set<EventState*> events;
  std::map<WorkId, Work> work;      ///< by id, so in the order it was given: what work comes after is before it
  std::condition_variable changed;  ///< work is over
  std::map<std::string, std::uint64_t> calls;
  std::vector<std::string> violations;
  std::uint64_t null_stream_work = 0;
  std::uint64_t next_handle = 1;
  WorkId next_work = 1;
  pid_t initialised_in = 0;  ///< the process that called cuInit; 0: none has

  /// Frees what is alive and starts over. The mutex is held.
  void reset();
  [[nodiscard]] bool has_device(int ordinal) const { return ordinal >= 0 && ordinal < settings.devices; }
  void violate(std::string what) { violations.push_back(std::move(what)); }
};

/// The one state, never destroyed: programs call CUDA while they exit.
State& state();

/// The contexts pushed on this thread, the current one last; null entries are "no context".
std::vector<Device*>& context_stack();

/// What the calling thread's calls may do while a stream is captured.
CUstreamCaptureMode& capture_mode();

/// What an entry point needs to be called; kRelaxed: a context, and the thread's relaxed mode while a stream is being captured;
/// kNoCapture: a context, and that none is.
enum class Needs : std::uint8_t { kNothing, kInit, kContext, kRelaxed, kNoCapture };

/// The opening of every entry point.
class Entry {
 public:
  Entry(const char* name, Needs needs);

  /// CUDA_SUCCESS: go on. Anything else is to be returned at once.
  [[nodiscard]] CUresult refusal() const noexcept { return refusal_; }
  /// The device of the current context; only with Needs::kContext or more.
  [[nodiscard]] Device& device() const noexcept { return *device_; }
  [[nodiscard]] State& operator*() const noexcept { return state_; }
  [[nodiscard]] State* operator->() const noexcept { return &state_; }
  /// For waiting, which lets go of the mutex.
  [[nodiscard]] std::unique_lock<std::mutex>& lock() const noexcept { return lock_; }

 private:
  CUresult check(const char* name, Needs needs);

  State& state_;
  mutable std::unique_lock<std::mutex> lock_;
  Device* device_ = nullptr;
  CUresult refusal_ = CUDA_SUCCESS;
};

/// Returns from an entry point that may not go on.
#define FAKE_CUDA_ENTRY(entry, name, needs) \
  const Entry entry(name, needs);           \
  if (entry.refusal() != CUDA_SUCCESS) return entry.refusal()

}  // namespace fake_cuda
