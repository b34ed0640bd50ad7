// Between canonical codes (python/lowbit/packing.py: rows of a little-endian bit stream, or of bytes of digits)
// and plain codes or the n16 layout (core/n16.h; of base 3 core/trits.h). Sizes are checked by the caller.
#pragma once

#include <cstdint>

#include "core/trits.h"

namespace lowbit {

struct CanonicalCodes {
  int64_t n, k, row_bytes;
  int bits;
  int base;  // of the digits, or 0: a bit stream

  bool trits() const { return base == kTritBase && bits == kTritBits; }
  int64_t n16_bytes() const { return num_blocks(n) * block_bytes(k, bits, trits()); }
};

// The digits of a base that fit a byte.
int digits_per_byte(int base);

// codes (n, k), one per byte.
void pack_rows(const uint8_t* codes, const CanonicalCodes& shape, uint8_t* packed, int threads);
void unpack_rows(const uint8_t* packed, const CanonicalCodes& shape, uint8_t* codes, int threads);

void prepack(const uint8_t* packed, const CanonicalCodes& shape, uint8_t* n16, int threads);
void unprepack(const uint8_t* n16, const CanonicalCodes& shape, uint8_t* packed, int threads);

// The codes of one row of an n16 weight, k of them.
void read_row(const uint8_t* n16, int64_t n, int64_t k, int bits, bool trits, uint8_t* codes);

}  // namespace lowbit
