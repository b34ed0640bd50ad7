// Exact weighted k-means in one dimension: minimises sum_i w_i (v_i - c(v_i))^2 over every choice of k centers.
// Dynamic programming over the sorted values; the best split point is monotone in the end of the prefix, so divide
// and conquer needs O(k n log n) time and 4 k n bytes (n counts distinct values).
// Values are ascending and finite, weights finite and not negative; the caller checks. A null `weights`, or weights
// that are all zero, count every value once. Centers come out ascending. With at most k distinct values of positive
// weight the centers are those values, and the last one is repeated.
#pragma once

#include <cstdint>

#include "core/stop.h"

namespace lowbit {

// One independent problem per row: values (rows, n), weights (rows, n) or null, centers (rows, k). n >= 1, k >= 1.
// Centers are not to be used if it was stopped.
void kmeans_rows(const float* sorted_values, const double* weights, int64_t rows, int64_t n, int k, float* centers,
                 int threads, Stop* stop);

}  // namespace lowbit
