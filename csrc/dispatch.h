// The merged kernel table and the choice of a row: detection once, selection a pure function of the request and a mask.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "kernel.h"

namespace lowbit {

// Instruction sets that the CPU and the operating system support, as Isa bits.
uint32_t detect_isa();
// `detected` capped by the value of LOWBIT_ISA ("scalar", "avx2", "avx512", "avx512bf16", "avx512vnni": this one and
// what it builds on). Throws std::invalid_argument for another value; null or "" caps nothing.
uint32_t cap_isa(uint32_t detected, const char* value);
// detect_isa() capped by the environment, computed once.
uint32_t active_isa();
const char* isa_name(Isa isa);

std::span<const Kernel* const> kernels();

// Why a row cannot serve a request on a mask of instruction sets; nullptr if it can.
const char* rejection(const Kernel& kernel, const Desc& desc, uint32_t isa_mask);
// Estimated time in picoseconds per weight.
double cost(const Kernel& kernel, const Desc& desc);
// Of the legal rows of the newest instruction set, the one of least cost; nullptr if there is none.
const Kernel* select(const Desc& desc, uint32_t isa_mask);

// Runs a row on up to `threads` OpenMP threads. `launch.prepared`, `x_sums` are set here.
void run(const Kernel& kernel, Launch launch, int threads);

// out[i] = W[indices[i]] for `count` valid indices. Op, x and the row's name play no part.
void embed(Launch launch, int bits, Scope scope, const int64_t* indices, int64_t count, int threads);

}  // namespace lowbit
