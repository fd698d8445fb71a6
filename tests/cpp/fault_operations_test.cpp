// The fault suites try every public operation: the methods that the headers declare are read from them, and each must have a
// case, or be named as one that never calls the driver, and then it does not. A new method without either fails here by name.
#include "fault_operations.hpp"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <set>
#include <sstream>

namespace vattn::faults {
namespace {

std::string read_source(const std::string& path) {
  std::ifstream file(std::string(VATTN_SOURCES) + "/" + path);
  EXPECT_TRUE(file.good()) << path;
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string without_comments(const std::string& text) {
  std::string code;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) code += line.substr(0, line.find("//")) + "\n";
  return code;
}

/// The word before the first parenthesis: "step" of "void step(std::span<...> lengths)". Empty: no function.
std::string function_name(const std::string& declaration) {
  const std::size_t open = declaration.find('(');
  if (open == std::string::npos) return {};
  std::size_t end = open;
  while (end != 0 && std::isspace(static_cast<unsigned char>(declaration[end - 1])) != 0) --end;
  std::size_t begin = end;
  const auto in_name = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_' || c == '~'; };
  while (begin != 0 && in_name(declaration[begin - 1])) --begin;
  return declaration.substr(begin, end - begin);
}

/// The public methods of a class, up to a line that says who the rest is for: "KVCache::step#1", numbered where there are
/// several.
std::vector<std::string> public_methods(const std::string& path, const std::string& name, const std::string& until) {
  const std::string all = read_source(path);
  const std::string code = without_comments(until.empty() ? all : all.substr(0, all.find(until)));
  const std::size_t start = code.find("class VATTN_API " + name);
  EXPECT_NE(start, std::string::npos) << name << " is not in " << path;
  std::vector<std::string> declarations;
  std::string one;
  int depth = 0;
  int parentheses = 0;
  bool is_public = false;
  for (std::size_t at = code.find('{', start); at < code.size(); ++at) {
    const char c = code[at];
    if (c == '(') ++parentheses;
    if (c == ')') --parentheses;
    if (parentheses == 0 && c == '{' && ++depth >= 1) {
      if (depth == 1) one.clear();
      continue;
    }
    if (parentheses == 0 && c == '}') {
      if (--depth == 0) break;
      if (depth == 1 && is_public) declarations.push_back(one);
      if (depth == 1) one.clear();
      continue;
    }
    if (depth != 1) continue;
    if (parentheses == 0 && c == ';') {
      if (is_public) declarations.push_back(one);
      one.clear();
      continue;
    }
    one += c;
    for (const char* const access : {"public:", "private:", "protected:"}) {
      const std::size_t found = one.find(access);
      if (found == std::string::npos) continue;
      is_public = access == std::string("public:");
      one.clear();
    }
  }
  std::vector<std::string> names;
  for (const std::string& declaration : declarations) {
    const std::string method = function_name(declaration);
    if (!method.empty() && declaration.find("= delete") == std::string::npos) names.push_back(name + "::" + method);
  }
  std::vector<std::string> numbered;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto several = std::count(names.begin(), names.end(), names[i]);
    const auto number = std::count(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i) + 1, names[i]);
    numbered.push_back(several == 1 ? names[i] : names[i] + "#" + std::to_string(number));
  }
  return numbered;
}

std::set<std::string> declared() {
  std::set<std::string> all;
  for (const auto& [path, name, until] : std::vector<std::array<std::string, 3>>{
           {"vattn/kv/kv_cache.hpp", "KVCache", ""},
           {"vattn/tensor/growable_tensor.hpp", "GrowableTensor", ""},
           {"vattn/memory/page_pool.hpp", "PagePool", "// For holders."},
       }) {
    const auto methods = public_methods(path, name, until);
    all.insert(methods.begin(), methods.end());
  }
  return all;
}

TEST(FaultOperations, EveryPublicMethodOfTheHeadersIsTriedOrIsNamedAsOneThatCallsNoDriver) {
  std::set<std::string> known;
  for (const Operation& operation : operations()) known.insert(operation.name);
  for (const Quiet& quiet : quiet_operations()) {
    EXPECT_TRUE(known.insert(quiet.name).second) << quiet.name << " is in both lists";
  }
  const std::set<std::string> methods = declared();
  for (const std::string& method : methods) {
    EXPECT_EQ(known.count(method), 1U) << method << " is new: give it a case in fault_operations.cpp, operations(), or, if it "
                                       << "calls no driver, a line in quiet_operations()";
  }
  for (const std::string& name : known) EXPECT_EQ(methods.count(name), 1U) << name << " is no public method any more";
  EXPECT_GT(methods.size(), 50U) << "the headers were not understood";
}

class QuietOperations : public testing::TestWithParam<DriverUnderTest> {};

TEST_P(QuietOperations, CallNoDriver) {
  for (const Quiet& quiet : quiet_operations()) {
    World world(GetParam(), everything(GetParam()));
    const auto calls = [&] {
      std::vector<std::uint64_t> each;
      for (std::size_t verb = 0; verb < kVerbs; ++verb) each.push_back(world.counts->calls(static_cast<Verb>(verb)));
      if (world.on_fake) each.push_back(fake_cuda_calls(nullptr));
      return each;
    };
    const auto before = calls();
    quiet.run(world);
    EXPECT_EQ(calls(), before) << quiet.name;
    EXPECT_EQ(world.end(), "") << quiet.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Every, QuietOperations, testing::ValuesIn(drivers_with_memory()), name_of_driver);

}  // namespace
}  // namespace vattn::faults
