// Every public operation of KVCache, GrowableTensor and PagePool, each with worlds to try it in: for the suites that make
// driver calls fail (fault_*_test.cpp).
//
// A world is a pool, a cache and a tensor in the middle of their lives: slots in use, one that is warm, one that gave up its
// tail; on the fake CUDA also with work on streams that has not finished. No look-ahead thread, so that the k-th call is the
// same call every time. Beneath them is counting(fault(fault(ledger(driver)))): two faults that may strike one after the other,
// and a ledger of what the driver really has. State is everything that a failed operation must leave as it was.
// Thread: the main one.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn::faults {

/// What the driver has: bytes mapped, and reservations.
class Ledger final : public Decorator {
 public:
  using Decorator::Decorator;
  [[nodiscard]] Address reserve(std::size_t size, UnmappedReads reads) override;
  void release_range(Address base, std::size_t size) override;
  void map(Address at, std::size_t size, PageHandle page) override;
  void unmap(Address at, std::size_t size) override;
  void synchronize() override;
  void wait(FenceHandle fence) override;

  /// Called before anything is waited for: whatever a test began must end by then.
  std::function<void()> before_wait = [] {};
  std::uint64_t mapped_bytes = 0;
  std::map<Address, std::size_t> ranges{};
};

enum class Has : std::uint8_t { kNothing, kCache, kTensor, kPool };  ///< kPool: a pool with a cache and a tensor

struct Setting {
  const char* name;
  Has has = Has::kCache;
  bool tight = false;  ///< the limit is what a step needs, so that warm pages must be taken back for it
  std::int64_t guard = 0;
  bool scrub = false;
  bool streams = false;  ///< on the fake CUDA: work that has not finished guards what slots 1 and 2 gave up
};

/// Where the operation is tried, and calls of the driver are reached; elsewhere it makes none.
enum Reach : std::uint8_t { kHost = 1, kCuda = 2, kLibrary = 4, kDrivers = kHost | kCuda, kEverywhere = 7 };

class World {
 public:
  World(const DriverUnderTest& driver, const Setting& setting);
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  ~World();

  [[nodiscard]] CacheConfig cache_config() const;
  [[nodiscard]] GrowableTensor::Config tensor_config() const;
  [[nodiscard]] std::int64_t pages(std::int64_t count) const { return count * page; }
  /// Ends the work that guards memory.
  void end_kernels();
  /// Closes everything; what a close says is thrown.
  void close();
  /// Takes everything apart, faults disarmed, and says what is still alive; empty: nothing.
  [[nodiscard]] std::string end();

  const Setting setting;
  bool on_fake = false;
  int fds = 0;
  std::shared_ptr<Ledger> ledger{};
  std::shared_ptr<FaultDriver> second{};  ///< sees only the calls that `first` let through
  std::shared_ptr<FaultDriver> first{};
  std::shared_ptr<CountingDriver> counts{};
  std::int64_t page = 0;
  Device device{};
  std::shared_ptr<PagePool> pool{};
  std::unique_ptr<KVCache> cache{};
  std::unique_ptr<GrowableTensor> tensor{};
  std::shared_ptr<PagePool> made_pool{};  ///< by the operation
  std::unique_ptr<KVCache> made_cache{};
  std::unique_ptr<GrowableTensor> made_tensor{};
  Stream stream = 0;
  Stream other = 0;

 private:
  std::vector<std::uint64_t> kernels_{};
  bool ended_ = false;
};

/// Everything that can be seen of a world.
struct State {
  explicit State(const World& world);

  std::vector<std::int64_t> slots{};
  std::vector<std::int64_t> lengths{};
  std::vector<std::int64_t> committed{};
  std::vector<std::uint64_t> requests{};  ///< the counts of prompts and steps
  std::int64_t rows = 0;
  std::uint64_t limit = 0;
  std::uint64_t used = 0;
  std::uint64_t created = 0;   ///< live handles of pages, in bytes
  std::uint64_t promised = 0;  ///< mapped and not excess
  std::uint64_t excess = 0;
  std::uint64_t made = 0;  ///< pages created and reused, ever
  std::uint64_t reused = 0;
  CountingDriver::Alive alive{};
  std::uint64_t mapped_at_driver = 0;
  std::vector<std::uint64_t> at_library{};  ///< handles, references, mappings, reservations, context references, streams, depth
  int fds = 0;
  std::string unsound{};  ///< which count contradicts another
};

/// What a failed operation may not leave alone.
enum class Strict : std::uint8_t {
  kAll,        ///< one failure: everything is as before
  kButExcess,  ///< as before, but excess was taken back
  kLossless,   ///< undoing failed too: no promise is broken, and every page that stays is counted
  kUnmade,     ///< as kLossless, of a constructor
};
/// In words; empty: as it should be.
[[nodiscard]] std::string differences(const State& before, const State& after, Strict strict);

struct Operation {
  std::string name;  ///< as in the header, "KVCache::step", with "#n" for the n-th of several of one name
  std::string what;  ///< which of its ways
  std::vector<Setting> settings;
  std::uint8_t reach = kEverywhere;
  std::function<void(World&)> run;
  /// Whether it has done all it says.
  std::function<bool(World&)> done;
  std::function<void(World&)> prepare = nullptr;
  bool ends = false;  ///< closes or destroys: there is no way back from it
};

/// Whether it is a constructor. Addresses that a failed one could not give back either are nobody's: they go with the driver.
[[nodiscard]] bool is_constructor(const Operation& operation);

/// Whether it opens the driver itself, so that a failing library has nothing left to give back with.
[[nodiscard]] inline bool opens_driver(const Operation& operation) {
  return operation.settings.front().has == Has::kNothing && operation.reach == kLibrary;
}

/// What is alive after everything was closed; empty: nothing, but for the addresses of failed constructors where `lossy`.
[[nodiscard]] std::string left_after_close(const World& world, bool lossy);

/// Those that call the driver.
[[nodiscard]] const std::vector<Operation>& operations();

struct Quiet {
  std::string name;
  std::function<void(World&)> run;
};
/// Those that never do.
[[nodiscard]] const std::vector<Quiet>& quiet_operations();

/// A world that has a bit of everything, for those.
[[nodiscard]] Setting everything(const DriverUnderTest& driver);

struct Code {
  int code;
  const char* name;
  bool out_of_memory;
};
inline constexpr Code kDriverCodes[] = {
    {12, "ENOMEM", true}, {5, "EIO", false}, {1, "CUDA_ERROR_INVALID_VALUE", false}, {999, "CUDA_ERROR_UNKNOWN", false}};
inline constexpr Code kLibraryCodes[] = {{2, "CUDA_ERROR_OUT_OF_MEMORY", true},
                                         {1, "CUDA_ERROR_INVALID_VALUE", false},
                                         {700, "CUDA_ERROR_ILLEGAL_ADDRESS", false},
                                         {999, "CUDA_ERROR_UNKNOWN", false}};

/// The outcome of an operation: whether it threw, and what.
struct Outcome {
  bool failed = false;
  int code = 0;  ///< of a DriverError
  bool out_of_memory = false;
  std::string message{};
  bool untyped = false;  ///< it was none of vattn's errors
};
[[nodiscard]] Outcome attempt(const std::function<void()>& call);

/// What a close that failed must have counted, against what is left; empty: they agree.
[[nodiscard]] std::string misreported(const World& world, const Operation& operation, const Outcome& outcome);

/// VATTN_FAULTS=all: every code at every call of the library, which takes minutes; else out of memory, and the others by turns.
[[nodiscard]] bool wants_all();

[[nodiscard]] std::vector<DriverUnderTest> drivers_with_memory();
/// Whether the setting can be made on the driver.
[[nodiscard]] bool applies(const Setting& setting, const DriverUnderTest& driver);

}  // namespace vattn::faults
