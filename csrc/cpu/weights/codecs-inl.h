// Codecs of the fp32 products: bits of the n16 layout (core/n16.h) to fp32 lanes. Compiled once per instruction set.
//
// A codec has kBits and value<S>(block, of_group): the fp32 values of weight S (0..31) of a chunk for kVecLanes
// columns. `block` points at the first unit of those columns; `of_group` is what `at` returned for them and the group
// of the weight. Products that need another form of the values have their decoders beside them: bf16-inl.h,
// bf16_int8-inl.h, int8-inl.h, int8_any-inl.h, nibbles-inl.h, columns-inl.h, symmetric-inl.h, xnor-inl.h,
// embedding-inl.h and float8-inl.h.
#pragma once

#include <utility>

#include "core/kernel.h"
#include "core/n16.h"
#include "cpu/simd/inline.h"
#include LOWBIT_VECTORS

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

template <int N, class Fn>
LOWBIT_INLINE inline void unroll(Fn&& fn) {
  [&]<int... S>(std::integer_sequence<int, S...>)
      LOWBIT_INLINE { (fn(std::integral_constant<int, S>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// The code of weight S in the low B bits of each dword. Higher bits are arbitrary.
template <int B, int S>
LOWBIT_INLINE inline I code_of(const uint8_t* block) {
  constexpr Place kPlace = place_of(B, S / 2);
  I code;
  unroll<kPlace.count>([&](auto i) LOWBIT_INLINE {
    constexpr Piece piece = kPlace.pieces[i];
    // The odd weight's word is the upper half of the dword.
    constexpr int kShift = S % 2 * 16 + piece.shift - piece.at;
    I bits = load_i(block + piece.unit * kUnitBytes);
    if constexpr (kShift > 0) bits = shift_right<kShift>(bits);
    if constexpr (i == 0) {
      code = bits;
    } else {
      code = select_bits(set1_i((1 << piece.at) - 1), code, bits);
    }
  });
  return code;
}

// Scales of kI7, of which the lowest bit is the number of a table.
LOWBIT_INLINE inline I pair_scales(const Launch& l, int64_t block, int64_t group, int lane) {
  return load_u8_lanes(static_cast<const uint8_t*>(l.scales) + (block * l.num_groups + group) * kBlockN + lane);
}

// One table for all columns.
template <int B>
struct Lut {
  static constexpr int kBits = B;
  static constexpr Codec kCodec = Codec::kLut;
  static constexpr Scope kScope = Scope::kShared;
  Table<B> table;
  explicit Lut(const Launch& l) : table(l.table) {}
  const float* at(int64_t, int64_t, int) const { return nullptr; }
  template <int S>
  LOWBIT_INLINE F value(const uint8_t* block, const float*) const {
    return table(code_of<B, S>(block));
  }
};

// A table per column, and possibly per group: (n / 64, table_groups, 2^B, 64).
template <int B>
struct ColumnLut {
  static constexpr int kBits = B;
  static constexpr Codec kCodec = Codec::kLut;
  static constexpr Scope kScope = Scope::kColumn;
  const Launch& l;
  explicit ColumnLut(const Launch& launch) : l(launch) {}
  const float* at(int64_t block, int64_t group, int lane) const {
    const int64_t g = l.table_groups == 1 ? 0 : group;
    return l.table + ((block * l.table_groups + g) << B) * kBlockN + lane;
  }
  template <int S>
  LOWBIT_INLINE F value(const uint8_t* block, const float* columns) const {
    return gather_column(columns, bit_and(code_of<B, S>(block), set1_i((1 << B) - 1)), kBlockN);
  }
};

// A pair of tables, of which every column and group has one.
template <int B>
struct PairLut {
  static constexpr int kBits = B;
  static constexpr Codec kCodec = Codec::kLut;
  static constexpr Scope kScope = Scope::kPair;
  const Launch& l;
  Table<B + 1> table;
  explicit PairLut(const Launch& launch) : l(launch), table(launch.table) {}
  LOWBIT_INLINE I at(int64_t block, int64_t group, int lane) const {
    return shift_left<B>(pair_scales(l, block, group, lane));
  }
  template <int S>
  LOWBIT_INLINE F value(const uint8_t* block, I chosen) const {
    return table(select_bits(set1_i((1 << B) - 1), code_of<B, S>(block), chosen));
  }
};

// 8-bit integers by arithmetic: code + table[0].
struct Int8 {
  static constexpr int kBits = 8;
  static constexpr Codec kCodec = Codec::kInt;
  static constexpr Scope kScope = Scope::kShared;
  F first;
  explicit Int8(const Launch& l) : first(set1(l.table[0])) {}
  const float* at(int64_t, int64_t, int) const { return nullptr; }
  template <int S>
  LOWBIT_INLINE F value(const uint8_t* block, const float*) const {
    return add(to_float(bit_and(code_of<8, S>(block), set1_i(255))), first);
  }
};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
