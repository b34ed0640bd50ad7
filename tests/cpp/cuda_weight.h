// A weight in the m16 layout and the product that it should give, for the tests of the CUDA kernels on the host.
#pragma once

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/launch.h"

namespace lowbit::cuda {

inline int checks = 0, failures = 0;

inline void expect(bool ok, const char* what, int64_t i, double got, double want) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("FAIL %s at %lld: %g, expected %g\n", what, (long long)i, got, want);
}

struct Case {
  int64_t m, n, k, group;
  Zero zero;
  int64_t splits;
};

// One weight in m16 layout: fp32 scales, int8 or fp32 zeros; codes stand for small integers.
struct Problem {
  Case c;
  int bits;
  int64_t groups, tiles_n, tiles_k;
  std::vector<uint8_t> codes;
  std::vector<uint32_t> packed;
  std::vector<float> scales, zeros, table, x, y;
  std::vector<int8_t> int_zeros;

  Problem(const Case& c_, int bits_, std::mt19937& rng)
      : c(c_),
        bits(bits_),
        groups(ceil_div(c.k, c.group)),
        tiles_n(ceil_div(c.n, kTileN)),
        tiles_k(ceil_div(c.k, kTileK)) {
    const auto draw = [&](int low, int high) {
      return static_cast<float>(low + static_cast<int>(rng() % (high - low + 1)));
    };
    for (int e = 0; e < 1 << bits; ++e) table.push_back(draw(-7, 7));
    for (int64_t i = 0; i < c.n * c.k; ++i) codes.push_back(rng() & ((1 << bits) - 1));
    for (int64_t i = 0; i < c.m * c.k; ++i) x.push_back(draw(-3, 3));
    scales.assign(tiles_n * groups * kTileN, 0);
    zeros = scales;
    packed.assign(tiles_n * tiles_k * tile_bytes(bits) / 4, 0);
    const auto at = [&](int64_t n, int64_t k) { return scale_at(n / kTileN, k / c.group, groups) + n % kTileN; };
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t g = 0; g < groups; ++g)
        scales[at(n, g * c.group)] = draw(1, 4) / 2, zeros[at(n, g * c.group)] = draw(-3, 3);
    for (float z : zeros) int_zeros.push_back(static_cast<int8_t>(z));
    for (int64_t n = 0; n < c.n; ++n)
      for (int64_t k = 0; k < c.k; ++k) {
        uint32_t* tile = &packed[(n / kTileN * tiles_k + k / kTileK) * tile_bytes(bits) / 4];
        const int r = n % kTileN, col = k % kTileK;
        for (int b = 0; b < bits; ++b) {
          const int bit = code_of(r, col) * bits + b;
          tile[word_at(bits, lane_of(r, col), bit / 32)] |= uint32_t{codes[n * c.k + k]} >> b << 31 >> (31 - bit % 32);
        }
        expect(code_at(packed.data(), bits, n, k, tiles_k) == codes[n * c.k + k], "code_at", n * c.k + k, 0, 0);
      }
    for (int64_t m = 0; m < c.m; ++m)
      for (int64_t n = 0; n < c.n; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < c.k; ++k) {
          const double t = table[codes[n * c.k + k]], s = scales[at(n, k)], z = zeros[at(n, k)];
          sum += x[m * c.k + k] * (c.zero == Zero::kAdd ? s * t + z : c.zero == Zero::kNone ? s * t : s * (t - z));
        }
        y.push_back(static_cast<float>(sum));
      }
  }

  // What the kernels add at the end for zeros that are floats.
  double float_zero_term(int64_t n, int64_t m) const {
    double sum = 0;
    for (int64_t k = 0; k < c.k && (c.zero == Zero::kSubtract || c.zero == Zero::kAdd); ++k) {
      const int64_t at = scale_at(n / kTileN, k / c.group, groups) + n % kTileN;
      sum += (c.zero == Zero::kAdd ? 1.0 : -scales[at]) * zeros[at] * x[m * c.k + k];
    }
    return sum;
  }
};

}  // namespace lowbit::cuda
