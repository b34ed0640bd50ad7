// Which bytes of a stream of 6-bit codes go where: indices of byte shuffles.
#pragma once

#include <cstdint>

namespace lowbit {

// Of 6 bits: a dword of four codes takes the three bytes of all four. A vector's bytes are loaded with some of the
// vector beside it, so that nothing beyond a pair of vectors is read: those of the first of a pair start at byte 0 of
// what is loaded, those of the second at kVecLanes / 4.
template <int kVecLanes>
struct SixBitBytes {
  int8_t at[2][4 * kVecLanes] = {};
  constexpr SixBitBytes() {
    for (int i = 0; i < 8 * kVecLanes; ++i) {
      const int second = i / (4 * kVecLanes), byte = i % 4, four = i % (4 * kVecLanes) / 16;
      at[second][i % (4 * kVecLanes)] = static_cast<int8_t>(byte == 3 ? -1 : second * kVecLanes / 4 + 3 * four + byte);
    }
  }
};

}  // namespace lowbit
