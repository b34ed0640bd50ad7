// Rows of a weight by index, dequantized. A row is a few hundred bytes: plain code is fast enough on every CPU.
#pragma once

#include "cpu/offline/pack.h"
#include "cpu/weights/common-inl.h"

namespace lowbit {
namespace LOWBIT_ISA {
namespace {

// out[row begin..end) = W[indices[row]]; `codes` is scratch for l.k codes.
void embed_rows(const Launch& l, int bits, Scope scope, const int64_t* indices, int64_t begin, int64_t end,
                uint8_t* codes) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = indices[row], block = n / kBlockN, lane = n % kBlockN;
    int64_t last = -1;
    float scale = 1, z = 0;
    read_row(l.codes, n, l.k, bits, l.trits, codes);
    for (int64_t k0 = 0; k0 < l.k; k0 += kVecLanes) {
      const int64_t count = l.k - k0 < kVecLanes ? l.k - k0 : kVecLanes;
      alignas(64) float values[kVecLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t group = (k0 + i) / l.group, g = l.table_groups == 1 ? 0 : group;
        const int64_t column = ((block * l.table_groups + g) << bits) * kBlockN + lane;
        int64_t entry = codes[k0 + i];
        if (scope == Scope::kColumn) entry = column + entry * kBlockN;
        if (scope == Scope::kPair) {
          const int64_t term = (block * l.num_groups + group) * kBlockN + lane;
          entry += (static_cast<const uint8_t*>(l.scales)[term] & 1) << bits;
        }
        const float v = l.table[entry];
        if (group != last) {
          const GroupTerms terms = group_terms(l, block, group, static_cast<int>(lane / kVecLanes * kVecLanes));
          scale = terms.scale.v[lane % kVecLanes];
          z = terms.zero.v[lane % kVecLanes];
          last = group;
        }
        values[i] = l.zero == ZeroMode::kAdd ? scale * v + z : scale * (v - z);
      }
      store_as(l.out, l.out_dtype, row * l.out_stride + k0, values, count);
    }
  }
}

}  // namespace
}  // namespace LOWBIT_ISA
}  // namespace lowbit
