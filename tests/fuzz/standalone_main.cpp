// A main for fuzz targets where the compiler has no libFuzzer: mutates the corpus at random, blind to coverage.
//
//     fuzz_x [-max_total_time=SECONDS] [-runs=N] [-seed=N] [-artifact_prefix=PATH] [FILE or FOLDER]...
//
// Every input of the corpus is run first, then mutations of them until the time or the runs are over; only files named: only
// those. An input that crashes the target, hangs it for a minute, or makes it throw, is written to PATHcrash-..., and the exit
// status is not 0. Other flags of libFuzzer are ignored, so that one command line serves both.
// Thread: the main one.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using Input = std::vector<std::uint8_t>;
constexpr std::size_t kLongest = 4096;
constexpr unsigned kHangSeconds = 60;

// For the handler of signals, which may allocate nothing.
const Input* current = nullptr;
char crash_file[4096] = "crash-0";

void save_current() noexcept {
  if (current == nullptr) return;
  const int file = ::open(crash_file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) return;
  const auto written = ::write(file, current->data(), current->size());
  static_cast<void>(::close(file));
  constexpr std::string_view kWords = "the input was written to ";
  if (written < 0 || ::write(STDERR_FILENO, kWords.data(), kWords.size()) < 0) return;
  static_cast<void>(!::write(STDERR_FILENO, crash_file, std::string_view(crash_file).size()));
  static_cast<void>(!::write(STDERR_FILENO, "\n", 1));
}

extern "C" void on_signal(int signal) {
  save_current();
  ::_exit(128 + signal);
}

Input read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return Input(std::istreambuf_iterator<char>(file), {});
}

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  Input mutate(const std::vector<Input>& corpus) {
    Input input = corpus.empty() ? Input{} : corpus[below(corpus.size())];
    for (std::size_t times = 1 + below(8); times > 0; --times) change(input, corpus);
    if (input.size() > kLongest) input.resize(kLongest);
    return input;
  }

 private:
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }
  [[nodiscard]] std::ptrdiff_t place(const Input& input) { return static_cast<std::ptrdiff_t>(below(input.size() + 1)); }

  void change(Input& input, const std::vector<Input>& corpus) {
    const auto byte = static_cast<std::uint8_t>(random_());
    switch (below(6)) {
      case 0:
        input.insert(input.begin() + place(input), byte);
        return;
      case 1:
        if (!input.empty()) input.erase(input.begin() + static_cast<std::ptrdiff_t>(below(input.size())));
        return;
      case 2:
        if (!input.empty()) input[below(input.size())] = byte;
        return;
      case 3:
        if (!input.empty()) input[below(input.size())] ^= static_cast<std::uint8_t>(1U << below(8));
        return;
      case 4:  // a piece of another one, or of itself
        if (!corpus.empty()) {
          const Input other = corpus[below(corpus.size())];
          const auto from = place(other);
          const auto to = from + static_cast<std::ptrdiff_t>(below(other.size() - static_cast<std::size_t>(from) + 1));
          input.insert(input.begin() + place(input), other.begin() + from, other.begin() + to);
        }
        return;
      default:
        input.resize(static_cast<std::size_t>(place(input)));
    }
  }

  std::mt19937_64 random_;
};

/// False where it threw.
bool run(const Input& input) {
  current = &input;
  ::alarm(kHangSeconds);
  try {
    LLVMFuzzerTestOneInput(input.data(), input.size());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    save_current();
    return false;
  }
  ::alarm(0);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 0;
  std::uint64_t runs = UINT64_MAX;
  std::uint64_t seed = std::random_device{}();
  std::string prefix;
  std::vector<std::filesystem::path> places;
  bool folders = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&](std::string_view name) {
      return argument.starts_with(name) ? argument.c_str() + name.size() : nullptr;
    };
    if (const char* text = value("-max_total_time=")) seconds = std::strtod(text, nullptr);
    if (const char* text = value("-runs=")) runs = std::strtoull(text, nullptr, 10);
    if (const char* text = value("-seed=")) seed = std::strtoull(text, nullptr, 10);
    if (const char* text = value("-artifact_prefix=")) prefix = text;
    if (!argument.starts_with("-")) places.emplace_back(argument);
  }
  std::snprintf(crash_file, sizeof crash_file, "%scrash-%llu-%ld", prefix.c_str(), static_cast<unsigned long long>(seed),
                static_cast<long>(::getpid()));
  for (const int signal : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL, SIGALRM}) std::signal(signal, on_signal);

  std::vector<std::filesystem::path> files;
  for (const auto& place : places) {
    if (!std::filesystem::is_directory(place)) {
      files.push_back(place);
      continue;
    }
    folders = true;
    for (const auto& entry : std::filesystem::directory_iterator(place)) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());  // one seed, one run
  std::vector<Input> corpus;
  for (const auto& file : files) {
    corpus.push_back(read_file(file));
    if (run(corpus.back())) continue;
    std::fprintf(stderr, "that was %s\n", file.c_str());
    return 1;
  }
  std::fprintf(stderr, "%zu inputs of the corpus are fine; mutating them with -seed=%llu\n", corpus.size(),
               static_cast<unsigned long long>(seed));
  if (!places.empty() && !folders) return 0;

  Mutator mutator(seed);
  const auto start = std::chrono::steady_clock::now();
  const auto passed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  std::uint64_t done = 0;
  for (; done < runs && (seconds == 0 ? runs != UINT64_MAX : passed() < seconds); ++done) {
    if (!run(mutator.mutate(corpus))) return 1;
  }
  std::fprintf(stderr, "%llu mutations in %.0f s, no finds\n", static_cast<unsigned long long>(done), passed());
  // As libFuzzer's -print_final_stats=1 has it.
  std::fprintf(stderr, "stat::number_of_executed_units: %llu\n", static_cast<unsigned long long>(corpus.size() + done));
  return 0;
}
