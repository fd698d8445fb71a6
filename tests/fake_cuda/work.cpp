// Streams, and the work that runs on them until it is waited for.
#include "work.hpp"

#include <memory>
#include <utility>

namespace fake_cuda {
namespace {

template <typename Which>
void finish_if(State& state, Which&& which) {
  // In the order it was started. An effect only writes bytes, so nothing is added to the list meanwhile.
  for (auto it = state.work.begin(); it != state.work.end();) {
    if (!which(it->second)) {
      ++it;
      continue;
    }
    if (it->second.effect) it->second.effect();
    it = state.work.erase(it);
  }
}

}  // namespace

const StreamState* kernel_stream() noexcept {
  static const StreamState stream{-1};
  return &stream;
}

std::uint64_t start(State& state, Work work) {
  const std::uint64_t id = state.next_work++;
  state.work.emplace(id, std::move(work));
  return id;
}

bool finish(State& state, std::uint64_t id) {
  const auto found = state.work.find(id);
  if (found == state.work.end()) return false;
  if (found->second.effect) found->second.effect();
  state.work.erase(found);
  return true;
}

void finish_stream(State& state, int device, const StreamState* stream) {
  finish_if(state, [&](const Work& work) { return work.device == device && work.stream == stream; });
}

void finish_device(State& state, int device) {
  finish_if(state, [&](const Work& work) { return work.device == device; });
}

void destroy_streams(State& state, int device) {
  for (auto it = state.streams.begin(); it != state.streams.end();) {
    if ((*it)->device != device) {
      ++it;
      continue;
    }
    delete *it;
    it = state.streams.erase(it);
  }
}

bool is_in_use(const State& state, Address address, std::size_t size) {
  for (const auto& [id, work] : state.work) {
    for (const Range& range : work.uses) {
      if (range.address < address + size && address < range.address + range.size) return true;
    }
  }
  return false;
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  FAKE_CUDA_ENTRY(entry, "cuStreamCreate", Needs::kContext);
  if (stream == nullptr || (flags & ~CU_STREAM_NON_BLOCKING) != 0) return CUDA_ERROR_INVALID_VALUE;
  auto made = std::make_unique<StreamState>(StreamState{entry.device().ordinal});
  entry->streams.insert(made.get());
  *stream = reinterpret_cast<CUstream>(made.release());
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuStreamSynchronize", Needs::kContext);
  auto* waited = reinterpret_cast<StreamState*>(stream);
  if (waited != nullptr && entry->streams.count(waited) == 0) return CUDA_ERROR_INVALID_HANDLE;
  finish_stream(*entry, waited != nullptr ? waited->device : entry.device().ordinal, waited);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuStreamDestroy", Needs::kContext);
  auto* destroyed = reinterpret_cast<StreamState*>(stream);
  if (entry->streams.erase(destroyed) == 0) return CUDA_ERROR_INVALID_HANDLE;
  // The real driver lets work finish in its own time and returns at once; it has finished by the time anyone can tell.
  finish_stream(*entry, destroyed->device, destroyed);
  delete destroyed;
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
