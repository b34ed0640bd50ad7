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
// A part of K that is worth a block of its own and a pass over its sums.
constexpr int64_t kLeastStages = 4;
constexpr int kSharedPerSm = 227 << 10;
constexpr int kSharedPerBlock = 99 << 10;  // of every architecture but 80, 90 and 100

template <int kBits, int kTilesM>
Config mma_config(const Request& r) {
  using Tile = MmaTile<kBits, kTilesM>;
  const int groups = groups_per_tile(r.group, r.k);
  const int x_rows = static_cast<int>(r.m < Tile::kCols ? r.m : Tile::kCols);
  const int shared = shared_bytes<Tile>(x_rows, groups * kTileN * r.scale_bytes, groups * kTileN * r.zero_bytes);
  const int64_t stages = ceil_div(ceil_div(r.k, kTileK), Tile::kStageTiles);
  const int64_t blocks = ceil_div(r.n, Tile::kRows) * ceil_div(r.m, Tile::kCols);
  const int fitting = (kSharedPerSm + 1024) / (shared + 1024);  // the system takes 1 KiB of each block
  const int64_t resident = r.sms * int64_t{fitting < Tile::kBlocksPerSm ? fitting : Tile::kBlocksPerSm};
  int64_t splits = resident / blocks;
  if (splits > stages / kLeastStages) splits = stages / kLeastStages;
  if (splits > 16) splits = 16;
  if (splits < 1) splits = 1;
  const int64_t per_split = ceil_div(stages > 0 ? stages : 1, splits);
  return {Family::kMma, kTilesM, static_cast<int32_t>(ceil_div(stages > 0 ? stages : 1, per_split)), per_split, shared};
}

template <int kBits>
Config choose(const Request& r) {
  const bool wgmma = r.architecture == 90 && r.m > 64 && (r.group >= r.k || r.group % kTileK == 0);
  const Config decode{Family::kDecode, 0, 1, 0, 0};
  if (r.m >= (wgmma ? kDecodeRows : kDecodeRowsWithoutWgmma)) return decode;
  if (wgmma) {
    // Half the columns where whole blocks would leave multiprocessors without work.
    const bool narrow = ceil_div(r.n, WgmmaTile<kBits, 64>::kRows) * ceil_div(r.m, 128) <= r.sms / 2;
    return {Family::kWgmma, narrow ? 8 : 16, 1, 0,
            narrow ? WgmmaTile<kBits, 64>::kShared : WgmmaTile<kBits, 128>::kShared};
  }
  const Config c = r.m <= 8    ? mma_config<kBits, 1>(r)
                   : r.m <= 16 ? mma_config<kBits, 2>(r)
                   : r.m <= 32 ? mma_config<kBits, 4>(r)
                               : mma_config<kBits, 8>(r);
  const bool large = r.architecture == 80 || r.architecture == 87 || r.architecture == 90 || r.architecture / 10 == 10;
  const int limit = large ? (r.architecture == 80 || r.architecture == 87 ? 163 << 10 : kSharedPerSm) : kSharedPerBlock;
  return c.shared <= limit ? c : decode;
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
