#include "model.hpp"

#include <algorithm>
#include <cmath>

namespace toy {
namespace {

constexpr float kScale = 0.125F;  // 1 / sqrt(kWidth)

Vector matrix(std::int64_t index, std::int64_t rows) {
  Vector weights;
  weights.reserve(static_cast<std::size_t>(rows * kWidth));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t column = 0; column < kWidth; ++column) weights.push_back(weight(index, row, column) * kScale);
  }
  return weights;
}

/// rows x kWidth times kWidth.
Vector multiply(const Vector& weights, const Vector& x) {
  Vector product(weights.size() / x.size(), 0.0F);
  for (std::size_t row = 0; row < product.size(); ++row) {
    for (std::size_t i = 0; i < x.size(); ++i) product[row] += weights[row * x.size() + i] * x[i];
  }
  return product;
}

Vector normalised(const Vector& x) {
  float squares = 1e-6F;
  for (const float value : x) squares += value * value / static_cast<float>(x.size());
  Vector result(x);
  for (float& value : result) value /= std::sqrt(squares);
  return result;
}

float* at(const vattn::TensorView<3>& view, std::int64_t token, std::int64_t head) {
  return view.data<float>() + token * view.strides[0] + head * view.strides[1];
}

void store(const vattn::TensorView<3>& view, std::int64_t token, const Vector& heads) {
  for (std::int64_t head = 0; head < kKvHeads; ++head)
    std::copy_n(heads.data() + head * kHeadDim, kHeadDim, at(view, token, head));
}

/// One query head over `tokens` tokens.
void attend(const float* q, const vattn::KVView<3>& views, std::int64_t kv_head, std::int64_t tokens, float* out) {
  Vector scores(static_cast<std::size_t>(tokens), 0.0F);
  for (std::int64_t token = 0; token < tokens; ++token) {
    const float* const k = at(views.k, token, kv_head);
    for (std::int64_t dim = 0; dim < kHeadDim; ++dim) scores[static_cast<std::size_t>(token)] += q[dim] * k[dim] * 0.25F;
  }
  const float most = *std::max_element(scores.begin(), scores.end());
  float total = 0.0F;
  for (float& score : scores) total += score = std::exp(score - most);
  for (std::int64_t token = 0; token < tokens; ++token) {
    const float* const v = at(*views.v, token, kv_head);
    for (std::int64_t dim = 0; dim < kHeadDim; ++dim) out[dim] += scores[static_cast<std::size_t>(token)] / total * v[dim];
  }
}

}  // namespace

float weight(std::int64_t matrix, std::int64_t row, std::int64_t column) {
  auto x = static_cast<std::uint32_t>(matrix * 0x9E3779B1 + row * 0x85EBCA77 + column * 0xC2B2AE3D);
  x = (x ^ x >> 15) * 0x2C1B3C6DU;
  x = (x ^ x >> 12) * 0x297A2D39U;
  return static_cast<float>((x ^ x >> 15) >> 8) / static_cast<float>(1 << 23) - 1.0F;
}

Layer::Layer(std::int64_t index)
    : q(matrix(1 + 4 * index, kWidth)),
      k(matrix(2 + 4 * index, kKvHeads * kHeadDim)),
      v(matrix(3 + 4 * index, kKvHeads * kHeadDim)),
      o(matrix(4 + 4 * index, kWidth)) {}

Vector embed(std::int64_t token) {
  Vector x;
  for (std::int64_t column = 0; column < kWidth; ++column) x.push_back(weight(0, token, column));
  return x;
}

void run_layer(const Layer& layer, const vattn::KVView<3>& views, std::int64_t position, Vector& x) {
  const Vector h = normalised(x);
  const Vector q = multiply(layer.q, h);
  store(views.k, position, multiply(layer.k, h));
  store(*views.v, position, multiply(layer.v, h));
  Vector attended(kWidth, 0.0F);
  for (std::int64_t head = 0; head < kQueryHeads; ++head) {
    attend(q.data() + head * kHeadDim, views, head / (kQueryHeads / kKvHeads), position + 1, attended.data() + head * kHeadDim);
  }
  const Vector added = multiply(layer.o, attended);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += added[i];
}

std::int64_t next_token(const Vector& x) {
  static const Vector embedding = matrix(0, kVocabulary);
  const Vector logits = multiply(embedding, normalised(x));
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

}  // namespace toy
