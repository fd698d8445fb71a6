// Bytes as a program: two caches of different shape and a growable tensor that share a pool, on the null, host or (fake) CUDA
// driver, with faults switched on and off in mid-run. Every bytes are a program; a reference model is checked after each step.
//
// Checked: lengths and slots as the model has them, after a failure as before it; only errors that are documented, and only
// where there is a reason; every slot in use has memory for its length; created == mapped + pooled + retired, and within the
// limit; fits() tells what step() does; where there is memory every token keeps its pattern (cache, request, layer, head,
// position), what scrub and guard promise is zero, nothing is unmapped under a running kernel; in the end nothing is left
// alive.
//
// The first bytes: driver (by 3: null, host, cuda), features (bits: mapper, scrub, guard of cache A, the same of B, sliced A,
// keys only B), limit in pages. Then operations: a byte of which, by kOperations, and their arguments. The program ends with
// its bytes. With VATTN_FUZZ_VERBOSE set every operation is written to stderr. Thread: the caller's, and those of the mappers.
// One program at a time, since the fake CUDA library is one.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>

namespace vattn::fuzz {

/// vattn did what it may not: names the operation, by number and name, and what is wrong.
class Violation : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

constexpr std::size_t kMostOperations = 400;

/// Throws Violation; anything else that it throws is one, too.
void run_operations(std::span<const std::uint8_t> bytes);

}  // namespace vattn::fuzz
