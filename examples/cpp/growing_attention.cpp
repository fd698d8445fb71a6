// Two requests of different length grow token by token in one KVCache, with naive attention over its views.
//
// What it shows: the views are plain strided memory that any kernel can read; one step() gives every request its next token or
// changes nothing; a freed request's pages serve the next one. Every attention output is compared, bit for bit, with the same
// arithmetic over std::vectors. Exit status 0: all equal. Thread: one; the cache itself may be used from any.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <utility>
#include <vattn/vattn.hpp>
#include <vector>

namespace {

constexpr std::int64_t kLayers = 2;
constexpr std::int64_t kQueryHeads = 8;
constexpr std::int64_t kKvHeads = 2;  // grouped queries: four query heads share one head of keys and values
constexpr std::int64_t kHeadDim = 64;
constexpr std::int64_t kTokenFloats = kKvHeads * kHeadDim;

/// Keys or values of one request in one layer, wherever they lie.
struct Rows {
  float* data;
  std::int64_t tokens;
  std::int64_t token_stride;
  std::int64_t head_stride;

  [[nodiscard]] float* at(std::int64_t token, std::int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

Rows rows_of(const vattn::TensorView<3>& view) { return {view.data<float>(), view.shape[0], view.strides[0], view.strides[1]}; }
Rows rows_of(std::vector<float>& dense) {
  return {dense.data(), static_cast<std::int64_t>(dense.size()) / kTokenFloats, kTokenFloats, kHeadDim};
}

/// One request, and the vectors that its part of the cache must equal.
struct Request {
  std::int64_t slot;
  std::int64_t seed;
  std::int64_t length = 0;
  std::vector<std::vector<float>> k{kLayers};
  std::vector<std::vector<float>> v{kLayers};
};

/// What a model would compute: some number for every place.
float made_up(std::int64_t seed, std::int64_t place) {
  return std::sin(static_cast<float>((place * 37 + seed * 101) % 1009)) + static_cast<float>(place % 7) * 0.25F;
}

std::vector<float> attend(const Rows& k, const Rows& v, std::int64_t seed) {
  std::vector<float> out(kQueryHeads * kHeadDim, 0.0F);
  std::vector<float> weights(static_cast<std::size_t>(k.tokens));
  for (std::int64_t head = 0; head < kQueryHeads; ++head) {
    const std::int64_t kv_head = head / (kQueryHeads / kKvHeads);
    float most = -INFINITY;
    for (std::int64_t token = 0; token < k.tokens; ++token) {
      float score = 0.0F;
      for (std::int64_t dim = 0; dim < kHeadDim; ++dim)
        score += made_up(seed, head * kHeadDim + dim) * k.at(token, kv_head)[dim];
      weights[static_cast<std::size_t>(token)] = score / std::sqrt(static_cast<float>(kHeadDim));
      most = std::max(most, weights[static_cast<std::size_t>(token)]);
    }
    float total = 0.0F;
    for (float& weight : weights) total += weight = std::exp(weight - most);
    for (std::int64_t token = 0; token < k.tokens; ++token) {
      const float weight = weights[static_cast<std::size_t>(token)] / total;
      for (std::int64_t dim = 0; dim < kHeadDim; ++dim) {
        out[static_cast<std::size_t>(head * kHeadDim + dim)] += weight * v.at(token, kv_head)[dim];
      }
    }
  }
  return out;
}

/// Writes the tokens from `from` on, through the cache's view and into the vector alike.
void fill(const Rows& view, std::vector<float>& reference, std::int64_t from, std::int64_t seed) {
  reference.resize(static_cast<std::size_t>(view.tokens * kTokenFloats));
  for (std::int64_t token = from; token < view.tokens; ++token) {
    for (std::int64_t i = 0; i < kTokenFloats; ++i) {
      const float value = made_up(seed, token * kTokenFloats + i);
      view.at(token, i / kHeadDim)[i % kHeadDim] = value;
      reference[static_cast<std::size_t>(token * kTokenFloats + i)] = value;
    }
  }
}

/// Runs a request over its tokens from `from` on; true when every layer's attention is what the vectors give.
bool run(const vattn::KVCache& cache, Request& request, std::int64_t from) {
  bool equal = true;
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    const auto views = cache.view(layer, request.slot);  // exactly the tokens in use
    auto& k = request.k[static_cast<std::size_t>(layer)];
    auto& v = request.v[static_cast<std::size_t>(layer)];
    fill(rows_of(views.k), k, from, request.seed + layer);
    fill(rows_of(*views.v), v, from, request.seed - layer);
    equal = attend(rows_of(views.k), rows_of(*views.v), request.seed) == attend(rows_of(k), rows_of(v), request.seed) && equal;
  }
  return equal;
}

/// Every request gains its tokens in one step, then runs over them.
bool grow(vattn::KVCache& cache, std::vector<Request*> requests, std::int64_t tokens) {
  std::vector<vattn::SlotLength> lengths;
  for (const Request* request : requests) lengths.push_back({request->slot, request->length + tokens});
  cache.step(lengths);
  bool equal = true;
  for (Request* request : requests) {
    equal = run(cache, *request, std::exchange(request->length, request->length + tokens)) && equal;
  }
  return equal;
}

void print(const char* when, const vattn::CacheStats& stats) {
  std::printf(
      "%-28s %4llu KiB mapped, %4llu KiB pooled, %4llu KiB hold tokens; pages: %llu created; prompts: %llu of %llu in old "
      "pages; %llu driver calls\n",
      when, stats.mapped_bytes / 1024ULL, stats.pooled_bytes / 1024ULL, stats.used_bytes / 1024ULL, stats.pages_created + 0ULL,
      stats.reused_prompts + 0ULL, stats.prompts + 0ULL, stats.driver_calls + 0ULL);
}

bool run_all() {
  vattn::CacheConfig config;
  config.num_layers = kLayers;
  config.num_kv_heads = kKvHeads;
  config.head_dim = kHeadDim;
  config.max_batch_size = 4;
  config.max_seq_len = 8192;
  config.dtype = vattn::DType::kFloat32;
  config.memory_limit = 4 << 20;
  vattn::KVCache cache(config, vattn::parse_device("cpu"));
  std::printf("vattn %s, %llu MiB of addresses\n", vattn::version(), cache.stats().reserved_bytes / (1ULL << 20));

  Request a{cache.alloc(), 1};
  Request b{cache.alloc(), 2};
  bool equal = grow(cache, {&a}, 300) && grow(cache, {&b}, 40);  // two prompts
  print("after the prompts", cache.stats());
  for (int token = 0; token < 60; ++token) equal = grow(cache, {&a, &b}, 1) && equal;
  print("after 60 tokens each", cache.stats());

  cache.free(a.slot);
  print("one request freed", cache.stats());
  Request c{cache.alloc(), 3};
  equal = grow(cache, {&c}, 350) && grow(cache, {&b, &c}, 1) && equal;
  print("its memory reused", cache.stats());
  equal = cache.stats().reused_prompts > 0 && equal;

  try {
    cache.step({{b.slot, b.length + 1}, {c.slot, config.max_seq_len}});
    equal = false;
  } catch (const vattn::OutOfMemoryError& error) {
    std::printf("refused, as it should be: %s\n", error.what());
  }
  return cache.seq_len(b.slot) == b.length && grow(cache, {&b, &c}, 1) && equal;
}

}  // namespace

int main() {
  try {
    const bool equal = run_all();
    std::puts(equal ? "every attention output equals the reference" : "WRONG: an attention output differs from the reference");
    return equal ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "failed: %s\n", error.what());
    return 1;
  }
}
