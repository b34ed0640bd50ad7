// int8 activations with AVX-512 VNNI: y = x_scale * sum over groups of scale * (x . (code - zero)), the products and
// the sums of a group in int32, exact. Integer codes of 2, 4 and 8 bits; vpdpbusd takes the codes as unsigned bytes and
// x as signed ones, 64 products at a time (latency 4, one or two a cycle).
#pragma once

#include "cpu/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// In a unit of w-bit fields, byte q of a column's dword shifted by t * w holds field t + (q % 2) * 8 / w of parity q
// / 2.
template <int B>
constexpr int weight_of(int dword, int q) {
  const int steps = 8 / B, unit = dword / steps, t = dword % steps;
  return unit * (32 / B) + 2 * (t + q % 2 * steps) + q / 2;
}
constexpr int kDwordsPerChunk = kChunkK / 4;

// Rows [begin, end) of x in the order in which the codes come out, zero beyond k; x_sums as int32.
template <int B>
void prepare_i8(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const int8_t* x = static_cast<const int8_t*>(l.x) + m * l.x_stride;
    int8_t* out = static_cast<int8_t*>(l.prepared) + m * l.prepared_stride;
    int32_t* sums = reinterpret_cast<int32_t*>(l.x_sums) + m * l.num_groups;
    for (int64_t g = 0; g < l.num_groups; ++g) {
      const int64_t k_end = (g + 1) * l.group < l.k ? (g + 1) * l.group : l.k;
      int32_t sum = 0;
      for (int64_t k = g * l.group; k < k_end; ++k) sum += x[k];
      sums[g] = sum;
    }
    for (int64_t k0 = 0; k0 < l.prepared_stride; k0 += kChunkK) {
      for (int d = 0; d < kDwordsPerChunk; ++d) {
        for (int q = 0; q < 4; ++q) {
          const int64_t k = k0 + weight_of<B>(d, q);
          out[k0 + 4 * d + q] = k < l.k ? x[k] : int8_t{0};
        }
      }
    }
  }
}

template <int B, int kRows>
inline void int8_tile(const Launch& l, int64_t block, int64_t m0, int valid_rows) {
  constexpr int kVecs = kBlockN / kUnitLanes;
  const int64_t chunks = num_chunks(l.k);
  const int64_t chunks_per_group = l.num_groups == 1 ? chunks : l.group / kChunkK;
  const uint8_t* codes = l.codes + block * chunks * chunk_bytes(B);
  const I mask = _mm512_set1_epi8(static_cast<char>((1 << B) - 1));
  const int32_t first = static_cast<int32_t>(l.table[0]);
  int64_t rows[kRows];
  for (int r = 0; r < kRows; ++r) rows[r] = m0 + (r < valid_rows ? r : 0);

  F y[kRows][kVecs];
  I acc[kRows][kVecs];
  unroll<kRows>([&](auto r) LOWBIT_INLINE {
    unroll<kVecs>([&](auto v) LOWBIT_INLINE {
      y[r][v] = zero();
      acc[r][v] = _mm512_setzero_si512();
    });
  });
  int64_t group = 0, left = chunks_per_group;
  for (int64_t c = 0; c < chunks; ++c) {
    const uint8_t* chunk = codes + c * chunk_bytes(B);
    unroll<kDwordsPerChunk>([&](auto d) LOWBIT_INLINE {
      constexpr int kSteps = 8 / B, kUnit = d / kSteps, kShift = d % kSteps * B;
      I xs[kRows];
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        int32_t bytes;
        __builtin_memcpy(&bytes,
                         static_cast<const int8_t*>(l.prepared) + rows[r] * l.prepared_stride + c * kChunkK + 4 * d, 4);
        xs[r] = _mm512_set1_epi32(bytes);
      });
      unroll<kVecs>([&](auto v) LOWBIT_INLINE {
        const I unit = load_i(chunk + v * vector_bytes(B) + kUnit * kUnitBytes);
        const I code = bit_and(shift_right<kShift>(unit), mask);
        unroll<kRows>([&](auto r) LOWBIT_INLINE { acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], code, xs[r]); });
      });
    });
    unroll<B>([&](auto u) LOWBIT_INLINE { prefetch(chunk + 6144 + u * kVecs * kUnitBytes); });
    if (--left > 0 && c + 1 < chunks) continue;
    unroll<kRows>([&](auto r) LOWBIT_INLINE {
      const int32_t x_sum = reinterpret_cast<const int32_t*>(l.x_sums)[rows[r] * l.num_groups + group];
      unroll<kVecs>([&](auto v) LOWBIT_INLINE {
        const GroupTerms terms = group_terms(l, block, group, v * kUnitLanes);
        const I sum = _mm512_add_epi32(acc[r][v], _mm512_set1_epi32(first * x_sum));
        y[r][v] = finish_group(l, terms, y[r][v], to_float(sum), static_cast<float>(x_sum));
        acc[r][v] = _mm512_setzero_si512();
      });
    });
    ++group;
    left = chunks_per_group;
  }
  unroll<kRows>([&](auto r) LOWBIT_INLINE {
    if (r >= valid_rows) return;
    alignas(64) float row[kBlockN];
    const F x_scale = set1(l.x_scales[rows[r]]);
    unroll<kVecs>([&](auto v) LOWBIT_INLINE { store(row + v * kUnitLanes, mul(y[r][v], x_scale)); });
    store_columns(l, rows[r], block * kBlockN, kBlockN, row);
  });
}

template <int B>
void int8_run(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t m0 = 0; m0 < l.m; m0 += 4) {
      const int rows = l.m - m0 < 4 ? static_cast<int>(l.m - m0) : 4;
      if (rows == 1) {
        int8_tile<B, 1>(l, block, m0, rows);
      } else {
        int8_tile<B, 4>(l, block, m0, rows);
      }
    }
  }
}

template <int B>
constexpr Kernel gemv_i8(const char* name) {
  return {name,
          Op::kLinear,
          Dtype::kI8,
          Codec::kInt,
          B,
          Scope::kShared,
          kAvx512Vnni,
          true,
          {false, false, false, true},
          Cost{21, 10, 15, 4},
          prepare_i8<B>,
          0,
          int8_run<B>};
}

const Kernel kInt8Kernels[] = {
    gemv_i8<2>(LOWBIT_NAME("gemv", "i8", "int2")),
    gemv_i8<4>(LOWBIT_NAME("gemv", "i8", "int4")),
    gemv_i8<8>(LOWBIT_NAME("gemv", "i8", "int8")),
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
