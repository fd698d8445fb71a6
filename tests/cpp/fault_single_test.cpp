// Any single failure of the driver leaves state unchanged: for every public operation the k-th call fails, for every k that is
// reached, once and for ever, with four codes; by the decorator on the host's and on CUDA's driver, and inside the fake
// libcuda, so that the CUDA driver's own ways out run as well. Afterwards the operation either did all it says, or lengths,
// promised and mapped bytes, live handles, reservations, fences, file descriptors and statistics are as before; the retry
// succeeds, closing succeeds, and nothing is alive. What a close could not give back, it counts.
#include "fault_operations.hpp"

namespace vattn::faults {
namespace {

constexpr int kMostReports = 10;

class SingleFault : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void TearDown() override { RecordProperty("cases", std::to_string(cases_)); }

  struct Case {
    const Operation& operation;
    const Setting& setting;
    const Code& code;
    bool sticky;
    std::uint64_t k;
    bool in_library;
  };

  static std::string describe(const Case& one) {
    return one.operation.name + " " + one.operation.what + " (" + one.setting.name + "), call " + std::to_string(one.k) +
           (one.in_library ? " of the library " : " of the driver ") + (one.sticky ? "and all later ones " : "") +
           "failed with " + one.code.name + ": ";
  }

  static Strict strict(const Case& one) {
    if (one.sticky) return is_constructor(one.operation) ? Strict::kUnmade : Strict::kLossless;
    return one.setting.tight ? Strict::kButExcess : Strict::kAll;
  }

  /// Whether the call was reached.
  bool reaches(const Case& one) {
    World world(GetParam(), one.setting);
    if (one.operation.prepare) one.operation.prepare(world);
    const State before(world);
    std::string wrong = before.unsound;
    if (one.in_library) {
      fake_cuda_fail(nullptr, one.k, one.code.code, one.sticky ? 1 : 0);
    } else {
      world.first->arm({one.k, one.sticky, {}, one.code.code, one.code.name, one.code.out_of_memory});
    }
    const std::uint64_t fired_before = one.in_library ? fake_cuda_faults_fired() : 0;
    const Outcome outcome = attempt([&] { one.operation.run(world); });
    const std::uint64_t fired = one.in_library ? fake_cuda_faults_fired() - fired_before : world.first->failed();
    if (one.in_library) fake_cuda_clear_faults();
    world.first->disarm();
    if (fired == 0) {
      if (outcome.failed) ADD_FAILURE() << describe(one) << "nothing failed, and it threw: " << outcome.message;
      if (!one.operation.done(world)) ADD_FAILURE() << describe(one) << "nothing failed, and it is not done";
      const std::string left = world.end();
      if (!left.empty()) ADD_FAILURE() << describe(one) << "left when nothing failed: " << left;
      return false;
    }
    ++cases_;
    wrong += judge(world, one, before, outcome);
    const std::string left = world.end();
    if (!left.empty() && !(one.sticky && opens_driver(one.operation))) wrong += "alive at the end: " + left;
    if (!wrong.empty() && ++reports_ <= kMostReports) {
      ADD_FAILURE() << describe(one) << wrong << (outcome.failed ? "it threw: " + outcome.message : "it did not throw");
    }
    return true;
  }

  static std::string judge(World& world, const Case& one, const State& before, const Outcome& outcome) {
    std::string wrong;
    if (outcome.untyped) wrong += "not one of vattn's errors; ";
    if (one.operation.ends) {
      if (one.operation.name.find('~') == std::string::npos) {
        if (!one.operation.done(world)) wrong += "it is not closed; ";
        wrong += misreported(world, one.operation, outcome);
        if (attempt([&] { one.operation.run(world); }).failed) wrong += "a second close failed; ";
      }
      return wrong;
    }
    if (outcome.failed) {
      // A release or a look at how much there is may fail on the way to another answer; the code is that of a call all the
      // same.
      if (outcome.code != 0 && outcome.code != one.code.code) wrong += "the code is " + std::to_string(outcome.code) + "; ";
      wrong += differences(before, State(world), strict(one));
      if (const Outcome again = attempt([&] { one.operation.run(world); }); again.failed) {
        wrong += "the retry failed: " + again.message + "; ";
      }
    } else {
      wrong += State(world).unsound;
    }
    if (!one.operation.done(world)) wrong += "it is not done; ";
    wrong += State(world).unsound;
    if (const Outcome closing = attempt([&] { world.close(); }); closing.failed)
      wrong += "close failed: " + closing.message + "; ";
    return wrong + left_after_close(world, strict(one) == Strict::kUnmade);
  }

  void try_all(bool in_library) {
    const std::uint8_t here = in_library ? kLibrary : (GetParam().name == "host" ? kHost : kCuda);
    for (const Operation& operation : operations()) {
      for (const Setting& setting : operation.settings) {
        if (!applies(setting, GetParam())) continue;
        const auto& codes = in_library ? kLibraryCodes : kDriverCodes;
        const bool by_turns = in_library && !wants_all();
        for (std::size_t i = 0; i < (by_turns ? 2 : std::size(codes)); ++i) {
          for (const bool sticky : {false, true}) {
            std::uint64_t k = 1;
            const auto code = [&]() -> const Code& { return codes[by_turns && i != 0 ? 1 + k % 3 : i]; };
            while (reaches({operation, setting, code(), sticky, k, in_library})) ++k;
            EXPECT_EQ(k > 1, (operation.reach & here) != 0)
                << operation.name << " (" << setting.name << ") makes " << k - 1 << " calls";
          }
        }
      }
    }
    EXPECT_LE(reports_, kMostReports) << "more of them were not shown";
    EXPECT_GT(cases_, 1000U);
  }

  std::uint64_t cases_ = 0;
  int reports_ = 0;
};

TEST_P(SingleFault, OfTheDriverChangesNothingAndTheRetrySucceeds) { try_all(false); }

TEST_P(SingleFault, OfTheLibraryChangesNothingAndTheRetrySucceeds) {
  if (GetParam().name != "cuda" || !cuda::on_fake()) GTEST_SKIP() << "steers the fake library";
  try_all(true);
}

INSTANTIATE_TEST_SUITE_P(Every, SingleFault, testing::ValuesIn(drivers_with_memory()), name_of_driver);

}  // namespace
}  // namespace vattn::faults
