// Blocks of GGUF, 256 weights at a time: their weights leave for the result or meet rows of x.
#pragma once

#include "cpu/structured/block_fields-inl.h"
#include "cpu/structured/tiles-inl.h"
#if defined(__AVX512VBMI__)
#include "cpu/structured/blocks_avx512-inl.h"
#endif

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// The weights of vector `i` of kVecLanes, without their scale; levels as StructuredWeight::table.
LOWBIT_INLINE inline F level_values(const BlockFields& f, int i, const float* levels) {
#if defined(__AVX512F__)
  const I shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512i eight = _mm512_set1_epi32(static_cast<int>(f.nibbles[2 * i]));
  const I nibbles = _mm512_mask_set1_epi32(eight, 0xFF00, static_cast<int>(f.nibbles[2 * i + 1]));
  return _mm512_permutexvar_ps(_mm512_srlv_epi32(nibbles, shifts), load(levels));
#elif defined(__AVX2__)
  const I nibbles = set1_i(static_cast<int32_t>(f.nibbles[i]));
  const I numbers = _mm256_srlv_epi32(nibbles, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const I flips = _mm256_sllv_epi32(nibbles, _mm256_setr_epi32(28, 24, 20, 16, 12, 8, 4, 0));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(load(levels), numbers),
                          _mm256_permutevar8x32_ps(load(levels + 8), numbers), as_float(flips));
#else
  float values[kVecLanes];
  for (int j = 0; j < kVecLanes; ++j) {
    values[j] = levels[f.nibbles[(i * kVecLanes + j) / 8] >> (4 * (j % 8)) & 15];
  }
  return load(values);
#endif
}

constexpr int kBlockVecs = kBlockWeights / kVecLanes;

template <StructuredCodec kCodec, class Fn>
LOWBIT_INLINE inline void for_vectors(const StructuredWeight& w, const uint8_t* block, const Fn& fn) {
  BlockFields f;
  read_fields<kCodec>(block, w.grid, f);
  for (int i = 0; i < kBlockVecs; ++i) {
    fn(i, mul(level_values(f, i, w.table), set1(f.scales[i * kVecLanes / 16])));
  }
}

void decode_block_rows(const StructuredRows& r, int64_t begin, int64_t end) {
  with_codec(r.w.codec, [&](auto codec) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* block = r.w.codes + (r.rows ? r.rows[i] : i) * r.w.row_bytes;
      for (int64_t k = 0; k < r.w.k; k += kBlockWeights, block += BlockOf<decltype(codec)::value>::kBytes) {
        alignas(64) float values[kBlockWeights];
        for_vectors<decltype(codec)::value>(
            r.w, block, [&](int v, F weights) LOWBIT_INLINE { store(values + v * kVecLanes, weights); });
        store_as(r.out, r.out_dtype, i * r.w.k + k, values, r.w.k - k < kBlockWeights ? r.w.k - k : kBlockWeights);
      }
    }
  });
}

#if !defined(__AVX512VBMI__)
void prepare_blocks(const StructuredLinear& l) { prepare_rows(l); }

// sums[r] += the products of weights [begin, end) of a row, whole blocks, with row r of x.
template <StructuredCodec kCodec, int kRows>
void multiply_blocks(const StructuredLinear& l, int64_t row, int64_t begin, int64_t end, F* sums) {
  const uint8_t* block = l.w.codes + row * l.w.row_bytes + begin / kBlockWeights * BlockOf<kCodec>::kBytes;
  for (int64_t k = begin; k < end; k += kBlockWeights, block += BlockOf<kCodec>::kBytes) {
    for_vectors<kCodec>(l.w, block, [&](int v, F weights) LOWBIT_INLINE {
      const float* x = l.prepared + k + v * kVecLanes;
      for (int r = 0; r < kRows; ++r) sums[r] = fma(weights, load(x + r * l.padded_k), sums[r]);
    });
  }
}
#endif

// Of many rows of x so many columns meet all rows of a tile as stay in the first cache.
template <int kRows>
constexpr int64_t kColumns = kRows <= 2 ? INT64_MAX : 2 * kBlockWeights;

template <StructuredCodec kCodec, int kRows>
void multiply_tile(const StructuredLinear& l, int64_t n0, int64_t count, Tile& tile) {
  F sums[kStructuredTile][kRows];
  for (auto& row : sums) {
    for (F& sum : row) sum = zero();
  }
  for (int64_t begin = 0; begin < l.w.k;) {
    const int64_t end = l.w.k - begin > kColumns<kRows> ? begin + kColumns<kRows> : l.w.k;
    for (int64_t i = 0; i < count; ++i) multiply_blocks<kCodec, kRows>(l, n0 + i, begin, end, sums[i]);
    begin = end;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int r = 0; r < kRows; ++r) tile[r][i] = sum_lanes(sums[i][r]);
  }
}

void multiply_block_rows(const StructuredLinear& l, int64_t begin, int64_t end) {
  with_codec(l.w.codec, [&](auto codec) {
    multiply_tiles(l, begin, end, [&](auto rows, int64_t n0, int64_t count, Tile& tile) {
      multiply_tile<decltype(codec)::value, decltype(rows)::value>(l, n0, count, tile);
    });
  });
}

constexpr StructuredKernel kBlocksKernel{
    .rows = decode_block_rows, .prepare = prepare_blocks, .linear = multiply_block_rows};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
