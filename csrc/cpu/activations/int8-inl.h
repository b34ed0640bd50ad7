// int8 activations: the sum of a part of a segment (core/int8_table.h) is exact in int32, x . (T - zero) with T the
// table as int8, and fp32 follows in the order that reference.int8_linear states. The dot product takes weights as
// unsigned bytes: an integer code as it is, a table entry plus 128; the difference leaves through the sums of x, and so
// does an integer zero.
//
// A dword of a column holds four weights: two pairs (k even, k odd), of codes that lie 8 bits apart in their words
// where the width divides 8, so that one shift brings all four into place. x is permuted to that order once.
#pragma once

#include "cpu/activations/int8_sums-inl.h"

#define LOWBIT_CODEC_KERNELS(C, codec) \
  skinny_i8<C>(LOWBIT_NAME("gemv", "i8", codec)), gemm_i8<C>(LOWBIT_NAME("gemm", "i8", codec)),
#define LOWBIT_LUT(B) LOWBIT_CODEC_KERNELS(LutBytes<B>, "lut" #B)
#define LOWBIT_INT(B) LOWBIT_CODEC_KERNELS(IntBytes<B>, "int" #B)

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kDwordBytes = 4 * kBlockN;  // of a panel: four weights of 64 columns

// Pair of weights of a chunk in bytes 0 and 2 (`half` 0) and 1 and 3 (`half` 1) of dword d. Widths that do not divide 8
// take two codes of one unit where they can. Of 2 and more bits, each half of a chunk has dwords of its own.
template <int B>
constexpr int pair_of(int d, int half) {
  constexpr int kPairs[3][kDwordsPerChunk][2] = {
      {{0, 1}, {2, 3}, {5, 6}, {4, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}},
      {{0, 1}, {3, 4}, {6, 7}, {2, 5}, {9, 10}, {12, 13}, {8, 11}, {14, 15}},
      {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}}};
  if (8 % B == 0) return d / (8 / B) * (16 / B) + d % (8 / B) + half * (8 / B);
  return kPairs[B == 3 ? 0 : B == 5 ? 1 : 2][d][half];
}

template <int B>
struct ChunkOrder {
  uint8_t at[kChunkK];
  constexpr ChunkOrder() : at() {
    for (int d = 0; d < kDwordsPerChunk; ++d) {
      for (int q = 0; q < 4; ++q) at[4 * d + q] = static_cast<uint8_t>(2 * pair_of<B>(d, q % 2) + q / 2);
    }
  }
};

// Code J of both parities in both bytes of its words, from bit 0. Higher bits are arbitrary.
template <int B, int J>
LOWBIT_INLINE inline I word_code(const uint8_t* columns) {
  constexpr Place kPlace = place_of(B, J);
  I code;
  unroll<kPlace.count>([&](auto i) LOWBIT_INLINE {
    constexpr Piece piece = kPlace.pieces[i];
    const I bits =
        gather_bits<piece.at>(load_i(columns + piece.unit * kUnitBytes), piece.shift, piece.shift, piece.width);
    if constexpr (i == 0) {
      code = bits;
    } else {
      code = select_bits(set1_bytes((1 << piece.at) - 1), code, bits);
    }
  });
  return code;
}

// The codes of dword D of a chunk in the low B bits of each byte. Higher bits are arbitrary.
template <int B, int D>
LOWBIT_INLINE inline I dword_codes(const uint8_t* columns) {
  if constexpr (8 % B == 0) {
    return shift_right<D % (8 / B) * B>(load_i(columns + D / (8 / B) * kUnitBytes));
  } else {
    constexpr int kFirst = pair_of<B>(D, 0), kSecond = pair_of<B>(D, 1);
    constexpr Place kFirstPlace = place_of(B, kFirst), kSecondPlace = place_of(B, kSecond);
    constexpr Piece a = kFirstPlace.pieces[0], b = kSecondPlace.pieces[0];
    if constexpr (kFirstPlace.count == 1 && kSecondPlace.count == 1 && a.unit == b.unit) {
      return gather_bits<0>(load_i(columns + a.unit * kUnitBytes), a.shift, b.shift, B);
    } else {
      return select_bits(set1_i(0x00FF00FF), word_code<B, kFirst>(columns), word_code<B, kSecond>(columns));
    }
  }
}

// Integer codes are the bytes: T = code + table[0].
template <int B>
struct IntBytes {
  static constexpr int kBits = B;
  static constexpr bool kWide = B == 8;
  static constexpr bool kHalves = B > 1;
  static constexpr Codec kCodec = Codec::kInt;
  int32_t first;
  explicit IntBytes(const Launch& l) : first(static_cast<int32_t>(l.table[0])) {}
  template <int D>
  LOWBIT_INLINE I bytes(const uint8_t* columns) const {
    const I code = dword_codes<B, D>(columns);
    return B == 8 ? code : bit_and(code, set1_bytes((1 << B) - 1));
  }
};

template <int B>
struct LutBytes {
  static constexpr int kBits = B;
  static constexpr bool kWide = true;
  static constexpr bool kHalves = B > 1;
  static constexpr Codec kCodec = Codec::kLut;
  static constexpr int32_t first = -128;
  ByteTable<B> table;
  explicit LutBytes(const Launch& l) : table(shifted(l).at) {}
  struct Bytes {
    uint8_t at[1 << B];
  };
  static Bytes shifted(const Launch& l) {
    Bytes b;
    for (int i = 0; i < 1 << B; ++i) b.at[i] = static_cast<uint8_t>(l.table_i8[i] - first);
    return b;
  }
  template <int D>
  LOWBIT_INLINE I bytes(const uint8_t* columns) const {
    return table(dword_codes<B, D>(columns));
  }
};

inline bool int_zeros(const Launch& l) { return l.zero == ZeroMode::kSubtract && l.zero_dtype == Dtype::kI8; }

// What a part's sum of products starts from: (first - zero) * sum of x.
LOWBIT_INLINE inline I part_start(const Launch& l, int32_t first, int64_t block, int64_t group, int lane,
                                  int32_t x_sum) {
  const I start = set1_i(first * x_sum);
  if (!int_zeros(l)) return start;
  const int8_t* zeros = static_cast<const int8_t*>(l.zeros) + (block * l.num_groups + group) * kBlockN + lane;
  return add_i(start, mul_i(load_i8_lanes(zeros), set1_i(-x_sum)));
}

// Scales of kVecLanes columns of a group, and their zeros where these are not integers. `kPlain` says that they are
// numbers of one level (`plain_terms`): kernels are compiled for both, as the tests of the other kinds cost a tenth of
// short groups.
template <bool kPlain>
LOWBIT_INLINE inline GroupTerms float_terms(const Launch& l, int64_t block, int64_t group, int lane) {
  const bool zeros = l.zero != ZeroMode::kNone && !int_zeros(l);
  if constexpr (kPlain) {
    const int64_t i = (block * l.num_groups + group) * kBlockN + lane;
    return {l.scales ? load_as(l.scales, l.scale_dtype, i) : set1(1.0f),
            zeros ? load_as(l.zeros, l.zero_dtype, i) : zero()};
  }
  return zeros ? group_terms(l, block, group, lane) : GroupTerms{group_scale(l, block, group, lane), zero()};
}

// y + what a part of a segment adds to it, each operation rounded once.
LOWBIT_INLINE inline F add_part(const Launch& l, const Segments& s, GroupTerms t, F y, I acc, int64_t row,
                                int64_t segment, int32_t x_sum) {
  F term = to_float(acc);
  if (l.zero == ZeroMode::kNone || int_zeros(l)) {
    term = mul(t.scale, term);
  } else {
    const F shift = mul(t.zero, set1(static_cast<float>(x_sum)));
    term = l.zero == ZeroMode::kAdd ? add(mul(t.scale, term), shift) : mul(t.scale, sub(term, shift));
  }
  if (l.x_group > 0) term = mul(term, block_scale(l, s, row, segment));
  return add(y, term);
}

// Adds what was summed before to some columns of y, multiplies them by the scale of the row and the step of the table,
// and stores them.
inline void finish_row(const Launch& l, int64_t block, int64_t row, int lane0, int count, const float* total,
                       float* y) {
  const F factor = row_scale(l, row);
  for (int i = 0; i < count; i += kVecLanes) store(y + i, mul(add(load(total + i), load(y + i)), factor));
  if (block * kBlockN + lane0 < l.n) store_columns(l, row, block * kBlockN + lane0, count, y);
}

template <int B>
void prepare_i8(const Launch& l, int64_t begin, int64_t end) {
  static constexpr ChunkOrder<B> order;
  for (int64_t m = begin; m < end; ++m) {
    int8_t* row = quantized_row(l, m);
    sum_parts(l, m, row);
    permute_chunks(row, l.prepared_stride, order.at);
  }
}

constexpr int64_t kPartChunks = kMaxInt8Group / kChunkK;

// Adds what a chunk gives whose halves are segments. A function of its own, which all codecs share.
template <int kRows, int kVecs>
__attribute__((noinline)) void close_halves(const Launch& l, const Segments& s, int32_t first, int64_t block,
                                            int64_t chunk, int lane0, const int64_t (&rows)[kRows],
                                            const I (&sums)[2][kRows][kVecs], float (&y)[kRows][kVecs * kVecLanes],
                                            float (&total)[kRows][kVecs * kVecLanes]) {
  for (int half = 0; half < 2; ++half) {
    const int64_t segment = 2 * chunk + half;
    if (segment == s.count) return;
    const int64_t group = s.group(segment);
    for (int v = 0; v < kVecs; ++v) {
      const int lane = lane0 + v * kVecLanes;
      const GroupTerms terms = float_terms<false>(l, block, group, lane);
      for (int r = 0; r < kRows; ++r) {
        const int32_t x_sum = part_sums(l, s, rows[r])[segment];
        const I acc = add_i(sums[half][r][v], part_start(l, first, block, group, lane, x_sum));
        float* sum = y[r] + v * kVecLanes;
        store(sum, add_part(l, s, terms, load(sum), acc, rows[r], segment, x_sum));
      }
    }
    for (int r = 0; r < kRows; ++r) close_sums(segment + 1, kVecs * kVecLanes, y[r], total[r]);
  }
}

// Few rows: codes are decoded in registers and met by all of them.
template <class C, int kRows, int kVecs, bool kPlain>
inline void skinny_tile(const Launch& l, const C& codec, int64_t block, int64_t m0, int64_t valid_rows, int lane0) {
  constexpr int kBits = C::kBits, kColumns = kVecs * kVecLanes;
  constexpr bool kHalves = C::kHalves && !kPlain;
  const Segments s = segments_of(l);
  const bool halves = kHalves && halves_chunks(s.size, l.k);
  const int64_t chunks = num_chunks(l.k);
  const int64_t chunks_per_segment = s.count == 1 ? chunks : halves ? 1 : s.size / kChunkK;
  const uint8_t* codes = l.codes + block * chunks * chunk_bytes(kBits);
  const bool fetches = kRows > 1 && fetches_codes(chunks * chunk_bytes(kBits), m0, lane0);
  int64_t rows[kRows];
  const int8_t* x[kRows];
  const int32_t* x_sums[kRows];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = m0 + (r < valid_rows ? r : 0);
    x[r] = static_cast<const int8_t*>(l.prepared) + rows[r] * l.prepared_stride;
    x_sums[r] = part_sums(l, s, rows[r]);
  }
  alignas(64) float y[kRows][kColumns] = {}, total[kRows][kColumns] = {};
  I acc[kRows][kVecs], of_half[2][kRows][kVecs];
  const auto each = [&](const auto& fn) LOWBIT_INLINE {
    unroll<kRows>([&](auto r) LOWBIT_INLINE { unroll<kVecs>([&](auto v) LOWBIT_INLINE { fn(r, v); }); });
  };
  // The chunk where a segment ends, and the part that is next; a segment of more than one part takes several turns.
  int64_t segment_end = chunks_per_segment < chunks ? chunks_per_segment : chunks, part = 0;
  for (int64_t segment = 0, chunk = 0; chunk < chunks; ++part) {
    const int64_t group = s.group(segment);
    each([&](auto r, auto v) LOWBIT_INLINE {
      acc[r][v] = halves ? set1_i(0) : part_start(l, codec.first, block, group, lane0 + v * kVecLanes, x_sums[r][part]);
    });
    const int64_t last = chunk + kPartChunks < segment_end ? chunk + kPartChunks : segment_end;
    sum_chunks<C, kRows, kVecs, kHalves>(std::make_integer_sequence<int, kDwordsPerChunk / 2>{}, codec, codes, lane0, x,
                                         chunk, last, halves, fetches, acc, of_half[0]);
    chunk = last;
    if constexpr (kHalves) {
      if (halves) {
        each([&](auto r, auto v) LOWBIT_INLINE { of_half[1][r][v] = acc[r][v]; });
        close_halves<kRows, kVecs>(l, s, codec.first, block, chunk - 1, lane0, rows, of_half, y, total);
        segment_end = chunk + 1;
        continue;
      }
    }
    unroll<kVecs>([&](auto v) LOWBIT_INLINE {
      const GroupTerms terms = float_terms<kPlain>(l, block, group, lane0 + v * kVecLanes);
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        float* sum = y[r] + v * kVecLanes;
        store(sum, add_part(l, s, terms, load(sum), acc[r][v], rows[r], segment, x_sums[r][part]));
      });
    });
    for (int r = 0; r < kRows; ++r) close_sums(part + 1, kColumns, y[r], total[r]);
    if (chunk == segment_end) {
      ++segment;
      segment_end = chunk + chunks_per_segment < chunks ? chunk + chunks_per_segment : chunks;
    }
  }
  for (int r = 0; r < valid_rows; ++r) finish_row(l, block, rows[r], lane0, kColumns, total[r], y[r]);
}

template <class C, bool kPlain, int kRows, int kVecs>
inline void skinny_rows(const Launch& l, const C& codec, int64_t block, int64_t m0, int64_t valid_rows) {
  for (int lane = 0; lane < kBlockN; lane += kVecs * kVecLanes) {
    skinny_tile<C, kRows, kVecs, kPlain>(l, codec, block, m0, valid_rows, lane);
  }
}

// A block's codes stay in L2 while the rows pass over them.
template <class C, bool kPlain>
inline void skinny_blocks(const Launch& l, int64_t begin, int64_t end) {
  const C codec(l);
  for (int64_t block = begin; block < end; ++block) {
    for (int64_t m0 = 0, rows; m0 < l.m; m0 += rows) {
      // The first rows read memory in order, all columns at once; the others find the codes in L2.
      const int most = !kPlain ? 2 : m0 == 0 ? 4 : kSkinnyRows;  // a tile less to compile of the others
      rows = l.m - m0 < most ? l.m - m0 : most;
      if (rows == 1) {
        // All columns at once: one stream. Wide codes of so many come from too many places for the prefetchers.
        skinny_rows<C, kPlain, 1, C::kBits >= 6 ? kSkinnyVecs : kBlockN / kVecLanes>(l, codec, block, m0, rows);
      } else if (rows == 2) {
        skinny_rows<C, kPlain, 2, kTileVecs>(l, codec, block, m0, rows);
      } else if constexpr (kPlain) {
        if (rows <= 4) {
          skinny_rows<C, kPlain, 4, kTileVecs>(l, codec, block, m0, rows);
        } else {
          skinny_rows<C, kPlain, kSkinnyRows, kSkinnyVecs>(l, codec, block, m0, rows);
        }
      }
    }
  }
}

template <class C>
void skinny_run(const Launch& l, int64_t begin, int64_t end) {
  if (plain_terms(l) && !halves_chunks(segments_of(l).size, l.k)) return skinny_blocks<C, true>(l, begin, end);
  skinny_blocks<C, false>(l, begin, end);
}

constexpr int kBytePanelWeights = 256;  // x 64 columns of bytes = 16 KiB
constexpr int64_t kByteRowsPerTask = 192;

// Where a panel stands along k. It holds whole segments, of `size` weights, or, if it `carries`, a part of one.
struct ByteSpan {
  Segments segments;
  int64_t block, first_row, k, k_end, size, depth;
  bool carries;
  int32_t first;
};

// panel[dword][64 columns] as dword_codes gives them.
template <class C>
inline void decode_bytes(const Launch& l, const C& codec, const ByteSpan& span, uint8_t* panel) {
  const uint8_t* codes = l.codes + (span.block * num_chunks(l.k) + span.k / kChunkK) * chunk_bytes(C::kBits);
  for (int64_t k = span.k; k < span.k_end; k += kChunkK) {
    for (int lane = 0; lane < kBlockN; lane += kVecLanes) {
      const uint8_t* columns = codes + lane / kUnitLanes * vector_bytes(C::kBits) + lane % kUnitLanes * 4;
      unroll<kDwordsPerChunk>(
          [&](auto d) LOWBIT_INLINE { store_i(panel + d * kDwordBytes + 4 * lane, codec.template bytes<d>(columns)); });
    }
    codes += chunk_bytes(C::kBits);
    panel += kDwordsPerChunk * kDwordBytes;
  }
}

// Multiplies a panel with kRows rows: adds each finished part of a segment to y (rows, 64); the sum of an unfinished
// one waits in `carry`. A panel that carries begins at a multiple of its length in its segment, and so does a part.
template <bool kWide, bool kPlain, int kRows>
inline void multiply_bytes(const Launch& l, const ByteSpan& span, const uint8_t* panel, int64_t row, int32_t* carry,
                           float* y, float* total) {
  static_assert(kMaxInt8Group % kBytePanelWeights == 0);
  const Segments& s = span.segments;
  const int64_t stride = l.prepared_stride;
  const int8_t* x_row = static_cast<const int8_t*>(l.prepared) + row * stride;
  const int32_t* x_sums = part_sums(l, s, row);
  const int64_t sums_stride = s.count * s.parts;
  for (int lane0 = 0; lane0 < kBlockN; lane0 += kGemmVecs * kVecLanes) {
    for (int64_t k = span.k; k < span.k_end;) {
      const int64_t segment = k / span.size, segment_begin = segment * span.size, group = s.group(segment);
      const int64_t segment_end = segment_begin + span.size, at = k - segment_begin;
      const int64_t last = segment_end < span.k_end ? segment_end : span.k_end;
      const int64_t part = segment * s.parts + at / kMaxInt8Group;
      const int32_t* x_sum = x_sums + part;
      I acc[kRows][kGemmVecs];
      unroll<kRows>([&](auto r) LOWBIT_INLINE {
        unroll<kGemmVecs>([&](auto v) LOWBIT_INLINE {
          const int lane = lane0 + v * kVecLanes;
          acc[r][v] = at % kMaxInt8Group == 0
                          ? part_start(l, span.first, span.block, group, lane, x_sum[r * sums_stride])
                          : load_i(carry + r * kBlockN + lane);
        });
      });
      const uint8_t* w = panel + (k - span.k) / 4 * kDwordBytes + 4 * lane0;
      const int8_t* x = x_row + k;
      for (const int8_t* x_end = x_row + last; x < x_end; x += 4, w += kDwordBytes) {
        I ws[kGemmVecs];
        unroll<kGemmVecs>([&](auto v) LOWBIT_INLINE { ws[v] = load_i(w + v * 4 * kVecLanes); });
        unroll<kRows>([&](auto r) LOWBIT_INLINE {
          const I xs = broadcast4(x + r * stride);
          unroll<kGemmVecs>([&](auto v) LOWBIT_INLINE { acc[r][v] = dot4<kWide>(acc[r][v], ws[v], xs); });
        });
      }
      const bool ends = last == segment_end || last == span.depth || (last - segment_begin) % kMaxInt8Group == 0;
      unroll<kGemmVecs>([&](auto v) LOWBIT_INLINE {
        const int lane = lane0 + v * kVecLanes;
        if (ends) {
          const GroupTerms terms = float_terms<kPlain>(l, span.block, group, lane);
          unroll<kRows>([&](auto r) LOWBIT_INLINE {
            float* sum = y + r * kBlockN + lane;
            store(sum, add_part(l, s, terms, load(sum), acc[r][v], row + r, segment, x_sum[r * sums_stride]));
            close_sums(part + 1, kVecLanes, sum, total + r * kBlockN + lane);
          });
        } else {
          unroll<kRows>([&](auto r) LOWBIT_INLINE { store_i(carry + r * kBlockN + lane, acc[r][v]); });
        }
      });
      k = last;
    }
  }
}

template <class C, bool kPlain>
inline void gemm_bytes(const Launch& l, int64_t begin, int64_t end) {
  constexpr bool kWide = C::kWide;
  const C codec(l);
  alignas(64) uint8_t panel[kBytePanelWeights / 4 * kDwordBytes];
  alignas(64) int32_t carry[kByteRowsPerTask * kBlockN];
  alignas(64) float y[kByteRowsPerTask * kBlockN], total[kByteRowsPerTask * kBlockN];
  const int64_t row_blocks = ceil_div(l.m, kByteRowsPerTask);
  const Segments s = segments_of(l);
  for (int64_t task = begin; task < end; ++task) {
    ByteSpan span{};
    span.segments = s;
    span.block = task / row_blocks;
    span.first_row = task % row_blocks * kByteRowsPerTask;
    span.first = codec.first;
    span.depth = halves_chunks(s.size, l.k) ? s.count * s.size : num_chunks(l.k) * kChunkK;
    span.size = s.count == 1 ? span.depth : s.size;
    span.carries = span.size > kBytePanelWeights;
    const int64_t panel_weights = span.carries ? kBytePanelWeights : kBytePanelWeights / span.size * span.size;
    const int64_t left = l.m - span.first_row, rows = left < kByteRowsPerTask ? left : kByteRowsPerTask;
    __builtin_memset(y, 0, rows * kBlockN * sizeof(float));
    __builtin_memset(total, 0, rows * kBlockN * sizeof(float));
    for (span.k = 0; span.k < span.depth; span.k = span.k_end) {
      const int64_t segment_end = (span.k / span.size + 1) * span.size;
      span.k_end = span.k + panel_weights < span.depth ? span.k + panel_weights : span.depth;
      if (span.carries && span.k_end > segment_end) span.k_end = segment_end;
      decode_bytes(l, codec, span, panel);
      const auto multiply = [&](auto count, int64_t r) LOWBIT_INLINE {
        multiply_bytes<kWide, kPlain, count>(l, span, panel, span.first_row + r, carry + r * kBlockN, y + r * kBlockN,
                                             total + r * kBlockN);
      };
      int64_t r = 0;
      for (; r + kGemmRows <= rows; r += kGemmRows) multiply(std::integral_constant<int, kGemmRows>{}, r);
      if constexpr (kPlain) {
        for (; r + 2 <= rows; r += 2) multiply(std::integral_constant<int, 2>{}, r);
      }
      for (; r < rows; ++r) multiply(std::integral_constant<int, 1>{}, r);
    }
    for (int64_t r = 0; r < rows; ++r) {
      finish_row(l, span.block, span.first_row + r, 0, kBlockN, total + r * kBlockN, y + r * kBlockN);
    }
  }
}

template <class C>
void gemm_bytes_run(const Launch& l, int64_t begin, int64_t end) {
  if (plain_terms(l)) return gemm_bytes<C, true>(l, begin, end);
  gemm_bytes<C, false>(l, begin, end);
}

template <class C>
constexpr Kernel skinny_i8(const char* name) {
  return {.name = name,
          .op = Op::kLinear,
          .compute = Dtype::kI8,
          .codec = C::kCodec,
          .bits = C::kBits,
          .scope = Scope::kShared,
          .isa = LOWBIT_ISA_BIT,
          .chunk_groups = true,
          .exact_x = {.i8 = true},
          .prepare = prepare_i8<C::kBits>,
          .run = skinny_run<C>,
          .half_groups = C::kHalves};
}
template <class C>
constexpr Kernel gemm_i8(const char* name) {
  Kernel kernel = skinny_i8<C>(name);
  kernel.rows_per_task = kByteRowsPerTask;
  kernel.run = gemm_bytes_run<C>;
  return kernel;
}

constexpr Kernel kInt8Kernels[] = {LOWBIT_FOREACH_BITS(LOWBIT_LUT) LOWBIT_INT(2) LOWBIT_INT(3) LOWBIT_INT(4)
                                       LOWBIT_INT(5) LOWBIT_INT(6) LOWBIT_INT(8)};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
