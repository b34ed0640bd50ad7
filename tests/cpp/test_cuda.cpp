// The CUDA kernels' data movement on the host, thread by thread: which bytes a lane copies, which code it finds in
// them, which element of x meets it, and which sum it is added to. What ldmatrix, mma and wgmma do to the lanes'
// registers is written down here from the PTX manual. Numbers are small integers, so every sum must be exact.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "cuda/heuristics.h"
#include "cuda_choice.h"
#include "cuda_fp8.h"
#include "cuda_stage.h"
#include "cuda_weight.h"

using namespace lowbit::cuda;

namespace {

// The table as fill_table writes it, with the code itself for its value.
std::vector<uint16_t> shared_table(int bits) {
  std::vector<uint16_t> t(table_bytes(bits) / 2);
  for (size_t i = 0; i < t.size(); ++i) t[i] = entry_code(bits, i * 2 / kEntryPitch, i * 2 % kEntryPitch);
  return t;
}

// decode() of codecs.cuh: eight codes, two for each register.
template <int kBits>
void decode(const uint32_t (&words)[kBits], int s, int lane, const std::vector<uint16_t>& table, int (&code)[8]) {
  constexpr int kCodes = field_codes(kBits);
  for (int f = 0; f < 8 / kCodes; ++f) {
    const size_t at = entry_offset<kBits>(words, s * (8 / kCodes) + f) + copy_offset(kBits, lane);
    for (int i = 0; i < kCodes; ++i) code[f * kCodes + i] = table.at(at / 2 + i);
  }
}

// Row and column of the A operand of m16n8k16 (and, for each warp, of wgmma) that register r, half e of a lane holds.
int a_row(int lane, int r) { return lane / 4 + (r % 2 ? 8 : 0); }
int a_col(int lane, int r, int e) { return lane % 4 * 2 + e + (r >= 2 ? 8 : 0); }

// Codes of a lane of a tile, with where the product takes them to be.
template <int kBits>
void check_fragments(const Problem& p, const uint8_t* tile_bytes_at, int64_t tile_n, int64_t tile_k, int lane,
                     const std::vector<uint16_t>& table, int (&code)[kSteps][8]) {
  uint32_t words[kBits];
  for (int w = 0; w < kBits; ++w) std::memcpy(words + w, tile_bytes_at + word_at(kBits, lane, w) * 4, 4);
  for (int s = 0; s < kSteps; ++s) {
    decode<kBits>(words, s, lane, table, code[s]);
    for (int i = 0; i < 8; ++i) {
      const int64_t n = tile_n * kTileN + a_row(lane, i / 2),
                    k = tile_k * kTileK + s * kStepK + a_col(lane, i / 2, i % 2);
      const int want = n < p.c.n && k < p.c.k ? p.codes[n * p.c.k + k] : 0;
      expect(code[s][i] == want, "code of a fragment", i, code[s][i], want);
    }
  }
}

template <class Tile>
void mma_block(const Problem& p, int64_t block_n, int64_t split, int64_t per_split, int64_t block_m,
               std::vector<double>& y) {
  const auto table = shared_table(Tile::kBits);
  const int64_t tile_n0 = block_n * (Tile::kRows / kTileN), m0 = block_m * Tile::kCols;
  const int rows = static_cast<int>(std::min<int64_t>(p.c.m, Tile::kCols));
  const int valid_rows = static_cast<int>(std::min<int64_t>(p.c.m - m0, Tile::kCols));
  const int64_t stages = ceil_div(p.tiles_k, Tile::kStageTiles);
  const int64_t first = split * per_split, last = std::min(first + per_split, stages);
  const int groups = groups_per_tile(p.c.group, p.c.k);
  const uint32_t ends = group_ends(p.c.group, p.c.k), group_tiles = reciprocal(tiles_per_group(p.c.group));
  std::vector<float> sums(Tile::kWarpsK * Tile::kCols * Tile::kPitchSum, 0);

  for (int warp = 0; warp < Tile::kThreads / kLanes; ++warp) {
    // [row tile][x tile][lane][register]
    std::vector<float> acc(Tile::kRowTiles * Tile::kTilesM * kLanes * 4), total(acc.size());
    const auto element = [](int r, int t, int lane, int c) {
      return ((r * Tile::kTilesM + t) * kLanes + lane) * 4 + c;
    };
    // Staged scales and zeros of a row tile of the block begin `stride` bytes after those of the one before.
    const int room = stage_groups<Tile>(groups, tiles_per_group(p.c.group));
    const int stride = room * kTileN * 4, zero_stride = room * kTileN;
    const auto int_zero = [&](const std::vector<uint8_t>* staged, int r, int at, int row) {
      if (staged)
        return static_cast<float>(
            static_cast<int8_t>(staged->at(Tile::row_tile(warp, r) * zero_stride + at * kTileN + row)));
      return p.zeros[std::min(tile_n0 + Tile::row_tile(warp, r), p.tiles_n - 1) * kTileN + row];
    };
    const auto flush = [&](const Stage<Tile>* st, int at) {
      for (int r = 0; r < Tile::kRowTiles; ++r)
        for (int t = 0; t < Tile::kTilesM; ++t)
          for (int lane = 0; lane < kLanes; ++lane)
            for (int c = 0; c < 4; ++c) {
              const int row = lane / 4 + c / 2 * 8;
              float scale;
              if (st)
                std::memcpy(&scale, &st->scales.at(Tile::row_tile(warp, r) * stride + (at * kTileN + row) * 4), 4);
              else
                scale = p.scales[std::min(tile_n0 + Tile::row_tile(warp, r), p.tiles_n - 1) * kTileN + row];
              total[element(r, t, lane, c)] += scale * acc[element(r, t, lane, c)];
              acc[element(r, t, lane, c)] = 0;
            }
    };
    for (int64_t stage = first; stage < last; ++stage) {
      const Stage<Tile> st(p, stage, tile_n0, m0, rows, valid_rows);
      for (int j = 0; j < Tile::kTilesK; ++j) {
        const int in_stage = Tile::k_tile(warp, j);
        const int64_t tile_k = stage * Tile::kStageTiles + in_stage;
        if (tile_k >= p.tiles_k) break;
        std::vector<int> code(Tile::kRowTiles * kLanes * kSteps * 8);
        for (int r = 0; r < Tile::kRowTiles; ++r)
          for (int lane = 0; lane < kLanes; ++lane) {
            int found[kSteps][8];
            const int64_t tile_n = tile_n0 + Tile::row_tile(warp, r);
            const uint8_t* at = &st.codes[Tile::slot(Tile::row_tile(warp, r), in_stage) * tile_bytes(Tile::kBits)];
            if (tile_n >= p.tiles_n) continue;  // never stored
            check_fragments<Tile::kBits>(p, at, tile_n, tile_k, lane, table, found);
            std::memcpy(&code[(r * kLanes + lane) * kSteps * 8], found, sizeof(found));
          }
        // Of several groups in a tile, and of one. Those that K does not reach any more are the last.
        const auto staged = [&](int part) {
          const int found = groups > 1 ? in_stage * groups + part : group_of(tile_k, group_tiles) - st.first;
          return std::min(found, static_cast<int>(p.groups) - 1 - st.first);
        };
        int part = 0;
        for (int s = 0; s < kSteps; ++s) {
          for (int r = 0; r < Tile::kRowTiles; ++r)
            for (int t = 0; t < Tile::kTilesM; ++t) {
              // ldmatrix.x4: row i of matrix j is where lane 8 j + i points; lane l gets elements 2 (l % 4) and the
              // next of row l / 4. Then B is (k, n): registers 0 and 1 hold k = 2 (l % 4) + {0, 1} and + 8, n = l / 4.
              const auto b = [&](int k, int n) {
                const int matrix = s % 2 * 2 + k / 8;
                const uint32_t address = Tile::x_address(matrix * 8 + n, t, in_stage, s / 2 * 2, rows);
                return st.x.at(address / 2 + k % 8);
              };
              double a[16][16], product[16][8] = {};
              for (int lane = 0; lane < kLanes; ++lane)
                for (int i = 0; i < 8; ++i) {
                  const int row = a_row(lane, i / 2);
                  float v = p.table[code[((r * kLanes + lane) * kSteps + s) * 8 + i]];
                  if (p.c.zero == Zero::kInt) v -= int_zero(groups ? &st.zeros : nullptr, r, staged(part), row);
                  a[row][a_col(lane, i / 2, i % 2)] = v;
                }
              for (int row = 0; row < 16; ++row)
                for (int n = 0; n < 8; ++n)
                  for (int k = 0; k < 16; ++k) product[row][n] += a[row][k] * b(k, n);
              for (int lane = 0; lane < kLanes; ++lane)
                for (int c = 0; c < 4; ++c)
                  acc[element(r, t, lane, c)] += product[lane / 4 + c / 2 * 8][lane % 4 * 2 + c % 2];
            }
          if (groups > 1 && ends >> s & 1) flush(&st, staged(part++));
        }
        if (groups == 1) flush(&st, staged(0));
      }
    }
    if (groups == 0) flush(nullptr, 0);
    for (int r = 0; r < Tile::kRowTiles; ++r)
      for (int t = 0; t < Tile::kTilesM; ++t)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int c = 0; c < 4; ++c)
            sums.at((Tile::warp_k(warp) * Tile::kCols + Tile::sum_col(lane, t, c)) * Tile::kPitchSum +
                    Tile::sum_row(warp, lane, r, c)) += total[element(r, t, lane, c)];
  }
  for (int i = 0; i < valid_rows * Tile::kRows; ++i) {
    const int64_t n = tile_n0 * kTileN + i % Tile::kRows, m = m0 + i / Tile::kRows;
    for (int w = 0; w < Tile::kWarpsK && n < p.c.n; ++w)
      y[m * p.c.n + n] += sums[(w * Tile::kCols + i / Tile::kRows) * Tile::kPitchSum + i % Tile::kRows];
    if (n < p.c.n && split == 0) y[m * p.c.n + n] += p.float_zero_term(n, m);
  }
}

void compare(const Problem& p, const std::vector<double>& y, const char* what) {
  for (size_t i = 0; i < y.size(); ++i) expect(y[i] == p.y[i], what, i, y[i], p.y[i]);
}

template <int kBits, int kTilesM>
void check_mma(const Case& c, std::mt19937& rng) {
  using Tile = MmaTile<kBits, kTilesM>;
  const Problem p(c, kBits, rng);
  const int64_t per_split = ceil_div(ceil_div(p.tiles_k, Tile::kStageTiles), c.splits);
  std::vector<double> y(c.m * c.n, 0);
  for (int64_t n = 0; n < ceil_div(c.n, Tile::kRows); ++n)
    for (int64_t split = 0; split < c.splits; ++split)
      for (int64_t m = 0; m < ceil_div(c.m, Tile::kCols); ++m) mma_block<Tile>(p, n, split, per_split, m, y);
  compare(p, y, "mma");
}

// Blocks of the wgmma kernel: x comes as the tensor memory accelerator writes it, B is where the descriptor says.
template <int kBits, int kCols>
void check_wgmma(const Case& c, std::mt19937& rng) {
  using Tile = WgmmaTile<kBits, kCols>;
  const Problem p(c, kBits, rng);
  const auto table = shared_table(kBits);
  std::vector<double> y(c.m * c.n, 0);
  for (int64_t tile_n0 = 0; tile_n0 < p.tiles_n; tile_n0 += Tile::kRowTiles)
    for (int64_t m0 = 0; m0 < c.m; m0 += kCols)
      for (int64_t tile_k = 0; tile_k < p.tiles_k; ++tile_k) {
        constexpr uint32_t kBase = 3 * 1024;
        std::vector<float> x(kBase / 2 + kCols * kTileK, 1e30f);
        for (int m = 0; m < kCols; ++m)
          for (int k = 0; k < kTileK; ++k) {
            const int64_t row = m0 + m, column = tile_k * kTileK + k;
            x[(kBase + swizzle128(m * 128 + k * 2)) / 2] = row < c.m && column < c.k ? p.x[row * c.k + column] : 0;
          }
        for (int row_tile = 0; row_tile < Tile::kRowTiles; ++row_tile) {
          const int64_t tile_n = tile_n0 + row_tile;
          if (tile_n >= p.tiles_n) continue;
          std::vector<double> a(16 * kTileK);
          for (int lane = 0; lane < kLanes; ++lane) {
            int code[kSteps][8];
            const uint8_t* at =
                reinterpret_cast<const uint8_t*>(p.packed.data()) + (tile_n * p.tiles_k + tile_k) * tile_bytes(kBits);
            check_fragments<kBits>(p, at, tile_n, tile_k, lane, table, code);
            for (int s = 0; s < kSteps; ++s)
              for (int i = 0; i < 8; ++i)
                a[a_row(lane, i / 2) * kTileK + s * kStepK + a_col(lane, i / 2, i % 2)] = p.table[code[s][i]];
          }
          for (int lane = 0; lane < kLanes; ++lane)
            for (int j = 0; j < kCols / 2; ++j) {
              // Accumulator j: row l / 4 (+ 8), column 8 (j / 4) + 2 (l % 4) + j % 2.
              const int row = lane / 4 + j / 2 % 2 * 8, col = j / 4 * 8 + lane % 4 * 2 + j % 2;
              expect(Tile::sum_row(row_tile, lane, j) == row_tile * 16 + row && Tile::sum_col(lane, j) == col, "sum", j,
                     0, 0);
              double sum = 0;
              for (int s = 0; s < kSteps; ++s) {
                const uint64_t d = tile_descriptor(kBase) + 2 * s;
                const uint32_t start = (d & 0x3FFF) << 4, rows8 = (d >> 32 & 0x3FFF) << 4;
                for (int k = 0; k < kStepK; ++k) {
                  const uint32_t address = swizzle128(start + col / 8 * rows8 + col % 8 * 128 + k * 2);
                  sum += a[row * kTileK + s * kStepK + k] * x.at(address / 2);
                }
              }
              const int64_t n = tile_n * kTileN + row, m = m0 + col;
              if (n >= c.n || m >= c.m) continue;
              const int64_t at = scale_at(tile_n, tile_k * kTileK / c.group, p.groups) + row;
              double shift = 0;
              if (c.zero == Zero::kInt)
                for (int64_t k = tile_k * kTileK; k < std::min(c.k, (tile_k + 1) * kTileK); ++k)
                  shift += p.zeros[at] * p.x[m * c.k + k];
              y[m * c.n + n] += p.scales[at] * (sum - shift);
            }
        }
      }
  compare(p, y, "wgmma");
}

// Blocks of dequantize_kernel that writes numbers of kSize bytes: a code and its scale's place stand for a number.
template <int kBits, int kSize>
void check_dequantize(int64_t n, int64_t k, int64_t group, uint64_t address, int width, std::mt19937& rng) {
  using Tile = DequantizeTile<kSize>;
  const Problem p({0, n, k, std::min(group, k), Zero::kNone, 1}, kBits, rng);
  const DequantizePlan plan = Tile::plan(k, p.c.group, address);
  expect(plan.width == width, "width of a store", k, plan.width, width);
  expect(plan.tiles_k == p.tiles_k && plan.num_groups == p.groups, "plan", k, plan.tiles_k, p.tiles_k);
  std::vector<int64_t> out(n * k, -1);
  for (uint32_t block = 0; block < p.tiles_n * plan.blocks_k; ++block)
    for (int i = 0; i < Tile::kWarps * Tile::kTiles; ++i) {
      const uint32_t tile_n = Tile::tile_n(block, plan);
      const uint32_t tile_k = Tile::tile_k(block, i % Tile::kWarps, plan) + i / Tile::kWarps * Tile::kWarps;
      if (tile_k >= plan.tiles_k) continue;
      std::vector<int64_t> scales(Tile::kMaxScales, -1), tile(Tile::kBytes, -1);  // tile: by the first byte of a number
      const int64_t loaded = plan.groups == 4 ? 2 * kLanes : kLanes, size = p.scales.size();
      for (int64_t i = 0; i < loaded; ++i) {
        scales[i] = tile_scale(i, tile_n, tile_k, plan);
        expect(scales[i] < size, "bounds of a scale", i, scales[i], size);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t words[kBits];
        for (int w = 0; w < kBits; ++w)
          words[w] =
              p.packed[(int64_t{tile_n} * plan.tiles_k + tile_k) * (tile_bytes(kBits) / 4) + word_at(kBits, lane, w)];
        int first = 0;
        for (int c = 0; c < kLaneCodes; ++c) {
          if (starts_group(c / 8, plan.groups)) first = step_scale(c / 8, plan.groups);
          int64_t& to = tile.at(Tile::code_byte(lane, c & ~1) + c % 2 * kSize);
          expect(to == -1, "a number written once", c, to, -1);
          to = scales.at(first + lane / 4 + 8 * (c / 2 % 2)) << kBits | shifted_field<kBits, 2>(words, c) / 4;
        }
      }
      const int64_t rows = std::min<int64_t>(n - int64_t{tile_n} * kTileN, kTileN);
      const int row_bytes = static_cast<int>(std::min<int64_t>(k - int64_t{tile_k} * kTileK, kTileK)) * kSize;
      for (int lane = 0; lane < kLanes; ++lane)
        for (int byte = Tile::store_byte(lane, width); byte < row_bytes; byte += kLanes * width) {
          for (int row = Tile::store_row(lane, width); row < rows; row += Tile::rows_at_once(width))
            for (int e = 0; e < width / kSize; ++e) {
              const int64_t column = int64_t{tile_k} * kTileK + byte / kSize + e;
              expect(column < k, "a store within its row", column, column, k);
              if (column >= k) continue;
              int64_t& to = out.at((int64_t{tile_n} * kTileN + row) * k + column);
              expect(to == -1, "an output written once", column, to, -1);
              to = tile.at(row * Tile::kPitch + byte + e * kSize);
            }
          if (Tile::row_stores(width) <= kLanes) break;
        }
    }
  for (int64_t i = 0; i < n * k; ++i) {
    const int64_t row = i / k, at = scale_at(row / kTileN, i % k / p.c.group, p.groups) + row % kTileN;
    expect(out[i] == (at << kBits | p.codes[i]), "dequantize", i, out[i], at << kBits | p.codes[i]);
  }
  // Lanes that one access serves never meet in a bank: pairs of 4 or 8 bytes.
  for (int c = 0; c < kLaneCodes; c += 2)
    for (int half = 0; half < kSize / 2; ++half) {
      uint32_t banks = 0;
      for (int lane = 0; lane < kLanes * 2 / kSize; ++lane)
        for (int word = 0; word < kSize / 2; ++word)
          banks |= 1u << (Tile::code_byte(half * kLanes * 2 / kSize + lane, c) / 4 + word) % 32;
      expect(banks == ~0u, "banks of a pair", c, banks, ~0u);
    }
}

template <int kBits>
void check_dequantize_all(std::mt19937& rng) {
  check_dequantize<kBits, 2>(32, 1152, 64, 256, 16, rng);
  check_dequantize<kBits, 2>(21, 1096, 128, 16, 16, rng);
  check_dequantize<kBits, 2>(21, 150, 32, 16, 4, rng);
  check_dequantize<kBits, 2>(17, 129, 16, 16, 2, rng);
  check_dequantize<kBits, 2>(5, 128, 192, 4, 4, rng);
  check_dequantize<kBits, 2>(40, 40, 192, 6, 2, rng);
  check_dequantize<kBits, 4>(33, 2052, 192, 16, 16, rng);
  check_dequantize<kBits, 4>(18, 131, 32, 16, 4, rng);
  check_dequantize<kBits, 4>(1, 100, 16, 64, 16, rng);
  check_dequantize<kBits, 4>(3, 7, 7, 64, 4, rng);
}

template <int kBits>
void check_bits(std::mt19937& rng) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < kLaneCodes; ++i) {
      const int row = code_row(lane, i), k = code_k(lane, i);
      expect(lane_of(row, k) == lane && code_of(row, k) == i, "inverse of the layout", i, lane, 0);
    }
  check_dequantize_all<kBits>(rng);
  // Lanes of one access never meet in a bank: the words of their copies are all different.
  const int width = entry_bytes(kBits), at_once = kEntryPitch / width;
  for (int lane = 0; lane < at_once; ++lane)
    expect(copy_offset(kBits, lane) == lane * width, "copies", lane, copy_offset(kBits, lane), lane * width);
  for (const Zero zero : {Zero::kNone, Zero::kInt, Zero::kSubtract, Zero::kAdd}) {
    check_mma<kBits, 1>({1, 33, 600, 128, zero, 1}, rng);
    check_mma<kBits, 1>({7, 16, 1090, 32, zero, 2}, rng);
    check_mma<kBits, 1>({13, 16, 600, 128, zero, 1}, rng);  // rows in turns
    check_mma<kBits, 1>({2, 16, 1500, 192, zero, 1}, rng);
    check_mma<kBits, 2>({13, 70, 300, 300, zero, 2}, rng);
    check_mma<kBits, 4>({29, 40, 130, 16, zero, 1}, rng);
  }
  check_mma<kBits, 8>({67, 20, 200, 64, Zero::kInt, 2}, rng);
  check_mma<kBits, 8>({40, 20, 200, 200, Zero::kAdd, 2}, rng);
  check_wgmma<kBits, 64>({70, 40, 130, 64, Zero::kInt, 1}, rng);
  check_wgmma<kBits, 128>({150, 130, 200, 200, Zero::kNone, 1}, rng);
}

// The multiplication by the reciprocal is a division.
void check_reciprocal() {
  for (int d = 1; d < 700; ++d)
    for (int tile : {0, 1, d - 1, d, d + 1, 2 * d - 1, 5 * d, 4095, 4096, 65535})
      expect(group_of(tile, reciprocal(d)) == tile / d, "reciprocal", tile, group_of(tile, reciprocal(d)), tile / d);
}

// Tiles of a product in bands: each once.
void check_places() {
  for (const int tall : {1, 5, 8, 19})
    for (const int wide : {1, 7, 16}) {
      std::vector<int> seen(tall * wide);
      for (int i = 0; i < tall * wide; ++i) {
        const Place at = place_of(i, tall, wide, 8);
        ++seen.at(at.row * wide + at.column);
      }
      for (int i = 0; i < tall * wide; ++i) expect(seen[i] == 1, "a tile of a product", i, seen[i], 1);
    }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  check_reciprocal();
  check_places();
  check_memo();
  check_probe();
  check_ring();
  check_heuristics();
  check_fp8_all(rng);
  for_bits(1, [&]<int kBits>() { check_bits<kBits>(rng); });
  for (const int bits : {2, 3, 4, 5, 6, 8}) for_bits(bits, [&]<int kBits>() { check_bits<kBits>(rng); });
  std::printf("CUDA on the host: %d checks, %d failures\n", checks, failures);
  return failures != 0;
}
