// The fuzz target of driver traces: any bytes are replayed, or refused with a typed error (trace_target.hpp).
#include <cstddef>
#include <cstdint>

#include "trace_target.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  vattn::fuzz::replay_anything({data, size});
  return 0;
}
