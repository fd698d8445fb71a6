// VATTN_API marks what libvattn exports; everything else stays inside the shared library.
//
// Every public header includes this one, so it is also where a compiler that reads an older C++ is told what is missing.
#pragma once

// 201703 is C++17; compilers on the way to C++20 said something between it and 202002.
#if __cplusplus <= 201703L
#error "vattn's C++ headers need C++20: compile with -std=c++20, or use the C header <vattn.h>"
#endif

#define VATTN_API __attribute__((visibility("default")))
