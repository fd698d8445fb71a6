#include "work.hpp"

#include <algorithm>
#include <optional>
#include <utility>

namespace fake_cuda {
namespace {

using WorkIterator = std::map<WorkId, Work>::iterator;

bool is_blocking(CUstream stream) { return stream == nullptr || reinterpret_cast<const StreamState*>(stream)->is_blocking; }

/// Ends work that was over at `time`; the work behind it.
WorkIterator finish(State& state, WorkIterator over, Clock::time_point time) {
  if (over->second.effect) over->second.effect();
  const WorkId id = over->first;
  const auto next = state.work.erase(over);
  for (auto behind = next; behind != state.work.end(); ++behind) {
    if (behind->second.after.erase(id) != 0) behind->second.ready = std::max(behind->second.ready, time);
  }
  state.changed.notify_all();
  return next;
}

/// When the work will be over; none where that is not up to the clock.
std::optional<Clock::time_point> due(const Work& work) {
  if (!work.after.empty() || work.ends != Ends::kByTime) return std::nullopt;
  return work.ready + work.duration;
}

/// Adds what `ids` come after; what is over is left out.
WorkIds with_all_before(const State& state, const WorkIds& ids) {
  WorkIds all;
  std::vector<WorkId> open(ids.begin(), ids.end());
  while (!open.empty()) {
    const auto found = state.work.find(open.back());
    open.pop_back();
    if (found == state.work.end() || !all.insert(found->first).second) continue;
    open.insert(open.end(), found->second.after.begin(), found->second.after.end());
  }
  return all;
}

}  // namespace

bool is_stream(const State& state, CUstream stream) {
  return stream == nullptr || state.streams.count(reinterpret_cast<StreamState*>(stream)) != 0;
}

bool is_any_captured(const State& state) {
  const auto on_stream = [](const StreamState* stream) { return stream->queue.capturing; };
  const auto on_null_stream = [](const Device& device) { return device.null_stream.capturing; };
  return std::any_of(state.streams.begin(), state.streams.end(), on_stream) ||
         std::any_of(state.devices.begin(), state.devices.end(), on_null_stream);
}

Queue& queue_of(State& state, int device, CUstream stream) {
  if (stream == nullptr) return state.devices[static_cast<std::size_t>(device)].null_stream;
  return reinterpret_cast<StreamState*>(stream)->queue;
}

CUresult check_stream(State& state, int device, CUstream stream, const char* call) {
  if (!is_stream(state, stream)) return CUDA_ERROR_INVALID_HANDLE;
  if (!queue_of(state, device, stream).capturing) return CUDA_SUCCESS;
  state.violate(std::string(call) + " of a stream that is being captured");
  return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

WorkIds all_of_queue(const Queue& queue) {
  WorkIds ids = queue.awaited;
  ids.insert(queue.last);
  return ids;
}

WorkIds all_of_device(const State& state, int device) {
  WorkIds ids = all_of_queue(state.devices[static_cast<std::size_t>(device)].null_stream);
  for (const auto& [id, work] : state.work) {
    if (work.device == device) ids.insert(id);
  }
  for (const StreamState* stream : state.streams) {
    if (stream->device == device) ids.merge(all_of_queue(stream->queue));
  }
  return ids;
}

WorkIds before_next(State& state, int device, CUstream stream) {
  WorkIds ids = all_of_queue(queue_of(state, device, stream));
  if (!is_blocking(stream)) return ids;
  ids.merge(all_of_queue(queue_of(state, device, nullptr)));
  if (stream != nullptr) return ids;
  for (const auto& [id, work] : state.work) {
    if (work.device == device && work.holds_null_stream) ids.insert(id);
  }
  for (const StreamState* other : state.streams) {
    if (other->device == device && other->is_blocking) ids.merge(all_of_queue(other->queue));
  }
  return ids;
}

bool is_any_left(const State& state, const WorkIds& ids) {
  return std::any_of(ids.begin(), ids.end(), [&](WorkId id) { return state.work.count(id) != 0; });
}

WorkId start(State& state, Work work) {
  const WorkId id = state.next_work++;
  work.ready = Clock::now();
  for (auto it = work.after.begin(); it != work.after.end();)
    it = state.work.count(*it) != 0 ? std::next(it) : work.after.erase(it);
  state.work.emplace(id, std::move(work));
  return id;
}

WorkId enqueue(State& state, CUstream stream, Work work) {
  const int device = work.device;
  work.after = before_next(state, device, stream);
  work.holds_null_stream = is_blocking(stream);
  Queue& queue = queue_of(state, device, stream);
  queue.last = start(state, std::move(work));
  queue.awaited.clear();
  return queue.last;
}

void advance(State& state) {
  if (state.work.empty()) return;
  const Clock::time_point now = Clock::now();
  // What work comes after has a smaller id, so one pass finds what is due because of what was.
  for (auto it = state.work.begin(); it != state.work.end();) {
    const auto time = due(it->second);
    it = time && *time <= now ? finish(state, it, *time) : std::next(it);
  }
}

bool end(State& state, WorkId id) {
  const auto found = state.work.find(id);
  if (found == state.work.end()) return false;
  if (found->second.after.empty()) {
    finish(state, found, Clock::now());
    advance(state);
  } else {
    found->second.ends = Ends::kByTime;
    found->second.duration = {};
  }
  return true;
}

bool finish_transfers(State& state, const WorkIds& ids) {
  bool finished = false;
  for (const WorkId id : with_all_before(state, ids)) {
    const auto it = state.work.find(id);
    if (!it->second.after.empty() || it->second.ends != Ends::kWhenWaitedFor) continue;
    finish(state, it, Clock::now());
    finished = true;
  }
  return finished;
}

void wait_for(const Entry& entry, const WorkIds& ids) {
  State& state = *entry;
  while (true) {
    advance(state);
    if (finish_transfers(state, ids)) continue;
    const WorkIds waited = with_all_before(state, ids);
    if (waited.empty()) return;
    std::optional<Clock::time_point> next;
    for (const WorkId id : waited) {
      const auto time = due(state.work.find(id)->second);
      if (time && (!next || *time < *next)) next = time;
    }
    if (next) {
      state.changed.wait_until(entry.lock(), *next);
    } else {
      state.changed.wait(entry.lock());
    }
  }
}

void abandon_device(State& state, int device) {
  for (auto it = state.work.begin(); it != state.work.end();) {
    it = it->second.device == device ? finish(state, it, Clock::now()) : std::next(it);
  }
  const auto destroy_if = [](auto& all, auto&& goes) {
    for (auto it = all.begin(); it != all.end();) {
      if (!goes(**it)) {
        ++it;
        continue;
      }
      delete *it;
      it = all.erase(it);
    }
  };
  destroy_if(state.streams, [=](const StreamState& stream) { return stream.device == device && stream.is_of_program; });
  destroy_if(state.events, [=](const EventState& event) { return event.device == device; });
}

bool is_in_use(const State& state, Address address, std::size_t size) {
  for (const auto& [id, work] : state.work) {
    for (const Range& range : work.uses) {
      if (range.address < address + size && address < range.address + range.size) return true;
    }
  }
  return false;
}

}  // namespace fake_cuda
