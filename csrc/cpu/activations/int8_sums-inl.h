// The sums of products that the few rows of a tile keep in registers, of int8 activations.
#pragma once

#include "cpu/activations/quantize-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kDwordsPerChunk = kChunkK / 4;

LOWBIT_INLINE inline I broadcast4(const int8_t* x) {
  int32_t bytes;
  __builtin_memcpy(&bytes, x, 4);
  return set1_i(bytes);
}

// The sums of a tile. What handles them numbers them in a pack, as in cpu/weights/gemv-inl.h.
template <class C, int kRows, int kVecs>
struct TileInts {
  static_assert(kVecs * kVecLanes % kUnitLanes == 0);
  static constexpr std::make_integer_sequence<int, kRows * kVecs> kAll{};
  static constexpr std::make_integer_sequence<int, kRows> kEachRow{};
  static constexpr std::make_integer_sequence<int, kVecs> kEachVec{};

  I of[kRows][kVecs];

  template <int... J>
  LOWBIT_INLINE void clear(std::integer_sequence<int, J...>) {
    ((of[J / kVecs][J % kVecs] = set1_i(0)), ...);
  }
  template <int... J>
  LOWBIT_INLINE void copy_from(std::integer_sequence<int, J...>, const I (&sums)[kRows][kVecs]) {
    ((of[J / kVecs][J % kVecs] = sums[J / kVecs][J % kVecs]), ...);
  }
  template <int... J>
  LOWBIT_INLINE void copy_to(std::integer_sequence<int, J...>, I (&to)[kRows][kVecs]) const {
    ((to[J / kVecs][J % kVecs] = of[J / kVecs][J % kVecs]), ...);
  }
  template <int kRow, int... V>
  LOWBIT_INLINE void add_row(std::integer_sequence<int, V...>, const I (&w)[kVecs], I xs) {
    ((of[kRow][V] = dot4<C::kWide>(of[kRow][V], w[V], xs)), ...);
  }
  template <int... R>
  LOWBIT_INLINE void add_rows(std::integer_sequence<int, R...>, const I (&w)[kVecs], const int8_t* const (&x)[kRows],
                              int64_t k) {
    (add_row<R>(kEachVec, w, broadcast4(x[R] + k)), ...);
  }
  // The products of dword kDword of a chunk, whose first x is at k; `codes` are those of the first column.
  template <int kDword, int... V>
  LOWBIT_INLINE void add_dword(std::integer_sequence<int, V...>, const C& codec, const uint8_t* codes,
                               const int8_t* const (&x)[kRows], int64_t k) {
    const I w[kVecs] = {codec.template bytes<kDword>(codes + V * kVecLanes / kUnitLanes * vector_bytes(C::kBits) +
                                                     V * kVecLanes % kUnitLanes * 4)...};
    add_rows(kEachRow, w, x, k + 4 * kDword);
  }
};

// Adds the products of the chunks [chunk, end) to `sums`. Where the halves of a chunk are segments, `of_half` gets the
// first one's and `sums` that of the second. D numbers the dwords of half a chunk.
template <class C, int kRows, int kVecs, bool kHalves, int... D>
LOWBIT_INLINE inline void sum_chunks(std::integer_sequence<int, D...>, const C& codec, const uint8_t* codes, int lane0,
                                     const int8_t* const (&x)[kRows], int64_t chunk, int64_t end, bool halves,
                                     bool fetches, I (&sums)[kRows][kVecs], I (&of_half)[kRows][kVecs]) {
  using Sums = TileInts<C, kRows, kVecs>;
  constexpr int kBits = C::kBits, kHalf = sizeof...(D);
  Sums acc;
  acc.copy_from(Sums::kAll, sums);
  for (; chunk < end; ++chunk) {
    const uint8_t* base = codes + chunk * chunk_bytes(kBits);
    const uint8_t* columns = base + lane0 / kUnitLanes * vector_bytes(kBits);
    if (fetches) prefetch_chunk<kBits>(base);
    (acc.template add_dword<D>(Sums::kEachVec, codec, columns, x, chunk * kChunkK), ...);
    if constexpr (kHalves) {
      if (halves) {
        acc.copy_to(Sums::kAll, of_half);
        acc.clear(Sums::kAll);
      }
    }
    (acc.template add_dword<kHalf + D>(Sums::kEachVec, codec, columns, x, chunk * kChunkK), ...);
  }
  acc.copy_to(Sums::kAll, sums);
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
