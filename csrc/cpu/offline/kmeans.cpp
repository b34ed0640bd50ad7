#include "cpu/offline/kmeans.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/parallel.h"

namespace lowbit {
namespace {

class Solver {
 public:
  // Reserves all memory, so that solve() does not throw inside a parallel region.
  Solver(int64_t n, int k) : k_(k) {
    const size_t size = static_cast<size_t>(n) + 1;
    value_.resize(size);
    weight_.resize(size);
    sum_w_.resize(size);
    sum_wv_.resize(size);
    sum_wvv_.resize(size);
    best_.resize(size);
    next_.resize(size);
    // The last layer is needed at one point only, and the first has no split.
    // Not zeroed: it may take gigabytes, and seconds that nothing could interrupt.
    if (k > 1 && n > k) split_ = std::make_unique_for_overwrite<int32_t[]>(size * static_cast<size_t>(k - 1));
  }

  // `asks` is for the thread that made `stop`.
  void solve(const float* values, const double* weights, int64_t n, float* centers, Stop* stop, bool asks) {
    stop_ = stop;
    asks_ = asks;
    merge(values, weights, n);
    if (count_ == 0) merge(values, nullptr, n);
    if (count_ <= k_) {
      for (int c = 0; c < k_; ++c) {
        centers[c] = static_cast<float>(value_[static_cast<size_t>(std::min<int64_t>(c, count_ - 1))]);
      }
      return;
    }
    accumulate();
    for (int64_t i = 1; i <= count_; ++i) best_[at(i)] = cost(0, i);
    for (int layer = 2; layer <= k_; ++layer) {
      const int64_t first = layer == k_ ? count_ : layer;
      fill(split_.get() + at(layer - 2) * (at(count_) + 1), first, count_, layer - 1, count_ - 1);
      if (stop->stopped()) return;
      best_.swap(next_);
    }
    int64_t end = count_;
    for (int c = k_ - 1; c >= 0; --c) {
      const int64_t begin = c == 0 ? 0 : split_[at(c - 1) * (at(count_) + 1) + at(end)];
      centers[c] = mean(begin, end);
      end = begin;
    }
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }

  // Distinct values of positive weight.
  void merge(const float* values, const double* weights, int64_t n) {
    count_ = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double w = weights ? weights[i] : 1.0;
      if (!(w > 0)) continue;
      if (count_ > 0 && value_[at(count_ - 1)] == values[i]) {
        weight_[at(count_ - 1)] += w;
      } else {
        value_[at(count_)] = values[i];
        weight_[at(count_++)] = w;
      }
    }
  }

  // Prefix sums about the mean: without the shift, values far from zero would lose their variance to cancellation.
  void accumulate() {
    double total = 0, moment = 0;
    for (int64_t i = 0; i < count_; ++i) {
      total += weight_[at(i)];
      moment += weight_[at(i)] * (value_[at(i)] - value_[0]);
    }
    const double shift = value_[0] + moment / total;
    sum_w_[0] = sum_wv_[0] = sum_wvv_[0] = 0;
    for (int64_t i = 0; i < count_; ++i) {
      const double v = value_[at(i)] - shift, w = weight_[at(i)];
      sum_w_[at(i + 1)] = sum_w_[at(i)] + w;
      sum_wv_[at(i + 1)] = sum_wv_[at(i)] + w * v;
      sum_wvv_[at(i + 1)] = sum_wvv_[at(i)] + w * v * v;
    }
  }

  // Weighted squared distance of the values [j, i) to their mean, j < i.
  double cost(int64_t j, int64_t i) const {
    const double w = sum_w_[at(i)] - sum_w_[at(j)];
    const double s = sum_wv_[at(i)] - sum_wv_[at(j)];
    return std::max(0.0, sum_wvv_[at(i)] - sum_wvv_[at(j)] - s * s / w);
  }

  // next_[i] = min over j in [low, min(high, i - 1)] of best_[j] + cost(j, i), for i in [begin, end]; the middle i
  // first, because its best j bounds those of both halves.
  void fill(int32_t* split, int64_t begin, int64_t end, int64_t low, int64_t high) {
    while (begin <= end && !stops(high - low)) {
      const int64_t middle = begin + (end - begin) / 2;
      const int64_t last = std::min(high, middle - 1);
      int64_t best_j = low;
      double best = best_[at(low)] + cost(low, middle);
      for (int64_t j = low + 1; j <= last; ++j) {
        const double candidate = best_[at(j)] + cost(j, middle);
        if (candidate < best) {
          best = candidate;
          best_j = j;
        }
      }
      next_[at(middle)] = best;
      split[middle] = static_cast<int32_t>(best_j);
      fill(split, begin, middle - 1, low, best_j);
      begin = middle + 1;
      low = best_j;
    }
  }

  // Whether to stop, asked after some milliseconds of work.
  bool stops(int64_t work) {
    constexpr int64_t kWork = 1 << 20;
    worked_ += work + 1;
    if (worked_ < kWork) return stop_->stopped();
    worked_ = 0;
    return asks_ ? stop_->asked() : stop_->stopped();
  }

  // Summed about the first value: a segment of one value gives that value back exactly.
  float mean(int64_t begin, int64_t end) const {
    double total = 0, moment = 0;
    for (int64_t i = begin; i < end; ++i) {
      total += weight_[at(i)];
      moment += weight_[at(i)] * (value_[at(i)] - value_[at(begin)]);
    }
    return static_cast<float>(value_[at(begin)] + moment / total);
  }

  int k_;
  int64_t count_ = 0, worked_ = 0;
  Stop* stop_ = nullptr;
  bool asks_ = false;
  std::vector<double> value_, weight_, sum_w_, sum_wv_, sum_wvv_, best_, next_;
  std::unique_ptr<int32_t[]> split_;
};

}  // namespace

void kmeans_rows(const float* sorted_values, const double* weights, int64_t rows, int64_t n, int k, float* centers,
                 int threads, Stop* stop) {
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  std::vector<Solver> solvers;
  for (int64_t task = 0; task < tasks; ++task) solvers.emplace_back(n, k);
  parallel(tasks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t r = task; r < rows; r += tasks) {
        if (stop->stopped()) return;
        solvers[static_cast<size_t>(task)].solve(sorted_values + r * n, weights ? weights + r * n : nullptr, n,
                                                 centers + r * k, stop, begin == 0);
      }
    }
  });
}

}  // namespace lowbit
