// The CUDA kernel of FP8 products on the host, thread by thread: which bytes a lane's sums are made of, and which
// scales multiply them.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "cuda/fp8.h"
#include "cuda/tile.h"
#include "cuda_weight.h"

namespace lowbit::cuda {

// Blocks of the FP8 kernel: both operands as the tensor memory accelerator writes them, found by their descriptors.
template <int kCols>
void check_fp8(int64_t m, int64_t n, int64_t k, Scales kind_a, Scales kind_b, bool transposed, std::mt19937& rng) {
  using Tile = Fp8Tile<kCols>;
  const int blocks = static_cast<int>(ceil_div(k, Tile::kK));
  struct Matrix {
    int64_t rows;
    Scales kind;
    std::vector<float> values, scales;
  };
  const auto draw = [&](int64_t rows, Scales kind) {
    Matrix x{rows, kind, std::vector<float>(rows * k), {}};
    for (float& v : x.values) v = static_cast<float>(static_cast<int>(rng() % 9) - 4);
    const int64_t count = kind == Scales::kTensor       ? 1
                          : kind == Scales::kRow        ? rows
                          : kind == Scales::kBlock1x128 ? rows * blocks
                                                        : ceil_div(rows, 128) * blocks;
    for (int64_t i = 0; i < count; ++i) x.scales.push_back(static_cast<float>(1 + rng() % 3) / 2);
    if (count > 4) x.scales[count / 2] = NAN;  // which reaches the results of its own rows alone
    return x;
  };
  const Matrix a = draw(m, kind_a), b = draw(n, kind_b);
  const auto scale = [&](const Matrix& x, int64_t row, int block) {
    return x.scales.at(scale_index(x.kind, x.rows, row, block, blocks));
  };
  std::vector<double> want(m * n, 0), y(m * n, 0);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j)
      for (int64_t c = 0; c < k; ++c) {
        const int block = static_cast<int>(c / 128);
        const auto at = [&](const Matrix& x, int64_t row) {
          const int64_t where = x.kind == Scales::kTensor       ? 0
                                : x.kind == Scales::kRow        ? row
                                : x.kind == Scales::kBlock1x128 ? row * blocks + block
                                                                : row / 128 * blocks + block;
          return double{x.values[row * k + c]} * x.scales[where];
        };
        want[i * n + j] += at(a, i) * at(b, j);
      }
  const Matrix &p = transposed ? b : a, &q = transposed ? a : b;
  constexpr uint32_t kBase = 2 * 1024;
  for (int64_t p0 = 0; p0 < p.rows; p0 += Tile::kRows)
    for (int64_t q0 = 0; q0 < q.rows; q0 += kCols)
      for (int block = 0; block < blocks; ++block) {
        std::vector<float> stage(kBase + Tile::kStageBytes, 1e30f);
        const auto copy = [&](const Matrix& x, int64_t row0, int rows, int offset) {
          for (int r = 0; r < rows; ++r)
            for (int c = 0; c < Tile::kK; ++c) {
              const int64_t row = row0 + r, column = int64_t{block} * Tile::kK + c;
              stage.at(kBase + offset + swizzle128(r * 128 + c)) =
                  row < x.rows && column < k ? x.values[row * k + column] : 0;
            }
        };
        copy(p, p0, Tile::kRows, 0);
        copy(q, q0, kCols, Tile::q_offset());
        // Row and byte of K that a descriptor names.
        const auto element = [&](uint64_t d, int row, int byte) {
          const uint32_t start = (d & 0x3FFF) << 4, rows8 = (d >> 32 & 0x3FFF) << 4;
          return stage.at(swizzle128(start + row / 8 * rows8 + row % 8 * 128 + byte));
        };
        for (int warp = 0; warp < Tile::kWarps; ++warp)
          for (int lane = 0; lane < kLanes; ++lane)
            for (int j = 0; j < kCols / 2; ++j) {
              // Accumulator j of m64nNk32, and the rows of a warpgroup that warp % 4 has.
              const int row = warp % 4 * 16 + lane / 4 + j / 2 % 2 * 8, col = j / 4 * 8 + lane % 4 * 2 + j % 2;
              expect(Tile::sum_row(warp, lane, j) == warp / 4 * 64 + row && Tile::sum_col(lane, j) == col, "sum", j, 0,
                     0);
              double sum = 0;
              for (int s = 0; s < Tile::kSteps; ++s)
                for (int byte = 0; byte < Tile::kStepK; ++byte)
                  sum += double{element(tile_descriptor(kBase + Tile::p_offset(warp / 4)) + 2 * s, row, byte)} *
                         element(tile_descriptor(kBase + Tile::q_offset()) + 2 * s, col, byte);
              const int64_t pr = p0 + Tile::sum_row(warp, lane, j), qr = q0 + col;
              if (pr >= p.rows || qr >= q.rows) continue;
              y[transposed ? qr * n + pr : pr * n + qr] += sum * scale(p, pr, block) * scale(q, qr, block);
            }
      }
  for (size_t i = 0; i < y.size(); ++i)
    expect(std::isnan(want[i]) ? std::isnan(y[i]) : y[i] == want[i], "fp8", i, y[i], want[i]);
}

inline void check_fp8_all(std::mt19937& rng) {
  check_fp8<16>(13, 150, 300, Scales::kBlock1x128, Scales::kBlock128x128, true, rng);
  check_fp8<64>(40, 130, 200, Scales::kRow, Scales::kTensor, true, rng);
  check_fp8<128>(150, 140, 260, Scales::kBlock1x128, Scales::kBlock1x128, false, rng);
  check_fp8<128>(140, 150, 140, Scales::kTensor, Scales::kBlock128x128, false, rng);
  for (const int64_t m : {1, 16, 17, 64, 65, 4096})
    for (const Scales kind : {Scales::kTensor, Scales::kRow, Scales::kBlock1x128, Scales::kBlock128x128}) {
      const Fp8Config c = choose_fp8(m, kind, Scales::kBlock1x128);
      expect(c.transposed == (m <= 64 || kind != Scales::kBlock1x128), "P", m, c.transposed, 0);
      expect(c.cols >= 64 || m <= c.cols, "columns", m, c.cols, 0);
    }
}

}  // namespace lowbit::cuda
