// FP8 of every instruction set against plain loops, without Python: for sanitizers and for emulated CPUs. The oracle
// looks for the nearest of the 256 values, ties to even, in double. Operands end at pages that nobody may touch
// (guarded.h).
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "core/dispatch.h"
#include "cpu/fp8/fp8.h"
#include "guarded.h"

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

// The bits of x as numbers of two bytes, rounded towards zero, and the numbers themselves.
struct Words {
  Guarded<uint16_t> words;
  std::vector<float> values;
  Words(const Guarded<float>& x, Dtype dtype) : words(x.size()), values(x.size()) {
    for (size_t i = 0; i < x.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x[i], 4);
      // Of fp16 only what is neither subnormal nor too large; the rest is zero.
      const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 112;
      const uint32_t half = exponent < 1 || exponent > 30
                                ? 0
                                : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3FF) | (bits >> 16 & 0x8000);
      words[i] = static_cast<uint16_t>(dtype == Dtype::kBf16 ? bits >> 16 : half);
      const uint32_t kept = dtype == Dtype::kBf16 ? bits & 0xFFFF0000u : half ? bits & 0xFFFFE000u : 0;
      std::memcpy(&values[i], &kept, 4);
    }
  }
};

void check_cast(const Fp8Ops& ops, Float8 type) {
  std::vector<float> all = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f, 3e38f};
  for (int code = 0; code < max_code(type); ++code) {
    const float low = value_of(type, code), high = value_of(type, code + 1), middle = (low + high) / 2;
    for (float v : {low, middle, std::nextafter(middle, 0.0f), -std::nextafter(middle, 1e9f), -middle})
      all.push_back(v);
  }
  // Whole vectors, and every end of one.
  for (size_t size = all.size() - 65; size <= all.size(); ++size) {
    const Guarded<float> x(std::vector<float>(all.end() - size, all.end()));
    Guarded<uint8_t> q(size);
    const auto cast = [&](const void* from, Dtype dtype) {
      expect(same_when_poisoned(q, [&] { fp8_cast(ops, from, dtype, size, type, true, q.data(), 2); }), "cast again",
             size, 0, 0);
    };
    cast(x.data(), Dtype::kF32);
    for (size_t i = 0; i < size; ++i) expect(q[i] == nearest(type, x[i]), "cast", i, q[i], nearest(type, x[i]));
    for (Dtype dtype : {Dtype::kBf16, Dtype::kF16}) {
      const Words w(x, dtype);
      cast(w.words.data(), dtype);
      for (size_t i = 0; i < size; ++i) {
        const uint8_t want = nearest(type, w.values[i]);
        expect(q[i] == want, "cast of two bytes", i, q[i], want);
      }
    }
  }
}

struct Result {
  Guarded<float> scales, values;
  Guarded<uint8_t> q, transposed;
  Result(size_t blocks, size_t size) : scales(blocks, NAN), values(size, NAN), q(size, 0xFF), transposed(size, 0xFF) {}
};

int64_t blocks_of(const Fp8Blocks& b) {
  return b.row_blocks ? (b.rows + b.block_rows - 1) / b.block_rows * b.row_blocks : 1;
}

// All that is done to a matrix, twice, the second time with poison on the stack.
Result run(const Fp8Ops& ops, const Fp8Blocks& b, const Guarded<float>& x, Float8 type, bool stochastic) {
  Result r(blocks_of(b), x.size());
  const Fp8Quantize z{b,
                      {x.data(), Dtype::kF32, b.k},
                      type,
                      ScaleType::kF32,
                      nullptr,
                      r.scales.data(),
                      r.q.data(),
                      stochastic,
                      1234567890123};
  expect(same_when_poisoned(r.q, [&] { fp8_quantize(ops, z, r.transposed.data(), 2); }), "quantize again", 0, 0, 0);
  const Fp8Dequantize back{b, r.q.data(), type, r.scales.data(), ScaleType::kF32, r.values.data(), Dtype::kF32};
  expect(same_when_poisoned(r.values, [&] { fp8_dequantize(ops, back, 2); }), "dequantize again", 0, 0, 0);
  // In two bytes, which must end where they should.
  for (Dtype dtype : {Dtype::kBf16, Dtype::kF16}) {
    const Words w(x, dtype);
    Guarded<float> maxima(blocks_of(b)), scales(blocks_of(b));
    Guarded<uint8_t> q(x.size()), transposed(x.size());
    Fp8Quantize two = z;
    two.x = {w.words.data(), dtype, b.k};
    expect(same_when_poisoned(maxima, [&] { fp8_maxima(ops, b, two.x, maxima.data(), 2); }), "maxima again", 0, 0, 0);
    two.maxima = maxima.data();
    two.scales = scales.data();
    two.q = q.data();
    expect(same_when_poisoned(q, [&] { fp8_quantize(ops, two, transposed.data(), 2); }), "quantize again", 0, 0, 0);
    Guarded<uint16_t> values(x.size());
    const Fp8Dequantize to{b, q.data(), type, scales.data(), ScaleType::kF32, values.data(), dtype};
    expect(same_when_poisoned(values, [&] { fp8_dequantize(ops, to, 2); }), "dequantize again", 0, 0, 0);
  }
  return r;
}

void check_blocks(const Fp8Ops& ops, const Fp8Blocks& b, Float8 type, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Guarded<float> x(b.rows * b.k);
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
    count_for(std::string("fp8 casts, ") + isa_name(static_cast<Isa>(isa)));
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
  print_memory_checks();
  return failures != 0;
}
