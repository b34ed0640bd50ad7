// int8 activations for any group size and any CPU: codes become int16 values of 64 columns, a chunk at a time, and meet
// up to 16 rows of x. Sums and order of operations as in int8-inl.h.
#pragma once

#include "cpu/activations/quantize-inl.h"

#define LOWBIT_LUT(B) any_i8<B, Codec::kLut>(LOWBIT_NAME("gemm", "i8", "lut" #B)),
#define LOWBIT_INT(B) any_i8<B, Codec::kInt>(LOWBIT_NAME("gemm", "i8", "int" #B)),

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int64_t kAnyRowsPerTask = 16;

inline void prepare_any_i8(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) sum_parts(l, m, quantized_row(l, m));
}

// values[s][column] = T of weight s of a chunk.
template <int B, Codec kCodec>
inline void decode_i16(const Launch& l, const uint8_t* chunk, int16_t (*values)[kBlockN]) {
  for (int lane = 0; lane < kBlockN; lane += kVecLanes) {
    const uint8_t* columns = chunk + lane / kUnitLanes * vector_bytes(B);
    unroll<kChunkK>([&](auto s) LOWBIT_INLINE {
      const I code = bit_and(code_of<B, s>(columns), set1_i((1 << B) - 1));
      for (int i = 0; i < kVecLanes; ++i) {
        const int c = static_cast<int>(code.v[i]);
        values[s][lane + i] =
            static_cast<int16_t>(kCodec == Codec::kInt ? c + static_cast<int>(l.table[0]) : l.table_i8[c]);
      }
    });
  }
}

inline void finish_any_part(const Launch& l, const Segments& s, int64_t block, int64_t segment, int64_t part,
                            int64_t row, int32_t* acc, float* y) {
  const int64_t group = s.group(segment), at = (block * l.num_groups + group) * kBlockN;
  const int32_t x_sum = part_sums(l, s, row)[part];
  const bool int_zeros = l.zero == ZeroMode::kSubtract && l.zero_dtype == Dtype::kI8;
  if (int_zeros) {
    for (int i = 0; i < kBlockN; ++i) acc[i] -= static_cast<const int8_t*>(l.zeros)[at + i] * x_sum;
  }
  for (int i = 0; i < kBlockN; i += kVecLanes) {
    F term = to_float(load_i(acc + i));
    if (l.zero == ZeroMode::kNone || int_zeros) {
      term = mul(group_scale(l, block, group, i), term);
    } else {
      const GroupTerms t = group_terms(l, block, group, i);
      const F shift = mul(t.zero, set1(static_cast<float>(x_sum)));
      term = l.zero == ZeroMode::kAdd ? add(mul(t.scale, term), shift) : mul(t.scale, sub(term, shift));
    }
    if (l.x_group > 0) term = mul(term, block_scale(l, s, row, segment));
    store(y + i, add(load(y + i), term));
  }
  __builtin_memset(acc, 0, kBlockN * sizeof(int32_t));
}

template <int B, Codec kCodec>
void any_i8_run(const Launch& l, int64_t begin, int64_t end) {
  alignas(64) int16_t values[kChunkK][kBlockN];
  alignas(64) int32_t acc[kAnyRowsPerTask][kBlockN];
  alignas(64) float y[kAnyRowsPerTask][kBlockN], total[kAnyRowsPerTask][kBlockN];
  const int64_t row_blocks = ceil_div(l.m, kAnyRowsPerTask), chunks = num_chunks(l.k);
  const Segments s = segments_of(l);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / row_blocks, m0 = task % row_blocks * kAnyRowsPerTask;
    const int64_t rows = l.m - m0 < kAnyRowsPerTask ? l.m - m0 : kAnyRowsPerTask;
    __builtin_memset(acc, 0, sizeof acc);
    __builtin_memset(y, 0, sizeof y);
    __builtin_memset(total, 0, sizeof total);
    for (int64_t c = 0; c < chunks; ++c) {
      decode_i16<B, kCodec>(l, l.codes + (block * chunks + c) * chunk_bytes(B), values);
      const int64_t k_end = (c + 1) * kChunkK < l.k ? (c + 1) * kChunkK : l.k;
      for (int64_t k = c * kChunkK; k < k_end; ++k) {
        const int64_t segment = k / s.size, at = k % s.size;
        const bool part_ends = at + 1 == s.size || k + 1 == l.k || (at + 1) % kMaxInt8Group == 0;
        const int64_t part = segment * s.parts + at / kMaxInt8Group;
        for (int64_t r = 0; r < rows; ++r) {
          const int16_t x = static_cast<const int8_t*>(l.prepared)[(m0 + r) * l.prepared_stride + k];
          const int16_t* w = values[k - c * kChunkK];
          for (int i = 0; i < kBlockN; ++i) acc[r][i] += w[i] * x;
          if (!part_ends) continue;
          finish_any_part(l, s, block, segment, part, m0 + r, acc[r], y[r]);
          close_sums(part + 1, kBlockN, y[r], total[r]);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const F factor = row_scale(l, m0 + r);
      for (int i = 0; i < kBlockN; i += kVecLanes) {
        store(y[r] + i, mul(add(load(total[r] + i), load(y[r] + i)), factor));
      }
      store_columns(l, m0 + r, block * kBlockN, kBlockN, y[r]);
    }
  }
}

template <int B, Codec kCodec>
constexpr Kernel any_i8(const char* name) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kI8,
          .codec = kCodec,
          .bits = B,
          .scope = Scope::kShared,
          .isa = LOWBIT_ISA_BIT,
          .exact_x = {.i8 = true},
          .prepare = prepare_any_i8,
          .rows_per_task = kAnyRowsPerTask,
          .run = any_i8_run<B, kCodec>};
}

constexpr Kernel kInt8Kernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_LUT) LOWBIT_INT(2) LOWBIT_INT(3) LOWBIT_INT(4)
                                       LOWBIT_INT(5) LOWBIT_INT(6) LOWBIT_INT(8)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
