// The tiles of the GEMM kernels: which warp, lane and stage touches what. Index maths only, as in layout.h.
#pragma once

#include "layout.h"

namespace lowbit::cuda {

// One block: kWarpsN * 32 rows of the weight times up to kTilesM * 8 rows of x; its warps split the rows by kWarpsN
// and every stage of K by kWarpsK. A warp owns two tiles of 16 rows.
template <int kBits_, int kTilesM_>
struct MmaTile {
  static constexpr int kBits = kBits_, kTilesM = kTilesM_;
  static constexpr int kWarpsN = kTilesM == 1 ? 1 : kTilesM == 2 ? 2 : 4;
  static constexpr int kWarpsK = 8 / kWarpsN;
  static constexpr int kRowTiles = 2;
  // Tiles along K that a warp takes in a stage: a stage of few bits would be few bytes in flight.
  static constexpr int kTilesK = kTilesM == 1 && kBits <= 2 ? 2 : 1;
  static constexpr int kStages = 4;
  // Blocks that a multiprocessor's registers hold: with the stages of all of them, 72 KiB of 4-bit codes are on their
  // way at M = 1. By estimate 28 KiB would do at 4.3 TB/s and 850 ns; twice that allows for uneven blocks.
  static constexpr int kBlocksPerSm = kTilesM == 1 ? 3 : kTilesM <= 4 ? 2 : 1;
  static constexpr int kThreads = kWarpsN * kWarpsK * kLanes;
  static constexpr int kRows = kWarpsN * kRowTiles * kTileN;
  static constexpr int kCols = kTilesM * 8;
  static constexpr int kStageTiles = kWarpsK * kTilesK;
  static constexpr int kStageK = kStageTiles * kTileK;
  static constexpr int kCodeBytes = kWarpsN * kRowTiles * kStageTiles * tile_bytes(kBits);
  static constexpr int kPitchX = kStageK * 2 + 16;  // of a row of x: eight rows meet in no bank
  static constexpr int kPitchSum = kRows + 4;       // of a column of sums, in floats

  // Tile of the stage that (warp, row tile r, K tile j) reads, in order of their bytes in a stage.
  LOWBIT_HD static constexpr int warp_n(int warp) { return warp % kWarpsN; }
  LOWBIT_HD static constexpr int warp_k(int warp) { return warp / kWarpsN; }
  LOWBIT_HD static constexpr int slot(int row_tile, int k_tile) { return row_tile * kStageTiles + k_tile; }
  LOWBIT_HD static constexpr int row_tile(int warp, int r) { return warp_n(warp) * kRowTiles + r; }
  LOWBIT_HD static constexpr int k_tile(int warp, int j) { return warp_k(warp) * kTilesK + j; }
  // Where lane l of ldmatrix.x4 points, in bytes from the stage's x: matrices are (k 0-7, k 8-15) of steps s and s + 1.
  // Rows that x does not have are any row that it has.
  LOWBIT_HD static constexpr int x_address(int lane, int tile_m, int k_tile, int s, int rows) {
    const int row = tile_m * 8 + lane % 8;
    return (row < rows ? row : 0) * kPitchX + (k_tile * kTileK + s * kStepK + lane / 8 * 8) * 2;
  }
  // Element c (0..3) of a lane's accumulator of row tile r and x tile t: row of the block, and row of x.
  LOWBIT_HD static constexpr int sum_row(int warp, int lane, int r, int c) {
    return row_tile(warp, r) * kTileN + lane / 4 + c / 2 * 8;
  }
  LOWBIT_HD static constexpr int sum_col(int lane, int t, int c) { return t * 8 + lane % 4 * 2 + c % 2; }
};

// Bytes of a stage: codes, x, and the scales and zeros of every tile. `scale_bytes` and `zero_bytes` are those of one
// tile, multiples of 16.
struct StageBytes {
  int codes, x, scales, zeros;
  LOWBIT_HD constexpr int total() const { return codes + x + scales + zeros; }
};
template <class Tile>
LOWBIT_HD constexpr StageBytes stage_bytes(int x_rows, int scale_bytes, int zero_bytes) {
  const int tiles = Tile::kWarpsN * Tile::kRowTiles * Tile::kStageTiles;
  return {Tile::kCodeBytes, x_rows * Tile::kPitchX, tiles * scale_bytes, tiles * zero_bytes};
}
template <class Tile>
constexpr int shared_bytes(int x_rows, int scale_bytes, int zero_bytes) {
  const int stages = Tile::kStages * stage_bytes<Tile>(x_rows, scale_bytes, zero_bytes).total();
  const int sums = Tile::kWarpsK * Tile::kCols * Tile::kPitchSum * 4;  // in the place of the stages
  return table_bytes(Tile::kBits) + (stages > sums ? stages : sums);
}

// One 16-byte copy to shared memory: bytes from the start of the operand, bytes from the start of its part of the
// stage, and how many are read (the others are zero); negative: none.
struct Copy {
  int64_t from;
  int to, valid;
};

// What a block copies: `piece` counts 16 bytes of a stage's codes, row tile by row tile. Tiles beyond N are copies of
// the last one and never stored; tiles beyond K are not read.
template <class Tile>
LOWBIT_HD constexpr Copy copy_codes(int piece, int stage, int tile_n0, int tiles_n, int tiles_k) {
  constexpr int kTilePieces = tile_bytes(Tile::kBits) / 16, kRowPieces = Tile::kStageTiles * kTilePieces;
  const int tile_k0 = stage * Tile::kStageTiles;
  if (piece >= Tile::kCodeBytes / 16 || tile_k0 + piece % kRowPieces / kTilePieces >= tiles_k) return {0, 0, -1};
  const int row = tile_n0 + piece / kRowPieces, tile_n = row < tiles_n ? row : tiles_n - 1;
  return {(int64_t{tile_n} * tiles_k + tile_k0) * tile_bytes(Tile::kBits) + piece % kRowPieces * 16, piece * 16, 16};
}
// Of x, whose row 0 is the block's first: `stride` elements between rows.
template <class Tile>
LOWBIT_HD constexpr Copy copy_x(int piece, int stage, int k, int64_t stride) {
  constexpr int kPieces = Tile::kStageK / 8;  // of a row
  const int row = piece / kPieces, column = piece % kPieces * 8, at = stage * Tile::kStageK + column;
  const int left = k - at;
  return {(row * stride + (left > 0 ? at : 0)) * 2, row * Tile::kPitchX + column * 2,
          left >= 8  ? 16
          : left > 0 ? left * 2
                     : 0};
}
// Of scales or zeros of `size` bytes (1, 2 or 4), `groups` of them (1, 2 or 4) for each tile of the stage, or one for
// `group_tiles` of them. A group that the last tile does not reach any more is the one before.
template <class Tile>
LOWBIT_HD constexpr Copy copy_scales(int piece, int stage, int tile_n0, int tiles_n, int tiles_k, int group_tiles,
                                     int num_groups, int groups, int size) {
  const int log_size = size >> 1, log_pieces = log_size + (groups >> 1);  // of 1, 2 and 4
  const int tile = piece >> log_pieces, in_tile = piece & ((1 << log_pieces) - 1);
  const int tile_k = stage * Tile::kStageTiles + tile % Tile::kStageTiles;
  if (tile_k >= tiles_k) return {0, 0, -1};
  const int row = tile_n0 + tile / Tile::kStageTiles, tile_n = row < tiles_n ? row : tiles_n - 1;
  const unsigned whole = static_cast<unsigned>(tile_k) / static_cast<unsigned>(group_tiles);
  const int found = (groups > 1 ? tile_k * groups : static_cast<int>(whole)) + (in_tile >> log_size);
  const int group = found < num_groups ? found : num_groups - 1;
  return {((int64_t{tile_n} * num_groups + group) * size + (in_tile & (size - 1))) * 16, piece * 16, 16};
}

// What wgmma is told of a tile of 128-byte rows at a shared address (a multiple of 1024), as the tensor memory
// accelerator writes it: swizzled, eight rows to the next 1024 bytes. 32 bytes of K further is 2 more.
LOWBIT_HD constexpr uint64_t tile_descriptor(uint32_t address) {
  return (address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// One block: 128 rows of the weight, 64 for each of two warpgroups that multiply, times kCols rows of x.
template <int kBits_, int kCols_>
struct WgmmaTile {
  static constexpr int kBits = kBits_, kCols = kCols_;
  static constexpr int kRowTiles = 8, kRows = kRowTiles * kTileN;
  static constexpr int kConsumers = kRowTiles * kLanes, kThreads = kConsumers + 128;
  static constexpr int kStages = 5;
  static constexpr int kXBytes = kCols * kTileK * 2;
  static constexpr int kStageBytes = static_cast<int>(ceil_div(kXBytes + kRowTiles * tile_bytes(kBits), 1024) * 1024);
  static constexpr int kPitchSum = kRows + 4;
  static constexpr int kShared = table_bytes(kBits) + kStages * kStageBytes + kStages * 2 * 8;
  static_assert(kCols * kPitchSum * 4 <= kStages * kStageBytes, "sums lie in the place of the stages");

  // Element j of a lane's accumulators.
  LOWBIT_HD static constexpr int sum_row(int row_tile, int lane, int j) {
    return row_tile * kTileN + lane / 4 + j / 2 % 2 * 8;
  }
  LOWBIT_HD static constexpr int sum_col(int lane, int j) { return j / 4 * 8 + lane % 4 * 2 + j % 2; }
};

// One block of an FP8 product P Q^T: 128 rows of P, 64 for each of two warpgroups, times kCols rows of Q. A stage is
// 128 bytes of K, after which sums leave the tensor cores, whose accumulators keep 14 bits of products of FP8.
template <int kCols_>
struct Fp8Tile {
  static constexpr int kCols = kCols_, kRows = 128, kK = 128, kStepK = 32, kSteps = kK / kStepK;
  static constexpr int kWarps = 8, kConsumers = kWarps * kLanes, kThreads = kConsumers + 128;
  static constexpr int kStages = kCols == 128 ? 5 : 6;
  static constexpr int kPBytes = kRows * kK, kQBytes = kCols * kK, kStageBytes = kPBytes + kQBytes;
  static constexpr int kPitchSum = kRows + 4;  // of a column of sums, in floats
  static constexpr int kShared = kStages * kStageBytes + kStages * 2 * 8;
  static_assert(kCols * kPitchSum * 4 <= kStages * kStageBytes, "sums lie in the place of the stages");
  static_assert(kQBytes % 1024 == 0, "tiles begin at multiples of 1024 bytes");

  // Bytes from a stage to the 64 rows of P of a warpgroup, and to Q.
  LOWBIT_HD static constexpr int p_offset(int warpgroup) { return warpgroup * (kPBytes / 2); }
  LOWBIT_HD static constexpr int q_offset() { return kPBytes; }
  // Element j of a lane's accumulators.
  LOWBIT_HD static constexpr int sum_row(int warp, int lane, int j) { return warp * 16 + lane / 4 + j / 2 % 2 * 8; }
  LOWBIT_HD static constexpr int sum_col(int lane, int j) { return j / 4 * 8 + lane % 4 * 2 + j % 2; }
};

}  // namespace lowbit::cuda
