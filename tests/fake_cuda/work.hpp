// Work on a device: kernels, fills and copies, from their start until somebody waits.
//
// There is no time here: work runs until it is waited for (or a kernel is ended by name), which is the longest it could run,
// and its effect on memory appears then. Streams with time, and events, would be scheduled here. Thread: none of its own; the
// state's mutex is held.
#pragma once

#include "state.hpp"

namespace fake_cuda {

/// Where kernels begun by a test run: on no stream that a program could wait for, only the whole context ends them.
[[nodiscard]] const StreamState* kernel_stream() noexcept;

/// Starts work and returns its id.
std::uint64_t start(State& state, Work work);

/// Ends one; false when it is not running.
bool finish(State& state, std::uint64_t id);
/// Ends what runs on a stream (null: the NULL stream of the device), or on a device.
void finish_stream(State& state, int device, const StreamState* stream);
void finish_device(State& state, int device);

void destroy_streams(State& state, int device);

/// Whether something that runs uses a byte of the range.
[[nodiscard]] bool is_in_use(const State& state, Address address, std::size_t size);

}  // namespace fake_cuda
