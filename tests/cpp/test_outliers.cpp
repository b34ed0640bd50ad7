// Products with outliers of every instruction set against plain loops in double, without Python: for sanitizers and for
// emulated CPUs. Buffers have the exact sizes, so any overrun meets a red zone.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "dispatch.h"
#include "outliers.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

// Integers: every sum is exact in fp32.
void check(uint32_t isa, const char* name, int64_t m, int64_t n, int64_t k, int64_t count, bool out_of_range,
           std::mt19937& rng) {
  std::vector<float> x(m * k), values(n * count), y(m * n, NAN);
  std::vector<int32_t> columns(n * count);
  for (float& v : x) v = static_cast<float>(rng() % 17) - 8;
  for (float& v : values) v = static_cast<float>(rng() % 17) - 8;
  for (int32_t& c : columns) c = static_cast<int32_t>(rng() % k);
  if (out_of_range) columns[0] = -1;
  Outliers z{};
  z.m = m;
  z.n = n;
  z.k = z.x_stride = k;
  z.count = count;
  z.x = x.data();
  z.columns = columns.data();
  z.values = values.data();
  z.out = y.data();
  multiply_outliers(z, isa, 2);
  if (out_of_range) return;
  ++checks;
  for (int64_t i = 0; i < m * n; ++i) {
    double exact = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t entry = i % n * count + j;
      exact += static_cast<double>(values[entry]) * x[i / n * k + columns[entry]];
    }
    if (y[i] == exact) continue;
    std::printf("%s: m %ld n %ld k %ld count %ld: y[%ld] is %g, not %g\n", name, static_cast<long>(m),
                static_cast<long>(n), static_cast<long>(k), static_cast<long>(count), static_cast<long>(i),
                static_cast<double>(y[i]), exact);
    ++failures;
    return;
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  const uint32_t detected = active_isa();
  for (const char* name : {"scalar", "avx2", "avx512"}) {
    const uint32_t isa = cap_isa(detected, name);
    for (int64_t m : {1, 4, 5, 16, 33}) {
      for (int64_t n : {1, 65}) {
        for (int64_t k : {1, 17, 300}) {
          for (int64_t count : {1, 8, 17, 1030}) {
            for (bool out_of_range : {false, true}) check(isa, name, m, n, k, count, out_of_range, rng);
          }
        }
      }
    }
  }
  std::printf("%d products with outliers, %d failures\n", checks, failures);
  return failures != 0;
}
