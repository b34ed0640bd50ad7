// Which kernel computes a product, and its tile: plain arithmetic on the host, tested without a GPU.
#pragma once

#include "launch.h"
#include "tile.h"

namespace lowbit::cuda {

// What the choice depends on.
struct Request {
  int64_t m, n, k, group;
  int bits;
  int scale_bytes, zero_bytes;  // of one scale and one integer zero, 0 without
  int architecture;             // 10 * major + minor of the compute capability
  int sms;
};

// From here on a decoded copy and the product of torch: 2 NK / M bytes a row of x are less than what decoding again for
// every block of rows costs. An estimate.
constexpr int64_t kDecodeRows = 1024;
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

template <int kBits, int kTilesM>
Config mma_config(const Request& r) {
  using Tile = MmaTile<kBits, kTilesM>;
  const SharedLimits limits = shared_limits(r.architecture);
  const int groups = stage_groups<Tile>(groups_per_tile(r.group, r.k), tiles_per_group(r.group));
  const int x_rows = static_cast<int>(r.m < Tile::kCols ? r.m : Tile::kCols);
  const StageBytes stage = stage_bytes<Tile>(x_rows, groups, r.scale_bytes, r.zero_bytes);
  const auto shared_of = [&](int depth) { return shared_bytes<Tile>(depth, stage); };
  // As deep as lets several blocks be resident; the system takes 1 KiB of each.
  int depth = Tile::kMostStages;
  while (depth > 2 && Tile::kResident * (shared_of(depth) + 1024) > limits.sm) --depth;
  const int shared = shared_of(depth);
  const int64_t stages = ceil_div(ceil_div(r.k, kTileK), Tile::kStageTiles);
  // A multiprocessor without a block is worth the pass over the sums of parts; one that could hold more is not.
  int64_t splits = r.sms / (ceil_div(r.n, Tile::kRows) * ceil_div(r.m, Tile::kCols));
  if (splits > stages / kLeastStages) splits = stages / kLeastStages;
  if (splits > 16) splits = 16;
  if (splits < 1) splits = 1;
  const int64_t per_split = ceil_div(stages > 0 ? stages : 1, splits);
  const auto parts = static_cast<int32_t>(ceil_div(stages > 0 ? stages : 1, per_split));
  return {shared <= limits.block ? Family::kMma : Family::kDecode,
          kTilesM,
          parts,
          per_split,
          shared,
          depth,
          Tile::kBulk && r.architecture >= 90};
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

template <int kBits>
Config choose(const Request& r) {
  const bool wgmma = r.architecture == 90 && r.m > 16 && (r.group >= r.k || r.group % kTileK == 0);
  const Config decode{Family::kDecode, 0, 1, 0, 0, 0, false};
  if (r.m >= (wgmma ? kDecodeRows : kDecodeRowsWithoutWgmma)) return decode;
  if (wgmma) return r.m <= 64 ? wgmma_config<kBits, 64>(r) : wgmma_config<kBits, 128>(r);
  const Config c = r.m <= 8    ? mma_config<kBits, 1>(r)
                   : r.m <= 16 ? mma_config<kBits, 2>(r)
                   : r.m <= 32 ? mma_config<kBits, 4>(r)
                               : mma_config<kBits, 8>(r);
  return c.family == Family::kMma ? c : decode;
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

inline Config choose(const Request& r) {
  return for_bits(r.bits, [&]<int kBits>() { return choose<kBits>(r); });
}

}  // namespace lowbit::cuda
