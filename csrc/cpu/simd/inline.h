// How the functions of a kernel are inlined. Compiled under every instruction set's flags.
#pragma once

// Also into functions that are too large by the compiler's own measure, and from lambdas.
#define LOWBIT_INLINE __attribute__((always_inline))
