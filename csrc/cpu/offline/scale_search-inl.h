// The search of scales, sixteen weights at a time. A vector of the compiler is cut into what the instruction set has,
// so that all instruction sets add in one order and find the same scales.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/offline/scale_search.h"

// Vectors wider than those of the instruction set are passed otherwise by other compilers: all functions here are
// local.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int64_t kWeights = 16;
typedef float Weights __attribute__((vector_size(4 * kWeights)));
typedef double Wide __attribute__((vector_size(8 * kWeights)));

inline Weights load_weights(const float* p) {
  Weights v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline auto sum_of(V v) {
  auto sum = v[0];
  for (int64_t lane = 1; lane < kWeights; ++lane) sum += v[lane];
  return sum;
}

class ScaleSearcher {
 public:
  ScaleSearcher(const ScaleSearch& s, float* scratch) : s_(s) {
    const int64_t padded = scale_search_padded(s);
    x_ = scratch;
    w_ = x_ + padded;
    middles_ = w_ + padded;
    for (int t = 0; t < s.tables; ++t) {
      const float* table = s.table + t * s.entries;
      for (int e = 1; e < s.entries; ++e) middles_[t * (s.entries - 1) + e - 1] = (table[e - 1] + table[e]) / 2;
    }
  }

  void row(int64_t r) {
    const int64_t groups = (s_.k + s_.group - 1) / s_.group;
    double error = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = r * s_.k + g * s_.group, at = r * groups + g;
      size_ = std::min(s_.group, s_.k - g * s_.group);
      padded_ = (size_ + kWeights - 1) / kWeights * kWeights;
      weights_ = s_.weights + first;
      importance_ = s_.importance ? s_.importance + first : nullptr;
      step_ = s_.steps ? s_.steps + at : nullptr;
      error += group(s_.scales + at, s_.chosen + at);
    }
    s_.errors[r] = error;
  }

 private:
  struct Sums {
    float product, square;  // of importance * weight * value and importance * value^2
  };

  double group(float* scale, uint8_t* chosen) {
    use(*chosen);
    double error = error_of(*scale);
    const float largest = normalize();
    if (largest == 0) return error;
    float best = std::numeric_limits<float>::infinity(), found = *scale;
    int table = *chosen;
    const auto offer = [&](float candidate) {
      const Sums sums = sums_of(candidate / largest);
      const float fitted = sums.square > 0 ? snapped(largest * (sums.product / sums.square)) : candidate;
      const float c = fitted / largest;
      // Less the sum of importance * weight^2, which all candidates have.
      const float gain = c * (c * sums.square - 2 * sums.product);
      if (gain < best) {
        best = gain;
        found = fitted;
        table = used_;
      }
    };
    for (int t = 0; t < s_.tables; ++t) {
      use(t);
      float last = *scale;
      offer(last);
      for (int i = 0; i < s_.num_ratios; ++i) {
        const float candidate = snapped(largest * s_.ratios[i]);
        if (candidate != last) offer(candidate);
        last = candidate;
      }
    }
    if (found == *scale && table == *chosen) return error;
    use(table);
    const double wanted = error_of(found);
    if (wanted < error) {
      error = wanted;
      *scale = found;
      *chosen = static_cast<uint8_t>(table);
    }
    return error;
  }

  void use(int table) {
    used_ = table;
    table_ = s_.table + table * s_.entries;
    middle_ = middles_ + table * (s_.entries - 1);
  }

  // Weights over the largest one that counts, which is returned, and importance over the largest; 0 if none counts.
  float normalize() {
    float largest = 0, most = importance_ ? 0.0f : 1.0f;
    for (int64_t i = 0; i < size_; ++i) {
      if (importance_) most = std::max(most, importance_[i]);
      if (!importance_ || importance_[i] > 0) largest = std::max(largest, std::fabs(weights_[i]));
    }
    if (largest == 0) return 0;
    for (int64_t i = 0; i < padded_; ++i) {
      w_[i] = i >= size_ ? 0.0f : importance_ ? importance_[i] / most : 1.0f;
      x_[i] = w_[i] > 0 ? weights_[i] / largest : 0.0f;
    }
    return largest;
  }

  float snapped(float scale) const {
    if (scale == 0) return 0;
    if (!step_) return rounded(scale);
    if (*step_ == 0) return 0;
    const float top = static_cast<float>(s_.top), code = std::clamp(std::nearbyint(scale / *step_), -top, top);
    return *step_ * (code != 0 ? code : std::copysign(1.0f, scale));
  }

  float rounded(float scale) const {
    int exponent;
    std::frexp(scale, &exponent);
    const int unit = std::max(exponent - s_.digits, s_.least);
    const double units = std::nearbyint(std::ldexp(double{scale}, -unit));
    const double value = std::ldexp(units != 0 ? units : std::copysign(1.0, units), unit);
    return static_cast<float>(std::clamp(value, -double{s_.most}, double{s_.most}));
  }

  // The entries nearest to weights over a scale.
  Weights nearest(Weights ratio) const {
    constexpr int kCompared = 32;
    if (s_.entries > kCompared) {
      Weights value{};
      for (int64_t lane = 0; lane < kWeights; ++lane) {
        value[lane] = table_[std::lower_bound(middle_, middle_ + s_.entries - 1, ratio[lane]) - middle_];
      }
      return value;
    }
    Weights value = Weights{} + table_[0];
    for (int e = 0; e + 1 < s_.entries; ++e) value = ratio > middle_[e] ? Weights{} + table_[e + 1] : value;
    return value;
  }

  Sums sums_of(float scale) const {
    const float inverse = scale == 0 ? 0 : 1 / scale;
    Weights product{}, square{};
    for (int64_t i = 0; i < padded_; i += kWeights) {
      const Weights x = load_weights(x_ + i), value = nearest(x * inverse), weighted = load_weights(w_ + i) * value;
      product += weighted * x;
      square += weighted * value;
    }
    return {sum_of(product), sum_of(square)};
  }

  double error_of(float scale) const {
    Wide error{};
    for (int64_t i = 0; i < size_; i += kWeights) {
      float weight[kWeights] = {}, importance[kWeights] = {};
      const size_t count = static_cast<size_t>(std::min(kWeights, size_ - i));
      __builtin_memcpy(weight, weights_ + i, count * sizeof *weight);
      if (importance_) {
        __builtin_memcpy(importance, importance_ + i, count * sizeof *importance);
      } else {
        std::fill_n(importance, count, 1.0f);
      }
      const Weights w = load_weights(weight), value = scale * nearest(scale != 0 ? w / scale : Weights{});
      const Wide rest = __builtin_convertvector(w, Wide) - __builtin_convertvector(value, Wide);
      error += __builtin_convertvector(load_weights(importance), Wide) * rest * rest;
    }
    return sum_of(error);
  }

  const ScaleSearch& s_;
  int64_t size_ = 0, padded_ = 0;
  const float *weights_ = nullptr, *importance_ = nullptr, *step_ = nullptr;
  // The table in use, and what lies in the middle of two of its entries.
  int used_ = 0;
  const float *table_ = nullptr, *middle_ = nullptr;
  float *middles_, *x_, *w_;
};

void search_rows(const ScaleSearch& s, int64_t first, int64_t step, float* scratch, Stop* stop, bool asks) {
  ScaleSearcher searcher(s, scratch);
  for (int64_t r = first; r < s.rows; r += step) {
    if (asks ? stop->asked() : stop->stopped()) return;
    searcher.row(r);
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
