// FP8 of every instruction set against plain loops, without Python: for sanitizers and for emulated CPUs. The oracle
// looks for the nearest of the 256 values, ties to even, in double. Buffers have the exact sizes, so any overrun meets
// a red zone.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "fp8.h"

using namespace lowbit;

namespace {

int failures = 0;
int checks = 0;

void expect(bool ok, const char* what, int64_t i, double got, double want) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s at %lld: %.9g, expected %.9g\n", what, (long long)i, got, want);
}

// The value of a code without its sign.
double value_of(Float8 type, int code) {
  const int mantissa = type == Float8::kE4m3 ? 3 : 2, bias = type == Float8::kE4m3 ? 7 : 15;
  const int e = code >> mantissa, m = code & ((1 << mantissa) - 1);
  return e ? std::ldexp((1 << mantissa) + m, e - bias - mantissa) : std::ldexp(m, 1 - bias - mantissa);
}

int max_code(Float8 type) { return type == Float8::kE4m3 ? 0x7E : 0x7B; }

uint8_t nearest(Float8 type, float v) {
  if (std::isnan(v)) return 0x7F;
  const double x = std::fmin(std::fabs(static_cast<double>(v)), value_of(type, max_code(type)));
  int best = 0;
  for (int code = 1; code <= max_code(type); ++code) {
    const double nearer = std::fabs(x - value_of(type, code)), before = std::fabs(x - value_of(type, best));
    if (nearer < before || (nearer == before && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(v) ? 0x80 : 0));
}

void check_cast(const Fp8Ops& ops, Float8 type) {
  std::vector<float> x = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f};
  for (int code = 0; code < max_code(type); ++code) {
    const float low = value_of(type, code), high = value_of(type, code + 1), middle = (low + high) / 2;
    for (float v : {low, middle, std::nextafter(middle, 0.0f), -std::nextafter(middle, 1e9f), -middle}) x.push_back(v);
  }
  std::vector<uint8_t> q(x.size());
  fp8_cast(ops, x.data(), Dtype::kF32, x.size(), type, true, q.data(), 2);
  for (size_t i = 0; i < x.size(); ++i) expect(q[i] == nearest(type, x[i]), "cast", i, q[i], nearest(type, x[i]));
}

struct Result {
  std::vector<float> scales, values;
  std::vector<uint8_t> q, transposed;
};

Result run(const Fp8Ops& ops, const Fp8Blocks& b, const std::vector<float>& x, Float8 type, bool stochastic) {
  const int64_t bands = b.row_blocks ? (b.rows + b.block_rows - 1) / b.block_rows : 1;
  Result r{std::vector<float>(bands * (b.row_blocks ? b.row_blocks : 1), NAN), std::vector<float>(x.size(), NAN),
           std::vector<uint8_t>(x.size(), 0xFF), std::vector<uint8_t>(x.size(), 0xFF)};
  const Fp8Quantize z{b,
                      {x.data(), Dtype::kF32, b.k},
                      type,
                      ScaleType::kF32,
                      nullptr,
                      r.scales.data(),
                      r.q.data(),
                      stochastic,
                      1234567890123};
  fp8_quantize(ops, z, r.transposed.data(), 2);
  fp8_dequantize(ops, {b, r.q.data(), type, r.scales.data(), ScaleType::kF32, r.values.data(), Dtype::kF32}, 2);
  return r;
}

void check_blocks(const Fp8Ops& ops, const Fp8Blocks& b, Float8 type, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> x(b.rows * b.k);
  for (float& v : x) v = normal(rng) * std::exp(normal(rng) * 4);
  for (int64_t i = 0; i < b.k; ++i) x[i] = 0;
  const Result r = run(ops, b, x, type, false);
  const float top = static_cast<float>(value_of(type, max_code(type)));
  for (int64_t row = 0; row < b.rows; ++row) {
    for (int64_t column = 0; column < b.k; ++column) {
      const int64_t i = row * b.k + column, block = row / b.block_rows * b.row_blocks + column / b.block_k;
      float largest = 0;
      for (int64_t y = 0; y < b.rows; ++y) {
        for (int64_t c = column / b.block_k * b.block_k; c < b.k && c / b.block_k == column / b.block_k; ++c) {
          if (b.row_blocks == 0 || y / b.block_rows == row / b.block_rows) {
            largest = std::fmax(largest, std::fabs(x[y * b.k + c]));
          }
        }
      }
      const float scale = largest / top > 0 ? largest / top : 1.0f;
      expect(r.scales[block] == scale, "scale", block, r.scales[block], scale);
      const uint8_t code = nearest(type, x[i] / scale);
      expect(r.q[i] == code, "quantize", i, r.q[i], code);
      expect(r.transposed[column * b.rows + row] == code, "transposed", i, r.transposed[column * b.rows + row], code);
      const float value = static_cast<float>(value_of(type, code & 0x7F)) * (code & 0x80 ? -scale : scale);
      expect(r.values[i] == value, "dequantize", i, r.values[i], value);
    }
  }
  // Noise is the same on every instruction set.
  const Result got = run(ops, b, x, type, true), want = run(fp8_ops(kScalar), b, x, type, true);
  for (size_t i = 0; i < x.size(); ++i) expect(got.q[i] == want.q[i], "stochastic", i, got.q[i], want.q[i]);
}

}  // namespace

int main() {
  int ran = 0;
  for (uint32_t isa : {kScalar, kAvx2, kAvx512}) {
    if (!(active_isa() & isa)) continue;
    ++ran;
    std::mt19937 rng(1);
    const Fp8Ops& ops = fp8_ops(isa);
    for (Float8 type : {Float8::kE4m3, Float8::kE5m2}) {
      check_cast(ops, type);
      // Per tensor, row, 1 x 16, 1 x 128 and 8 x 24, with ragged edges.
      for (const Fp8Blocks& b :
           {Fp8Blocks{5, 37, 1, 37, 0}, Fp8Blocks{7, 33, 1, 33, 1}, Fp8Blocks{33, 41, 1, 16, 3},
            Fp8Blocks{3, 150, 1, 128, 2}, Fp8Blocks{19, 61, 8, 24, 3}, Fp8Blocks{48, 32, 1, 16, 2}}) {
        check_blocks(ops, b, type, rng);
      }
    }
  }
  std::printf("isa mask %u: FP8 of %d instruction sets ran, %d checks, %d failures\n", active_isa(), ran, checks,
              failures);
  return failures != 0;
}
