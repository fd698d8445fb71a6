// What the programs of `vattn bench` print: one line of JSON with every sample of every arm, and counts.
//
//     {"arms": [{"name": "vattn", "unit": "ns", "samples": [193.1, ...]}], "facts": {"driver_calls": 0}}
//
// Thread: one.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace bench {

struct Arm {
  std::string name;
  std::string unit;
  std::vector<double> samples;
};

inline void print_report(const std::vector<Arm>& arms, const std::vector<std::pair<std::string, long>>& facts = {}) {
  std::printf("{\"arms\": [");
  for (std::size_t i = 0; i < arms.size(); ++i) {
    std::printf("%s{\"name\": \"%s\", \"unit\": \"%s\", \"samples\": [", i == 0 ? "" : ", ", arms[i].name.c_str(),
                arms[i].unit.c_str());
    for (std::size_t j = 0; j < arms[i].samples.size(); ++j) std::printf("%s%.6g", j == 0 ? "" : ", ", arms[i].samples[j]);
    std::printf("]}");
  }
  std::printf("], \"facts\": {");
  for (std::size_t i = 0; i < facts.size(); ++i) {
    std::printf("%s\"%s\": %ld", i == 0 ? "" : ", ", facts[i].first.c_str(), facts[i].second);
  }
  std::printf("}}\n");
}

/// The number after `name` on the command line, else `otherwise`. Ends the program where it is under `least`.
inline long number_option(int argc, char** argv, const char* name, long otherwise, long least = 1) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], name) != 0) continue;
    const long value = std::atol(argv[i + 1]);
    if (value < least) {
      std::fprintf(stderr, "%s %s: at least %ld\n", name, argv[i + 1], least);
      std::exit(2);
    }
    return value;
  }
  return otherwise;
}

inline bool has_option(int argc, char** argv, const char* name) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], name) == 0) return true;
  }
  return false;
}

/// A failed system call ends a benchmark.
inline void require(bool fine, const char* call) {
  if (fine) return;
  std::perror(call);
  std::exit(1);
}

}  // namespace bench
