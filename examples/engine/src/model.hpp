// A toy transformer whose weights are a formula, so that anyone can compute the same tokens: attention layers with grouped
// queries and nothing else. It is a stand-in for a real model's kernels: what it reads and writes are plain strided views.
//
// Thread: any; it holds no state.
#pragma once

#include <cstdint>
#include <vattn/vattn.hpp>
#include <vector>

namespace toy {

constexpr std::int64_t kVocabulary = 97;
constexpr std::int64_t kQueryHeads = 4;
constexpr std::int64_t kKvHeads = 2;
constexpr std::int64_t kHeadDim = 16;
constexpr std::int64_t kWidth = kQueryHeads * kHeadDim;

using Vector = std::vector<float>;

/// Element (row, column) of a weight matrix, in [-1, 1). Matrix 0 is the embedding; layer i has 1 + 4 i (queries), 2 + 4 i
/// (keys), 3 + 4 i (values) and 4 + 4 i (output).
[[nodiscard]] float weight(std::int64_t matrix, std::int64_t row, std::int64_t column);

/// A layer's weights, spelled out once.
struct Layer {
  explicit Layer(std::int64_t index);

  Vector q, k, v, o;
};

[[nodiscard]] Vector embed(std::int64_t token);

/// Runs one layer for the token at `position`: writes its key and value into the views, attends over everything up to it, and
/// adds the result to `x`.
void run_layer(const Layer& layer, const vattn::KVView<3>& views, std::int64_t position, Vector& x);

/// The most likely next token.
[[nodiscard]] std::int64_t next_token(const Vector& x);

}  // namespace toy
