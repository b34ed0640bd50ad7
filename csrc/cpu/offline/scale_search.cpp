#include "cpu/offline/scale_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/parallel.h"

namespace lowbit {
namespace {

constexpr int64_t kLanes = 8;

class Searcher {
 public:
  // Reserves all memory, so that row() does not throw inside a parallel region.
  explicit Searcher(const ScaleSearch& s) : s_(s) {
    const int64_t padded = (std::min(s.group, s.k) + kLanes - 1) / kLanes * kLanes;
    for (std::vector<float>* v : {&x_, &w_, &ratio_, &value_}) v->resize(static_cast<size_t>(padded));
    for (int t = 0; t < s.tables; ++t) {
      const float* table = s.table + t * s.entries;
      for (int e = 1; e < s.entries; ++e) middles_.push_back((table[e - 1] + table[e]) / 2);
    }
  }

  void row(int64_t r) {
    const int64_t groups = (s_.k + s_.group - 1) / s_.group;
    double error = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = r * s_.k + g * s_.group, at = r * groups + g;
      size_ = std::min(s_.group, s_.k - g * s_.group);
      weights_ = s_.weights + first;
      importance_ = s_.importance ? s_.importance + first : nullptr;
      step_ = s_.steps ? s_.steps + at : nullptr;
      error += group(s_.scales + at, s_.chosen + at);
    }
    s_.errors[r] = error;
  }

 private:
  struct Sums {
    float product = 0, square = 0;  // of importance * weight * value and importance * value^2
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
    middle_ = middles_.data() + table * (s_.entries - 1);
  }

  // Weights over the largest one that counts, which is returned, and importance over the largest; 0 if none counts.
  float normalize() {
    float largest = 0, most = importance_ ? 0.0f : 1.0f;
    for (int64_t i = 0; i < size_; ++i) {
      if (importance_) most = std::max(most, importance_[i]);
      if (!importance_ || importance_[i] > 0) largest = std::max(largest, std::fabs(weights_[i]));
    }
    if (largest == 0) return 0;
    for (size_t i = 0; i < x_.size(); ++i) {
      const bool counts = static_cast<int64_t>(i) < size_;
      w_[i] = !counts ? 0.0f : importance_ ? importance_[i] / most : 1.0f;
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

  void find_values(const float* ratio) {
    constexpr int kCompared = 32;
    const size_t size = x_.size();
    float* value = value_.data();
    if (s_.entries > kCompared) {
      for (size_t i = 0; i < size; ++i) {
        value[i] = table_[std::lower_bound(middle_, middle_ + s_.entries - 1, ratio[i]) - middle_];
      }
      return;
    }
    std::fill(value, value + size, table_[0]);
    for (int e = 0; e + 1 < s_.entries; ++e) {
      const float middle = middle_[e], entry = table_[e + 1];
      for (size_t i = 0; i < size; ++i) value[i] = ratio[i] > middle ? entry : value[i];
    }
  }

  Sums sums_of(float scale) {
    const float inverse = scale == 0 ? 0 : 1 / scale;
    for (size_t i = 0; i < x_.size(); ++i) ratio_[i] = x_[i] * inverse;
    find_values(ratio_.data());
    float product[kLanes] = {}, square[kLanes] = {};
    for (size_t i = 0; i < x_.size(); i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const float value = value_[i + lane], weighted = w_[i + lane] * value;
        product[lane] += weighted * x_[i + lane];
        square[lane] += weighted * value;
      }
    }
    Sums sums;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      sums.product += product[lane];
      sums.square += square[lane];
    }
    return sums;
  }

  double error_of(float scale) {
    for (size_t i = 0; i < x_.size(); ++i) {
      const bool inside = static_cast<int64_t>(i) < size_ && scale != 0;
      ratio_[i] = inside ? weights_[i] / scale : 0.0f;
    }
    find_values(ratio_.data());
    double error = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const double rest = double{weights_[i]} - double{scale * value_[static_cast<size_t>(i)]};
      error += (importance_ ? double{importance_[i]} : 1.0) * rest * rest;
    }
    return error;
  }

  const ScaleSearch& s_;
  int64_t size_ = 0;
  const float *weights_ = nullptr, *importance_ = nullptr, *step_ = nullptr;
  // The table in use, and what lies in the middle of two of its entries.
  int used_ = 0;
  const float *table_ = nullptr, *middle_ = nullptr;
  std::vector<float> middles_, x_, w_, ratio_, value_;
};

}  // namespace

void search_scales(const ScaleSearch& search, int threads, Stop* stop) {
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(threads, search.rows));
  std::vector<Searcher> searchers(static_cast<size_t>(tasks), Searcher(search));
  parallel(tasks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t r = task; r < search.rows; r += tasks) {
        if (begin == 0 ? stop->asked() : stop->stopped()) return;
        searchers[static_cast<size_t>(task)].row(r);
      }
    }
  });
}

}  // namespace lowbit
