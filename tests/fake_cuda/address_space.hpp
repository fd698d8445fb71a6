// Questions about what is reserved and mapped, asked by several entry points.
// Thread: none of its own; the state's mutex is held.
#pragma once

#include <vector>

#include "state.hpp"

namespace fake_cuda {

using MappingIterator = std::map<Address, Mapping>::iterator;

/// Whether the range lies inside one reservation. Empty ranges and ones that wrap do not.
[[nodiscard]] bool is_reserved(const State& state, Address address, std::size_t size);

/// Whether any byte of the range is mapped.
[[nodiscard]] bool is_mapped_anywhere(const State& state, Address address, std::size_t size);

/// The mappings that cover the range, in order; none when a byte of it is not mapped. The first may begin before it and the
/// last end behind it.
[[nodiscard]] std::vector<MappingIterator> covering(State& state, Address address, std::size_t size);

/// The mappings that the range is made of, whole and without gaps, in one reservation; none when it is not.
[[nodiscard]] std::vector<MappingIterator> whole_mappings(State& state, Address address, std::size_t size);

/// Drops what `allocation` no longer needs: its memory goes when its last mapping and its last reference are gone.
void free_if_unused(State& state, Handle handle);

}  // namespace fake_cuda
