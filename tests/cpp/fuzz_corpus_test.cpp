// The corpus of each fuzz target, on every change: what was interesting once, and what was found and mended. A file that fails
// here is run alone with `build/fuzz/tests/fuzz_operations FILE`; VATTN_FUZZ_VERBOSE=1 shows its operations.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>

#include "../fuzz/operation_program.hpp"
#include "../fuzz/trace_target.hpp"

namespace vattn {
namespace {

using Input = std::vector<std::uint8_t>;

void each_input(const char* target, const std::function<void(const Input&)>& run) {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(VATTN_FUZZ_CORPUS) / target)) {
    files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  EXPECT_GE(files.size(), 20U) << "the corpus is not where it should be";
  for (const auto& path : files) {
    std::ifstream file(path, std::ios::binary);
    const Input input(std::istreambuf_iterator<char>(file), {});
    EXPECT_NO_THROW(run(input)) << path;
  }
}

TEST(FuzzCorpus, OperationProgramsHold) {
  each_input("operations", [](const Input& input) { fuzz::run_operations(input); });
}

TEST(FuzzCorpus, DriverTracesAreReplayedOrRefused) {
  each_input("driver_trace", [](const Input& input) { fuzz::replay_anything(input); });
}

TEST(FuzzCorpus, RandomProgramsHold) {
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    std::mt19937_64 random(seed);
    Input program(40 + random() % 360);
    for (std::uint8_t& byte : program) byte = static_cast<std::uint8_t>(random());
    EXPECT_NO_THROW(fuzz::run_operations(program)) << "seed " << seed;
  }
}

}  // namespace
}  // namespace vattn
