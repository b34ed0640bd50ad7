// Products with outliers of every instruction set against plain loops in double, without Python: for sanitizers and for
// emulated CPUs. Operands end at pages that nobody may touch (guarded.h).
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>

#include "core/dispatch.h"
#include "cpu/sparse/outliers.h"
#include "guarded.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

// Integers: every sum is exact in fp32. `wrong`: a column that is not one.
void check(uint32_t isa, const char* name, int64_t m, int64_t n, int64_t k, int64_t count, int32_t wrong,
           std::mt19937& rng) {
  const int64_t stride = k + 3;
  Guarded<float> x((m - 1) * stride + k), values(n * count), y(m * n);
  Guarded<int32_t> columns(n * count);
  for (float& v : x) v = static_cast<float>(rng() % 17) - 8;
  for (float& v : values) v = static_cast<float>(rng() % 17) - 8;
  for (int32_t& c : columns) c = static_cast<int32_t>(rng() % k);
  if (wrong) columns[n * count / 2] = wrong;
  Outliers z{};
  z.m = m;
  z.n = n;
  z.k = k;
  z.x_stride = stride;
  z.count = count;
  z.x = x.data();
  z.columns = columns.data();
  z.values = values.data();
  z.out = y.data();
  bool refused = false;
  const auto multiply = [&] {
    try {
      multiply_outliers(z, isa, 2);
    } catch (const std::invalid_argument& e) {
      refused = std::strstr(e.what(), std::to_string(wrong).c_str()) != nullptr;
    }
  };
  const auto fail = [&](const char* what, int64_t i) {
    std::printf("FAIL %s: m %lld n %lld k %lld count %lld: %s at %lld\n", name, (long long)m, (long long)n,
                (long long)k, (long long)count, what, (long long)i);
    ++failures;
  };
  ++checks;
  if (!same_when_poisoned(y, multiply)) fail("poisoned memory reaches the result", 0);
  if (refused != (wrong != 0)) fail("a wrong column is not refused, or a right one is", wrong);
  if (wrong) return;
  for (int64_t i = 0; i < m * n; ++i) {
    double exact = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t entry = i % n * count + j;
      exact += static_cast<double>(values[entry]) * x[i / n * stride + columns[entry]];
    }
    if (y[i] != exact) return fail("another sum", i);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  int ran = 0;
  for (uint32_t set : {kScalar, kAvx2, kAvx512}) {
    if (!(active_isa() & set)) continue;
    ++ran;
    const char* name = isa_name(static_cast<Isa>(set));
    const uint32_t isa = cap_isa(active_isa(), name);
    count_for(std::string("outliers, ") + name);
    for (int64_t m : {1, 4, 5, 16, 33}) {
      for (int64_t n : {1, 65}) {
        for (int64_t k : {1, 17, 300}) {
          check(isa, name, m, n, k, 0, 0, rng);
          for (int64_t count : {1, 8, 17, 1030}) {
            check(isa, name, m, n, k, count, 0, rng);
            for (int32_t wrong : {-1, static_cast<int32_t>(k)}) check(isa, name, m, n, k, count, wrong, rng);
          }
        }
      }
    }
  }
  std::printf("isa mask %u: products with outliers of %d instruction sets ran, %d checks, %d failures\n", active_isa(),
              ran, checks, failures);
  print_memory_checks();
  return failures != 0;
}
