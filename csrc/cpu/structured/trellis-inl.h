// The Viterbi algorithm for a bitshift trellis. It goes from the last number of a row to the first: the state
// s = (s' << bits | code) mod 2^16 comes before s', so that the 2^bits states that differ in their low bits alone
// (a group, s >> bits) all come before the same 2^bits states s' (which end in the number of the group). The best of
// these is found once for a group.
//
// Distances and sums of them are 15 bits of fixed point that saturate; the least sum is subtracted in every step. The
// loops over states are plain and vectorised by the compiler.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/structured/trellis.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

constexpr uint16_t kFar = 0x7FFF;  // the largest sum: what is as far is never chosen while there is another
constexpr int64_t kKept = 512;     // steps whose choices are kept
// Numbers that decide about those behind them before they are encoded themselves: 16 / bits steps forget a state, and
// the best paths from nearly all states have met long before.
constexpr int64_t kMargin = 64;
constexpr int64_t kSeam = 32;  // numbers on either side of the seam of a ring that decide about the seam

struct Paths {
  uint16_t sums[kTrellisStates];       // of the best path from each state to the end of the row
  uint16_t least[kTrellisStates / 2];  // by group: of the states behind it
  uint8_t choices[];                   // (kKept, groups): which of these has the least sum
};
constexpr int64_t kPart = 2048;  // states that are brought up to date at a time

inline int64_t trellis_groups(int bits) { return kTrellisStates >> bits; }

int64_t trellis_scratch_bytes(const TrellisEncode& t) {
  return static_cast<int64_t>(sizeof(Paths)) + kKept * trellis_groups(t.bits);
}

// least[g] and choices[g]: which of the 2^B states behind group g has the least sum.
template <int B>
void choose(const uint16_t* sums, uint16_t* least, uint8_t* choices) {
  constexpr int64_t kGroups = kTrellisStates >> B;
  for (int64_t g = 0; g < kGroups; ++g) {
    uint16_t low = sums[g], which = 0;
    for (int j = 1; j < (1 << B); ++j) {
      const uint16_t sum = sums[j * kGroups + g];
      which = sum < low ? static_cast<uint16_t>(j) : which;
      low = sum < low ? sum : low;
    }
    least[g] = low;
    choices[g] = static_cast<uint8_t>(which);
  }
}

inline uint16_t least_of(const uint16_t* v, int64_t count) {
  uint16_t low = kFar;
  for (int64_t i = 0; i < count; ++i) low = std::min(v[i], low);
  return low;
}

// best[s] = least[s >> B] - offset, for kPart states.
template <int B>
void expand(const uint16_t* least, uint16_t offset, uint16_t* best) {
  using Copies = std::conditional_t<B == 1, uint32_t, uint64_t>;
  constexpr int kCopies = B == 1 ? 2 : 4;
  alignas(64) Copies each[kPart >> B];
  for (int64_t g = 0; g < (kPart >> B); ++g) {
    Copies copies = static_cast<uint16_t>(least[g] - offset);
    copies |= copies << 16;
    if constexpr (B > 1) copies |= copies << 32;
    each[g] = copies;
  }
  constexpr int kEach = (1 << B) / kCopies;
  for (int64_t g = 0; g < (kPart >> B); ++g) {
    for (int c = 0; c < kEach; ++c) __builtin_memcpy(best + (g * kEach + c) * kCopies, each + g, sizeof *each);
  }
}

// sums[s] = best[s] + the distance of the value of s from x, for kPart states. Fewer bits have larger distances, in
// coarser units.
template <int B>
void extend(const uint16_t* best, const uint16_t* fixed, uint16_t x, uint16_t* sums) {
  constexpr int kFiner = B <= 2 ? 1 : 2;
  constexpr uint16_t kLargest = 0xFFFF >> kFiner;
  for (int64_t s = 0; s < kPart; ++s) {
    const uint16_t v = fixed[s];
    uint16_t d = static_cast<uint16_t>(std::max(v, x) - std::min(v, x));
    d = static_cast<uint16_t>(std::min(d, kLargest) << kFiner);
    const uint16_t square = static_cast<uint16_t>(static_cast<uint32_t>(d) * d >> 16);
    sums[s] = std::min(static_cast<uint16_t>(best[s] + (square >> 1)), kFar);
  }
}

// The codes of numbers x(0) .. x(count - 1) by the best path whose last state is of group `next` and whose first state
// ends in `first`, any where -1: piece by piece from the end, each begun anew where the one before was fixed.
template <int B, class X>
void encode_path(const TrellisEncode& t, const X& x, int64_t count, int64_t next, int64_t first, Paths& p,
                 uint8_t* codes) {
  constexpr int64_t kGroups = kTrellisStates >> B;
  constexpr int kShift = kTrellisBits - B;
  for (int64_t end = count; end > 0;) {
    const int64_t begin = end > kKept ? end - kKept : 0;
    std::fill(p.least, p.least + kGroups, next < 0 ? uint16_t{0} : kFar);
    if (next >= 0) p.least[next] = 0;
    for (int64_t i = end - 1; i >= begin; --i) {
      if (i + 1 < end) choose<B>(p.sums, p.least, p.choices + (i - begin) * kGroups);
      const uint16_t offset = least_of(p.least, kGroups), number = trellis_fixed(x(i), t.factor);
      for (int64_t s = 0; s < kTrellisStates; s += kPart) {
        alignas(64) uint16_t best[kPart];
        expand<B>(p.least + (s >> B), offset, best);
        extend<B>(best, t.fixed + s, number, p.sums + s);
      }
    }
    int64_t state = std::min_element(p.sums, p.sums + kTrellisStates) - p.sums;
    if (begin == 0 && first >= 0) {
      state = first;
      for (int64_t s = first; s < kTrellisStates; s += kGroups) state = p.sums[s] < p.sums[state] ? s : state;
    }
    const int64_t fixed_end = end;
    end = begin == 0 ? 0 : begin + kMargin;
    for (int64_t i = begin; i < fixed_end; ++i) {
      if (i == end) next = state & (kGroups - 1);
      if (i >= end) codes[i] = static_cast<uint8_t>(state & ((1 << B) - 1));
      const int64_t group = state >> B;
      const int64_t choice = i + 1 < fixed_end ? p.choices[(i - begin) * kGroups + group] : 0;
      state = group | choice << kShift;
    }
  }
}

// All sequences of a ring of at most 16 bits.
void encode_short_ring(const TrellisEncode& t, const float* x, uint8_t* codes) {
  const int64_t length = t.count * t.bits;
  double least = 0;
  int64_t found = -1;
  for (int64_t ring = 0; ring < (int64_t{1} << length); ++ring) {
    double sum = 0;
    for (int64_t i = 0; i < t.count; ++i) {
      int64_t state = 0;
      for (int b = 0; b < kTrellisBits; ++b) state |= (ring >> (i * t.bits + b) % length & 1) << b;
      const double rest = double{x[i]} - double{t.values[state]};
      sum += rest * rest;
    }
    if (found < 0 || sum < least) {
      least = sum;
      found = ring;
    }
  }
  for (int64_t i = 0; i < t.count; ++i) {
    codes[i] = static_cast<uint8_t>(found >> (i * t.bits) & ((1 << t.bits) - 1));
  }
}

template <int B>
void encode_trellis_row(const TrellisEncode& t, int64_t row, Paths& p) {
  const float* x = t.numbers + row * t.count;
  uint8_t* codes = t.codes + row * t.count;
  const auto number = [&](int64_t i) { return x[i]; };
  if (t.next) {
    encode_path<B>(t, number, t.count, t.next[row], t.first ? t.first[row] : -1, p, codes);
    return;
  }
  if (t.count * B <= kTrellisBits) {
    encode_short_ring(t, x, codes);
    return;
  }
  // The numbers around the seam say what it should be: the codes of the first ones.
  const int64_t side = std::min(kSeam, t.count / 2), start = t.count - side;
  uint8_t around[2 * kSeam + 1];
  encode_path<B>(t, [&](int64_t i) { return x[(start + i) % t.count]; }, 2 * side, -1, -1, p, around);
  int64_t seam = 0;
  for (int64_t bit = 0, i = side; bit < kTrellisBits - B; bit += B, ++i) seam |= int64_t{around[i % (2 * side)]} << bit;
  seam &= trellis_groups(B) - 1;
  encode_path<B>(t, number, t.count, seam, seam, p, codes);
}

void encode_row_of_trellis(const TrellisEncode& t, int64_t row, void* scratch) {
  Paths& p = *static_cast<Paths*>(scratch);
  switch (t.bits) {
    case 1:
      return encode_trellis_row<1>(t, row, p);
    case 2:
      return encode_trellis_row<2>(t, row, p);
    case 3:
      return encode_trellis_row<3>(t, row, p);
    default:
      return encode_trellis_row<4>(t, row, p);
  }
}

constexpr TrellisKernel kTrellisKernel{.scratch_bytes = trellis_scratch_bytes, .encode_row = encode_row_of_trellis};

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
