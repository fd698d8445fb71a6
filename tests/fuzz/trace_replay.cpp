#include "trace_replay.hpp"

#include <charconv>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "vattn/driver/decorators/decorator.hpp"

namespace vattn::fuzz {
namespace {

constexpr std::size_t kLongestLine = 256;

[[noreturn]] void refuse(std::uint64_t line, const std::string& what) {
  throw std::invalid_argument("trace, line " + std::to_string(line) + ": " + what);
}

/// One line, its numbers read and nothing more.
struct Step {
  std::uint64_t line = 0;
  std::optional<Verb> verb;  ///< none: drop
  std::vector<std::uint64_t> arguments;
  std::uint64_t result = 0;
  bool zeros = false;   ///< of reserve
  bool failed = false;  ///< when it was traced
};

/// What a verb's line looks like: x hexadecimal, d decimal, r "zeros" or "fault"; then whether there is a result.
struct Form {
  const char* arguments;
  bool has_result;
};
constexpr Form kForms[kVerbs] = {{"dr", true},  {"xd", false}, {"dx", true},  {"x", false},   {"xdx", false},
                                 {"xd", false}, {"xd", false}, {"xd", false}, {"xxd", false}, {"", false},
                                 {"x", true},   {"x", true},   {"x", false},  {"xx", false},  {"x", true}};

class Parser {
 public:
  Parser(std::istream& in, std::uint64_t most_lines) : in_(in), most_lines_(most_lines) {}

  std::vector<Step> parse() {
    std::vector<Step> steps;
    if (!next()) refuse(1, "the trace is empty");
    constexpr std::string_view kHeader = "vattn-trace 1 dropped=";
    if (!text_.starts_with(kHeader)) refuse(1, "the header is not \"vattn-trace 1 dropped=0\"");
    if (const auto dropped = number(text_.substr(kHeader.size()), 10); dropped != 0) {
      refuse(1, std::to_string(dropped) + " lines were dropped: what they made is not known, so the rest cannot be replayed");
    }
    while (next()) {
      if (line_ - 1 > most_lines_) refuse(line_, "more than " + std::to_string(most_lines_) + " calls");
      steps.push_back(step());
    }
    return steps;
  }

 private:
  bool next() {
    buffer_.clear();
    ++line_;
    for (int byte = in_.get(); byte != std::istream::traits_type::eof(); byte = in_.get()) {
      if (byte == '\n') {
        text_ = buffer_;
        return true;
      }
      if (buffer_.size() == kLongestLine) refuse(line_, "longer than " + std::to_string(kLongestLine) + " bytes");
      if (byte < 0x20 || byte > 0x7e) refuse(line_, "a byte that is no text, " + std::to_string(byte));
      buffer_.push_back(static_cast<char>(byte));
    }
    if (!buffer_.empty()) refuse(line_, "truncated: it does not end with a newline");
    return false;
  }

  [[nodiscard]] std::uint64_t number(std::string_view word, int base) const {
    std::uint64_t value = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value, base);
    if (word.empty() || error != std::errc{} || end != word.data() + word.size()) {
      refuse(line_, "'" + std::string(word) + "' is no number of 64 bits in base " + std::to_string(base));
    }
    return value;
  }

  std::string_view word() {
    if (at_ > text_.size()) refuse(line_, "truncated: '" + buffer_ + "'");
    const std::size_t end = std::min(text_.find(' ', at_), text_.size());
    const std::string_view found = text_.substr(at_, end - at_);
    at_ = end + 1;
    return found;
  }

  Step step() {
    at_ = 0;
    Step made;
    made.line = line_;
    const std::string_view name = word();
    Form form{"x", false};
    if (name != "drop") {
      for (std::size_t verb = 0; verb < kVerbs; ++verb) {
        if (name == name_of(static_cast<Verb>(verb))) made.verb = static_cast<Verb>(verb);
      }
      if (!made.verb) refuse(line_, "no verb is called '" + std::string(name) + "'");
      form = kForms[static_cast<std::size_t>(*made.verb)];
    }
    for (const char* kind = form.arguments; *kind != '\0'; ++kind) {
      const std::string_view argument = word();
      if (*kind != 'r') {
        made.arguments.push_back(number(argument, *kind == 'x' ? 16 : 10));
      } else if (argument == "zeros" || argument == "fault") {
        made.zeros = argument == "zeros";
      } else {
        refuse(line_, "'" + std::string(argument) + "' is neither zeros nor fault");
      }
    }
    if (at_ <= text_.size() && text_.substr(at_).starts_with("! ") && made.verb) {
      made.failed = true;  // how, is for those who read
      return made;
    }
    if (form.has_result) {
      if (word() != "=") refuse(line_, "'= result' or '! error' is missing");
      made.result = number(word(), 16);
    }
    if (at_ <= text_.size())
      refuse(line_, "more than " + std::string(name) + " takes: '" + std::string(text_.substr(at_)) + "'");
    return made;
  }

  std::istream& in_;
  std::uint64_t most_lines_;
  std::uint64_t line_ = 0;
  std::string buffer_;
  std::string_view text_;
  std::size_t at_ = 0;
};

class Player {
 public:
  Player(Driver& driver, const ReplayLimits& limits) : driver_(driver), limits_(limits), traits_(driver.traits()) {}
  Player(const Player&) = delete;
  Player& operator=(const Player&) = delete;
  ~Player() { give_back(); }

  void play(const Step& step) {
    line_ = step.line;
    if (step.failed) {
      ++done_.skipped;
      return;
    }
    const auto argument = [&](std::size_t index) { return step.arguments[index]; };
    if (!step.verb) {
      drop(argument(0));
      return;
    }
    switch (*step.verb) {
      case Verb::kReserve:
        return reserve(argument(0), step.zeros, step.result);
      case Verb::kReleaseRange:
        return release_range(argument(0), argument(1));
      case Verb::kCreate:
        return create(argument(0), argument(1), step.result);
      case Verb::kRelease:
        return release(argument(0));
      case Verb::kMap:
        return map(argument(0), argument(1), argument(2));
      case Verb::kUnmap:
        return unmap(argument(0), argument(1));
      case Verb::kSetAccess:
        return set_access(argument(0), argument(1));
      case Verb::kFillZero:
        return fill_zero(argument(0), argument(1));
      case Verb::kCopy:
        return copy(argument(0), argument(1), argument(2));
      case Verb::kSynchronize:
        driver_.synchronize();
        return called();
      case Verb::kRecord:
        return record(step.result);
      case Verb::kHasPassed:
        return fence(argument(0), [&](FenceHandle handle) { static_cast<void>(driver_.has_passed(handle)); });
      case Verb::kWait:
        return fence(argument(0), [&](FenceHandle handle) { driver_.wait(handle); });
      case Verb::kWaitOn:
        return fence(argument(1), [&](FenceHandle handle) { driver_.wait_on(0, handle); });
      case Verb::kIsCapturing:
        static_cast<void>(driver_.is_capturing(0));
        return called();
    }
  }

  [[nodiscard]] Replayed done() const {
    Replayed result = done_;
    result.left_ranges = ranges_.size();
    for (const auto& [name, page] : pages_) result.left_pages += page.referenced ? 1 : 0;
    return result;
  }

 private:
  struct Mapping {
    std::size_t size;
    std::uint64_t page;  ///< a key of pages_
    bool accessible;
  };
  struct Range {
    Address base;  ///< the driver's
    std::size_t size;
    std::map<Address, Mapping> mapped;  ///< by the trace's addresses
  };
  struct Page {
    PageHandle handle;
    std::size_t size;
    std::uint64_t mappings;
    bool referenced;
  };
  using Ranges = std::map<Address, Range>;

  void called() { ++done_.calls; }

  void check_size(std::uint64_t size) const {
    if (size != 0 && size % traits_.granularity == 0) return;
    refuse(line_, "size " + std::to_string(size) + " is no multiple of the " + traits_.name + " driver's granularity, " +
                      std::to_string(traits_.granularity) + ", or is 0");
  }

  /// The reservation that all of [at, at + size) lies in.
  Ranges::iterator range_of(Address at, std::uint64_t size) {
    const auto found = find(at);
    if (found == ranges_.end() || size > found->second.size - (at - found->first)) {
      refuse(line_, std::to_string(size) + " bytes at an address that is not inside one reservation of the trace");
    }
    return found;
  }
  Ranges::iterator find(Address at) {
    auto found = ranges_.upper_bound(at);
    if (found == ranges_.begin()) return ranges_.end();
    --found;
    return at - found->first < found->second.size ? found : ranges_.end();
  }
  static Address real(const Ranges::iterator& range, Address at) { return range->second.base + (at - range->first); }

  Page& page(std::uint64_t name) {
    const auto found = pages_.find(name);
    if (found == pages_.end() || !found->second.referenced) refuse(line_, "a page that the trace did not create, or released");
    return found->second;
  }

  /// Calls visit for each mapping of [at, at + size), which must be mapped without a gap; `whole`: and cut none.
  template <typename Visit>
  void each_mapping(Range& range, Address at, std::uint64_t size, bool whole, Visit&& visit) {
    if (size == 0) refuse(line_, "size 0");
    auto mapping = range.mapped.upper_bound(at);
    if (mapping == range.mapped.begin()) refuse(line_, "nothing is mapped there");
    --mapping;
    Address reached = whole ? at : mapping->first;
    for (; reached < at + size; ++mapping) {
      if (mapping == range.mapped.end() || mapping->first != reached)
        refuse(line_, "not all of it is mapped, or a mapping is cut");
      reached += mapping->second.size;
      visit(mapping->second);
    }
    if (whole && reached != at + size) refuse(line_, "a mapping is cut");
  }

  void reserve(std::uint64_t size, bool zeros, Address name) {
    check_size(size);
    if (size > limits_.reserved_bytes - reserved_) refuse(line_, "more addresses than a replay may reserve");
    // The trace's own addresses: in 64 bits, and no other reservation's.
    const auto after = ranges_.lower_bound(name);
    if (name + size < name || find(name) != ranges_.end() || (after != ranges_.end() && after->first - name < size)) {
      refuse(line_, "a reservation that overlaps another one");
    }
    const bool can = zeros && traits_.reads_as_zeros;
    const auto made = ranges_.emplace(name, Range{0, size, {}}).first;
    try {
      made->second.base = driver_.reserve(size, can ? UnmappedReads::kZeros : UnmappedReads::kFault);
    } catch (...) {
      ranges_.erase(made);
      throw;
    }
    reserved_ += size;
    called();
  }

  void release_range(Address base, std::uint64_t size) {
    const auto found = ranges_.find(base);
    if (found == ranges_.end() || found->second.size != size || !found->second.mapped.empty()) {
      refuse(line_, "no reservation of that address and size, or something is mapped in it");
    }
    driver_.release_range(found->second.base, size);
    reserved_ -= size;
    ranges_.erase(found);
    called();
  }

  void create(std::uint64_t size, Address near, std::uint64_t name) {
    check_size(size);
    if (pages_.find(name) != pages_.end()) refuse(line_, "a page that exists already");
    if (size > limits_.created_bytes - created_) refuse(line_, "more memory than a replay may create");
    const auto range = find(near);
    const auto made = pages_.emplace(name, Page{0, size, 0, true}).first;
    try {
      made->second.handle = driver_.create(size, near == 0 || range == ranges_.end() ? 0 : real(range, near));
    } catch (...) {
      pages_.erase(made);
      throw;
    }
    created_ += size;
    called();
  }

  void release(std::uint64_t name) {
    Page& known = page(name);
    driver_.release(known.handle);
    known.referenced = false;
    forget_if_gone(name);
    called();
  }

  void forget_if_gone(std::uint64_t name) {
    const auto found = pages_.find(name);
    if (found->second.referenced || found->second.mappings != 0) return;
    created_ -= found->second.size;
    pages_.erase(found);
  }

  void map(Address at, std::uint64_t size, std::uint64_t name) {
    Page& known = page(name);
    if (known.size != size) refuse(line_, "the page has another size");
    const auto range = range_of(at, size);
    if ((at - range->first) % traits_.granularity != 0) refuse(line_, "an address that is not on the granularity");
    auto& mapped = range->second.mapped;
    const auto next = mapped.lower_bound(at);
    if (next != mapped.end() && next->first - at < size) refuse(line_, "mapped already");
    if (next != mapped.begin() && at - std::prev(next)->first < std::prev(next)->second.size) refuse(line_, "mapped already");
    const auto made = mapped.emplace_hint(next, at, Mapping{size, name, false});
    try {
      driver_.map(real(range, at), size, known.handle);
    } catch (...) {
      mapped.erase(made);
      throw;
    }
    ++known.mappings;
    called();
  }

  void unmap(Address at, std::uint64_t size) {
    const auto range = range_of(at, size);
    each_mapping(range->second, at, size, true, [](const Mapping&) {});
    driver_.unmap(real(range, at), size);
    auto& mapped = range->second.mapped;
    for (auto it = mapped.lower_bound(at); it != mapped.end() && it->first < at + size; it = mapped.erase(it)) {
      --pages_.find(it->second.page)->second.mappings;
      forget_if_gone(it->second.page);
    }
    called();
  }

  void set_access(Address at, std::uint64_t size) {
    const auto range = range_of(at, size);
    each_mapping(range->second, at, size, true, [](const Mapping&) {});
    driver_.set_access(real(range, at), size);
    each_mapping(range->second, at, size, true, [](Mapping& mapping) { mapping.accessible = true; });
    called();
  }

  /// Where [at, at + size) is, accessible.
  Address accessible(Address at, std::uint64_t size) {
    const auto range = range_of(at, size);
    each_mapping(range->second, at, size, false, [&](const Mapping& mapping) {
      if (!mapping.accessible) refuse(line_, "memory without access");
    });
    return real(range, at);
  }

  void fill_zero(Address at, std::uint64_t size) {
    driver_.fill_zero(accessible(at, size), size);
    called();
  }

  void copy(Address to, Address from, std::uint64_t size) {
    const Address target = accessible(to, size);
    if (find(from) == ranges_.end()) {
      ++done_.skipped;  // somebody else's memory, which is not here
      return;
    }
    if (std::max(to, from) - std::min(to, from) < size) refuse(line_, "the two overlap");
    driver_.copy(target, accessible(from, size), size);
    called();
  }

  void record(std::uint64_t name) {
    if (fences_.find(name) != fences_.end()) refuse(line_, "a fence that exists already");
    const auto made = fences_.emplace(name, 0).first;
    if (!traits_.has_streams) {
      ++done_.skipped;
      return;
    }
    try {
      made->second = driver_.record(0);
    } catch (...) {
      fences_.erase(made);
      throw;
    }
    called();
  }

  template <typename Call>
  void fence(std::uint64_t name, Call&& call) {
    const auto found = fences_.find(name);
    if (found == fences_.end()) refuse(line_, "a fence that the trace did not record, or dropped");
    if (!traits_.has_streams) {
      ++done_.skipped;
      return;
    }
    call(found->second);
    called();
  }

  void drop(std::uint64_t name) {
    fence(name, [&](FenceHandle handle) { driver_.drop(handle); });
    fences_.erase(name);
  }

  void give_back() noexcept {
    const auto tried = [](auto&& call) {
      try {
        call();
      } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch): it goes with the driver
      }
    };
    for (const auto& fence : fences_) {
      if (traits_.has_streams) driver_.drop(fence.second);
    }
    tried([&] { driver_.synchronize(); });
    for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
      for (const auto& mapping : range->second.mapped) {
        tried([&] { driver_.unmap(real(range, mapping.first), mapping.second.size); });
      }
      tried([&] { driver_.release_range(range->second.base, range->second.size); });
    }
    for (const auto& page : pages_) {
      if (page.second.referenced) tried([&] { driver_.release(page.second.handle); });
    }
  }

  Driver& driver_;
  ReplayLimits limits_;
  DriverTraits traits_;
  std::uint64_t line_ = 0;
  Ranges ranges_;                                ///< by the trace's address
  std::map<std::uint64_t, Page> pages_;          ///< by the trace's handle
  std::map<std::uint64_t, FenceHandle> fences_;  ///< the same; 0 where the driver has none
  std::uint64_t reserved_ = 0;
  std::uint64_t created_ = 0;
  Replayed done_;
};

}  // namespace

Replayed replay_trace(std::istream& trace, Driver& driver, const ReplayLimits& limits, std::uint64_t* failed_line) {
  if (failed_line != nullptr) *failed_line = 0;
  const std::vector<Step> steps = Parser(trace, limits.lines).parse();
  Player player(driver, limits);
  for (const Step& step : steps) {
    if (failed_line != nullptr) *failed_line = step.line;
    player.play(step);
  }
  return player.done();
}

}  // namespace vattn::fuzz
