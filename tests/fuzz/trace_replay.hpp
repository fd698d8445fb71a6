// Plays a trace that TraceDriver wrote against any driver: the same verbs in the same order, addresses and handles translated.
//
// The trace is not believed: it is parsed whole before the first verb, and every argument is checked against what the trace
// made before, so that whatever bytes it holds, no verb is called that its contract forbids. std::invalid_argument names the
// line.
//
// What the driver throws goes through, with the line in `failed_line`. Left out, and counted as skipped: calls that failed when
// they were traced, fences where the driver has none, and copies from memory that is in no reservation of the trace. Streams
// become the default one; reservations that read as zeros become faulting ones where the driver cannot. What the trace leaves
// behind, or had made when something failed, is given back.
// Thread: the caller's.
#pragma once

#include <cstdint>
#include <istream>

#include "vattn/driver/driver.hpp"

namespace vattn::fuzz {

struct ReplayLimits {
  std::uint64_t created_bytes = std::uint64_t{1} << 30;   ///< alive at once; more is std::invalid_argument
  std::uint64_t reserved_bytes = std::uint64_t{1} << 46;  ///< the same, of addresses
  std::uint64_t lines = std::uint64_t{1} << 22;
};

struct Replayed {
  std::uint64_t calls = 0;
  std::uint64_t skipped = 0;
  std::uint64_t left_pages = 0;  ///< created and not released by the trace
  std::uint64_t left_ranges = 0;
};

/// `failed_line`, if given, is the line that is being played, also when this throws; 0: none was yet.
Replayed replay_trace(std::istream& trace, Driver& driver, const ReplayLimits& limits = {},
                      std::uint64_t* failed_line = nullptr);

}  // namespace vattn::fuzz
