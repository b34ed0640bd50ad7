// Blocks of 256 weights of GGUF, IQ1_S to IQ3_S (ggml-common.h, python/lowbit/reference/blocks.py): how the bytes of
// one split. Scales are exact in fp32, and so are their products with levels.
#pragma once

#include <bit>

#include "cpu/structured/structured.h"
#include LOWBIT_VECTORS

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr int kGroups = kBlockWeights / 8;

template <StructuredCodec kCodec>
struct BlockOf {
  static constexpr bool kIq3 = kCodec == StructuredCodec::kIq3Xxs || kCodec == StructuredCodec::kIq3S;
  static constexpr int kBits = kIq3 ? 3 : 2;  // of the number of a level
  static constexpr int kBytes = kCodec == StructuredCodec::kIq1S     ? 50
                                : kCodec == StructuredCodec::kIq1M   ? 56
                                : kCodec == StructuredCodec::kIq2Xxs ? 66
                                : kCodec == StructuredCodec::kIq2Xs  ? 74
                                : kCodec == StructuredCodec::kIq2S   ? 82
                                : kCodec == StructuredCodec::kIq3Xxs ? 98
                                                                     : 110;
};

// Calls `fn` with the codec as an integral_constant.
template <class Fn>
void with_codec(StructuredCodec codec, const Fn& fn) {
  using enum StructuredCodec;
  switch (codec) {
    case kIq1S:
      return fn(std::integral_constant<StructuredCodec, kIq1S>{});
    case kIq1M:
      return fn(std::integral_constant<StructuredCodec, kIq1M>{});
    case kIq2Xxs:
      return fn(std::integral_constant<StructuredCodec, kIq2Xxs>{});
    case kIq2Xs:
      return fn(std::integral_constant<StructuredCodec, kIq2Xs>{});
    case kIq2S:
      return fn(std::integral_constant<StructuredCodec, kIq2S>{});
    case kIq3Xxs:
      return fn(std::integral_constant<StructuredCodec, kIq3Xxs>{});
    default:
      return fn(std::integral_constant<StructuredCodec, kIq3S>{});
  }
}

// By seven signs: those of eight, of which an even number is set.
struct SignBytes {
  uint8_t v[128];
  constexpr SignBytes() : v() {
    for (unsigned i = 0; i < 128; ++i) v[i] = static_cast<uint8_t>(i | (std::popcount(i) % 2) << 7);
  }
};
alignas(64) constexpr SignBytes kSignBytes;

inline uint32_t word_at(const uint8_t* p) { return p[0] | uint32_t{p[1]} << 8; }
inline uint32_t dword_at(const uint8_t* p) {
  uint32_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline uint64_t qword_at(const uint8_t* p) {
  uint64_t v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline float half_of(uint32_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(static_cast<unsigned short>(bits));
#else
  return half_to_float(static_cast<uint16_t>(bits));
#endif
}
// The fp16 number of a block of IQ1_M, a nibble of each of the four words at p.
inline float half_of_nibbles(const uint8_t* p) {
  return half_of(p[1] >> 4 | (p[3] >> 4) << 4 | (p[5] >> 4) << 8 | uint32_t{p[7]} >> 4 << 12);
}

// By eight bits: the highest bits of eight nibbles.
struct HighBits {
  uint32_t v[256];
  constexpr HighBits() : v() {
    for (int i = 0; i < 256; ++i) {
      for (int j = 0; j < 8; ++j) v[i] |= static_cast<uint32_t>(i >> j & 1) << (4 * j + 3);
    }
  }
};
constexpr HighBits kHighBits;

// Of 8 weights each: nibbles, the number of a level and the bit that lies apart. Of 16: the scale.
struct BlockFields {
  uint32_t nibbles[kGroups];
  float scales[kGroups / 2];
};

template <StructuredCodec kCodec>
void read_fields(const uint8_t* p, const uint32_t* grid, BlockFields& f) {
  using enum StructuredCodec;
  const float d = kCodec == kIq1M ? half_of_nibbles(p + 48) : half_of(word_at(p));
  for (int g = 0; g < kGroups; ++g) {
    const int run = g / 4;  // of 32 weights
    uint32_t codes, flips;
    if constexpr (kCodec == kIq2Xxs) {
      codes = grid[p[2 + 8 * run + g % 4]];
      flips = kSignBytes.v[dword_at(p + 6 + 8 * run) >> (7 * (g % 4)) & 127];
    } else if constexpr (kCodec == kIq2Xs) {
      const uint32_t word = word_at(p + 2 + 2 * g);
      codes = grid[word & 511];
      flips = kSignBytes.v[word >> 9];
    } else if constexpr (kCodec == kIq2S) {
      codes = grid[p[2 + g] | (p[66 + run] >> (2 * (g % 4)) & 3) << 8];
      flips = p[34 + g];
    } else if constexpr (kCodec == kIq3Xxs) {
      codes = grid[p[2 + 2 * g]] | grid[p[3 + 2 * g]] << 16;
      flips = kSignBytes.v[dword_at(p + 66 + 4 * run) >> (7 * (g % 4)) & 127];
    } else if constexpr (kCodec == kIq3S) {
      const uint32_t high = p[66 + run] >> (2 * (g % 4));
      codes = grid[p[2 + 2 * g] | (high & 1) << 8] | grid[p[3 + 2 * g] | (high >> 1 & 1) << 8] << 16;
      flips = p[74 + g];
    } else if constexpr (kCodec == kIq1S) {
      const uint32_t word = word_at(p + 34 + 2 * run);
      codes = grid[p[2 + g] | (word >> (3 * (g % 4)) & 7) << 8];
      flips = word & 0x8000 ? 255 : 0;
    } else {
      const uint32_t high = p[32 + g / 2] >> (4 * (g % 2));
      codes = grid[p[g] | (high & 7) << 8];
      flips = high & 8 ? 255 : 0;
    }
    f.nibbles[g] = codes | kHighBits.v[flips];
  }
  for (int s = 0; s < kGroups / 2; ++s) {
    if constexpr (kCodec == kIq2Xxs) {
      f.scales[s] = (static_cast<float>(p[9 + 8 * (s / 2)] >> 4) + 0.5f) * (d * 0.25f);
    } else if constexpr (kCodec == kIq3Xxs) {
      f.scales[s] = (static_cast<float>(p[69 + 4 * (s / 2)] >> 4) + 0.5f) * (d * 0.5f);
    } else if constexpr (kCodec == kIq2Xs || kCodec == kIq2S) {
      const int byte = p[(kCodec == kIq2Xs ? 66 : 74) + s / 2];
      f.scales[s] = (static_cast<float>(byte >> (4 * (s % 2)) & 15) + 0.5f) * (d * 0.25f);
    } else if constexpr (kCodec == kIq3S) {
      f.scales[s] = static_cast<float>(2 * (p[106 + s / 4] >> (4 * (s / 2 % 2)) & 15) + 1) * d;
    } else if constexpr (kCodec == kIq1S) {
      f.scales[s] = static_cast<float>(2 * (p[35 + 2 * (s / 2)] >> 4 & 7) + 1) * d;
    } else {
      f.scales[s] = static_cast<float>(2 * (word_at(p + 48 + 2 * (s / 4)) >> (3 * (s % 4)) & 7) + 1) * d;
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
