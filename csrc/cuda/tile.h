// The tiles of the GEMM kernels: which warp, lane and stage touches what. Index maths only, as in m16.h.
#pragma once

#include "launch.h"
#include "m16.h"

namespace lowbit::cuda {

constexpr int kXRowBytes = kTileK * 2;  // of a row of x in a K tile

// One block: kWarpsN * 32 rows of the weight times up to kTilesM * 8 rows of x; its warps split the rows by kWarpsN
// and every stage of K by kWarpsK. A warp owns two tiles of 16 rows.
template <int kBits_, int kTilesM_>
struct MmaTile {
  static constexpr int kBits = kBits_, kTilesM = kTilesM_;
  static constexpr int kWarpsN = kTilesM == 1 ? 1 : kTilesM == 2 ? 2 : 4;
  static constexpr int kWarpsK = kTilesM <= 2 ? 8 : 2;
  static constexpr int kRowTiles = 2;
  // Tiles along K that a warp takes in a stage: one of few bits would be few bytes in flight.
  static constexpr int kTilesK = kTilesM > 1 ? 1 : kBits == 1 ? 4 : kBits <= 3 ? 2 : 1;
  static constexpr int kWarps = kWarpsN * kWarpsK, kThreads = kWarps * kLanes;
  // Whether a warp of its own fills the ring from sm_90 on. Larger tiles have no registers for it.
  static constexpr bool kBulk = kTilesM <= 2;
  // Stages in the ring at most; cp.async waits for a number that its code spells out.
  static constexpr int kMostStages = kBulk ? 8 : 4, kMostAsyncStages = 4;
  // Threads of a block, with a warp that fills the ring (`bulk`) or without, and blocks that the registers of a
  // multiprocessor hold, which is what the code for an architecture (`code`) is compiled for. `fine`: with several
  // groups in a tile, which for codes of one bit takes more registers from sm_100 on.
  LOWBIT_HD static constexpr int threads(bool bulk) { return kThreads + (bulk ? kLanes : 0); }
  LOWBIT_HD static constexpr bool bulk(int code) { return kBulk && code >= 90; }
  LOWBIT_HD static constexpr int resident(int code, bool fine) {
    return kTilesM > 1 ? 1 : bulk(code) && kBits <= 4 && !(code >= 100 && fine && kBits == 1) ? 3 : 2;
  }
  static constexpr int kRows = kWarpsN * kRowTiles * kTileN;
  static constexpr int kCols = kTilesM * 8;
  static constexpr int kStageTiles = kWarpsK * kTilesK;
  static constexpr int kStageK = kStageTiles * kTileK;
  static constexpr int kRowTilesOfBlock = kWarpsN * kRowTiles;
  static constexpr int kRowBytes = kStageTiles * tile_bytes(kBits);  // of a row tile's codes in a stage
  static constexpr int kCodeBytes = kRowTilesOfBlock * kRowBytes;
  static constexpr int kPitchSum = kRows + 4;  // of a column of sums, in floats

  // Tile of the stage that (warp, row tile r, K tile j) reads, in order of their bytes in a stage.
  LOWBIT_HD static constexpr int warp_n(int warp) { return warp % kWarpsN; }
  LOWBIT_HD static constexpr int warp_k(int warp) { return warp / kWarpsN; }
  LOWBIT_HD static constexpr int slot(int row_tile, int k_tile) { return row_tile * kStageTiles + k_tile; }
  LOWBIT_HD static constexpr int row_tile(int warp, int r) { return warp_n(warp) * kRowTiles + r; }
  LOWBIT_HD static constexpr int k_tile(int warp, int j) { return warp_k(warp) * kTilesK + j; }
  // Where lane l of ldmatrix.x4 points, in bytes from the stage's x: matrices are (k 0-7, k 8-15) of steps s and s + 1.
  // x lies [K tile][row][64], swizzled. Rows that x does not have are any row that it has.
  LOWBIT_HD static constexpr uint32_t x_address(int lane, int tile_m, int k_tile, int s, int rows) {
    return x_start(lane, tile_m, k_tile, rows) ^ s * kStepK * 2;
  }
  // Of step 0.
  LOWBIT_HD static constexpr uint32_t x_start(int lane, int tile_m, int k_tile, int rows) {
    const int row = tile_m * 8 + lane % 8;
    return swizzle128((k_tile * rows + (row < rows ? row : 0)) * kXRowBytes + lane / 8 * 16);
  }
  // Element c (0..3) of a lane's accumulator of row tile r and x tile t: row of the block, and row of x.
  LOWBIT_HD static constexpr int sum_row(int warp, int lane, int r, int c) {
    return row_tile(warp, r) * kTileN + lane / 4 + c / 2 * 8;
  }
  LOWBIT_HD static constexpr int sum_col(int lane, int t, int c) { return t * 8 + lane % 4 * 2 + c % 2; }
};

// A stage: codes [row tile][K tile], x, and scales and zeros [row tile][group][16]. The parts begin at multiples of 128
// bytes, x and the stage at multiples of 1024.
struct StageBytes {
  int codes, x, scales, zeros;
  LOWBIT_HD constexpr int x_at() const { return codes; }
  LOWBIT_HD constexpr int scales_at() const { return x_at() + x; }
  LOWBIT_HD constexpr int zeros_at() const { return scales_at() + static_cast<int>(ceil_div(scales, 128) * 128); }
  LOWBIT_HD constexpr int total() const { return static_cast<int>(ceil_div(zeros_at() + zeros, 1024) * 1024); }
};
// Groups of a row whose scales a stage has room for: those that may meet in its K. `groups` (1, 2 or 4) in a tile, or
// one for `group_tiles` of them; 0: one for all, which no stage holds.
template <class Tile>
LOWBIT_HD constexpr int stage_groups(int groups, int group_tiles) {
  if (groups == 0) return 0;
  if (groups > 1 || group_tiles == 1) return Tile::kStageTiles * groups;
  const int most = (Tile::kStageTiles - 1) / group_tiles + 2;
  return Tile::kStageTiles % group_tiles == 0 || group_tiles % Tile::kStageTiles == 0
             ? ceil_div(Tile::kStageTiles, group_tiles)
             : most;
}
// `stage_groups` scales of `scale_size` bytes and zeros of `zero_size` for each row tile.
template <class Tile>
LOWBIT_HD constexpr StageBytes stage_bytes(int x_rows, int stage_groups, int scale_size, int zero_size) {
  const int values = Tile::kRowTilesOfBlock * stage_groups * kTileN;
  return {Tile::kCodeBytes, Tile::kStageTiles * x_rows * kXRowBytes, values * scale_size, values * zero_size};
}
// The stages, and later the sums in their place.
template <class Tile>
LOWBIT_HD constexpr int ring_bytes(int depth, const StageBytes& stage) {
  const int stages = depth * stage.total(), sums = Tile::kWarpsK * Tile::kCols * Tile::kPitchSum * 4;
  return stages > sums ? stages : sums;
}
// The table, the ring, and two barriers for each stage.
template <class Tile>
constexpr int shared_bytes(int depth, const StageBytes& stage) {
  return table_bytes(Tile::kBits) + ring_bytes<Tile>(depth, stage) + Tile::kMostStages * 2 * 8;
}

// tile / group_tiles for 32-bit tiles whose product with group_tiles has 32 bits: a multiplication by
// reciprocal(group_tiles).
LOWBIT_HD constexpr uint32_t reciprocal(int group_tiles) {
  return group_tiles == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + group_tiles - 1) / group_tiles);
}
LOWBIT_HD constexpr int group_of(int tile_k, uint32_t reciprocal_tiles) {
  return reciprocal_tiles == 0 ? tile_k
                               : static_cast<int>(uint64_t{reciprocal_tiles} * static_cast<uint32_t>(tile_k) >> 32);
}

// How K is shared out, and the ring.
struct MmaRun {
  int stages_per_split, depth;
  int groups, stage_groups;  // that meet in a tile, and that a stage has room for
  uint32_t group_tiles;      // reciprocal
};
inline MmaRun run_of(const Linear& p, const Config& c, int stage_groups) {
  return {static_cast<int>(c.stages_per_split), c.depth, groups_per_tile(p.group, p.k), stage_groups,
          p.group < p.k ? reciprocal(tiles_per_group(p.group)) : 0};
}
// The first group that a stage holds: `groups` in each tile, or one for several.
template <class Tile>
LOWBIT_HD constexpr int first_group(int stage, uint32_t reciprocal_tiles, int groups) {
  const int tile_k = stage * Tile::kStageTiles;
  return groups > 1 ? tile_k * groups : group_of(tile_k, reciprocal_tiles);
}

// A piece of 16 bytes for cp.async: bytes from the start of the operand, bytes from the start of its part of the stage,
// and whether the operand has it. The tensor memory accelerator brings the same, with zeros for what there is not.
struct Piece {
  int64_t from;
  int to;
  bool valid;
};
// Of the codes; `piece` counts row tile by row tile.
template <class Tile>
LOWBIT_HD constexpr Piece code_piece(int piece, int stage, int tile_n0, int tiles_n, int tiles_k) {
  constexpr int kRowPieces = Tile::kRowBytes / 16, kTilePieces = tile_bytes(Tile::kBits) / 16;
  const int tile_n = tile_n0 + piece / kRowPieces,
            tile_k = stage * Tile::kStageTiles + piece % kRowPieces / kTilePieces;
  return {(int64_t{tile_n} * tiles_k + stage * Tile::kStageTiles) * tile_bytes(Tile::kBits) + piece % kRowPieces * 16,
          piece * 16, piece < Tile::kCodeBytes / 16 && tile_n < tiles_n && tile_k < tiles_k};
}
// Of x, whose row 0 is the block's first: `stride` elements between rows, which go on with zeros to the end of K's last
// tile; `piece` counts row by row of `rows`, of which x has `valid_rows`.
template <class Tile>
LOWBIT_HD constexpr Piece x_piece(int piece, int stage, int rows, int valid_rows, int tiles_k, int64_t stride) {
  constexpr int kTilePieces = kXRowBytes / 16, kRowPieces = Tile::kStageTiles * kTilePieces;
  const int row = piece / kRowPieces, column = piece % kRowPieces, tile = column / kTilePieces;
  return {(row * stride + int64_t{stage} * Tile::kStageK) * 2 + column * 16,
          static_cast<int>(swizzle128((tile * rows + row) * kXRowBytes + column % kTilePieces * 16)),
          row < valid_rows && stage * Tile::kStageTiles + tile < tiles_k};
}
// Of scales or zeros of `size` bytes (1, 2 or 4), from group `first` on.
template <class Tile>
LOWBIT_HD constexpr Piece scale_piece(int piece, int first, int stage_groups, int tile_n0, int tiles_n, int num_groups,
                                      int size) {
  const int row_pieces = stage_groups * size, tile_n = tile_n0 + piece / row_pieces, in_row = piece % row_pieces;
  return {(int64_t{tile_n} * num_groups + first) * kTileN * size + in_row * 16, piece * 16,
          piece < Tile::kRowTilesOfBlock * row_pieces && tile_n < tiles_n && first + in_row / size < num_groups};
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
  // A stage: x, and for each row tile its codes, scales of up to 4 bytes and zeros.
  static constexpr int kXBytes = kCols * kTileK * 2;
  LOWBIT_HD static constexpr int codes_at(int row_tile) { return kXBytes + row_tile * tile_bytes(kBits); }
  static constexpr int kScalesAt = kXBytes + kRowTiles * tile_bytes(kBits);
  static constexpr int kZerosAt = kScalesAt + kRowTiles * kTileN * 4;
  static constexpr int kUsed = kZerosAt + kRowTiles * kTileN;
  static constexpr int kStageBytes = static_cast<int>(ceil_div(kUsed, 1024) * 1024);
  static constexpr int kPitchSum = kRows + 4;
  static constexpr int kShared = table_bytes(kBits) + kStages * kStageBytes + kStages * 2 * 8;
  static_assert(kCols * kPitchSum * 4 <= kStages * kStageBytes, "sums lie in the place of the stages");

  // Element j of a lane's accumulators.
  LOWBIT_HD static constexpr int sum_row(int row_tile, int lane, int j) {
    return row_tile * kTileN + lane / 4 + j / 2 % 2 * 8;
  }
  LOWBIT_HD static constexpr int sum_col(int lane, int j) { return j / 4 * 8 + lane % 4 * 2 + j % 2; }
};

// Row and column of a tile of a product: tiles that are computed together share `band` rows of P and columns of Q in
// L2.
struct Place {
  int row, column;
};
LOWBIT_HD constexpr Place place_of(int tile, int tall, int wide, int band) {
  const int in_band = band * wide, first = tile / in_band * band;
  const int height = tall - first < band ? tall - first : band;
  return {first + tile % in_band % height, tile % in_band / height};
}

// One block of an FP8 product P Q^T: 128 rows of P, 64 for each of two warpgroups, times kCols rows of Q. A stage is
// 128 bytes of K, after which sums leave the tensor cores, whose accumulators keep 14 bits of products of FP8.
template <int kCols_>
struct Fp8Tile {
  static constexpr int kCols = kCols_, kRows = 128, kK = 128, kStepK = 32, kSteps = kK / kStepK;
  static constexpr int kWarps = 8, kConsumers = kWarps * kLanes, kThreads = kConsumers + 128;
  static constexpr int kStages = kCols == 128 ? 5 : 6;
  static constexpr int kBand = 8;
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

// What all blocks of dequantize_kernel share.
struct DequantizePlan {
  uint32_t tiles_k, blocks_k, num_groups;
  uint32_t group_tiles;  // of a group, or
  int32_t groups;        // 2 or 4 that meet in a tile; else 1
  int32_t width;         // bytes of a store
};

// One block of dequantize_kernel: kWarps * kTiles tiles along K of one row of tiles; its warps take neighbouring tiles
// in turn. A warp turns its tile around in shared memory, so that its lanes store along rows. kSize: bytes of an
// output.
template <int kSize_>
struct DequantizeTile {
  static constexpr int kSize = kSize_, kWarps = 4, kThreads = kWarps * kLanes;
  static constexpr int kTiles = 4;  // of a warp: enough to pay for the table
  static constexpr int kBlockTiles = kWarps * kTiles;
  static constexpr int kBlocksPerSm = 8;
  // Between rows in shared memory: a quad's pairs lie side by side, and the eight rows of one access meet in no bank.
  static constexpr int kPitch = kTileK * kSize * 9 / 8;
  static constexpr int kBytes = kTileN * kPitch;
  static constexpr int kMaxScales = kTileN * kSteps;  // of a tile

  // The widest store that fits rows of k side by side from `address` on: 16, 4 or 2 bytes.
  static constexpr DequantizePlan plan(int64_t k, int64_t group, uint64_t address) {
    const uint32_t tiles_k = static_cast<uint32_t>(ceil_div(k, kTileK));
    const int groups = groups_per_tile(group, k);
    const uint64_t ends = address | static_cast<uint64_t>(k * kSize);
    return {tiles_k,
            (tiles_k + kBlockTiles - 1) / kBlockTiles,
            static_cast<uint32_t>(ceil_div(k, group)),
            static_cast<uint32_t>(tiles_per_group(group)),
            groups > 1 ? groups : 1,
            ends % 16 == 0  ? 16
            : ends % 4 == 0 ? 4
                            : 2};
  }
  LOWBIT_HD static constexpr uint32_t tile_n(uint32_t block, const DequantizePlan& p) { return block / p.blocks_k; }
  LOWBIT_HD static constexpr uint32_t tile_k(uint32_t block, int warp, const DequantizePlan& p) {
    return block % p.blocks_k * kBlockTiles + warp;  // the first; the others follow kWarps apart
  }
  // Where a lane writes code i and, beside it, code i + 1 (i even).
  LOWBIT_HD static constexpr int code_byte(int lane, int i) {
    return code_row(lane, i) * kPitch + code_k(lane, i) * kSize;
  }
  // In stores of `width` bytes a warp takes so many rows at once; a lane's first row and byte of it. Where rows are
  // longer than a warp's store, bytes follow kLanes * width apart.
  LOWBIT_HD static constexpr int row_stores(int width) { return kTileK * kSize / width; }
  LOWBIT_HD static constexpr int rows_at_once(int width) {
    return row_stores(width) < kLanes ? kLanes / row_stores(width) : 1;
  }
  LOWBIT_HD static constexpr int store_row(int lane, int width) { return lane / row_stores(width); }
  LOWBIT_HD static constexpr int store_byte(int lane, int width) { return lane % row_stores(width) * width; }
};

// Where scale i of a tile lies: 16 for each of its groups. Beyond the last group there is that one again.
LOWBIT_HD constexpr int64_t tile_scale(int i, uint32_t tile_n, uint32_t tile_k, const DequantizePlan& p) {
  const uint32_t group = (p.groups > 1 ? tile_k * p.groups : tile_k / p.group_tiles) + i / kTileN;
  return scale_at(tile_n, group < p.num_groups ? group : p.num_groups - 1, p.num_groups) + i % kTileN;
}
// The first of those of step s.
LOWBIT_HD constexpr int step_scale(int s, int groups) { return s * groups / kSteps * kTileN; }
LOWBIT_HD constexpr bool starts_group(int s, int groups) { return s * groups % kSteps == 0; }

}  // namespace lowbit::cuda
