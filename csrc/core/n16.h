// The "n16" layout of codes: what every CPU kernel reads. N in the lanes, one sequential stream for a thread.
//
// N is padded to blocks of 64 columns and K to chunks of 32 weights (code 0). The bytes run
//     [n / 64][k / 32][(n % 64) / 16][unit][64 bytes]
// with one unit for each bit of a code. The 64 bytes of a unit are 32 little-endian 16-bit words; word 2 * lane + p
// holds weights of parity p (k = 2 * j + p, j = 0..15) of column lane (0..15). So a dword belongs to one column, and a
// pair (k even, k odd) fills the two words that a bf16 dot product wants.
//
// A word has room for 16 / bits whole codes, least significant first: code j is field j % (16 / bits) of unit
// j / (16 / bits). Bits that this leaves over hold the last codes, so that no bit is wasted:
//     3 and 5 bits: bit 15 of unit i is bit i of code 15.
//     6 bits: bits 12-15 of unit i are the low bits of code 12 + i (i < 4); bits 12-13 and 14-15 of unit 4 + i are the
//     high bits of codes 12 + 2 * i and 13 + 2 * i (i < 2).
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int kBlockN = 64;     // columns of a block
constexpr int kChunkK = 32;     // weights along K of a chunk
constexpr int kHalfChunk = 16;  // the shortest group that products take apart
constexpr int kUnitBytes = 64;  // one vector of 16 columns
constexpr int kUnitLanes = 16;

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t num_blocks(int64_t n) { return ceil_div(n, kBlockN); }
static constexpr int64_t num_chunks(int64_t k) { return ceil_div(k, kChunkK); }
// Whether each half of a chunk is a group.
static constexpr bool halves_chunks(int64_t group, int64_t k) { return group == kHalfChunk && group < k; }
static constexpr int64_t vector_bytes(int bits) { return int64_t{bits} * kUnitBytes; }
static constexpr int64_t chunk_bytes(int bits) { return kBlockN / kUnitLanes * vector_bytes(bits); }
static constexpr int64_t packed_bytes(int64_t n, int64_t k, int bits) {
  return num_blocks(n) * num_chunks(k) * chunk_bytes(bits);
}

// Bits [shift, shift + width) of the 16-bit word of a unit are bits [at, at + width) of a code.
struct Piece {
  int unit, shift, width, at;
};
struct Place {
  int count;
  Piece pieces[5];
};

// Where the bits of code j (0..15) of a word column lie.
static constexpr Place place_of(int bits, int j) {
  const int whole = 16 / bits;
  if (j < whole * bits) return {1, {{j / whole, j % whole * bits, bits, 0}}};
  if (bits == 6) return {2, {{j - 12, 12, 4, 0}, {4 + (j - 12) / 2, 12 + j % 2 * 2, 2, 4}}};
  Place place{bits, {}};
  for (int i = 0; i < bits; ++i) place.pieces[i] = {i, 15, 1, i};
  return place;
}

// The byte of a unit where the word of a column's weights k of that parity starts.
static constexpr int word_byte(int lane, int k) { return (2 * lane + k % 2) * 2; }

}  // namespace lowbit
