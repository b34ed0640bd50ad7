// Codes of three values in n16 layout, of 2 bits as kernels read them: 13 units hold the 16 of a span of 256 weights
// along K and 16 columns, 1.625 bits a weight. The bytes run
//     [n / 64][k / 256][(n % 64) / 16][unit][64 bytes]
// and chunks after the last whole span lie as those of 2 bits.
//
// A byte of 2 bits has four codes, its fields. Number the units of a span by chunk, then as in a chunk. Here unit
// 4 * i + t (i < 3, t < 4) has in each byte the fields of that byte of unit 5 * i + t, and field t of unit 5 * i + 4;
// unit 12 is unit 15 itself. With fields f0 .. f3 and the fifth code e, a byte is
//     85 * e + 27 * ((3 - f1) % 3) + 9 * f0 + 3 * f3 + f2.
// Of these weights and their doubles the bits are codes where they are wanted: 85 has a 1 in each field, 170 a 2; 54
// and 27 have a 1 and a 2 in field 1, 9 and 18 in field 0. So a byte minus its remainder is a code in its place, and
// no digit is multiplied.
#pragma once

#include "core/n16.h"

namespace lowbit {

constexpr int kTritBits = 2;  // of a code as kernels read it
constexpr int kTritBase = 3;
constexpr int kTritUnits = 13;
constexpr int kTritChunks = 8;  // of a span

// Bytes of a block of 64 columns in n16 layout, as trits or as bits.
static constexpr int64_t block_bytes(int64_t k, int bits, bool trits) {
  const int64_t spans = trits ? num_chunks(k) / kTritChunks : 0;
  return spans * chunk_bytes(kTritUnits) + packed_bytes(kBlockN, k - spans * kTritChunks * kChunkK, bits);
}

namespace trits {

// v below 3 * weight.
static constexpr uint8_t remainder(uint8_t v, int weight) {
  for (int i = 0; i < kTritBase - 1; ++i) {
    // Below `weight` the difference wraps around and is larger.
    const uint8_t less = static_cast<uint8_t>(v - weight);
    v = less < v ? less : v;
  }
  return v;
}
// Its bits 2 * t and 2 * t + 1 are the fifth code, for each t.
static constexpr uint8_t fifths_of(uint8_t v) { return static_cast<uint8_t>(v - remainder(v, 85)); }
static constexpr uint8_t fields_of(uint8_t v) {
  const uint8_t r = remainder(v, 85), s = remainder(r, 27), t = remainder(s, 9);
  const int8_t last = static_cast<int8_t>(t);
  const int f3 = (last > 2) + (last > 5);
  return static_cast<uint8_t>(((r - s) & 0x0C) | ((s - t) & 0x03) | (last + f3) << 4);
}
// Fields and a fifth code, all below 3.
static constexpr uint8_t byte_of(uint8_t fields, int fifth) {
  const int f[] = {fields & 3, fields >> 2 & 3, fields >> 4 & 3, fields >> 6};
  return static_cast<uint8_t>(85 * fifth + 27 * ((3 - f[1]) % 3) + 9 * f[0] + 3 * f[3] + f[2]);
}

// Where unit `unit` of a span lies if it has 2 bits, chunks `stride` bytes apart.
static constexpr int64_t word_unit(int unit, int64_t stride) {
  return unit / kTritBits * stride + unit % kTritBits * kUnitBytes;
}

// The fields of bytes, and their fifth codes in the bits of `field`, 0 in others.
template <int kCount>
static inline void expand_unit(const uint8_t* __restrict in, uint8_t field, uint8_t* __restrict out,
                               uint8_t* __restrict fifths) {
  for (int b = 0; b < kCount; ++b) {
    out[b] = fields_of(in[b]);
    fifths[b] = static_cast<uint8_t>(fifths[b] | (fifths_of(in[b]) & field));
  }
}

// The units of a span as they are with 2 bits, kCount bytes of each: all, or those of one column.
template <int kCount>
static inline void expand_span(const uint8_t* trits, uint8_t* words, int64_t stride) {
  for (int i = 0; i < 3; ++i) {
    uint8_t* fifths = words + word_unit(5 * i + 4, stride);
    __builtin_memset(fifths, 0, kCount);
    for (int t = 0; t < 4; ++t) {
      expand_unit<kCount>(trits + (4 * i + t) * kUnitBytes, static_cast<uint8_t>(3 << 2 * t),
                          words + word_unit(5 * i + t, stride), fifths);
    }
  }
  __builtin_memcpy(words + word_unit(15, stride), trits + (kTritUnits - 1) * kUnitBytes, kCount);
}

// Inverse of `expand_span` for all bytes.
static inline void pack_span(const uint8_t* words, int64_t stride, uint8_t* to) {
  for (int i = 0; i < 3; ++i) {
    const uint8_t* last = words + word_unit(5 * i + 4, stride);
    for (int t = 0; t < 4; ++t) {
      const uint8_t* in = words + word_unit(5 * i + t, stride);
      uint8_t* out = to + (4 * i + t) * kUnitBytes;
      for (int b = 0; b < kUnitBytes; ++b) out[b] = byte_of(in[b], last[b] >> 2 * t & 3);
    }
  }
  __builtin_memcpy(to + (kTritUnits - 1) * kUnitBytes, words + word_unit(15, stride), kUnitBytes);
}

}  // namespace trits
}  // namespace lowbit
