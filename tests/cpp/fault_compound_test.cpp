// A second failure while the first is undone, or while everything is closed: nothing terminates, no count becomes wrong, and
// what could not be given back is counted and said. For every public operation: the k-th call fails and then the m-th after it,
// for all pairs that are reached; the k-th call fails and from then on every call of one of the verbs that give back; and the
// same again with close in place of the retry.
#include "fault_operations.hpp"

namespace vattn::faults {
namespace {

constexpr int kMostReports = 10;

class CompoundFault : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void TearDown() override { RecordProperty("cases", std::to_string(cases_)); }

  /// What the driver calls on the way to something; the rest is about contexts.
  static constexpr const char* kEntries[] = {"cuMemAddressReserve", "cuMemCreate",       "cuMemMap",         "cuMemSetAccess",
                                             "cuMemsetD8Async",     "cuMemcpyDtoDAsync", "cuEventCreate",    "cuEventRecord",
                                             "cuStreamSynchronize", "cuStreamWaitEvent", "cuCtxPushCurrent", "cuCtxSynchronize",
                                             "cuMemUnmap",          "cuMemRelease",      "cuMemAddressFree"};
  static constexpr Verb kGivingBack[] = {Verb::kUnmap, Verb::kRelease, Verb::kSynchronize, Verb::kReleaseRange};

  using Arm = std::function<void(World&)>;
  /// Runs with both faults armed, checks every count, then finishes: with a retry and a close, or with a close under the
  /// second. Whether both struck.
  bool strikes(const Operation& operation, const Setting& setting, const std::string& what, const Arm& arm,
               bool close_under_fire) {
    World world(GetParam(), setting);
    if (operation.prepare) operation.prepare(world);
    const State before(world);
    arm(world);
    const std::uint64_t library_before = world.on_fake ? fake_cuda_faults_fired() : 0;
    const Outcome outcome = attempt([&] { operation.run(world); });
    const bool both = in_library_ ? fake_cuda_faults_fired() - library_before >= 2
                                  : world.first->failed() != 0 && world.second->failed() != 0;
    // The first struck, and the second waits for close.
    const bool either = in_library_ ? fake_cuda_faults_fired() != library_before : world.first->failed() != 0;
    std::string wrong;
    if (outcome.untyped) wrong += "not one of vattn's errors; ";
    if (either) {
      ++cases_;
      wrong += finish(world, operation, before, outcome, close_under_fire);
    }
    const std::string left = world.end();
    if (!left.empty() && !opens_driver(operation)) wrong += "alive at the end: " + left;
    if (!wrong.empty() && ++reports_ <= kMostReports) {
      ADD_FAILURE() << operation.name << " " << operation.what << " (" << setting.name << "), " << what << ": " << wrong
                    << (outcome.failed ? "it threw: " + outcome.message : "it did not throw");
    }
    return close_under_fire ? either : both;
  }

  std::string finish(World& world, const Operation& operation, const State& before, const Outcome& outcome, bool under_fire) {
    std::string wrong;
    const auto disarm = [&] {
      if (in_library_) fake_cuda_clear_faults();
      world.first->disarm();
      world.second->disarm();
    };
    if (operation.ends) {
      disarm();
      if (operation.name.find('~') != std::string::npos) return {};
      if (!operation.done(world)) wrong += "it is not closed; ";
      wrong += misreported(world, operation, outcome);
      if (attempt([&] { operation.run(world); }).failed) wrong += "a second close failed; ";
      return wrong;
    }
    if (!under_fire) disarm();
    const State after(world);
    const Strict strict = is_constructor(operation) ? Strict::kUnmade : Strict::kLossless;
    wrong += outcome.failed ? differences(before, after, strict) : after.unsound;
    if (!under_fire) {
      if (outcome.failed) {
        if (const Outcome again = attempt([&] { operation.run(world); }); again.failed) {
          wrong += "the retry failed: " + again.message + "; ";
        }
      }
      if (!operation.done(world)) wrong += "it is not done; ";
      wrong += State(world).unsound;
      if (const Outcome closing = attempt([&] { world.close(); }); closing.failed) wrong += "close failed: " + closing.message;
      return wrong + left_after_close(world, strict == Strict::kUnmade);
    }
    world.end_kernels();
    if (world.cache) {
      const Operation close{"KVCache::close", {}, {}, 0, [](World& of) { of.cache->close(); }, nullptr};
      const Outcome closing = attempt([&] { close.run(world); });
      if (!world.cache->is_closed()) wrong += "the cache is not closed; ";
      if (closing.untyped) wrong += "close: not one of vattn's errors; ";
      wrong += misreported(world, close, closing);
    }
    if (world.tensor) {
      const Operation close{"GrowableTensor::close", {}, {}, 0, [](World& of) { of.tensor->close(); }, nullptr};
      const Outcome closing = attempt([&] { close.run(world); });
      if (!world.tensor->is_closed()) wrong += "the tensor is not closed; ";
      if (closing.untyped) wrong += "close: not one of vattn's errors; ";
      wrong += misreported(world, close, closing);
    }
    disarm();
    return wrong;
  }

  template <typename Try>
  void for_all(Try&& one) {
    for (const Operation& operation : operations()) {
      for (const Setting& setting : operation.settings) {
        if (applies(setting, GetParam())) one(operation, setting);
      }
    }
    EXPECT_LE(reports_, kMostReports) << "more of them were not shown";
    EXPECT_GT(cases_, 100U);
  }

  std::uint64_t cases_ = 0;
  int reports_ = 0;
  bool in_library_ = false;
};

TEST_P(CompoundFault, OfAnyTwoCallsLosesNothing) {
  for_all([&](const Operation& operation, const Setting& setting) {
    for (std::uint64_t k = 1;; ++k) {
      bool first_struck = false;
      for (std::uint64_t m = 1;; ++m) {
        const auto arm = [&](World& world) {
          world.first->arm({k, false, {}, 12, "ENOMEM", true});
          world.second->arm({k - 1 + m, false, {}, 5, "EIO", false});
        };
        const std::uint64_t before = cases_;
        const bool both =
            strikes(operation, setting, "calls " + std::to_string(k) + " and " + std::to_string(k + m) + " failed", arm, false);
        first_struck = first_struck || cases_ != before;
        if (!both) break;
      }
      if (!first_struck) break;
    }
  });
}

TEST_P(CompoundFault, OfACallAndOfAllThatGiveBackLosesNothing) {
  for_all([&](const Operation& operation, const Setting& setting) {
    for (const Verb verb : kGivingBack) {
      for (std::uint64_t k = 1;; ++k) {
        const std::uint64_t before = cases_;
        for (const bool under_fire : {false, true}) {
          const auto arm = [&](World& world) {
            world.first->arm({k, false, {}, 5, "EIO", false});
            world.second->arm({1, true, verb, 999, "CUDA_ERROR_UNKNOWN", false});
          };
          static_cast<void>(strikes(
              operation, setting,
              "call " + std::to_string(k) + " and every " + name_of(verb) + " failed" + (under_fire ? ", in close too" : ""),
              arm, under_fire));
        }
        if (cases_ == before) break;
      }
    }
  });
}

TEST_P(CompoundFault, OfTheLibraryLosesNothing) {
  if (GetParam().name != "cuda" || !cuda::on_fake()) GTEST_SKIP() << "steers the fake library";
  in_library_ = true;
  for_all([&](const Operation& operation, const Setting& setting) {
    // Which entries it calls, how often.
    std::vector<std::pair<const char*, std::uint64_t>> calls;
    {
      World world(GetParam(), setting);
      if (operation.prepare) operation.prepare(world);
      for (const char* const entry : kEntries) calls.emplace_back(entry, fake_cuda_calls(entry));
      static_cast<void>(attempt([&] { operation.run(world); }));
      for (auto& [entry, count] : calls) count = fake_cuda_calls(entry) - count;
    }
    for (const auto& [entry, count] : calls) {
      for (std::uint64_t k = 1; k <= count; ++k) {
        for (const char* const next : {"cuMemUnmap", "cuMemRelease", "cuCtxSynchronize", "itself"}) {
          const auto arm = [&, in = entry](World&) {
            fake_cuda_fail(in, k, 1, 0);
            fake_cuda_fail(std::string(next) == "itself" ? in : next, std::string(next) == "itself" ? k : 1, 999, 1);
          };
          const std::string what = std::string(entry) + " " + std::to_string(k) + " and every " + next + " failed";
          static_cast<void>(strikes(operation, setting, what, arm, false));
        }
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Every, CompoundFault, testing::ValuesIn(drivers_with_memory()), name_of_driver);

}  // namespace
}  // namespace vattn::faults
