// Overlapping windows of a bit stream, one a lane, and sums of bytes, for the vectors of the instruction set that a
// unit is compiled for.
#pragma once

#include <cstdint>

#include LOWBIT_VECTORS

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// Windows of 16 bits, each B bits after the one before: the bytes of each lane, and the first bit of the window there.
template <int B, int kLanes>
struct Windows {
  int8_t from[kLanes * 4];
  int32_t by[kLanes];
  constexpr Windows() : from(), by() {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < 4; ++j) from[4 * i + j] = static_cast<int8_t>(j < 3 ? i * B / 8 + j : -1);
      by[i] = i * B % 8;
    }
  }
};
template <int B>
alignas(64) constexpr Windows<B, kVecLanes> kWindows;

// kVecLanes windows from the first bit at p on; reads 16 bytes at most.
template <int B>
inline I load_windows(const uint8_t* p) {
#if defined(__AVX512BW__)
  const I bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  const I words = _mm512_shuffle_epi8(bytes, load_i(kWindows<B>.from));
  return bit_and(_mm512_srlv_epi32(words, load_i(kWindows<B>.by)), set1_i(0xFFFF));
#elif defined(__AVX2__)
  int64_t bytes;
  __builtin_memcpy(&bytes, p, 8);
  const I words = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), load_i(kWindows<B>.from));
  return bit_and(_mm256_srlv_epi32(words, load_i(kWindows<B>.by)), set1_i(0xFFFF));
#else
  uint32_t windows[kVecLanes];
  for (int i = 0; i < kVecLanes; ++i) {
    const uint8_t* at = p + i * B / 8;
    windows[i] = (at[0] | uint32_t{at[1]} << 8 | uint32_t{at[2]} << 16) >> (i * B % 8) & 0xFFFF;
  }
  return load_i(windows);
#endif
}

// The sum of the four bytes of each lane.
inline I sum_bytes(I v) {
#if defined(__AVX512BW__)
  return _mm512_madd_epi16(_mm512_maddubs_epi16(v, _mm512_set1_epi8(1)), _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  return _mm256_madd_epi16(_mm256_maddubs_epi16(v, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
#else
  const I byte = set1_i(255);
  const I low = add_i(bit_and(v, byte), bit_and(shift_right<8>(v), byte));
  return add_i(low, add_i(bit_and(shift_right<16>(v), byte), shift_right<24>(v)));
#endif
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
