// A stage of the mma kernels in shared memory, for the test that walks through them on the host.
#pragma once

#include <cstring>
#include <vector>

#include "cuda/tile.h"
#include "cuda_weight.h"

namespace lowbit::cuda {

// A stage of a block in shared memory, filled by the pieces of cp.async; what none of them wrote is poison. What the
// tensor memory accelerator writes is checked to be the same: boxes in the order of their dimensions.
template <class Tile>
struct Stage {
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<float> x;  // by element
  int room, first;

  Stage(const Problem& p, int64_t stage, int64_t tile_n0, int64_t m0, int rows, int valid_rows)
      : codes(Tile::kCodeBytes, 0xFF), x(Tile::kStageTiles * rows * kTileK, 1e30f) {
    const int groups = groups_per_tile(p.c.group, p.c.k);
    const uint32_t group_tiles = reciprocal(tiles_per_group(p.c.group));
    room = stage_groups<Tile>(groups, tiles_per_group(p.c.group));
    first = first_group<Tile>(stage, group_tiles, groups);
    const StageBytes bytes = stage_bytes<Tile>(rows, room, 4, p.c.zero == Zero::kInt);
    expect(bytes.x_at() % 1024 == 0 && bytes.scales_at() % 128 == 0 && bytes.zeros_at() % 128 == 0 &&
               bytes.total() % 1024 == 0 && bytes.zeros_at() + bytes.zeros <= bytes.total(),
           "parts of a stage", stage, bytes.scales_at(), bytes.zeros_at());
    scales.assign(bytes.scales, 0xFF), zeros.assign(bytes.zeros, 0xFF);
    const auto load = [&](std::vector<uint8_t>& to, const void* from, size_t size, auto&& piece_of) {
      for (int i = 0; i < static_cast<int>(to.size()) / 16; ++i) {
        const Piece piece = piece_of(i);
        if (piece.valid) copy(to, piece, from, size);
      }
    };
    load(codes, p.packed.data(), p.packed.size() * 4,
         [&](int i) { return code_piece<Tile>(i, stage, tile_n0, p.tiles_n, p.tiles_k); });
    const auto value_piece = [&](int size) {
      return [&, size](int i) { return scale_piece<Tile>(i, first, room, tile_n0, p.tiles_n, p.groups, size); };
    };
    load(scales, p.scales.data(), p.scales.size() * 4, value_piece(4));
    load(zeros, p.int_zeros.data(), p.int_zeros.size(), value_piece(1));
    // Rows of x go on with zeros to the end of the last tile.
    const int64_t stride = p.tiles_k * kTileK;
    for (int i = 0; i < bytes.x / 16; ++i) {
      const Piece piece = x_piece<Tile>(i, stage, rows, valid_rows, p.tiles_k, stride);
      if (!piece.valid) continue;
      for (int e = 0; e < 8; ++e) {
        const int64_t row = piece.from / 2 / stride, k = piece.from / 2 % stride + e;
        x.at(piece.to / 2 + e) = k < p.c.k ? p.x.at((m0 + row) * p.c.k + k) : 0;
      }
    }
    check_boxes(p, stage, tile_n0, m0, rows, valid_rows);
  }

  void check_boxes(const Problem& p, int64_t stage, int64_t tile_n0, int64_t m0, int rows, int valid_rows) const {
    for (int tile = 0; tile < Tile::kStageTiles; ++tile)
      for (int row = 0; row < valid_rows; ++row)
        for (int e = 0; e < kTileK; ++e) {
          const int64_t tile_k = stage * Tile::kStageTiles + tile, k = tile_k * kTileK + e;
          if (tile_k >= p.tiles_k) continue;
          const float want = k < p.c.k ? p.x.at((m0 + row) * p.c.k + k) : 0;
          const uint32_t at = swizzle128(((tile * rows + row) * kTileK + e) * 2) / 2;
          expect(x.at(at) == want, "box of x", k, x.at(at), want);
        }
    for (int r = 0; r < Tile::kRowTilesOfBlock; ++r)
      for (int g = 0; g < room; ++g)
        for (int i = 0; i < kTileN && tile_n0 + r < p.tiles_n && first + g < p.groups; ++i) {
          float got;
          std::memcpy(&got, &scales.at(((r * room + g) * kTileN + i) * 4), 4);
          const float want = p.scales.at(((tile_n0 + r) * p.groups + first + g) * kTileN + i);
          expect(got == want, "box of scales", i, got, want);
        }
  }

  static void copy(std::vector<uint8_t>& to, const Piece& c, const void* from, size_t size) {
    expect(c.from >= 0 && c.from + 16 <= static_cast<int64_t>(size) && c.from % 16 == 0 &&
               c.to + 16 <= static_cast<int64_t>(to.size()),
           "bounds of a copy", c.to, c.from, size);
    std::memcpy(&to.at(c.to), static_cast<const uint8_t*>(from) + c.from, 16);
  }
};

}  // namespace lowbit::cuda
