// AdamW with FP8 states (python/lowbit/reference/adamw.py states what it computes). Compiled under every instruction
// set's flags.
#pragma once

#include <cstdint>

#include "core/kernel.h"
#include "cpu/fp8/fp8.h"

namespace lowbit {

constexpr int kStateGroup = 128;

struct Fp8State {
  uint8_t* codes;  // (numel)
  Float8 type;
  float* terms;  // (3, groups): scales, exponents and centers; or (1, groups) without expansion
};

struct Fp8AdamW {
  void* param;  // (numel), updated
  const void* grad;
  Dtype dtype;  // of both
  int64_t numel;
  Fp8State exp_avg, exp_avg_sq;
  bool expand;
  float beta1, rest1, beta2, rest2;  // rest = 1 - beta; rest1 is negative to maximize
  float eps;
  float decay;            // 1 - lr * weight_decay
  float step_size;        // lr / (1 - beta1^step)
  float root_correction;  // 1 / sqrt(1 - beta2^step)
};
// One step on up to `threads` threads, with the newest of the instruction sets `isa` (fp8_adamw-inl.h).
void fp8_adamw(const Fp8AdamW& request, uint32_t isa, int threads);

}  // namespace lowbit
