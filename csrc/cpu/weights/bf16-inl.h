// bf16 activations with AVX-512 BF16: table entries as bf16, vdpbf16ps of two weights and two x per lane, fp32 sums.
// Groups are multiples of kChunkK, or half of it; the scale multiplies the sum of a group, so it is never rounded.
// vdpbf16ps: latency 6 / 6, one every cycle / cycle on Zen 5 / Sapphire Rapids; vpermw and vpermt2w 1 a cycle.
#pragma once

#include <cstddef>

#include "cpu/weights/gemv-inl.h"
#include "cpu/weights/symmetric-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// What it takes to have code J of the pair (2 J, 2 J + 1) of 16 columns in the low bits of each word, but for a shift
// by kLeft bits. Higher bits are arbitrary.
template <int B, int J, int kLeft = 0>
LOWBIT_INLINE inline __m512i word_code(const uint8_t* block) {
  constexpr Place kPlace = place_of(B, J);
  __m512i code;
  unroll<kPlace.count>([&](auto i) LOWBIT_INLINE {
    constexpr Piece piece = kPlace.pieces[i];
    constexpr int kDown = piece.shift - piece.at - kLeft;
    __m512i bits = load_i(block + piece.unit * kUnitBytes);
    if constexpr (kDown > 0) bits = _mm512_srli_epi16(bits, kDown);
    if constexpr (i == 0) {
      code = bits;
    } else {
      code = select_bits(_mm512_set1_epi16((1 << piece.at) - 1), code, bits);
    }
  });
  return code;
}

// Tables of bf16 in registers, indexed by 16-bit words. vpermw reads 5 bits of an index and ignores the rest, so that
// a code of 1 or 2 bits may stand anywhere in them: table `i` is that of codes whose first bit is bit i * B. A word is
// then shifted once for five or two codes.
template <int B>
struct WordTable {
  static constexpr int kPlaces = B <= 2 ? 5 / B : 1;
  static constexpr int kVecs = B <= 5 ? 1 : 2;  // 6 bits: 64 entries
  __m512i t[kPlaces * kVecs];
  WordTable() = default;
  explicit WordTable(const float* values) {
    for (int v = 0; v < kPlaces * kVecs; ++v) {
      alignas(64) uint16_t words[32];
      for (int half = 0; half < 2; ++half) {
        if constexpr (B >= 4) {
          store_bf16(words + half * 16, load(values + ((v * 32 + half * 16) & ((1 << B) - 1))));
        } else {
          float lanes[16];
          for (int i = 0; i < 16; ++i) lanes[i] = values[(half * 16 + i) >> v * B & ((1 << B) - 1)];
          store_bf16(words + half * 16, load(lanes));
        }
      }
      t[v] = load_i(words);
    }
  }
  // The entries of the pair (2 J, 2 J + 1) of 16 columns.
  template <int J>
  LOWBIT_INLINE __m512i value(const uint8_t* block) const {
    constexpr int kShift = place_of(B, J).pieces[0].shift, kTable = kPlaces > 1 ? kShift / B % kPlaces : 0;
    const __m512i code = word_code<B, J, kTable * B>(block);
    if constexpr (kVecs == 1) {
      return _mm512_permutexvar_epi16(code, t[kTable]);
    } else {
      return _mm512_permutex2var_epi16(t[0], code, t[1]);
    }
  }
};

template <>
struct WordTable<8> {
  __m512i low[4], high[4];
  WordTable() = default;
  explicit WordTable(const float* values) { split_bytes(values, 4, low, high); }
  // vpermi2b leaves the index where its mask is zero, so that the second finds the codes of the upper half there.
  LOWBIT_INLINE static __m512i look_up(const __m512i* t, __m512i code, __mmask64 upper) {
    const __m512i lower_done = _mm512_mask2_permutex2var_epi8(t[0], code, ~upper, t[1]);
    return _mm512_mask2_permutex2var_epi8(t[2], lower_done, upper, t[3]);
  }
  template <int J>
  LOWBIT_INLINE __m512i value(const uint8_t* block) const {
    const __m512i code = load_i(block + J / 2 * kUnitBytes);
    const __mmask64 upper = _mm512_movepi8_mask(code);
    return pair_words<J>(look_up(low, code, upper), look_up(high, code, upper));
  }
};

template <int B>
struct WordLut {
  static constexpr int kBits = B;
  WordTable<B> table;
  explicit WordLut(const Launch& l) : table(l.table) {}
  static std::nullptr_t at(int64_t, int64_t, int) { return nullptr; }
  template <int J>
  LOWBIT_INLINE __m512i value(const uint8_t* block, std::nullptr_t) const {
    return table.template value<J>(block);
  }
};

// A pair of tables, of which every column and group has one.
template <int B>
struct WordPairLut {
  static constexpr int kBits = B;
  const Launch& l;
  WordTable<B + 1> table;
  explicit WordPairLut(const Launch& launch) : l(launch), table(launch.table) {}
  LOWBIT_INLINE __m512i at(int64_t block, int64_t group, int lane) const {
    const __m512i scales = pair_scales(l, block, group, lane);
    return shift_left<B>(or_i(scales, shift_left<16>(scales)));
  }
  template <int J>
  LOWBIT_INLINE __m512i value(const uint8_t* block, __m512i chosen) const {
    const __m512i code = select_bits(_mm512_set1_epi16((1 << B) - 1), word_code<B, J>(block), chosen);
    return _mm512_permutexvar_epi16(code, table.t[0]);
  }
};

// A weight that SymmetricTable can look up.
struct SymmetricLut {
  static constexpr int kBits = 8;
  static constexpr int kHalf = 128;
  struct Table : SymmetricTable {
    using SymmetricTable::SymmetricTable;
    template <int J>
    LOWBIT_INLINE __m512i value(const uint8_t* block) const {
      const __m512i code = load_i(block + J / 2 * kUnitBytes);
      return pair_words<J>(low_bytes(code), high_bytes(code));
    }
  } table;
  explicit SymmetricLut(const Launch& l) : table(l.table) {}
  static std::nullptr_t at(int64_t, int64_t, int) { return nullptr; }
  template <int J>
  LOWBIT_INLINE __m512i value(const uint8_t* block, std::nullptr_t) const {
    return table.template value<J>(block);
  }
  static bool serves(const float* values) {
    for (int i = 0; i < kHalf; ++i) {
      const float a = values[i], b = values[kHalf + i];
      if (__builtin_signbit(a) || !(__builtin_signbit(b) || b != b) || (a != -b && (a == a || b == b))) return false;
    }
    return true;
  }
};

template <int B, int kXTerms = 1, class C = WordLut<B>>
struct ComputeBf16 {
  using Codec = C;
  using X = uint16_t;
  using Broadcast = __m512i;
  static constexpr Dtype kType = Dtype::kBf16;
  static constexpr int kStepK = 2;
  static constexpr int kTerms = kXTerms;
  template <int S, class OfGroup>
  LOWBIT_INLINE static __m512i value(const Codec& codec, const uint8_t* block, OfGroup of_group) {
    return codec.template value<S>(block, of_group);
  }
  LOWBIT_INLINE static __m512i broadcast(const uint16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_set1_epi32(pair);
  }
  LOWBIT_INLINE static F dot(F acc, __m512i x, __m512i value) {
    return _mm512_dpbf16_ps(acc, (__m512bh)value, (__m512bh)x);
  }
};

// Rows [begin, end) of bf16 x, zero beyond k.
inline void prepare_bf16(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    uint16_t* out = static_cast<uint16_t*>(l.prepared) + m * l.prepared_stride;
    __builtin_memcpy(out, static_cast<const uint16_t*>(l.x) + m * l.x_stride, l.k * 2);
    __builtin_memset(out + l.k, 0, (l.prepared_stride - l.k) * 2);
    if (l.x_sums) sum_groups<Dtype::kBf16>(l, out, l.x_sums + m * l.num_groups);
  }
}

// Sums of row m of x over each group, its chunks `stride` apart from `row` on.
template <int kTerms>
inline void sum_chunks(const Launch& l, int64_t m, const uint16_t* row, int64_t stride) {
  constexpr int kHalf = kHalfChunk * kTerms;
  if (halves_chunks(l.group, l.k)) {
    for (int64_t g = 0; g < l.num_groups; ++g) {
      const uint16_t* in = row + g / 2 * stride + g % 2 * kHalf;
      F total = zero();
      for (int i = 0; i < kHalf; i += kUnitLanes) total = add(total, load_bf16(in + i));
      l.x_sums[m * l.num_groups + g] = sum_lanes(total);
    }
    return;
  }
  const int64_t chunks = num_chunks(l.k), chunks_per_group = l.num_groups == 1 ? chunks : l.group / kChunkK;
  for (int64_t g = 0; g < l.num_groups; ++g) {
    const int64_t chunk_end = (g + 1) * chunks_per_group < chunks ? (g + 1) * chunks_per_group : chunks;
    F total = zero();
    for (int64_t c = g * chunks_per_group; c < chunk_end; ++c) {
      const uint16_t* in = row + c * stride;
      for (int i = 0; i < kChunkK * kTerms; i += kUnitLanes) total = add(total, load_bf16(in + i));
    }
    l.x_sums[m * l.num_groups + g] = sum_lanes(total);
  }
}

// Row m of bf16 x in chunks that lie `stride` apart, zero beyond k, and the sums of its groups.
inline void copy_chunks(const Launch& l, int64_t m, uint16_t* out, int64_t stride) {
  const int64_t chunks = num_chunks(l.k);
  const uint16_t* x = static_cast<const uint16_t*>(l.x) + m * l.x_stride;
  alignas(64) uint16_t last[kChunkK] = {};
  __builtin_memcpy(last, x + (chunks - 1) * kChunkK, (l.k - (chunks - 1) * kChunkK) * 2);
  for (int64_t c = 0; c < chunks; ++c) {
    _mm512_storeu_si512(out + c * stride, load_i(c + 1 < chunks ? x + c * kChunkK : last));
  }
  if (l.x_sums) sum_chunks<1>(l, m, out, stride);
}

// Rows [begin, end) of bf16 x as the panels meet them: [k / 32][row][32], zero beyond k. The rows of a tile are then
// one stream, where rows that lie a power of two apart would share few sets of the cache.
inline void prepare_bf16_chunks(const Launch& l, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    copy_chunks(l, m, static_cast<uint16_t*>(l.prepared) + m * kChunkK, l.m * kChunkK);
  }
}

constexpr int kWordPanelChunks = 4;  // 128 weights x 64 columns of bf16: 16 KiB, half of the smallest L1 cache
constexpr int64_t kWordRowsPerTask = 516;
constexpr int kWordPanelRows = 6;
constexpr int kPairsPerChunk = kChunkK / 2;
constexpr int kColumnVecs = kBlockN / kUnitLanes;

// Where a panel stands in the groups. A panel holds whole groups, or, if it `carries`, a part of one.
struct Span {
  int64_t block, first_row, chunk, chunk_end, chunks_per_group;
  bool carries, halves;
  int64_t group_of(int64_t chunk) const { return halves ? 2 * chunk : chunk / chunks_per_group; }
};

// panel[pair][64 columns][2] in bf16: table entries, not yet scaled.
template <class C>
inline void decode_words(const Launch& l, const C& codec, const Span& span, uint16_t* panel) {
  constexpr int kBits = C::kBits;
  const uint8_t* codes = l.codes + (span.block * num_chunks(l.k) + span.chunk) * chunk_bytes(kBits);
  for (int64_t c = span.chunk; c < span.chunk_end; ++c) {
    const int64_t first = span.group_of(c), second = span.halves && first + 1 < l.num_groups ? first + 1 : first;
    unroll<kColumnVecs>([&](auto v) LOWBIT_INLINE {
      const auto of_first = codec.at(span.block, first, v * kUnitLanes);
      const auto of_second = codec.at(span.block, second, v * kUnitLanes);
      unroll<kPairsPerChunk>([&](auto s) LOWBIT_INLINE {
        const auto of_group = 2 * s < kPairsPerChunk ? of_first : of_second;
        const __m512i value = codec.template value<s>(codes + v * vector_bytes(kBits), of_group);
        _mm512_store_si512(panel + s * 2 * kBlockN + v * 2 * kUnitLanes, value);
      });
    });
    codes += chunk_bytes(kBits);
    panel += kPairsPerChunk * 2 * kBlockN;
  }
}

// Scales and zeros of a panel's groups in fp32: all tiles of rows need them.
template <int kChunks = kWordPanelChunks>
struct PanelTerms {
  alignas(64) float scales[2 * kChunks][kBlockN], zeros[2 * kChunks][kBlockN];
  void read(const Launch& l, const Span& span) {
    const int64_t first = span.group_of(span.chunk), last = span.group_of(span.chunk_end - 1) + (span.halves ? 1 : 0);
    for (int64_t g = first; g <= last && g < l.num_groups; ++g) {
      for (int lane = 0; lane < kBlockN; lane += kUnitLanes) {
        const GroupTerms terms = group_terms(l, span.block, g, lane);
        store(scales[g - first] + lane, terms.scale);
        store(zeros[g - first] + lane, terms.zero);
      }
    }
  }
  GroupTerms at(int64_t index, int lane) const { return {load(scales[index] + lane), load(zeros[index] + lane)}; }
};

// Multiplies a panel; wherever a group ends, adds its scaled sums to `y`. The sums of an unfinished group go to
// `carry`. Both are (rows, 64).
template <int kRows, int kTerms>
inline void multiply_words(const Launch& l, const Span& span, const uint16_t* panel, const PanelTerms<>& panel_terms,
                           int64_t row, float* carry_row, float* y_row) {
  using Compute = ComputeBf16<1>;  // the product is the same for all bit widths
  F acc[kRows][kColumnVecs];
  unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kColumnVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = zero(); }); });
  const uint16_t* x = static_cast<const uint16_t*>(l.prepared) + (span.first_row + row) * kChunkK * kTerms;
  const int64_t chunks = num_chunks(l.k), first_group = span.group_of(span.chunk);
  for (int64_t c = span.chunk; c < span.chunk_end; ++c) {
    const uint16_t* xc = x + c * l.m * kChunkK * kTerms;
    // The rows of the next tile: of many rows, x does not fit in L2.
    unroll<kRows * kTerms>([&](auto i) LOWBIT_INLINE { prefetch(xc + (kRows * kTerms + i) * kChunkK); });
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kPairsPerChunk / 2; ++i) {
        __m512i w[kColumnVecs];
        unroll<kColumnVecs>([&](auto v) LOWBIT_INLINE { w[v] = load_i(panel + v * 2 * kUnitLanes); });
        unroll<kTerms>([&](auto t) LOWBIT_INLINE {
          unroll<kRows>([&](auto r) LOWBIT_INLINE {
            const __m512i xt = Compute::broadcast(xc + r * kChunkK * kTerms + 2 * t);
            unroll<kColumnVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = Compute::dot(acc[r][v], xt, w[v]); });
          });
        });
        panel += 2 * kBlockN;
        xc += 2 * kTerms;
      }
      int64_t group = 2 * c + half;
      if (!span.halves) {
        if (half == 0 || ((c + 1) % span.chunks_per_group != 0 && c + 1 < chunks)) continue;
        group = c / span.chunks_per_group;
      } else if (group == l.num_groups) {
        break;
      }
      unroll<kColumnVecs>([&](auto v) LOWBIT_INLINE {
        const GroupTerms terms = panel_terms.at(group - first_group, v * kUnitLanes);
        unroll<kRows>([&](auto r) LOWBIT_INLINE {
          float* y = y_row + r * kBlockN + v * kUnitLanes;
          float* carry = carry_row + r * kBlockN + v * kUnitLanes;
          if (span.carries) {
            acc[r][v] = add(acc[r][v], load(carry));
            store(carry, zero());
          }
          const float x_sum = l.x_sums ? l.x_sums[(span.first_row + row + r) * l.num_groups + group] : 0.0f;
          store(y, finish_group(l, terms, load(y), acc[r][v], x_sum));
          acc[r][v] = zero();
        });
      });
    }
  }
  if (!span.carries) return;
  unroll<kRows>([&](auto r) LOWBIT_INLINE {
    unroll<kColumnVecs>([&](auto v) LOWBIT_INLINE {
      float* carry = carry_row + r * kBlockN + v * kUnitLanes;
      store(carry, add(load(carry), acc[r][v]));
    });
  });
}

template <class C, int kTerms = 1>
void gemm_words_run(const Launch& l, int64_t begin, int64_t end) {
  const C codec(l);
  alignas(64) uint16_t panel[kWordPanelChunks * kChunkK * kBlockN];
  PanelTerms<> terms;
  alignas(64) float carry[kWordRowsPerTask * kBlockN];
  alignas(64) float y[kWordRowsPerTask * kBlockN];
  const int64_t row_blocks = ceil_div(l.m, kWordRowsPerTask), chunks = num_chunks(l.k);
  for (int64_t task = begin; task < end; ++task) {
    Span span{};
    span.block = task / row_blocks;
    span.first_row = task % row_blocks * kWordRowsPerTask;
    span.halves = halves_chunks(l.group, l.k);
    span.chunks_per_group = l.num_groups == 1 ? chunks : span.halves ? 1 : l.group / kChunkK;
    span.carries = span.chunks_per_group > kWordPanelChunks;
    const int64_t panel_chunks =
        span.carries ? kWordPanelChunks : kWordPanelChunks / span.chunks_per_group * span.chunks_per_group;
    const int64_t left = l.m - span.first_row;
    const int64_t rows = left < kWordRowsPerTask ? left : kWordRowsPerTask;
    __builtin_memset(carry, 0, rows * kBlockN * sizeof(float));
    __builtin_memset(y, 0, rows * kBlockN * sizeof(float));
    for (span.chunk = 0; span.chunk < chunks; span.chunk = span.chunk_end) {
      span.chunk_end = span.chunk + panel_chunks < chunks ? span.chunk + panel_chunks : chunks;
      decode_words(l, codec, span, panel);
      terms.read(l, span);
      const auto multiply = [&]<int kRows>(int64_t r) {
        multiply_words<kRows, kTerms>(l, span, panel, terms, r, carry + r * kBlockN, y + r * kBlockN);
      };
      int64_t r = 0;
      for (; r + kWordPanelRows <= rows; r += kWordPanelRows) multiply.template operator()<kWordPanelRows>(r);
      for (; r + 2 <= rows; r += 2) multiply.template operator()<2>(r);
      for (; r < rows; ++r) multiply.template operator()<1>(r);
    }
    for (int64_t r = 0; r < rows; ++r) {
      store_columns(l, span.first_row + r, span.block * kBlockN, kBlockN, y + r * kBlockN);
    }
  }
}

template <int B, int kTerms = 1>
void gemv_words_run(const Launch& l, int64_t begin, int64_t end) {
  if constexpr (B == 8) {
    if (SymmetricLut::serves(l.table)) return gemv_run<ComputeBf16<8, kTerms, SymmetricLut>>(l, begin, end);
  }
  gemv_run<ComputeBf16<B, kTerms>>(l, begin, end);
}

template <int B>
constexpr Kernel gemv_bf16(const char* name) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kBf16,
          .codec = Codec::kLut,
          .bits = B,
          .scope = Scope::kShared,
          .isa = kAvx512Bf16,
          .chunk_groups = true,
          .exact_x = {.bf16 = true},
          .prepare = prepare_bf16,
          .run = gemv_words_run<B>,
          .half_groups = true};
}
template <int B>
constexpr Kernel gemm_bf16(const char* name) {
  Kernel kernel = gemv_bf16<B>(name);
  kernel.prepare = prepare_bf16_chunks;
  kernel.rows_per_task = kWordRowsPerTask;
  kernel.run = gemm_words_run<WordLut<B>>;
  return kernel;
}
template <int B>
constexpr Kernel pair_gemv_bf16(const char* name) {
  Kernel kernel = gemv_bf16<B>(name);
  kernel.scope = Scope::kPair;
  kernel.run = gemv_run<ComputeBf16<B, 1, WordPairLut<B>>>;
  return kernel;
}
template <int B>
constexpr Kernel pair_gemm_bf16(const char* name) {
  Kernel kernel = gemm_bf16<B>(name);
  kernel.scope = Scope::kPair;
  kernel.run = gemm_words_run<WordPairLut<B>>;
  return kernel;
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
