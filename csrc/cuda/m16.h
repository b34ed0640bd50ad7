// The "m16" layout of codes, which every CUDA kernel reads, and the tables that decode it. Index maths only, for the
// host and the device: the C++ test walks through it thread by thread without a GPU.
//
// N is padded to tiles of 16 rows and K to tiles of 64 weights (code 0). Tiles run [n / 16][k / 64]. A tile holds, for
// each lane of a warp, the A operands of four m16n8k16 products in the order of their registers, so a lane reads its
// own bytes and nothing else. Code i (0..31) of lane l is that of
//     row 16 * tile + l / 4 + 8 * (i / 2 % 2),    k = 64 * tile + 16 * (i / 8) + 2 * (l % 4) + 8 * (i / 4 % 2) + i % 2
// and is bits [i * b, (i + 1) * b) of the lane's b words of 32 bits. Words lie [w / g][lane][w % g], where g is 4, 2 or
// 1, the largest that divides b: a vector of g words at once, without bank conflicts.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOWBIT_HD __host__ __device__ __forceinline__
#else
#define LOWBIT_HD inline
#endif

namespace lowbit::cuda {

constexpr int kTileN = 16;
constexpr int kTileK = 64;
constexpr int kStepK = 16;  // of one product
constexpr int kSteps = kTileK / kStepK;
constexpr int kLanes = 32;
constexpr int kLaneCodes = kTileN * kTileK / kLanes;

LOWBIT_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LOWBIT_HD constexpr int tile_bytes(int bits) { return kTileN * kTileK * bits / 8; }
LOWBIT_HD constexpr int word_group(int bits) { return bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1; }
// The word of a tile that is word w of a lane.
LOWBIT_HD constexpr int word_at(int bits, int lane, int w) {
  const int g = word_group(bits);
  return (w / g * kLanes + lane) * g + w % g;
}
// The row and the weight within a tile of code i of a lane.
LOWBIT_HD constexpr int code_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
LOWBIT_HD constexpr int code_k(int lane, int i) { return 16 * (i / 8) + 2 * (lane % 4) + 8 * (i / 4 % 2) + i % 2; }
// Inverse of both.
LOWBIT_HD constexpr int lane_of(int row, int k) { return row % 8 * 4 + k / 2 % 4; }
LOWBIT_HD constexpr int code_of(int row, int k) { return k / 16 * 8 + k / 8 % 2 * 4 + row / 8 * 2 + k % 2; }

// Code (row, k) of a packed weight.
LOWBIT_HD uint32_t code_at(const uint32_t* codes, int bits, int64_t row, int64_t k, int64_t tiles_k) {
  const uint32_t* tile = codes + (row / kTileN * tiles_k + k / kTileK) * (tile_bytes(bits) / 4);
  const int r = static_cast<int>(row % kTileN), c = static_cast<int>(k % kTileK);
  const int lane = lane_of(r, c), bit = code_of(r, c) * bits, w = bit / 32;
  uint32_t v = tile[word_at(bits, lane, w)] >> bit % 32;
  if (bit % 32 + bits > 32) v |= tile[word_at(bits, lane, w + 1)] << (32 - bit % 32);
  return v & ((1u << bits) - 1);
}

// Codes are looked up several at a time: a field of one, two, four or eight codes is the index of an entry with their
// values side by side, 16 bits each. An entry fills a row of 128 bytes with copies, one for each lane of those that one
// access serves, so that lanes never meet in a bank: 32 copies of two values, 16 of four, 8 of eight. A single value
// stands in a word of its own.
constexpr int kEntryPitch = 128;

LOWBIT_HD constexpr int field_codes(int bits) { return bits == 1 ? 8 : bits == 2 ? 4 : bits <= 4 ? 2 : 1; }
LOWBIT_HD constexpr int field_bits(int bits) { return field_codes(bits) * bits; }
LOWBIT_HD constexpr int entry_bytes(int bits) { return field_codes(bits) == 1 ? 4 : 2 * field_codes(bits); }
LOWBIT_HD constexpr int table_bytes(int bits) { return kEntryPitch << field_bits(bits); }
// Where a lane finds its copy within a row of an entry.
LOWBIT_HD constexpr int copy_offset(int bits, int lane) { return lane * entry_bytes(bits) % kEntryPitch; }
// The code whose value the 16 bits at a byte (even) of an entry's row hold.
LOWBIT_HD constexpr int entry_code(int bits, int entry, int byte) {
  const int c = field_codes(bits) == 1 ? 0 : byte % entry_bytes(bits) / 2;
  return entry >> (c * bits) & ((1 << bits) - 1);
}
// Field f of a lane's words, bits [f * kWidth, (f + 1) * kWidth), times 2^kShift.
template <int kWidth, int kShift, int kBits>
LOWBIT_HD uint32_t shifted_field(const uint32_t (&words)[kBits], int f) {
  const int word = f * kWidth / 32, bit = f * kWidth % 32;
#ifdef __CUDA_ARCH__
  if constexpr (kWidth == 8) return __byte_perm(words[word], 0, 0x4440 + bit / 8) << kShift;
#endif
  uint32_t v;
  if (bit + kWidth > 32) {
#ifdef __CUDA_ARCH__
    v = __funnelshift_r(words[word], words[word + 1], bit - kShift);
#else
    v = static_cast<uint32_t>((uint64_t{words[word + 1]} << 32 | words[word]) >> (bit - kShift));
#endif
  } else {
    v = bit >= kShift ? words[word] >> (bit - kShift) : words[word] << (kShift - bit);
  }
  return v & (((1u << kWidth) - 1) << kShift);
}
// Bytes from the start of the table to the entry of field f.
template <int kBits>
LOWBIT_HD uint32_t entry_offset(const uint32_t (&words)[kBits], int f) {
  constexpr int kShift = 7;
  static_assert(1 << kShift == kEntryPitch);
  return shifted_field<field_bits(kBits), kShift>(words, f);
}

// Scales and zeros lie [n / 16][group][16].
LOWBIT_HD constexpr int64_t scale_at(int64_t tile_n, int64_t group, int64_t num_groups) {
  return (tile_n * num_groups + group) * kTileN;
}

// A group ends after step s (0..3) of a tile: bit s. Groups are multiples of 64, or divide it, or are the whole row.
LOWBIT_HD constexpr bool group_fits(int64_t group, int64_t k) {
  return group >= k || group % kTileK == 0 || (kTileK % group == 0 && group % kStepK == 0);
}
LOWBIT_HD constexpr uint32_t group_ends(int64_t group, int64_t k) {
  if (group >= k) return 0;
  return group % kTileK == 0 ? 0b1000 : group == 32 ? 0b1010 : 0b1111;
}
// Groups that meet in a tile.
LOWBIT_HD constexpr int groups_per_tile(int64_t group, int64_t k) {
  return group >= k ? 0 : group >= kTileK ? 1 : static_cast<int>(kTileK / group);
}

// Tiles that a group covers, 1 where several groups meet in a tile.
LOWBIT_HD constexpr int tiles_per_group(int64_t group) { return group > kTileK ? static_cast<int>(group / kTileK) : 1; }

// A row of a swizzled x tile is 128 bytes; its 16-byte pieces are permuted by the row (the 128-byte swizzle of the
// tensor memory accelerator, which wgmma undoes).
LOWBIT_HD constexpr uint32_t swizzle128(uint32_t byte) { return byte ^ ((byte >> 7 & 7) << 4); }

}  // namespace lowbit::cuda
