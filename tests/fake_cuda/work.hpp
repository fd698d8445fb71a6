// Work on a device: kernels, fills and copies, and what comes after what.
//
// Work knows what it comes after: the work before it on its stream and what the stream was told to wait for, and with that all
// that runs before either. It runs once all of this is over. What ends by time is over when somebody looks (every entry point
// does, first), at the time it was due; fills, copies and kernels of no stream run until they are waited for, which is the
// longest they could; a kernel with neither runs until a test ends it.
//
// The NULL stream is the legacy one: its work, and an event on it, come after all work of the device's blocking streams, and
// those streams' later work and events come after it. Thread: none of its own; the state's mutex is held.
#pragma once

#include "state.hpp"

namespace fake_cuda {

/// Null is the NULL stream.
[[nodiscard]] bool is_stream(const State& state, CUstream stream);
[[nodiscard]] Queue& queue_of(State& state, int device, CUstream stream);

/// Whether a call may use the stream: there is such a one, and it is not being captured, or that is a violation.
[[nodiscard]] CUresult check_stream(State& state, int device, CUstream stream, const char* call);

/// Whether any stream is being captured into a graph.
[[nodiscard]] bool is_any_captured(const State& state);

/// Gives work to a device, behind what it says it comes after; its id.
WorkId start(State& state, Work work);
/// Gives work to a stream.
WorkId enqueue(State& state, CUstream stream, Work work);

/// What the next work of a stream would come after, so what an event recorded there marks.
[[nodiscard]] WorkIds before_next(State& state, int device, CUstream stream);
[[nodiscard]] WorkIds all_of_queue(const Queue& queue);
[[nodiscard]] WorkIds all_of_device(const State& state, int device);

/// Whether one of these is not over.
[[nodiscard]] bool is_any_left(const State& state, const WorkIds& ids);

/// Ends what is due.
void advance(State& state);
/// Ends one now, or once it could start; false when it is over.
bool end(State& state, WorkId id);
/// Waits until all of these are over, without the mutex while time passes. The state is another one afterwards.
void wait_for(const Entry& entry, const WorkIds& ids);

/// Ends the fills and copies among these, and before them, that nothing else holds up.
bool finish_transfers(State& state, const WorkIds& ids);

/// Ends what a device runs, whatever it is behind, and destroys the program's streams and events: its context goes.
void abandon_device(State& state, int device);

/// Whether something that runs, or is still to run, uses a byte of the range.
[[nodiscard]] bool is_in_use(const State& state, Address address, std::size_t size);

}  // namespace fake_cuda
