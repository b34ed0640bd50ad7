// The "n16" layout of codes: what every CPU kernel reads. N in the lanes, one sequential stream for a thread.
//
// N is padded to blocks of 64 columns and K to chunks of 32 weights (code 0). A code of b bits is split into planes of
// 1, 2, 4 or 8 bits: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2 (low bits first), any other b is one plane. The bytes run
//     [n / 64][k / 32][(n % 64) / 16][plane][unit][64 bytes]
// and a plane of w bits has w units for 16 columns x 32 weights. The 64 bytes of a unit are 32 little-endian 16-bit
// words; word 2 * lane + p holds, for column lane (0..15) and parity p of k, 16 / w fields, least significant first:
//     field j of word (lane, p) of unit u  =  plane bits of weight k = 32 / w * u + 2 * j + p of the chunk.
// So a dword belongs to one column, and a pair (k even, k odd) fills the two words that a bf16 dot product wants.
#pragma once

#include <cstdint>

namespace lowbit {

constexpr int kBlockN = 64;     // columns of a block
constexpr int kChunkK = 32;     // weights along K of a chunk
constexpr int kUnitBytes = 64;  // one vector of 16 columns
constexpr int kUnitLanes = 16;

struct Planes {
  int count;
  int width[2];
};

static constexpr Planes planes_of(int bits) {
  return bits == 3   ? Planes{2, {2, 1}}
         : bits == 5 ? Planes{2, {4, 1}}
         : bits == 6 ? Planes{2, {4, 2}}
                     : Planes{1, {bits, 0}};
}

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t num_blocks(int64_t n) { return ceil_div(n, kBlockN); }
static constexpr int64_t num_chunks(int64_t k) { return ceil_div(k, kChunkK); }
static constexpr int64_t vector_bytes(int bits) { return int64_t{bits} * kUnitBytes; }
static constexpr int64_t chunk_bytes(int bits) { return kBlockN / kUnitLanes * vector_bytes(bits); }
static constexpr int64_t packed_bytes(int64_t n, int64_t k, int bits) {
  return num_blocks(n) * num_chunks(k) * chunk_bytes(bits);
}

// Where the bits of one weight lie inside the bytes of its 16 columns x 32 weights: byte offset of the word within
// the plane, and the position of the field in it.
struct FieldPlace {
  int byte;
  int shift;
};
static constexpr FieldPlace field_place(int width, int lane, int k) {
  const int per_unit = 32 / width;
  const int unit = k / per_unit, j = k % per_unit / 2, parity = k % 2;
  return {unit * kUnitBytes + (2 * lane + parity) * 2, width * j};
}

}  // namespace lowbit
