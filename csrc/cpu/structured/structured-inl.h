// Structured weights: a chunk of a row is decoded into a buffer, and leaves for the result or meets rows of x.
#pragma once

#include "cpu/structured/tiles-inl.h"
#include "cpu/structured/windows-inl.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// Weights of a chunk are followed by those of whole codes and vectors.
constexpr int64_t kChunkRoom = kStructuredChunk + kVecLanes;
// Bytes that are read beyond the code of the first weight of a vector.
constexpr int64_t kWindow = 16;
constexpr int kTrellisTail = 16 + kVecLanes * 4;  // bits that may follow the codes of a chunk

// The code of `bits` bits at bit `at` of a row, of which nothing is read beyond `bytes`.
inline uint64_t code_at(const uint8_t* row, int64_t bytes, int64_t at, int bits) {
  uint64_t word = 0;
  const int64_t first = at / 8, rest = bytes - first;
  __builtin_memcpy(&word, row + first, rest < 8 ? rest : 8);
  return word >> (at % 8) & ((uint64_t{1} << bits) - 1);
}

template <int kDim>
void decode_vectors(const StructuredWeight& w, const uint8_t* row, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kDim) {
    const uint64_t code = code_at(row, w.row_bytes, (begin + i) / kDim * w.bits, w.bits);
    __builtin_memcpy(out + i, w.table + code * kDim, kDim * sizeof(float));
  }
}

// A point of E8P: a vector of absolute values, signs, and 1/4 or -1/4. All operations are exact.
inline void add_point(const StructuredWeight& w, uint32_t code, float factor, float* out) {
  const float* vector = w.table + (code & 255) * 8;
  const float* signs = w.signs + (code >> 8 & 127) * 8;
  const float move = code >> 15 & 1 ? 0.25f : -0.25f;
  for (int j = 0; j < 8; ++j) out[j] += (vector[j] * signs[j] + move) * factor;
}

void decode_e8p(const StructuredWeight& w, const uint8_t* row, int64_t begin, int64_t count, float* out) {
  const int bytes = w.bits / 8;
  for (int64_t i = 0; i < count; i += 8) {
    uint32_t code = 0;
    __builtin_memcpy(&code, row + (begin + i) / 8 * bytes, bytes);
    float point[8] = {};
    add_point(w, code & 0xFFFF, 1.0f, point);
    if (bytes == 4) {
      add_point(w, code >> 16, w.second, point);
    } else if (bytes == 3) {
      const float* second = w.table + (256 + (code >> 16)) * 8;
      for (int j = 0; j < 8; ++j) point[j] += second[j] * w.second;
    }
    __builtin_memcpy(out + i, point, sizeof point);
  }
}

template <int B>
void decode_windows(const uint8_t* bytes, int64_t count, float* out) {
  const I factor = set1_i(static_cast<int32_t>(kTrellisFactor)), addend = set1_i(static_cast<int32_t>(kTrellisAddend));
  for (int64_t i = 0; i < count; i += kVecLanes) {
    const I word = add_i(mul_i(load_windows<B>(bytes + i * B / 8), factor), addend);
    store(out + i, mul(to_float(add_i(sum_bytes(word), set1_i(-510))), set1(1.0f / 128)));
  }
}

// Rows are rings: the first bits follow the last ones.
template <int B>
void decode_trellis(const StructuredWeight& w, const uint8_t* row, int64_t begin, int64_t count, float* out) {
  const uint8_t* bytes = row + begin * B / 8;
  if (begin * B / 8 + ceil_div(count, kVecLanes) * kVecLanes * B / 8 + kWindow <= w.row_bytes) {
    decode_windows<B>(bytes, count, out);
    return;
  }
  // The last weights, and what follows them.
  uint8_t copy[kChunkRoom * B / 8 + 2 * kWindow] = {};
  const int64_t length = w.k * B, bits = (w.k - begin) * B, whole = bits / 8;
  __builtin_memcpy(copy, bytes, whole);
  const int64_t end = count * B + kTrellisTail;
  for (int64_t i = whole * 8; i < end; ++i) {
    const int64_t at = (begin * B + i) % length;
    copy[i / 8] = static_cast<uint8_t>(copy[i / 8] | (row[at / 8] >> (at % 8) & 1) << (i % 8));
  }
  decode_windows<B>(copy, count, out);
}

// The values of weights [begin, begin + count) of a row, whose number is at most kStructuredChunk and which begin at a
// multiple of it; out has kChunkRoom elements.
void decode(const StructuredWeight& w, int64_t row, int64_t begin, int64_t count, float* out) {
  const uint8_t* codes = w.codes + row * w.row_bytes;
  switch (w.codec) {
    case StructuredCodec::kE8p:
      return decode_e8p(w, codes, begin, count, out);
    case StructuredCodec::kTrellis:
      if (w.bits == 2) return decode_trellis<2>(w, codes, begin, count, out);
      if (w.bits == 3) return decode_trellis<3>(w, codes, begin, count, out);
      return decode_trellis<4>(w, codes, begin, count, out);
    default:
      if (w.dim == 2) return decode_vectors<2>(w, codes, begin, count, out);
      if (w.dim == 4) return decode_vectors<4>(w, codes, begin, count, out);
      return decode_vectors<8>(w, codes, begin, count, out);
  }
}

inline float scale_of(const StructuredWeight& w, int64_t row, int64_t group) {
  if (!w.scales) return 1;
  alignas(64) float values[kVecLanes];
  store(values, load_tail(w.scales, w.scale_dtype, row * w.groups + group, 1));
  return values[0];
}

void decode_rows(const StructuredRows& r, int64_t begin, int64_t end) {
  const StructuredWeight& w = r.w;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = r.rows ? r.rows[i] : i;
    float scale = 0;
    int64_t scaled = 0;  // up to where `scale` is that of the group
    for (int64_t k = 0; k < w.k; k += kStructuredChunk) {
      const int64_t count = w.k - k < kStructuredChunk ? w.k - k : kStructuredChunk;
      alignas(64) float values[kChunkRoom];
      decode(w, row, k, count, values);
      for (int64_t j = 0; j < count;) {
        if (k + j >= scaled) {
          scale = scale_of(w, row, (k + j) / w.group);
          scaled = ((k + j) / w.group + 1) * w.group;
        }
        const int64_t stop = scaled - k < count ? scaled - k : count;
        for (; j < stop; ++j) values[j] *= scale;
      }
      store_as(r.out, r.out_dtype, i * w.k + k, values, count);
    }
  }
}

// sums[r] = the product of `count` values, a multiple of 8, with row r of x.
template <int kRows>
inline void multiply(const float* values, const float* x, int64_t stride, int64_t count, float* sums) {
  constexpr int kParts = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  F parts[kRows][kParts];
  for (auto& row : parts) {
    for (F& part : row) part = zero();
  }
  int64_t i = 0;
  for (; i + kParts * kVecLanes <= count; i += kParts * kVecLanes) {
    unroll<kParts>([&](auto p) LOWBIT_INLINE {
      const F v = load(values + i + p * kVecLanes);
      unroll<kRows>([&](auto r)
                        LOWBIT_INLINE { parts[r][p] = fma(v, load(x + r * stride + i + p * kVecLanes), parts[r][p]); });
    });
  }
  for (; i + kVecLanes <= count; i += kVecLanes) {
    const F v = load(values + i);
    unroll<kRows>([&](auto r) LOWBIT_INLINE { parts[r][0] = fma(v, load(x + r * stride + i), parts[r][0]); });
  }
  for (int r = 0; r < kRows; ++r) {
    F sum = parts[r][0];
    for (int p = 1; p < kParts; ++p) sum = add(sum, parts[r][p]);
    float rest = 0;
    for (int64_t j = i; j < count; ++j) rest += values[j] * x[r * stride + j];
    sums[r] = sum_lanes(sum) + rest;
  }
}

// y[r] += the product of row `row` of the weight with row r of x.
template <int kRows>
void multiply_row(const StructuredLinear& l, int64_t row, const float* x, float* y) {
  const StructuredWeight& w = l.w;
  float sums[kRows] = {};
  for (int64_t k = 0; k < w.k; k += kStructuredChunk) {
    const int64_t count = w.k - k < kStructuredChunk ? w.k - k : kStructuredChunk;
    alignas(64) float values[kChunkRoom];
    decode(w, row, k, count, values);
    for (int64_t j = 0; j < count;) {
      const int64_t group = (k + j) / w.group, end = (group + 1) * w.group - k;
      const int64_t stop = end < count ? end : count;
      float part[kRows];
      multiply<kRows>(values + j, x + k + j, l.padded_k, stop - j, part);
      for (int r = 0; r < kRows; ++r) sums[r] += part[r];
      j = stop;
      if (end <= count || k + count == w.k) {
        const float scale = scale_of(w, row, group);
        for (int r = 0; r < kRows; ++r) y[r] += scale * sums[r], sums[r] = 0;
      }
    }
  }
}

void multiply_rows(const StructuredLinear& l, int64_t begin, int64_t end) {
  multiply_tiles(l, begin, end, [&](auto rows, int64_t n0, int64_t count, Tile& tile) {
    for (int64_t i = 0; i < count; ++i) {
      float y[kStructuredRows] = {};
      multiply_row<decltype(rows)::value>(l, n0 + i, l.prepared, y);
      for (int r = 0; r < rows; ++r) tile[r][i] = y[r];
    }
  });
}

constexpr StructuredKernel kStructuredKernel{.rows = decode_rows, .prepare = prepare_rows, .linear = multiply_rows};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
