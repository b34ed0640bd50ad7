// CPU detection: cpuid, and XGETBV because the operating system must save the registers as well.
#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define LOWBIT_ISA_ENTRY(bit, text, others) {.isa = bit, .name = text, .below = others},

namespace lowbit {

#if defined(__x86_64__)
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}
constexpr bool bit(uint32_t word, int i) { return word >> i & 1; }

// Asks the system for the data of tiles, for all threads of the process (Linux 5.16). It refuses where a thread has a
// stack for signals that is too small.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

uint32_t detect_isa() {
  uint32_t mask = kScalar;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  if (!bit(one.c, 27)) return mask;  // OSXSAVE
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool os_ymm = (low & 0x6) == 0x6, os_zmm = (low & 0xE6) == 0xE6;
  const bool fma = bit(one.c, 12), f16c = bit(one.c, 29), avx2 = bit(seven.b, 5);
  if (!os_ymm || !fma || !f16c || !avx2) return mask;
  mask |= kAvx2;
  const bool f = bit(seven.b, 16), dq = bit(seven.b, 17), bw = bit(seven.b, 30), vl = bit(seven.b, 31);
  if (!os_zmm || !f || !dq || !bw || !vl || !bit(seven.c, 1)) return mask;  // ecx bit 1: vbmi
  mask |= kAvx512;
  if (bit(seven_one.a, 5)) mask |= kAvx512Bf16;
  if (bit(seven.c, 11)) mask |= kAvx512Vnni;
  if (bit(seven.c, 14)) mask |= kAvx512Vpopcntdq;
  const bool os_tiles = (low & 0x60000) == 0x60000, tiles = bit(seven.d, 22) && bit(seven.d, 24);  // amx-bf16, amx-tile
  if (os_tiles && tiles && mask & kAvx512Bf16 && tiles_granted()) mask |= kAmxBf16;
  return mask;
}
#else
uint32_t detect_isa() { return kScalar; }
#endif

namespace {

struct Entry {
  Isa isa;
  const char* name;
  uint32_t below;
};
constexpr Entry kEntries[] = {LOWBIT_FOREACH_ISA(LOWBIT_ISA_ENTRY)};

}  // namespace

uint32_t cap_isa(uint32_t detected, const char* value) {
  if (!value || !*value) return detected;
  std::string names;
  for (const Entry& entry : kEntries) {
    if (std::strcmp(entry.name, value) == 0) return detected & (entry.below | entry.isa);
    names += (names.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw std::invalid_argument("LOWBIT_ISA must be one of " + names + ", got '" + value + "'");
}

uint32_t active_isa() {
  static const uint32_t mask = cap_isa(detect_isa(), std::getenv("LOWBIT_ISA"));
  return mask;
}

const char* isa_name(Isa isa) {
  for (const Entry& entry : kEntries) {
    if (entry.isa == isa) return entry.name;
  }
  return "?";
}

}  // namespace lowbit
