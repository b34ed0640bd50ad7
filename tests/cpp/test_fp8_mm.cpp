// FP8 products of every instruction set against plain loops in double, without Python: for sanitizers and for emulated
// CPUs. Operands end at pages that nobody may touch (guarded.h).
#include <array>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "core/dispatch.h"
#include "cpu/fp8/fp8_matmul.h"
#include "guarded.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

// Codes of one operand with fp32 or E8M0 scales, and the values that they stand for.
struct Matrix {
  int64_t rows, k;
  Guarded<uint8_t> codes, exponents;
  Guarded<float> scales;
  std::vector<double> values;
  Fp8Operand operand;

  // One scale for 2^row_shift rows x 2^k_shift values.
  Matrix(int64_t rows_, int64_t k_, Float8 type, int row_shift, int k_shift, bool e8m0, std::mt19937& rng)
      : rows(rows_), k(k_), codes(rows * k), values(rows * k) {
    const int64_t bands = ((rows - 1) >> row_shift) + 1, groups = ((k - 1) >> k_shift) + 1;
    exponents = Guarded<uint8_t>(bands * groups);
    scales = Guarded<float>(bands * groups);
    const int mantissa = type == Float8::kE4m3 ? 3 : 2, bias = type == Float8::kE4m3 ? 7 : 15;
    const int finite = type == Float8::kE4m3 ? 0x7F : 0x7C;
    for (int64_t i = 0; i < bands * groups; ++i) {
      exponents[i] = static_cast<uint8_t>(rng() % 20 + 117);
      scales[i] = e8m0 ? std::ldexp(1.0f, exponents[i] - 127) : 0.25f + static_cast<float>(rng() % 1000) / 500;
    }
    for (int64_t i = 0; i < rows * k; ++i) {
      const int code = static_cast<int>(rng() % finite), e = code >> mantissa, m = code & ((1 << mantissa) - 1);
      const bool negative = rng() % 2;
      const double v = std::ldexp(e ? (1 << mantissa) + m : m, (e ? e : 1) - bias - mantissa);
      codes[i] = static_cast<uint8_t>(code | (negative ? 0x80 : 0));
      values[i] = (negative ? -v : v) * scales[((i / k) >> row_shift) * groups + ((i % k) >> k_shift)];
    }
    const Fp8Scales s{e8m0 ? static_cast<const void*>(exponents.data()) : scales.data(),
                      e8m0 ? ScaleType::kE8m0 : ScaleType::kF32, row_shift, k_shift, groups};
    operand = {codes.data(), k, type, s};
  }
};

Guarded<float> multiply(const Fp8MatmulKernel& kernel, const char* isa, const Matrix& a, const Matrix& b,
                        const Guarded<float>& bias) {
  Guarded<float> y(a.rows * b.rows, NAN);
  Fp8Matmul q{};
  q.out.m = a.rows;
  q.out.n = q.out.out_stride = b.rows;
  q.out.k = a.k;
  q.out.bias = bias.data();
  q.out.bias_dtype = q.out.out_dtype = Dtype::kF32;
  q.out.out = y.data();
  q.a = a.operand;
  q.b = b.operand;
  ++checks;
  if (same_when_poisoned(y, [&] { fp8_matmul(kernel, q, 2); })) return y;
  ++failures;
  std::printf("FAIL %s %lld x %lld x %lld: poisoned memory reaches the result\n", isa, (long long)a.rows,
              (long long)b.rows, (long long)a.k);
  return y;
}

void check(const Fp8MatmulKernel& kernel, const char* isa, const Matrix& a, const Matrix& b) {
  Guarded<float> bias(b.rows);
  for (int64_t j = 0; j < b.rows; ++j) bias[j] = static_cast<float>(j % 7) - 3;
  const Guarded<float> y = multiply(kernel, isa, a, b, bias);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < b.rows; ++j) {
      double sum = bias[j], size = std::fabs(sum);
      for (int64_t k = 0; k < a.k; ++k) {
        const double product = a.values[i * a.k + k] * b.values[j * a.k + k];
        sum += product;
        size += std::fabs(product);
      }
      // Each of k additions and a few scalings round once to fp32.
      const double got = y[i * b.rows + j], bound = static_cast<double>(a.k + 8) * 0x1p-24 * size;
      ++checks;
      // NaN is that of a scale.
      if (std::isnan(sum) ? std::isnan(got) : std::fabs(got - sum) <= bound) continue;
      if (++failures <= 20) {
        std::printf("FAIL %s %lld x %lld x %lld at %lld, %lld: %.9g, expected %.9g\n", isa, (long long)a.rows,
                    (long long)b.rows, (long long)a.k, (long long)i, (long long)j, got, sum);
      }
    }
  }
}

// One row, or band of rows, has a scale that is NaN, and with it its last value.
void spoil(Matrix& x) {
  const Fp8Scales& s = x.operand.scales;
  const int64_t band = (x.rows / 2) >> s.row_shift, at = band * s.stride + s.stride - 1;
  x.scales[at] = NAN;
  x.exponents[at] = 0xFF;
  for (int64_t row = band << s.row_shift; row < x.rows && row >> s.row_shift == band; ++row) {
    x.values[row * x.k + x.k - 1] = NAN;
  }
}

}  // namespace

int main() {
  constexpr Float8 kTypes[] = {Float8::kE4m3, Float8::kE5m2};
  // Row shift, shift along K, E8M0: row, 1x16, mx, 1x128, 128x128.
  struct Blocks {
    int row_shift, k_shift;
    bool e8m0;
  };
  constexpr Blocks kBlocks[] = {{0, kWholeRow, false}, {0, 4, false}, {0, 5, true}, {0, 7, false}, {7, 7, false}};
  // Few rows, with groups of 16 that are odd in number; a slab and a group; more rows than a task.
  constexpr std::array<int64_t, 3> kShapes[] = {{1, 18, 135}, {3, 5, 70},   {2, 3, 2100}, {15, 67, 203},
                                                {4, 17, 48},  {5, 33, 144}, {6, 3, 1},    {520, 3, 33}};
  int ran = 0;
  for (uint32_t isa : {kScalar, kAvx2, kAvx512, kAvx512Bf16}) {
    if (!(active_isa() & isa)) continue;
    ++ran;
    const char* name = isa_name(static_cast<Isa>(isa));
    count_for(std::string("fp8 products, ") + name);
    std::mt19937 rng(1);
    for (const Blocks& ba : kBlocks) {
      for (const Blocks& bb : kBlocks) {
        for (const auto& [m, n, k] : kShapes) {
          Matrix a(m, k, kTypes[rng() % 2], ba.row_shift, ba.k_shift, ba.e8m0, rng);
          Matrix b(n, k, kTypes[rng() % 2], bb.row_shift, bb.k_shift, bb.e8m0, rng);
          check(fp8_matmul_kernel(isa), name, a, b);
          spoil(a);
          spoil(b);
          check(fp8_matmul_kernel(isa), name, a, b);
        }
      }
    }
  }
  std::printf("isa mask %u: FP8 products of %d instruction sets ran, %d checks, %d failures\n", active_isa(), ran,
              checks, failures);
  print_memory_checks();
  return failures != 0;
}
