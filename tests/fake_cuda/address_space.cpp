#include "address_space.hpp"

#include <fcntl.h>

namespace fake_cuda {

bool is_reserved(const State& state, Address address, std::size_t size) {
  auto it = state.reservations.upper_bound(address);
  if (size == 0 || it == state.reservations.begin()) return false;
  --it;
  const std::size_t before = address - it->first;
  return before < it->second && size <= it->second - before;
}

bool is_mapped_anywhere(const State& state, Address address, std::size_t size) {
  auto it = state.mappings.lower_bound(address);
  if (it != state.mappings.end() && it->first - address < size) return true;
  if (it == state.mappings.begin()) return false;
  --it;
  return address - it->first < it->second.size;
}

std::vector<MappingIterator> covering(State& state, Address address, std::size_t size) {
  std::vector<MappingIterator> found;
  if (!is_reserved(state, address, size)) return found;
  auto it = state.mappings.upper_bound(address);
  if (it == state.mappings.begin()) return found;
  --it;
  const Address end = address + size;
  Address reached = it->first;
  for (; it != state.mappings.end() && reached < end && it->first == reached; ++it) {
    found.push_back(it);
    reached += it->second.size;
  }
  if (reached < end || found.front()->first + found.front()->second.size <= address) found.clear();
  return found;
}

std::vector<MappingIterator> whole_mappings(State& state, Address address, std::size_t size) {
  auto found = covering(state, address, size);
  if (found.empty()) return found;
  const bool whole = found.front()->first == address && found.back()->first + found.back()->second.size == address + size;
  if (!whole) found.clear();
  return found;
}

void free_if_unused(State& state, Handle handle) {
  const auto found = state.allocations.find(handle);
  const Allocation& allocation = found->second;
  if (allocation.references != 0 || allocation.mappings != 0) return;
  Device& device = state.devices[static_cast<std::size_t>(allocation.device)];
  ::fallocate(device.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(allocation.offset),
              static_cast<off_t>(allocation.size));
  device.used -= allocation.size;
  state.allocations.erase(found);
}

}  // namespace fake_cuda
