// What the host decides for the CUDA kernels: whether they run, which one, its tile, ring and parts of K.
#pragma once

#include <algorithm>
#include <string>

#include "cuda/heuristics.h"
#include "cuda/memo.h"
#include "cuda/probe.h"
#include "cuda_weight.h"

namespace lowbit::cuda {

// A description is made once, and again only when all are forgotten.
inline void check_memo() {
  struct Key {
    int64_t address, size;
  };
  Memo<Key, int64_t, 4> memo;
  int made = 0;
  const auto find = [&](int64_t address, int64_t size) {
    return memo.find(Key{address, size}, [&] { return ++made, address * 100 + size; });
  };
  for (int round = 0; round < 3; ++round)
    for (const int64_t i : {1, 2, 3}) expect(find(i, i + 1) == i * 100 + i + 1, "what is remembered", i, 0, 0);
  expect(made == 3 && memo.size() == 3, "made once", 0, made, 3);
  expect(find(1, 7) == 107 && find(5, 5) == 505 && memo.size() <= 4, "another key", 0, made, 5);
  expect(find(1, 2) == 102 && made == 6, "forgotten", 0, made, 6);
}

// What the driver says, and what is said of it.
inline void check_probe() {
  const auto has = [](const Facts& f, const char* part) {
    const std::string why = obstacle(f);
    expect(*part ? why.find(part) != std::string::npos : why.empty(), part, f.driver, 0, 0);
  };
  has({}, "no NVIDIA driver");
  has({13000, 13000, 90, 90, true, ""}, "");
  has({12040, 12080, 90, 90, true, ""}, "");
  has({12040, 13000, 89, 0, false, "driver too old"},
      "sm_89 (driver too old): the driver knows CUDA 12.4, the kernels were built with CUDA 13.0");
  has({12040, 13000, 0, 0, false, "driver too old"}, "on the GPU (driver too old)");
  has({13000, 13000, 75, 0, true, "no kernel image"}, "sm_75 (no kernel image)");
  has({11080, 12080, 90, 90, false, ""}, "cuTensorMapEncodeTiled");
  has({11080, 12080, 90, 80, false, ""}, "");  // translated code of sm_80 does without
}

// The ring is as deep as fits beside the blocks that are resident, and the blocks are as many as registers hold.
inline void check_ring() {
  const auto choice = [](int bits, int64_t m, int64_t n, int64_t k, int64_t group, int architecture) {
    return choose(Request{m, n, k, group, bits, 4, 0, architecture, architecture, 132});
  };
  const auto is = [](const Config& c, int tiles_m, int depth, int resident, const SharedLimits& limits) {
    expect(c.family == Family::kMma && c.tiles_m == tiles_m, "tile", tiles_m, c.tiles_m, tiles_m);
    expect(c.depth == depth, "depth of the ring", tiles_m, c.depth, depth);
    expect(resident * (c.shared + 1024) <= limits.sm, "blocks of a multiprocessor", resident, c.shared, limits.sm);
  };
  const SharedLimits large = shared_limits(90), small = shared_limits(89);
  expect(MmaTile<4, 1>::resident(90, true) == 3 && MmaTile<5, 1>::resident(90, false) == 2, "blocks in registers", 0, 0,
         0);
  is(choice(4, 1, 4096, 4096, 128, 90), 1, 8, 1, large);   // one block for each multiprocessor
  is(choice(4, 1, 8192, 8192, 128, 90), 1, 8, 2, large);   // two
  is(choice(4, 1, 14336, 4096, 128, 90), 1, 4, 3, large);  // three and more
  is(choice(4, 1, 28672, 8192, 128, 90), 1, 4, 3, large);
  // 100 KiB: one block with a deep ring, not two with none; and few rows of a wide tile in turns.
  is(choice(4, 1, 8192, 8192, 128, 89), 1, 4, 1, small);
  is(choice(4, 1, 8192, 8192, 128, 120), 1, 6, 1, small);
  is(choice(8, 16, 8192, 8192, 128, 89), 1, 2, 1, small);
  is(choice(1, 8, 8192, 8192, 128, 89), 2, 4, 1, small);
  // The code that runs decides whether a warp of its own fills the ring, not the device.
  const Config old = choose(Request{1, 8192, 8192, 128, 4, 4, 0, 90, 80, 132});
  expect(!old.bulk && old.depth <= 4 && choice(4, 1, 8192, 8192, 128, 90).bulk, "the warp that copies", 0, 0, 0);
}

// What a benchmark may try covers all of K and fits as well, and the choice is among it but for its parts of K.
inline void check_candidates(const Request& r, const Config& chosen, int limit) {
  bool found = chosen.family == Family::kDecode;
  for (const Config& c : candidates(r)) {
    const int64_t unit = c.family == Family::kWgmma ? 1 : for_bits(r.bits, [&]<int kBits>() -> int64_t {
      return c.tiles_m == 1   ? MmaTile<kBits, 1>::kStageTiles
             : c.tiles_m == 2 ? MmaTile<kBits, 2>::kStageTiles
                              : MmaTile<kBits, 4>::kStageTiles;
    });
    const int64_t stages = ceil_div(ceil_div(r.k, kTileK), unit);
    expect(c.splits * c.stages_per_split >= stages && (c.splits - 1) * c.stages_per_split < stages,
           "parts of K of a candidate", r.k, c.splits, static_cast<double>(stages));
    expect(c.shared <= limit && c.family != Family::kDecode, "shared memory of a candidate", r.m, c.shared, limit);
    found = found || (c.family == chosen.family && c.tiles_m == chosen.tiles_m && c.depth == chosen.depth &&
                      c.shared == chosen.shared && c.bulk == chosen.bulk);
  }
  expect(found, "the choice among the candidates", r.m, r.bits, r.architecture);
}

// Every choice covers all of K, fits in shared memory and never leaves a block without work. Below 64 rows the weight
// is never decoded as a whole.
inline void check_heuristics() {
  for (const int architecture : {80, 86, 89, 90, 100, 120})
    for (const int bits : {1, 2, 3, 4, 5, 6, 8})
      for (const int64_t m : {1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 256, 1000, 4096})
        for (const int64_t k : {1, 576, 4096, 28672})
          for (const int64_t n : {1, 576, 8192})
            for (const int64_t group : {int64_t{16}, int64_t{32}, int64_t{128}, k}) {
              const bool large = architecture == 80 || architecture == 90 || architecture == 100;
              const Config c =
                  choose(Request{m, n, k, std::min(group, k), bits, 4, 1, architecture, architecture, 132});
              expect(c.family != Family::kDecode || m >= 64, "a decoded weight", m, bits, architecture);
              const int limit = architecture == 80 ? 163 << 10 : large ? 227 << 10 : 99 << 10;
              expect(c.shared <= limit, "shared memory", m, c.shared, limit);
              expect((c.family == Family::kWgmma) <= (architecture == 90 && m > 16), "wgmma", m, architecture, 90);
              if (c.family == Family::kWgmma)
                expect(c.splits * c.stages_per_split >= ceil_div(k, kTileK) &&
                           (c.splits - 1) * c.stages_per_split < ceil_div(k, kTileK),
                       "parts of K for wgmma", k, c.splits, static_cast<double>(c.stages_per_split));
              const Request request{m, n, k, std::min(group, k), bits, 4, 1, architecture, architecture, 132};
              if (n == 576) check_candidates(request, c, limit);
              if (c.family != Family::kMma) continue;
              const int most = c.bulk ? 8 : 4;
              expect(c.depth >= 2 && c.depth <= most, "depth", m, c.depth, most);
              const int64_t stages = for_bits(bits, [&]<int kBits>() {
                return c.tiles_m == 1   ? ceil_div(ceil_div(k, kTileK), MmaTile<kBits, 1>::kStageTiles)
                       : c.tiles_m == 2 ? ceil_div(ceil_div(k, kTileK), MmaTile<kBits, 2>::kStageTiles)
                                        : ceil_div(ceil_div(k, kTileK), MmaTile<kBits, 4>::kStageTiles);
              });
              expect(c.splits >= 1 && c.splits <= 16 && c.splits * c.stages_per_split >= stages &&
                         (c.splits - 1) * c.stages_per_split < stages,
                     "parts of K", k, c.splits, stages);
            }
}

}  // namespace lowbit::cuda
