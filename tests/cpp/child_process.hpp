// How a forked child of a test ends: at once, running nothing that is the parent's to run. A build that counts coverage writes
// down what the child reached first, its own counts and the library's, which keeps its own.
// Thread: the child's only one.
#pragma once

#include <unistd.h>

#ifdef VATTN_COVERAGE
extern "C" void __gcov_dump();
extern "C" void vattn_dump_coverage();  // coverage_dump.cpp, inside the library
#endif

namespace vattn {

[[noreturn]] inline void leave(bool good) {
#ifdef VATTN_COVERAGE
  vattn_dump_coverage();
  __gcov_dump();
#endif
  ::_exit(good ? 0 : 1);
}

}  // namespace vattn
