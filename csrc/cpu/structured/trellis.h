// Encoding with a bitshift trellis: the sequence of codes whose values are nearest to given numbers, by the Viterbi
// algorithm. The definition is in python/lowbit/reference/structured.py.
#pragma once

#include <cstdint>

#include "core/stop.h"

namespace lowbit {

constexpr int kTrellisBits = 16;  // of a state
constexpr int64_t kTrellisStates = int64_t{1} << kTrellisBits;
constexpr int kMaxTrellisStep = 4;  // bits that a state moves on by

// Row by row. The state of number i holds the codes of numbers i, i + 1, ... from its low bits up; behind the last
// number of a row the first one follows again, or what `next` says.
struct TrellisEncode {
  const float* numbers;  // (rows, count), finite
  int64_t rows, count;
  int bits;             // of a code, 1 to kMaxTrellisStep
  const float* values;  // (kTrellisStates): what the states stand for
  // (rows), or null: the low 16 - bits bits of the state after the last number, -1 for any. Without it rows are rings.
  const int32_t* next;
  // (rows), or null: the low 16 - bits bits that the state of the first number must have, -1 for any. Needs `next`.
  const int32_t* first;
  uint8_t* codes;  // (rows, count)
  // Set by encode_trellis: values and their factor to fixed point.
  const uint16_t* fixed;
  float factor;
};

// Fixed point of a number, 4 standard deviations at most.
static inline uint16_t trellis_fixed(float number, float factor) {
  const float scaled = number * factor + 32768.0f;
  return static_cast<uint16_t>(scaled < 0.0f ? 0.0f : scaled > 65535.0f ? 65535.0f : scaled);
}

struct TrellisKernel {
  int64_t (*scratch_bytes)(const TrellisEncode& t);
  void (*encode_row)(const TrellisEncode& t, int64_t row, void* scratch);
};

// `codes` are not to be used if it was stopped.
void encode_trellis(TrellisEncode request, uint32_t isa, int threads, Stop* stop);

}  // namespace lowbit
