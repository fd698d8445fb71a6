#include "fault_operations.hpp"

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <sstream>

namespace vattn::faults {
namespace {

constexpr std::int64_t kTokens = 16;  ///< a page holds

/// One call, where reading /proc/self/fd takes many: worlds are made by the ten thousand.
int open_fds() {
  std::array<pollfd, 256> fds{};
  for (std::size_t i = 0; i < fds.size(); ++i) fds[i].fd = static_cast<int>(i);
  ::poll(fds.data(), fds.size(), 0);
  return static_cast<int>(
      std::count_if(fds.begin(), fds.end(), [](const pollfd& one) { return (one.revents & POLLNVAL) == 0; }));
}

constexpr Setting kBare{"bare", Has::kNothing};
constexpr Setting kPlain{"plain"};
constexpr Setting kTight{.name = "tight", .tight = true};
constexpr Setting kGuard{.name = "guard", .guard = 4};
constexpr Setting kScrub{.name = "scrub", .scrub = true};
constexpr Setting kStreams{.name = "streams", .streams = true};
constexpr Setting kTensor{"tensor", Has::kTensor};
constexpr Setting kPooled{"pooled", Has::kPool};
constexpr Setting kPooledStreams{.name = "pooled_streams", .has = Has::kPool, .streams = true};

}  // namespace

Address Ledger::reserve(std::size_t size, UnmappedReads reads) {
  const Address base = Decorator::reserve(size, reads);
  ranges.emplace(base, size);
  return base;
}

void Ledger::release_range(Address base, std::size_t size) {
  Decorator::release_range(base, size);
  ranges.erase(base);
}

void Ledger::map(Address at, std::size_t size, PageHandle handle) {
  Decorator::map(at, size, handle);
  mapped_bytes += size;
}

void Ledger::unmap(Address at, std::size_t size) {
  Decorator::unmap(at, size);
  mapped_bytes -= size;
}

void Ledger::synchronize() {
  before_wait();
  Decorator::synchronize();
}

void Ledger::wait(FenceHandle fence) {
  before_wait();
  Decorator::wait(fence);
}

World::World(const DriverUnderTest& driver, const Setting& its) : setting(its) {
  on_fake = driver.name == "cuda" && cuda::on_fake();
  if (on_fake) {
    fake_cuda_reset();
    fake_cuda_set_granularity(4096, 4096);  // as the host's, so that a world costs little
    fake_cuda_set_fill(-1);
  }
  if (driver.name == "cuda") device = {Device::Kind::kCuda, 0};
  fds = open_fds();
  if (setting.streams) {
    stream = fake_cuda_stream_create(0);
    other = fake_cuda_stream_create(0);
  }
  ledger = std::make_shared<Ledger>(driver.open());
  ledger->before_wait = [this] { end_kernels(); };
  second = std::make_shared<FaultDriver>(ledger);
  first = std::make_shared<FaultDriver>(second);
  counts = std::make_shared<CountingDriver>(first);
  page = static_cast<std::int64_t>(counts->traits().granularity);
  if (setting.has == Has::kNothing) return;
  if (setting.has == Has::kPool) {
    pool = PagePool::make(device, counts, static_cast<std::size_t>(page), static_cast<std::uint64_t>(pages(64)));
  }
  if (setting.has != Has::kCache) {
    tensor = pool ? std::make_unique<GrowableTensor>(tensor_config(), pool)
                  : std::make_unique<GrowableTensor>(tensor_config(), device, counts);
    tensor->resize(40);
    tensor->resize(20);  // a page that is nobody's
  }
  if (setting.has == Has::kTensor) return;
  cache = pool ? std::make_unique<KVCache>(cache_config(), pool) : std::make_unique<KVCache>(cache_config(), device, counts);
  for (int slot = 0; slot < 3; ++slot) cache->alloc();
  cache->step({{0, 2 * kTokens}, {1, 3 * kTokens - 8}, {2, 2 * kTokens - 8}});
  std::optional<Stream> used{};
  if (setting.streams) {
    used = stream;
    cache->record_stream(other);
    for (const Stream queue : {stream, other}) {
      kernels_.push_back(fake_cuda_kernel_begin_on(queue, cache->view(0, 2).k.address, static_cast<std::size_t>(page), -1));
    }
  }
  cache->free(2, used);
  cache->truncate(1, kTokens + 1, used);
}

World::~World() { static_cast<void>(end()); }

CacheConfig World::cache_config() const {
  CacheConfig config;
  config.num_layers = 1;
  config.num_kv_heads = 1;
  config.head_dim = page / kTokens;
  config.dtype = DType::kUInt8;
  config.max_batch_size = 5;
  config.max_seq_len = 8 * kTokens;
  config.layout = Layout::kNHD;
  config.guard_tokens = setting.guard;
  config.scrub = setting.scrub;
  config.lookahead_tokens = 0;
  if (setting.has == Has::kPool) return config;
  config.page_size = page;
  config.memory_limit = pages(setting.tight ? 18 : 64);
  return config;
}

GrowableTensor::Config World::tensor_config() const {
  GrowableTensor::Config config;
  config.row_shape = {page / kTokens};
  config.max_rows = 8 * kTokens;
  config.dtype = DType::kUInt8;
  if (setting.has == Has::kPool) return config;
  config.page_size = page;
  config.memory_limit = pages(32);
  return config;
}

void World::end_kernels() {
  for (const std::uint64_t kernel : kernels_) fake_cuda_kernel_end(kernel);
  kernels_.clear();
}

void World::close() {
  end_kernels();
  if (made_cache) made_cache->close();
  if (made_tensor) made_tensor->close();
  if (made_pool) made_pool->close();
  if (cache) cache->close();
  if (tensor) tensor->close();
  if (pool) pool->close();
}

std::string World::end() {
  if (ended_) return {};
  ended_ = true;
  end_kernels();
  if (on_fake) fake_cuda_clear_faults();
  first->disarm();
  second->disarm();
  made_cache.reset();
  made_tensor.reset();
  made_pool.reset();
  cache.reset();
  tensor.reset();
  pool.reset();
  std::ostringstream left;
  const CountingDriver::Alive alive = counts->alive();
  if (alive.fences != 0) left << alive.fences << " fences; ";
  if (counts.use_count() != 1) left << "somebody keeps the driver; ";
  counts.reset();
  first.reset();
  second.reset();
  // The host's driver leaves to the end of the process what it was not allowed to give back.
  const std::map<Address, std::size_t> ranges = ledger->ranges;
  const bool is_host = std::string(ledger->traits().name) == "host";
  ledger.reset();
  if (is_host) {
    for (const auto& [base, size] : ranges) ::munmap(reinterpret_cast<void*>(base), size);
  }
  if (on_fake) {
    fake_cuda_counts now;
    fake_cuda_count(&now);
    if (now.handles + now.handle_references != 0) left << now.handles << " handles; ";
    if (now.mappings != 0) left << now.mappings << " mappings; ";
    if (now.reservations != 0) left << now.reservations << " reservations; ";
    if (now.context_references != 0) left << now.context_references << " context references; ";
    if (now.streams != 0) left << now.streams << " streams; ";
    if (now.events != 0) left << now.events << " events; ";
    if (fake_cuda_violations() != 0) left << "a rule was broken: " << cuda::last_violation() << "; ";
    fake_cuda_reset();  // and with it the file of the device, the streams of the test, and contexts that would not be popped
  }
  if (const int now = open_fds(); now != fds) left << now - fds << " file descriptors; ";
  return left.str();
}

State::State(const World& world) {
  std::ostringstream wrong;
  const auto page = static_cast<std::uint64_t>(world.page);
  // The driver first: asking the others may let go of fences that have passed.
  alive = world.counts->alive();
  mapped_at_driver = world.ledger->mapped_bytes;
  fds = open_fds();
  if (world.on_fake) {
    fake_cuda_counts now;
    fake_cuda_count(&now);
    at_library = {now.handles, now.handle_references, now.mappings, now.reservations, now.context_references, now.streams};
  }
  std::uint64_t mapped = 0;
  if (world.cache && !world.cache->is_closed()) {
    slots = world.cache->slots();
    for (const std::int64_t slot : slots) {
      lengths.push_back(world.cache->seq_len(slot));
      committed.push_back(world.cache->committed_len(slot));
    }
    const CacheStats stats = world.cache->stats();
    requests = {stats.prompts, stats.warm_prompts, stats.reused_prompts, stats.steps_waited};
    limit = stats.limit_bytes;
    used = stats.used_bytes;
    made = stats.pages_created;
    reused = stats.pages_reused;
    if (stats.created_bytes != stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes) wrong << "the cache's bytes; ";
    mapped += stats.mapped_bytes + stats.retired_bytes;
    created = stats.created_bytes;
    promised += stats.mapped_bytes - stats.reclaimable_bytes;
    excess += stats.reclaimable_bytes + stats.retired_bytes;
    if (stats.used_bytes > stats.mapped_bytes) wrong << "tokens without memory; ";
  }
  if (world.tensor && !world.tensor->is_closed()) {
    rows = world.tensor->rows();
    mapped += world.tensor->mapped_bytes();
    if (!world.pool) {
      limit = world.tensor->memory_limit();
      created = static_cast<std::uint64_t>(alive.pages) * page;
      const std::uint64_t needed = static_cast<std::uint64_t>((rows + kTokens - 1) / kTokens) * page;
      promised += needed;
      excess += world.tensor->mapped_bytes() - needed;
    }
  }
  if (world.pool && !world.pool->is_closed()) {
    const PoolStats stats = world.pool->stats();
    limit = stats.limit_bytes;
    if (stats.created_bytes != stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes) wrong << "the pool's bytes; ";
    if (world.cache && mapped != stats.mapped_bytes + stats.retired_bytes)
      wrong << "the pool's and its members' mapped bytes; ";
    created = stats.created_bytes;
    promised = stats.mapped_bytes - stats.reclaimable_bytes;
    excess = stats.reclaimable_bytes + stats.retired_bytes;
  }
  // What is said to be there is there, page for page, whatever happened.
  if (world.cache || world.pool) {
    const std::uint64_t there = static_cast<std::uint64_t>(alive.pages) * page;
    if (created != there) wrong << created << " bytes are said to exist, " << there << " do; ";
  }
  if ((world.cache || world.tensor) && mapped != mapped_at_driver) {
    wrong << mapped << " bytes are said to be mapped, " << mapped_at_driver << " are; ";
  }
  unsound = wrong.str();
}

std::string differences(const State& before, const State& after, Strict strict) {
  std::ostringstream text;
  const auto compare = [&](const char* name, const auto& was, const auto& is) {
    if (was == is) return;
    text << name << " differs";
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(was)>>) text << ": " << was << ", now " << is;
    text << "; ";
  };
  if (!after.unsound.empty()) text << after.unsound;
  compare("slots", before.slots, after.slots);
  compare("lengths", before.lengths, after.lengths);
  compare("rows", before.rows, after.rows);
  compare("counts of requests", before.requests, after.requests);
  compare("limit", before.limit, after.limit);
  compare("used bytes", before.used, after.used);
  compare("promised bytes", before.promised, after.promised);
  compare("pages created", before.made, after.made);
  compare("pages reused", before.reused, after.reused);
  if (strict != Strict::kUnmade) compare("reservations", before.alive.reservations, after.alive.reservations);
  compare("file descriptors", before.fds, after.fds);
  if (after.alive.fences > before.alive.fences) compare("fences", before.alive.fences, after.alive.fences);
  if (strict == Strict::kLossless || strict == Strict::kUnmade) return text.str();
  compare("live handles", before.alive.pages, after.alive.pages);
  compare("created bytes", before.created, after.created);
  if (strict == Strict::kButExcess) return text.str();
  compare("excess bytes", before.excess, after.excess);
  compare("committed lengths", before.committed, after.committed);
  compare("mapped bytes", before.mapped_at_driver, after.mapped_at_driver);
  compare("what the library has", before.at_library, after.at_library);
  return text.str();
}

bool is_constructor(const Operation& operation) {
  const std::size_t colons = operation.name.find("::");
  return operation.name.compare(colons + 2, colons, operation.name, 0, colons) == 0;
}

std::string left_after_close(const World& world, bool lossy) {
  std::ostringstream text;
  const CountingDriver::Alive alive = world.counts->alive();
  if (alive.pages != 0) text << alive.pages << " pages are alive after close; ";
  if (alive.reservations != 0 && !lossy) text << alive.reservations << " reservations are alive after close; ";
  if (alive.fences != 0) text << alive.fences << " fences are alive after close; ";
  if (world.ledger->mapped_bytes != 0) text << world.ledger->mapped_bytes << " bytes are mapped after close; ";
  return text.str();
}

const std::vector<Operation>& operations() {
  static const std::vector<Operation> kAll = [] {
    std::vector<Operation> all;
    const std::vector<std::int64_t> target{4 * kTokens, 5 * kTokens, 0, 0, 0};
    const auto stepped = [](World& world) {
      return world.cache->seq_len(0) == 4 * kTokens && world.cache->seq_len(1) == 5 * kTokens &&
             world.cache->committed_len(1) >= 5 * kTokens;
    };
    const auto used_on = [](World& world) {
      return world.setting.streams ? std::optional<Stream>(world.stream) : std::nullopt;
    };
    const auto lower_limit = [](World& world) { world.cache->set_memory_limit(world.pages(2)); };
    const auto close_members = [](World& world) {
      world.end_kernels();
      world.cache->close();
      world.tensor->close();
    };
    const auto end_kernels = [](World& world) { world.end_kernels(); };
    const auto always = [](World&) { return true; };
    const auto cache_closed = [](World& world) { return world.cache->is_closed(); };
    const auto tensor_closed = [](World& world) { return world.tensor->is_closed(); };

    // KVCache.
    all.push_back({"KVCache::KVCache#1",
                   "on a device",
                   {kBare},
                   kLibrary,
                   [](World& world) { world.made_cache = std::make_unique<KVCache>(world.cache_config(), world.device); },
                   [](World& world) { return world.made_cache != nullptr; }});
    all.push_back(
        {"KVCache::KVCache#2",
         "on a driver",
         {kBare},
         kEverywhere,
         [](World& world) { world.made_cache = std::make_unique<KVCache>(world.cache_config(), world.device, world.counts); },
         [](World& world) { return world.made_cache != nullptr; }});
    all.push_back({"KVCache::KVCache#3",
                   "on a pool",
                   {kPooled},
                   kEverywhere,
                   [](World& world) { world.made_cache = std::make_unique<KVCache>(world.cache_config(), world.pool); },
                   [](World& world) { return world.pool->stats().members.size() == 3; }});
    all.push_back({"KVCache::~KVCache",
                   "",
                   {kPlain, kStreams, kPooled},
                   kEverywhere,
                   [](World& world) { world.cache.reset(); },
                   always,
                   end_kernels,
                   true});
    all.push_back({"KVCache::alloc",
                   "a slot that is still read",
                   {kStreams},
                   kCuda | kLibrary,
                   [](World& world) { static_cast<void>(world.cache->alloc(8, world.stream)); },
                   [](World& world) { return world.cache->active_slots() == 3; }});
    all.push_back({"KVCache::alloc_block",
                   "slots of which one is still read",
                   {kStreams},
                   kCuda | kLibrary,
                   [](World& world) { static_cast<void>(world.cache->alloc_block(3, world.stream)); },
                   [](World& world) { return world.cache->active_slots() == 5; }});
    all.push_back({"KVCache::alloc_batch",
                   "slots of which one is still read",
                   {kStreams},
                   kCuda | kLibrary,
                   [](World& world) { static_cast<void>(world.cache->alloc_batch(3, world.stream)); },
                   [](World& world) { return world.cache->active_slots() == 5; }});
    const auto free_one = [=](World& world) { world.cache->free(1, used_on(world)); };
    const auto freed = [](World& world) { return world.cache->slots() == std::vector<std::int64_t>{0}; };
    all.push_back({"KVCache::free", "", {kPlain, kStreams}, kEverywhere, free_one, freed});
    all.push_back({"KVCache::free", "above the limit", {kPlain, kScrub}, kEverywhere, free_one, freed, lower_limit});
    all.push_back({"KVCache::step#1",
                   "",
                   {kPlain, kTight, kGuard, kScrub, kStreams, kPooled},
                   kEverywhere,
                   [=](World& world) { world.cache->step(std::span<const std::int64_t>(target), used_on(world)); },
                   stepped});
    all.push_back({"KVCache::step#2",
                   "",
                   {kPlain},
                   kEverywhere,
                   [](World& world) {
                     const std::vector<SlotLength> named{{0, 4 * kTokens}, {1, 5 * kTokens}};
                     world.cache->step(std::span<const SlotLength>(named));
                   },
                   stepped});
    all.push_back({"KVCache::step#3",
                   "",
                   {kPlain},
                   kEverywhere,
                   [](World& world) { world.cache->step({{0, 4 * kTokens}, {1, 5 * kTokens}}); },
                   stepped});
    // What fits asks is how much there is, which is no verb of the table; the library's call for it may fail all the same.
    all.push_back({"KVCache::fits#1",
                   "",
                   {kPlain},
                   kLibrary,
                   [=](World& world) { static_cast<void>(world.cache->fits(std::span<const std::int64_t>(target))); },
                   always});
    all.push_back({"KVCache::fits#2",
                   "",
                   {kPlain},
                   kLibrary,
                   [](World& world) {
                     const std::vector<SlotLength> named{{0, 8 * kTokens}, {1, 8 * kTokens}};
                     static_cast<void>(world.cache->fits(std::span<const SlotLength>(named)));
                   },
                   always});
    const auto truncate = [=](World& world) { world.cache->truncate(0, 3, used_on(world)); };
    const auto truncated = [](World& world) { return world.cache->seq_len(0) == 3; };
    all.push_back({"KVCache::truncate", "", {kPlain, kGuard, kStreams}, kEverywhere, truncate, truncated});
    all.push_back({"KVCache::truncate", "above the limit", {kPlain}, kEverywhere, truncate, truncated, lower_limit});
    // Only the host's unmapped memory reads as zeros, so only there a batch shows what no length has promised.
    all.push_back({"KVCache::batch",
                   "over what was truncated",
                   {kScrub},
                   kHost,
                   [](World& world) {
                     const std::vector<std::int64_t> slots{0, 1};
                     const std::int64_t length = world.device.kind == Device::Kind::kCpu ? 3 * kTokens : kTokens;
                     static_cast<void>(world.cache->batch(0, slots, length));
                   },
                   always});
    all.push_back({"KVCache::write#2",
                   "",
                   {kPlain, kPooled},
                   kEverywhere,
                   [](World& world) {
                     const std::vector<std::int64_t> slots{0, 1};
                     const Rows rows = world.cache->rows(slots);
                     std::int64_t added = 0;
                     for (const TokenSpan& span : world.cache->last_step(rows).added) added += span.stop - span.start;
                     const auto from = world.cache->layer(0);
                     world.cache->write(0, rows, added, from.v->address, from.k.address);
                   },
                   always});
    all.push_back({"KVCache::write#1",
                   "",
                   {kPlain, kPooled},
                   kEverywhere,
                   [](World& world) {
                     const auto from = world.cache->view(0, 0);
                     const std::vector<std::int64_t> slots{1, 1};
                     const std::vector<std::int64_t> positions{3, kTokens};
                     world.cache->write(0, slots, positions, from.k.address, from.v->address);
                   },
                   always});
    all.push_back({"KVCache::set_memory_limit",
                   "lower",
                   {kPlain, kTight, kStreams},
                   kEverywhere,
                   [](World& world) { world.cache->set_memory_limit(world.pages(2)); },
                   [](World& world) { return world.cache->memory_limit() == static_cast<std::uint64_t>(world.pages(2)); }});
    all.push_back({"KVCache::stats",
                   "with work that has not finished",
                   {kStreams},
                   kCuda | kLibrary,
                   [](World& world) { static_cast<void>(world.cache->stats()); },
                   always});
    all.push_back({"KVCache::close",
                   "",
                   {kPlain, kGuard, kStreams, kPooled},
                   kEverywhere,
                   [](World& world) { world.cache->close(); },
                   cache_closed,
                   end_kernels,
                   true});

    // GrowableTensor.
    all.push_back(
        {"GrowableTensor::GrowableTensor#1",
         "on a device",
         {kBare},
         kLibrary,
         [](World& world) { world.made_tensor = std::make_unique<GrowableTensor>(world.tensor_config(), world.device); },
         [](World& world) { return world.made_tensor != nullptr; }});
    all.push_back({"GrowableTensor::GrowableTensor#2",
                   "on a driver",
                   {kBare},
                   kEverywhere,
                   [](World& world) {
                     world.made_tensor = std::make_unique<GrowableTensor>(world.tensor_config(), world.device, world.counts);
                   },
                   [](World& world) { return world.made_tensor != nullptr; }});
    all.push_back(
        {"GrowableTensor::GrowableTensor#3",
         "on a pool",
         {kPooled},
         kEverywhere,
         [](World& world) { world.made_tensor = std::make_unique<GrowableTensor>(world.tensor_config(), world.pool); },
         [](World& world) { return world.pool->stats().members.size() == 3; }});
    all.push_back({"GrowableTensor::~GrowableTensor",
                   "",
                   {kTensor, kPooled},
                   kEverywhere,
                   [](World& world) { world.tensor.reset(); },
                   always,
                   end_kernels,
                   true});
    all.push_back({"GrowableTensor::resize",
                   "larger",
                   {kTensor, kPooled},
                   kEverywhere,
                   [](World& world) { world.tensor->resize(5 * kTokens); },
                   [](World& world) { return world.tensor->rows() == 5 * kTokens; }});
    all.push_back({"GrowableTensor::resize",
                   "smaller",
                   {kTensor, kPooled},
                   kEverywhere,
                   [](World& world) { world.tensor->resize(3); },
                   [](World& world) { return world.tensor->rows() == 3; }});
    all.push_back({"GrowableTensor::append",
                   "",
                   {kTensor, kPooled},
                   kEverywhere,
                   [](World& world) { world.tensor->append(world.tensor->view().address, 20); },
                   [](World& world) { return world.tensor->rows() == 40; },
                   [](World& world) {
                     if (world.cache) world.cache->step({{0, 3 * kTokens}});  // takes the page that was left over
                   }});
    all.push_back({"GrowableTensor::set_memory_limit",
                   "lower",
                   {kTensor},
                   kEverywhere,
                   [](World& world) { world.tensor->set_memory_limit(world.page); },
                   [](World& world) { return world.tensor->memory_limit() == static_cast<std::uint64_t>(world.page); }});
    all.push_back({"GrowableTensor::close",
                   "",
                   {kTensor, kPooled},
                   kEverywhere,
                   [](World& world) { world.tensor->close(); },
                   tensor_closed,
                   end_kernels,
                   true});

    // PagePool.
    all.push_back({"PagePool::make#1",
                   "on a device",
                   {kBare},
                   kLibrary,
                   [](World& world) { world.made_pool = PagePool::make(world.device, {}, world.page); },
                   [](World& world) { return world.made_pool != nullptr; }});
    all.push_back({"PagePool::~PagePool",
                   "",
                   {kPooled},
                   kEverywhere,
                   [](World& world) {
                     world.cache.reset();
                     world.tensor.reset();
                     world.pool.reset();
                   },
                   always,
                   close_members,
                   true});
    all.push_back({"PagePool::set_memory_limit",
                   "lower",
                   {kPooled, kPooledStreams},
                   kEverywhere,
                   [](World& world) { world.pool->set_memory_limit(world.page); },
                   [](World& world) { return world.pool->memory_limit() == static_cast<std::uint64_t>(world.page); }});
    all.push_back({"PagePool::stats",
                   "with work that has not finished",
                   {kPooledStreams},
                   kCuda | kLibrary,
                   [](World& world) { static_cast<void>(world.pool->stats()); },
                   always});
    all.push_back({"PagePool::close",
                   "",
                   {kPooled},
                   kEverywhere,
                   [](World& world) { world.pool->close(); },
                   [](World& world) { return world.pool->is_closed(); },
                   close_members,
                   true});
    return all;
  }();
  return kAll;
}

namespace {

Rows rows_of(World& world) {
  const std::vector<std::int64_t> slots{0, 1};
  return world.cache->rows(slots);
}

}  // namespace

const std::vector<Quiet>& quiet_operations() {
  static const std::vector<Quiet> kAll{
      {"KVCache::record_stream", [](World& world) { world.cache->record_stream(world.stream); }},
      {"KVCache::slots", [](World& world) { static_cast<void>(world.cache->slots()); }},
      {"KVCache::active_slots", [](World& world) { static_cast<void>(world.cache->active_slots()); }},
      {"KVCache::try_step",
       [](World& world) {
         const std::vector<std::int64_t> lengths{8 * kTokens, 0, 0, 0, 0};
         EXPECT_FALSE(world.cache->try_step(lengths));
       }},
      {"KVCache::seq_len", [](World& world) { static_cast<void>(world.cache->seq_len(0)); }},
      {"KVCache::committed_len", [](World& world) { static_cast<void>(world.cache->committed_len(0)); }},
      {"KVCache::slot_bytes", [](World& world) { static_cast<void>(world.cache->slot_bytes(0)); }},
      {"KVCache::rows", [](World& world) { static_cast<void>(rows_of(world)); }},
      {"KVCache::last_step", [](World& world) { static_cast<void>(world.cache->last_step(rows_of(world))); }},
      {"KVCache::changes", [](World& world) { static_cast<void>(world.cache->changes(rows_of(world))); }},
      {"KVCache::views", [](World& world) { static_cast<void>(world.cache->views(0, rows_of(world))); }},
      {"KVCache::view", [](World& world) { static_cast<void>(world.cache->view(0, 0)); }},
      {"KVCache::layer", [](World& world) { static_cast<void>(world.cache->layer(0)); }},
      {"KVCache::memory_limit", [](World& world) { static_cast<void>(world.cache->memory_limit()); }},
      {"KVCache::settle", [](World& world) { world.cache->settle(); }},  // there is no thread to wait for
      {"KVCache::is_closed", [](World& world) { static_cast<void>(world.cache->is_closed()); }},
      {"KVCache::geometry", [](World& world) { static_cast<void>(world.cache->geometry()); }},
      {"KVCache::device", [](World& world) { static_cast<void>(world.cache->device()); }},
      {"KVCache::name", [](World& world) { static_cast<void>(world.cache->name()); }},
      {"GrowableTensor::rows", [](World& world) { static_cast<void>(world.tensor->rows()); }},
      {"GrowableTensor::view", [](World& world) { static_cast<void>(world.tensor->view()); }},
      {"GrowableTensor::mapped_bytes", [](World& world) { static_cast<void>(world.tensor->mapped_bytes()); }},
      {"GrowableTensor::memory_limit", [](World& world) { static_cast<void>(world.tensor->memory_limit()); }},
      {"GrowableTensor::is_closed", [](World& world) { static_cast<void>(world.tensor->is_closed()); }},
      {"GrowableTensor::config", [](World& world) { static_cast<void>(world.tensor->config()); }},
      {"GrowableTensor::device", [](World& world) { static_cast<void>(world.tensor->device()); }},
      {"GrowableTensor::page_size", [](World& world) { static_cast<void>(world.tensor->page_size()); }},
      {"GrowableTensor::name", [](World& world) { static_cast<void>(world.tensor->name()); }},
      {"PagePool::make#2",
       [](World& world) {
         world.made_pool = PagePool::make(world.device, world.counts, static_cast<std::size_t>(world.page), 1 << 30);
       }},
      {"PagePool::device", [](World& world) { static_cast<void>(world.pool->device()); }},
      {"PagePool::page_size", [](World& world) { static_cast<void>(world.pool->page_size()); }},
      {"PagePool::driver", [](World& world) { static_cast<void>(world.pool->driver()); }},
      {"PagePool::memory_limit", [](World& world) { static_cast<void>(world.pool->memory_limit()); }},
      {"PagePool::is_closed", [](World& world) { static_cast<void>(world.pool->is_closed()); }},
  };
  return kAll;
}

Setting everything(const DriverUnderTest& driver) {
  return driver.name == "cuda" && cuda::on_fake() ? kPooledStreams : kPooled;
}

Outcome attempt(const std::function<void()>& call) {
  try {
    call();
    return {};
  } catch (const OutOfMemoryError& error) {
    return {true, 0, true, error.what(), false};
  } catch (const DriverError& error) {
    return {true, error.code, false, error.what(), false};
  } catch (const Error& error) {
    return {true, 0, false, error.what(), false};
  } catch (const std::exception& error) {
    return {true, 0, false, error.what(), true};
  }
}

std::string misreported(const World& world, const Operation& operation, const Outcome& outcome) {
  std::ostringstream text;
  const CountingDriver::Alive left = world.counts->alive();
  const bool alone = world.setting.has != Has::kPool || operation.name == "PagePool::close";
  if (!outcome.failed) {
    // Of a member of a pool, pages stay in the pool, which is still open.
    if (alone && (left.pages != 0 || left.reservations != 0 || world.ledger->mapped_bytes != 0)) {
      text << left.pages << " pages, " << left.reservations << " ranges and " << world.ledger->mapped_bytes
           << " mapped bytes are left, and close said nothing; ";
    }
    return text.str();
  }
  const std::size_t at = outcome.message.find("would not take");
  if (at == std::string::npos) text << "close does not say what is left: " << outcome.message << "; ";
  if (outcome.message.find("(first: ") == std::string::npos) text << "close does not say why; ";
  if (!alone) return text.str();
  unsigned long mappings = 0;
  unsigned long pages = 0;
  unsigned long ranges = 0;
  const bool of_pool = operation.name == "PagePool::close";
  const char* const said = at == std::string::npos ? "" : outcome.message.c_str() + at;
  const int read = of_pool ? std::sscanf(said, "would not take back %lu pages", &pages)
                           : std::sscanf(said, "would not take back %lu mappings, %lu pages and %lu address ranges", &mappings,
                                         &pages, &ranges);
  if (read != (of_pool ? 1 : 3)) {
    text << "close does not count what is left: " << outcome.message << "; ";
    return text.str();
  }
  if (pages < static_cast<unsigned long>(left.pages)) text << left.pages << " pages are left, close counted " << pages << "; ";
  if (ranges != static_cast<unsigned long>(left.reservations)) {
    text << left.reservations << " ranges are left, close counted " << ranges << "; ";
  }
  if ((mappings == 0) != (world.ledger->mapped_bytes == 0)) {
    text << world.ledger->mapped_bytes << " bytes are mapped, close counted " << mappings << " mappings; ";
  }
  return text.str();
}

bool wants_all() {
  const char* const wanted = std::getenv("VATTN_FAULTS");
  return wanted != nullptr && std::string(wanted) == "all";
}

std::vector<DriverUnderTest> drivers_with_memory() {
  std::vector<DriverUnderTest> drivers = every_driver();
  drivers.pop_back();  // null: it has nothing to lose
  return drivers;
}

bool applies(const Setting& setting, const DriverUnderTest& driver) {
  return !setting.streams || (driver.name == "cuda" && cuda::on_fake());
}

}  // namespace vattn::faults
