#include "operation_program.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/cuda_driver.hpp"
#include "cuda_under_test.hpp"
#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/decorators/fault_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/driver/null/null_driver.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/memory/page_pool.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn::fuzz {
namespace {

constexpr std::int64_t kSlots = 3;
constexpr std::int64_t kGuard = 2;
constexpr std::int64_t kKernelMicroseconds = 60;

/// The program's bytes, one after the other; zeros behind the last.
class Bytes {
 public:
  explicit Bytes(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}
  [[nodiscard]] bool empty() const noexcept { return at_ >= bytes_.size(); }
  std::uint8_t next() noexcept { return empty() ? std::uint8_t{0} : bytes_[at_++]; }
  std::int64_t below(std::int64_t bound) noexcept { return next() % bound; }

 private:
  std::span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
};

unsigned char* pointer(Address at) { return reinterpret_cast<unsigned char*>(at); }

/// One cache and what the model knows of it.
struct ModelCache {
  int id = 0;
  CacheConfig config{};
  std::unique_ptr<KVCache> cache{};
  Stream stream = 0;  ///< where its kernels run
  struct Slot {
    bool active = false;
    std::int64_t length = 0;
    std::int64_t most = 0;    ///< the longest this request was
    std::uint32_t epoch = 0;  ///< which request
  };
  std::array<Slot, kSlots> slots{};

  [[nodiscard]] std::int64_t active() const {
    return std::count_if(slots.begin(), slots.end(), [](const Slot& slot) { return slot.active; });
  }
};

class Program {
 public:
  explicit Program(std::span<const std::uint8_t> bytes)
      : bytes_(bytes), verbose_(std::getenv("VATTN_FUZZ_VERBOSE") != nullptr) {
    const std::int64_t kind = bytes_.below(3);
    on_fake_ = kind == 2 && cuda::on_fake();
    if (on_fake_) {
      fake_cuda_reset();
      fake_cuda_set_granularity(std::uint64_t{1} << 16, std::uint64_t{1} << 16);
      fake_cuda_set_fill(-1);
    }
    const auto features = bytes_.next();
    const auto pages = static_cast<std::uint64_t>(8 + bytes_.below(on_fake_ ? 48 : 80));
    faults_ = std::make_shared<FaultDriver>(on_fake_    ? open_cuda_driver(0)
                                            : kind == 1 ? open_host_driver()
                                                        : open_null_driver());
    driver_ = std::make_shared<CountingDriver>(faults_);
    const DriverTraits& traits = driver_->traits();
    page_ = static_cast<std::int64_t>(traits.granularity);
    has_memory_ = traits.has_memory;
    pool_ = PagePool::make(Device{}, driver_, traits.granularity, pages * traits.granularity);
    for (int id = 0; id < 2; ++id) {
      ModelCache& model = caches_[static_cast<std::size_t>(id)];
      model.id = id;
      if (on_fake_) model.stream = fake_cuda_stream_create(0);
      model.config = config_of(id, features);
      has_mapper_ = has_mapper_ || model.config.lookahead_tokens != 0;
    }
    say("driver " + std::string(traits.name) + " features " + std::to_string(features) + " limit " + std::to_string(pages) +
        " pages");
    for (ModelCache& model : caches_) open(model);
    GrowableTensor::Config rows;
    row_bytes_ = 3 * page_ / 8;
    rows.row_shape = {row_bytes_};
    rows.max_rows = 24;
    rows.dtype = DType::kUInt8;
    tensor_ = std::make_unique<GrowableTensor>(rows, pool_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program() {
    faults_->disarm();
    views_.clear();
    tensor_.reset();
    for (ModelCache& model : caches_) {
      model.cache.reset();
      if (on_fake_) fake_cuda_stream_destroy(model.stream);
    }
    pool_.reset();
    driver_.reset();
    faults_.reset();
    if (on_fake_) fake_cuda_reset();
  }

  void run() {
    check("open");
    for (; !bytes_.empty() && number_ < kMostOperations; ++number_) {
      const auto& operation = kOperations[static_cast<std::size_t>(bytes_.below(std::ssize(kOperations)))];
      say(operation.name);
      (this->*operation.run)();
      check(operation.name);
    }
    finish();
  }

 private:
  struct Operation {
    const char* name;
    void (Program::*run)();
  };
  static const std::array<Operation, 20> kOperations;

  void say(const std::string& what) const {
    if (verbose_) std::fprintf(stderr, "%zu %s\n", number_, what.c_str());
  }
  [[noreturn]] void violation(const std::string& what) const {
    throw Violation("operation " + std::to_string(number_) + ", " + operation_ + ": " + what);
  }
  void expect(bool holds, const std::string& what) const {
    if (!holds) violation(what);
  }

  // A: token-major, 10.67 tokens a page of K, so that tokens cross pages; V half as wide. B: head-major, 8 tokens a page.
  [[nodiscard]] CacheConfig config_of(int id, std::uint8_t features) const {
    CacheConfig config;
    const auto has = [&](int bit) { return (features >> bit & 1) != 0; };
    const int first = 3 * id;
    config.dtype = DType::kUInt8;
    config.max_batch_size = kSlots;
    config.lookahead_tokens = has(first) ? 9 : 0;
    config.scrub = has(first + 1);
    config.guard_tokens = has(first + 2) ? kGuard : 0;
    if (id == 0) {
      config.num_layers = 2;
      config.num_kv_heads = 2;
      config.layers_per_tensor = has(6) ? 2 : 1;
      config.head_dim = 3 * page_ / 64 / *config.layers_per_tensor;
      config.v_head_dim = config.head_dim / 2;
      config.max_seq_len = 64;
      config.layout = Layout::kNHD;
    } else {
      config.num_layers = 1;
      config.num_kv_heads = 2;
      config.head_dim = page_ / 8;
      if (has(7)) config.v_head_dim = 0;
      config.max_seq_len = 40;
      config.layout = Layout::kHND;
    }
    return config;
  }

  // ---- calls, and what they may throw

  enum class Result : std::uint8_t { kDone, kNoMemory, kFailed };

  /// A call that may fail for want of memory, or because faults are on.
  Result attempt(const std::function<void()>& call) {
    try {
      call();
      return Result::kDone;
    } catch (const OutOfMemoryError& error) {
      say(std::string("  ") + error.what());
      expect(std::string(error.what()).size() > 10, "an error without words");
      return Result::kNoMemory;
    } catch (const DriverError& error) {
      say(std::string("  ") + error.what());
      expect(armed_, std::string("a driver error with no fault on: ") + error.what());
      return Result::kFailed;
    } catch (const Violation&) {
      throw;
    } catch (const std::exception& error) {
      violation(std::string("undocumented error: ") + error.what());
    }
  }

  template <typename Expected>
  void refused(const char* what, const std::function<void()>& call) {
    try {
      call();
    } catch (const Expected&) {
      return;
    } catch (const std::exception& error) {
      violation(std::string(what) + ": another error than documented: " + error.what());
    }
    violation(std::string(what) + ": not refused");
  }

  [[nodiscard]] ModelCache& any_cache() { return caches_[static_cast<std::size_t>(bytes_.below(2))]; }
  [[nodiscard]] std::optional<Stream> stream_of(const ModelCache& model) {
    const bool named = bytes_.below(4) != 0;
    return on_fake_ && named ? std::optional(model.stream) : std::nullopt;
  }

  void open(ModelCache& model) {
    model.slots = {};
    const auto group = static_cast<std::uint64_t>(Geometry(paged(model.config), driver_->traits()).pages_per_group() * page_);
    if (pool_->memory_limit() < group) {
      refused<std::invalid_argument>("a cache in a pool too small", [&] { KVCache(model.config, pool_); });
      return;
    }
    const auto alive = driver_->alive();
    const Result result = attempt([&] { model.cache = std::make_unique<KVCache>(model.config, pool_); });
    if (result == Result::kDone) {
      const auto recorded = attempt([&] {
        if (on_fake_ && model.id == 1) model.cache->record_stream(model.stream);
      });
      expect(recorded == Result::kDone, "record_stream failed");
    } else {
      model.cache.reset();
      if (sticky_) lossy_ = true;
      expect(lossy_ || driver_->alive().reservations == alive.reservations, "a cache that could not be made left reservations");
    }
  }
  [[nodiscard]] CacheConfig paged(CacheConfig config) const {
    config.page_size = page_;
    return config;
  }

  // ---- operations

  void alloc() {
    ModelCache& model = any_cache();
    const auto expected = bytes_.next();
    const auto stream = stream_of(model);
    if (!model.cache) return;
    std::int64_t slot = -1;
    if (model.active() == kSlots) {
      refused<NoFreeSlotError>("alloc with no free slot", [&] { slot = model.cache->alloc({}, stream); });
      return;
    }
    const auto length = expected < 128 ? std::optional<std::int64_t>(expected % (model.config.max_seq_len + 1)) : std::nullopt;
    if (attempt([&] { slot = model.cache->alloc(length, stream); }) == Result::kDone) take(model, slot);
  }

  void take(ModelCache& model, std::int64_t slot) {
    expect(slot >= 0 && slot < kSlots, "a slot that there is not: " + std::to_string(slot));
    auto& taken = model.slots[static_cast<std::size_t>(slot)];
    expect(!taken.active, "slot " + std::to_string(slot) + " was handed out twice");
    taken = {true, 0, 0, ++epochs_};
  }

  void alloc_block() {
    ModelCache& model = any_cache();
    const std::int64_t count = 1 + bytes_.below(kSlots);
    const auto stream = stream_of(model);
    if (!model.cache) return;
    bool possible = false;
    for (std::int64_t first = 0; first + count <= kSlots; ++first) {
      bool all = true;
      for (std::int64_t i = first; i < first + count; ++i) all = all && !model.slots[static_cast<std::size_t>(i)].active;
      possible = possible || all;
    }
    std::vector<std::int64_t> block;
    if (!possible) {
      refused<NoFreeSlotError>("alloc_block", [&] { block = model.cache->alloc_block(count, stream); });
      return;
    }
    if (attempt([&] { block = model.cache->alloc_block(count, stream); }) != Result::kDone) return;
    expect(std::ssize(block) == count, "a block of another size");
    for (const std::int64_t slot : block) take(model, slot);
  }

  void free() {
    ModelCache& model = any_cache();
    const std::int64_t slot = bytes_.below(kSlots);
    const auto stream = stream_of(model);
    if (!model.cache) return;
    auto& known = model.slots[static_cast<std::size_t>(slot)];
    if (!known.active) {
      refused<std::invalid_argument>("free of a free slot", [&] { model.cache->free(slot, stream); });
      return;
    }
    if (attempt([&] { model.cache->free(slot, stream); }) == Result::kDone) known = {};
  }

  void step() {
    ModelCache& model = any_cache();
    std::array<std::int64_t, kSlots> lengths{};
    for (std::int64_t& length : lengths) length = bytes_.below(model.config.max_seq_len + 1);
    step_to(model, lengths);
  }

  /// Every slot in use a few tokens more.
  void decode() {
    ModelCache& model = any_cache();
    const std::int64_t more = 1 + bytes_.below(4);
    std::array<std::int64_t, kSlots> lengths{};
    for (std::size_t slot = 0; slot < lengths.size(); ++slot) {
      if (model.slots[slot].active) lengths[slot] = std::min(model.slots[slot].length + more, model.config.max_seq_len);
    }
    step_to(model, lengths);
  }

  void step_to(ModelCache& model, std::array<std::int64_t, kSlots> lengths) {
    if (!model.cache) return;
    const bool named = bytes_.below(2) != 0;
    for (std::size_t slot = 0; slot < lengths.size(); ++slot) {
      if (!model.slots[slot].active) lengths[slot] = 0;
    }
    std::vector<SlotLength> pairs;
    for (std::size_t slot = 0; slot < lengths.size(); ++slot) {
      if (lengths[slot] != 0) pairs.push_back({static_cast<std::int64_t>(slot), lengths[slot]});
    }
    const bool fits = named ? model.cache->fits(std::span<const SlotLength>(pairs)) : model.cache->fits(lengths);
    const Result result = attempt([&] {
      if (named) {
        model.cache->step(std::span<const SlotLength>(pairs), stream_of(model));
      } else if (!model.cache->try_step(lengths)) {
        model.cache->step(lengths, stream_of(model));
      }
    });
    if (!armed_ && fits) expect(result == Result::kDone, "fits() said yes, and step() failed");
    if (!fits) expect(result != Result::kDone, "fits() said no, and step() succeeded");
    if (result != Result::kDone) return;
    for (std::size_t slot = 0; slot < lengths.size(); ++slot) {
      auto& known = model.slots[slot];
      if (lengths[slot] > known.length) arrive(model, static_cast<std::int64_t>(slot), lengths[slot]);
    }
  }

  void truncate() {
    ModelCache& model = any_cache();
    const std::int64_t slot = bytes_.below(kSlots);
    const std::int64_t wanted = bytes_.below(model.config.max_seq_len + 1);
    const auto stream = stream_of(model);
    if (!model.cache) return;
    auto& known = model.slots[static_cast<std::size_t>(slot)];
    if (!known.active || wanted > known.length) {
      refused<std::invalid_argument>("truncate", [&] { model.cache->truncate(slot, wanted, stream); });
      return;
    }
    const Result result = attempt([&] { model.cache->truncate(slot, wanted, stream); });
    if (result == Result::kDone) {
      known.length = wanted;
    } else if (model.config.guard_tokens != 0) {
      write_pattern(model, slot, wanted, known.length);  // "the tail may be zeroed"
    }
  }

  void set_limit() {
    const auto pages = 1 + bytes_.below(on_fake_ ? 48 : 80);
    expect(attempt([&] { pool_->set_memory_limit(pages * page_); }) == Result::kDone, "set_memory_limit failed");
  }

  void arm() {
    const auto kind = bytes_.next();
    FaultDriver::Fault fault;
    fault.call = 1 + static_cast<std::uint64_t>(bytes_.below(6));
    fault.sticky = (kind & 1) != 0;
    if ((kind & 2) != 0) fault.verb = static_cast<Verb>(bytes_.below(kVerbs));
    fault.out_of_memory = (kind & 4) != 0;
    faults_->arm(fault);
    armed_ = ever_armed_ = true;
    sticky_ = fault.sticky;
    say("  call " + std::to_string(fault.call) + (fault.sticky ? " sticky " : " ") +
        (fault.verb ? name_of(*fault.verb) : "any"));
  }

  void disarm() {
    faults_->disarm();
    armed_ = sticky_ = false;
  }

  void resize() {
    const std::int64_t rows = bytes_.below(25);
    if (!tensor_) return;
    if (attempt([&] { tensor_->resize(rows); }) != Result::kDone) return;
    const std::int64_t before = std::min(rows, rows_);
    rows_ = rows;
    write_rows(before, rows);
  }

  void append() {
    const std::int64_t count = bytes_.below(4);
    if (!tensor_) return;
    const std::vector<unsigned char> rows(static_cast<std::size_t>((count + 1) * row_bytes_), 0xA5);
    const auto from = reinterpret_cast<Address>(rows.data());
    if (count > 24 - rows_) {
      refused<std::invalid_argument>("append past max_rows", [&] { tensor_->append(from, count); });
      return;
    }
    if (on_fake_) return;  // the rows would have to be the device's
    if (attempt([&] { tensor_->append(from, count); }) != Result::kDone) return;
    if (has_memory_) {
      for (std::int64_t byte = rows_ * row_bytes_; byte < (rows_ + count) * row_bytes_; byte += row_bytes_ - 1) {
        expect(pointer(tensor_->view().address)[byte] == 0xA5, "append copied something else");
      }
    }
    rows_ += count;
    write_rows(rows_ - count, rows_);
  }

  void settle() {
    ModelCache& model = any_cache();
    if (model.cache) model.cache->settle();
  }

  void reopen() {
    ModelCache& model = any_cache();
    if (model.cache) {
      if (armed_) lossy_ = true;
      try {
        if (bytes_.below(2) != 0) model.cache->close();
      } catch (const Error& error) {
        expect(armed_, std::string("close: ") + error.what());
      }
      model.cache.reset();
    }
    open(model);
  }

  void bad_arguments() {
    ModelCache& model = any_cache();
    const auto which = bytes_.below(8);
    if (!model.cache) return;
    KVCache& cache = *model.cache;
    const std::int64_t longest = model.config.max_seq_len;
    switch (which) {
      case 0:
        return refused<std::out_of_range>("free(-1)", [&] { cache.free(-1); });
      case 1:
        return refused<std::out_of_range>("seq_len(3)", [&] { static_cast<void>(cache.seq_len(kSlots)); });
      case 2:
        return refused<std::invalid_argument>("step of two lengths", [&] { cache.step(std::array<std::int64_t, 2>{1, 1}); });
      case 3:
        return refused<std::invalid_argument>(
            "lengths beyond", [&] { cache.step(std::array<std::int64_t, kSlots>{longest + 1, longest + 1, longest + 1}); });
      case 4:
        return refused<std::invalid_argument>("a slot twice", [&] { cache.step({{0, 1}, {0, 1}}); });
      case 5:
        return refused<std::invalid_argument>("the limit of a pool", [&] { cache.set_memory_limit(page_); });
      case 6:
        return refused<std::invalid_argument>("a limit of 0", [&] { pool_->set_memory_limit(0); });
      default:
        return refused<InUseError>("closing a pool in use", [&] { pool_->close(); });
    }
  }

  /// A view that outlives what follows, or the end of those that there are.
  void hold_view() {
    ModelCache& model = any_cache();
    const bool drop = bytes_.below(2) != 0;
    if (drop && armed_ && !views_.empty()) lossy_ = true;
    if (drop) views_.clear();
    if (!drop && model.cache && views_.size() < 4) views_.push_back(model.cache->layer(0).k.owner);
  }

  void batch() {
    ModelCache& model = any_cache();
    const std::int64_t length = bytes_.below(model.config.max_seq_len + 1);
    if (!model.cache || model.active() == 0) return;
    std::vector<std::int64_t> slots;
    for (std::size_t slot = 0; slot < model.slots.size(); ++slot) {
      if (model.slots[slot].active && slots.size() < 2) slots.push_back(static_cast<std::int64_t>(slot));
    }
    attempt([&] {
      try {
        const auto views = model.cache->batch(0, slots, length);
        expect(views.k.shape[1] == length, "a batch of another length");
      } catch (const std::invalid_argument&) {  // past what is committed, where that faults
        expect(model.cache->geometry().unmapped_reads() != UnmappedReads::kZeros, "batch refused where it reads zeros");
      }
    });
  }

  void write() {
    ModelCache& model = any_cache();
    const std::int64_t slot = bytes_.below(kSlots);
    const std::int64_t position = bytes_.below(model.config.max_seq_len);
    if (!model.cache || on_fake_) return;
    const auto& known = model.slots[static_cast<std::size_t>(slot)];
    const std::vector<unsigned char> token(static_cast<std::size_t>(2 * model.config.head_dim), 0x5A);
    const auto from = reinterpret_cast<Address>(token.data());
    const Address v = model.cache->geometry().has_v() ? from : 0;
    const auto call = [&] { model.cache->write(0, std::array{slot}, std::array{position}, from, v); };
    if (!known.active) return refused<std::invalid_argument>("write to a free slot", call);
    if (position >= known.length) return refused<std::out_of_range>("write past the length", call);
    attempt(call);
    if (has_memory_) write_pattern(model, slot, position, position + 1);
  }

  /// A kernel that reads a slot, behind the caller's back.
  void kernel() {
    ModelCache& model = any_cache();
    const std::int64_t slot = bytes_.below(kSlots);
    if (!on_fake_ || !model.cache || !model.slots[static_cast<std::size_t>(slot)].active) return;
    const auto k = model.cache->view(0, slot).k;
    if (k.shape[0] == 0) return;
    const auto token = static_cast<std::size_t>(k.strides[0]);  // head-major: of the first head
    fake_cuda_kernel_begin_on(model.stream, k.address, token * static_cast<std::size_t>(k.shape[0]), kKernelMicroseconds);
    had_kernels_ = true;
  }

  // ---- contents

  [[nodiscard]] static unsigned char pattern(const ModelCache& model, std::uint32_t epoch, std::int64_t layer, int kind,
                                             std::int64_t head, std::int64_t token) {
    std::uint64_t mixed = epoch;
    for (const auto part : {std::int64_t{model.id}, layer, std::int64_t{kind}, head, token}) {
      mixed = (mixed ^ static_cast<std::uint64_t>(part)) * 0x9E3779B97F4A7C15U;
      mixed ^= mixed >> 29;
    }
    return static_cast<unsigned char>(1 + mixed % 255);  // never 0
  }

  /// visit(first byte, last byte, pattern) of the pieces of tokens [from, to) of a slot: one a layer, kind, head and token.
  template <typename Visit>
  void each_piece(const ModelCache& model, std::int64_t slot, std::int64_t from, std::int64_t to, Visit&& visit) const {
    if (!has_memory_ || from >= to) return;
    const std::uint32_t epoch = model.slots[static_cast<std::size_t>(slot)].epoch;
    for (std::int64_t layer = 0; layer < model.config.num_layers; ++layer) {
      const KVView<4> views = model.cache->layer(layer);
      for (int kind = 0; kind < (views.v ? 2 : 1); ++kind) {
        const TensorView<4>& view = kind == 0 ? views.k : *views.v;
        for (std::int64_t head = 0; head < view.shape[2]; ++head) {
          for (std::int64_t token = from; token < to; ++token) {
            const std::int64_t at = slot * view.strides[0] + token * view.strides[1] + head * view.strides[2];
            unsigned char* const piece = pointer(view.address) + at;
            visit(piece, piece + view.shape[3] - 1, pattern(model, epoch, layer, kind, head, token), token);
          }
        }
      }
    }
  }

  void write_pattern(const ModelCache& model, std::int64_t slot, std::int64_t from, std::int64_t to) const {
    each_piece(model, slot, from, to, [](unsigned char* first, unsigned char* last, unsigned char byte, std::int64_t) {
      *first = byte;
      *last = byte;
    });
  }

  void expect_zero(const ModelCache& model, std::int64_t slot, std::int64_t from, std::int64_t to, const char* what) const {
    each_piece(
        model, slot, from, to, [&](const unsigned char* first, const unsigned char* last, unsigned char, std::int64_t token) {
          expect(*first == 0 && *last == 0,
                 std::string(what) + " of slot " + std::to_string(slot) + " is not zero at token " + std::to_string(token));
        });
  }

  /// A step has given the slot `length` tokens.
  void arrive(ModelCache& model, std::int64_t slot, std::int64_t length) {
    auto& known = model.slots[static_cast<std::size_t>(slot)];
    if (model.config.guard_tokens != 0) expect_zero(model, slot, known.length, length, "new memory behind a guard");
    if (model.config.scrub) expect_zero(model, slot, std::max(known.length, known.most), length, "new memory with scrub");
    write_pattern(model, slot, known.length, length);
    known.length = length;
    known.most = std::max(known.most, length);
  }

  void write_rows(std::int64_t from, std::int64_t to) const {
    if (!has_memory_) return;
    unsigned char* const base = pointer(tensor_->view().address);
    for (std::int64_t row = from; row < to; ++row) {
      base[row * row_bytes_] = base[(row + 1) * row_bytes_ - 1] = static_cast<unsigned char>(row + 1);
    }
  }

  // ---- the model

  void check(const char* operation) {
    operation_ = operation;
    for (const ModelCache& model : caches_) check(model);
    if (tensor_) {
      expect(tensor_->rows() == rows_,
             "the tensor has " + std::to_string(tensor_->rows()) + " rows, not " + std::to_string(rows_));
      const unsigned char* const base = has_memory_ ? pointer(tensor_->view().address) : nullptr;
      for (std::int64_t row = 0; base != nullptr && row < rows_; ++row) {
        expect(base[row * row_bytes_] == row + 1 && base[(row + 1) * row_bytes_ - 1] == row + 1,
               "row " + std::to_string(row) + " lost its bytes");
      }
    }
    check_stats();
    if (on_fake_) expect(fake_cuda_violations() == 0, "CUDA: " + cuda::last_violation());
  }

  void check(const ModelCache& model) const {
    if (!model.cache) return;
    std::vector<std::int64_t> active;
    for (std::int64_t slot = 0; slot < kSlots; ++slot) {
      const auto& known = model.slots[static_cast<std::size_t>(slot)];
      if (!known.active) continue;
      active.push_back(slot);
      const std::int64_t length = model.cache->seq_len(slot);
      const std::int64_t committed = model.cache->committed_len(slot);
      expect(length == known.length, "slot " + std::to_string(slot) + " has " + std::to_string(length) + " tokens, not " +
                                         std::to_string(known.length));
      expect(committed >= length, "slot " + std::to_string(slot) + " has memory for " + std::to_string(committed) + " of " +
                                      std::to_string(length) + " tokens");
      expect(committed <= model.config.max_seq_len, "memory for more tokens than there can be");
      each_piece(model, slot, 0, length,
                 [&](const unsigned char* first, const unsigned char* last, unsigned char byte, std::int64_t token) {
                   expect(*first == byte && *last == byte,
                          "slot " + std::to_string(slot) + " lost its bytes at token " + std::to_string(token));
                 });
      // Look-ahead may be taken away by a mapper that finds itself above the limit; without one it is there to be written.
      if (!has_mapper_) {
        each_piece(model, slot, length, committed, [](unsigned char* first, unsigned char* last, unsigned char, std::int64_t) {
          for (volatile unsigned char* const byte : {first, last}) *byte = *byte;
        });
      }
      if (model.config.guard_tokens == 0 || length == 0) continue;
      check_guard(model, slot, length);
    }
    expect(model.cache->slots() == active, "other slots are in use than the model has");
    expect(model.cache->stats().active_slots == active.size(), "stats() counts other slots");
  }

  void check_guard(const ModelCache& model, std::int64_t slot, std::int64_t length) const {
    if (!has_memory_) return;
    const KVView<4> views = model.cache->layer(0);
    const auto zero = [&](const TensorView<4>& view) {
      for (std::int64_t head = 0; head < view.shape[2]; ++head) {
        for (std::int64_t token = length; token < length + kGuard; ++token) {
          volatile unsigned char* const piece =
              pointer(view.address) + slot * view.strides[0] + token * view.strides[1] + head * view.strides[2];
          expect(piece[0] == 0 && piece[view.shape[3] - 1] == 0, "the guard of slot " + std::to_string(slot) + " is not zero");
          piece[0] = 0;  // and it has memory
        }
      }
    };
    zero(views.k);
    if (views.v) zero(*views.v);
  }

  void check_stats() const {
    const PoolStats stats = pool_->stats();
    const auto text = [&] {
      return " (created " + std::to_string(stats.created_bytes) + ", mapped " + std::to_string(stats.mapped_bytes) +
             ", pooled " + std::to_string(stats.pooled_bytes) + ", retired " + std::to_string(stats.retired_bytes) +
             ", reclaimable " + std::to_string(stats.reclaimable_bytes) + ", limit " + std::to_string(stats.limit_bytes) + ")";
    };
    expect(stats.created_bytes == stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes, "pages are lost" + text());
    expect(stats.reclaimable_bytes <= stats.mapped_bytes, "more can be reclaimed than is mapped" + text());
    std::uint64_t held = 0;
    for (const MemberStats& member : stats.members) held += member.mapped_bytes + member.retired_bytes;
    const std::uint64_t mapped = stats.mapped_bytes + stats.retired_bytes;
    if (!has_mapper_ && views_.empty() && !lossy_) expect(held == mapped, "the members' pages are not the pool's" + text());
    if (!has_mapper_ && !lossy_) {
      const auto alive = static_cast<std::uint64_t>(driver_->alive().pages * page_);
      expect(alive == stats.created_bytes, "the driver has " + std::to_string(alive) + " bytes alive" + text());
    }
    // Above the limit only what was promised before it was lowered, and what is still in use.
    if (ever_armed_ || has_mapper_ || had_kernels_ || stats.created_bytes <= stats.limit_bytes) return;
    expect(stats.pooled_bytes + stats.reclaimable_bytes == 0, "above the limit, with memory that nobody was promised" + text());
  }

  void finish() {
    disarm();
    operation_ = "end";
    views_.clear();
    check("end");
    for (ModelCache& model : caches_) {
      if (model.cache) close([&] { model.cache->close(); });
      model.cache.reset();  // fences that passed are dropped with it
    }
    close([&] { tensor_->close(); });
    close([&] { pool_->close(); });
    if (lossy_) return;
    expect(driver_->alive() == CountingDriver::Alive{}, "left alive: " + std::to_string(driver_->alive().pages) + " pages, " +
                                                            std::to_string(driver_->alive().reservations) + " reservations, " +
                                                            std::to_string(driver_->alive().fences) + " fences");
  }

  void close(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      expect(lossy_, std::string("close: ") + error.what());
    }
  }

  Bytes bytes_;
  bool verbose_;
  std::size_t number_ = 0;
  const char* operation_ = "open";
  bool on_fake_ = false;
  bool has_memory_ = false;
  bool has_mapper_ = false;
  std::int64_t page_ = 0;
  std::shared_ptr<FaultDriver> faults_;
  std::shared_ptr<CountingDriver> driver_;
  std::shared_ptr<PagePool> pool_;
  std::array<ModelCache, 2> caches_;
  std::unique_ptr<GrowableTensor> tensor_;
  std::vector<std::shared_ptr<Buffer>> views_;
  std::int64_t rows_ = 0;
  std::int64_t row_bytes_ = 0;
  std::uint32_t epochs_ = 0;
  bool armed_ = false;
  bool sticky_ = false;
  bool ever_armed_ = false;
  bool had_kernels_ = false;
  bool lossy_ = false;  ///< something was closed while faults were on, and may have been lost
};

const std::array<Program::Operation, 20> Program::kOperations{{
    {"alloc", &Program::alloc},
    {"step", &Program::step},
    {"free", &Program::free},
    {"decode", &Program::decode},
    {"truncate", &Program::truncate},
    {"alloc_block", &Program::alloc_block},
    {"set_memory_limit", &Program::set_limit},
    {"arm", &Program::arm},
    {"disarm", &Program::disarm},
    {"resize", &Program::resize},
    {"append", &Program::append},
    {"settle", &Program::settle},
    {"reopen", &Program::reopen},
    {"bad_arguments", &Program::bad_arguments},
    {"hold_view", &Program::hold_view},
    {"batch", &Program::batch},
    {"write", &Program::write},
    {"kernel", &Program::kernel},
    {"step", &Program::step},
    {"decode", &Program::decode},
}};

}  // namespace

void run_operations(std::span<const std::uint8_t> bytes) {
  try {
    Program(bytes).run();
  } catch (const Violation&) {
    throw;
  } catch (const std::exception& error) {
    throw Violation(std::string("an error that no operation may throw: ") + error.what());
  }
}

}  // namespace vattn::fuzz
