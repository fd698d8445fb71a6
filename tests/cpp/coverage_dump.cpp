// Part of the library in a build that counts coverage, and in no other: writes the library's counts now. child_process.hpp
// calls it in a forked child, which ends without running what would write them. Thread: the child's only one.
extern "C" void __gcov_dump();
extern "C" __attribute__((visibility("default"))) void vattn_dump_coverage();

extern "C" void vattn_dump_coverage() { __gcov_dump(); }
