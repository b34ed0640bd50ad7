// Which kernel computes a product, and its tile: plain arithmetic on the host, tested without a GPU.
#pragma once

#include <vector>

#include "launch.h"
#include "tile.h"

namespace lowbit::cuda {

// What the choice depends on.
struct Request {
  int64_t m, n, k, group;
  int bits;
  int scale_bytes, zero_bytes;  // of one scale and one integer zero, 0 without
  int architecture;             // 10 * major + minor of the compute capability
  int code;                     // that which the mma kernels that run were compiled for: their code depends on it
  int sms;
};

// From here on a decoded copy and the product of torch: 2 NK / M bytes a row of x are less than what decoding again for
// every block of rows costs (on an H100: about even at 512 x 4096 x 4096 and at 700 x 8192 x 8192).
constexpr int64_t kDecodeRows = 640;
constexpr int64_t kDecodeRowsWithoutWgmma = 256;
// Parts of K that are worth blocks of their own and a pass over their sums.
constexpr int64_t kLeastStages = 4;
constexpr int64_t kLeastWgmmaTiles = 8;

// Shared memory of a multiprocessor, and what a block may have of it.
struct SharedLimits {
  int sm, block;
};
constexpr SharedLimits shared_limits(int architecture) {
  if (architecture == 80 || architecture == 87) return {164 << 10, 163 << 10};
  if (architecture == 90 || architecture / 10 == 10) return {228 << 10, 227 << 10};
  return {100 << 10, 99 << 10};
}

// A ring of stages, and the blocks of a multiprocessor that are resident at once with it.
struct RingDepth {
  int depth, resident;
};
// As many blocks as there are and registers hold, then as deep as fits: a stage that is read and two on their way at
// least, or else fewer blocks. The system takes 1 KiB of shared memory for each. Two stages are better than none; depth
// 0 if they do not fit either.
template <class Shared>
RingDepth choose_ring(int64_t wanted, int most_resident, int most_depth, const SharedLimits& limits,
                      const Shared& shared) {
  const auto deepest = [&](int resident) {
    int depth = most_depth;
    while (depth > 1 && (shared(depth) > limits.block || resident * (shared(depth) + 1024) > limits.sm)) --depth;
    return depth;
  };
  for (int resident = static_cast<int>(wanted < most_resident ? wanted : most_resident); resident > 0; --resident)
    if (const int depth = deepest(resident); depth > 2 || (resident == 1 && depth == 2)) return {depth, resident};
  return {0, 0};
}

template <int kBits, int kTilesM>
Config mma_config(const Request& r) {
  using Tile = MmaTile<kBits, kTilesM>;
  const SharedLimits limits = shared_limits(r.architecture);
  const int groups = stage_groups<Tile>(groups_per_tile(r.group, r.k), tiles_per_group(r.group));
  const int x_rows = static_cast<int>(r.m < Tile::kCols ? r.m : Tile::kCols);
  const StageBytes stage = stage_bytes<Tile>(x_rows, groups, r.scale_bytes, r.zero_bytes);
  const auto shared_of = [&](int depth) { return shared_bytes<Tile>(depth, stage); };
  const int64_t blocks = ceil_div(r.n, Tile::kRows) * ceil_div(r.m, Tile::kCols);
  const bool bulk = Tile::bulk(r.code);
  const RingDepth ring = choose_ring(ceil_div(blocks, r.sms), Tile::resident(r.code, groups_per_tile(r.group, r.k) > 1),
                                     bulk ? Tile::kMostStages : Tile::kMostAsyncStages, limits, shared_of);
  const int64_t stages = ceil_div(ceil_div(r.k, kTileK), Tile::kStageTiles);
  // A multiprocessor without a block is worth the pass over the sums of parts; one that could hold more is not.
  int64_t splits = r.sms / blocks;
  if (splits > stages / kLeastStages) splits = stages / kLeastStages;
  if (splits > 16) splits = 16;
  if (splits < 1) splits = 1;
  const int64_t per_split = ceil_div(stages > 0 ? stages : 1, splits);
  const auto parts = static_cast<int32_t>(ceil_div(stages > 0 ? stages : 1, per_split));
  return {
      ring.depth ? Family::kMma : Family::kDecode, kTilesM, parts, per_split, shared_of(ring.depth), ring.depth, bulk};
}

// K is split where blocks would leave multiprocessors without work.
template <int kBits, int kCols>
Config wgmma_config(const Request& r) {
  using Tile = WgmmaTile<kBits, kCols>;
  const int64_t tiles = ceil_div(r.k, kTileK), blocks = ceil_div(r.n, Tile::kRows) * ceil_div(r.m, kCols);
  int64_t splits = r.sms / blocks;
  if (splits > tiles / kLeastWgmmaTiles) splits = tiles / kLeastWgmmaTiles;
  if (splits > 8) splits = 8;
  if (splits < 1) splits = 1;
  const int64_t per_split = ceil_div(tiles, splits);
  return {
      Family::kWgmma, kCols / 8, static_cast<int32_t>(ceil_div(tiles, per_split)), per_split, Tile::kShared, 0, true};
}

// Every other way to compute a product that a benchmark may try: tiles, stages in the ring, parts of K. All of them are
// right; `choose` takes what is expected to be fast.
template <int kBits>
std::vector<Config> candidates(const Request& r) {
  std::vector<Config> found;
  const SharedLimits limits = shared_limits(r.architecture);
  const auto split = [&](Config c, int64_t stages, int64_t least) {
    for (const int64_t parts : {1, 2, 4, 8}) {
      const int64_t each = ceil_div(stages, parts);
      if (parts > 1 && (each < least || ceil_div(stages, each) != parts)) continue;
      c.splits = static_cast<int32_t>(parts), c.stages_per_split = each;
      found.push_back(c);
    }
  };
  const auto with_tile = [&]<int kTilesM>() {
    using Tile = MmaTile<kBits, kTilesM>;
    if (kTilesM > 4 && r.m <= Tile::kCols / 2) return;
    const bool bulk = Tile::bulk(r.code);
    const int groups = stage_groups<Tile>(groups_per_tile(r.group, r.k), tiles_per_group(r.group));
    const int x_rows = static_cast<int>(r.m < Tile::kCols ? r.m : Tile::kCols);
    const StageBytes stage = stage_bytes<Tile>(x_rows, groups, r.scale_bytes, r.zero_bytes);
    for (int depth = 2; depth <= (bulk ? Tile::kMostStages : Tile::kMostAsyncStages); ++depth)
      if (const int shared = shared_bytes<Tile>(depth, stage); shared <= limits.block)
        split({Family::kMma, kTilesM, 1, 0, shared, depth, bulk}, ceil_div(ceil_div(r.k, kTileK), Tile::kStageTiles),
              1);
  };
  with_tile.template operator()<1>();
  with_tile.template operator()<2>();
  with_tile.template operator()<4>();
  with_tile.template operator()<8>();
  if (r.architecture == 90 && (r.group >= r.k || r.group % kTileK == 0)) {
    split({Family::kWgmma, 8, 1, 0, WgmmaTile<kBits, 64>::kShared, 0, true}, ceil_div(r.k, kTileK), 1);
    if (r.m > 64) split({Family::kWgmma, 16, 1, 0, WgmmaTile<kBits, 128>::kShared, 0, true}, ceil_div(r.k, kTileK), 1);
  }
  return found;
}

template <int kBits>
Config choose(const Request& r) {
  const bool wgmma = r.architecture == 90 && r.m > 16 && (r.group >= r.k || r.group % kTileK == 0);
  const Config decode{Family::kDecode, 0, 1, 0, 0, 0, false};
  if (r.m >= (wgmma ? kDecodeRows : kDecodeRowsWithoutWgmma)) return decode;
  if (wgmma) return r.m <= 64 ? wgmma_config<kBits, 64>(r) : wgmma_config<kBits, 128>(r);
  const int wanted = r.m <= 8 ? 1 : r.m <= 16 ? 2 : r.m <= 32 ? 4 : 8;
  const auto config = [&](int tiles_m) {
    return tiles_m == 1   ? mma_config<kBits, 1>(r)
           : tiles_m == 2 ? mma_config<kBits, 2>(r)
           : tiles_m == 4 ? mma_config<kBits, 4>(r)
                          : mma_config<kBits, 8>(r);
  };
  // Where shared memory does not hold the tile for these rows, a smaller one takes them in turns. That of 8 rows has
  // the longest stages where codes have one bit, so the larger ones follow.
  for (int tiles_m = wanted; tiles_m > 0; tiles_m /= 2)
    if (const Config c = config(tiles_m); c.family == Family::kMma) return c;
  for (int tiles_m = 2 * wanted; tiles_m <= 8; tiles_m *= 2)
    if (const Config c = config(tiles_m); c.family == Family::kMma) return c;
  return decode;
}

// Calls f<bits>().
template <class F>
auto for_bits(int bits, F&& f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 6:
      return f.template operator()<6>();
    default:
      return f.template operator()<8>();
  }
}

inline std::vector<Config> candidates(const Request& r) {
  return for_bits(r.bits, [&]<int kBits>() { return candidates<kBits>(r); });
}
inline Config choose(const Request& r) {
  return for_bits(r.bits, [&]<int kBits>() { return choose<kBits>(r); });
}

}  // namespace lowbit::cuda
