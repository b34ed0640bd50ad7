// The instruction sets that kernels are written for: their names stand here alone. No std containers: this header is
// compiled under every instruction set's flags.
#pragma once

#include <cstdint>

// X(enumerator, name, what it builds on). avx2: with fma, f16c. avx512: f, bw, vl, dq, vbmi. amxbf16: with tiles, which
// the system lets a process use that asks.
#define LOWBIT_FOREACH_ISA(X)                                       \
  X(kScalar, "scalar", 0)                                           \
  X(kAvx2, "avx2", kScalar)                                         \
  X(kAvx512, "avx512", kScalar | kAvx2)                             \
  X(kAvx512Bf16, "avx512bf16", kScalar | kAvx2 | kAvx512)           \
  X(kAvx512Vnni, "avx512vnni", kScalar | kAvx2 | kAvx512)           \
  X(kAvx512Vpopcntdq, "avx512vpopcntdq", kScalar | kAvx2 | kAvx512) \
  X(kAmxBf16, "amxbf16", kScalar | kAvx2 | kAvx512 | kAvx512Bf16)

#define LOWBIT_ISA_POSITION(isa, name, below) isa##Position,
#define LOWBIT_ISA_MASK(isa, name, below) isa = 1u << isa##Position,
#define LOWBIT_ISA_ITEM(isa, name, below) isa,

namespace lowbit {

enum IsaPosition { LOWBIT_FOREACH_ISA(LOWBIT_ISA_POSITION) };
enum Isa : uint32_t { LOWBIT_FOREACH_ISA(LOWBIT_ISA_MASK) };

constexpr Isa kIsas[] = {LOWBIT_FOREACH_ISA(LOWBIT_ISA_ITEM)};

// Instruction sets that the CPU and the operating system support, as Isa bits.
uint32_t detect_isa();
// `detected` capped by the value of LOWBIT_ISA, a name: that one and what it builds on. Throws std::invalid_argument
// for another value; null or "" caps nothing.
uint32_t cap_isa(uint32_t detected, const char* value);
// detect_isa() capped by the environment, computed once.
uint32_t active_isa();
const char* isa_name(Isa isa);

}  // namespace lowbit

#undef LOWBIT_ISA_POSITION
#undef LOWBIT_ISA_MASK
#undef LOWBIT_ISA_ITEM
