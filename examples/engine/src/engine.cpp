#include "engine.hpp"

#include <stdexcept>
#include <string>

namespace toy {
namespace {

vattn::CacheConfig config_of(std::int64_t num_layers, std::int64_t max_batch_size, std::int64_t max_seq_len,
                             std::optional<std::int64_t> memory_limit) {
  vattn::CacheConfig config;
  config.num_layers = num_layers;
  config.num_kv_heads = kKvHeads;
  config.head_dim = kHeadDim;
  config.max_batch_size = max_batch_size;
  config.max_seq_len = max_seq_len;
  config.dtype = vattn::DType::kFloat32;
  config.memory_limit = memory_limit;
  return config;
}

double sum_of(const vattn::TensorView<3>& view) {
  double total = 0.0;
  for (std::int64_t token = 0; token < view.shape[0]; ++token) {
    for (std::int64_t head = 0; head < view.shape[1]; ++head) {
      const float* const row = view.data<float>() + token * view.strides[0] + head * view.strides[1];
      for (std::int64_t dim = 0; dim < view.shape[2]; ++dim) total += row[dim];
    }
  }
  return total;
}

}  // namespace

Engine::Engine(std::int64_t num_layers, std::int64_t max_batch_size, std::int64_t max_seq_len,
               std::optional<std::int64_t> memory_limit)
    : cache_(config_of(num_layers, max_batch_size, max_seq_len, memory_limit)) {
  for (std::int64_t layer = 0; layer < num_layers; ++layer) layers_.emplace_back(layer);
}

std::int64_t Engine::run(std::int64_t slot, std::int64_t token, std::int64_t position) {
  Vector x = embed(token);
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    run_layer(layers_[layer], cache_.view(static_cast<std::int64_t>(layer), slot), position, x);
  }
  return next_token(x);
}

std::int64_t Engine::add_request(const std::vector<std::int64_t>& prompt) {
  if (prompt.empty()) throw std::invalid_argument("prompt is empty: give at least one token");
  for (const std::int64_t token : prompt) {
    if (token < 0 || token >= kVocabulary) {
      throw std::invalid_argument("prompt: token " + std::to_string(token) + " is not one of " + std::to_string(kVocabulary));
    }
  }
  const std::lock_guard lock(mutex_);
  const std::int64_t slot = cache_.alloc();
  try {
    cache_.step({{slot, static_cast<std::int64_t>(prompt.size())}});
    std::int64_t next = 0;
    for (std::size_t i = 0; i < prompt.size(); ++i) next = run(slot, prompt[i], static_cast<std::int64_t>(i));
    next_[slot] = next;
  } catch (...) {
    cache_.free(slot);
    throw;
  }
  return slot;
}

std::map<std::int64_t, std::int64_t> Engine::decode_step() {
  const std::lock_guard lock(mutex_);
  std::vector<vattn::SlotLength> lengths;
  for (const auto& [slot, token] : next_) lengths.push_back({slot, cache_.seq_len(slot) + 1});
  cache_.step(lengths);  // memory for all of them, or an exception and nothing changed
  const std::map<std::int64_t, std::int64_t> generated = next_;
  for (const auto& [slot, tokens] : lengths) next_[slot] = run(slot, generated.at(slot), tokens - 1);
  return generated;
}

void Engine::finish(std::int64_t request) {
  const std::lock_guard lock(mutex_);
  cache_.free(request);
  next_.erase(request);
}

double Engine::sum(std::int64_t layer, std::int64_t request) const {
  const vattn::KVView<3> views = cache_.view(layer, request);
  return sum_of(views.k) + sum_of(*views.v);
}

}  // namespace toy
