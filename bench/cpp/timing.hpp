// What the C++ benchmarks share: a clock, a median, and a line of JSON.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

namespace bench {

/// Seconds that `work` takes.
template <typename Work>
double seconds(Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace bench
