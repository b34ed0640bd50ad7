// Products with outliers, and with pruned weights, of every instruction set against plain loops in double, without
// Python: for sanitizers and for emulated CPUs. Operands end at pages that nobody may touch (guarded.h).
#include <cstdio>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/dispatch.h"
#include "cpu/sparse/outliers.h"
#include "cpu/sparse/pruned.h"
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

// Rows of different lengths, codes and distances beyond what is allowed in the padding; sums are exact.
void check_pruned(uint32_t isa, const char* name, int64_t m, int64_t n, int64_t k, int bits, std::mt19937& rng) {
  const int64_t stride = k + 3, blocks = (n + kPrunedRows - 1) / kPrunedRows, most = k < 9 ? k : 9;
  Guarded<float> x((m - 1) * stride + k), table(int64_t{1} << bits), y(m * n);
  Guarded<int64_t> starts(blocks + 1);
  std::vector<int64_t> length(static_cast<size_t>(blocks * kPrunedRows), 0);
  starts[0] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t longest = 0;
    for (int64_t r = 0; r < kPrunedRows && b * kPrunedRows + r < n; ++r) {
      int64_t& own = length[static_cast<size_t>(b * kPrunedRows + r)];
      own = static_cast<int64_t>(rng() % static_cast<uint64_t>(most + 1));
      longest = own > longest ? own : longest;
    }
    starts[b + 1] = starts[b] + longest;
  }
  Guarded<uint8_t> entries(starts[blocks] * 2 * kPrunedRows);
  std::vector<double> dense(static_cast<size_t>(n * k), 0.0);
  for (float& v : x) v = static_cast<float>(rng() % 17) - 8;
  for (float& v : table) v = static_cast<float>(rng() % 17) - 8;
  table[0] = 0;
  for (int64_t row = 0; row < blocks * kPrunedRows; ++row) {
    int64_t column = -1;
    for (int64_t s = starts[row / kPrunedRows], i = 0; s < starts[row / kPrunedRows + 1]; ++s, ++i) {
      uint8_t* own = entries.data() + s * 2 * kPrunedRows + row % kPrunedRows;
      const int64_t left = length[static_cast<size_t>(row)] - i;  // with this one
      own[0] = 255;
      own[kPrunedRows] = 0;
      if (left <= 0) continue;
      const int64_t room = k - 1 - column - left;
      own[0] = static_cast<uint8_t>(rng() % static_cast<uint64_t>((room < 255 ? room : 255) + 1));
      own[kPrunedRows] = static_cast<uint8_t>(rng() % (1u << bits));
      column += own[0] + 1;
      dense[static_cast<size_t>(row * k + column)] = table[own[kPrunedRows]];
    }
  }
  Pruned z{};
  z.m = m;
  z.n = n;
  z.k = k;
  z.x = x.data();
  z.x_dtype = Dtype::kF32;
  z.x_stride = stride;
  z.entries = entries.data();
  z.steps = starts[blocks];
  z.starts = starts.data();
  z.table = table.data();
  z.bits = bits;
  z.out = y.data();
  const auto fail = [&](const char* what, int64_t i) {
    std::printf("FAIL pruned, %s: m %lld n %lld k %lld bits %d: %s at %lld\n", name, (long long)m, (long long)n,
                (long long)k, bits, what, (long long)i);
    ++failures;
  };
  ++checks;
  if (!same_when_poisoned(y, [&] { multiply_pruned(z, isa, 2); })) fail("poisoned memory reaches the result", 0);
  for (int64_t i = 0; i < m * n; ++i) {
    double exact = 0;
    for (int64_t j = 0; j < k; ++j) exact += dense[static_cast<size_t>(i % n * k + j)] * x[i / n * stride + j];
    if (y[i] != exact) return fail("another sum", i);
  }
  bool refused = false;
  z.steps += 1;
  try {
    multiply_pruned(z, isa, 2);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  if (!refused) fail("wrong starts are not refused", z.steps);
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
    count_for(std::string("pruned weights, ") + name);
    for (int64_t m : {1, 3, 4, 16, 33}) {
      for (int64_t n : {1, 16, 65}) {
        for (int64_t k : {1, 16, 17, 300}) {
          for (int bits : {1, 4, 5, 8}) check_pruned(isa, name, m, n, k, bits, rng);
        }
      }
    }
  }
  std::printf("isa mask %u: products with outliers of %d instruction sets ran, %d checks, %d failures\n", active_isa(),
              ran, checks, failures);
  print_memory_checks();
  return failures != 0;
}
