// The fuzz target of operation programs: any bytes are one (operation_program.hpp). A violation leaves as an exception.
#include <cstddef>
#include <cstdint>

#include "operation_program.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  vattn::fuzz::run_operations({data, size});
  return 0;
}
